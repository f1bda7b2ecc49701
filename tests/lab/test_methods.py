from typing import Literal

import pytest

from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import make
from molegrad.lab.methods import METHODS, parse_methods, split, typed
from molegrad.lab.peers import Peer


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_made_of_flags_that_go_together(name):
    config = make(BaseTrainConfig, **METHODS[name])
    assert config.enable_streaming == (name not in ("dense", "adamw", "adafactor"))


def test_dense_comes_first_and_once():
    assert [m.label for m in parse_methods("lowrank,dense")] == ["dense", "lowrank"]
    assert [m.label for m in parse_methods("")] == ["dense"]
    tuned, other = parse_methods("dense:momentum=0.9,dense:matrix_lrs=0.2|0.1")
    assert (tuned.label, tuned.rates) == ("dense", (0.1, 0.2))  # rates are no part of a name
    assert other.label == "dense:momentum=0.9"


def test_changes_have_the_types_of_the_flags():
    spec = (
        "tangent:rank=16:warm_start_decay=1:trust-scaling=true:probes=4:"
        "streaming_target_layers=[c_fc,c_proj]:grad_clip=1:optimizer=adamw"
    )
    (method,) = parse_methods(spec)[1:]
    assert method.label == spec
    assert method.flags == {
        **METHODS["tangent"],
        "streaming_rank_k": 16,
        "streaming_warm_start_decay": 1.0,
        "streaming_trust_scaling": True,
        "streaming_probes": 4,
        "streaming_target_layers": "c_fc,c_proj",
        "grad_clip": 1.0,
        "optimizer": "adamw",
    }
    assert make(BaseTrainConfig, **method.flags).streaming.target_layers == ("c_fc", "c_proj")


def test_peers_take_flags_and_options():
    (peer,) = parse_methods("galore:rank=0.25:betas=[0.5,0.75]:embedding_lr=0.1")[1:]
    assert peer.peer == Peer("galore", 0.25, {"betas": (0.5, 0.75)})
    assert peer.flags == {"embedding_lr": 0.1}


def test_common_changes_are_everyones_and_yield_to_a_methods_own():
    dense, low = parse_methods("lowrank:grad_clip=2", "grad_clip=1:warmup_steps=5")
    assert dense.flags == {"grad_clip": 1.0, "warmup_steps": 5}
    assert low.flags["grad_clip"] == 2.0 and low.flags["warmup_steps"] == 5
    common = "streaming_saved_inputs=full:warmup_steps=5"
    dense, low, peer = parse_methods("balanced,dion", common)
    assert dense.flags == peer.flags == {"warmup_steps": 5}
    assert low.flags["streaming_saved_inputs"] == "full"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("lowrnk",), "unknown method 'lowrnk'.*lowrank"),
        (("lowrank:warm_start_deacy=1",), "unknown flag.*warm_start_decay"),
        (("dion:momentun=0.9",), "unknown flag 'momentun'.*momentum"),
        (("lowrank:rank",), "'rank' should look like NAME=VALUE"),
        (("lowrank:probes=many",), "probes=many is not one of: int"),
        (("lowrank:gradient_mode=fast",), "gradient_mode=fast is not one of: "),
        (("lowrank:seed=1",), "seed is the same for all methods"),
        (("lowrank:lr=-1",), "must be positive"),
        (("dense", "lr=1"), "rates of all methods are --matrix-lrs"),
        (("galore:enable_streaming=True",), "a peer, which takes dense gradients"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        parse_methods(*arguments)


def test_typed_follows_the_annotation():
    assert typed("x", "none", int | None) is None
    assert typed("x", "3", int | float) == 3 and typed("x", "0.5", int | float) == 0.5
    assert type(typed("x", "1", float)) is float and typed("x", "1", str) == "1"
    assert typed("x", "false", bool | None) is False
    assert typed("x", "a", Literal["a", "b"]) == "a"
    assert typed("x", "1,2", str | tuple[str, ...]) == "1,2"
    for text, hint in (("maybe", bool), ("1", bool), ("True", int), ("0.5", int)):
        with pytest.raises(ValueError, match=f"x={text} is not one of"):
            typed("x", text, hint)


def test_brackets_protect():
    assert split("a:b=[c:d,e]:f", ":") == ["a", "b=[c:d,e]", "f"]
    assert split(" , a,,b ", ",") == ["a", "b"]
