"""The ops of MoleGrad with types and documentation: `torch.ops.molegrad.<name>` is the same thing.

Importing this module registers them: `molegrad.registry` has the table, and says how to add one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.registry import OPS as OPS


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

    Source: Halko, Martinsson, Tropp (2011), algorithm 4.4; Meyer et al. (2021) for the norm.
    """
    return torch.ops.molegrad.lowrank_grad(a, b, v, power_iters, probes, cond_max, a_scale, b_scale)


def sketch(
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = Bᵀ(A V) (m, k_v) and W = Aᵀ(B U) (n, k_u) in one pass over A and B.

    Args:
        a, b, a_scale, b_scale: as in `lowrank_grad`. u: (m, k_u). v: (n, k_v), any floating dtype.

    Returns:
        y, w in float32, or float64 for float64 inputs. Differentiable in a, b, u and v, unless a or
        b is float8.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    return torch.ops.molegrad.sketch(a, b, u, v, a_scale, b_scale)


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
    """Y += Bᵀ(A V) and W += Aᵀ(B U) in place: call it per token chunk, the sum is exact.

    `y` (m, k_v) and `w` (n, k_u) are contiguous and float32 (float64 for float64 inputs).
    """
    torch.ops.molegrad.sketch_accumulate_(y, w, a, b, u, v, a_scale, b_scale)


def sketch_accumulate_many_(
    y: list[Tensor],
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
) -> None:
    """`sketch_accumulate_` of several layers at once: y[i] += B_iᵀ(A_i V_i), w[i] += A_iᵀ(B_i U_i).

    On a GPU a few launches serve all layers in 16 bits of ranks up to 128.

    Args:
        y, w, a, b, u, v: for each layer what `sketch_accumulate_` takes. Shapes, token counts,
            ranks and dtypes may differ from layer to layer; the device may not. A layer may appear
            several times, with the same `y` and `w`.
    """
    torch.ops.molegrad.sketch_accumulate_many_(y, w, a, b, u, v)


def tangent_factors(
    u: Tensor, v: Tensor, y: Tensor, w: Tensor, cond_max: float = 1e3
) -> tuple[Tensor, Tensor]:
    """Factors of the tangent estimate Ĝ = U Wᵀ + (I − UUᵀ) Y Vᵀ.

    Args:
        u: (m, k), v: (n, k), orthonormal columns; y = G V (m, k), w = GᵀU (n, k); 2k <= m.

    Returns:
        left (m, 2k) with orthonormal columns and right (n, 2k); left rightᵀ = Ĝ.

    Source: projection on the tangent space of rank-k matrices, Koch and Lubich (2007).
    """
    return torch.ops.molegrad.tangent_factors(u, v, y, w, cond_max)


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

    Source: Yamamoto et al. (2015).
    """
    return torch.ops.molegrad.orthonormalize(y, cond_max)


def polar_factor(w: Tensor) -> Tensor:
    """P = W (WᵀW)^(−1/2): with orthonormal U, the polar factor of U Wᵀ is U Pᵀ, exactly.

    Args:
        w: (…, n, k), k <= n.

    Returns:
        (…, n, k). Modes below the rounding of W are zero; NaN or Inf gives NaN.
    """
    return torch.ops.molegrad.polar_factor(w)


def rademacher(rows: int, cols: int, counter: Tensor, seed: int = 0) -> Tensor:
    """Random signs ±1 (rows, cols), float32: a pure function of its arguments on every device.

    Args:
        counter: int64 scalar tensor, usually the step; the result lies on its device.
        seed: distinguishes streams; any integer of 64 bits.

    Source: splitmix64, Steele, Lea, Flood (2014).
    """
    return torch.ops.molegrad.rademacher(rows, cols, counter, seed)


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
    """grad += alpha Ĝ in place, Ĝ an unbiased estimate of G = BᵀA for about `share` of its cost.

    Let X (T, F) be the wider of A and B (B where they are equally wide) and Z (T, d) the other. G
    is a sum over tokens t and blocks β of `block` neighbouring features of X. Each pair (t, β) is
    taken with probability min(1, ‖x_tβ‖ ‖z_t‖ / τ) and weighted by its inverse: Poisson sampling
    with probability proportional to size, which has the least variance for its expected number of
    terms. τ follows from `share`. Zeros of X, of which activations such as relu² and their
    gradients have many, cost nothing and lose nothing: where no more than `share` of the blocks
    hold anything else, the estimate is G itself.

    Args:
        grad: (m, n), any floating dtype, the gradient or the momentum that is added to.
        a, b: as in `lowrank_grad`; `a` may be float8_e4m3fn, from `quantize_rows`.
        a_scale: (…, T) float32, the factor of each token's row of a float8 `a`; None for others.
        counter, seed: decide the sample, as in `rademacher`.
        share: of the pairs to take, > 0; from 1 on G itself is added.
        block: features per block, >= 1; the smaller, the smaller the variance.

    Returns:
        (2,) float32: the share of the pairs that was taken, and E‖Ĝ − G‖²_F / Σ_t ‖a_t‖² ‖b_t‖²,
        the variance that the sample adds relative to what a gradient of as many independent
        tokens has anyway (0.25: as noisy as the exact gradient of a batch 1.25 times smaller).

    Raises:
        RuntimeError: shapes, dtypes, devices, share or block do not fit.

    Source: Drineas, Kannan, Mahoney (2006), sampled matrix products.
    """
    return torch.ops.molegrad.sampled_grad_(grad, a, b, a_scale, counter, share, block, alpha, seed)


def project_tokens(a: Tensor, basis_v: Tensor) -> tuple[Tensor, Tensor]:
    """P = A V, what method "projected" keeps of every token.

    Args:
        a: activations A, (…, T, n), any floating dtype.
        basis_v: V (n, k), k <= n, any floating dtype, usually float32.

    Returns:
        p (T, k) and v (n, k), a copy of V, both in the dtype of `a`: by them the estimate's mean
        is right, whatever becomes of `basis_v`.
    """
    return torch.ops.molegrad.project_tokens(a, basis_v)


def sample_tokens(a: Tensor, counter: Tensor, stride: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One row of A out of each group of `stride` neighbouring tokens, S = ⌈T / stride⌉ in all.

    Each token of a group is as likely; the last group may be smaller.

    Args:
        a: (…, T, n), any floating dtype.
        counter, seed: decide the sample, as in `rademacher`.
        stride: >= 1; 1 takes every token.

    Returns:
        rows (S, n) in the dtype of `a`, and index (S,) int64, which of the T tokens they are.
    """
    return torch.ops.molegrad.sample_tokens(a, counter, stride, seed)


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
    """grad += alpha Ĝ in place, Ĝ = BᵀP Vᵀ + Σ_s w_s b_s (a_s − V p_s)ᵀ, whose mean is G = BᵀA.

    w_s is the size of the group of tokens that s was drawn from.

    Args:
        grad: (m, n), any floating dtype, the gradient or the momentum that is added to.
        b: output gradients B, (…, T, m).
        p, v: from `project_tokens`, in the dtype of `b`.
        rows, index: from `sample_tokens`, with the same `stride`; the rows may be float8, from
            `quantize_rows`.
        rows_scale: (S,) float32, the factor of each float8 row.

    Returns:
        block (n, k) = Σ_s w_s ‖b_s‖² a_s p_sᵀ, whose orthonormalised columns are the next basis, in
        float32 (float64 for float64 inputs), and stats (2,) float32: the share of the tokens of
        which the sample has a product that is not zero, and an estimate of
        E‖Ĝ − G‖²_F / Σ_t ‖a_t‖² ‖b_t‖², the noise that the sample adds (see `sampled_grad_`; what
        neighbouring tokens have in common makes the true one smaller).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.

    The work is in library products: the op has no kernels of its own.
    """
    return torch.ops.molegrad.projected_grad_(grad, b, p, rows, rows_scale, index, v, stride, alpha)


def quantize_rows(x: Tensor, e5m2: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of x in float8, each with a scale of its own, its largest magnitude over float8's.

    Args:
        x: (…, T, n), float16, bfloat16, float32 or float64.
        e5m2: float8_e5m2 with its wider range, for output gradients, instead of float8_e4m3fn.

    Returns:
        data (…, T, n) float8 and scale (…, T) float32 with x ≈ data · scale. E4M3, largest number
        448: relative rounding of 2⁻⁴ down to 2⁻¹⁵ of the row's largest magnitude; E5M2, largest
        57344: of 2⁻³ down to 2⁻³⁰. A row with NaN or infinity has NaN; one whose magnitudes are
        all below 448 · 2⁻¹²⁶ (57344 · 2⁻¹²⁶) becomes zeros.

    Source: Micikevicius et al., FP8 formats for deep learning (2022).
    """
    return torch.ops.molegrad.quantize_rows(x, e5m2)


def quantize_tensor(x: Tensor, e5m2: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_rows` with one scale, a scalar tensor, for all of x, of any shape.

    Of rows much smaller than the largest less is left; where one number is infinite, only zeros
    and NaN are.
    """
    return torch.ops.molegrad.quantize_tensor(x, e5m2)


def add_quantized_(data: Tensor, scale: Tensor, x: Tensor) -> None:
    """data · scale += x in place, with new scales: the largest magnitude of each over 127.

    Args:
        data: (m, n) int8. scale: (m, 1), one for each row, or (1, n), one for each column,
            float32. x: (m, n), any floating dtype; where it is NaN the scale becomes NaN.

    Source: Dettmers et al. (2022), 8-bit optimizers; here one scale a row, rounded to nearest.
    """
    torch.ops.molegrad.add_quantized_(data, scale, x)


def lowrank_update_(
    weight: Tensor, u: Tensor, w: Tensor, alpha: float = -1.0, decay: float = 0.0
) -> None:
    """weight ← (1 − decay) weight + alpha U Wᵀ in place, without an (m, n) temporary.

    Args:
        weight: (m, n), any floating dtype. u: (m, k). w: (n, k).
    """
    with torch.no_grad():
        torch.ops.molegrad.lowrank_update_(weight, u, w, alpha, decay)


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
    """`lowrank_update_` of several weights at once, optionally with stochastic rounding.

    Args:
        weights: of one shape (m, n) and dtype. u: (len(weights), m, k). w: (len(weights), n, k).
        stochastic: for bfloat16 weights: the result, in float32, is rounded to one of its two
            neighbours, with probabilities that make its mean exact (up to 2⁻¹⁶ of their distance),
            so that updates smaller than half that distance are not lost.
        counter, seed: decide the rounding, as in `rademacher`.
    """
    with torch.no_grad():
        torch.ops.molegrad.lowrank_update_many_(
            weights, u, w, alpha, decay, stochastic, counter, seed
        )
