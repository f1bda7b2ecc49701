"""What a benchmark can choose on a GPU, and what the project wants of one.

A sketch of bfloat16 operands has several paths there (csrc/cuda/product_paths.h): "own" kernels in
two launches a chunk, products of "cublaslt", one "fused" launch. MOLEGRAD_SKETCH_PATH names one, or
one for each size, and is read at every call. "native" is what the op does unasked. "fp8 A" is the
op on an A that the forward pass has kept in float8 (E4M3, a scale for each token), "fp8 A, B" with
B in E5M2 too; what quantising takes is a row of its own, `quantize_rows`.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from molegrad import _native, build_info
from molegrad.bench.timing import has_native

VARIABLE = "MOLEGRAD_SKETCH_PATH"
FORCED = ("own", "cublaslt", "fused")
FP8 = ("fp8 A", "fp8 A, B")
SIZE = {"n": 1280, "m": 5120, "tokens": 8192, "k": 32}  # of the targets of products, in bfloat16
# What is wanted of a GPU: (table of bench_grad, what the native row has, key, at least or at most).
TARGETS = (
    ("gradients", {"op": "sketch", **SIZE}, "vs_dense", ">=", 2.5),
    ("gradients", {"op": "sketch", **SIZE}, "of_floor", ">=", 0.65),
    ("gradients", {"op": "lowrank_grad", **SIZE}, "vs_dense", ">=", 1.6),
    ("bases", {"op": "orthonormalize", "depth": 12, "k": 32}, "us_p50", "<=", 150.0),
)


@dataclass(frozen=True)
class Problem:
    """A product to time: A (tokens, n), B (tokens, m), bases of k columns, dtype of A and B."""

    n: int
    m: int
    tokens: int
    k: int
    dtype: torch.dtype
    device: torch.device


@contextlib.contextmanager
def forced(path: str) -> Iterator[None]:
    """The native sketches called inside take `path` where they can, whatever was asked for."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def ways(op: str, device: torch.device) -> list[str]:
    """How a product can be made to compute on a device, whether it is built for that or not.

    `lowrank_grad` multiplies one half at a time, for which there is no fused launch;
    `sketch_accumulate_` has the kernels of `sketch`, which is timed in all its ways.
    """
    if op == "sketch_accumulate_":
        return ["native"]
    paths = [p for p in FORCED if op == "sketch" or p != "fused"] if device.type == "cuda" else []
    return ["native", *paths, *FP8]


def obstacle(op: str, way: str, problem: Problem) -> str | None:
    """Why an op cannot be timed in one of its `ways`; None where it can."""
    if not has_native(op, problem.device):
        return "not built"
    if way in FP8:
        path = build_info()["paths"]["fp8"] if problem.device.type == "cuda" else None
        return None if path is None or path["supported"] else f"not supported: {path['reason']}"
    return _path_obstacle(way, problem) if way in FORCED else None


def _path_obstacle(way: str, problem: Problem) -> str | None:
    module, _ = _native.load()
    dtype = str(problem.dtype).removeprefix("torch.")
    with forced(way):
        taken = module.sketch_path(dtype, problem.n, problem.m, problem.tokens, problem.k)
    if taken != way:
        return f"not supported: {dtype} takes {taken}"
    if way == "fused":
        gpu = torch.cuda.get_device_properties(problem.device)
        sizes = problem.tokens, problem.n, problem.m, problem.k
        limits = gpu.multi_processor_count, gpu.shared_memory_per_multiprocessor
        if not module.fused_fits(*sizes, *limits):
            return "does not fit"
    return None


def fastest(rows: list[dict]) -> str | None:
    """The value of MOLEGRAD_SKETCH_PATH that takes the fastest measured path of every size.

    A rule holds for layers from n to m features and from m to n, so many tokens or more and ranks
    up to its own; what no rule means stays with "auto".

    Args:
        rows: of `molegrad.bench.grad.bench_gradients`; those of forced sketches count.

    Returns:
        None where at most one path of a size was measured: there is nothing to choose.
    """
    best: dict[tuple[int, int, int, int], dict] = {}
    counts = collections.Counter()
    for row in rows:
        if row.get("op") == "sketch" and row["how"] in FORCED and "us_p50" in row:
            size = row["n"], row["m"], row["k"], -row["tokens"]
            counts[size] += 1
            best[size] = min(best.get(size, row), row, key=lambda r: r["us_p50"])
    chosen = [size for size in sorted(best) if counts[size] > 1]
    if not chosen:
        return None
    rules = (f"{n}x{m}x{-tokens}x{k}={best[n, m, k, tokens]['how']}" for n, m, k, tokens in chosen)
    return ",".join([*rules, "auto"])


def targets(result: dict) -> list[dict]:
    """A row for each of TARGETS, from a result of bench_grad on a GPU in bfloat16: "measured" is
    None where there is no time of it."""
    rows = []
    for name, labels, key, sign, wanted in TARGETS:
        mine = (
            row[key]
            for row in result[name]
            if row.get("how") == "native"
            and row.get(key) is not None
            and all(row.get(label) == value for label, value in labels.items())
        )
        measured = next(mine, None)
        met = measured is not None and (measured >= wanted if sign == ">=" else measured <= wanted)
        verdict = "not measured" if measured is None else "met" if met else "not met"
        sizes = ", ".join(f"{k}={v}" for k, v in labels.items() if k != "op")
        rows.append(
            {
                "target": f"{labels['op']} {key} ({sizes})",
                "wanted": f"{sign} {wanted:g}",
                "measured": measured,
                "result": verdict,
            }
        )
    return rows
