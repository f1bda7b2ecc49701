"""Finding a model's large linear layers and converting them to MoleLinear, and back.

`plan` says which layers would be taken and which left, and why; `convert` does it. Layers are found
by their names (`molegrad.targets`).
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from molegrad.config import MoleGradConfig
from molegrad.linear import MoleLinear
from molegrad.steps import Steps
from molegrad.targets import ROLES, not_targeted

logger = logging.getLogger("molegrad")


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer: its dotted name, shape (m, n), why it is left (None: taken), and what it
    gets, or would get, in words."""

    name: str
    shape: tuple[int, int]
    reason: str | None
    gets: str


@dataclass(frozen=True)
class ConversionPlan:
    """What `convert` takes and leaves; `str(plan)` is a table for people."""

    config: MoleGradConfig
    layers: tuple[LayerPlan, ...]

    @property
    def taken(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def left(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.reason is not None)

    def __str__(self) -> str:
        numbers = sum(m * n for m, n in (layer.shape for layer in self.taken))
        c = self.config
        lines = [
            f"MoleGrad takes {len(self.taken)} of {len(self.layers)} linear layers "
            f"({numbers / 1e6:.2f}M weights; method={c.method}, gradient_mode={c.gradient_mode}, "
            f"target_layers={c.target_layers})"
        ]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            verdict = f"taken, {layer.gets}" if layer.reason is None else f"left: {layer.reason}"
            lines.append(f"  {layer.name:<{width}}  {shape:>12}  {verdict}")
        return "\n".join(lines)


def plan(model: nn.Module, config: MoleGradConfig) -> ConversionPlan:
    """Which linear layers of `model` would be converted, and why the others would not.

    A layer is left if it is not targeted, if its weight is tied to another module, if it is a
    subclass of nn.Linear or parametrized, frozen, converted already, or if the estimator refuses
    it.

    Raises:
        ValueError: an override for single layers in `config` matches no linear layer of the model.
    """
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    layers = tuple(
        LayerPlan(
            name,
            tuple(module.weight.shape),
            _reason(name, module, config, owners),
            config.estimator.describe(*module.weight.shape, name),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    for override in config.estimator.overrides():
        used = any(f"({override})" in layer.gets for layer in layers)
        if not used and override.rpartition("=")[0] not in ROLES:  # a role may be missing
            raise ValueError(
                f"the override {override!r} is for no linear layer of this model: name a role "
                "(ffn, attention), the end of a layer's name, a parent or a regular expression, "
                "and put narrower patterns before wider ones"
            )
    return ConversionPlan(config, layers)


def _reason(
    name: str, module: nn.Linear, config: MoleGradConfig, owners: Counter[int]
) -> str | None:
    if isinstance(module, MoleLinear):
        return "is converted already (revert it first to change its configuration)"
    reason = not_targeted(name, config.target_layers)
    if reason is not None:
        return reason
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, a subclass of nn.Linear"
    if owners[id(module.weight)] > 1:
        return "its weight is tied to another module, whose gradient is dense"
    if not module.weight.requires_grad:
        return "its weight is frozen"
    return config.estimator.refusal(*module.weight.shape, name)


def convert(model: nn.Module, config: MoleGradConfig | None = None, **changes) -> nn.Module:
    """Convert the planned layers in place and return the model (a new layer if it is one itself).

    Args:
        model: any module; a module found under several names is converted once and stays shared.
        config: default `MoleGradConfig()`.
        changes: fields that replace the config's or its estimator's, e.g. `rank_k=64`, as
            `MoleGradConfig.of` takes them; `target_modules` is accepted for `target_layers`, with
            PEFT's meaning ("all-linear" included).

    Raises:
        ValueError: no layer is taken; the message is the plan.
    """
    if "target_modules" in changes:
        changes["target_layers"] = changes.pop("target_modules")
    config = config or MoleGradConfig()
    config = config.changed(**changes) if changes else config
    conversion = plan(model, config)
    if not conversion.taken:
        raise ValueError(f"no layer to convert:\n{conversion}")
    logger.info("%s", conversion)
    shared, steps, replacements = config.estimator.shared(), Steps(), {}
    for layer in conversion.taken:
        linear = model.get_submodule(layer.name)
        made = MoleLinear.from_linear(linear, config, layer.name, shared)
        made.steps = steps
        replacements[id(linear)] = made
    return _replace(model, replacements)


def revert(model: nn.Module) -> nn.Module:
    """Turn every MoleLinear back into nn.Linear, in place; weights, hooks and sharing stay."""
    layers = [m for m in model.modules() if isinstance(m, MoleLinear)]
    return _replace(model, {id(layer): layer.to_linear() for layer in layers})


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    if id(model) in replacements:
        return replacements[id(model)]
    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if id(child) in replacements:
                module._modules[key] = replacements[id(child)]
    return model
