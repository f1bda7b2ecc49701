"""Finding a model's large linear layers and converting them to MoleLinear, and back.

`plan` says which layers would be taken and which left, and why; `convert` does it. Layers are
found by the names nanochat, GPT-2 and Hugging Face models give them, the parents' names included:
`h.0.mlp.c_proj` is a feed-forward layer, `h.0.attn.c_proj` an attention layer.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from molegrad.config import TARGET_GROUPS, MoleGradConfig
from molegrad.linear import MoleLinear

logger = logging.getLogger("molegrad")

# Compared with name components in lower case without digits, dots and underscores.
_FFN_PARENTS = {
    "mlp", "ffn", "ff", "feedforward", "moe", "experts", "expert", "sharedexpert",
    "sharedexperts", "blocksparsemoe", "densereludense", "intermediate", "mlps",
}  # fmt: skip
_ATTENTION_PARENTS = {
    "attn", "attention", "selfattn", "selfattention", "crossattn", "crossattention",
    "encoderattn", "encdecattention", "mha", "multiheadattention", "mixer",
}  # fmt: skip
_FFN_LEAVES = {
    "cfc", "fc", "fcin", "fcout", "gateproj", "upproj", "downproj", "gateupproj",
    "wi", "wo", "densehtoh", "gate", "up", "down",
}  # fmt: skip
_FFN_EXACT = {"w1", "w2", "w3"}  # without their digits they would be anything
_ATTENTION_LEAVES = {
    "qproj", "kproj", "vproj", "oproj", "outproj", "cattn", "cq", "ck", "cv", "qkv", "qkvproj",
    "querykeyvalue", "query", "key", "value", "wq", "wk", "wv", "wqkv", "toq", "tok", "tov",
    "toout", "inproj", "qlin", "klin", "vlin", "outlin",
}  # fmt: skip
_HEADS = {
    "lmhead", "head", "embedout", "outputembeddings", "classifier", "score", "qaoutputs",
    "unembed", "unembedding", "outputlayer", "prediction", "decoderhead",
}  # fmt: skip


def _word(component: str) -> str:
    return re.sub(r"[^a-z]", "", component.lower())


def layer_role(name: str) -> str:
    """'ffn', 'attention', 'head' or 'other', read off a module's dotted name.

    A parent that names its role decides before the layer's own name does, the innermost first.
    """
    *parents, leaf = name.split(".")
    if _word(leaf) in _HEADS or any(_word(p) in _HEADS for p in parents[-1:]):
        return "head"
    for parent in reversed(parents):
        word = _word(parent)
        if word in _FFN_PARENTS:
            return "ffn"
        if word in _ATTENTION_PARENTS:
            return "attention"
    if leaf in _FFN_EXACT or _word(leaf) in _FFN_LEAVES:
        return "ffn"
    if _word(leaf) in _ATTENTION_LEAVES:
        return "attention"
    if parents and _word(parents[-1]) == "output" and _word(leaf) == "dense":
        return "ffn"  # BERT's second feed-forward layer; its attention's one has such a parent
    return "other"


def _targeted(name: str, targets: str | tuple[str, ...]) -> str | None:
    """None if `targets` asks for the layer, otherwise the reason why it does not."""
    if isinstance(targets, str) and targets in TARGET_GROUPS:
        role = layer_role(name)
        wanted = {"ffn_only": {"ffn"}, "attention_only": {"attention"}}.get(targets)
        if wanted is None:
            return "the output head stays dense" if role == "head" else None
        return None if role in wanted else f"not a target of {targets} (role: {role})"
    for target in targets:
        if name == target or name.endswith("." + target) or re.fullmatch(target, name):
            return None
        if target in name.split("."):  # the word stands in a parent's name
            return None
    return f"matches none of {', '.join(targets)}"


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer: its dotted name(s), shape (m, n), and why it is left (None: taken)."""

    name: str
    shape: tuple[int, int]
    reason: str | None


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
            f"({numbers / 1e6:.2f}M weights; rank_k={c.rank_k}, method={c.method}, "
            f"gradient_mode={c.gradient_mode}, target_layers={c.target_layers})"
        ]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            verdict = "taken" if layer.reason is None else f"left: {layer.reason}"
            lines.append(f"  {layer.name:<{width}}  {shape:>12}  {verdict}")
        return "\n".join(lines)


def plan(model: nn.Module, config: MoleGradConfig) -> ConversionPlan:
    """Which linear layers of `model` would be converted, and why the others would not.

    A layer is left if it is not targeted, if its weight is tied to another module, if it is a
    subclass of nn.Linear or parametrized, frozen, converted already, or if its factors would not
    save `config.min_layer_utilization` of the dense gradient.
    """
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    layers = tuple(
        LayerPlan(name, tuple(module.weight.shape), _reason(name, module, config, owners))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
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
    k = config.rank_k
    if config.needed_features > min(m, n):
        return f"too small for rank_k={k}"
    saved = 1 - k * (m + n) / (m * n)
    if saved < config.min_layer_utilization:
        return (
            f"rank_k={k} saves {saved:.0%} of the dense gradient, less than "
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
    config = MoleGradConfig(**{**(config or MoleGradConfig()).to_dict(), **changes})
    conversion = plan(model, config)
    if not conversion.taken:
        raise ValueError(f"no layer to convert:\n{conversion}")
    logger.info("%s", conversion)
    return _replace(
        model,
        {
            id(model.get_submodule(layer.name)): MoleLinear.from_linear(
                model.get_submodule(layer.name), config, layer.name
            )
            for layer in conversion.taken
        },
    )


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
