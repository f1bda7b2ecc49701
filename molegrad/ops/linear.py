"""The product of a converted layer, y = x Wᵀ + bias, as one op an estimator.

All of them compute the plain linear layer. They differ in what the backward pass makes of the
weight gradient: `linear_op` registers an op whose backward pass gives A and B to an accumulator, an
object with two methods:

- `add(a, b, a_scale)`: A (T, n), the layer's input or its float8 rows with their scales (T,), and
  B (T, m), the gradient of its output.
- `finish()`: the gradient of the weight, and those of the op's own leading arguments; None where
  there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from molegrad.ops import checks
from molegrad.ops.registry import op

# data and scale: x in float8 rows, kept for the backward pass in place of x, or None.
_SHARED = "Tensor x, Tensor weight, Tensor? bias, Tensor? data, Tensor? scale"


class Accumulator(Protocol):
    def add(self, a: Tensor, b: Tensor, a_scale: Tensor | None = None) -> None: ...

    def finish(self) -> tuple[Tensor | None, ...]: ...


def linear_op(
    name: str, schema: str, check: Callable[..., None], accumulator: Callable[..., Accumulator]
) -> Callable[..., Tensor]:
    """Register `torch.ops.molegrad.<name>(x, weight, bias, data, scale, <schema>)` and return it.

    Args:
        schema: the op's own arguments, after the shared ones.
        check: `check(name, weight, *own)` raises RuntimeError where these do not fit.
        accumulator: `accumulator(weight, *own)`, made in the backward pass.
    """

    def check_all(x, weight, bias, data, scale, *own):
        check_linear(name, x, weight, bias, data, scale)
        check(name, weight, *own)

    def backward(ctx, grad: Tensor):
        weight, saved, *scale = ctx.saved_tensors  # once: checkpointing computes them once
        grad_x, grad_bias = gradients_of_input_and_bias(ctx, grad, weight)
        gradients: tuple[Tensor | None, ...] = (None,)
        if ctx.needs_input_grad[1] or any(ctx.needs_input_grad[5:]):
            sums = accumulator(weight, *ctx.own)
            a_scale = scale[0].reshape(-1) if scale else None
            sums.add(checks.flat(saved), checks.flat(grad), a_scale)
            gradients = sums.finish()
        grad_weight, *own = gradients
        rest = [None] * (len(ctx.own) - len(own))
        return grad_x, grad_weight, grad_bias, None, None, *own, *rest

    op(
        name,
        f"({_SHARED}, {schema}) -> Tensor",
        linear,
        check=check_all,
        fake=lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
        backward=backward,
        setup=setup,
        cast=3,
        composed=True,
    )
    return getattr(torch.ops.molegrad, name)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor:
    """x (…, n) Wᵀ + bias, (…, m)."""
    # With a bias and more than two dimensions torch returns a view, which autograd would not let
    # anybody change in place.
    y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))


def setup(ctx, inputs, output) -> None:
    x, weight, _, data, scale, *ctx.own = inputs
    # An op's own tensors are not saved: the backward pass changes them in place, and a layer used
    # twice in one pass changes them between its uses.
    ctx.save_for_backward(weight, *((x,) if data is None else (data, scale)))


def gradients_of_input_and_bias(
    ctx, grad: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """B W and the sum of B over tokens, where they are needed."""
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_bias = checks.flat(grad).sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, grad_bias


def check_linear(name: str, x, weight, bias, data, scale) -> None:
    """The shared arguments: x (…, n), weight (m, n), bias (m,), data as x, scale without n."""
    require, shape = checks.require, checks.text
    checks.floating(name, x=x, weight=weight, bias=bias)
    checks.matrix(name, "weight", weight)
    m, n = weight.shape
    require(
        x.dim() >= 1 and x.shape[-1] == n, name,
        f"expected x with {n} features in its last dimension, got x {shape(x)}",
    )  # fmt: skip
    require(
        x.dtype == weight.dtype, name, f"expected x and weight of the same dtype, got {x.dtype} "
        f"and {weight.dtype}: convert one or use torch.autocast",
    )  # fmt: skip
    if bias is not None:
        require(
            tuple(bias.shape) == (m,) and bias.dtype == weight.dtype, name,
            f"expected bias ({m},) of {weight.dtype}, got {shape(bias)} of {bias.dtype}",
        )  # fmt: skip
    require(
        (data is None) == (scale is None), name, "expected both data and scale of float8, or none"
    )
    if data is not None:
        require(
            data.shape == x.shape and scale.shape == x.shape[:-1], name,
            f"expected data {shape(x)} and scale without the last dimension, "
            f"got {shape(data)} and {shape(scale)}",
        )  # fmt: skip


def check_momentum(name: str, weight, momentum, momentum_scale) -> None:
    """None, or a momentum of the weight's shape; int8 with a scale."""
    if momentum is None:
        return
    if momentum_scale is None:
        checks.floating(name, weight=weight, momentum=momentum)
    checks.require(
        momentum.shape == weight.shape, name, "expected momentum of the weight's shape "
        f"{checks.text(weight)}, got {checks.text(momentum)}",
    )  # fmt: skip
