"""One set of inputs for every op, for the tests of correctness, opcheck and fake kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

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


def pairwise(*lists: Sequence) -> list[tuple]:
    """Rows with a value of each list, so few that every two values of two lists just meet."""
    sizes = [range(len(values)) for values in lists]
    rows, chosen = list(itertools.product(*sizes)), []

    def pairs(row: tuple) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    missing = set().union(*map(pairs, rows))
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(values[i] for values, i in zip(lists, row, strict=True)) for row in chosen]


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


def tangent_truth(u: Tensor, v: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of U Wᵀ + (I − UUᵀ) Y Vᵀ, the left one orthonormal where Y is finite."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    u, v, y, w = (x.to(dtype) for x in (u, v, y, w))
    rest = y - u @ (u.mT @ y)
    left, r, _ = orthonormalize_reference(torch.cat([u, rest - u @ (u.mT @ rest)], dim=1))
    return left, torch.cat([w, v], dim=1) @ r.mT
