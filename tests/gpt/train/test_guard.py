"""The guard finds the parameter and the step in which a gradient stopped being finite."""

import json
import math

import pytest
import torch

from molegrad import MoleGradConfig, convert
from molegrad.gpt.train.guard import REPORT, NonFiniteError, NonFiniteGuard, stop
from tests.gpt.model.test_gpt import small, stirred, tokens


def backward(model):
    model.zero_grad()
    model(*tokens()).backward()


def test_finite_gradients_pass():
    model = stirred(small())
    guard = NonFiniteGuard(model)
    for step in range(3):
        backward(model)
        assert bool(guard.update(step))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_bad_step_and_parameter_are_named(value, tmp_path):
    model = stirred(small())
    guard = NonFiniteGuard(model)
    for step in range(5):
        backward(model)
        if step >= 2:
            model.transformer["h"][1].mlp.c_fc.weight.grad[3, 4] = value
        if step >= 3:
            model.lm_head.weight.grad.fill_(math.nan)
        ok = guard.update(step)
        guard.losses.append((step, 4.0 - step / 10))
    assert not bool(ok)
    report = guard.report(4, math.nan, {"matrix": 0.02})
    assert report["first_step"] == 2 and report["loss"] == "nan"
    assert [(g["name"], g["first_step"]) for g in report["gradients"]] == [
        ("transformer.h.1.mlp.c_fc.weight", 2),
        ("lm_head.weight", 3),
    ]
    assert report["gradients"][0]["nan" if math.isnan(value) else "inf"] == 1
    assert report["weights"] == [] and report["learning_rates"] == {"matrix": 0.02}
    with pytest.raises(NonFiniteError, match=r"h\.1\.mlp\.c_fc\.weight.*first at step 2"):
        stop(report, tmp_path)
    assert json.loads((tmp_path / REPORT).read_text()) == report


def test_weights_are_looked_at_too():
    model = stirred(small())
    with torch.no_grad():
        model.transformer["h"][0].attn.c_q.weight[0, 0] = math.nan
    report = NonFiniteGuard(model).report(0, math.nan, {})
    assert [w["name"] for w in report["weights"]] == ["transformer.h.0.attn.c_q.weight"]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"rank_k": 4, "gradient_mode": "factors"}, "basis_u"),
        ({"method": "exact", "gradient_mode": "momentum"}, "momentum"),
        ({"method": "exact", "gradient_mode": "momentum", "momentum_dtype": "int8"}, "momentum"),
    ],
)
def test_gradients_that_go_elsewhere_are_watched_there(values, name):
    model = stirred(small())
    convert(model, MoleGradConfig.of(**values))
    guard = NonFiniteGuard(model)
    backward(model)
    layer = model.transformer["h"][0].mlp.c_fc
    where = getattr(layer, name)
    where = layer.momentum_scale if where.dtype == torch.int8 else where
    assert bool(guard.update(0))
    (where.grad if name == "basis_u" else where.detach()).view(-1)[0] = math.nan
    assert not bool(guard.update(1))
    (entry,) = guard.report(1, 1.0, {})["gradients"]
    assert entry["name"] == f"transformer.h.0.mlp.c_fc.{name}" and entry["first_step"] == 1
