"""Effective ranks of estimates, by their singular values.

These are for whoever looks at training: no step of it needs them. Spectra are prepared on the
device as small matrices, so that those of many layers reach the host in one transfer, where
`ranks_of_grams` and `ranks_of_tangents` finish them in float64.

U (m, k) and V (n, k) are orthonormal bases, Y = GV (m, k) and W = GᵀU (n, k) the sketches.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram(x: Tensor) -> Tensor:
    """xᵀx (layers, k, k) in float64, so that its eigenvalues give the small singular values too.
    That of W is all that a one-sided estimate U Wᵀ needs: it has the singular values of W."""
    return x.double().mT @ x.double()


def range_grams(gradients: list[Tensor], rank: int, dtype: torch.dtype) -> Tensor:
    """Gram matrices (layers, r, r) of QᵀĜ, r = min(rank, m, n), Q the range of Ĝ, found with as
    many random columns (Halko, Martinsson, Tropp 2011): exact up to that rank.

    Args:
        gradients: Ĝ (m, n) of each layer. dtype: to compute in.
    """
    m, n = gradients[0].shape
    counter = torch.zeros((), dtype=torch.int64, device=gradients[0].device)
    omega = torch.ops.molegrad.rademacher(n, min(rank, m, n), counter, 0).to(dtype)
    images = torch.stack([g.to(dtype) @ omega for g in gradients])
    q, _, _ = torch.ops.molegrad.orthonormalize(images)
    # One layer's Ĝ in `dtype` at a time.
    return gram(torch.stack([g.to(dtype).mT @ q_i for g, q_i in zip(gradients, q, strict=True)]))


def tangent_blocks(u: Tensor, v: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """(layers, 4, k, k): (UᵀY)ᵀ, VᵀW and the Gram matrices of Y and W outside of U and V; from U
    and Y (layers, m, k), V and W (layers, n, k)."""
    y_core, w_core = u.mT @ y, v.mT @ w
    grams = gram(y - u @ y_core), gram(w - v @ w_core)
    return torch.stack([y_core.mT.double(), w_core.double(), *grams], dim=1)


def ranks_of_grams(grams: Tensor) -> list[float]:
    """Effective ranks of the matrices with these Gram matrices (layers, r, r)."""
    finite = grams.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    squares = torch.linalg.eigvalsh(torch.where(finite, grams, 0.0))
    return effective_ranks(squares.clamp_min(0.0).sqrt())


def ranks_of_tangents(blocks: Tensor) -> list[float]:
    """Effective ranks of Ĝ = U Wᵀ + Y⊥ Vᵀ with these `tangent_blocks` (layers, 4, k, k), from cores
    of 2k × 2k in orthonormal bases.

    With A = VᵀW, Y⊥ = Q R and W − V A = P S, Ĝ = [U, Q] [[Aᵀ, Sᵀ], [R, 0]] [V, P]ᵀ, where R and S
    are Cholesky factors of the Gram matrices. Sketches of these bases have A = (UᵀY)ᵀ = VᵀGᵀU;
    where the two differ, the optimizer has turned the bases since, and the ranks are unknown.
    """
    other_core, core, gram_y, gram_w = blocks.unbind(1)
    differ = torch.linalg.matrix_norm(other_core - core) > 0.1 * torch.linalg.matrix_norm(core)
    r, s = (_root(block) for block in (gram_y, gram_w))
    whole = torch.cat(
        [torch.cat([core.mT, s.mT], dim=-1), torch.cat([r, torch.zeros_like(r)], dim=-1)], dim=-2
    )
    return effective_ranks(
        stacked_singular_values(torch.where(differ[:, None, None], torch.nan, whole))
    )


def stacked_singular_values(x: Tensor) -> Tensor:
    """Of stacked matrices, nan for those that are not finite, on which the library would fail."""
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values = torch.linalg.svdvals(torch.where(finite, x, 0.0))
    return torch.where(finite[..., 0], values, torch.nan)


def effective_ranks(values: Tensor) -> list[float]:
    """exp(−Σ pᵢ log pᵢ), p = σ / Σσ, of singular values σ (layers, j); nan where all are zero
    (Roy and Vetterli 2007, The effective rank)."""
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp().tolist()


def _root(gram: Tensor) -> Tensor:
    """R (…, k, k) with RᵀR = gram, which may be singular; nan where it is not finite."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype)
    tiny = torch.finfo(gram.dtype).tiny
    shift = trace * (4 * gram.shape[-1] * torch.finfo(gram.dtype).eps) + tiny
    lower, info = torch.linalg.cholesky_ex(gram + shift * unit)
    return torch.where((info == 0)[..., None, None], lower.mT, torch.nan)
