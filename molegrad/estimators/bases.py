"""Bases of the kept modes: how they start, how they follow the gradient, how they explore.

Everything here is deterministic in (seed, step) and stays on the device: random directions come
from a counter-based hash instead of a generator's state, so that a resumed run, a compiled run
and every data-parallel rank draw the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.ops.orth import project_out


def rademacher(rows: int, cols: int, counter: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """Random signs (rows, cols) in `dtype` on the counter's device; see `ops.rademacher`."""
    return torch.ops.molegrad.rademacher(rows, cols, counter, seed).to(dtype)


def initial_basis(
    rows: int, rank: int, seed: int, *, device=None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A seeded random basis (rows, rank) with orthonormal columns."""
    counter = torch.zeros((), dtype=torch.int64, device=device)
    return torch.ops.molegrad.orthonormalize(rademacher(rows, rank, counter, seed, dtype))[0]


def refresh(
    basis: Tensor, block: Tensor, counter: Tensor, explored: int, seed: int, cond_max: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The basis of the next step: orth of the new block, its weakest directions replaced.

    Orthogonal iteration with a triangular factor orders the columns by strength, so the last
    `explored` ones are the weakest; seeded random directions take their place. Where the block has
    no direction to offer (zero or rank-deficient) the old basis fills in; where it is not finite
    the old basis stays.

    Args:
        basis: (rows, k) orthonormal, the basis of this step.
        block: (rows, k), Y for the left basis, W for the right one.

    Returns:
        next basis (rows, k), condition number of the block estimated from its triangular factor,
        and the status of `orthonormalize` (int32).
    """
    rows, k = basis.shape
    kept = k - explored
    norm = torch.linalg.vector_norm(block)
    fill = norm * (4 * torch.finfo(block.dtype).eps) + torch.finfo(block.dtype).tiny ** 0.5
    start = block + basis * fill
    if explored:
        random = rademacher(rows, explored, counter, seed, basis.dtype)
        start = torch.cat([start[:, :kept], random], dim=1)
    new, r, status = torch.ops.molegrad.orthonormalize(start, cond_max)
    new = torch.where(status == 3, basis, new)
    diagonal = r.diagonal()[:kept] if kept else r.diagonal()
    return new, diagonal.amax() / diagonal.amin(), status


def drift(old: Tensor, new: Tensor) -> Tensor:
    """1 − ‖UᵀU'‖²_F / k: 0 for the same subspace, 1 for an orthogonal one (scalar, ≥ 0)."""
    return (1.0 - (old.mT @ new).square().sum() / old.shape[1]).clamp_min(0.0)


def extend(basis: Tensor, block: Tensor, cond_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis of span(basis, block), and both in its coordinates.

    Args:
        basis: (…, rows, k) with orthonormal columns.
        block: (…, rows, j), any; k + j <= rows.

    Returns:
        q (…, rows, k + j) orthonormal, `basis_c` (…, k + j, k) and `block_c` (…, k + j, j) with
        q basis_c = basis and q block_c = block.
    """
    k = basis.shape[-1]
    rest, inner = project_out(basis, block)
    q, r, _ = torch.ops.molegrad.orthonormalize(torch.cat([basis, rest], dim=-1), cond_max)
    basis_c = r[..., :k]
    return q, basis_c, basis_c @ inner + r[..., k:]


def resized(basis: Tensor, rank: int, seed: int, step: int) -> Tensor:
    """A basis of `rank` directions: the first ones of `basis`, and seeded random ones behind them.

    Args:
        basis: (rows, k) with orthonormal columns, the strongest direction first.
        rank: at most rows.
        seed, step: determine the random directions.

    Returns:
        (rows, rank) with orthonormal columns, of which the first min(k, rank) are `basis`'s own.
    """
    rows, k = basis.shape
    if rank <= k:
        return basis[:, :rank].clone()
    counter = torch.tensor(step, dtype=torch.int64, device=basis.device)
    random = rademacher(rows, rank - k, counter, seed, basis.dtype)
    rest, _ = project_out(basis, random)
    rest = torch.ops.molegrad.orthonormalize(rest)[0]
    return torch.cat([basis, rest], dim=1)
