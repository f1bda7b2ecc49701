"""Which layers a setting is for: the role that a layer's dotted name says, patterns, and values of
single layers, written PATTERN=VALUE.

The words are those of nanochat, GPT-2 and Hugging Face models, the parents' names included:
`h.0.mlp.c_proj` is a feed-forward layer, `h.0.attn.c_proj` an attention layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

GROUPS = ("ffn_only", "attention_only", "all")
ROLES = ("ffn", "attention")

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


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` is a layer's name, its end, the name of one of its parents, or a regular
    expression for the whole of it."""
    if name == pattern or name.endswith("." + pattern) or pattern in name.split("."):
        return True
    return re.fullmatch(pattern, name) is not None


def not_targeted(name: str, targets: str | tuple[str, ...]) -> str | None:
    """None if `targets`, in `normalized_targets`' form, ask for the layer, else the reason."""
    if isinstance(targets, str):
        role = layer_role(name)
        wanted = {"ffn_only": "ffn", "attention_only": "attention"}.get(targets)
        if wanted is None:
            return "the output head stays dense" if role == "head" else None
        return None if role == wanted else f"not a target of {targets} (role: {role})"
    if any(matches(target, name) for target in targets):
        return None
    return f"matches none of {', '.join(targets)}"


def normalized_targets(targets: Any) -> str | tuple[str, ...]:
    """One of `GROUPS`, or a tuple of names and patterns.

    Raises:
        TypeError: `targets` is neither a string nor a list of strings.
        ValueError: it is empty, mixes a group with names, or holds no valid regular expression.
    """
    if targets == "all-linear":  # PEFT's name for the same choice
        return "all"
    if isinstance(targets, str):
        names = tuple(part.strip() for part in targets.split(",") if part.strip())
        if len(names) == 1 and names[0] in GROUPS:
            return names[0]
    elif isinstance(targets, Sequence) and all(isinstance(t, str) for t in targets):
        names = tuple(targets)
    else:
        raise TypeError(
            "target_layers must be 'ffn_only', 'attention_only', 'all' or a list of module names "
            f"or patterns, got {targets!r}"
        )
    if not names:
        raise ValueError("target_layers is empty: name at least one layer or pattern, or a group")
    for name in names:
        if name in GROUPS:
            raise ValueError(
                f"target_layers mixes the group {name!r} with names: give either one group "
                f"({', '.join(GROUPS)}) or names and patterns only"
            )
        _check_pattern("target_layers", name)
    return names


def split_override(override: str, field: str = "overrides") -> tuple[str, int | float]:
    """Pattern and value of "PATTERN=VALUE"; the pattern itself may hold a "="."""
    pattern, _, value = override.rpartition("=")
    try:
        if not pattern.strip():
            raise ValueError
        return pattern.strip(), int(value) if value.strip().isdigit() else float(value)
    except ValueError:
        raise ValueError(
            f"{field} has {override!r}, where PATTERN=VALUE is wanted, such as 'attention=16' or "
            "'c_proj=0.25'"
        ) from None


def normalized_overrides(
    field: str, overrides: Any, check: Callable[[str, Any], None]
) -> tuple[str, ...]:
    """Overrides as a tuple of PATTERN=VALUE, each value passed to `check(name, value)`.

    Raises:
        TypeError: `overrides` is neither a string nor a list of strings.
        ValueError: an entry is malformed, or what `check` raises.
    """
    if isinstance(overrides, str):
        entries = tuple(part.strip() for part in overrides.split(",") if part.strip())
    elif isinstance(overrides, Sequence) and all(isinstance(o, str) for o in overrides):
        entries = tuple(overrides)
    else:
        raise TypeError(
            f"{field} must be a string such as 'attention=16,c_proj=0.25' or a list of such "
            f"entries, got {overrides!r}"
        )
    for entry in entries:
        pattern, value = split_override(entry, field)
        check(f"{field}: the value of {pattern!r}", value)
        _check_pattern(field, pattern)
    return entries


def override_of(name: str, overrides: tuple[str, ...]) -> str | None:
    """The first override whose pattern is the layer's role or matches its dotted name."""
    for override in overrides:
        pattern, _ = split_override(override)
        if pattern == layer_role(name) or matches(pattern, name):
            return override
    return None


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field} has {pattern!r}, which is no valid regular expression: {error}"
        ) from None
