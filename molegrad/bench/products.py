"""The products behind a weight gradient: dense, sketched and by the power method, way by way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from molegrad import ops
from molegrad.bench.paths import FORCED, FP8, Problem, forced, obstacle, ways
from molegrad.bench.timing import median_ratio, percentiles, time_interleaved
from molegrad.ops.checks import acc_dtype
from molegrad.ops.power import lowrank_grad_reference
from molegrad.ops.sketch import sketch_reference

OPS = {"sketch": "sketch", "sketch_accumulate_": "sketch_accumulate_", "power": "lowrank_grad"}
UNFORCED = ("sketch_accumulate_",)  # the kernels of sketch, which is timed in all its ways


def basis(rows: int, k: int, device: torch.device) -> Tensor:
    """A random (rows, k) with orthonormal columns, float32."""
    return torch.linalg.qr(torch.randn(rows, k, device=device))[0]


def bench_gradients(
    problem: Problem,
    repeats: int,
    limit: float,
    bandwidth: float | None,
    left_out: tuple[str, ...] = (),
) -> list[dict]:
    """A row for every op and way, with a "note" in place of times where it is not measured.

    Args:
        limit: seconds all of it may take.
        bandwidth: bytes a second of the device's memory, for "of_floor"; None: not known.
        left_out: ways that are not to run.
    """
    n, m, tokens, k = problem.n, problem.m, problem.tokens, problem.k
    dtype, device = problem.dtype, problem.device
    a = torch.randn(tokens, n, device=device).to(dtype)
    b = torch.randn(tokens, m, device=device).to(dtype)
    u, v = basis(m, k, device), basis(n, k, device)
    sums = [torch.zeros(rows, k, device=device, dtype=acc_dtype(dtype)) for rows in (m, n)]
    calls: dict[str, Callable] = {
        "sketch": lambda a, b, **scales: ops.sketch(a, b, u, v, **scales),
        "sketch_accumulate_": lambda a, b: ops.sketch_accumulate_(*sums, a, b, u, v),
        "power": lambda a, b, **scales: ops.lowrank_grad(a, b, v, **scales),
    }
    variants: dict[tuple[str, str], Callable] = {
        ("dense", "torch.mm"): lambda: b.mT @ a,
        ("sketch", "reference"): lambda: sketch_reference(a, b, u, v),
        ("power", "reference"): lambda: lowrank_grad_reference(a, b, v),
    }
    notes: dict[tuple[str, str], str] = {}
    moved = (tokens * (n + m)) * a.element_size()
    moved_of = {}
    for way, op in _in_order(device):
        note = "left out" if way in left_out else obstacle(OPS[op], way, problem)
        if note is not None:
            notes[op, way] = note
            continue
        operands, scales = (a, b), {}
        if way in FP8:
            operands, scales = _float8(a, b, way)
            moved_of[op, way] = sum(x.numel() * x.element_size() for x in operands)
        variants[op, way] = _call(calls[op], operands, scales, way)
    timed = time_interleaved(variants, repeats, device, limit)

    ceiling = n * m / (2 * k * (n + m))
    dense = timed.seconds.get(("dense", "torch.mm"))
    rows = []
    for op, how in [*variants, *notes]:
        row = {"n": n, "m": m, "tokens": tokens, "k": k, "op": op, "how": how}
        rows.append(row)
        times = timed.seconds.get((op, how))
        if times is None:
            row["note"] = notes.get((op, how)) or timed.failed[op, how]
            continue
        is_dense = op == "dense"
        bytes_ = (2 if op == "power" else 1) * moved_of.get((op, how), moved)
        flop = 2 * tokens * n * m if is_dense else 4 * tokens * k * (n + m)
        row |= percentiles(times)
        if device.type == "cuda":
            row["us_host"] = timed.host[op, how] * 1e6
            row["tflops"] = flop / row["us_p50"] / 1e6
        else:
            row["gflops"] = flop / row["us_p50"] / 1e3
        known = bandwidth is not None and not is_dense
        row["of_floor"] = bytes_ / bandwidth * 1e6 / row["us_p50"] if known else None
        row["gbytes"] = (bytes_ + is_dense * n * m * a.element_size()) / row["us_p50"] / 1e3
        row["vs_dense"] = dense and median_ratio(dense, times)
        row["of_limit"] = None if is_dense or not dense else row["vs_dense"] / ceiling
        plain = timed.seconds.get((op.split("_")[0], "reference"))
        ours = how not in ("torch.mm", "reference")
        row["vs_reference"] = median_ratio(plain, times) if ours and plain else None
    return rows


def _in_order(device: torch.device) -> list[tuple[str, str]]:
    """(way, op) of everything that the build may have, the ops in the same way side by side."""
    every = {op: ["native"] if op in UNFORCED else ways(name, device) for op, name in OPS.items()}
    order = dict.fromkeys(way for found in every.values() for way in found)
    return [(way, op) for way in order for op, found in every.items() if way in found]


def _call(call: Callable, operands: tuple, scales: dict, way: str) -> Callable:
    if way not in FORCED:
        return lambda: call(*operands, **scales)

    def run():
        with forced(way):
            return call(*operands)

    return run


def _float8(a: Tensor, b: Tensor, way: str) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """A in E4M3 with a scale for each token, and B in E5M2 if the way says so."""
    data, scale = ops.quantize_rows(a)
    if way == "fp8 A":
        return (data, b), {"a_scale": scale}
    other, other_scale = ops.quantize_rows(b, True)
    return (data, other), {"a_scale": scale, "b_scale": other_scale}
