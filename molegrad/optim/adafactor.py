"""Adafactor on gradients as matrices and as factors (Shazeer and Stern 2018, arXiv 1804.04235).

Its second moment is kept as the means of Ĝ² over rows and over columns, and both follow from
factors: for Ĝ = L C Rᵀ with orthonormal L and R, the sum of squares of a row of Ĝ is that of the
same row of L C, that of a column of Ĝ that of the same row of R Cᵀ. The update,

    diag(r)^-½ Ĝ diag(c)^-½ = (diag(r)^-½ L) (diag(c)^-½ R Cᵀ)ᵀ,

keeps Ĝ's rank, and its norm, by which it is clipped, comes from two Gram matrices. So groups of
kind "factors" do to rounding what those of kind "grad" do with Ĝ as a matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from molegrad.ops.checks import acc_dtype
from molegrad.optim.bucket import Bucket, all_finite, estimate, truncate, turn, two_sided
from molegrad.optim.factored import FactoredOptimizer
from molegrad.optim.rounding import add_rounded_, update_weights


class Adafactor(FactoredOptimizer):
    """Gradients divided by the root of a factored second moment; algorithm 4 of the paper.

    With t the step: r and c ← β r + (1 − β) mean(Ĝ² + ε₁) over columns and over rows, β = 1 − t^d;
    D = Ĝ / √(r cᵀ / mean(r)); weight ← (1 − lr · weight_decay) weight − α D / max(1, RMS(D)/clip).

    Args:
        params: matrices, or groups from `molegrad.optim.matrix_param_groups` (kind "grad" or
            "factors"); every option below can be set per group.
        lr: learning rate ρ, without a unit: α = min(lr, t^-½) max(ε₂, RMS(weight)), so that a step
            changes the weight by at most that share of its root mean square. Not `relative`: α = lr
            is the root mean square of a step itself. It means the same for both kinds of
            groups.
        relative: see `lr`.
        beta2_decay: d.
        eps: ε₁, added to the squares, and ε₂, the least RMS(weight) that counts.
        clip: largest root mean square of D.
        weight_decay: decoupled.
        truncation_iters: block iterations for the next bases, the leading modes of Ĝ.
        stochastic_rounding: round bfloat16 weights at random (`molegrad.optim.rounding`).

    State: m + n numbers of every matrix (and its bases in "factors" groups); no momentum. It does
    not depend on the rank, so that `resize_rank` leaves it as it is.

    Raises:
        ValueError: see `FactoredOptimizer`; or eps is not a pair of numbers above 0 and at least 0.
    """

    LIMITS = {
        "lr": (0.0, math.inf),
        "beta2_decay": (-math.inf, 0.0),
        "clip": (0.0, math.inf),
        "weight_decay": (0.0, math.inf),
    }

    def __init__(
        self,
        params,
        lr: float = 0.01,
        relative: bool = True,
        beta2_decay: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip: float = 1.0,
        weight_decay: float = 0.0,
        truncation_iters: int = 2,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "relative": relative,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "clip": clip,
            "weight_decay": weight_decay,
            "truncation_iters": truncation_iters,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if group["clip"] == 0:
            raise ValueError("Adafactor: clip must be above 0, got 0; inf clips nothing")
        eps = tuple(group["eps"])
        if len(eps) != 2 or eps[0] <= 0 or eps[1] < 0:
            raise ValueError(
                "Adafactor: eps must be two numbers, the first above 0, the second at least 0, "
                f"got {group['eps']}"
            )

    def _grad_step(self, group: dict[str, Any]) -> None:
        for p, state in self._with_grad(group):
            step = state["step"].add_(1)
            gradient = p.grad.to(acc_dtype(p.dtype))
            square = gradient.square()
            row, column = _averages(
                group, step, state["row"], square.mean(1), state["column"], square.mean(0)
            )
            state["row"].copy_(row)
            state["column"].copy_(column)
            row, column = _scales(row, column)
            update = gradient * row[:, None] * column
            rate = _rate(group, step, p) / _excess(group, update.square().sum(), p)
            decay = group["lr"] * group["weight_decay"]
            if group["stochastic_rounding"]:
                place = next(i for i, q in enumerate(group["params"]) if q is p)
                add_rounded_(p, update * rate, -1.0, decay, step, place)
                continue
            if decay:
                p.mul_(1 - decay)
            p.sub_((update * rate).to(p.dtype))

    def _new_grad_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        (m, n), dtype = p.shape, acc_dtype(p.dtype)
        return {
            "step": torch.zeros((), dtype=torch.int64, device=p.device),
            "row": p.new_zeros(m, dtype=dtype),
            "column": p.new_zeros(n, dtype=dtype),
        }

    def _factors_step(self, bucket: Bucket) -> None:
        group, (m, n) = bucket.group, bucket.shape
        est = estimate(bucket)
        right, v_c, core = two_sided(bucket, est)
        factor = right @ core.mT  # (size, n, j): Ĝ = left factorᵀ
        row, column = _averages(
            group,
            bucket.stacked("step")[:, None],
            bucket.stacked("row"),
            (est.left @ core).square().sum(-1) / n,
            bucket.stacked("column", "v"),
            factor.square().sum(-1) / m,
        )
        finite = all_finite(row) & all_finite(column)  # with them the core
        bucket.keep("row", row, finite)
        bucket.keep("column", column, finite, "v")
        row, column = _scales(row, column)
        left, factor = est.left * row[..., None], factor * column[..., None]
        norm_sq = ((left.mT @ left) * (factor.mT @ factor)).sum((-2, -1)).clamp_min(0)
        decay = group["lr"] * group["weight_decay"]
        rates = torch.stack(
            [
                _rate(group, bucket.states_u[i]["step"], weight)
                / _excess(group, norm_sq[i], weight)
                for i, weight in enumerate(bucket.weights)
            ]
        )
        factor = factor * rates[:, None, None]
        update_weights(bucket, left, factor, -1.0, decay)
        p, _, q, condition = truncate(core, v_c, group["truncation_iters"], group["cond_max"])
        turn(bucket, est, est.left @ p, right @ q, condition, finite)

    def _new_factors_state(self, basis_u: Tensor, basis_v: Tensor, k: int) -> tuple[dict, dict]:
        row, column = (basis.new_zeros(basis.shape[0]) for basis in (basis_u, basis_v))
        return {"row": row}, {"column": column}

    def _resized(self, state_u: dict, state_v: dict, k: int) -> None:
        pass  # rows and columns stay what they are


def _averages(group, step: Tensor, row: Tensor, new_row, column: Tensor, new_column):
    """Both averages after one step more; the weight of the new, t^d, is 1 at the first step."""
    eps, weight = group["eps"][0], step.to(row.dtype) ** group["beta2_decay"]
    return row.lerp(new_row + eps, weight), column.lerp(new_column + eps, weight)


def _scales(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Factors on the rows and on the columns of Ĝ: their product is 1 / √(r cᵀ / mean(r))."""
    return (row / row.mean(-1, keepdim=True)).rsqrt(), column.rsqrt()


def _rate(group, step: Tensor, weight: Tensor) -> Tensor | float:
    """α of the step `step` (scalar tensor)."""
    if not group["relative"]:
        return group["lr"]
    norm = torch.linalg.vector_norm(weight, dtype=acc_dtype(weight.dtype))
    rms = (norm / weight.numel() ** 0.5).clamp_min(group["eps"][1])
    return rms * step.to(rms.dtype).rsqrt().clamp_max(group["lr"])


def _excess(group, norm_sq: Tensor, weight: Tensor) -> Tensor:
    """How many times too large an update of squared norm `norm_sq` is, at least 1."""
    return ((norm_sq / weight.numel()).sqrt() / group["clip"]).clamp_min(1.0)
