"""Muon on dense and on factored gradients, as one torch.optim.Optimizer.

Dense groups: momentum, Newton–Schulz, weight −= lr · scale · polar(momentum) (Jordan et al. 2024).

Factored groups (`molegrad.optim.factored`) never see a matrix of the weight's size except the
weight. A layer's momentum is kept as U S Vᵀ, whose bases U and V *are* the layer's sketch bases. In
the orthonormal bases L = [U, Y⊥] and R = [V, W⊥] both gradient and momentum are small cores of at
most 2k × 2k, where the momentum's average, its polar factor (exact) and its truncation to rank k
all take place (the update of MoFaSGD, Mahdavi et al. 2025, with a block iteration in place of its
SVD, which would make the host wait for the device).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from molegrad.optim.factored import (
    Bucket,
    FactoredOptimizer,
    all_finite,
    estimate,
    resized_core,
    truncate,
    turn,
    two_sided,
    without_explored,
)
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


class Muon(FactoredOptimizer):
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
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            buffer = state["momentum_buffer"].lerp_(p.grad, 1 - mu)
            update = p.grad.lerp(buffer, mu) if group["nesterov"] else buffer
            by_shape[(p.shape, p.dtype, p.device)].append((p, update))
        for (shape, _, _), pairs in by_shape.items():
            lr = group["lr"] * lr_scale(group["adjust_lr"], *shape)
            directions = newton_schulz(torch.stack([u for _, u in pairs]), group["ns_steps"])
            for (p, _), direction in zip(pairs, directions.unbind(), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.to(p.dtype), alpha=-lr)

    def _factored_step(self, bucket: Bucket) -> None:
        group, (m, n) = bucket.group, bucket.shape
        mu, lr = group["momentum"], group["lr"]
        est = estimate(bucket)
        right, v_c, gradient_c = two_sided(bucket, est)
        momentum_c = est.u_c @ bucket.stacked("core") @ v_c.mT
        average = mu * momentum_c + (1 - mu) * gradient_c  # (size, ≤2k, ≤2k)
        direction = mu * average + (1 - mu) * gradient_c if group["nesterov"] else average
        update = est.left @ polar(direction)  # (size, m, ≤2k): the update is update · rightᵀ
        scale = -lr * lr_scale(group["adjust_lr"], m, n)
        for i, weight in enumerate(bucket.weights):
            torch.ops.molegrad.lowrank_update_(
                weight, update[i], right[i], scale, lr * group["weight_decay"]
            )
        p, core, q, condition = truncate(average, v_c, group["truncation_iters"], group["cond_max"])
        finite = all_finite(average)
        bucket.keep("core", without_explored(core, bucket), finite)
        turn(bucket, est, est.left @ p, right @ q, condition, finite)

    def _new_state(self, basis_u: Tensor, basis_v: Tensor, k: int) -> tuple[dict, dict]:
        return {"core": basis_u.new_zeros(k, k)}, {}

    def _resized(self, state_u: dict, state_v: dict, k: int) -> None:
        state_u["core"] = resized_core(state_u["core"], k)


def polar(core: Tensor) -> Tensor:
    """Polar factor of small cores (…, j, i), exact."""
    if core.shape[-2] >= core.shape[-1]:
        return torch.ops.molegrad.polar_factor(core)
    return torch.ops.molegrad.polar_factor(core.mT).mT
