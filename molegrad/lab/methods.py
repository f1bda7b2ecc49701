"""Methods of training: a name, overrides behind colons, and what they mean for base training.

    dense                                        Muon on exact gradients, the reference
    factored-tangent                             an entry of METHODS
    factored-tangent:rank=16:warm_start_decay=1  with other values of base_train's flags
    balanced:sample_share=0.125                  a preset of molegrad.config
    adamw:matrix_lrs=0.001|0.002|0.004           with learning rates of its own
    galore:rank=16                               a name of molegrad.lab.peers

A new method is one line in METHODS. An override names any flag of base training, a streaming flag
also without its prefix; `rank` is the rank of whatever it is given to, `lr` is `matrix_lr`. A value
in square brackets may hold commas and colons. What is no flag goes to a peer as its option.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import types
import typing
from dataclasses import dataclass, field

from molegrad.config import PRESETS
from molegrad.estimators.lowrank_options import DEFAULT_RANK
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import PREFIX

_HINTS = typing.get_type_hints(BaseTrainConfig)
METHODS: dict[str, dict] = {
    "dense": {},
    **{
        name: {"optimizer": name} for name in typing.get_args(_HINTS["optimizer"]) if name != "muon"
    },
    "molegrad": {"enable_streaming": True},  # to be completed by overrides
    **{
        f"{mode}-{method}": {
            "enable_streaming": True,
            "streaming_gradient_mode": mode,
            "streaming_method": method,
        }
        for mode in ("dense", "factored")
        for method in ("power", "tangent")
    },
    **{
        name: {"enable_streaming": True, **{PREFIX + k: v for k, v in fields.items()}}
        for name, fields in PRESETS.items()
    },
    "projected": {
        "enable_streaming": True,
        "streaming_method": "projected",
        "streaming_gradient_mode": "momentum",
        "streaming_momentum_dtype": "bfloat16",
        "streaming_saved_inputs": "fp8",
        "streaming_target_layers": "all",
    },
}
RATES = ("lr", "matrix_lr", "matrix_lrs")
# Peers without a rank, or with a fixed one: --ranks makes no difference to them.
RANKLESS = {"adamw", "muon", "in-backward-adamw", "in-backward-muon", "apollo-mini"}
PEER_OPTIONS = {"momentum", "weight_decay"}  # also flags, of the optimizer that a peer replaces
# Flags that the sweep sets itself: every method has to have the same.
RESERVED = {
    "depth": "--sizes",
    "aspect_ratio": "--sizes",
    "seed": "--seeds",
    "num_iterations": "--num-iterations",
    "max_train_tokens": "--train-tokens",
    "total_batch_size": "--batch-sizes",
    "max_seq_len": "--max-seq-len",
    "data": "--data",
    "tokenizer": "--vocab",
    "eval_tokens": "--eval-tokens",
    "threads": "--threads",
    "device_type": "--device-type",
} | dict.fromkeys(
    (
        *("run", "model_tag", "dashboards", "eval_every", "save_every", "keep_last", "resume"),
        *("resume_from_step", "overwrite", "monitor_every", "sample_every", "streaming_seed"),
        *("layer_metrics", "shadow_every", "shadow_layers"),
    ),
    "nothing: the sweep sets it",
)


@dataclass(frozen=True)
class Peer:
    """An optimizer of molegrad.lab.peers for the block matrices, with its rank and options."""

    name: str
    rank: int | float | None  # None where the peer has none
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to train. flags: of BaseTrainConfig; rates: its own learning rates, or ()."""

    label: str
    flags: dict = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    peer: Peer | None = None

    @property
    def family(self) -> str:
        """The label without a rank: what several ranks of one method share."""
        words = split(self.label, ":")
        return ":".join(w for w in words if _key(w).removeprefix(PREFIX) not in ("rank", "rank_k"))

    @property
    def rank(self) -> int | float | None:
        """The rank k (a fraction: of a layer's smaller side), None for dense methods."""
        if self.peer is not None:
            return self.peer.rank
        streaming = BaseTrainConfig(**self.flags).streaming_config()
        return None if streaming is None else streaming.rank_k


def peer_module():
    """molegrad.lab.peers, imported when a peer is asked for."""
    return importlib.import_module("molegrad.lab.peers")


def parse_methods(text: str, ranks: str = "", common: str = "") -> list[Method]:
    """The methods of a --methods flag; "dense" is always the first (it may have rates of its own).

    Args:
        text: comma separated specifications.
        ranks: comma separated; every low-rank method without a rank of its own is made once for
            each. Empty is the default of the configuration.
        common: overrides for all methods, colon separated.

    Raises:
        ValueError: an unknown method or flag, or a value of the wrong kind.
    """
    shared = _overrides(common, split(common, ":"))
    for name, remedy in (("rank", "--ranks"), ("rates", "--matrix-lrs")):
        if name in shared:
            raise ValueError(f"--common={common}: use {remedy} for all methods")
    rank_list = [number(rank, "--ranks") for rank in split(ranks, ",")]
    methods = [m for spec in split(text, ",") for m in _methods(spec, shared, rank_list)]
    dense = [m for m in methods if m.label == "dense"] or _methods("dense", shared, rank_list)
    return [dense[0], *(m for m in methods if m.label != "dense")]


def _methods(spec: str, shared: dict, ranks: list) -> list[Method]:
    name, *words = split(spec, ":")
    label = ":".join([name, *(word for word in words if _key(word) not in RATES)])
    if name in METHODS:
        given = _overrides(spec, words)
        peer = None
    elif name in peer_module().PEERS:
        given = _overrides(spec, words, free=True)
        peer = Peer(name, None, given.pop("options"))
    else:
        names = [*METHODS, *peer_module().PEERS]
        raise ValueError(f"unknown method {name!r}: {_nearest(name, names)}")
    rates, rank = given.pop("rates", ()), given.pop("rank", None)
    flags = {**METHODS.get(name, {}), **shared, **given}
    if not flags.get("enable_streaming", False):  # what is common to all is for those it concerns
        flags = {k: v for k, v in flags.items() if k in given or not k.startswith(PREFIX)}
    low_rank = flags.get("enable_streaming", False) if peer is None else name not in RANKLESS
    if rank is not None and not low_rank:
        raise ValueError(f"{spec!r} has a rank, but {name} is not a method with a free rank")
    if peer is not None:
        if flags.get("enable_streaming", False) or flags.get("optimizer", "muon") != "muon":
            raise ValueError(f"{spec!r}: a peer is the optimizer, and its gradients are dense")
        own = [rank] if rank is not None else ranks or [DEFAULT_RANK]
        own = own if low_rank else [None]
        return [Method(label, flags, rates, dataclasses.replace(peer, rank=k)) for k in own]
    if not low_rank or flags.get(PREFIX + "method") == "sampled":
        return [Method(label, flags, rates)]
    key = PREFIX + "rank_k"
    own = [rank] if rank is not None else [] if key in given else ranks
    return [Method(label, {**flags, key: k}, rates) for k in own] or [Method(label, flags, rates)]


def _overrides(spec: str, words: list[str], free: bool = False) -> dict:
    """Flag -> value of the words NAME=VALUE; "rank" and "rates" besides, and "options" if free."""
    result: dict = {"options": {}} if free else {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{spec!r}: {word!r} should look like NAME=VALUE")
        name, text = name.strip().replace("-", "_"), text.strip()
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        if free and name in PEER_OPTIONS:
            result["options"][name] = _literal(text)
        elif name == "rank":
            result["rank"] = number(text, spec)
        elif name in RATES:
            result["rates"] = learning_rates(text.replace("|", ","), spec)
        elif name in RESERVED or PREFIX + name in RESERVED:
            remedy = RESERVED.get(name) or RESERVED[PREFIX + name]
            raise ValueError(f"{spec!r}: {name} is the same for all methods; use {remedy}")
        elif name in _HINTS:
            result[name] = typed(name, text, _HINTS[name])
        elif PREFIX + name in _HINTS:
            result[PREFIX + name] = typed(name, text, _HINTS[PREFIX + name])
        elif free:
            result["options"][name] = _literal(text)
        else:
            known = [*_HINTS, *(n.removeprefix(PREFIX) for n in _HINTS), "rank", "matrix_lrs"]
            raise ValueError(f"{spec!r}: unknown flag {name!r}; {_nearest(name, known)}")
    return result


def _key(word: str) -> str:
    return word.partition("=")[0].strip().replace("-", "_")


def split(text: str, separator: str) -> list[str]:
    """The parts of a text, stripped, empty ones left out; brackets protect what is in them."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == separator and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += character
    return [part.strip() for part in [*parts, part] if part.strip()]


def number(text: str, where: str) -> int | float:
    """An integer, or else a float. ValueError names the text and where it stood."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{where}: {text!r} is no number")


def learning_rates(text: str, where: str) -> tuple[float, ...]:
    """Comma separated positive numbers in rising order, each once."""
    rates = sorted({float(number(part, where)) for part in split(text, ",")})
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
    low = text.lower()
    if type(None) in members and low == "none":
        return None
    if bool in members and low in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        return low in ("true", "1", "yes", "on")
    for kind in (int, float):
        if kind in members:
            try:
                return kind(text)
            except ValueError:
                pass
    for choice in choices:
        if str(choice) == text:
            return choice
    if str in members:
        return text
    kinds = ", ".join([*map(str, choices), *(m.__name__ for m in members if isinstance(m, type))])
    raise ValueError(f"{name}={text} is not one of: {kinds}")


def _literal(text: str):
    """A number, True, False or None where the text is one; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _nearest(name: str, names) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}"
