"""One set of inputs for every op, for the tests of correctness, opcheck and fake kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from molegrad.ops.orth import orthonormalize_reference


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(rows: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(randn(rows, k, seed=seed, dtype=torch.float64))[0].to(dtype).contiguous()


def tokens(
    t: int, n: int, m: int, dtype: torch.dtype = torch.float32, rank: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A (t, n) and B (t, m) whose product has a few strong modes over noise, as gradients have."""
    signal = randn(t, rank, seed=seed, dtype=torch.float64)
    a = signal @ randn(rank, n, seed=seed + 1, dtype=torch.float64)
    b = signal @ randn(rank, m, seed=seed + 2, dtype=torch.float64)
    a = a + 0.5 * randn(t, n, seed=seed + 3, dtype=torch.float64)
    b = b + 0.5 * randn(t, m, seed=seed + 4, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def error(x: Tensor, truth: Tensor) -> float:
    """Relative to the truth, in float64."""
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def layouts(
    m: int, n: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Callable[[], bool]]:
    """Zeros (m, n) in every layout: plain, transposed, with gaps between rows and between columns;
    and whether what lies outside of the last two is zero still."""
    storage = torch.zeros(m + 2, 2 * n + 3, dtype=dtype)
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside[1 : m + 1, 1 : 2 * n + 2] = False
    views = [
        torch.zeros(m, n, dtype=dtype),
        torch.zeros(n, m, dtype=dtype).mT,
        storage[1 : m + 1, 2 : n + 2],
        storage[1 : m + 1, 1 : 2 * n : 2],
    ]
    return views, lambda: bool((storage[outside] == 0).all())


def linear_state(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "basis_u": orthonormal(m, k, 1, dtype),
        "basis_v": orthonormal(n, k, 2, dtype),
        "counter": torch.zeros((), dtype=torch.int64),
        "stats": torch.zeros(8),
    }


def tangent_truth(u: Tensor, v: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of U Wᵀ + (I − UUᵀ) Y Vᵀ, the left one orthonormal where Y is finite."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    u, v, y, w = (x.to(dtype) for x in (u, v, y, w))
    rest = y - u @ (u.mT @ y)
    left, r, _ = orthonormalize_reference(torch.cat([u, rest - u @ (u.mT @ rest)], dim=1))
    return left, torch.cat([w, v], dim=1) @ r.mT


def sample_inputs(name: str, requires_grad: bool = False) -> list[tuple]:
    """Argument tuples for `torch.ops.molegrad.<name>`."""
    a, b = tokens(19, 11, 13)
    a, b = a.requires_grad_(requires_grad), b.requires_grad_(requires_grad)
    u, v = orthonormal(13, 4, 1), orthonormal(11, 4, 2)
    a3, b3 = a.detach().view(1, 19, 11), b.detach().view(1, 19, 13)
    weight, bias = randn(13, 11), randn(13)
    state = linear_state(13, 11, 4)
    counter, stats = state["counter"], state["stats"]
    x = randn(2, 5, 11).requires_grad_(requires_grad)
    linear = (x, weight, bias)
    float8 = torch.ops.molegrad.quantize_rows(x.detach())
    a8, a8_scale = torch.ops.molegrad.quantize_tensor(a.detach())
    b8, b8_scale = torch.ops.molegrad.quantize_rows(b.detach(), True)
    data8, scale8 = torch.ops.molegrad.quantize_rows(a3)
    return {
        "lowrank_grad": [
            (a.detach(), b.detach(), v),
            (a3, b3, v, 2, torch.ops.molegrad.rademacher(11, 3, counter, 1)),
            (a3.to(torch.bfloat16), b3.to(torch.bfloat16), v, 0),
            (a8, b8, v, 1, None, 1e3, a8_scale, b8_scale),
        ],
        "sketch": [
            (a, b, u, v), (a3, b3, u[:, :2], v), (a8, b8, u, v, a8_scale, b8_scale),
            (a3.to(torch.bfloat16), b8.view(1, 19, 13), u, v, None, b8_scale.view(1, 19)),
        ],
        "sketch_accumulate_": [
            (randn(13, 4), randn(11, 4), a.detach(), b.detach(), u, v),
            (randn(13, 4), randn(11, 4), a8, b8, u, v, a8_scale, b8_scale),
        ],
        "sketch_accumulate_many_": [
            (
                [randn(13, 4), randn(11, 3), randn(13, 2)],
                [randn(11, 4), randn(13, 3), randn(11, 4)],
                [a.detach(), b3, a3.bfloat16()],
                [b.detach(), a3, b3.bfloat16()],
                [u, v[:, :3], u],
                [v, u[:, :3], v[:, :2]],
            ),
        ],
        "orthonormalize": [(randn(9, 4),), (randn(3, 9, 4), 10.0)],
        "polar_factor": [(randn(9, 4),), (randn(3, 9, 4),)],
        "lowrank_update_": [
            (weight.clone(), u, v, -0.1, 0.01),
            (weight.to(torch.bfloat16), u, v, 0.5),
        ],
        "lowrank_update_many_": [
            ([weight.clone(), weight.clone()], torch.stack([u, u]), torch.stack([v, v]), 0.5, 0.01),
            ([weight.bfloat16(), weight.bfloat16().mT.contiguous().mT], torch.stack([u, u]),
             torch.stack([v, v]), -0.1, 0.0, True, counter, 5),
        ],
        "sampled_grad_": [
            (randn(13, 11), a.detach(), b.detach(), None, counter, 0.4, 4),
            (randn(13, 11).bfloat16(), data8, b3, scale8, counter, 0.5, 8, -2.0),
            (randn(11, 13), b3, a3, None, counter, 2.0, 3, 1.0, 5),
        ],
        "rademacher": [(5, 3, counter, 7)],
        "add_quantized_": [
            (torch.zeros(13, 11, dtype=torch.int8), torch.ones(13, 1), randn(13, 11)),
            (torch.ones(13, 11, dtype=torch.int8), torch.ones(1, 11), randn(13, 11).bfloat16()),
        ],
        "quantize_rows": [(randn(2, 5, 11),), (randn(7, 3).bfloat16(), True)],
        "quantize_tensor": [(randn(2, 5, 11),), (randn(7, 3).bfloat16(), True)],
        "linear_dense": [
            (*linear, *saved, u, v, counter, stats, method, 1, probes, trust, 1, 3, 1e3)
            for method, probes, trust, saved in (
                ("power", 2, 0.0, float8), ("tangent", 0, 0.0, (None, None)),
                ("tangent", 3, 2.0, (None, None)),
            )
        ] + [(*linear, *float8, u, v, counter, stats, "power", 1, 0, 0.0, 1, 3, 1e3, True)],
        "linear_sampled": [
            (*linear, None, None, None, None, counter, stats, 0.5, 2, 3),
            (*linear, *float8, torch.zeros(13, 11), None, counter, stats, 1.0, 4, 0),
        ],
        "linear_factored": [
            (*linear, *saved, u_, v_, stats, method, 3, 1, 1e3, fp8)
            for method, saved, fp8 in (
                ("tangent", (None, None), False), ("power", float8, False),
                ("tangent", float8, True), ("power", (None, None), True),
            )
            for u_, v_ in ((u.clone().requires_grad_(requires_grad),
                            v.clone().requires_grad_(requires_grad)),)
        ],
    }[name]  # fmt: skip
