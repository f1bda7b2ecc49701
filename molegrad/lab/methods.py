"""Methods of training: a name, changes behind colons, and the flags of base training they mean.

    dense                                 Muon on exact gradients, the reference
    lowrank:rank=16:warm_start_decay=1    a name of METHODS with other values of base_train's flags
    balanced:sampling_fraction=0.125           a streaming flag needs no prefix
    adamw:matrix_lrs=0.001|0.002|0.004    with learning rates of its own
    galore:rank=16:scale=0.5              a name of molegrad.lab.peers, with an option of it

A new method is one line in METHODS. `rank` is the rank of whatever it is given to. A value in
square brackets may hold commas and colons.
"""

from __future__ import annotations

import ast
import difflib
import types
import typing
from dataclasses import dataclass, field

from molegrad.config import PRESETS
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import PREFIX, fields_as_flags, make
from molegrad.lab.peers import OPTIONS, PEERS, Peer
from molegrad.lab.store import STEERING

_HINTS = {entry.name: entry.hint for entry in fields_as_flags(BaseTrainConfig)}
_LOW_RANK = {"enable_streaming": True, "streaming_gradient_mode": "factors"}
METHODS: dict[str, dict] = {
    "dense": {},
    "adamw": {"optimizer": "adamw"},
    "adafactor": {"optimizer": "adafactor"},
    "lowrank": _LOW_RANK,  # power, or tangent where a step needs sums
    "lowrank-grad": {**_LOW_RANK, "streaming_gradient_mode": "grad"},
    "tangent": {**_LOW_RANK, "streaming_method": "tangent"},
    **{
        name: {"enable_streaming": True, **{PREFIX + k: v for k, v in PRESETS[name].items()}}
        for name in ("exact", "balanced", "minimal")
    },
}
RANK = PREFIX + "rank_k"
RATES = ("lr", "matrix_lr", "matrix_lrs")
# Flags that the sweep sets, for all methods alike.
RESERVED = STEERING | {
    *("depth", "aspect_ratio", "max_seq_len", "total_batch_size", "num_iterations"),
    *("max_train_tokens", "eval_tokens", "device_type", "seed", "streaming_seed"),
}


@dataclass(frozen=True)
class Method:
    """One way to train. flags: of BaseTrainConfig; rates: its own learning rates, or ()."""

    label: str
    flags: dict = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    peer: Peer | None = None


def parse_methods(text: str, common: str = "") -> list[Method]:
    """The methods of a --methods flag; "dense" is always the first (it may have rates of its own).

    Args:
        text: comma separated specifications.
        common: changes for all methods, colon separated; a method's own win. Streaming flags among
            them are for the methods whose estimator has that option.

    Raises:
        ValueError: an unknown method or flag, or a value of the wrong kind.
    """
    shared = _changes(f"--common={common}", split(common, ":"))
    if "rates" in shared:
        raise ValueError(f"--common={common}: learning rates of all methods are --matrix-lrs")
    methods = [_method(spec, shared) for spec in split(text, ",")]
    dense = [m for m in methods if m.label == "dense"] or [_method("dense", shared)]
    return [dense[0], *(m for m in methods if m.label != "dense")]


def _method(spec: str, shared: dict) -> Method:
    name, *words = split(spec, ":")
    label = ":".join([name, *(word for word in words if _key(word) not in RATES)])
    if name not in METHODS and name not in PEERS:
        raise ValueError(f"unknown method {name!r}: {_nearest(name, [*METHODS, *PEERS])}")
    given = _changes(label, words, OPTIONS.get(name, {}))
    rates = given.pop("rates", ())
    if name in PEERS:
        rank = given.pop(RANK, shared.get(RANK))
        options = {key: given.pop(key) for key in OPTIONS[name] if key in given}
        idle = [key for key in given if _concerns_gradients(key)]
        if idle:
            raise ValueError(f"{label!r}: {idle[0]} is not for a peer, which takes dense gradients")
        flags = {k: v for k, v in {**shared, **given}.items() if not _concerns_gradients(k)}
        return Method(label, flags, rates, Peer(name, rank, options))
    streaming = make(BaseTrainConfig, **{**METHODS[name], **given}).streaming
    options = streaming.flat() if streaming else {}
    common = {
        key: value
        for key, value in shared.items()
        if not key.startswith(PREFIX) or key.removeprefix(PREFIX) in options
    }
    return Method(label, {**METHODS[name], **common, **given}, rates)


def _concerns_gradients(flag: str) -> bool:
    return flag in ("enable_streaming", "optimizer") or flag.startswith(PREFIX)


def _changes(spec: str, words: list[str], options=()) -> dict:
    """Flag or option -> value of the words NAME=VALUE; "rates" besides."""
    result: dict = {}
    for word in words:
        name, equals, text = word.partition("=")
        name, text = _key(word), text.strip().removeprefix("[").removesuffix("]")
        if not equals:
            raise ValueError(f"{spec!r}: {word!r} should look like NAME=VALUE")
        if name in RATES:
            result["rates"] = learning_rates(text.replace("|", ","), spec)
        elif name in options:
            result[name] = _literal(text)
        elif name in RESERVED or PREFIX + name in RESERVED:
            raise ValueError(
                f"{spec!r}: {name} is the same for all methods; compare has a flag for it, or sets "
                "it itself"
            )
        elif name in _HINTS or PREFIX + name in _HINTS:
            name = name if name in _HINTS else PREFIX + name
            result[name] = typed(name, text, _HINTS[name])
        else:
            known = [*_HINTS, *(n.removeprefix(PREFIX) for n in _HINTS), *options]
            raise ValueError(f"{spec!r}: unknown flag {name!r}; {_nearest(name, known)}")
    return result


def _key(word: str) -> str:
    name = word.partition("=")[0].strip().replace("-", "_")
    return RANK if name == "rank" else name


def split(text: str, separator: str) -> list[str]:
    """The parts of a text, stripped, empty ones left out; brackets protect what is in them."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def learning_rates(text: str, where: str) -> tuple[float, ...]:
    """Comma separated positive numbers in rising order, each once."""
    rates = sorted({float(typed(where, part, float)) for part in split(text, ",")})
    if not rates or not 0 < rates[0] <= rates[-1] < float("inf"):
        raise ValueError(f"{where}: learning rates must be positive numbers, got {text!r}")
    return tuple(rates)


def typed(name: str, text: str, hint):
    """`text` as a value of the annotation: bool, int, float, str, None, Literal or a union.

    Raises:
        ValueError: it is none of what the annotation allows.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    choices = [c for m in members if typing.get_origin(m) is typing.Literal for c in m.__args__]
    kinds = tuple(m for m in members if isinstance(m, type))
    value = _literal(text)
    if isinstance(value, int) and not isinstance(value, bool) and int not in kinds:
        value = float(value) if float in kinds else text
    if value in choices or type(value) in kinds:
        return value
    if str in kinds:
        return text
    words = ", ".join([*map(str, choices), *(kind.__name__ for kind in kinds)])
    raise ValueError(f"{name}={text} is not one of: {words}")


def _literal(text: str):
    """A number, True, False or None where the text is one; else the text."""
    words = {"true": True, "false": False, "none": None}
    try:
        return words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _nearest(name: str, names) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}"
