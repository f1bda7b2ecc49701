"""Low-rank updates of weights in place, one or many, rounded to nearest or at random."""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.ops import checks
from molegrad.ops.checks import acc_dtype
from molegrad.ops.random import random_bits
from molegrad.ops.registry import call, op

# Rows of a weight that are computed at once, so that what is needed beside it stays small.
ROW_CHUNK = 1024


def lowrank_update_reference(
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


def lowrank_update_many_reference(
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
            rows.copy_(round_randomly(value, random_bits(index, counter.to(rows.device), seed)))
            first += rows.numel()


def round_randomly(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to one of the two neighbours in bfloat16, with 24 random bits for each element.

    What bfloat16 drops of x, as a share of the distance between the two, is the probability of the
    one that is farther from zero: adding 16 random bits to them carries into it that often.
    """
    mantissa = x.view(torch.int32) + (bits >> 8).to(torch.int32)
    rounded = (mantissa & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _check_one(weight, u, w, alpha=-1.0, decay=0.0) -> None:
    name = "lowrank_update_"
    checks.floating(name, weight=weight, u=u, w=w)
    checks.matrix(name, "weight", weight)
    checks.in_place(name, "weight", weight)
    checks.basis(name, "u", u, weight.shape[0])
    checks.basis(name, "w", w, weight.shape[1])
    checks.one_rank(name, u, w)


def _check_many(
    weights, u, w, alpha=-1.0, decay=0.0, stochastic=False, counter=None, seed=0
) -> None:
    name = "lowrank_update_many_"
    checks.require(len(weights) >= 1, name, "expected at least one weight, got none")
    first = weights[0]
    checks.floating(name, weights=first, u=u, w=w)
    checks.matrix(name, "weights[0]", first)
    for i, weight in enumerate(weights):
        checks.require(
            weight.shape == first.shape
            and weight.dtype == first.dtype
            and weight.device == first.device,
            name,
            "expected weights of one shape, dtype and device, got "
            f"{checks.text(first)} of {first.dtype} on {first.device} and, at {i}, "
            f"{checks.text(weight)} of {weight.dtype} on {weight.device}",
        )
        checks.in_place(name, f"weights[{i}]", weight)
    for label, x, rows in (("u", u, first.shape[0]), ("w", w, first.shape[1])):
        checks.require(
            x.dim() == 3 and x.shape[:2] == (len(weights), rows) and x.shape[2] >= 1, name,
            f"expected {label} ({len(weights)}, {rows}, k), got {checks.text(x)}",
        )  # fmt: skip
    checks.one_rank(name, u, w)
    if stochastic:
        checks.require(
            first.dtype == torch.bfloat16, name,
            f"stochastic rounding is for weights of torch.bfloat16, got {first.dtype}",
        )  # fmt: skip
        checks.require(counter is not None, name, "stochastic rounding needs a counter, got none")
        checks.step_counter(name, counter)


op(
    "lowrank_update_",
    "(Tensor(a!) weight, Tensor u, Tensor w, float alpha=-1.0, float decay=0.0) -> ()",
    lowrank_update_reference,
    check=_check_one,
)
op(
    "lowrank_update_many_",
    "(Tensor(a!)[] weights, Tensor u, Tensor w, float alpha=-1.0, float decay=0.0, "
    "bool stochastic=False, Tensor? counter=None, int seed=0) -> ()",
    lowrank_update_many_reference,
    check=_check_many,
)


@torch.no_grad()
def lowrank_update_(
    weight: Tensor, u: Tensor, w: Tensor, alpha: float = -1.0, decay: float = 0.0
) -> None:
    """weight ← (1 − decay) weight + alpha U Wᵀ in place, without an (m, n) temporary.

    Args:
        weight: (m, n), any floating dtype. u: (m, k). w: (n, k).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or the weight is expanded.
    """
    call("lowrank_update_", weight, u, w, alpha, decay)


@torch.no_grad()
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
    call("lowrank_update_many_", weights, u, w, alpha, decay, stochastic, counter, seed)
