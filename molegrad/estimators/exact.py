"""The exact estimator: the gradient itself, G = BᵀA.

With gradient_mode "momentum" it is added straight to the momentum, which saves the gradient buffer
and leaves training as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from molegrad.estimators.full_rank import FullRank, MatrixSum
from molegrad.ops import checks
from molegrad.ops.linear import check_momentum, linear_op


class ExactSum(MatrixSum):
    def add_to(self, target, a, b, a_scale) -> None:
        torch.ops.molegrad.sampled_grad_(target, a, b, a_scale, self.counter, 1.0)


@dataclass(frozen=True)
class Exact(FullRank):
    """The gradient itself; it has no options."""

    METHODS = {"exact": {}}
    OP, ACCUMULATOR = "linear_exact", ExactSum

    def metrics(self, values: dict[str, float]) -> dict[str, float]:
        return {"sampled_share": 1.0, "sampling_noise": 0.0}


def _check(name: str, weight, momentum, momentum_scale, counter) -> None:
    check_momentum(name, weight, momentum, momentum_scale)
    checks.step_counter(name, counter)


linear_op(
    "linear_exact",
    "Tensor? momentum, Tensor? momentum_scale, Tensor counter",
    _check,
    ExactSum,
)
