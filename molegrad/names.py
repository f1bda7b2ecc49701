"""What the dotted names of a model's layers say: their role, and which patterns they match.

Why a module of its own: both the choice of layers (`molegrad.convert`) and the rank of a layer
(`MoleGradConfig.rank_of`) go by names. The words are those of nanochat, GPT-2 and Hugging Face
models, the parents' names included: `h.0.mlp.c_proj` is a feed-forward layer, `h.0.attn.c_proj` an
attention layer.
"""

from __future__ import annotations

import re

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


ROLES = ("ffn", "attention")


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
