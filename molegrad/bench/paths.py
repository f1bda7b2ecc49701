"""Which kernels an op can be timed with: the one it takes by itself, those it can be made to take,
and why one of them is not there.

A sketch of bfloat16 operands on a GPU has several paths (csrc/cuda/product_paths.h): "own" kernels
in two launches a chunk, products of "cublaslt", one "fused" launch. MOLEGRAD_SKETCH_PATH names one,
or one for each size, and is read at every call. "native" is what the op does unasked. "fp8 A" is
the op on an A that the forward pass has kept in float8 (E4M3, a scale for each token), "fp8 A, B"
with B in E5M2 too; what quantising takes is a row of its own, `quantize_rows`.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from molegrad import _native, build_info

VARIABLE = "MOLEGRAD_SKETCH_PATH"
FORCED = ("own", "cublaslt", "fused")
FP8 = ("fp8 A", "fp8 A, B")


@dataclass(frozen=True)
class Problem:
    """A product to time: A (tokens, n), B (tokens, m), bases of k columns, dtype of A and B."""

    n: int
    m: int
    tokens: int
    k: int
    dtype: torch.dtype
    device: torch.device


def has_native(name: str, device: torch.device) -> bool:
    """Whether `torch.ops.molegrad.<name>` has a native kernel on the device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"molegrad::{name}", device.type.upper())


def takes(name: str, argument: str) -> bool:
    """Whether `torch.ops.molegrad.<name>` has an argument of that name."""
    schema = getattr(torch.ops.molegrad, name).default._schema
    return any(known.name == argument for known in schema.arguments)


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
    """How a native op can be made to compute on a device, whether it is built for that or not.

    `lowrank_grad` multiplies one half at a time, for which there is no fused launch.
    """
    paths = [p for p in FORCED if op == "sketch" or p != "fused"] if device.type == "cuda" else []
    return ["native", *paths, *FP8]


def obstacle(op: str, way: str, problem: Problem) -> str | None:
    """Why an op cannot be timed in one of its `ways`; None where it can."""
    if not has_native(op, problem.device):
        return "not built"
    if way in FP8:
        return _fp8_obstacle(op, problem)
    return _path_obstacle(way, problem) if way in FORCED else None


def fastest(rows: list[dict]) -> str | None:
    """The value of MOLEGRAD_SKETCH_PATH that takes the fastest measured path of every size.

    A rule holds for layers from n to m features and from m to n, so many tokens or more and ranks
    up to its own; what no rule means stays with "auto".

    Args:
        rows: of `molegrad.bench.products.bench_gradients`; those of forced sketches count.

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


def _fp8_obstacle(op: str, problem: Problem) -> str | None:
    if not takes(op, "a_scale"):
        return "not built: the op takes no float8 operands"
    if problem.device.type == "cuda":
        path = build_info()["paths"]["fp8"]
        if not path["supported"]:
            return f"not supported: {path['reason']}"
    return None


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
