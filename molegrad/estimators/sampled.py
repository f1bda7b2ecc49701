"""The sampled estimator: column-row sampling of the products that the gradient is a sum of.

Sources: Drineas, Kannan, Mahoney (2006); for training, Adelman et al. (2021) and WTA-CRS, Liu et
al. (2023). The formula stands in `molegrad.ops.sampled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molegrad import targets
from molegrad.estimators.base import State
from molegrad.estimators.full_rank import FullRank, MatrixSum
from molegrad.ops import checks
from molegrad.ops.linear import check_momentum, linear_op
from molegrad.ops.sampled import sample_of
from molegrad.options import option


class SampledSum(MatrixSum):
    """Draws a sample of each chunk; its statistics are the chunks' mean by tokens."""

    def __init__(
        self, weight, momentum, momentum_scale, counter, stats, fraction, block, seed
    ) -> None:
        super().__init__(weight, momentum, momentum_scale, counter)
        self.stats, self.options = stats, (fraction, block, 1.0, seed)
        self.seen: Tensor | None = None  # statistics times tokens
        self.tokens = 0

    def add_to(self, target, a, b, a_scale) -> None:
        seen = torch.ops.molegrad.sampled_grad_(target, a, b, a_scale, self.counter, *self.options)
        self.counter.add_(1)
        seen = seen * a.shape[0] if self.several else seen
        self.seen = seen if self.seen is None else self.seen + seen
        self.tokens += a.shape[0] if self.several else 1

    def finish(self) -> tuple[Tensor | None]:
        if self.seen is not None and self.tokens:
            self.stats.copy_(self.seen / self.tokens if self.several else self.seen)
        return super().finish()


@dataclass(frozen=True)
class Sampled(FullRank):
    """Options of the sampled estimator.

    Raises:
        ValueError: a field is out of range; the message names field, value and remedy.
        TypeError: a field has the wrong type.
    """

    METHODS = {"sampled": {}}
    STATS = ("sampled_share", "sampling_noise")
    OP, ACCUMULATOR = "linear_sampled", SampledSum

    sampling_fraction: float = option(
        0.25,
        "sampling fraction: the share of the dense product that is computed; 1 computes all of it "
        "and samples nothing",
    )
    sampling_overrides: str | tuple[str, ...] = option(
        (),
        "sampling fractions of single layers, as PATTERN=FRACTION (comma separated), e.g. "
        "'attention=0.5'; patterns as in rank_overrides, sampling_fraction is for the rest",
    )
    sampling_block: int = option(
        2,
        "neighbouring features of the wider operand that are taken together; small blocks have "
        "less variance, large ones suit wider arithmetic units",
    )

    def __post_init__(self) -> None:
        _check_fraction("sampling_fraction", self.sampling_fraction)
        entries = targets.normalized_overrides(
            "sampling_overrides", self.sampling_overrides, _check_fraction
        )
        object.__setattr__(self, "sampling_overrides", entries)
        self._require_int("sampling_block", 1, 4096)

    def fraction_of(self, name: str = "") -> float:
        """`sampling_fraction`, or the first of `sampling_overrides` that matches the layer."""
        override = targets.override_of(name, self.sampling_overrides)
        if override is None:
            return float(self.sampling_fraction)
        return float(targets.split_override(override)[1])

    def overrides(self) -> tuple[str, ...]:
        return self.sampling_overrides

    def describe(self, m: int, n: int, name: str = "") -> str:
        source = targets.override_of(name, self.sampling_overrides)
        default = f"sampling_fraction={self.sampling_fraction!r}"
        return f"sampling fraction {self.fraction_of(name):g} ({source or default})"

    def cost(self, m: int, n: int, name: str = "", rank: int | None = None) -> float:
        return 2.0 * m * n * self.fraction_of(name)

    def setting(self, name: str) -> float:
        return self.fraction_of(name)

    def remedy(self, kind: str, state: State) -> str:
        if kind != "degenerate":
            return ""
        return (
            f"raise --streaming_sampling_fraction (here {state.setting:g}), for this layer alone "
            "with --streaming_sampling_overrides"
        )

    def arguments(self, state: State) -> tuple:
        own = (state.tensors["stats"], state.setting, self.sampling_block, state.seed)
        return (*super().arguments(state), *own)


def _check_fraction(name: str, fraction: Any) -> None:
    """A number above 0 and up to 1."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"{name} must be a number, got {fraction!r}")
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            f"{name} must be above 0 and at most 1 (0.25 takes a quarter of the products), "
            f"got {fraction!r}"
        )


def _check(name: str, weight, momentum, momentum_scale, counter, stats, fraction, block, seed):
    check_momentum(name, weight, momentum, momentum_scale)
    checks.step_counter(name, counter)
    sample_of(name, fraction, block)


linear_op(
    "linear_sampled",
    "Tensor? momentum, Tensor? momentum_scale, Tensor counter, Tensor stats, float fraction, "
    "int block, int seed",
    _check,
    SampledSum,
)
