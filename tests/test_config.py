import dataclasses
import json

import pytest

from molegrad import MoleGradConfig
from molegrad.config import explored_directions


def test_defaults_are_the_documented_ones():
    c = MoleGradConfig()
    assert (c.rank_k, c.power_iters, c.target_layers, c.warm_start_decay) == (
        32,
        1,
        "ffn_only",
        0.95,
    )
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
        ({"rank_k": 2.0}, TypeError, "rank_k must be an integer, got 2.0"),
        ({"rank_k": True}, TypeError, "rank_k must be an integer"),
        ({"power_iters": -1}, ValueError, "power_iters must be at least 0"),
        ({"power_iters": 2}, ValueError, "power_iters=2 has no meaning for method='tangent'"),
        ({"method": "svd"}, ValueError, "method must be one of power, tangent; got 'svd'"),
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
        ({"min_layer_utilization": -0.1}, ValueError, "min_layer_utilization must lie between"),
    ],
)
def test_bad_values_name_field_value_and_remedy(fields, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        MoleGradConfig(**fields)


def test_targets_are_normalised():
    assert MoleGradConfig(target_layers="all-linear").target_layers == "all"
    assert MoleGradConfig(target_layers="c_fc, c_proj").target_layers == ("c_fc", "c_proj")
    assert MoleGradConfig(target_layers=["c_fc"]).target_layers == ("c_fc",)


def test_round_trip_through_json():
    c = MoleGradConfig(target_layers=["c_fc", "w1"], rank_k=7, method="power", power_iters=2)
    assert MoleGradConfig(**json.loads(json.dumps(c.to_dict()))) == c
