import dataclasses
import json
import re

import pytest

from molegrad import Exact, LowRank, MoleGradConfig, Sampled
from molegrad.config import PRESETS
from molegrad.estimators.lowrank_sums import explored_directions


def test_the_default_is_the_method_that_the_project_is_named_for():
    c, e = MoleGradConfig(), MoleGradConfig().estimator
    assert (c.method, c.gradient_mode, c.target_layers) == ("power", "grad", "ffn_only")
    assert (e.power_iters, e.warm_start_decay, e.rank_of(768, 3072)) == (1, 0.95, 32)
    assert MoleGradConfig.of(rank_k=8).method == "power"
    assert all(f.metadata["help"] for f in (*dataclasses.fields(c), *dataclasses.fields(e)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.seed = 3


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
        ({"rank_k": float("nan")}, ValueError, "a fraction between 0 and 1"),
        ({"rank_k": True}, TypeError, "rank_k must be an integer"),
        ({"rank_k": "8"}, TypeError, "rank_k must be an integer or a fraction, got '8'"),
        ({"rank_overrides": "attention"}, ValueError, "has 'attention', where PATTERN=VALUE is"),
        ({"rank_overrides": "=4"}, ValueError, "has '=4', where PATTERN=VALUE is wanted"),
        ({"rank_overrides": "ffn=x"}, ValueError, "has 'ffn=x', where PATTERN=VALUE is wanted"),
        ({"rank_overrides": ("ffn=0",)}, ValueError, "the value of 'ffn' must be at least 1"),
        ({"rank_overrides": "h.[=8"}, ValueError, "'h.[', which is no valid regular expression"),
        ({"rank_overrides": {"ffn": 8}}, TypeError, "rank_overrides must be a string such as"),
        ({"power_iters": -1}, ValueError, "power_iters must be at least 0"),
        ({"power_iters": 10**6}, ValueError, "power_iters must be at most 1000"),
        (
            {"power_iters": 2, "method": "tangent"},
            ValueError,
            "power_iters=2 is for method='power'",
        ),
        ({"method": "svd"}, ValueError, "method must be one of power, tangent, exact, sampled"),
        (
            {"gradient_mode": "dense"},
            ValueError,
            "gradient_mode must be one of grad, momentum, fac",
        ),
        ({"gradient_mode": "momentum"}, ValueError, "not for method='power': choose 'exact' or"),
        (
            {"gradient_mode": "factors", "method": "exact"},
            ValueError,
            "not for method='exact': choose 'power' or 'tangent'",
        ),
        ({"warm_start_decay": 1.5}, ValueError, "warm_start_decay must lie between 0 and 1"),
        ({"warm_start_decay": float("nan")}, ValueError, "warm_start_decay must lie between"),
        ({"cond_max": 0.1}, ValueError, "cond_max must lie between 1"),
        ({"trust_scaling": True}, ValueError, "trust_scaling=True needs the norm estimate"),
        ({"trust_scaling": 1}, TypeError, "trust_scaling must be True or False"),
        (
            {"trust_scaling": True, "probes": 2, "gradient_mode": "factors"},
            ValueError,
            "needs method='tangent', got 'power'",
        ),
        ({"target_layers": ()}, ValueError, "target_layers is empty"),
        ({"target_layers": ("ffn_only", "c_q")}, ValueError, "mixes the group 'ffn_only'"),
        ({"target_layers": ("h.[",)}, ValueError, "no valid regular expression"),
        ({"target_layers": 3}, TypeError, "target_layers must be"),
        ({"energy_target": 0.9}, ValueError, "energy_target=0.9 needs the norm estimate"),
        ({"energy_target": 1.0, "probes": 4}, ValueError, "energy_target must be below 1"),
        ({"energy_target": -0.1}, ValueError, "energy_target must lie between 0 and 1"),
        ({"rank_interval": 0}, ValueError, "rank_interval must be at least 1"),
        ({"rank_min": 16, "rank_max": 8}, ValueError, "rank_max=8 is below rank_min=16"),
        ({"rank_budget": -1}, ValueError, "rank_budget must lie between 0"),
        ({"min_layer_utilization": -0.1}, ValueError, "min_layer_utilization must lie between"),
        ({"products": "int4"}, ValueError, "products must be one of full, fp8"),
        ({"saved_inputs": "int4"}, ValueError, "saved_inputs must be one of full, fp8"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        (
            {"method": "sampled", "sampling_fraction": 0},
            ValueError,
            "sampling_fraction must be abo",
        ),
        ({"method": "sampled", "sampling_fraction": 1.5}, ValueError, "above 0 and at most 1"),
        (
            {"method": "sampled", "sampling_overrides": "ffn=2"},
            ValueError,
            "the value of 'ffn' must be above 0 and at most 1",
        ),
        ({"method": "sampled", "sampling_block": 0}, ValueError, "sampling_block must be at least"),
        (
            {"method": "sampled", "rank_k": 8},
            TypeError,
            "rank_k=8 is no option of method='sampled': it is for method='power' or 'tangent'",
        ),
        ({"sampling_fraction": 0.5}, TypeError, "it is for method='sampled'"),
        ({"rank": 5}, TypeError, "rank=5 is no option of method='power': there are cond_max"),
    ],
)
def test_bad_values_name_field_value_and_remedy(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MoleGradConfig.of(**fields)


def test_options_of_the_estimator_belong_to_the_estimator():
    with pytest.raises(TypeError, match="estimator must be an Estimator such as LowRank"):
        MoleGradConfig("power")
    nested = MoleGradConfig(estimator=LowRank(rank_k=8, method="tangent"), gradient_mode="factors")
    assert nested == MoleGradConfig.of(method="tangent", rank_k=8, gradient_mode="factors")
    assert MoleGradConfig(estimator=LowRank(products="fp8")).saved_inputs == "fp8"


def test_targets_are_normalised():
    assert MoleGradConfig(target_layers="all-linear").target_layers == "all"
    assert MoleGradConfig(target_layers="c_fc, c_proj").target_layers == ("c_fc", "c_proj")
    assert MoleGradConfig(target_layers=["c_fc"]).target_layers == ("c_fc",)


@pytest.mark.parametrize(
    ("rank_k", "shape", "rank"),
    [
        (None, (768, 3072), 32),
        (None, (96, 3072), 24),  # a quarter of the smaller side
        (None, (2, 3), 1),
        (5, (8, 8), 5),
        (0.125, (768, 3072), 96),
        (0.125, (3072, 768), 96),  # of the smaller side
        (0.1, (200, 200), 24),  # 20 is half-way: upwards
        (0.1, (190, 190), 16),  # 19 is nearer to 16
        (0.001, (768, 768), 8),
        (0.125, (24, 40), 3),  # narrow layers: no multiples of 8
        (0.01, (24, 40), 1),
    ],
)
def test_a_rank_is_a_number_or_a_share_of_the_smaller_side(rank_k, shape, rank):
    found = LowRank(rank_k=rank_k).rank_of(*shape)
    assert found == rank and isinstance(found, int)


def test_the_first_override_that_matches_sets_the_rank():
    e = LowRank(rank_k=32, rank_overrides=r"h.0.mlp.c_proj=8, attention=16,c_proj=0.25")
    ranks = {
        "h.0.mlp.c_proj": 8,
        "h.1.mlp.c_proj": 24,
        "h.1.attn.c_proj": 16,
        "h.1.mlp.c_fc": 32,
        "": 32,
    }
    assert {name: e.rank_of(96, 384, name) for name in ranks} == ranks
    assert e.describe(96, 384, "h.1.mlp.c_proj") == "rank 24 (c_proj=0.25)"
    assert e.describe(96, 384, "h.1.mlp.c_fc") == "rank 32 (rank_k=32)"
    pattern = LowRank(rank_overrides=(r"h\.(0|3)\..*=4", "mlp=12"))
    found = [pattern.rank_of(96, 96, f"h.{i}.mlp.up") for i in range(4)]
    assert found == [4, 12, 12, 4]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_layers": ["c_fc", "w1"], "rank_k": 7, "power_iters": 2},
        {"rank_k": 0.125, "rank_overrides": "ffn=0.5,attention=4", "method": "tangent"},
        {"method": "exact", "gradient_mode": "momentum", "momentum_dtype": "int8"},
        {"method": "sampled", "sampling_overrides": "attention=1"},
    ],
)
def test_round_trip_through_json(fields):
    c = MoleGradConfig.of(**fields)
    again = MoleGradConfig.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again == c and again.flat() == c.flat()


def test_presets_and_changes():
    kinds = [type(MoleGradConfig.preset(name).estimator) for name in PRESETS]
    assert kinds == [LowRank, LowRank, Exact, Sampled, Sampled]
    assert MoleGradConfig.preset("lowrank-grad") == MoleGradConfig()
    assert MoleGradConfig.preset("lowrank") == MoleGradConfig(gradient_mode="factors")
    half = MoleGradConfig.preset("balanced", sampling_fraction=0.5)
    assert half.estimator.sampling_fraction == 0.5 and half.momentum_dtype == "bfloat16"
    # Another estimator keeps what all share.
    exact = MoleGradConfig.preset("balanced", method="exact")
    assert exact == MoleGradConfig.preset("exact") == half.changed(method="exact")
    assert exact.changed(seed=3).seed == 3
    with pytest.raises(ValueError, match="no preset 'best': choose among lowrank, lowrank-grad, "):
        MoleGradConfig.preset("best")
