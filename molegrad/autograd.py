"""Backward formulas of the ops that have one.

`linear_dense`, `linear_factored` and `linear_sampled` compute the plain linear
layer y = x Wᵀ + bias; they differ from it, and from each other, in what they keep of x (x, or its
rows in float8) and in what the backward pass makes of the weight gradient:

- dense: `weight.grad` receives the low-rank estimate Ĝ as a matrix, and the bases, which are
  buffers, move on in place (autograd and torch.compile allow a backward pass to change a buffer).
- factored: the weight receives nothing; the two small bases receive the sketches
  Y = G V (m, k) and W = Gᵀ U (n, k) as their gradients. These are the exact gradients of
  L(weight + U Vᵀ) with respect to U and V at a point where that product is left out.
- sampled: an unbiased estimate from a sample of the products that the gradient is a sum of goes to
  `weight.grad`, or straight into the momentum, so that no gradient exists at any time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molegrad import bases
from molegrad.ops import checks
from molegrad.ops.checks import flat as _tokens
from molegrad.ops.float8 import dequantize_rows
from molegrad.ops.power import hutch_norm_sq
from molegrad.ops.registry import op
from molegrad.ops.sampled import sample_of

Scales = tuple[Tensor | None, Tensor | None]

# What a layer's `stats` buffer holds, in this order.
STATS = (
    "gradient_norm_sq",
    "captured_norm_sq",
    "trust_factor",
    "condition_number",
    "subspace_drift",
    "orth_status",
    "sampled_share",
    "sampling_noise",
)
_SAMPLED = slice(STATS.index("sampled_share"), len(STATS))


def trust_factor(norm_sq: Tensor, captured_sq: Tensor, trust_max: float) -> Tensor:
    """‖G‖ / ‖Ĝ‖ within [1, trust_max]; 1 where the estimate is zero."""
    ratio = torch.where(captured_sq > 0, norm_sq / captured_sq, 1.0)
    return ratio.sqrt().clamp(1.0, trust_max)


def dense_estimate(
    a: Tensor,
    b: Tensor,
    basis_u: Tensor,
    basis_v: Tensor,
    counter: Tensor,
    stats: Tensor,
    method: str,
    power_iters: int,
    probes: int,
    trust_max: float,
    explored: int,
    seed: int,
    cond_max: float,
    scales: Scales = (None, None),
) -> Tensor:
    """Ĝ (m, n) in the accumulation dtype; moves bases, counter and stats on in place.

    `trust_max` 0 leaves the norm of the estimate alone; `scales` are those of float8 `a` and `b`.
    """
    ops = torch.ops.molegrad
    if method == "tangent":
        start = tangent_start(basis_v, probes, counter, seed)
        y, w = (x.to(basis_v.dtype) for x in ops.sketch(a, b, basis_u, start, *scales))
        return tangent_estimate(
            y, w, start, basis_u, basis_v, counter, stats, trust_max, explored, seed, cond_max
        )
    omega = _probes(basis_v, probes, counter, seed) if probes else None
    left, right, norm_sq, status = ops.lowrank_grad(
        a, b, basis_v, power_iters, omega, cond_max, *scales
    )
    left, right = left.to(basis_v.dtype), right.to(basis_v.dtype)
    captured_sq = right.square().sum()
    trust = _trust(norm_sq, captured_sq, trust_max)
    new_v, condition, orth = bases.refresh(basis_v, right, counter, explored, seed + 1, cond_max)
    estimate = left @ (right * trust).mT
    drift = _move(basis_v, new_v)
    counter.add_(1)
    _tell(stats, norm_sq, captured_sq, trust, condition, drift, torch.maximum(status, orth))
    return estimate


def tangent_start(basis_v: Tensor, probes: int, counter: Tensor, seed: int) -> Tensor:
    """[V, Ω] (n, k + probes): the right columns of the tangent estimate's sketch."""
    if not probes:
        return basis_v
    return torch.cat([basis_v, _probes(basis_v, probes, counter, seed)], dim=1)


def _probes(basis_v: Tensor, probes: int, counter: Tensor, seed: int) -> Tensor:
    return bases.rademacher(basis_v.shape[0], probes, counter, seed, basis_v.dtype)


def tangent_estimate(
    y: Tensor,
    w: Tensor,
    start: Tensor,
    basis_u: Tensor,
    basis_v: Tensor,
    counter: Tensor,
    stats: Tensor,
    trust_max: float,
    explored: int,
    seed: int,
    cond_max: float,
) -> Tensor:
    """Ĝ = U Wᵀ + (I − UUᵀ) Y Vᵀ from its sketches, which are plain sums over tokens; moves bases,
    counter and stats on in place.

    Args:
        y: G [V, Ω] (m, k + probes). w: Gᵀ U (n, k). start: [V, Ω], from `tangent_start`. All in
            the bases' dtype.
    """
    k = basis_v.shape[1]
    y, g_omega = y[:, :k].contiguous(), y[:, k:]
    y_perp = y - basis_u @ (basis_u.mT @ y)
    norm_sq = captured_sq = w.square().sum() + y_perp.square().sum()
    if start.shape[1] > k:
        norm_sq = hutch_norm_sq(y, g_omega, basis_v, start[:, k:])
    trust = _trust(norm_sq, captured_sq, trust_max)
    left, right = torch.cat([basis_u, y_perp], dim=1), torch.cat([w, basis_v], dim=1)
    estimate = left @ (right * trust).mT
    new_v, condition, status = bases.refresh(basis_v, w, counter, explored, seed + 1, cond_max)
    new_u, _, status_u = bases.refresh(basis_u, y, counter, explored, seed + 2, cond_max)
    drift = _move(basis_v, new_v)
    basis_u.copy_(new_u)
    counter.add_(1)
    _tell(stats, norm_sq, captured_sq, trust, condition, drift, torch.maximum(status, status_u))
    return estimate


def _trust(norm_sq: Tensor, captured_sq: Tensor, trust_max: float) -> Tensor:
    if trust_max > 0:
        return trust_factor(norm_sq, captured_sq, trust_max)
    return torch.ones_like(captured_sq)


def _move(basis_v: Tensor, new_v: Tensor) -> Tensor:
    """basis_v becomes new_v; how far that is (`bases.drift`)."""
    drift = bases.drift(basis_v, new_v)
    basis_v.copy_(new_v)
    return drift


def _tell(stats: Tensor, *values: Tensor) -> None:
    stats[: len(values)] = torch.stack([value.to(stats.dtype) for value in values])


def linear_setup(ctx, inputs, output) -> None:
    x, weight, bias, data, scale, *ctx.rest = inputs
    # The other tensors are no saved ones: the backward pass changes them in place, and a layer
    # used twice in one pass changes them between its uses.
    ctx.save_for_backward(weight, *((x,) if data is None else (data, scale)))


def _grad_x_and_bias(ctx, grad: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_bias = _tokens(grad).sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, grad_bias


def _saved_input(a: Tensor, scale: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A (T, n): the layer's input, or what float8 has left of it."""
    return _tokens(dequantize_rows(a, scale[0], dtype) if scale else a)


def _operands(
    a: Tensor, a_scale: list[Tensor], grad: Tensor, fp8: bool
) -> tuple[Tensor, Tensor, Scales]:
    """A, B and the scales that they have with `fp8`: B in E5M2 rows beside the saved ones of A;
    both in bfloat16 where the forward pass had no float8."""
    if not fp8:
        return _saved_input(a, a_scale, grad.dtype), _tokens(grad), (None, None)
    if not a_scale:
        return _tokens(a).to(torch.bfloat16), _tokens(grad).to(torch.bfloat16), (None, None)
    b, b_scale = torch.ops.molegrad.quantize_rows(_tokens(grad), True)
    return _tokens(a), b, (a_scale[0].reshape(-1), b_scale)


def linear_dense_backward(ctx, grad: Tensor):
    weight, saved, *scale = ctx.saved_tensors  # read once: checkpointing recomputes them once
    *rest, fp8 = ctx.rest
    grad_x, grad_bias = _grad_x_and_bias(ctx, grad, weight)
    grad_weight = None
    if ctx.needs_input_grad[1]:
        a, b, scales = _operands(saved, scale, grad, fp8)
        grad_weight = dense_estimate(a, b, *rest, scales).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, *[None] * (len(ctx.rest) + 2)


def linear_factored_backward(ctx, grad: Tensor):
    weight, saved, *scale = ctx.saved_tensors  # read once: checkpointing recomputes them once
    basis_u, basis_v, stats, method, rank_k, power_iters, cond_max, fp8 = ctx.rest
    basis_u, basis_v = basis_u.detach(), basis_v.detach()
    grad_x, grad_bias = _grad_x_and_bias(ctx, grad, weight)
    grad_u = grad_v = None
    if ctx.needs_input_grad[5] or ctx.needs_input_grad[6]:
        a, b, scales = _operands(saved, scale, grad, fp8)
        if method == "tangent":
            grad_u, grad_v = torch.ops.molegrad.sketch(a, b, basis_u, basis_v, *scales)
        else:
            v, probes = basis_v[:, :rank_k], basis_v[:, rank_k:]
            grad_u, grad_v, norm_sq, status = torch.ops.molegrad.lowrank_grad(
                a, b, v, power_iters, probes if probes.shape[1] else None, cond_max, *scales
            )
            stats[STATS.index("gradient_norm_sq")].copy_(norm_sq)
            stats[STATS.index("orth_status")].copy_(status)
            pad = basis_v.shape[1] - rank_k
            grad_u = torch.nn.functional.pad(grad_u, (0, pad))
            grad_v = torch.nn.functional.pad(grad_v, (0, pad))
        grad_u, grad_v = grad_u.to(basis_u.dtype), grad_v.to(basis_v.dtype)
    return grad_x, None, grad_bias, None, None, grad_u, grad_v, *[None] * 6


def _target(weight: Tensor, momentum: Tensor | None, momentum_scale: Tensor | None) -> Tensor:
    """What an estimate is added to: the momentum itself, or zeros (m, n) for `_deliver`."""
    whole = momentum is None or momentum_scale is not None
    return torch.zeros_like(weight) if whole else momentum


def _deliver(
    target: Tensor, momentum: Tensor | None, momentum_scale: Tensor | None
) -> Tensor | None:
    """The weight's gradient where there is no momentum; an int8 momentum gets it added."""
    if momentum is None:
        return target
    if momentum_scale is not None:
        torch.ops.molegrad.add_quantized_(momentum, momentum_scale, target)
    return None


def linear_sampled_backward(ctx, grad: Tensor):
    """Adds the weight's gradient to `momentum` where there is one, else returns it."""
    weight, a, *scale = ctx.saved_tensors
    momentum, momentum_scale, counter, stats, share, block, seed = ctx.rest
    grad_x, grad_bias = _grad_x_and_bias(ctx, grad, weight)
    grad_weight = None
    if ctx.needs_input_grad[1]:
        target = _target(weight, momentum, momentum_scale)
        stats[_SAMPLED] = torch.ops.molegrad.sampled_grad_(
            target, a, grad, scale[0] if scale else None, counter, share, block, 1.0, seed
        )
        counter.add_(1)
        grad_weight = _deliver(target, momentum, momentum_scale)
    return grad_x, grad_weight, grad_bias, *[None] * 9


def _linear(x, weight, bias, *rest):
    # With a bias and more than two dimensions torch returns a view, which autograd would not let
    # anybody change in place.
    y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))


def momentum_of(op: str, weight, momentum, momentum_scale) -> None:
    """None, or one of the weight's shape; int8 with a scale."""
    if momentum is None:
        return
    if momentum_scale is None:
        checks.floating(op, weight=weight, momentum=momentum)
    checks.require(
        momentum.shape == weight.shape,
        op,
        f"expected momentum of the weight's shape {checks.text(weight)}, "
        f"got {checks.text(momentum)}",
    )


def linear(op: str, x, weight, bias, data, scale) -> None:
    checks.floating(op, x=x, weight=weight, bias=bias)
    checks.matrix(op, "weight", weight)
    m, n = weight.shape
    checks.require(
        x.dim() >= 1 and x.shape[-1] == n, op,
        f"expected x with {n} features in its last dimension, got x {checks.text(x)}",
    )  # fmt: skip
    checks.require(
        x.dtype == weight.dtype, op, f"expected x and weight of the same dtype, got {x.dtype} and "
        f"{weight.dtype}: convert one or use torch.autocast",
    )  # fmt: skip
    if bias is not None:
        checks.require(
            tuple(bias.shape) == (m,) and bias.dtype == weight.dtype, op,
            f"expected bias ({m},) of {weight.dtype}, got {checks.text(bias)} of {bias.dtype}",
        )  # fmt: skip
    checks.require(
        (data is None) == (scale is None), op, "expected both data and scale of float8, or none"
    )
    if data is not None:
        checks.require(
            data.shape == x.shape and scale.shape == x.shape[:-1], op,
            f"expected data {checks.text(x)} and scale without the last dimension, "
            f"got {checks.text(data)} and {checks.text(scale)}",
        )  # fmt: skip


def linear_bases(op: str, weight, basis_u, basis_v, rank_k) -> None:
    checks.floating(op, weight=weight, basis_u=basis_u, basis_v=basis_v)
    m, n = weight.shape
    checks.basis(op, "basis_u", basis_u, m)
    checks.basis(op, "basis_v", basis_v, n)
    checks.require(
        1 <= rank_k <= min(m, n, basis_v.shape[1]), op,
        f"rank k={rank_k} must lie between 1 and {min(m, n, basis_v.shape[1])}",
    )  # fmt: skip


def _check_dense(x, weight, bias, data, scale, basis_u, basis_v, *rest) -> None:
    linear("linear_dense", x, weight, bias, data, scale)
    linear_bases("linear_dense", weight, basis_u, basis_v, basis_v.shape[1])


def _check_factored(
    x, weight, bias, data, scale, basis_u, basis_v, stats, method, rank_k, *rest
) -> None:
    linear("linear_factored", x, weight, bias, data, scale)
    linear_bases("linear_factored", weight, basis_u, basis_v, rank_k)


def _check_sampled(
    x, weight, bias, data, scale, momentum, momentum_scale, counter, stats, fraction, block, seed
) -> None:
    name = "linear_sampled"
    linear(name, x, weight, bias, data, scale)
    momentum_of(name, weight, momentum, momentum_scale)
    checks.step_counter(name, counter)
    sample_of(name, fraction, block)


# data and scale are x in float8, to be kept for the backward pass in place of x, or None.
_LINEAR = "Tensor x, Tensor weight, Tensor? bias, Tensor? data, Tensor? scale, "

for _name, _schema, _check, _backward in (
    (
        "linear_dense",
        "Tensor basis_u, Tensor basis_v, Tensor counter, Tensor stats, str method, "
        "int power_iters, int probes, float trust_max, int explored, int seed, float cond_max, "
        "bool fp8=False",
        _check_dense,
        linear_dense_backward,
    ),
    (
        "linear_factored",
        "Tensor basis_u, Tensor basis_v, Tensor stats, str method, int rank_k, "
        "int power_iters, float cond_max, bool fp8=False",
        _check_factored,
        linear_factored_backward,
    ),
    (
        "linear_sampled",
        "Tensor? momentum, Tensor? momentum_scale, Tensor counter, Tensor stats, "
        "float fraction, int block, int seed",
        _check_sampled,
        linear_sampled_backward,
    ),
):
    op(
        _name,
        f"({_LINEAR} {_schema}) -> Tensor",
        _linear,
        check=_check,
        fake=lambda x, weight, bias, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
        backward=_backward,
        setup=linear_setup,
        cast=3,
        composed=True,
    )
