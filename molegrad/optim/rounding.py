"""Stochastic rounding of bfloat16 weights.

bfloat16 has 8 significant bits: rounded to the nearest number, a step smaller than 2⁻⁹ of a weight
changes nothing, however often it comes, and so does a small weight decay. Computed in float32 and
rounded to one of the two neighbours with probabilities that make the mean exact, nothing is lost on
average (Gupta et al. 2015, Deep Learning with Limited Numerical Precision).

Random numbers are a hash of seed, step and place (`molegrad.ops.random`): a resumed run and every
data-parallel process round alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molegrad.ops.random import random_bits
from molegrad.ops.update import ROW_CHUNK, round_randomly
from molegrad.optim.bucket import Bucket


def update_weights(bucket: Bucket, left: Tensor, right: Tensor, alpha: float, decay: float) -> None:
    """weight ← (1 − decay) weight + alpha left rightᵀ for every layer of a bucket, rounded as its
    group has it.

    Args:
        left: (size, m, j), right: (size, n, j).
    """
    group = bucket.group
    stochastic = group["stochastic_rounding"]
    counter = bucket.states_u[0]["step"] if stochastic else None
    seed = group["seed"] + 7919 * (bucket.first + 1) + 5  # the next after those of `bucket.turn`
    torch.ops.molegrad.lowrank_update_many_(
        bucket.weights, left, right, alpha, decay, stochastic, counter, seed
    )


def places_of(group: dict[str, Any]) -> dict[int, int]:
    """id(p) -> place of a group's parameters, by which each rounds with numbers of its own."""
    return {id(p): place for place, p in enumerate(group["params"])}


def add_rounded_(
    weight: Tensor, update: Tensor, alpha: float, decay: float, step: Tensor, place: int
) -> None:
    """weight ← (1 − decay) weight + alpha update in place, rounded at random.

    Args:
        weight: (m, n) bfloat16. update: (m, n), any floating dtype; the sum is made in float32, of
            some rows at a time.
        step: int64 scalar tensor on the weight's device. place: of the weight in its group.
    """
    first = 1
    for rows, part in zip(weight.split(ROW_CHUNK), update.split(ROW_CHUNK), strict=True):
        value = rows.float().mul_(1 - decay).add_(part.float(), alpha=alpha)
        _round(rows, value, first, step, place)
        first += rows.numel()


def copy_rounded_(weight: Tensor, value: Tensor, step: Tensor, place: int) -> None:
    """weight ← value (m, n) float32, rounded at random; the others as in `add_rounded_`."""
    first = 1
    for rows, part in zip(weight.split(ROW_CHUNK), value.split(ROW_CHUNK), strict=True):
        _round(rows, part, first, step, place)
        first += rows.numel()


def _round(rows: Tensor, value: Tensor, first: int, step: Tensor, place: int) -> None:
    index = torch.arange(first, first + rows.numel(), device=rows.device).view_as(value)
    rows.copy_(round_randomly(value, random_bits(index, step, 104_729 * (place + 1))))
