"""MoleGradConfig: every choice that an estimated gradient leaves to the user, validated once.

A frozen dataclass, so that a run's configuration cannot drift while it runs and can be written
into its checkpoint as it stands (`dataclasses.asdict`). Each field carries its help text in
`metadata["help"]`; the command line flags `--streaming_<field>` are generated from these fields.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from molegrad.names import layer_role, matches
from molegrad.overrides import (
    check_rank,
    check_share,
    normalized_overrides,
    normalized_targets,
    split_override,
)

Method = Literal["power", "tangent", "sampled", "projected"]
GradientMode = Literal["dense", "factored", "momentum"]
SavedInputs = Literal["full", "fp8"]
Products = Literal["full", "fp8"]
MomentumDtype = Literal["float32", "bfloat16", "int8"]

METHODS = ("power", "tangent", "sampled", "projected")
# Unbiased, of full rank, and so what a momentum can be built from as it arises.
UNBIASED = ("sampled", "projected")
GRADIENT_MODES = ("dense", "factored", "momentum")
SAVED_INPUTS = ("full", "fp8")
PRODUCTS = ("full", "fp8")
MOMENTUM_DTYPES = ("float32", "bfloat16", "int8")


# Named configurations: which suits which batch, memory and patience stands in docs/quality.md.
_IN_MOMENTUM = {
    "method": "sampled",
    "gradient_mode": "momentum",
    "target_layers": "all",
    "saved_inputs": "fp8",
    "momentum_dtype": "bfloat16",
}
_BALANCED = {**_IN_MOMENTUM, "sample_share": 0.25, "sample_overrides": ("attention=1",)}
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {**_IN_MOMENTUM, "sample_share": 1.0},
    "balanced": _BALANCED,
    "minimal": {**_BALANCED, "momentum_dtype": "int8"},
}
DEFAULT_RANK = 32
DEFAULT_STRIDE = 8


def explored_directions(k: int, decay: float) -> int:
    """How many of k basis directions exploration replaces at every step: ⌈(1 − decay) k⌉ ≤ k."""
    return min(k, math.ceil((1.0 - decay) * k - 1e-9))


def rank_unit(m: int, n: int) -> int:
    """Ranks that are chosen for an (m, n) layer are multiples of this: 8, the width of the
    kernels' vectors, or 1 for a layer with a side below 64."""
    return 8 if min(m, n) >= 64 else 1


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MoleGradConfig:
    """How the weight gradients of a model's large linear layers are estimated.

    Raises:
        ValueError: a field is out of range; the message names field, value and remedy.
        TypeError: a field has the wrong type.
    """

    rank_k: int | float | None = _field(
        None,
        "rank k of the kept gradient modes of each layer: an integer, or a fraction between 0 and "
        "1, a share of the layer's smaller side (to the nearest multiple of 8; of 1 where that "
        "side is below 64); None is 32 where the method has a rank",
    )
    rank_overrides: str | tuple[str, ...] = _field(
        (),
        "ranks of single layers, as PATTERN=RANK (comma separated), e.g. "
        "'attention=16,c_proj=0.25'; PATTERN is a role (ffn, attention), the end of a layer's "
        "name, a parent's name or a regular expression; the first match wins, rank_k is for the "
        "rest",
    )
    power_iters: int = _field(
        1,
        "block power iterations of method 'power'; 1 costs two products with A and two with B, "
        "0 projects on the warm-started right basis in a single pass",
    )
    method: Method | None = _field(
        None,
        "estimator: 'sampled' (unbiased, of full rank, from a share of the products that the "
        "gradient is a sum of), 'tangent' (rank 2k, one pass, linear in the gradient, hence exact "
        "under accumulation and data parallelism), 'power' (rank k, two dependent passes, for a "
        "single micro-batch) or 'projected' (unbiased, of full rank; keeps a projection of the "
        "layer's input and a few of its rows in place of it); None is 'tangent' where a rank, "
        "probes or gradient_mode='factored' are asked for, else 'sampled'",
    )
    sample_share: float = _field(
        0.25,
        "method 'sampled': share of the dense product that is computed; 1 computes all of it and "
        "samples nothing",
    )
    sample_overrides: str | tuple[str, ...] = _field(
        (),
        "method 'sampled': shares of single layers, as PATTERN=SHARE (comma separated), e.g. "
        "'attention=0.5'; patterns as in rank_overrides, sample_share is for the rest",
    )
    sample_block: int = _field(
        2,
        "method 'sampled': neighbouring features of the wider operand that are taken together; "
        "small blocks have less variance, large ones suit wider arithmetic units",
    )
    project_stride: int = _field(
        DEFAULT_STRIDE,
        "method 'projected': one row of the layer's input out of every so many tokens is kept, "
        "beside its projection on rank_k directions: k/n + 1/project_stride of the input in all; "
        "1 keeps all rows and is exact",
    )
    saved_inputs: SavedInputs = _field(
        "full",
        "what a layer keeps of its input for the backward pass: 'full', or 'fp8', float8 rows with "
        "a scale each (method 'projected': of the rows that it keeps)",
    )
    products: Products = _field(
        "full",
        "methods 'power' and 'tangent': what their products read, 'full' or 'fp8', inputs in E4M3 "
        "(implies saved_inputs='fp8') and output gradients in E5M2, rows with a scale each, sums "
        "in float32; where a device has no float8 it is bfloat16, with a warning",
    )
    target_layers: str | tuple[str, ...] = _field(
        "ffn_only",
        "layers to convert: 'ffn_only', 'attention_only', 'all' (every linear layer but the output "
        "head), or module names, name suffixes or regular expressions (comma separated), as "
        "PEFT's target_modules takes them",
    )
    warm_start_decay: float = _field(
        0.95,
        "share of a basis kept from one step to the next; the ceil((1 - decay) * k) weakest "
        "directions are replaced by seeded random ones (exploration); 1 keeps all, 0 none",
    )
    trust_scaling: bool = _field(
        False,
        "scale the estimate so that its norm matches the Hutch++ estimate of the true "
        "gradient's norm (needs probes >= 1)",
    )
    trust_max: float = _field(3.0, "upper limit of the trust factor; its lower limit is 1")
    probes: int = _field(
        0,
        "random probe columns in the sketch for the free estimate of the gradient's norm "
        "(energy_capture, trust factor); 0 switches both off",
    )
    cond_max: float = _field(
        1e3,
        "orthogonalisation threshold: largest condition number (of the column-normalised block) "
        "for which CholeskyQR is used; beyond it the Householder fallback takes over",
    )
    min_layer_utilization: float = _field(
        0.5,
        "a layer is converted only if the factors save at least this share of the dense "
        "gradient's numbers: 1 - k (m + n) / (m n); with method 'projected' of its input's: "
        "1 - k/n - 1/project_stride",
    )
    gradient_mode: GradientMode = _field(
        "dense",
        "'dense' writes the estimate to weight.grad (any optimizer works); 'momentum' adds it "
        "straight to Muon's momentum, so that no gradient exists (methods 'sampled' and "
        "'projected'); 'factored' keeps sketches as gradients of two small parameters (methods "
        "'tangent' and 'power') and needs an optimizer of molegrad.optim",
    )
    momentum_dtype: MomentumDtype = _field(
        "float32",
        "gradient_mode 'momentum': dtype of the momentum; int8 has a scale for each feature of the "
        "wider side",
    )
    group_mib: int = _field(
        0,
        "factored mode with method 'tangent': gather the sketches of layers until their inputs and "
        "output gradients held for it reach this many MiB, then compute all at once; 0: each "
        "layer's at once. Fewer launches for more memory",
    )
    energy_target: float = _field(
        0.0,
        "wanted share ||estimate|| / ||gradient|| of each layer (energy_capture, between 0 and 1), "
        "which adaptive ranks follow (needs probes >= 1); 0 keeps the ranks fixed",
    )
    rank_interval: int = _field(50, "adaptive rank: steps between two decisions")
    rank_min: int = _field(8, "adaptive rank: least rank of a layer")
    rank_max: int = _field(
        0,
        "adaptive rank: largest rank of a layer; 0 leaves it to method, width and "
        "min_layer_utilization",
    )
    rank_budget: float = _field(
        1.0,
        "adaptive rank: limit of all factors' numbers, sum of k (m + n), as a multiple of what "
        "they are at the start; 0 is no limit",
    )
    rank_hysteresis: float = _field(
        0.05, "adaptive rank: relative distance from energy_target that changes no rank"
    )
    seed: int = _field(0, "seed of the initial bases, the exploration and the probes")

    def __post_init__(self) -> None:
        self._choose_method()
        if self.rank_k is not None:
            check_rank("rank_k", self.rank_k)
        self._require_int("power_iters", minimum=0)
        self._require_int("probes", minimum=0)
        self._require_int("seed", minimum=0)
        self._require_choice("method", METHODS)
        self._require_choice("gradient_mode", GRADIENT_MODES)
        self._require_number("warm_start_decay", 0.0, 1.0)
        self._require_number("min_layer_utilization", 0.0, 1.0)
        self._require_number("cond_max", 1.0, 1e7)
        self._require_number("trust_max", 1.0, math.inf)
        if not isinstance(self.trust_scaling, bool):
            raise TypeError(f"trust_scaling must be True or False, got {self.trust_scaling!r}")
        if self.trust_scaling and self.probes < 1:
            raise ValueError(
                "trust_scaling=True needs the norm estimate: set probes to 1 or more (4 is a good "
                f"choice), got probes={self.probes}"
            )
        self._check_adaptive_rank()
        self._check_products()
        self._check_sampling()
        self._check_projection()
        self._require_int("group_mib", minimum=0)
        if self.group_mib and (self.gradient_mode, self.method) != ("factored", "tangent"):
            raise ValueError(
                f"group_mib={self.group_mib} needs gradient_mode='factored' and method='tangent', "
                f"whose sketches are plain sums, got gradient_mode={self.gradient_mode!r} and "
                f"method={self.method!r}: leave it at 0"
            )
        if self.group_mib and self.products == "fp8":
            raise ValueError(
                f"group_mib={self.group_mib} is not for products='fp8', which each layer computes "
                "at once: leave it at 0, or products at 'full'"
            )
        object.__setattr__(self, "target_layers", normalized_targets(self.target_layers))
        for name, check in (("rank_overrides", check_rank), ("sample_overrides", check_share)):
            entries = normalized_overrides(name, getattr(self, name), check)
            object.__setattr__(self, name, entries)
        if self.method != "power" and self.power_iters != 1:
            raise ValueError(
                f"power_iters={self.power_iters} has no meaning for method={self.method!r}, which "
                "makes one linear pass: leave it at 1 or choose method='power'"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MoleGradConfig:
        """One of `PRESETS`, with the fields in `changes` replaced.

        Raises:
            ValueError: there is no preset of that name.
        """
        return cls(**{**preset_fields(name), **changes})

    def needed_features(self, k: int) -> int:
        """Least number of features on either side of a layer of rank k: the tangent estimate has
        rank 2k."""
        return k * (2 if self.method == "tangent" else 1)

    def rank_of(self, m: int, n: int, name: str = "") -> int:
        """The rank k of an (m, n) layer: `rank_k`, or the first of `rank_overrides` that matches
        the layer's dotted name; 0 for method "sampled", which has none."""
        if self.method == "sampled":
            return 0
        _, rank = split_override(self.rank_source(name))
        if isinstance(rank, int):
            return rank
        unit = rank_unit(m, n)
        return unit * max(1, math.floor(rank * min(m, n) / unit + 0.5))

    def saved_share(self, m: int, n: int, name: str = "") -> float:
        """What an (m, n) layer saves: of its input's numbers with method "projected", else of the
        dense gradient's; negative where it takes more."""
        k = self.rank_of(m, n, name)
        if self.method == "projected":
            return 1 - k / n - 1 / self.project_stride
        return 1 - k * (m + n) / (m * n)

    def rank_source(self, name: str = "") -> str:
        """The setting that `rank_of` goes by (`share_of` for method "sampled"), such as "rank_k=32"
        or the override "c_proj=0.25"."""
        sampled = self.method == "sampled"
        for override in self.sample_overrides if sampled else self.rank_overrides:
            pattern, _ = split_override(override)
            if pattern == layer_role(name) or matches(pattern, name):
                return override
        return f"sample_share={self.sample_share!r}" if sampled else f"rank_k={self.rank_k!r}"

    def share_of(self, name: str = "") -> float:
        """The share of the products that a layer takes with method "sampled": `sample_share`, or
        the first of `sample_overrides` that matches the layer's dotted name."""
        return float(split_override(self.rank_source(name))[1])

    def _choose_method(self) -> None:
        ranked = self.rank_k is not None or bool(self.rank_overrides) or self.probes != 0
        if self.method is None:
            low_rank = ranked or self.gradient_mode == "factored" or self.power_iters != 1
            object.__setattr__(self, "method", "tangent" if low_rank else "sampled")
        if self.method == "sampled" and (self.rank_k is not None or self.rank_overrides):
            name = "rank_overrides" if self.rank_k is None else "rank_k"
            raise ValueError(
                f"{name}={getattr(self, name)!r} has no meaning for method='sampled', whose "
                "estimate has full rank: choose method='tangent', or set sample_share"
            )
        if self.method != "sampled" and self.rank_k is None:
            object.__setattr__(self, "rank_k", DEFAULT_RANK)

    def _check_products(self) -> None:
        self._require_choice("saved_inputs", SAVED_INPUTS)
        self._require_choice("products", PRODUCTS)
        if self.products == "fp8" and self.method in UNBIASED:
            raise ValueError(
                f"products='fp8' has no meaning for method={self.method!r}, which reads the output "
                "gradients as they are: choose method='power' or 'tangent', or saved_inputs='fp8'"
            )
        if self.products == "fp8":
            object.__setattr__(self, "saved_inputs", "fp8")

    def _check_sampling(self) -> None:
        self._require_choice("momentum_dtype", MOMENTUM_DTYPES)
        self._require_int("sample_block", minimum=1)
        check_share("sample_share", self.sample_share)
        sampled = self.method == "sampled"
        if self.sample_overrides and not sampled:
            raise ValueError(
                f"sample_overrides={self.sample_overrides!r} has no meaning for "
                f"method={self.method!r}: choose method='sampled', or rank_overrides"
            )
        unbiased = self.method in UNBIASED
        if unbiased and self.gradient_mode == "factored":
            raise ValueError(
                f"method={self.method!r} has no factors for gradient_mode='factored': choose "
                "gradient_mode='momentum' or 'dense', or method='tangent'"
            )
        if not unbiased and self.gradient_mode == "momentum":
            raise ValueError(
                "gradient_mode='momentum' needs method='sampled' or 'projected', got "
                f"{self.method!r}: a method of low rank keeps less in gradient_mode='factored'"
            )
        for name in ("probes", "energy_target", "trust_scaling"):
            if unbiased and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for method={self.method!r}, "
                    "whose estimate has full rank and no bias: leave it at its default"
                )

    def _check_projection(self) -> None:
        self._require_int("project_stride", minimum=1)
        projected = self.method == "projected"
        if not projected and self.project_stride != DEFAULT_STRIDE:
            raise ValueError(
                f"project_stride={self.project_stride} has no meaning for method={self.method!r}: "
                f"leave it at {DEFAULT_STRIDE} or choose method='projected'"
            )
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("sample_share", "sample_block"):
            if projected and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for method='projected', which "
                    f"takes whole tokens: leave it at {defaults[name]} and set project_stride"
                )

    def _check_adaptive_rank(self) -> None:
        self._require_int("rank_interval", minimum=1)
        self._require_int("rank_min", minimum=1)
        self._require_int("rank_max", minimum=0)
        self._require_number("rank_budget", 0.0, 1e6)
        self._require_number("rank_hysteresis", 0.0, 1.0)
        self._require_number("energy_target", 0.0, 1.0)
        if self.energy_target == 1.0:
            raise ValueError("energy_target must be below 1: only a dense gradient captures all")
        if self.energy_target > 0 and self.probes < 1:
            raise ValueError(
                f"energy_target={self.energy_target} needs the norm estimate: set probes to 1 or "
                f"more (4 is a good choice), got probes={self.probes}"
            )
        if 0 < self.rank_max < self.rank_min:
            raise ValueError(
                f"rank_max={self.rank_max} is below rank_min={self.rank_min}: lower rank_min or "
                "raise rank_max (0 is no limit)"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `MoleGradConfig(**d)` gives the same configuration back."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def _require_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")

    def _require_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low:g} and {high:g}, got {value!r}")

    def _require_choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def preset_fields(name: str) -> dict[str, Any]:
    """The fields that a preset sets; ValueError where there is none of that name."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose among {', '.join(PRESETS)}")
    return PRESETS[name]
