"""Finding a model's large linear layers and converting them to MoleLinear, and back.

`plan` says which layers would be taken at which rank and which left, and why; `convert` does it.
Layers are found by their names (`molegrad.names`).
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from molegrad.config import MoleGradConfig
from molegrad.grouping import SketchGroup
from molegrad.linear import MoleLinear
from molegrad.names import ROLES, layer_role, matches
from molegrad.overrides import TARGET_GROUPS
from molegrad.steps import Steps

logger = logging.getLogger("molegrad")


def _targeted(name: str, targets: str | tuple[str, ...]) -> str | None:
    """None if `targets` asks for the layer, otherwise the reason why it does not."""
    if isinstance(targets, str) and targets in TARGET_GROUPS:
        role = layer_role(name)
        wanted = {"ffn_only": {"ffn"}, "attention_only": {"attention"}}.get(targets)
        if wanted is None:
            return "the output head stays dense" if role == "head" else None
        return None if role in wanted else f"not a target of {targets} (role: {role})"
    if any(matches(target, name) for target in targets):
        return None
    return f"matches none of {', '.join(targets)}"


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer: its dotted name, shape (m, n), why it is left (None: taken), its rank k
    (the one it would have, where it is left) and the setting that the rank comes from."""

    name: str
    shape: tuple[int, int]
    reason: str | None
    rank: int
    rank_source: str


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
        sampled = c.method == "sampled"
        size = f"sample_share={c.sample_share:g}" if sampled else f"rank_k={c.rank_k}"
        if c.method == "projected":
            size += f", project_stride={c.project_stride}"
        lines = [
            f"MoleGrad takes {len(self.taken)} of {len(self.layers)} linear layers "
            f"({numbers / 1e6:.2f}M weights; {size}, method={c.method}, "
            f"gradient_mode={c.gradient_mode}, target_layers={c.target_layers})"
        ]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            verdict = f"left: {layer.reason}"
            if layer.reason is None:
                verdict = f"taken, rank {layer.rank} ({layer.rank_source})"
                if sampled:
                    verdict = f"taken, {layer.rank_source}"
            lines.append(f"  {layer.name:<{width}}  {shape:>12}  {verdict}")
        return "\n".join(lines)


def plan(model: nn.Module, config: MoleGradConfig) -> ConversionPlan:
    """Which linear layers of `model` would be converted, and why the others would not.

    A layer is left if it is not targeted, if its weight is tied to another module, if it is a
    subclass of nn.Linear or parametrized, frozen, converted already, or if it would not save
    `config.min_layer_utilization` of the dense gradient (of its input with method "projected").

    Raises:
        ValueError: an override of ranks or shares in `config` matches no linear layer of the model.
    """
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    layers = tuple(
        LayerPlan(
            name,
            tuple(module.weight.shape),
            _reason(name, module, config, owners),
            config.rank_of(*module.weight.shape, name),
            config.rank_source(name),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    sources = {layer.rank_source for layer in layers}
    for override in (*config.rank_overrides, *config.sample_overrides):
        role = override.rpartition("=")[0] in ROLES  # a rule for what may be there
        if override not in sources and not role:
            raise ValueError(
                f"the override {override!r} sets the rank or share of no linear layer of this "
                "model: name a role (ffn, attention), the end of a layer's name, a parent or a "
                "regular expression, and put narrower patterns before wider ones"
            )
    return ConversionPlan(config, layers)


def _reason(
    name: str, module: nn.Linear, config: MoleGradConfig, owners: Counter[int]
) -> str | None:
    if isinstance(module, MoleLinear):
        return "is converted already (revert it first to change its configuration)"
    not_targeted = _targeted(name, config.target_layers)
    if not_targeted is not None:
        return not_targeted
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, a subclass of nn.Linear"
    if owners[id(module.weight)] > 1:
        return "its weight is tied to another module, whose gradient is dense"
    if not module.weight.requires_grad:
        return "its weight is frozen"
    m, n = module.weight.shape
    k = config.rank_of(m, n, name)
    source = f"rank {k} ({config.rank_source(name)})"
    if config.needed_features(k) > min(m, n):
        return f"too small for {source}"
    saved = config.saved_share(m, n, name)
    if saved < config.min_layer_utilization:
        projected = config.method == "projected"
        whole = "its input" if projected else "the dense gradient"
        if projected:
            source += f" with project_stride={config.project_stride}"
        return (
            f"{source} saves {saved:.0%} of {whole}, less than "
            f"min_layer_utilization={config.min_layer_utilization:.0%}"
        )
    return None


def convert(model: nn.Module, config: MoleGradConfig | None = None, **changes) -> nn.Module:
    """Convert the planned layers in place and return the model (a new layer if it is one itself).

    Args:
        model: any module; a module found under several names is converted once and stays shared.
        config: default `MoleGradConfig()`.
        changes: fields that replace the config's, e.g. `rank_k=64`; `target_modules` is accepted
            for `target_layers`, with PEFT's meaning ("all-linear" included).

    Raises:
        ValueError: no layer is taken; the message is the plan.
    """
    if "target_modules" in changes:
        changes["target_layers"] = changes.pop("target_modules")
    config = MoleGradConfig(**{**(config.to_dict() if config else {}), **changes})
    conversion = plan(model, config)
    if not conversion.taken:
        raise ValueError(f"no layer to convert:\n{conversion}")
    logger.info("%s", conversion)
    group = SketchGroup(config.group_mib) if config.group_mib else None
    steps, replacements = Steps(), {}
    for layer in conversion.taken:
        linear = model.get_submodule(layer.name)
        made = MoleLinear.from_linear(linear, config, layer.name, group)
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
