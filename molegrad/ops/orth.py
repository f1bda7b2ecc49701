"""Orthonormal columns and polar factors of tall blocks.

Sources: CholeskyQR2, Yamamoto et al. (2015); Muon's polar factor, Jordan et al. (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.ops import checks
from molegrad.ops.checks import acc_dtype
from molegrad.ops.registry import call, op, refuse

# What `orthonormalize` says of a block.
SAFE, ILL_CONDITIONED, RANK_DEFICIENT, NON_FINITE = 0, 1, 2, 3


def orthonormalize_reference(y: Tensor, cond_max: float = 1e3) -> tuple[Tensor, Tensor, Tensor]:
    """Y = Q R, Q orthonormal for every Y: CholeskyQR2 where it is safe, Householder elsewhere."""
    y = y.to(acc_dtype(y.dtype))
    m, k = y.shape[-2:]
    eps = torch.finfo(y.dtype).eps
    eye = torch.eye(m, k, dtype=y.dtype, device=y.device)

    finite = y.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    z = torch.where(finite, y, eye)
    scale = _positive(z.abs().amax(-2, keepdim=True))  # first by the largest entry: no overflow
    z = z / scale
    norm = _positive(torch.linalg.vector_norm(z, dim=-2, keepdim=True))
    z = z / norm
    scale = scale * norm

    q, r, cond = _cholesky_qr2(z)
    safe = (cond <= cond_max)[..., None, None]  # False for NaN too
    status = torch.zeros(y.shape[:-2], dtype=torch.int32, device=y.device)
    # On the CPU a branch costs nothing; elsewhere it would make the host wait for the device.
    if y.device.type != "cpu" or not bool(safe.all()):
        q_house, r_house = torch.linalg.qr(z)
        diagonal = r_house.diagonal(dim1=-2, dim2=-1)
        sign = torch.where(diagonal < 0, -1.0, 1.0).to(z.dtype)
        q = torch.where(safe, q, q_house * sign.unsqueeze(-2))
        r = torch.where(safe, r, r_house * sign.unsqueeze(-1))
        deficient = diagonal.abs().amin(-1) <= 8 * eps * k**0.5
        fallback = torch.where(deficient, RANK_DEFICIENT, ILL_CONDITIONED).to(torch.int32)
        status = torch.where(safe[..., 0, 0], status, fallback)
    status = torch.where(finite[..., 0, 0], status, NON_FINITE).to(torch.int32)
    r = torch.where(finite, r * scale, torch.nan)
    return q.contiguous(), r.contiguous(), status


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def _cholesky_qr2(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two rounds of R = chol(ZᵀZ)ᵀ, Q = Z R⁻¹, and the condition number's estimate ‖R⁻¹‖_F."""
    lower, info = torch.linalg.cholesky_ex(z.mT @ z)
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    cond = torch.where(info == 0, torch.linalg.matrix_norm(inverse), torch.inf)
    q = torch.linalg.solve_triangular(lower.mT, z, upper=True, left=False)
    lower2, _ = torch.linalg.cholesky_ex(q.mT @ q)
    q = torch.linalg.solve_triangular(lower2.mT, q, upper=True, left=False)
    return q, lower2.mT @ lower.mT, cond


def project_out(basis: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Block minus basis C, orthogonal to the orthonormal basis, and C; batched."""
    inner = basis.mT @ block
    rest = block - basis @ inner
    again = basis.mT @ rest  # twice is enough (Kahan, Parlett)
    return rest - basis @ again, inner + again


def _check_orthonormalize(y, cond_max=1e3) -> None:
    checks.block("orthonormalize", "y", y, "m")
    checks.condition("orthonormalize", cond_max)


def _fake_orthonormalize(y, cond_max=1e3):
    dtype, batch, (m, k) = acc_dtype(y.dtype), y.shape[:-2], y.shape[-2:]
    return (
        y.new_empty((*batch, m, k), dtype=dtype),
        y.new_empty((*batch, k, k), dtype=dtype),
        y.new_empty(batch, dtype=torch.int32),
    )


op(
    "orthonormalize",
    "(Tensor y, float cond_max=1e3) -> (Tensor q, Tensor r, Tensor status)",
    orthonormalize_reference,
    check=_check_orthonormalize,
    fake=_fake_orthonormalize,
    backward=refuse("orthonormalize"),
)


def orthonormalize(y: Tensor, cond_max: float = 1e3) -> tuple[Tensor, Tensor, Tensor]:
    """Y = Q R with orthonormal Q for every Y, the method chosen on the device.

    Args:
        y: (…, m, k), k <= m.
        cond_max: largest condition number of the column-normalised block for CholeskyQR2.

    Returns:
        q (…, m, k) with orthonormal columns, r (…, k, k) upper triangular with diagonal >= 0, and
        status (…) int32: 0 CholeskyQR2 was safe; 1 ill-conditioned, Householder QR; 2 numerically
        rank-deficient (a zero block too), the missing columns completed; 3 NaN or Inf in the
        block: q is the first k columns of the identity and r is NaN.

    Raises:
        RuntimeError: the shape, the dtype or cond_max does not fit.
    """
    return call("orthonormalize", y, cond_max)


def polar_factor_reference(w: Tensor) -> Tensor:
    """P = W (WᵀW)^(−1/2) in k×k work: the polar factor of Ĝ = U Wᵀ is U Pᵀ. Zero modes stay 0."""
    dtype = acc_dtype(w.dtype)
    k = w.shape[-1]
    scale = _positive(w.to(dtype).abs().amax((-2, -1), keepdim=True))
    w = w.to(dtype) / scale
    finite = w.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    gram = torch.where(finite, w, 0.0).double()
    eigenvalues, basis = torch.linalg.eigh(gram.mT @ gram)
    # Below the rounding of W (or of its Gram matrix in float64) a mode has no direction.
    tolerance = max(8 * k**0.5 * torch.finfo(dtype).eps, 1e-7) ** 2
    kept = eigenvalues > tolerance * eigenvalues[..., -1:]
    inverse = torch.where(kept, eigenvalues, 1.0).rsqrt() * kept
    root = (basis * inverse.unsqueeze(-2)) @ basis.mT
    return torch.where(finite, w @ root.to(dtype), torch.nan)


op(
    "polar_factor",
    "(Tensor w) -> Tensor",
    polar_factor_reference,
    check=lambda w: checks.block("polar_factor", "w", w, "n"),
    fake=lambda w: w.new_empty(w.shape, dtype=acc_dtype(w.dtype)),
    backward=refuse("polar_factor"),
)


def polar_factor(w: Tensor) -> Tensor:
    """P = W (WᵀW)^(−1/2): with orthonormal U, the polar factor of U Wᵀ is U Pᵀ, exactly.

    Args:
        w: (…, n, k), k <= n.

    Returns:
        (…, n, k). Modes below the rounding of W are zero; NaN or Inf gives NaN.

    Raises:
        RuntimeError: the shape or the dtype does not fit.
    """
    return call("polar_factor", w)
