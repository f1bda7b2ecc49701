import dataclasses
from typing import Literal

import pytest

from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.lab.methods import METHODS, Peer, parse_methods, split, typed


def test_every_method_is_made_of_flags_that_exist():
    fields = {field.name for field in dataclasses.fields(BaseTrainConfig)}
    for name, flags in METHODS.items():
        assert set(flags) <= fields, name
        BaseTrainConfig(**flags)


def test_dense_comes_first_and_once():
    assert [m.label for m in parse_methods("factored-power,dense")] == ["dense", "factored-power"]
    assert [m.label for m in parse_methods("")] == ["dense"]
    tuned, other = parse_methods("dense:momentum=0.9,dense:matrix_lrs=0.1|0.2")
    assert (tuned.label, tuned.rates) == ("dense", (0.1, 0.2))
    assert other.label == "dense:momentum=0.9"


def test_overrides_have_the_types_of_the_flags():
    spec = (
        "factored-tangent:streaming_rank_k=16:warm_start_decay=1:trust-scaling=True:probes=4:"
        "target_layers=[c_fc,c_proj]:grad_clip=1:muon_adjust_lr=spectral"
    )
    (method,) = parse_methods(spec)[1:]
    assert method.flags == {
        **METHODS["factored-tangent"],
        "streaming_rank_k": 16,
        "streaming_warm_start_decay": 1.0,
        "streaming_trust_scaling": True,
        "streaming_probes": 4,
        "streaming_target_layers": "c_fc,c_proj",
        "grad_clip": 1.0,
        "muon_adjust_lr": "spectral",
    }
    assert method.label == spec and method.rank == 16
    assert BaseTrainConfig(**method.flags).streaming_config().target_layers == ("c_fc", "c_proj")


def test_ranks_go_to_low_rank_methods_without_one_of_their_own():
    methods = parse_methods("adamw,factored-power,dense-power:rank=4,galore,muon", "8,0.25")
    assert [(m.label, m.rank) for m in methods] == [
        ("dense", None),
        ("adamw", None),
        ("factored-power", 8),
        ("factored-power", 0.25),
        ("dense-power:rank=4", 4),
        ("galore", 8),
        ("galore", 0.25),
        ("muon", None),
    ]
    assert methods[3].flags["streaming_rank_k"] == 0.25
    assert [m.rank for m in parse_methods("factored-power,galore")] == [None, 32, 32]


def test_learning_rates_of_a_method_are_no_part_of_its_name():
    _, adamw, low = parse_methods("adamw:matrix_lrs=0.004|0.001,factored-power:lr=0.1:rank=4")
    assert (adamw.label, adamw.rates) == ("adamw", (0.001, 0.004))
    assert (low.label, low.rates) == ("factored-power:rank=4", (0.1,))


def test_peers_take_flags_and_options():
    (peer,) = parse_methods("dion:rank=16:momentum=0.9:mu=[0.5,0.75]:embedding_lr=0.1")[1:]
    assert peer.peer == Peer("dion", 16, {"momentum": 0.9, "mu": (0.5, 0.75)})
    assert peer.flags == {"embedding_lr": 0.1}


def test_common_overrides_are_everyones_and_yield_to_a_methods_own():
    dense, low = parse_methods("factored-power:grad_clip=2", common="grad_clip=1:warmup_steps=5")
    assert dense.flags == {"grad_clip": 1.0, "warmup_steps": 5}
    assert low.flags["grad_clip"] == 2.0 and low.flags["warmup_steps"] == 5
    dense, low = parse_methods("balanced", common="streaming_saved_inputs=full:warmup_steps=5")
    assert dense.flags == {"warmup_steps": 5} and low.flags["streaming_saved_inputs"] == "full"
    idle = parse_methods("dense:streaming_rank_k=4")[-1]
    with pytest.raises(ValueError, match="streaming_rank_k=4 has no effect without"):
        BaseTrainConfig(**idle.flags)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("factored-tangnet",), "unknown method 'factored-tangnet'.*factored-tangent"),
        (("dense-power:warm_start_deacy=1",), "unknown flag.*warm_start_decay"),
        (("dense-power:rank",), "'rank' should look like NAME=VALUE"),
        (("dense-power:probes=many",), "probes=many is not one of: int"),
        (("dense-power:gradient_mode=fast",), "gradient_mode=fast is not one of: dense"),
        (("dense-power:seed=1",), "seed is the same for all methods; use --seeds"),
        (("adamw:rank=4",), "adamw is not a method with a free rank"),
        (("dense-power:lr=-1",), "must be positive"),
        (("dense-power", "eight"), "--ranks: 'eight' is no number"),
        (("dense", "", "lr=1"), "use --matrix-lrs"),
        (("galore:enable_streaming=True",), "a peer is the optimizer"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        parse_methods(*arguments)


def test_typed_follows_the_annotation():
    assert typed("x", "none", int | None) is None
    assert typed("x", "3", int | float) == 3 and typed("x", "0.5", int | float) == 0.5
    assert typed("x", "off", bool | None) is False
    assert typed("x", "a", Literal["a", "b"]) == "a"
    assert typed("x", "1,2", str | tuple[str, ...]) == "1,2"
    with pytest.raises(ValueError, match="x=maybe is not one of: bool"):
        typed("x", "maybe", bool)


def test_brackets_protect():
    assert split("a:b=[c:d,e]:f", ":") == ["a", "b=[c:d,e]", "f"]
    assert split(" , a,,b ", ",") == ["a", "b"]
