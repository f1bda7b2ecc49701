"""The rules of the health checks: when a reading of a layer is bad, why, and what helps.

`RULES[kind](layer, values, history, thresholds)`, on numbers that the host has, is a `Problem`, or
None where the reading is well or does not say. What is done about it is a matter of
`molegrad.monitor.health`; what a user may change, the estimator says (`Estimator.remedy`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from molegrad.linear import MoleLinear
from molegrad.ops.orth import NON_FINITE, RANK_DEFICIENT

LEAST_READINGS = 5  # before a median means anything
NORMS = ("gradient_norm", "estimate_norm", "momentum_norm")
_PARTS = {
    "basis_nonfinite": "a basis",
    "state_nonfinite": "its momentum or the optimizer's state",
    "weight_nonfinite": "its weight",
}
_LIMITS = {  # least and largest value of each threshold
    "patience": (1, math.inf),
    "window": (LEAST_READINGS, math.inf),
    "explode_factor": (1, math.inf),
    "min_energy": (0, 1),
    "max_condition": (1, math.inf),
    "max_sampling_noise": (0, math.inf),
    "frozen_drift": (0, 1),
    "max_orthogonality_error": (0, math.inf),
}


def _threshold(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class HealthThresholds:
    """From where on a reading is bad. The defaults lie far from what healthy small runs showed.

    Those (width 64, rank 8, every mode, Muon and AdamW) had norms of up to 14 times their median,
    condition numbers up to 1e4, energy_capture down to 0.48, and without exploration a drift down
    to 7e-4 at a step.

    Raises:
        ValueError: a value is out of range.
    """

    patience: int = _threshold(
        3, "bad readings in a row after which a layer counts as degenerate or frozen"
    )
    window: int = _threshold(32, "readings whose median a norm is compared with")
    explode_factor: float = _threshold(
        100.0, "the norm of gradient, estimate or momentum explodes above this times its median"
    )
    min_energy: float = _threshold(
        0.05, "energy_capture below which a subspace is degenerate: it holds next to nothing"
    )
    max_condition: float = _threshold(
        1e6,
        "condition number of the kept modes above which a subspace is degenerate; float32 tells "
        "modes apart up to about 2e6",
    )
    max_sampling_noise: float = _threshold(
        10.0,
        "sampling_noise above which a sampled gradient is degenerate: 10 is the noise of the exact "
        "gradient of a batch 11 times smaller",
    )
    frozen_drift: float = _threshold(
        1e-5,
        "subspace_drift below which a subspace is frozen; where exploration replaces directions, "
        "half of the drift that this alone makes, if that is more",
    )
    max_orthogonality_error: float = _threshold(
        1e-3, "orthogonality_error above which a basis has lost its orthogonality"
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, (low, high) = getattr(self, each.name), _LIMITS[each.name]
            if isinstance(each.default, int) and type(value) is not int:
                raise ValueError(f"{each.name} must be an integer, got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{each.name} must lie between {low:g} and {high:g}, got {value}")


@dataclass
class History:
    """What earlier readings of a layer say."""

    norms: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # bad readings in a row, by kind
    since: dict[str, int] = field(default_factory=dict)  # step of the first finding, until it ends
    nonzero: bool = False  # whether there has been a gradient

    def note(self, values: Mapping[str, float], window: int) -> None:
        """Add a reading's norms; those of an explosion are no measure of what is usual."""
        self.nonzero = self.nonzero or strength(values) > 0
        if "exploding" in self.counts:
            return
        for key in NORMS:
            if 0 < values.get(key, math.nan) < math.inf:
                self.norms[key] = [*self.norms.get(key, []), values[key]][-window:]


@dataclass(frozen=True)
class Problem:
    """A bad reading: its numbers, what it is and what helps, in words."""

    values: dict[str, float]
    what: str
    remedy: str
    instead_of_reset: str | None = None  # the action, where a reset is no help


def strength(values: Mapping[str, float]) -> float:
    """The norm of the gradient as far as it is known: nan where nothing says."""
    known = (values.get(key, math.nan) for key in NORMS)
    return next((value for value in known if not math.isnan(value)), math.nan)


def nan(layer: MoleLinear, values, history, limits) -> Problem | None:
    """Numbers that are not finite. A metric that is nan is one that is not known."""
    found = {key: values[key] for key in _PARTS if values.get(key, 0.0) > 0}
    found |= {key: values[key] for key in NORMS if math.isinf(values.get(key, 0.0))}
    if values.get("orth_status", 0.0) >= NON_FINITE:
        found["orth_status"] = values["orth_status"]
    if not found:
        return None
    where = [_PARTS.get(key, f"{key}={value:g}") for key, value in found.items()]
    what = f"NaN or Inf in {', '.join(where)}"
    if "weight_nonfinite" in found:
        remedy = f"go on from the last checkpoint (--resume), {_smaller_steps(layer)}"
        return Problem(found, f"{what}; no reset mends a weight", remedy, "raise")
    remedy = f"{_smaller_steps(layer)}, or go on from the last checkpoint (--resume)"
    return Problem(found, what, remedy)


def exploding(layer: MoleLinear, values, history: History, limits) -> Problem | None:
    """A norm far above the median of the readings before."""
    for key in NORMS:
        value, past = values.get(key, math.nan), history.norms.get(key, [])
        if len(past) < LEAST_READINGS:
            continue
        median = statistics.median(past)
        if value > limits.explode_factor * median:
            return Problem(
                {key: value, "median": median},
                f"{key} {value:.3g} is {value / median:.3g} times its median of the last "
                f"{len(past)} readings, {median:.3g} (limit: {limits.explode_factor:g} times)",
                f"{_smaller_steps(layer)}, or go on from an earlier checkpoint "
                "(--resume-from-step)",
            )
    return None


def degenerate(layer: MoleLinear, values, history: History, limits) -> Problem | None:
    """Directions that no gradient stands behind. No gradient at all is a fault only where there has
    been one: behind a projection that starts at zero there is none at first."""
    norm, unbiased = strength(values), layer.config.estimator.unbiased
    nothing = values.get("sampled_share", math.nan) == 0 if unbiased else norm == 0
    if nothing and (history.nonzero or norm > 0):
        key = "sampled_share" if unbiased else "estimate_norm"
        return Problem(
            {key: 0.0, "last_norm": next((n[-1] for n in history.norms.values()), math.nan)},
            f"its gradient is zero ({key} 0) and has not always been",
            f"look for a layer that no input reaches any more, {_smaller_steps(layer)}, or go on "
            "from an earlier checkpoint (--resume-from-step)",
            instead_of_reset="warn" if unbiased else None,
        )
    if nothing:
        return None
    status, condition, energy, noise = (
        values.get(key, math.nan)
        for key in ("orth_status", "condition_number", "energy_capture", "sampling_noise")
    )
    if noise > limits.max_sampling_noise:
        share = values.get("sampled_share", math.nan)
        return Problem(
            {"sampling_noise": noise, "sampled_share": share},
            f"sampling adds {noise:.3g} times the noise that the batch has (sampling_noise, limit "
            f"{limits.max_sampling_noise:g}; share {share:.3g})",
            _remedy(layer, "degenerate"),
            instead_of_reset="warn",
        )
    if status == RANK_DEFICIENT or condition > limits.max_condition:
        return Problem(
            {"orth_status": status, "condition_number": condition, "gradient_norm": norm},
            f"the gradient has fewer directions than the basis, which keeps {layer.rank} "
            f"(orth_status {status:g}, condition number {condition:.3g}, limit "
            f"{limits.max_condition:g})",
            _remedy(layer, "degenerate"),
        )
    if energy < limits.min_energy:
        return Problem(
            {"energy_capture": energy, "gradient_norm": norm},
            f"its {layer.rank} directions hold a share of {energy:.3g} of the gradient's norm "
            f"{norm:.3g} (limit {limits.min_energy:g})",
            _remedy(layer, "low energy"),
        )
    return None


def frozen(layer: MoleLinear, values, history, limits) -> Problem | None:
    """A subspace that stays where it is.

    Exploration replaces e of k directions at every step, random ones that lie in the old subspace
    by k/n in the mean, so that the drift is about (e/k)(1 − k/n) where nothing else moves. Less
    than half of that means that not even exploration reaches the basis. A subspace that is all of
    space cannot turn.
    """
    k, n, drift = layer.rank, layer.in_features, values.get("subspace_drift", math.nan)
    if k in (0, n) or strength(values) == 0:
        return None
    explored = layer.config.estimator.explored(layer.state)
    limit = max(limits.frozen_drift, explored / k * (1 - k / n) / 2)
    if not drift < limit:
        return None
    return Problem(
        {"subspace_drift": drift, "limit": limit},
        f"its subspace turns by {drift:.3g} at a step (limit {limit:.3g}; {explored} of {k} "
        "directions are explored)",
        _remedy(layer, "frozen"),
    )


def orthogonality(layer: MoleLinear, values, history, limits) -> Problem | None:
    """A basis whose columns are not orthonormal."""
    error = values.get("orthogonality_error", math.nan)
    if layer.rank == 0 or not error > limits.max_orthogonality_error:
        return None
    return Problem(
        {"orthogonality_error": error},
        f"its basis has an orthogonality error of {error:.3g} (limit "
        f"{limits.max_orthogonality_error:g})",
        _remedy(layer, "orthogonality"),
    )


RULES = {
    "nan": nan,
    "exploding": exploding,
    "degenerate": degenerate,
    "frozen": frozen,
    "orthogonality": orthogonality,
}


def _remedy(layer: MoleLinear, kind: str) -> str:
    """The estimator's, or where it has none, smaller steps."""
    return layer.config.estimator.remedy(kind, layer.state) or _smaller_steps(layer)


def _smaller_steps(layer: MoleLinear) -> str:
    """With gradient_mode "momentum" there is no gradient to clip."""
    clip = "" if layer.config.gradient_mode == "momentum" else " and set --grad-clip=1"
    return f"lower --matrix-lr{clip}"
