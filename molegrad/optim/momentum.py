"""Momentum in factored form, for the optimizers that keep one (`Muon`, `SGD`).

A layer's momentum is U S Vᵀ with a core S (k, k), and its bases U and V *are* the layer's sketch
bases, so that one state serves both. In the orthonormal bases L = [U, Y⊥] and R = [V, W⊥] both
gradient and momentum are small cores of at most 2k × 2k, where their average, whatever the
optimizer makes of it, and its truncation to rank k all take place (the update of MoFaSGD, Mahdavi
et al. 2025, with a block iteration in place of its SVD, which would make the host wait for the
device).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from molegrad.optim.bucket import Bucket, all_finite, estimate, truncate, turn, two_sided
from molegrad.optim.factored import FactoredOptimizer
from molegrad.optim.rounding import update_weights


class FactoredMomentum(FactoredOptimizer):
    """Base class: groups have "lr", "momentum", "weight_decay", "truncation_iters"; a layer has a
    "core"."""

    LIMITS = {"lr": (0.0, math.inf), "momentum": (0.0, 1.0), "weight_decay": (0.0, math.inf)}

    def _average(self, group: dict[str, Any], momentum: Tensor, gradient: Tensor):
        """New momentum, and the direction to go; all four are stacked cores (size, j, i)."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], direction: Tensor, m: int, n: int):
        """Core C (size, j, i) and number α of the step weight ← weight + α L C Rᵀ."""
        raise NotImplementedError

    def _factored_step(self, bucket: Bucket) -> None:
        group = bucket.group
        est = estimate(bucket)
        right, v_c, gradient = two_sided(bucket, est)
        momentum = est.u_c @ bucket.stacked("core") @ v_c.mT
        average, direction = self._average(group, momentum, gradient)
        core, alpha = self._update(group, direction, *bucket.shape)
        update = est.left @ core  # (size, m, i)
        decay = group["lr"] * group["weight_decay"]
        update_weights(bucket, update, right, alpha, decay)
        p, kept, q, condition = truncate(average, v_c, group["truncation_iters"], group["cond_max"])
        finite = all_finite(average)
        bucket.keep("core", without_explored(kept, bucket), finite)
        turn(bucket, est, est.left @ p, right @ q, condition, finite)

    def _new_state(self, basis_u: Tensor, basis_v: Tensor, k: int) -> tuple[dict, dict]:
        return {"core": basis_u.new_zeros(k, k)}, {}

    def _resized(self, state_u: dict, state_v: dict, k: int) -> None:
        old = state_u["core"]
        kept = min(k, old.shape[0])
        state_u["core"] = old.new_zeros(k, k)
        state_u["core"][:kept, :kept] = old[:kept, :kept]


def without_explored(core: Tensor, bucket: Bucket) -> Tensor:
    """A core (size, k, k) without the modes that `turn` replaces by random ones."""
    kept = bucket.kept_columns(core)
    return core * kept * kept[:, None]
