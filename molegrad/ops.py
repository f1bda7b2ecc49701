"""The ops of MoleGrad: one table, from which everything under `torch.ops.molegrad` is registered.

Each entry names, in this order, an op's schema, its reference (`molegrad.reference`), its argument
check (`molegrad.checks`), its fake kernel (`molegrad.fake`) and its autograd formula
(`molegrad.autograd`). The reference is registered for every device; native kernels of the same name
(csrc/cpu, csrc/cuda) take precedence where they are built. To add an op, add a row here, its
functions of the same name in those modules, a native kernel if it pays, and its samples in
tests/samples.py.

The functions at the end are typed wrappers; `torch.ops.molegrad.<name>` is the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molegrad import _native, autograd, checks, fake, reference
from molegrad.reference import acc_dtype

# data and scale are x in float8, to be kept for the backward pass in place of x, or None.
_LINEAR = "Tensor x, Tensor weight, Tensor? bias, Tensor? data, Tensor? scale, "
# Of float8 operands.
_SCALES = "Tensor? a_scale=None, Tensor? b_scale=None"


@dataclass(frozen=True)
class Op:
    schema: str
    reference: Callable
    check: Callable
    fake: Callable
    backward: Callable | None = None  # None: there is nothing to differentiate
    setup: Callable | None = None


def _linear(x, weight, bias, *rest):
    # With a bias and more than two dimensions torch returns a view, which autograd would not let
    # anybody change in place.
    y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))


def _check_linear_dense(x, weight, bias, data, scale, basis_u, basis_v, *rest):
    checks.linear("linear_dense", x, weight, bias, data, scale)
    checks.linear_bases("linear_dense", weight, basis_u, basis_v, basis_v.shape[1])


def _check_linear_factored(
    x, weight, bias, data, scale, basis_u, basis_v, stats, method, rank_k, *rest
):
    checks.linear("linear_factored", x, weight, bias, data, scale)
    checks.linear_bases("linear_factored", weight, basis_u, basis_v, rank_k)


def _nothing(*args):
    return None


OPS: dict[str, Op] = {
    "lowrank_grad": Op(
        "(Tensor a, Tensor b, Tensor v, int power_iters=1, Tensor? probes=None, "
        f"float cond_max=1e3, {_SCALES}) -> (Tensor u, Tensor w, Tensor norm_sq, Tensor status)",
        reference.lowrank_grad,
        checks.lowrank_grad,
        fake.lowrank_grad,
        autograd.refuse("lowrank_grad"),
    ),
    "sketch": Op(
        f"(Tensor a, Tensor b, Tensor u, Tensor v, {_SCALES}) -> (Tensor y, Tensor w)",
        reference.sketch,
        checks.sketch,
        fake.sketch,
        autograd.sketch_backward,
        autograd.sketch_setup,
    ),
    "sketch_accumulate_": Op(
        f"(Tensor(a!) y, Tensor(b!) w, Tensor a, Tensor b, Tensor u, Tensor v, {_SCALES}) -> ()",
        reference.sketch_accumulate_,
        checks.sketch_accumulate_,
        _nothing,
    ),
    "sketch_accumulate_many_": Op(
        "(Tensor(a!)[] y, Tensor(b!)[] w, Tensor[] a, Tensor[] b, Tensor[] u, Tensor[] v) -> ()",
        reference.sketch_accumulate_many_,
        checks.sketch_accumulate_many_,
        _nothing,
    ),
    "tangent_factors": Op(
        "(Tensor u, Tensor v, Tensor y, Tensor w, float cond_max=1e3) "
        "-> (Tensor left, Tensor right)",
        reference.tangent_factors,
        checks.tangent_factors,
        fake.tangent_factors,
        autograd.refuse("tangent_factors"),
    ),
    "orthonormalize": Op(
        "(Tensor y, float cond_max=1e3) -> (Tensor q, Tensor r, Tensor status)",
        reference.orthonormalize,
        checks.orthonormalize,
        fake.orthonormalize,
        autograd.refuse("orthonormalize"),
    ),
    "polar_factor": Op(
        "(Tensor w) -> Tensor",
        reference.polar_factor,
        checks.polar_factor,
        lambda w: w.new_empty(w.shape, dtype=acc_dtype(w.dtype)),
        autograd.refuse("polar_factor"),
    ),
    "lowrank_update_": Op(
        "(Tensor(a!) weight, Tensor u, Tensor w, float alpha=-1.0, float decay=0.0) -> ()",
        reference.lowrank_update_,
        checks.lowrank_update_,
        _nothing,
    ),
    "lowrank_update_many_": Op(
        "(Tensor(a!)[] weights, Tensor u, Tensor w, float alpha=-1.0, float decay=0.0, "
        "bool stochastic=False, Tensor? counter=None, int seed=0) -> ()",
        reference.lowrank_update_many_,
        checks.lowrank_update_many_,
        _nothing,
    ),
    "sampled_grad_": Op(
        "(Tensor(a!) grad, Tensor a, Tensor b, Tensor? a_scale, Tensor counter, "
        "float share, int block=2, float alpha=1.0, int seed=0) -> Tensor",
        reference.sampled_grad_,
        checks.sampled_grad_,
        fake.sampled_grad_,
    ),
    "rademacher": Op(
        "(SymInt rows, SymInt cols, Tensor counter, int seed=0) -> Tensor",
        reference.rademacher,
        checks.rademacher,
        lambda rows, cols, counter, seed=0: counter.new_empty((rows, cols), dtype=torch.float32),
    ),
    "quantize_rows": Op(
        "(Tensor x, bool e5m2=False) -> (Tensor data, Tensor scale)",
        reference.quantize_rows,
        checks.quantize_rows,
        fake.quantize_rows,
        autograd.refuse("quantize_rows"),
    ),
    "quantize_tensor": Op(
        "(Tensor x, bool e5m2=False) -> (Tensor data, Tensor scale)",
        reference.quantize_tensor,
        checks.quantize_tensor,
        fake.quantize_tensor,
        autograd.refuse("quantize_tensor"),
    ),
    "add_quantized_": Op(
        "(Tensor(a!) data, Tensor(b!) scale, Tensor x) -> ()",
        reference.add_quantized_,
        checks.add_quantized_,
        _nothing,
    ),
    "linear_dense": Op(
        f"({_LINEAR} Tensor basis_u, Tensor basis_v, Tensor counter, Tensor stats, str method, "
        "int power_iters, int probes, float trust_max, int explored, int seed, float cond_max, "
        "bool fp8=False) -> Tensor",
        _linear,
        _check_linear_dense,
        fake.linear,
        autograd.linear_dense_backward,
        autograd.linear_setup,
    ),
    "linear_factored": Op(
        f"({_LINEAR} Tensor basis_u, Tensor basis_v, Tensor stats, str method, int rank_k, "
        "int power_iters, float cond_max, bool fp8=False) -> Tensor",
        _linear,
        _check_linear_factored,
        fake.linear,
        autograd.linear_factored_backward,
        autograd.linear_setup,
    ),
    "linear_sampled": Op(
        f"({_LINEAR} Tensor? momentum, Tensor? momentum_scale, Tensor counter, Tensor stats, "
        "float share, int block, int seed) -> Tensor",
        _linear,
        checks.linear_sampled,
        fake.linear,
        autograd.linear_sampled_backward,
        autograd.linear_setup,
    ),
}

# torch.library objects must stay alive as long as their registrations are wanted.
_LIBRARY = torch.library.Library("molegrad", "DEF")


def _checked(op: Op, kernel: Callable) -> Callable:
    def run(*args, **kwargs):
        op.check(*args, **kwargs)
        return kernel(*args, **kwargs)

    return run


def _autocast_key(device_type: str) -> torch._C.DispatchKeySet:
    return torch._C.DispatchKeySet(torch._C._dispatch_key_parse(f"Autocast{device_type.upper()}"))


_AUTOCAST = _autocast_key("cpu") | _autocast_key("cuda")


def _without_autocast(kernel: Callable) -> Callable:
    """The reference's products in the dtypes that it says, as in the native kernels."""

    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return kernel(*args, **kwargs)

    return run


def _autocast(name: str, device_type: str) -> Callable:
    """x, weight and bias in autocast's dtype, as torch's own linear has them; bases in float32."""
    key = _autocast_key(device_type)

    def run(x, weight, bias, *rest):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, bias = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias)
        )
        with torch._C._ExcludeDispatchKeyGuard(key):
            return getattr(torch.ops.molegrad, name)(x, weight, bias, *rest)

    return run


def _register(name: str, op: Op) -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(name + op.schema, tags=tags)
    kernel = _without_autocast(_checked(op, op.reference))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    qualified = f"molegrad::{name}"
    torch.library.register_fake(qualified, _checked(op, op.fake), lib=_LIBRARY)
    if op.backward is not None:
        torch.library.register_autograd(
            qualified, op.backward, setup_context=op.setup, lib=_LIBRARY
        )
    if name.startswith("linear"):
        _LIBRARY.impl(name, _autocast(name, "cpu"), "AutocastCPU")
        _LIBRARY.impl(name, _autocast(name, "cuda"), "AutocastCUDA")


for _name, _op in OPS.items():
    _register(_name, _op)
_native.load()


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
        a_scale: (…, T) float32, the factor of each token's row of `a`; None is 1.
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
