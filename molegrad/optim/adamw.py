"""AdamW on gradients as matrices, and on factors in the subspace of the leading left modes.

Groups of kind "grad" are torch.optim.AdamW. In those of kind "factors" a layer's moments M and V
(n, k) are those of the gradient in its left basis, ĜᵀU. A step first turns the basis to U', then
goes in the new one, with R = UᵀU' (k, k):

    U'       the k leading left modes of β₁ U Mᵀ + (1 − β₁) Ĝ, which has rank 2k, in factors
    M'       β₁ M R + (1 − β₁) ĜᵀU'
    V'       β₂ carried(V) + (1 − β₂) (ĜᵀU')²
    weight   ← (1 − lr · weight_decay) weight − lr U' (M̂' / (√V̂' + ε))ᵀ

where M̂ and V̂ are corrected for their start at zero, as Adam's are. A first moment turns with the
basis as a matrix does; a second one does not, LDAdam (Robert et al., arXiv 2410.16103) carries it
over as a variance and a squared mean, see `carried_second_moment`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from molegrad.optim.bucket import Bucket, all_finite, estimate, truncate, turn
from molegrad.optim.factored import FactoredOptimizer
from molegrad.optim.rounding import copy_rounded_, places_of, update_weights


class AdamW(FactoredOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Args:
        params: matrices, or groups from `molegrad.optim.matrix_param_groups` (kind "grad" or
            "factors"); every option below can be set per group.
        lr: learning rate. In a "grad" group every number of the weight moves by about lr a step. In
            a "factors" one every number of the (n, k) update in the subspace does, and the weight
            moves by its product with the orthonormal U: by about lr √(k/m) in root mean square,
            lr (√n + √k) in spectral norm where a "grad" step of random signs has lr (√n + √m). So
            a "factors" group takes a larger lr, about twice the other's.
        betas: decay rates β₁, β₂ of the two moments.
        eps: ε, added to the root of the second moment; in units of the gradient.
        weight_decay: decoupled, weight ← (1 − lr · weight_decay) weight.
        truncation_iters: block iterations for the leading modes of the average.
        stochastic_rounding: round bfloat16 weights at random (`molegrad.optim.rounding`); in "grad"
            groups one weight at a time is stepped in float32, with moments in float32.

    State: "grad" groups two moments (m, n), "factors" ones two (n, k) with the layer's bases. A
    direction that exploration or `resize_rank` adds starts without a first moment, and with the
    second moment of the weakest direction, so that its first steps are not too large.

    Raises:
        ValueError: see `FactoredOptimizer`; or betas do not lie in [0, 1).
    """

    LIMITS = {"lr": (0.0, math.inf), "eps": (0.0, math.inf), "weight_decay": (0.0, math.inf)}

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        truncation_iters: int = 2,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "truncation_iters": truncation_iters,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        betas = tuple(group["betas"])
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: betas must be two numbers in [0, 1), got {group['betas']}")

    def _grad_step(self, group: dict[str, Any]) -> None:
        """All at once, or with stochastic rounding one weight at a time in float32."""
        pairs = list(self._with_grad(group))
        if not group["stochastic_rounding"]:
            self._adamw(group, [(p, p.grad, state) for p, state in pairs])
            return
        places = places_of(group)
        for p, state in pairs:
            wide = p.float()
            self._adamw(group, [(wide, p.grad.float(), state)])
            copy_rounded_(p, wide, state["step"], places[id(p)])

    def _adamw(self, group: dict[str, Any], triples: list[tuple[Tensor, Tensor, dict]]) -> None:
        """torch's step of (parameter, gradient, state)."""
        if not triples:
            return
        params, grads, states = zip(*triples, strict=True)
        beta1, beta2 = group["betas"]
        adamw(
            list(params),
            list(grads),
            *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")),
            [],
            [state["step"] for state in states],
            fused=all(p.device.type in ("cpu", "cuda") for p in params),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _new_grad_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        dtype = torch.float32 if group["stochastic_rounding"] else p.dtype
        first, second = (torch.zeros_like(p, dtype=dtype) for _ in range(2))
        return {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def _factors_step(self, bucket: Bucket) -> None:
        group, (beta1, beta2) = bucket.group, bucket.group["betas"]
        est = estimate(bucket)
        factor = est.sketch.matrix().mT  # (size, n, j): Ĝ = left factorᵀ
        first, second = bucket.stacked("exp_avg", "v"), bucket.stacked("exp_avg_sq", "v")
        step = bucket.stacked("step").to(factor.dtype)[:, None, None]

        average = beta1 * (first @ est.u_c.mT) + (1 - beta1) * factor  # (size, n, j)
        p, _, q, condition = truncate(
            average.mT, bucket.v, group["truncation_iters"], group["cond_max"]
        )
        rotation = est.u_c.mT @ p  # R = UᵀU' (size, k, k)
        second = carried_second_moment(first, second, rotation, step - 1, (beta1, beta2))
        first = average @ p
        second = beta2 * second + (1 - beta2) * (factor @ p).square()
        root = (second / (1 - beta2**step)).sqrt() + group["eps"]
        update = first / (1 - beta1**step) / root  # (size, n, k)

        new_u = est.left @ p
        decay = group["lr"] * group["weight_decay"]
        update_weights(bucket, new_u, update, -group["lr"], decay)
        finite = all_finite(average) & all_finite(second)
        bucket.keep("exp_avg", first * bucket.kept_columns(first), finite, "v")
        bucket.keep("exp_avg_sq", second, finite, "v")
        turn(bucket, est, new_u, q, condition, finite)

    def _new_factors_state(self, basis_u: Tensor, basis_v: Tensor, k: int) -> tuple[dict, dict]:
        rows = basis_v.shape[0]
        names = ("exp_avg", "exp_avg_sq")
        return {}, {name: basis_v.new_zeros(rows, k) for name in names}

    def _resized(self, state_u: dict, state_v: dict, k: int) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            old = state_v[name]
            added = max(0, k - old.shape[1])
            weakest = old[:, -1:] if name == "exp_avg_sq" else torch.zeros_like(old[:, -1:])
            state_v[name] = torch.cat([old[:, :k], weakest.expand(-1, added)], dim=1)


def carried_second_moment(
    first: Tensor, second: Tensor, rotation: Tensor, step: Tensor, betas: tuple[float, float]
) -> Tensor:
    """The second moment in a new basis: (1 − β₂ᵗ) |(V̂ − M̂²) R² + (M̂ R)²|, squares elementwise.

    The rotation mixes means linearly and variances, taken as uncorrelated, by its squares. R = I
    changes nothing.

    Args:
        first, second: moments M, V (…, n, k) in the old basis, after `step` steps.
        rotation: R = UᵀU' (…, k, k), from the old basis to the new one.
        step: t (…, 1, 1); at 0, where there are no moments yet, the result is zero.

    Source: LDAdam's projection-aware update, Robert et al. (arXiv 2410.16103), section 3.
    """
    one, two = (1 - beta**step for beta in betas)
    mean = first / torch.where(step > 0, one, 1.0)
    variance = second / torch.where(step > 0, two, 1.0) - mean.square()
    return two * (variance @ rotation.square() + (mean @ rotation).square()).abs()
