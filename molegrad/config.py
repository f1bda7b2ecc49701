"""MoleGradConfig: which layers, which estimator, and where the gradient goes; validated once.

A frozen dataclass, so that a run's configuration cannot drift while it runs and can be written
into its checkpoint as it stands. Options of an estimator stand in its own dataclass:

    MoleGradConfig()                                     # block power, rank 32, feed-forward layers
    MoleGradConfig(estimator=Exact(), gradient_mode="momentum", target_layers="all")
    MoleGradConfig.of(method="tangent", rank_k=64, gradient_mode="factors")    # the same, flat
    MoleGradConfig.preset("balanced", sampling_fraction=0.5)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from molegrad import targets
from molegrad.estimators import Estimator, LowRank, methods
from molegrad.options import Options, option, plain_values

GradientMode = Literal["grad", "momentum", "factors"]
GRADIENT_MODES = ("grad", "momentum", "factors")
MOMENTUM_DTYPES = ("float32", "bfloat16", "int8")

# Named configurations: which suits which batch, memory and patience stands in docs/quality.md.
_IN_MOMENTUM = {
    "gradient_mode": "momentum",
    "target_layers": "all",
    "saved_inputs": "fp8",
    "momentum_dtype": "bfloat16",
}
_BALANCED = {
    **_IN_MOMENTUM,
    "method": "sampled",
    "sampling_fraction": 0.25,
    "sampling_overrides": ("attention=1",),
}
PRESETS: dict[str, dict[str, Any]] = {
    "lowrank": {"gradient_mode": "factors"},
    "lowrank-grad": {"gradient_mode": "grad"},
    "exact": {**_IN_MOMENTUM, "method": "exact"},
    "balanced": _BALANCED,
    "minimal": {**_BALANCED, "momentum_dtype": "int8"},
}


@dataclass(frozen=True)
class MoleGradConfig(Options):
    """How the weight gradients of a model's large linear layers are estimated.

    Raises:
        ValueError: a field is out of range; the message names field, value and remedy.
        TypeError: a field has the wrong type.
    """

    estimator: Estimator = option(LowRank(), "the estimator, with its own options")
    target_layers: str | tuple[str, ...] = option(
        "ffn_only",
        "layers to convert: 'ffn_only', 'attention_only', 'all' (every linear layer but the output "
        "head), or module names, name suffixes or regular expressions (comma separated), as "
        "PEFT's target_modules takes them",
    )
    gradient_mode: GradientMode = option(
        "grad",
        "where the gradient goes: 'grad' writes the estimate to weight.grad (any optimizer works); "
        "'momentum' adds it straight to Muon's momentum, so that no gradient exists (methods "
        "'exact' and 'sampled'); 'factors' keeps sketches as gradients of two small parameters "
        "(methods 'power' and 'tangent') and needs an optimizer of molegrad.optim",
    )
    saved_inputs: Literal["full", "fp8"] = option(
        "full",
        "what a layer keeps of its input for the backward pass: 'full', or 'fp8', float8 rows with "
        "a scale each",
    )
    momentum_dtype: Literal["float32", "bfloat16", "int8"] = option(
        "float32",
        "gradient_mode 'momentum': dtype of the momentum; int8 has a scale for each feature of the "
        "wider side",
    )
    seed: int = option(0, "seed of the initial bases, the exploration, the probes and the samples")

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator):
            raise TypeError(
                f"estimator must be an Estimator such as LowRank(), got {self.estimator!r}; "
                "MoleGradConfig.of(method=..., ...) takes the options of both as they are"
            )
        object.__setattr__(self, "target_layers", targets.normalized_targets(self.target_layers))
        self._require_choice("gradient_mode", GRADIENT_MODES)
        self._require_choice("saved_inputs", ("full", "fp8"))
        self._require_choice("momentum_dtype", MOMENTUM_DTYPES)
        self._require_int("seed", 0, 2**53)
        if self.gradient_mode not in self.estimator.MODES:
            remedy = {
                "momentum": "choose 'exact' or 'sampled', whose estimates a momentum can be built "
                "of, or gradient_mode='factors', which keeps less",
                "factors": "choose 'power' or 'tangent', or gradient_mode='momentum' or 'grad'",
            }.get(self.gradient_mode, f"choose among {', '.join(self.estimator.MODES)}")
            raise ValueError(
                f"gradient_mode={self.gradient_mode!r} is not for method={self.method!r}: {remedy}"
            )
        refusal = self.estimator.refuses_mode(self.gradient_mode)
        if refusal:
            raise ValueError(refusal)
        if self.estimator.reads_float8:
            object.__setattr__(self, "saved_inputs", "fp8")

    @property
    def method(self) -> str:
        """The estimator's method: "power", "tangent", "exact", "sampled" or one's own."""
        return self.estimator.title

    @classmethod
    def of(cls, method: str | None = None, **fields: Any) -> MoleGradConfig:
        """The configuration with these fields, its own and the estimator's side by side.

        Args:
            method: "power" (None too), "tangent", "exact", "sampled", or one of an own estimator's.

        Raises:
            ValueError: the method is unknown, or a value is out of range.
            TypeError: a field belongs neither to the configuration nor to the method's estimator.
        """
        known, method = methods(), "power" if method is None else method
        if method not in known:
            raise ValueError(f"method must be one of {', '.join(known)}; got {method!r}")
        kind, options = known[method]
        shared = {f.name for f in dataclasses.fields(cls)} - {"estimator"}
        own = {f.name for f in dataclasses.fields(kind)}
        for name in fields:
            if name not in shared | own:
                owners = [m for m, (k, _) in known.items() if name in _names(k)]
                hint = f"it is for method={' or '.join(map(repr, owners))}" if owners else (
                    f"there are {', '.join(sorted(shared | own))}"
                )  # fmt: skip
                raise TypeError(
                    f"{name}={fields[name]!r} is no option of method={method!r}: {hint}"
                )
        estimator = kind(**{**{k: v for k, v in fields.items() if k in own}, **options})
        return cls(estimator=estimator, **{k: v for k, v in fields.items() if k in shared})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MoleGradConfig:
        """One of `PRESETS`, with the fields in `changes` replaced, as `of` takes them.

        Raises:
            ValueError: there is no preset of that name.
        """
        return cls.of(**preset_fields(name, changes))

    def changed(self, **changes: Any) -> MoleGradConfig:
        """This configuration with other fields, as `of` takes them. Where `method` names another
        estimator, that one's options start from their defaults."""
        fields = self.flat()
        method = changes.get("method")
        if method is not None and methods().get(method, (None,))[0] is not type(self.estimator):
            fields = {k: v for k, v in fields.items() if k not in _names(type(self.estimator))}
        return type(self).of(**{**fields, **changes})

    def flat(self) -> dict[str, Any]:
        """Its own fields and the estimator's in one dictionary, "method" among them: `of` makes the
        same configuration of it."""
        own = plain_values(self.estimator)
        shared = plain_values(self)
        del shared["estimator"]
        return {"method": self.method, **{k: v for k, v in own.items() if k != "method"}, **shared}

    to_dict = flat

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoleGradConfig:
        """What `to_dict` gave, which JSON holds."""
        return cls.of(**values)


def preset_fields(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The flat fields of a preset with `changes`; another estimator's method takes the preset's
    shared fields alone. ValueError where there is no preset of that name."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose among {', '.join(PRESETS)}")
    fields, known = PRESETS[name], methods()
    method = (changes or {}).get("method", fields.get("method"))
    if method in known and known[method][0] is not known[fields.get("method", "power")][0]:
        own = _names(known[fields.get("method", "power")][0])
        fields = {k: v for k, v in fields.items() if k not in own}
    return {**fields, **(changes or {})}


def _names(kind: type[Estimator]) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}
