"""Speed of the weight-gradient ops: dense product, torch reference and native kernels.

    python -m scripts.bench_grad --device=cpu --json
    python -m scripts.bench_grad --shapes=256x1024 --tokens=512,2048 --ranks=8,16 --markdown
    python -m scripts.bench_grad --device=cuda --seconds=20 --json

For every in×out shape, token count and rank: the dense gradient BᵀA by torch.mm, and the sketch
(tangent) and the power estimate, in plain torch (molegrad/ops), native, on a GPU by every
path that can be forced, and on float8 operands (molegrad/bench/paths.py). The variants are timed in
interleaved rounds (molegrad/bench/timing.py), and ratios are medians of the rounds' own ratios.
Then the new bases of all layers of a GPT, the small ops, reference against native, and forward and
backward pass of whole layers, which share the two dense products that estimated gradients leave as
they are. Last the sampled product by share and block, on operands as relu² makes them, four fifths
of the wider one zero, against torch's product added to a gradient.

Columns: µs at the 20th, 50th and 80th percentile; on a GPU the µs the host takes to launch it;
GFLOP/s or TFLOP/s of the multiplications the formula needs; GB/s of A and B read as often as it
must (dense and sketch once, power twice); the ratio to dense; that ratio as a share of the
arithmetic limit mn / (2k (m + n)), which a kernel exceeds where its rate is higher than the
library's dense one; "of floor", how much of the time those reads alone would take at the memory's
bandwidth, which is measured in the same run; the ratio to the reference. What has not been measured
has a note that says why. The size of the project's targets is measured first, with more time than
others. Last the MOLEGRAD_SKETCH_PATH that takes the fastest path of every size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from molegrad import build_info, ops
from molegrad.bench import targets
from molegrad.bench.layers import (
    bench_bases,
    bench_layers,
    bench_sampled,
    row_of,
)
from molegrad.bench.partial import exit_status, until_interrupted
from molegrad.bench.paths import FORCED, FP8, VARIABLE, Problem, fastest, has_native
from molegrad.bench.products import basis, bench_gradients
from molegrad.bench.table import table
from molegrad.bench.timing import bandwidth, measure_cells, reason, time_interleaved
from molegrad.gpt.train import flags
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.hardware import device_name

SMALL_OPS = (
    "orthonormalize",
    "polar_factor",
    "lowrank_update_",
    "lowrank_update_many_",
    "rademacher",
    "quantize_rows",
    "quantize_tensor",
    "add_quantized_",
    "sketch_accumulate_many_",
)
MANY = 12  # layers that `lowrank_update_many_` and `sketch_accumulate_many_` take at once
MANY_TOKENS = 256  # of each of them
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
DEFAULTS = {
    "cpu": {"shapes": "768x3072,1280x5120", "tokens": "8192", "ranks": "32,128",
            "dtype": "float32", "repeats": 11},
    "cuda": {"shapes": "768x3072,1280x5120,4096x14336", "tokens": "2048,8192,32768",
             "ranks": "32,64,128", "dtype": "bfloat16", "repeats": 31},
}  # fmt: skip
GROUPS = (*FORCED, "fp8")  # of `GradBenchConfig.paths`
TABLES = ("gradients", "bases", "small", "layers", "sampled")


@dataclass(frozen=True)
class GradBenchConfig:
    """Time the weight-gradient ops against the dense product.

    Raises:
        ValueError: a shape, count or dtype that cannot be timed.
    """

    device: str = flag("cpu", "cpu or cuda")
    shapes: str = flag("auto", "in_features x out_features, comma separated; auto: the device's")
    tokens: str = flag("auto", "token counts, comma separated; auto: the device's")
    ranks: str = flag("auto", "ranks, comma separated; auto: the device's")
    dtype: str = flag("auto", f"of A and B: {', '.join(DTYPES)}; auto: bfloat16 on a GPU, float32")
    paths: str = flag(
        "all", f"forced ways to compute, comma separated: {', '.join(GROUPS)}; or all"
    )
    depth: int = flag(12, "blocks of the GPT whose layers' bases are renewed; 0 leaves that out")
    threads: int = flag(0, "CPU threads; 0 leaves torch's own number")
    repeats: int = flag(0, "interleaved rounds; 0 is 31 on a GPU, 11 elsewhere")
    seconds: float = flag(0.0, "for each table, shared among its shapes; 0 is no limit")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: bool = flag(False, "print the tables as Markdown")

    def __post_init__(self) -> None:
        defaults = DEFAULTS["cuda" if self.device.startswith("cuda") else "cpu"]
        for name, value in defaults.items():
            if getattr(self, name) in ("auto", 0):
                object.__setattr__(self, name, value)
        unknown = set(self.path_list) - set(GROUPS)
        if unknown:
            raise ValueError(f"paths={self.paths} should be of {', '.join(GROUPS)}, or all")
        if self.depth < 0 or self.seconds < 0:
            raise ValueError(f"depth={self.depth} and seconds={self.seconds} must not be negative")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is not one of {', '.join(DTYPES)}")
        if self.repeats < 1 or self.threads < 0:
            raise ValueError(
                f"repeats={self.repeats} must be at least 1, threads={self.threads} at least 0"
            )
        for rank in self.rank_list:
            for n, m in self.shape_list:
                if not 1 <= rank <= min(n, m):
                    raise ValueError(f"rank {rank} does not fit shape {n}x{m}")
        if min(self.token_list) < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")

    @property
    def shape_list(self) -> list[tuple[int, int]]:
        try:
            shapes = [tuple(int(x) for x in s.split("x")) for s in self.shapes.split(",")]
            return [(n, m) for n, m in shapes]
        except ValueError:
            raise ValueError(f"shapes={self.shapes} should look like 768x3072,1280x5120") from None

    @property
    def path_list(self) -> list[str]:
        return list(GROUPS) if self.paths == "all" else self.paths.split(",")

    @property
    def left_out(self) -> tuple[str, ...]:
        """The ways of `molegrad.bench.paths` that are not to be timed."""
        fp8 = () if "fp8" in self.path_list else FP8
        return (*(path for path in FORCED if path not in self.path_list), *fp8)

    @property
    def token_list(self) -> list[int]:
        return _integers("tokens", self.tokens)

    @property
    def rank_list(self) -> list[int]:
        return _integers("ranks", self.ranks)


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text} should be integers separated by commas") from None


def bench_small(
    n: int, m: int, k: int, device: torch.device, repeats: int, limit: float
) -> list[dict]:
    """The ops on factors, reference against native; float32."""
    u, v = basis(m, k, device), basis(n, k, device)
    y, w = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    weight = torch.randn(m, n, device=device)
    arguments = {
        "orthonormalize": (y,),
        "polar_factor": (w,),
        "lowrank_update_": (weight, u, w, -1e-3),
        "lowrank_update_many_": (
            [weight.bfloat16() for _ in range(MANY)],
            torch.stack([u] * MANY),
            torch.stack([w] * MANY),
            -1e-3,
        ),
        "rademacher": (m, k, torch.zeros((), dtype=torch.int64, device=device)),
        "quantize_rows": (weight,),
        "quantize_tensor": (weight, True),
        "add_quantized_": (
            torch.zeros(m, n, dtype=torch.int8, device=device),
            torch.ones(m, 1, device=device),
            weight,
        ),
        "sketch_accumulate_many_": _many_layers(u, v),
    }
    rows = []
    for name in SMALL_OPS:
        variants = {"reference": ops.OPS[name].reference}
        if has_native(name, device):
            variants["native"] = getattr(ops, name)
            if name == "sketch_accumulate_many_":
                variants["one by one"] = _one_by_one
        runs = {how: lambda f=f, x=arguments[name]: f(*x) for how, f in variants.items()}
        timed = time_interleaved(runs, repeats, device, limit / len(SMALL_OPS))
        for how in variants:
            row = {"n": n, "m": m, "k": k, "op": name, "how": how}
            rows.append(row_of(timed, how, row, plain="reference" if how == "native" else None))
        if "native" not in variants:
            row = {"n": n, "m": m, "k": k, "op": name, "how": "native"}
            rows.append(row | {"note": "not built"})
    return rows


def _many_layers(u: torch.Tensor, v: torch.Tensor) -> tuple[list[torch.Tensor], ...]:
    """Arguments of `sketch_accumulate_many_` for MANY layers with MANY_TOKENS tokens each, in
    bfloat16 on a GPU, where the dtype decides which layers share launches."""
    dtype = torch.bfloat16 if u.is_cuda else torch.float32

    def inputs(basis: torch.Tensor) -> list[torch.Tensor]:
        rows = torch.randn(MANY, MANY_TOKENS, basis.shape[0], device=u.device).to(dtype)
        return list(rows.unbind())

    sums = ([u.new_zeros(basis.shape) for _ in range(MANY)] for basis in (u, v))
    return (*sums, inputs(v), inputs(u), [u] * MANY, [v] * MANY)


def _one_by_one(*lists: list[torch.Tensor]) -> None:
    for layer in zip(*lists, strict=True):
        ops.sketch_accumulate_(*layer)


@torch.no_grad()
def bench(config: GradBenchConfig, show: Callable[[str, list[dict]], None] | None = None) -> dict:
    """Every measurement of a configuration: a list of rows for each of TABLES, and on what machine.

    A cell that fails has a row whose note says so. On Ctrl-C the rows so far are returned, and
    "interrupted" is True. "bandwidth" is None where it could not be measured, for a reason that is
    "bandwidth_note".

    Args:
        show: called with the name and the rows of each table as soon as it is finished.
    """
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device; use --device=cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    result: dict = {name: [] for name in TABLES}
    try:
        result |= {
            "device": device_name(device),
            "bandwidth": None,
            "config": flags.resolved(config),
            "threads": torch.get_num_threads(),
            "native": has_native("sketch", device),
            "build_info": build_info(),
        }
        with until_interrupted(result):
            torch.manual_seed(0)
            _measure(config, device, result, show)
    finally:
        torch.set_num_threads(threads)
    return result | {"sketch_path": fastest(result["gradients"])}


def _measure(config: GradBenchConfig, device: torch.device, result: dict, show) -> None:
    """Adds the bandwidth and all rows to the result, as soon as they are there."""
    try:
        result["bandwidth"] = bandwidth(device)
    except RuntimeError as error:
        result["bandwidth_note"] = reason(error)
    rate = result["bandwidth"]["best"] if result["bandwidth"] else None
    for name, (cells, measure) in _tables(config, device, rate).items():
        try:
            first = targets.SHAPE if name == "gradients" else None
            measure_cells(result[name], cells, measure, config.seconds, device, first)
        finally:
            if show is not None:
                show(name, result[name])


def _tables(config: GradBenchConfig, device: torch.device, rate: float | None) -> dict[str, tuple]:
    """Of every table: its cells, and what makes the rows of one of them."""
    dtype, repeats = DTYPES[config.dtype], config.repeats
    shapes = [{"n": n, "m": m} for n, m in config.shape_list]
    operands = [shape | {"tokens": tokens} for shape in shapes for tokens in config.token_list]
    ranks = [{"k": k} for k in config.rank_list]

    def gradients(cell: dict, limit: float) -> list[dict]:
        problem = Problem(**cell, dtype=dtype, device=device)
        return bench_gradients(problem, repeats, limit, rate, config.left_out)

    def bases(cell: dict, limit: float) -> list[dict]:
        return bench_bases(cell["depth"], cell["k"], device, repeats, limit)

    def small(cell: dict, limit: float) -> list[dict]:
        return bench_small(**cell, device=device, repeats=repeats, limit=limit)

    def layers(cell: dict, limit: float) -> list[dict]:
        return bench_layers(**cell, dtype=dtype, device=device, repeats=repeats, limit=limit)

    def sampled(cell: dict, limit: float) -> list[dict]:
        return bench_sampled(**cell, dtype=dtype, device=device, repeats=repeats, limit=limit)

    products = [operand | rank for operand in operands for rank in ranks]
    models = [{"depth": config.depth, **rank} for rank in ranks] if config.depth else []
    return {
        "gradients": (products, gradients),
        "bases": (models, bases),
        "small": ([shape | rank for shape in shapes for rank in ranks], small),
        "layers": (products, layers),
        "sampled": (operands, sampled),
    }


@flags.command("bench_grad")
def main(argv: list[str] | None = None) -> int:
    """The command; its status is 1 where something failed, whose rows say what, and 130 where it
    was interrupted."""
    config = flags.parse(GradBenchConfig, argv, prog="python -m scripts.bench_grad")
    info = build_info()
    kernels = info.get("cpu_capability") or info["reason"]
    if config.device.startswith("cuda"):
        kernels = info["cuda_built"]["architectures"] if info.get("cuda") else "none for CUDA"
    print(
        f"torch {info['torch']}, {config.device}, {config.dtype}, "
        f"{config.threads or torch.get_num_threads()} threads, native kernels: {kernels}\n"
    )
    try:
        result = bench(config, lambda name, rows: _show(rows, config.markdown))
    except ValueError as error:
        print(f"bench_grad: {error}")
        return 2
    rate, memory = result["bandwidth"], result.get("bandwidth_note", "not measured")
    if rate is not None:
        memory = f"{rate['read'] / 1e9:.1f} GB/s read by a sum, "
        memory += f"{rate['copy'] / 1e9:.1f} GB/s copied (read and written)"
    print(f"{result['device']}; memory: {memory}")
    if result["sketch_path"] is not None:
        print(f"the fastest sketches of {config.dtype}: export {VARIABLE}={result['sketch_path']}")
    if result.get("interrupted"):
        print("interrupted: the rows so far")
    if config.json:
        print(json.dumps(result), flush=True)
    failed = (row.get("note", "").startswith("failed") for name in TABLES for row in result[name])
    return exit_status(result, any(failed) or "bandwidth_note" in result)


def _show(rows: list[dict], markdown: bool) -> None:
    if rows:
        print(table(rows, markdown) + "\n", flush=True)
