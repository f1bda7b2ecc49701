"""SGD with momentum on dense and on factored gradients.

Dense groups are torch.optim.SGD, with decoupled weight decay. Factored groups keep the momentum
U S Vᵀ (`molegrad.optim.momentum`): M ← μ M + Ĝ of rank up to 2k gives the update and is then
truncated to its leading k modes. As long as the momentum has no more modes than that, the two do
the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from molegrad.optim.momentum import FactoredMomentum


class SGD(FactoredMomentum):
    """Stochastic gradient descent: weight ← (1 − lr · weight_decay) weight − lr · direction.

    Args:
        params: matrices, or groups from `molegrad.optim.matrix_param_groups` (kind "dense" or
            "factored"); every option below can be set per group.
        lr: learning rate, in units of weight per gradient, the same for dense and factored groups:
            it has to follow the scale of the loss and, with momentum, of 1 − μ.
        momentum: μ of M ← μ M + Ĝ (torch.optim.SGD's convention, without dampening: a steady
            gradient makes steps of lr / (1 − μ)).
        nesterov: go along Ĝ + μ M instead of M.
        weight_decay: decoupled (torch's is an L2 term in the gradient, which a low-rank gradient
            has no room for).
        truncation_iters: block iterations that truncate the factored momentum to rank k.
        stochastic_rounding: round bfloat16 weights at random (`molegrad.optim.rounding`); in dense
            groups one weight at a time is stepped in float32, with a momentum in float32.

    State: dense groups a momentum (m, n), where momentum is not 0; factored ones a core S (k, k)
    with the layer's bases. A direction that `resize_rank` adds starts without momentum.

    Raises:
        ValueError: see `FactoredOptimizer`.
    """

    def __init__(
        self,
        params,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        truncation_iters: int = 2,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "truncation_iters": truncation_iters,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _dense_step(self, group: dict[str, Any]) -> None:
        self._step_rounded(group, self._sgd, count=True)

    def _sgd(self, group: dict[str, Any], triples: list[tuple[Tensor, Tensor, dict]]) -> None:
        """torch's step of (parameter, gradient, state)."""
        params, grads, states = zip(*triples, strict=True)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        sgd(
            list(params),
            list(grads),
            [state.get("momentum_buffer") for state in states],
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )

    def _new_dense_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        dtype = torch.float32 if group["stochastic_rounding"] else p.dtype
        return {"momentum_buffer": torch.zeros_like(p, dtype=dtype)} if group["momentum"] else {}

    def _average(self, group: dict[str, Any], momentum: Tensor, gradient: Tensor):
        mu = group["momentum"]
        average = mu * momentum + gradient
        return average, gradient + mu * average if group["nesterov"] else average

    def _update(self, group: dict[str, Any], direction: Tensor, m: int, n: int):
        return direction, -group["lr"]
