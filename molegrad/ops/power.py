"""The block power method on G = BᵀA, which is never formed.

Sources: Halko, Martinsson, Tropp (2011), algorithm 4.4; Meyer et al., "Hutch++" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.ops import checks
from molegrad.ops.checks import acc_dtype
from molegrad.ops.orth import orthonormalize_reference
from molegrad.ops.registry import call, op, refuse
from molegrad.ops.sketch import SCALES, token_chunks


def _left_product(
    a: Tensor, b: Tensor, v: Tensor, a_scale: Tensor | None = None, b_scale: Tensor | None = None
) -> Tensor:
    """Y = Bᵀ(A V)."""
    y = v.new_zeros(b.shape[-1], v.shape[1])
    for a_t, b_t in token_chunks(a, b, a_scale, b_scale):
        y.addmm_(b_t.mT, a_t @ v)
    return y


def lowrank_grad_reference(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    power_iters: int = 1,
    probes: Tensor | None = None,
    cond_max: float = 1e3,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U with orthonormal columns and W = GᵀU, so that Ĝ = U Wᵀ."""
    v = v.to(acc_dtype(a.dtype, b.dtype))
    k = v.shape[1]
    start = v if probes is None else torch.cat([v, probes.to(v.dtype)], dim=1)
    product = _left_product(a, b, start, a_scale, b_scale)
    y, g_probes = product.split([k, start.shape[1] - k], dim=1)

    norm_sq = None
    if probes is not None:
        norm_sq = hutch_norm_sq(y, g_probes, v, probes.to(v.dtype))

    u, r, status = orthonormalize_reference(y, cond_max)
    if power_iters == 0:
        w = v @ r.mT
    for i in range(power_iters):
        w = _left_product(b, a, u, b_scale, a_scale)  # Aᵀ(B U)
        if i + 1 < power_iters:
            new_v = orthonormalize_reference(w, cond_max)[0]
            y = _left_product(a, b, new_v, a_scale, b_scale)
            u, _, new_status = orthonormalize_reference(y, cond_max)
            status = torch.maximum(status, new_status)
    if norm_sq is None:
        norm_sq = w.square().sum()
    return u, w, norm_sq, status


def hutch_norm_sq(y: Tensor, g_probes: Tensor, v: Tensor, probes: Tensor) -> Tensor:
    """‖G‖²_F ≈ ‖G V‖² + ‖G (I − VVᵀ) Ω‖² / r (Hutch++, Meyer et al. 2021); batched."""
    residual = g_probes - y @ (v.mT @ probes)
    return y.square().sum((-2, -1)) + residual.square().sum((-2, -1)) / probes.shape[-1]


def _check(a, b, v, power_iters=1, probes=None, cond_max=1e3, a_scale=None, b_scale=None) -> None:
    name = "lowrank_grad"
    checks.operands(name, a, b, a_scale, b_scale, v=v, probes=probes)
    n, m = a.shape[-1], b.shape[-1]
    checks.basis(name, "v", v, n, min(m, n))
    if probes is not None:
        checks.basis(name, "probes", probes, n)
    checks.require(power_iters >= 0, name, f"power_iters must be >= 0, got {power_iters}")
    checks.condition(name, cond_max)


def _fake(a, b, v, *rest):
    dtype = acc_dtype(a.dtype, b.dtype)
    k = v.shape[1]
    return (
        a.new_empty((b.shape[-1], k), dtype=dtype),
        a.new_empty((a.shape[-1], k), dtype=dtype),
        a.new_empty((), dtype=dtype),
        a.new_empty((), dtype=torch.int32),
    )


op(
    "lowrank_grad",
    "(Tensor a, Tensor b, Tensor v, int power_iters=1, Tensor? probes=None, "
    f"float cond_max=1e3, {SCALES}) -> (Tensor u, Tensor w, Tensor norm_sq, Tensor status)",
    lowrank_grad_reference,
    check=_check,
    fake=_fake,
    backward=refuse("lowrank_grad"),
)


def lowrank_grad(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    power_iters: int = 1,
    probes: Tensor | None = None,
    cond_max: float = 1e3,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top-k modes of G = BᵀA by the warm-started block power method, without forming G.

    Args:
        a: activations A, (…, T, n), float16, bfloat16, float32 or float64; or float8_e4m3fn or
            float8_e5m2, read as they are.
        b: output gradients B, (…, T, m), leading dimensions of `a`, and its dtype; a float8
            operand goes with any dtype of the other, another float8 too.
        v: right basis V, (n, k) with orthonormal columns, any floating dtype; k <= min(m, n).
        power_iters: iterations Y = G V, U = orth(Y), W = GᵀU, V = orth(W). 0 makes one pass over A
            and B only and projects on the given basis: U Wᵀ = G V Vᵀ.
        probes: Rademacher columns Ω, (n, r), appended to the first product for the norm estimate.
        cond_max: see `orthonormalize`.
        a_scale, b_scale: float32, the factor of a float8 `a` or `b`: of all of it (scalar tensor,
            from `quantize_tensor`) or of each token (…, T) (from `quantize_rows`). What is computed
            are the products of `a` · a_scale and `b` · b_scale, as if they were float32.

    Returns:
        `u` (m, k) with orthonormal columns; `w` (n, k), equal to GᵀU for power_iters >= 1, so that
        Ĝ = U Wᵀ = UUᵀG; `norm_sq`, the Hutch++ estimate of ‖G‖²_F (without probes the lower bound
        ‖Ĝ‖²_F), and `status`, int32, the worst `orthonormalize` status met. All but the status are
        in float32, or float64 for float64 inputs.

    Raises:
        RuntimeError: shapes, dtypes, devices or the rank do not fit; the message says which.
    """
    return call("lowrank_grad", a, b, v, power_iters, probes, cond_max, a_scale, b_scale)
