"""Speed of the weight-gradient ops: dense product, torch reference and native kernels.

    python -m scripts.bench_grad --device=cpu --json
    python -m scripts.bench_grad --shapes=256x1024 --tokens=512,2048 --ranks=8,16 --markdown

For every in×out shape, token count and rank: the dense gradient BᵀA by torch.mm, and the sketch
(tangent) and the power estimate, each in plain torch (molegrad/reference.py) and native. The
variants are timed in interleaved rounds, so that another program's load falls on all of them, and
ratios are medians of the rounds' own ratios. The sampled product is timed by share and block on
operands as relu² makes them, four fifths of the wider one zero, against torch's product added to a
gradient. Then forward and backward pass of whole layers, which share the two dense products that
estimated gradients leave as they are, and the small ops, reference against native.

Columns: µs at the 20th, 50th and 80th percentile; GFLOP/s of the multiplications the formula needs;
GB/s of A and B read as often as it must (dense and sketch once, power twice); the ratio to dense;
and that ratio as a share of the arithmetic limit mn / (2k (m + n)), which a kernel exceeds where
its rate is higher than the library's dense one. Native is left out where it is not built.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from molegrad import MoleGradConfig, MoleLinear, build_info, ops, reference
from molegrad.config import PRESETS
from molegrad.gpt import flags
from molegrad.gpt.flags import flag

SMALL_OPS = (
    "orthonormalize",
    "tangent_factors",
    "polar_factor",
    "lowrank_update_",
    "lowrank_update_many_",
    "rademacher",
    "quantize_rows",
    "quantize_tensor",
    "add_quantized_",
)
MANY = 12  # weights that `lowrank_update_many_` takes at once
SHARES, BLOCKS = (0.25, 0.125), (1, 2, 4, 16)
ZEROS = 0.8  # of the wider operand, as relu² has them
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class GradBenchConfig:
    """Time the weight-gradient ops against the dense product.

    Raises:
        ValueError: a shape, count or dtype that cannot be timed.
    """

    device: str = flag("cpu", "cpu or cuda")
    shapes: str = flag("768x3072,1280x5120", "in_features x out_features, comma separated")
    tokens: str = flag("8192", "token counts, comma separated")
    ranks: str = flag("32,128", "ranks, comma separated")
    dtype: str = flag("float32", f"of A and B: {', '.join(DTYPES)}")
    threads: int = flag(0, "CPU threads; 0 leaves torch's own number")
    repeats: int = flag(11, "interleaved rounds")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: bool = flag(False, "print the tables as Markdown")

    def __post_init__(self) -> None:
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


def has_native(name: str, device: torch.device) -> bool:
    """Whether `torch.ops.molegrad.<name>` has a native kernel on the device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"molegrad::{name}", device.type.upper())


def time_interleaved(
    variants: dict[str, Callable], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every variant in every round, one round after the other; warmed up once."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in variants}
    for round_number in range(-1, repeats):
        for name, run in variants.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Microseconds at the 20th, 50th and 80th percentile."""
    points = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {f"us_p{p}": x * 1e6 for p, x in zip((20, 50, 80), points.tolist(), strict=True)}


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast: how many times faster `fast` is."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def _basis(rows: int, k: int, device: torch.device) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, k, device=device))[0]


def bench_gradients(
    n: int, m: int, tokens: int, k: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> list[dict]:
    """One row per variant for one shape."""
    a = torch.randn(tokens, n, device=device).to(dtype)
    b = torch.randn(tokens, m, device=device).to(dtype)
    u, v = _basis(m, k, device), _basis(n, k, device)
    variants = {
        ("dense", "torch.mm"): lambda: b.mT @ a,
        ("sketch", "reference"): lambda: reference.sketch(a, b, u, v),
        ("power", "reference"): lambda: reference.lowrank_grad(a, b, v),
    }
    if has_native("sketch", device):
        acc = reference.acc_dtype(dtype)
        sums = [torch.zeros(rows, k, device=device, dtype=acc) for rows in (m, n)]
        variants["sketch", "native"] = lambda: ops.sketch(a, b, u, v)
        variants["sketch_accumulate_", "native"] = lambda: ops.sketch_accumulate_(*sums, a, b, u, v)
        variants["power", "native"] = lambda: ops.lowrank_grad(a, b, v)
    seconds = time_interleaved(variants, repeats, device)

    limit = n * m / (2 * k * (n + m))
    rows = []
    for (estimate, how), times in seconds.items():
        dense = estimate == "dense"
        flop = 2 * tokens * n * m if dense else 4 * tokens * k * (n + m)
        passes = 2 if estimate == "power" else 1
        moved = passes * tokens * (n + m) * a.element_size()
        if dense:
            moved += n * m * a.element_size()
        row = {"n": n, "m": m, "tokens": tokens, "k": k, "op": estimate, "how": how}
        row |= percentiles(times)
        row["gflops"] = flop / row["us_p50"] / 1e3
        row["gbytes"] = moved / row["us_p50"] / 1e3
        row["vs_dense"] = median_ratio(seconds["dense", "torch.mm"], times)
        row["of_limit"] = None if dense else row["vs_dense"] / limit
        row["vs_reference"] = (
            median_ratio(seconds[estimate.split("_")[0], "reference"], times)
            if how == "native"
            else None
        )
        rows.append(row)
    return rows


def bench_sampled(
    n: int, m: int, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> list[dict]:
    """`sampled_grad_` by share and block, against `torch.addmm` to the same gradient."""
    a = torch.randn(tokens, n, device=device).to(dtype)
    b = _with_zeros(tokens, m, dtype, device)
    if n > m:
        a, b = (
            _with_zeros(tokens, n, dtype, device),
            torch.randn(tokens, m, device=device).to(dtype),
        )
    grad, step = torch.zeros(m, n, device=device, dtype=dtype), torch.tensor(0, device=device)
    variants: dict[tuple, Callable] = {(1.0, 0, "torch.addmm_"): lambda: grad.addmm_(b.mT, a)}
    kernels = {"reference": reference.sampled_grad_}
    if has_native("sampled_grad_", device):
        kernels["native"] = ops.sampled_grad_
    for how, kernel in kernels.items():
        for share in SHARES:
            for block in BLOCKS:
                variants[share, block, how] = lambda f=kernel, s=share, k=block: f(
                    grad, a, b, None, step, s, k
                )
    seconds = time_interleaved(variants, repeats, device)
    rows = []
    for (share, block, how), times in seconds.items():
        row = {"n": n, "m": m, "tokens": tokens, "op": "sampled_grad_", "how": how}
        row |= {"share": share, "block": block} | percentiles(times)
        row["vs_dense"] = median_ratio(seconds[1.0, 0, "torch.addmm_"], times)
        if how == "native":
            row["vs_reference"] = median_ratio(seconds[share, block, "reference"], times)
        rows.append(row)
    return rows


def _with_zeros(tokens: int, features: int, dtype: torch.dtype, device: torch.device):
    x = torch.randn(tokens, features, device=device)
    return (x * (torch.rand_like(x) >= ZEROS)).to(dtype)


def bench_layers(
    n: int, m: int, tokens: int, k: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> list[dict]:
    """Forward and backward pass of whole layers, the gradient of their input included."""
    if 2 * k > min(n, m):
        return []
    x = torch.randn(tokens, n, device=device).to(dtype).requires_grad_()
    grad = _with_zeros(tokens, m, dtype, device)
    layers: dict[tuple[str, str], nn.Module] = {
        ("nn.Linear", ""): nn.Linear(n, m, bias=False, device=device, dtype=dtype)
    }
    configs = {
        (f"linear_{mode}", method): MoleGradConfig(rank_k=k, method=method, gradient_mode=mode)
        for mode in ("dense", "factored")
        for method in ("power", "tangent")
    }
    configs |= {("preset", name): MoleGradConfig.preset(name) for name in PRESETS}
    for name, config in configs.items():
        layers[name] = MoleLinear(n, m, bias=False, device=device, dtype=dtype, config=config)

    def run(layer: nn.Module) -> Callable[[], None]:
        def pass_through() -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                layer(x).backward(grad)

        return pass_through

    runs = {name: run(layer) for name, layer in layers.items()}
    seconds = time_interleaved(runs, repeats, device)
    return [
        {"n": n, "m": m, "tokens": tokens, "k": k, "op": op, "how": how}
        | percentiles(times)
        | {"vs_dense": median_ratio(seconds["nn.Linear", ""], times)}
        for (op, how), times in seconds.items()
    ]


def bench_small(n: int, m: int, k: int, device: torch.device, repeats: int) -> list[dict]:
    """The ops on factors, reference against native; float32."""
    u, v = _basis(m, k, device), _basis(n, k, device)
    y, w = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    weight = torch.randn(m, n, device=device)
    arguments = {
        "orthonormalize": (y,),
        "tangent_factors": (u, v, y, w),
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
    }
    rows = []
    for name in SMALL_OPS:
        if name == "tangent_factors" and 2 * k > m:
            continue
        variants = {"reference": getattr(reference, name)}
        if has_native(name, device):
            variants["native"] = getattr(ops, name)
        runs = {how: lambda f=f, x=arguments[name]: f(*x) for how, f in variants.items()}
        seconds = time_interleaved(runs, repeats, device)
        for how, times in seconds.items():
            row = {"n": n, "m": m, "k": k, "op": name, "how": how} | percentiles(times)
            row["vs_reference"] = (
                median_ratio(seconds["reference"], times) if how == "native" else None
            )
            rows.append(row)
    return rows


@torch.no_grad()
def bench(config: GradBenchConfig) -> dict:
    """Every measurement of a configuration: "gradients", "sampled", "layers", "small", and on what
    machine."""
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device; use --device=cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        torch.manual_seed(0)
        gradients = [
            row
            for n, m in config.shape_list
            for tokens in config.token_list
            for k in config.rank_list
            for row in bench_gradients(
                n, m, tokens, k, DTYPES[config.dtype], device, config.repeats
            )
        ]
        sampled = [
            row
            for n, m in config.shape_list
            for tokens in config.token_list
            for row in bench_sampled(n, m, tokens, DTYPES[config.dtype], device, config.repeats)
        ]
        layers = [
            row
            for n, m in config.shape_list
            for tokens in config.token_list
            for k in config.rank_list
            for row in bench_layers(n, m, tokens, k, DTYPES[config.dtype], device, config.repeats)
        ]
        small = [
            row
            for n, m in config.shape_list
            for k in config.rank_list
            for row in bench_small(n, m, k, device, config.repeats)
        ]
        return {
            "gradients": gradients,
            "sampled": sampled,
            "layers": layers,
            "small": small,
            "config": flags.resolved(config),
            "threads": torch.get_num_threads(),
            "native": has_native("sketch", device),
            "build_info": build_info(),
        }
    finally:
        torch.set_num_threads(threads)


_COLUMNS = {  # heading: (key, format)
    "in": ("n", "d"), "out": ("m", "d"), "tokens": ("tokens", "d"), "k": ("k", "d"),
    "share": ("share", "g"), "block": ("block", "d"),
    "op": ("op", "s"), "how": ("how", "s"),
    "µs p20": ("us_p20", ".0f"), "p50": ("us_p50", ".0f"), "p80": ("us_p80", ".0f"),
    "GFLOP/s": ("gflops", ".0f"), "GB/s": ("gbytes", ".1f"),
    "vs dense": ("vs_dense", ".2f"), "of limit": ("of_limit", ".0%"),
    "vs reference": ("vs_reference", ".2f"),
}  # fmt: skip


def table(rows: list[dict], markdown: bool = False, columns: dict | None = None) -> str:
    """The rows as aligned text or as Markdown; columns that no row has are left out.

    Args:
        columns: heading -> (key of a row, format); by default those of this benchmark.
    """
    columns = columns or _COLUMNS
    columns = {h: c for h, c in columns.items() if any(c[0] in row for row in rows)}
    lines = [list(columns)]
    for row in rows:
        values = ((row.get(key), spec) for key, spec in columns.values())
        lines.append(["" if x is None else format(x, spec) for x, spec in values])
    if markdown:
        lines.insert(1, ["---"] * len(columns))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(GradBenchConfig, argv, prog="python -m scripts.bench_grad")
    try:
        result = bench(config)
    except ValueError as error:
        print(f"bench_grad: {error}")
        return 2
    info = result["build_info"]
    kernels = info.get("cpu_capability") if result["native"] else info.get("reason", "no kernels")
    print(
        f"torch {info['torch']}, {config.device}, {config.dtype}, {result['threads']} threads, "
        f"native kernels: {kernels}\n"
    )
    print(table(result["gradients"], config.markdown) + "\n")
    print(table(result["sampled"], config.markdown) + "\n")
    print(table(result["layers"], config.markdown) + "\n")
    print(table(result["small"], config.markdown))
    if config.json:
        print(json.dumps(result))
    return 0
