"""The one-sided projected estimate in plain torch: the references of its ops.

What: the forward pass keeps P = A V (T, k) and one row of A out of every `stride` tokens, A_S
(S, n), in place of A (T, n). With the gradient B of the output,

    Ĝ = Y Vᵀ + G_S (I − VVᵀ),   Y = BᵀP,   G_S = Σ_{t in S} w_t b_t a_tᵀ

where w_t is the number of tokens that t was drawn from, so that E Ĝ = BᵀA for every V: the modes in
V are exact, the rest is sampled. As it is computed, with R_S = A_S − P_S Vᵀ, the rows' rests,
Ĝ = Y Vᵀ + B_Sᵀ (w R_S), the mean is exact even where P and V are rounded to 16 bits, as the same P
and V are in both terms.

Why no native kernels: P = A V, BᵀP, B_Sᵀ (w R_S) and Y Vᵀ are the library's products, in the dtype
of the activations, and nearly all of the work. Only B is read as a whole in the backward pass.

Sources: stratified sampling and control variates, Cochran, Sampling Techniques (1977).
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.reference import (
    _chunks,
    _random_bits,
    _tokens,
    acc_dtype,
    dequantize_rows,
)


def project_tokens(a: Tensor, basis_v: Tensor) -> tuple[Tensor, Tensor]:
    """P = A V (T, k), and V (n, k) as it was taken, in the dtype of A."""
    v = torch.empty(basis_v.shape, dtype=a.dtype, device=a.device).copy_(basis_v)
    return _tokens(a) @ v, v


def sample_tokens(a: Tensor, counter: Tensor, stride: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of A, one of every `stride` neighbouring tokens, each of them as likely; and which."""
    a = _tokens(a)
    first, size = _groups(a.shape[0], stride, a.device)
    bits = _random_bits(first // stride + 1, counter, seed)  # 24 of them
    index = first + (bits * size >> 24)
    return a.index_select(0, index), index


def _groups(total: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First token and number of tokens of each group; the last one may be smaller."""
    first = torch.arange(0, total, stride, device=device)
    return first, (total - first).clamp(max=stride)


def projected_grad_(
    grad: Tensor,
    b: Tensor,
    p: Tensor,
    rows: Tensor,
    rows_scale: Tensor | None,
    index: Tensor,
    v: Tensor,
    stride: int,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """grad += alpha (Y Vᵀ + B_Sᵀ (w R_S)); the block of the next basis, and statistics."""
    dtype = acc_dtype(b.dtype)
    b, p = _tokens(b), _tokens(p)
    rows = rows.to(dtype) if rows_scale is None else dequantize_rows(rows, rows_scale, dtype)
    weight = _groups(b.shape[0], stride, b.device)[1].to(dtype).unsqueeze(1)
    b_s, p_s, v_acc = b.index_select(0, index), p.index_select(0, index).to(dtype), v.to(dtype)
    rest = rows - p_s @ v_acc.mT  # R_S

    y = _product(b, p, dtype)
    if grad.dtype == b.dtype:
        grad.addmm_(b_s.mT, (weight * rest).to(b.dtype), alpha=alpha)
        grad.addmm_(y.to(b.dtype), v.to(b.dtype).mT, alpha=alpha)
    else:
        estimate = _product(b_s, (weight * rest).to(b.dtype), dtype).addmm_(y, v_acc.mT)
        grad.add_(estimate, alpha=alpha)

    sizes_b, sizes_rest, sizes_a = (
        torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).square()
        for x in (b_s, rest, rows)
    )
    # Principal directions of the inputs weighted by ‖b_t‖², by a step of orthogonal iteration.
    block = rows.mT @ (weight * sizes_b * p_s)
    energy = (weight * sizes_b * sizes_a).sum()
    noise = (weight * (weight - 1.0) * sizes_b * sizes_rest).sum()
    noise = torch.where(energy > 0, noise / energy, 0.0 * energy)
    share = (sizes_b * sizes_a != 0).sum() / max(1, b.shape[0])
    return block, torch.stack([share.to(dtype), noise]).to(torch.float32)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """XᵀY over tokens, summed and given in `dtype`."""
    if x.is_cuda and x.dtype not in (dtype, torch.float64):  # 16 bits, on tensor cores
        return torch.mm(x.mT, y, out_dtype=dtype)
    result = torch.zeros(x.shape[1], y.shape[1], dtype=dtype, device=x.device)
    if x.dtype == dtype:
        return result.addmm_(x.mT, y)
    for y_t, x_t in _chunks(y, x):
        result.addmm_(x_t.mT, y_t)
    return result
