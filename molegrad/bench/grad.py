"""Speed of the ops: dense product, torch reference and native kernels.

    python -m scripts.bench_grad --device=cpu --json
    python -m scripts.bench_grad --shapes=256x1024 --tokens=512,2048 --ranks=8,16 --markdown
    python -m scripts.bench_grad --device=cuda --seconds=20 --json

Everything is timed in interleaved rounds (molegrad/bench/timing.py), and a ratio is the median of
the rounds' own ratios. Tables:

- gradients: for every in×out shape, token count and rank the dense gradient BᵀA by torch.mm, and
  `sketch`, `sketch_accumulate_` and `lowrank_grad`: in plain torch, native, on a GPU by every path
  that can be forced, and on float8 operands (molegrad/bench/gpu.py);
- bases: `orthonormalize` of all layers of a GPT;
- ops: the other ops, reference against native;
- layers: forward and backward pass of whole layers;
- sampled: `sampled_grad_` by sampling fraction and block, on operands as relu² makes them, four
  fifths of the wider one zero, against torch's product added to a gradient.

Columns: µs at the 20th, 50th and 80th percentile; on a GPU the µs the host takes to launch it;
GFLOP/s or TFLOP/s of the multiplications the formula needs; GB/s of A and B read as often as it
must (dense and sketch once, power twice); the ratio to dense; that ratio as a share of the
arithmetic limit mn / (2k (m + n)), which a kernel exceeds where its rate is higher than the
library's dense one; "of floor", how much of the time those reads alone would take at the memory's
bandwidth, which is measured in the same run; the ratio to the reference. What has not been measured
has a note that says why. On a GPU the last lines say what is wanted there (`gpu.TARGETS`), and the
MOLEGRAD_SKETCH_PATH that takes the fastest path of every size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from molegrad import build_info, ops
from molegrad.bench.gpu import (
    FORCED,
    FP8,
    SIZE,
    VARIABLE,
    Problem,
    fastest,
    forced,
    obstacle,
    targets,
    ways,
)
from molegrad.bench.layer import basis, bench_bases, bench_layers, with_zeros
from molegrad.bench.timing import (
    bandwidth,
    exit_status,
    has_native,
    measure_cells,
    op_rows,
    reason,
    row_of,
    time_interleaved,
    until_interrupted,
)
from molegrad.gpt.train import flags
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.hardware import device_name
from molegrad.memory.table import table
from molegrad.ops import OPS
from molegrad.ops.checks import acc_dtype

PRODUCTS = ("sketch", "sketch_accumulate_", "lowrank_grad")
MANY = 12  # layers that `lowrank_update_many_` and `sketch_accumulate_many_` take at once
MANY_TOKENS = 256  # of each of them
FRACTIONS, BLOCKS = (0.25, 0.125), (1, 2, 4, 16)
WIDE_BLOCKS = (64, 128)  # that suit a GPU's tensor cores
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
DEFAULTS = {
    "cpu": {"shapes": "768x3072,1280x5120", "tokens": "8192", "ranks": "32,128",
            "dtype": "float32", "repeats": 11},
    "cuda": {"shapes": "768x3072,1280x5120,4096x14336", "tokens": "2048,8192,32768",
             "ranks": "32,64,128", "dtype": "bfloat16", "repeats": 31},
}  # fmt: skip
GROUPS = (*FORCED, "fp8")  # of `GradBenchConfig.paths`
TABLES = ("gradients", "bases", "ops", "layers", "sampled")


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
        if self.paths != "all" and set(self.paths.split(",")) - set(GROUPS):
            raise ValueError(f"paths={self.paths} should be of {', '.join(GROUPS)}, or all")
        if self.depth < 0 or self.seconds < 0:
            raise ValueError(f"depth={self.depth} and seconds={self.seconds} must not be negative")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is not one of {', '.join(DTYPES)}")
        if self.repeats < 1 or self.threads < 0:
            raise ValueError(
                f"repeats={self.repeats} must be at least 1, threads={self.threads} at least 0"
            )
        for rank in self.integers("ranks"):
            for n, m in self.shape_list:
                if not 1 <= rank <= min(n, m):
                    raise ValueError(f"rank {rank} does not fit shape {n}x{m}")
        if min(self.integers("tokens")) < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")

    @property
    def shape_list(self) -> list[tuple[int, int]]:
        try:
            shapes = [tuple(int(x) for x in s.split("x")) for s in self.shapes.split(",")]
            return [(n, m) for n, m in shapes]
        except ValueError:
            raise ValueError(f"shapes={self.shapes} should look like 768x3072,1280x5120") from None

    def integers(self, name: str) -> list[int]:
        """The values of the flags tokens or ranks."""
        text = getattr(self, name)
        try:
            return [int(x) for x in text.split(",")]
        except ValueError:
            raise ValueError(f"{name}={text} should be integers separated by commas") from None

    @property
    def left_out(self) -> tuple[str, ...]:
        """The ways of `molegrad.bench.gpu` that are not to be timed."""
        wanted = GROUPS if self.paths == "all" else self.paths.split(",")
        fp8 = () if "fp8" in wanted else FP8
        return (*(path for path in FORCED if path not in wanted), *fp8)


def bench_gradients(
    problem: Problem,
    repeats: int,
    limit: float,
    rate: float | None,
    left_out: tuple[str, ...] = (),
) -> list[dict]:
    """A row for every product and way, with a "note" in place of times where it is not measured.

    Args:
        limit: seconds all of it may take.
        rate: bytes a second of the device's memory, for "of_floor"; None: not known.
        left_out: ways that are not to run.
    """
    n, m, tokens, k = problem.n, problem.m, problem.tokens, problem.k
    dtype, device = problem.dtype, problem.device
    a = torch.randn(tokens, n, device=device).to(dtype)
    b = torch.randn(tokens, m, device=device).to(dtype)
    u, v = basis(m, k, device), basis(n, k, device)
    sums = [torch.zeros(rows, k, device=device, dtype=acc_dtype(dtype)) for rows in (m, n)]
    calls: dict[str, Callable] = {
        "sketch": lambda op, a, b, **scales: op(a, b, u, v, **scales),
        "sketch_accumulate_": lambda op, a, b, **scales: op(*sums, a, b, u, v, **scales),
        "lowrank_grad": lambda op, a, b, **scales: op(a, b, v, **scales),
    }
    read = {way: ((a, b), {}) for way in ("torch.mm", "reference", "native", *FORCED)}
    variants: dict[tuple[str, str], Callable] = {("dense", "torch.mm"): lambda: b.mT @ a}
    notes: dict[tuple[str, str], str] = {}
    for name in ("sketch", "lowrank_grad"):
        op = OPS[name].reference
        variants[name, "reference"] = lambda name=name, op=op: calls[name](op, a, b)
    for name in PRODUCTS:
        for way in ways(name, device):
            note = "left out" if way in left_out else obstacle(name, way, problem)
            if note is not None:
                notes[name, way] = note
                continue
            if way in FP8 and way not in read:
                read[way] = _float8(a, b, way)

            def run(name=name, way=way):
                operands, scales = read[way]
                return calls[name](getattr(ops, name), *operands, **scales)

            variants[name, way] = _forced(run, way) if way in FORCED else run
    timed = time_interleaved(variants, repeats, device, limit)
    rows = []
    for name, how in [*variants, *notes]:
        labels = {"n": n, "m": m, "tokens": tokens, "k": k, "op": name, "how": how}
        if (name, how) in notes:
            rows.append(labels | {"note": notes[name, how]})
            continue
        is_dense = name == "dense"
        plain = None if how in ("torch.mm", "reference") else (_plain(name), "reference")
        row = row_of(timed, (name, how), labels, ("dense", "torch.mm"), plain)
        rows.append(row)
        if "note" in row:
            continue
        operands, _ = read[how]
        passes = 2 if name == "lowrank_grad" else 1
        moved = passes * sum(x.numel() * x.element_size() for x in operands)
        flop = 2 * tokens * n * m if is_dense else 4 * tokens * k * (n + m)
        if device.type == "cuda":
            row["tflops"] = flop / row["us_p50"] / 1e6
        else:
            row["gflops"] = flop / row["us_p50"] / 1e3
        written = is_dense * n * m * a.element_size()
        row["gbytes"] = (moved + written) / row["us_p50"] / 1e3
        if not is_dense:
            row["of_floor"] = rate and moved / rate * 1e6 / row["us_p50"]
            row["of_limit"] = row.get("vs_dense") and row["vs_dense"] * 2 * k * (n + m) / (n * m)
    return rows


def _plain(name: str) -> str:
    """The product whose reference is timed in the place of an op's."""
    return "sketch" if name == "sketch_accumulate_" else name


def _forced(run: Callable, path: str) -> Callable:
    def on_path():
        with forced(path):
            return run()

    return on_path


def _float8(a: torch.Tensor, b: torch.Tensor, way: str) -> tuple[tuple, dict]:
    """A in E4M3 with a scale for each token, and B in E5M2 if the way says so."""
    data, scale = ops.quantize_rows(a)
    if way == "fp8 A":
        return (data, b), {"a_scale": scale}
    other, other_scale = ops.quantize_rows(b, True)
    return (data, other), {"a_scale": scale, "b_scale": other_scale}


def other_ops(n: int, m: int, k: int, device: torch.device) -> dict[str, tuple]:
    """Arguments of the ops that the other tables leave out."""
    u, v = basis(m, k, device), basis(n, k, device)
    w, weight = torch.randn(n, k, device=device), torch.randn(m, n, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = [
        [torch.randn(MANY_TOKENS, size, device=device).to(dtype) for _ in range(MANY)]
        for size in (n, m)
    ]
    sums = [[side.new_zeros(side.shape) for _ in range(MANY)] for side in (u, v)]
    many = ([weight.bfloat16() for _ in range(MANY)], torch.stack([u] * MANY))
    zeros = torch.zeros(m, n, dtype=torch.int8, device=device)
    return {
        "orthonormalize": (torch.randn(m, k, device=device),),
        "polar_factor": (w,),
        "lowrank_update_": (weight, u, w, -1e-3),
        "lowrank_update_many_": (*many, torch.stack([w] * MANY), -1e-3),
        "rademacher": (m, k, torch.zeros((), dtype=torch.int64, device=device)),
        "quantize_rows": (weight,),
        "quantize_tensor": (weight, True),
        "add_quantized_": (zeros, torch.ones(m, 1, device=device), weight),
        "sketch_accumulate_many_": (*sums, *inputs, [u] * MANY, [v] * MANY),
    }


def bench_ops(
    n: int, m: int, k: int, device: torch.device, repeats: int, limit: float
) -> list[dict]:
    """The ops on factors and layers, reference against native; float32."""
    arguments = other_ops(n, m, k, device)
    limit, labels = limit / len(arguments), {"n": n, "m": m, "k": k}
    rows = []
    for name, values in arguments.items():
        beside = {}
        if name == "sketch_accumulate_many_" and has_native(name, device):
            layers = list(zip(*values, strict=True))
            beside["one by one"] = lambda layers=layers: [
                ops.sketch_accumulate_(*layer) for layer in layers
            ]
        rows += op_rows(name, lambda op, x=values: op(*x), labels, device, repeats, limit, beside)
    return rows


def bench_sampled(
    n: int, m: int, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int,
    limit: float,
) -> list[dict]:  # fmt: skip
    """`sampled_grad_` by fraction and block, against `torch.addmm` to the same gradient.

    On a GPU the reference, which is slow there, is timed for one fraction and block.
    """
    wide, narrow = max(n, m), min(n, m)
    x = with_zeros(tokens, wide, dtype, device)
    y = torch.randn(tokens, narrow, device=device).to(dtype)
    a, b = (x, y) if n > m else (y, x)
    grad, step = torch.zeros(m, n, device=device, dtype=dtype), torch.tensor(0, device=device)
    cuda = device.type == "cuda"
    blocks = (*BLOCKS, *(WIDE_BLOCKS if cuda else ()))
    rows = []
    for fraction in FRACTIONS:
        for block in blocks:
            rows += op_rows(
                "sampled_grad_",
                lambda op, f=fraction, k=block: op(grad, a, b, None, step, f, k),
                {"n": n, "m": m, "tokens": tokens, "fraction": fraction, "block": block},
                device, repeats, limit / (len(FRACTIONS) * len(blocks)),
                beside={"dense": lambda: grad.addmm_(b.mT, a)}, reference=not cuda or not rows,
            )  # fmt: skip
    return rows


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
    dtype, repeats = DTYPES[config.dtype], config.repeats
    ranks = [{"k": k} for k in config.integers("ranks")]
    shapes = [{"n": n, "m": m} for n, m in config.shape_list]
    operands = [shape | {"tokens": t} for shape in shapes for t in config.integers("tokens")]
    products = sorted((o | rank for o in operands for rank in ranks), key=lambda x: x != SIZE)
    models = [{"depth": config.depth, **rank} for rank in ranks if config.depth]
    common = {"device": device, "repeats": repeats}
    tables = {
        "gradients": (products, lambda cell, limit: bench_gradients(
            Problem(**cell, dtype=dtype, device=device), repeats, limit, rate, config.left_out)),
        "bases": (models, lambda cell, limit: bench_bases(**cell, **common, limit=limit)),
        "ops": ([shape | rank for shape in shapes for rank in ranks],
                lambda cell, limit: bench_ops(**cell, **common, limit=limit)),
        "layers": (products, lambda cell, limit: bench_layers(
            **cell, dtype=dtype, **common, limit=limit)),
        "sampled": (operands, lambda cell, limit: bench_sampled(
            **cell, dtype=dtype, **common, limit=limit)),
    }  # fmt: skip
    for name, (cells, measure) in tables.items():
        try:
            measure_cells(result[name], cells, measure, config.seconds, device)
        finally:
            if show is not None:
                show(name, result[name])


COLUMNS = {  # heading: (key, format)
    "in": ("n", "d"), "out": ("m", "d"), "tokens": ("tokens", "d"), "k": ("k", "d"),
    "fraction": ("fraction", "g"), "block": ("block", "d"),
    "depth": ("depth", "d"), "layers": ("layers", "d"), "op": ("op", "s"), "how": ("how", "s"),
    "µs p20": ("us_p20", ".0f"), "p50": ("us_p50", ".0f"), "p80": ("us_p80", ".0f"),
    "host µs": ("us_host", ".0f"),
    "GFLOP/s": ("gflops", ".0f"), "TFLOP/s": ("tflops", ".1f"), "GB/s": ("gbytes", ".1f"),
    "vs dense": ("vs_dense", ".2f"), "of limit": ("of_limit", ".0%"),
    "of floor": ("of_floor", ".0%"), "vs reference": ("vs_reference", ".2f"),
    "note": ("note", "s"),
}  # fmt: skip
_TARGETS = {
    "target": ("target", "s"), "wanted": ("wanted", "s"), "measured": ("measured", ".2f"),
    "result": ("result", "s"),
}  # fmt: skip


@flags.command("bench_grad")
def main(argv: list[str] | None = None) -> int:
    """The command; its status is 1 where something failed, whose rows say what, and 130 where it
    was interrupted."""
    config = flags.parse(GradBenchConfig, argv, prog="python -m scripts.bench_grad")
    info, cuda = build_info(), config.device.startswith("cuda")
    kernels = info.get("cpu_capability") or info["reason"]
    if cuda:
        kernels = info["cuda_built"]["architectures"] if info.get("cuda") else "none for CUDA"
    print(
        f"torch {info['torch']}, {config.device}, {config.dtype}, "
        f"{config.threads or torch.get_num_threads()} threads, native kernels: {kernels}\n"
    )

    def show(name: str, rows: list[dict]) -> None:
        if rows:
            print(table(rows, COLUMNS, config.markdown) + "\n", flush=True)

    try:
        result = bench(config, show)
    except ValueError as error:
        print(f"bench_grad: {error}")
        return 2
    rate, memory = result["bandwidth"], result.get("bandwidth_note", "not measured")
    if rate is not None:
        memory = f"{rate['read'] / 1e9:.1f} GB/s read by a sum, "
        memory += f"{rate['copy'] / 1e9:.1f} GB/s copied (read and written)"
    print(f"{result['device']}; memory: {memory}")
    if cuda and config.dtype == "bfloat16":
        print(table(targets(result), _TARGETS, config.markdown))
    if result["sketch_path"] is not None:
        print(f"the fastest sketches of {config.dtype}: export {VARIABLE}={result['sketch_path']}")
    if result.get("interrupted"):
        print("interrupted: the rows so far")
    if config.json:
        print(json.dumps(result), flush=True)
    failed = (row.get("note", "").startswith("failed") for name in TABLES for row in result[name])
    return exit_status(result, any(failed) or "bandwidth_note" in result)
