import math

import pytest
import torch

from molegrad import MoleGradConfig
from molegrad.monitor import aggregate, layer_metrics
from molegrad.monitor.metrics import METRICS
from molegrad.optim import Muon, matrix_param_groups, other_params
from tests.models import perceptron


def trained(mode, method="tangent", probes=8):
    config = MoleGradConfig(
        rank_k=4, target_layers="all", gradient_mode=mode, method=method, probes=probes
    )
    model = perceptron(config)
    groups = matrix_param_groups(model)
    optimizers = [Muon(groups), torch.optim.AdamW(other_params(model, groups))]
    torch.manual_seed(5)
    x = torch.randn(200, 24)
    for _ in range(3):
        model.zero_grad()
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


@pytest.mark.parametrize("method", ["tangent", "power"])
@pytest.mark.parametrize("mode", ["dense", "factored"])
def test_every_metric_of_every_layer(mode, method):
    model, optimizers = trained(mode, method)
    metrics = layer_metrics(model, optimizers)
    assert list(metrics) == ["0", "2"]
    for values in metrics.values():
        assert tuple(values) == METRICS
        assert 0 < values["energy_capture"] <= 1
        assert values["trust_factor"] == 1 and values["condition_number"] >= 1
        assert 0 <= values["subspace_drift"] <= 1
    dense, sketches = 4 * 24 * 40, 4 * (24 + 40) * 12
    expected = 0 if mode == "dense" else (dense - sketches) / 2**20
    assert metrics["0"]["memory_saved_mb"] == pytest.approx(expected)
    total = aggregate(metrics)
    assert total["memory_saved_mb"] == sum(m["memory_saved_mb"] for m in metrics.values())
    assert total["energy_capture"] == pytest.approx(
        sum(m["energy_capture"] for m in metrics.values()) / 2
    )


def test_unknown_is_nan_and_no_layers_is_empty():
    model, optimizers = trained("dense", probes=0)
    assert math.isnan(layer_metrics(model, optimizers)["0"]["energy_capture"])
    assert layer_metrics(torch.nn.Linear(2, 2)) == {}
    assert math.isnan(aggregate({})["energy_capture"]) and aggregate({})["memory_saved_mb"] == 0
