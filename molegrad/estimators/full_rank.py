"""What `Exact` and `Sampled` share: estimates whose mean is the gradient itself, added to
`weight.grad` or straight into the momentum, so that no gradient exists at any time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molegrad.estimators.base import Estimator, State


@dataclass(frozen=True)
class FullRank(Estimator):
    """The base class of both; their accumulators are `MatrixSum`s."""

    MODES = ("grad", "momentum")

    @property
    def unbiased(self) -> bool:
        return True

    def new_tensors(self, weight: Tensor, mode: str, name: str) -> dict[str, Tensor]:
        tensors = {"counter": torch.zeros((), dtype=torch.int64, device=weight.device)}
        if self.STATS:
            unknown = torch.full((len(self.STATS),), float("nan"), device=weight.device)
            tensors["stats"] = unknown
        return tensors

    def dtypes(self, weight: Tensor) -> dict[str, torch.dtype]:
        return {"stats": torch.float32}

    def reset(self, state: State, draw: int = 0) -> None:
        state.tensors["counter"].zero_()

    def arguments(self, state: State) -> tuple:
        t = state.tensors
        return t.get("momentum"), t.get("momentum_scale"), t["counter"]

    def accumulator(self, state: State) -> MatrixSum:
        sums = super().accumulator(state)
        sums.several = True
        return sums


class MatrixSum:
    """Accumulator of a sum (m, n); a subclass says how the part of some tokens is added.

    The sum goes to the momentum where there is one, and the weight then has no gradient. Of
    `several` chunks a momentum in 16 bits gets the sum at the end, so that it is rounded once; an
    int8 momentum always does.
    """

    several = False

    def __init__(self, weight, momentum, momentum_scale, counter) -> None:
        self.weight, self.counter = weight, counter
        self.momentum = None if momentum is None else momentum.detach()
        self.momentum_scale = momentum_scale
        self.target: Tensor | None = None

    def add_to(self, target: Tensor, a: Tensor, b: Tensor, a_scale: Tensor | None) -> None:
        """target (m, n) += the part of these tokens."""
        raise NotImplementedError

    def add(self, a: Tensor, b: Tensor, a_scale: Tensor | None = None) -> None:
        if self.target is None:
            self.target = self.momentum if self._directly() else self._zeros()
        self.add_to(self.target, a, b, a_scale)

    def finish(self) -> tuple[Tensor | None]:
        if self.momentum is None:
            return (self.target,)
        if self.target is not None and self.target is not self.momentum:
            if self.momentum_scale is None:
                self.momentum.add_(self.target)
            else:
                torch.ops.molegrad.add_quantized_(self.momentum, self.momentum_scale, self.target)
        return (None,)

    def _directly(self) -> bool:
        if self.momentum is None or self.momentum_scale is not None:
            return False
        return not self.several or self.momentum.dtype.itemsize >= 4

    def _zeros(self) -> Tensor:
        floating = self.momentum is not None and self.momentum_scale is None
        return torch.zeros_like(self.momentum if floating else self.weight.detach())
