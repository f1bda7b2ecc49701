"""The mathematics of MoleGrad in plain torch: one function per op, written like the formulas.

These functions define what `torch.ops.molegrad.*` compute. They run on every device torch runs
on, serve where no native kernel is built, and are what every native kernel is tested against.
They expect checked arguments (`molegrad.checks`).

Notation: T tokens, n in_features, m out_features, A (T, n) a layer's input, B (T, m) the gradient
of its output, G = BᵀA (m, n) the weight gradient, which none of them forms, k the rank, U (m, k)
the left basis, V (n, k) the right basis, Y = G V (m, k), W = Gᵀ U (n, k).

Sources: randomised subspace iteration, Halko, Martinsson, Tropp, "Finding structure with
randomness" (2011); CholeskyQR2, Yamamoto et al. (2015); Hutch++, Meyer et al. (2021); the tangent
space of the rank-k manifold, Koch and Lubich (2007); Muon's polar factor, Jordan et al. (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

# What `orthonormalize` says of a block.
SAFE, ILL_CONDITIONED, RANK_DEFICIENT, NON_FINITE = 0, 1, 2, 3
TOKEN_CHUNK = 8192
ROW_CHUNK = 1024


# Read as they are, with scales, by the ops that say so.
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """dtype of sums and results: float64 where one is float64, float32 for everything narrower."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _scaled_tokens(x: Tensor, scale: Tensor | None, dtype: torch.dtype):
    """Token chunks of X in `dtype`; a float8 one times its scale, of all X or of each token."""
    x = _tokens(x)
    if scale is None:
        return (chunk.to(dtype) for chunk in x.split(TOKEN_CHUNK))
    scale = scale.to(dtype).reshape(-1, 1).expand(x.shape[0], 1)
    pairs = zip(x.split(TOKEN_CHUNK), scale.split(TOKEN_CHUNK), strict=True)
    return (chunk.to(dtype) * factor for chunk, factor in pairs)


def _chunks(a: Tensor, b: Tensor, a_scale: Tensor | None = None, b_scale: Tensor | None = None):
    """Token chunks of A and B in the accumulation dtype, so that a conversion stays small."""
    dtype = acc_dtype(a.dtype, b.dtype)
    return zip(_scaled_tokens(a, a_scale, dtype), _scaled_tokens(b, b_scale, dtype), strict=True)


def _left_product(
    a: Tensor, b: Tensor, v: Tensor, a_scale: Tensor | None = None, b_scale: Tensor | None = None
) -> Tensor:
    """Y = Bᵀ(A V)."""
    y = v.new_zeros(b.shape[-1], v.shape[1])
    for a_t, b_t in _chunks(a, b, a_scale, b_scale):
        y.addmm_(b_t.mT, a_t @ v)
    return y


def sketch_accumulate_(
    y: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> None:
    """Y += Bᵀ(A V), W += Aᵀ(B U), reading A and B once."""
    u, v = u.to(y.dtype), v.to(y.dtype)
    for a_t, b_t in _chunks(a, b, a_scale, b_scale):
        y.addmm_(b_t.mT, a_t @ v)
        w.addmm_(a_t.mT, b_t @ u)


def sketch_accumulate_many_(
    y: list[Tensor],
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
) -> None:
    """`sketch_accumulate_` of every layer, in their order."""
    for layer in zip(y, w, a, b, u, v, strict=True):
        sketch_accumulate_(*layer)


def sketch(
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = Bᵀ(A V) and W = Aᵀ(B U)."""
    dtype = acc_dtype(a.dtype, b.dtype)
    y = torch.zeros(b.shape[-1], v.shape[1], dtype=dtype, device=a.device)
    w = torch.zeros(a.shape[-1], u.shape[1], dtype=dtype, device=a.device)
    sketch_accumulate_(y, w, a, b, u, v, a_scale, b_scale)
    return y, w


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
    """Block power method: U with orthonormal columns and W = GᵀU, so that Ĝ = U Wᵀ."""
    v = v.to(acc_dtype(a.dtype, b.dtype))
    k = v.shape[1]
    start = v if probes is None else torch.cat([v, probes.to(v.dtype)], dim=1)
    product = _left_product(a, b, start, a_scale, b_scale)
    y, g_probes = product.split([k, start.shape[1] - k], dim=1)

    norm_sq = None
    if probes is not None:
        norm_sq = hutch_norm_sq(y, g_probes, v, probes.to(v.dtype))

    u, r, status = orthonormalize(y, cond_max)
    if power_iters == 0:
        w = v @ r.mT
    for i in range(power_iters):
        w = _left_product(b, a, u, b_scale, a_scale)  # Aᵀ(B U)
        if i + 1 < power_iters:
            y = _left_product(a, b, orthonormalize(w, cond_max)[0], a_scale, b_scale)
            u, _, new_status = orthonormalize(y, cond_max)
            status = torch.maximum(status, new_status)
    if norm_sq is None:
        norm_sq = w.square().sum()
    return u, w, norm_sq, status


def hutch_norm_sq(y: Tensor, g_probes: Tensor, v: Tensor, probes: Tensor) -> Tensor:
    """‖G‖²_F ≈ ‖G V‖² + ‖G (I − VVᵀ) Ω‖² / r (Hutch++, Meyer et al. 2021); batched."""
    residual = g_probes - y @ (v.mT @ probes)
    return y.square().sum((-2, -1)) + residual.square().sum((-2, -1)) / probes.shape[-1]


def orthonormalize(y: Tensor, cond_max: float = 1e3) -> tuple[Tensor, Tensor, Tensor]:
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


def tangent_factors(
    u: Tensor, v: Tensor, y: Tensor, w: Tensor, cond_max: float = 1e3
) -> tuple[Tensor, Tensor]:
    """Factors of Ĝ = U Wᵀ + (I − UUᵀ) Y Vᵀ, the projection of G on the tangent space at (U, V)."""
    dtype = acc_dtype(y.dtype)
    u, v, y, w = (x.to(dtype) for x in (u, v, y, w))
    y_perp, _ = project_out(u, y)
    left, r, _ = orthonormalize(torch.cat([u, y_perp], dim=1), cond_max)
    # U = L R₁ and Y⊥ = L R₂ exactly, also where U is orthonormal to rounding only.
    return left, torch.cat([w, v], dim=1) @ r.mT


def polar_factor(w: Tensor) -> Tensor:
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


def lowrank_update_(
    weight: Tensor, u: Tensor, w: Tensor, alpha: float = -1.0, decay: float = 0.0
) -> None:
    """weight ← (1 − decay) weight + alpha U Wᵀ, in blocks of rows."""
    dtype = acc_dtype(weight.dtype)
    u, w = u.to(dtype), w.to(dtype)
    for rows, u_rows in zip(weight.split(ROW_CHUNK), u.split(ROW_CHUNK), strict=True):
        if weight.dtype == dtype:
            rows.addmm_(u_rows, w.mT, beta=1.0 - decay, alpha=alpha)
        else:
            rows.copy_(torch.addmm(rows.to(dtype), u_rows, w.mT, beta=1.0 - decay, alpha=alpha))


def lowrank_update_many_(
    weights: list[Tensor],
    u: Tensor,
    w: Tensor,
    alpha: float = -1.0,
    decay: float = 0.0,
    stochastic: bool = False,
    counter: Tensor | None = None,
    seed: int = 0,
) -> None:
    """weightᵢ ← (1 − decay) weightᵢ + alpha Uᵢ Wᵢᵀ; bfloat16 optionally rounded at random."""
    if not stochastic:  # a kernel of one weight's, where there is one
        for weight, u_i, w_i in zip(weights, u, w, strict=True):
            torch.ops.molegrad.lowrank_update_(weight, u_i, w_i, alpha, decay)
        return
    u, w = u.to(torch.float32), w.to(torch.float32)
    first = 1  # the index of the next element, over all weights
    for weight, u_i, w_i in zip(weights, u, w, strict=True):
        for rows, u_rows in zip(weight.split(ROW_CHUNK), u_i.split(ROW_CHUNK), strict=True):
            value = torch.addmm(rows.float(), u_rows, w_i.mT, beta=1.0 - decay, alpha=alpha)
            index = torch.arange(first, first + rows.numel(), device=rows.device).view_as(value)
            rows.copy_(round_randomly(value, _random_bits(index, counter.to(rows.device), seed)))
            first += rows.numel()


def round_randomly(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to one of the two neighbours in bfloat16, with 24 random bits for each element.

    What bfloat16 drops of x, as a share of the distance between the two, is the probability of the
    one that is farther from zero: adding 16 random bits to them carries into it that often.
    """
    mantissa = x.view(torch.int32) + (bits >> 8).to(torch.int32)
    rounded = (mantissa & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


# splitmix64 (Steele, Lea, Flood 2014), its constants as signed 64-bit integers.
_WEYL = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685
_STREAM = 2862933555777941757


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; the masks make arithmetic right shifts logical ones."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _random_bits(index: Tensor, counter: Tensor, seed: int) -> Tensor:
    """24 random bits per index (int64, from 1 on) from a hash of (seed, counter, index)."""
    stream = _mix(counter.to(torch.int64) * _STREAM + seed)
    return (_mix(stream + index * _WEYL) >> 40) & 0xFFFFFF


def rademacher(rows: int, cols: int, counter: Tensor, seed: int = 0) -> Tensor:
    """Signs from a hash of (seed, counter, position), bit for bit the same on every device."""
    index = torch.arange(1, rows * cols + 1, device=counter.device, dtype=torch.int64)
    return (1 - 2 * (_random_bits(index, counter, seed) & 1)).to(torch.float32).view(rows, cols)


THRESHOLD_TOKENS, THRESHOLD_STEPS = 512, 8
# What `sampled_grad_` tells of its sample: see `ops.sampled_grad_`.
SAMPLING = ("sampled_share", "sampling_noise")


def sampled_grad_(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    counter: Tensor,
    share: float,
    block: int = 2,
    alpha: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """grad += alpha Ĝ with E Ĝ = G = BᵀA from a sample X̃ of the wider of A and B; see `ops`."""
    dtype = acc_dtype(b.dtype)
    a, b = _tokens(a), _tokens(b)
    a_scale = None if a_scale is None else a_scale.reshape(-1)
    wide_a = a.shape[1] > b.shape[1]
    total = a.shape[0]
    if share >= 1.0 and grad.dtype == b.dtype:  # the library's product adds to grad by itself
        if a_scale is not None:
            a = dequantize_rows(a, a_scale, b.dtype)
        grad.addmm_(b.mT, a, alpha=alpha)
        return torch.tensor([1.0, 0.0], device=grad.device)
    out = grad if grad.dtype == dtype else torch.zeros_like(grad, dtype=dtype)
    factor = alpha if out is grad else 1.0

    def part(rows: slice) -> tuple[Tensor, Tensor]:
        """X (·, F) and Z (·, d), the wide and the narrow operand."""
        x = a[rows].to(dtype) if a_scale is None else dequantize_rows(a[rows], a_scale[rows], dtype)
        return (x, b[rows].to(dtype)) if wide_a else (b[rows].to(dtype), x)

    sampling = share < 1.0 and total > 0
    taken, noise, energy = torch.zeros(3, dtype=dtype, device=a.device).unbind()
    if sampling:
        stride = max(1, total // THRESHOLD_TOKENS)
        threshold = _threshold(_scores(*part(slice(None, None, stride)), block), share)
    for start in range(0, total, TOKEN_CHUNK):
        x, z = part(slice(start, start + TOKEN_CHUNK))
        if sampling:
            scores = _scores(x, z, block)
            first, pairs = start * scores.shape[1] + 1, scores.shape[1]
            index = torch.arange(first, first + scores.numel(), device=a.device).view_as(scores)
            inclusion = (scores / threshold).clamp(max=1.0)
            chosen = _random_bits(index, counter, seed).to(dtype) * 2.0**-24 < inclusion
            inverse = torch.where(inclusion > 0, 1.0 / inclusion, 1.0)
            weight = torch.where(chosen, inverse, 0.0).repeat_interleave(block, dim=1)
            x = x * weight[:, : x.shape[1]]
            taken += chosen.sum() / (total * pairs)
            noise += (scores.square() * (inverse - 1.0)).sum()
            energy += scores.square().sum()
        product = z.mT @ x if wide_a else x.mT @ z
        out.add_(product, alpha=factor)
    if out is not grad:
        grad.add_(out, alpha=alpha)
    relative = torch.where(energy > 0, noise / energy, 0.0)
    return torch.stack([taken if sampling else taken + 1.0, relative]).to(torch.float32)


def add_quantized_(data: Tensor, scale: Tensor, x: Tensor) -> None:
    """data · scale += x, rounded to int8 with new scales, one for each row or column."""
    value = data.to(torch.float32) * scale + x.to(torch.float32)
    dim = 1 if scale.shape == (data.shape[0], 1) else 0
    new = value.abs().amax(dim, keepdim=True) / 127.0
    scale.copy_(torch.where(new == 0, 1.0, new))
    data.copy_((value / scale).round_())


def float8_dtype(e5m2: bool) -> torch.dtype:
    """float8_e5m2, which has more exponents, or float8_e4m3fn, which has more digits."""
    return torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn


def _float8_scale(peak: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor by which the largest number of `dtype` becomes `peak`."""
    scale = peak / torch.finfo(dtype).max
    # A subnormal scale is too coarse: by it, the largest would not fit.
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)


def quantize_rows(x: Tensor, e5m2: bool = False) -> tuple[Tensor, Tensor]:
    """float8 rows and their scales: x ≈ data · scale."""
    x, dtype = x.to(torch.float32), float8_dtype(e5m2)
    scale = _float8_scale(x.abs().amax(-1), dtype)
    return (x / scale.unsqueeze(-1)).to(dtype), scale


def quantize_tensor(x: Tensor, e5m2: bool = False) -> tuple[Tensor, Tensor]:
    """float8 numbers and one scale for all of them: x ≈ data · scale."""
    x, dtype = x.to(torch.float32), float8_dtype(e5m2)
    peak = x.abs().amax() if x.numel() > 0 else x.new_zeros(())
    scale = _float8_scale(peak, dtype)
    return (x / scale).to(dtype), scale


def dequantize_rows(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """data (…, n) times scale (…), in `dtype`: what `quantize_rows` has left of its input."""
    return data.to(dtype) * scale.to(dtype).unsqueeze(-1)


def _scores(x: Tensor, z: Tensor, block: int) -> Tensor:
    """‖x_tβ‖ ‖z_t‖ of every token t and block β of features of X: (T, ⌈F / block⌉)."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).view(x.shape[0], -1, block)
    return (blocks.square().sum(2) * z.square().sum(1, keepdim=True)).sqrt()


def _threshold(scores: Tensor, share: float) -> Tensor:
    """τ with mean(min(1, score / τ)) ≈ share; small where fewer scores than that are not zero."""
    threshold = scores.mean() + torch.finfo(scores.dtype).tiny
    for _ in range(THRESHOLD_STEPS):
        expected = (scores / threshold).clamp(max=1.0).mean()
        threshold = threshold * (expected / share).clamp(0.1, 10.0)
    return threshold.clamp_min(torch.finfo(scores.dtype).tiny)
