import dataclasses
import json
import re

import pytest

from molegrad import MoleGradConfig
from molegrad.config import explored_directions


def test_defaults_are_the_documented_ones():
    c = MoleGradConfig()
    assert (c.method, c.rank_k, c.sample_share, c.target_layers) == (
        "sampled",
        None,
        0.25,
        "ffn_only",
    )
    # A rank, or whatever only a method of low rank has, chooses such a method.
    for fields in ({"rank_k": 32}, {"gradient_mode": "factored"}, {"probes": 2}):
        c = MoleGradConfig(**fields)
        assert (c.method, c.rank_k, c.power_iters, c.warm_start_decay) == ("tangent", 32, 1, 0.95)
    with pytest.raises(ValueError, match="rank_k=8 has no meaning for method='sampled'"):
        MoleGradConfig(method="sampled", rank_k=8)
    assert all(f.metadata["help"] for f in dataclasses.fields(c))
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.rank_k = 3


@pytest.mark.parametrize(
    ("decay", "k", "explored"),
    [(1.0, 8, 0), (0.95, 8, 1), (0.0, 8, 8), (0.9, 100, 10), (0.5, 1, 1)],
)
def test_explored_directions(decay, k, explored):
    assert explored_directions(k, decay) == explored


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank_k": 0}, ValueError, "rank_k must be at least 1, got 0"),
        ({"rank_k": 2.0}, ValueError, "rank_k must be an integer, or a fraction between 0 and 1"),
        ({"rank_k": 0.0}, ValueError, "rank_k must be an integer, or a fraction between 0 and 1"),
        ({"rank_k": float("nan")}, ValueError, "a fraction between 0 and 1"),
        ({"rank_k": True}, TypeError, "rank_k must be an integer"),
        ({"rank_k": "8"}, TypeError, "rank_k must be an integer or a fraction, got '8'"),
        ({"rank_overrides": "attention"}, ValueError, "has 'attention', where PATTERN=RANK is"),
        ({"rank_overrides": "=4"}, ValueError, "has '=4', where PATTERN=RANK is wanted"),
        ({"rank_overrides": "ffn=x"}, ValueError, "has 'ffn=x', where PATTERN=RANK is wanted"),
        ({"rank_overrides": ("ffn=0",)}, ValueError, "the rank of 'ffn' must be at least 1, got 0"),
        ({"rank_overrides": "ffn=-8"}, ValueError, "the rank of 'ffn' must be an integer, or a"),
        ({"rank_overrides": "h.[=8"}, ValueError, "'h.[', which is no valid regular expression"),
        ({"rank_overrides": {"ffn": 8}}, TypeError, "rank_overrides must be a string such as"),
        ({"power_iters": -1}, ValueError, "power_iters must be at least 0"),
        ({"power_iters": 2}, ValueError, "power_iters=2 has no meaning for method='tangent'"),
        ({"method": "svd"}, ValueError, "one of power, tangent, sampled, projected; got 'svd'"),
        ({"gradient_mode": "sparse"}, ValueError, "gradient_mode must be one of dense, factored"),
        ({"warm_start_decay": 1.5}, ValueError, "warm_start_decay must lie between 0 and 1"),
        ({"warm_start_decay": float("nan")}, ValueError, "warm_start_decay must lie between"),
        ({"cond_max": 0.1}, ValueError, "cond_max must lie between 1"),
        ({"trust_scaling": True}, ValueError, "trust_scaling=True needs the norm estimate"),
        ({"trust_scaling": 1}, TypeError, "trust_scaling must be True or False"),
        ({"target_layers": ()}, ValueError, "target_layers is empty"),
        ({"target_layers": ("ffn_only", "c_q")}, ValueError, "mixes the group 'ffn_only'"),
        ({"target_layers": ("h.[",)}, ValueError, "no valid regular expression"),
        ({"target_layers": 3}, TypeError, "target_layers must be"),
        (
            {"energy_target": 0.9},
            ValueError,
            "energy_target=0.9 needs the norm estimate: set probe",
        ),
        ({"energy_target": 1.0, "probes": 4}, ValueError, "energy_target must be below 1"),
        ({"energy_target": -0.1}, ValueError, "energy_target must lie between 0 and 1"),
        ({"rank_interval": 0}, ValueError, "rank_interval must be at least 1"),
        ({"rank_min": 16, "rank_max": 8}, ValueError, "rank_max=8 is below rank_min=16"),
        ({"rank_budget": -1}, ValueError, "rank_budget must lie between 0"),
        ({"rank_hysteresis": 2}, ValueError, "rank_hysteresis must lie between 0 and 1"),
        ({"min_layer_utilization": -0.1}, ValueError, "min_layer_utilization must lie between"),
    ],
)
def test_bad_values_name_field_value_and_remedy(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MoleGradConfig(**fields)


def test_targets_are_normalised():
    assert MoleGradConfig(target_layers="all-linear").target_layers == "all"
    assert MoleGradConfig(target_layers="c_fc, c_proj").target_layers == ("c_fc", "c_proj")
    assert MoleGradConfig(target_layers=["c_fc"]).target_layers == ("c_fc",)


@pytest.mark.parametrize(
    ("rank_k", "shape", "rank"),
    [
        (32, (768, 3072), 32),
        (5, (8, 8), 5),
        (0.125, (768, 3072), 96),
        (0.125, (3072, 768), 96),  # of the smaller side
        (0.25, (64, 100), 16),
        (0.1, (200, 200), 24),  # 20 is half-way: upwards
        (0.1, (190, 190), 16),  # 19 is nearer to 16
        (0.001, (768, 768), 8),
        (0.125, (24, 40), 3),  # narrow layers: no multiples of 8
        (0.01, (24, 40), 1),
    ],
)
def test_a_fraction_is_a_share_of_the_smaller_side(rank_k, shape, rank):
    found = MoleGradConfig(rank_k=rank_k).rank_of(*shape)
    assert found == rank and isinstance(found, int)


def test_the_first_override_that_matches_sets_the_rank():
    c = MoleGradConfig(rank_k=32, rank_overrides=r"h.0.mlp.c_proj=8, attention=16,c_proj=0.25")
    ranks = {
        "h.0.mlp.c_proj": 8,
        "h.1.mlp.c_proj": 24,
        "h.1.attn.c_proj": 16,
        "h.1.mlp.c_fc": 32,
        "": 32,
    }
    assert {name: c.rank_of(96, 384, name) for name in ranks} == ranks
    assert c.rank_source("h.1.mlp.c_proj") == "c_proj=0.25"
    assert c.rank_source("h.1.mlp.c_fc") == "rank_k=32"
    pattern = MoleGradConfig(rank_overrides=(r"h\.(0|3)\..*=4", "mlp=12"))
    found = [pattern.rank_of(96, 96, f"h.{i}.mlp.up") for i in range(4)]
    assert found == [4, 12, 12, 4]


def test_round_trip_through_json():
    c = MoleGradConfig(target_layers=["c_fc", "w1"], rank_k=7, method="power", power_iters=2)
    assert MoleGradConfig(**json.loads(json.dumps(c.to_dict()))) == c


@pytest.mark.parametrize("rank_k", [32, 0.125])
def test_integer_and_fraction_stay_apart_in_json(rank_k):
    c = MoleGradConfig(rank_k=rank_k, rank_overrides="ffn=0.5,attention=4")
    again = MoleGradConfig(**json.loads(json.dumps(c.to_dict())))
    assert again == c and type(again.rank_k) is type(rank_k)
    assert again.rank_overrides == ("ffn=0.5", "attention=4")
