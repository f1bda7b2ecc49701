"""Muon on dense and on factored gradients, as one torch.optim.Optimizer.

Dense groups: momentum, Newton–Schulz, weight −= lr · scale · polar(momentum) (Jordan et al. 2024).

Factored groups never see a matrix of the weight's size except the weight: the momentum is kept in
factored form (`molegrad.optim.momentum`), and its polar factor is taken exactly, on a core of at
most 2k × 2k.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from molegrad.optim.momentum import FactoredMomentum
from molegrad.optim.newton_schulz import newton_schulz

ADJUST_LR = ("spectral", "original", "match_rms_adamw", "none")


def lr_scale(adjust_lr: str, m: int, n: int) -> float:
    """Factor on the learning rate of an (m, n) weight.

    "spectral" √(m/n) (Yang, Simon, Bernstein 2023), "original" √max(1, m/n) (Jordan et al.),
    "match_rms_adamw" 0.2 √max(m, n) (Liu et al. 2025), "none" 1.
    """
    return {
        "spectral": math.sqrt(m / n),
        "original": math.sqrt(max(1.0, m / n)),
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "none": 1.0,
    }[adjust_lr]


class Muon(FactoredMomentum):
    """Momentum, orthogonalised.

    Args:
        params: matrices, or groups from `molegrad.optim.matrix_param_groups` (kind "dense" or
            "factored"); every option below can be set per group.
        lr: learning rate, before `adjust_lr`.
        momentum: μ of the average M ← μ M + (1 − μ) Ĝ.
        nesterov: orthogonalise μ M + (1 − μ) Ĝ instead of M.
        weight_decay: decoupled, weight ← (1 − lr · weight_decay) weight.
        adjust_lr: "spectral", "original", "match_rms_adamw" or "none", see `lr_scale`.
        ns_steps: Newton–Schulz steps of the dense groups.
        truncation_iters: block iterations that truncate the factored momentum to rank k.

    State: dense groups a momentum (m, n); factored ones a core S (k, k) with the layer's bases. A
    direction that `resize_rank` adds starts without momentum.

    Raises:
        ValueError: see `FactoredOptimizer`; or adjust_lr is unknown.
    """

    LIMITS = {"lr": (0.0, math.inf), "momentum": (0.0, 1.0), "weight_decay": (0.0, math.inf)}

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adjust_lr: str = "spectral",
        ns_steps: int = 5,
        truncation_iters: int = 2,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr": adjust_lr,
            "ns_steps": ns_steps,
            "truncation_iters": truncation_iters,
        }
        super().__init__(params, defaults)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if group["adjust_lr"] not in ADJUST_LR:
            raise ValueError(
                f"Muon: adjust_lr must be one of {', '.join(ADJUST_LR)}; got {group['adjust_lr']!r}"
            )

    def _dense_step(self, group: dict[str, Any]) -> None:
        mu = group["momentum"]
        by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, state in self._dense(group):
            buffer = state["momentum_buffer"].lerp_(p.grad, 1 - mu)
            update = p.grad.lerp(buffer, mu) if group["nesterov"] else buffer
            by_shape[(p.shape, p.dtype, p.device)].append((p, update))
        for (shape, _, _), pairs in by_shape.items():
            lr = group["lr"] * lr_scale(group["adjust_lr"], *shape)
            directions = newton_schulz(torch.stack([u for _, u in pairs]), group["ns_steps"])
            for (p, _), direction in zip(pairs, directions.unbind(), strict=True):
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.to(p.dtype), alpha=-lr)

    def _new_dense_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)}

    def _average(self, group: dict[str, Any], momentum: Tensor, gradient: Tensor):
        mu = group["momentum"]
        average = mu * momentum + (1 - mu) * gradient
        return average, mu * average + (1 - mu) * gradient if group["nesterov"] else average

    def _update(self, group: dict[str, Any], direction: Tensor, m: int, n: int):
        return polar(direction), -group["lr"] * lr_scale(group["adjust_lr"], m, n)


def polar(core: Tensor) -> Tensor:
    """Polar factor of small cores (…, j, i), exact."""
    if core.shape[-2] >= core.shape[-1]:
        return torch.ops.molegrad.polar_factor(core)
    return torch.ops.molegrad.polar_factor(core.mT).mT
