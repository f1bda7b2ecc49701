"""Options of the low-rank estimator, and the ranks that they give to layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from molegrad import targets
from molegrad.options import Options, option

DEFAULT_RANK = 32


def rank_unit(m: int, n: int) -> int:
    """Ranks that are chosen for an (m, n) layer are multiples of this: 8, the width of the
    kernels' vectors, or 1 for a layer with a side below 64."""
    return 8 if min(m, n) >= 64 else 1


@dataclass(frozen=True)
class LowRankOptions(Options):
    """See `molegrad.estimators.lowrank`.

    Raises:
        ValueError: a field is out of range; the message names field, value and remedy.
        TypeError: a field has the wrong type.
    """

    rank_k: int | float | None = option(
        None,
        "rank k of the kept gradient modes of each layer: an integer, or a fraction between 0 and "
        "1, a share of the layer's smaller side (to the nearest multiple of 8; of 1 where that "
        "side is below 64); None is 32 or a quarter of the smaller side, whichever is less",
    )
    rank_overrides: str | tuple[str, ...] = option(
        (),
        "ranks of single layers, as PATTERN=RANK (comma separated), e.g. "
        "'attention=16,c_proj=0.25'; PATTERN is a role (ffn, attention), the end of a layer's "
        "name, a parent's name or a regular expression; the first match wins, rank_k is for the "
        "rest",
    )
    method: Literal["power", "tangent"] = option(
        "power",
        "'power' (rank k, two dependent passes, for a single micro-batch) or 'tangent' (rank 2k, "
        "one pass, linear in the gradient, hence exact under accumulation and data parallelism)",
    )
    power_iters: int = option(
        1,
        "block power iterations of method 'power'; 1 costs two products with A and two with B, "
        "0 projects on the warm-started right basis in a single pass",
    )
    warm_start_decay: float = option(
        0.95,
        "share of a basis kept from one step to the next; the ceil((1 - decay) * k) weakest "
        "directions are replaced by seeded random ones (exploration); 1 keeps all, 0 none",
    )
    trust_scaling: bool = option(
        False,
        "scale the estimate so that its norm matches the Hutch++ estimate of the true "
        "gradient's norm (needs probes >= 1)",
    )
    trust_max: float = option(3.0, "upper limit of the trust factor; its lower limit is 1")
    probes: int = option(
        0,
        "random probe columns in the sketch for the free estimate of the gradient's norm "
        "(energy_capture, trust factor); 0 switches both off",
    )
    cond_max: float = option(
        1e3,
        "orthogonalisation threshold: largest condition number (of the column-normalised block) "
        "for which CholeskyQR is used; beyond it the Householder fallback takes over",
    )
    min_layer_utilization: float = option(
        0.5,
        "a layer is converted only if the factors save at least this share of the dense "
        "gradient's numbers: 1 - k (m + n) / (m n)",
    )
    products: Literal["full", "fp8"] = option(
        "full",
        "what the estimate's products read: 'full' or 'fp8', inputs in E4M3 (implies "
        "saved_inputs='fp8') and output gradients in E5M2, rows with a scale each, sums in "
        "float32; where a device has no float8 it is bfloat16, with a warning",
    )
    group_mib: int = option(
        0,
        "gradient_mode 'factors' with method 'tangent': gather the sketches of layers until their "
        "inputs and output gradients held for it reach this many MiB, then compute all at once; "
        "0: each layer's at once. Fewer launches for more memory",
    )
    energy_target: float = option(
        0.0,
        "wanted share ||estimate|| / ||gradient|| of each layer (energy_capture, between 0 and 1), "
        "which adaptive ranks follow (needs probes >= 1); 0 keeps the ranks fixed",
    )
    rank_interval: int = option(50, "adaptive rank: steps between two decisions")
    rank_min: int = option(8, "adaptive rank: least rank of a layer")
    rank_max: int = option(
        0,
        "adaptive rank: largest rank of a layer; 0 leaves it to method, width and "
        "min_layer_utilization",
    )
    rank_budget: float = option(
        1.0,
        "adaptive rank: limit of all factors' numbers, sum of k (m + n), as a multiple of what "
        "they are at the start; 0 is no limit",
    )
    rank_hysteresis: float = option(
        0.05, "adaptive rank: relative distance from energy_target that changes no rank"
    )

    def __post_init__(self) -> None:
        if self.rank_k is not None:
            _check_rank("rank_k", self.rank_k)
        entries = targets.normalized_overrides("rank_overrides", self.rank_overrides, _check_rank)
        object.__setattr__(self, "rank_overrides", entries)
        self._require_choice("method", ("power", "tangent"))
        self._require_choice("products", ("full", "fp8"))
        self._require_bool("trust_scaling")
        for name, low, high in (
            ("power_iters", 0, 1000), ("probes", 0, 4096), ("group_mib", 0, 2**20),
            ("rank_interval", 1, 2**31), ("rank_min", 1, 2**31), ("rank_max", 0, 2**31),
        ):  # fmt: skip
            self._require_int(name, low, high)
        for name, low, high in (
            ("warm_start_decay", 0.0, 1.0), ("min_layer_utilization", 0.0, 1.0),
            ("cond_max", 1.0, 1e7), ("trust_max", 1.0, math.inf), ("rank_budget", 0.0, 1e6),
            ("rank_hysteresis", 0.0, 1.0), ("energy_target", 0.0, 1.0),
        ):  # fmt: skip
            self._require_number(name, low, high)
        if self.energy_target == 1.0:
            raise ValueError("energy_target must be below 1: only a dense gradient captures all")
        for name in ("trust_scaling", "energy_target"):
            if getattr(self, name) and self.probes < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs the norm estimate: set probes to 1 or "
                    f"more (4 is a good choice), got probes={self.probes}"
                )
        if 0 < self.rank_max < self.rank_min:
            raise ValueError(
                f"rank_max={self.rank_max} is below rank_min={self.rank_min}: lower rank_min or "
                "raise rank_max (0 is no limit)"
            )
        if self.method == "tangent" and self.power_iters != 1:
            raise ValueError(
                f"power_iters={self.power_iters} is for method='power'; 'tangent' makes one linear "
                "pass: leave it at 1 or choose method='power'"
            )
        if self.group_mib and (self.method != "tangent" or self.products == "fp8"):
            raise ValueError(
                f"group_mib={self.group_mib} needs method='tangent', whose sketches are plain "
                f"sums, and products='full', got method={self.method!r} and "
                f"products={self.products!r}: leave it at 0"
            )

    @property
    def one_sided(self) -> bool:
        """Whether the estimate is U Wᵀ alone, of rank k."""
        return self.method == "power"

    def rank_of(self, m: int, n: int, name: str = "") -> int:
        override = targets.override_of(name, self.rank_overrides)
        rank = self.rank_k if override is None else targets.split_override(override)[1]
        if rank is None:
            return max(1, min(DEFAULT_RANK, min(m, n) // 4))
        if isinstance(rank, int):
            return rank
        unit = rank_unit(m, n)
        return unit * max(1, math.floor(rank * min(m, n) / unit + 0.5))

    def overrides(self) -> tuple[str, ...]:
        return self.rank_overrides

    def describe(self, m: int, n: int, name: str = "") -> str:
        source = targets.override_of(name, self.rank_overrides)
        default = "default" if self.rank_k is None else f"rank_k={self.rank_k!r}"
        return f"rank {self.rank_of(m, n, name)} ({source or default})"

    def refusal(self, m: int, n: int, name: str = "") -> str | None:
        k = self.rank_of(m, n, name)
        if self.estimate_rank(k) > min(m, n):
            return (
                f"too small for {self.describe(m, n, name)} with method={self.method!r}, which "
                f"needs {self.estimate_rank(k)} features on both sides: lower rank_k"
            )
        saved = 1 - k * (m + n) / (m * n)
        if saved < self.min_layer_utilization:
            return (
                f"{self.describe(m, n, name)} saves {saved:.0%} of the dense gradient, less than "
                f"min_layer_utilization={self.min_layer_utilization:.0%}"
            )
        return None

    def rank_limits(self, m: int, n: int) -> tuple[int, int, int]:
        """Adaptive rank: the least and the largest rank of an (m, n) layer, and the unit whose
        multiples are chosen."""
        unit = rank_unit(m, n)
        saved = (1 - self.min_layer_utilization) * m * n / (m + n)
        upper = min(min(m, n) // self.estimate_rank(1), max(int(saved), 1))
        upper = min(upper, self.rank_max or upper)
        upper = upper // unit * unit or upper
        return min(-(-self.rank_min // unit) * unit, upper), upper, unit

    def estimate_rank(self, rank: int) -> int:
        return rank if self.one_sided else 2 * rank

    def cost(self, m: int, n: int, name: str = "", rank: int | None = None) -> float:
        """4k(m + n) a pass for Bᵀ(AV) and Aᵀ(BU), half of it for power_iters=0, and 2r(m + n) for
        r probes."""
        k = self.rank_of(m, n, name) if rank is None else rank
        passes = max(self.power_iters, 0.5) if self.one_sided else 1.0
        return (4 * k * passes + 2 * self.probes) * (m + n)


def _check_rank(name: str, rank: Any) -> None:
    """An integer >= 1, or a fraction strictly between 0 and 1."""
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"{name} must be an integer or a fraction, got {rank!r}")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{name} must be at least 1, got {rank}")
    if isinstance(rank, float) and not 0.0 < rank < 1.0:
        raise ValueError(
            f"{name} must be an integer, or a fraction between 0 and 1 (a share of the layer's "
            f"smaller side), got {rank!r}"
        )
