import json
import math

import pytest
import torch
from torch import nn

from molegrad import MoleGradConfig, convert
from molegrad.monitor import Health, HealthError, Instruments
from molegrad.monitor.instruments import HEALTH_RECORDS, SHADOW_RECORDS, read_records


class Shadow:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def begin(self):
        self.told.append("begin")

    def observe(self, loss):
        self.told.append(loss().item())

    def compare(self):
        self.told.append("compare")

    def read(self):
        return {"a": {"cosine": 0.5, "best": math.nan}, "b": {"cosine": 1.0, "best": 0.25}}

    def records(self):
        return [{"layer": "a", "spectrum": [2.0, math.nan]}]


def model(mode="grad") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))
    config = MoleGradConfig.of(
        rank_k=4, method="tangent", gradient_mode=mode, target_layers=r".*", probes=2
    )
    return convert(net, config)


def step(instruments, net, x, number, metrics=False, shadow=False) -> dict:
    instruments.begin(number, metrics=metrics, shadow=shadow)
    for part in x.chunk(2):
        instruments.micro_batch(lambda part=part: net(part).square().mean() / 2)
        with instruments.timer("backward"):
            (net(part).square().mean() / 2).backward()
    instruments.backward_done()
    net.zero_grad(set_to_none=True)
    instruments.timer.step()
    return instruments.read()


def test_nothing_is_done_where_nothing_is_due(tmp_path):
    net, shadow = model(), Shadow()
    instruments = Instruments(net, shadow=shadow, folder=tmp_path)
    assert step(instruments, net, torch.randn(16, 32), 1) == {}
    assert shadow.told == [] and list(tmp_path.iterdir()) == []


def test_metrics_come_aggregated_and_by_layer(tmp_path):
    net = model()
    values = step(Instruments(net), net, torch.randn(16, 32), 1, metrics=True)
    layers = [values[f"layer/{name}/energy_capture"] for name in ("0", "2")]
    assert values["streaming/energy_capture"] == pytest.approx(sum(layers) / 2)
    assert all(math.isfinite(value) for value in values.values())
    short = step(Instruments(net, per_layer=False), net, torch.randn(16, 32), 1, metrics=True)
    assert short.keys() == {key for key in values if not key.startswith("layer/")}


def test_a_shadow_sees_every_micro_batch_and_its_spectra_go_to_a_file(tmp_path):
    net, shadow = model(), Shadow()
    instruments = Instruments(net, shadow=shadow, folder=tmp_path)
    x = torch.randn(16, 32)
    values = step(instruments, net, x, 7, shadow=True)
    first, second = (float(net(part).square().mean() / 2) for part in x.chunk(2))
    assert shadow.told == ["begin", pytest.approx(first), pytest.approx(second), "compare"]
    assert values == {
        "shadow/cosine": 0.75,
        "shadow/best": 0.25,
        "shadow/a/cosine": 0.5,
        "shadow/b/cosine": 1.0,
        "shadow/b/best": 0.25,
    }
    assert read_records(tmp_path / SHADOW_RECORDS) == [
        {"step": 7, "layer": "a", "spectrum": [2.0, "nan"]}
    ]
    assert step(instruments, net, x, 8) == {} and len(shadow.told) == 4


def test_findings_are_counted_and_written_before_the_run_ends(tmp_path):
    net = model()
    health = Health(net, actions="raise", say=lambda line: None)
    instruments = Instruments(net, health=health, folder=tmp_path)
    x = torch.randn(16, 32)
    assert step(instruments, net, x, 1, metrics=True)["health/findings"] == 0
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan  # as a fault would
    with pytest.raises(HealthError, match=r"layer 0 .*NaN or Inf"):
        step(instruments, net, x, 2, metrics=True)
    found = read_records(tmp_path / HEALTH_RECORDS)
    assert {(record["step"], record["kind"]) for record in found} == {(2, "nan")}
    assert "0" in {record["layer"] for record in found}


def test_a_model_without_converted_layers_is_only_timed():
    net = nn.Linear(4, 4)
    instruments = Instruments(net)
    assert step(instruments, net, torch.randn(4, 4), 1, metrics=True) == {}
    assert instruments.timer.read()["time/backward_ms"] > 0


def test_records_of_later_steps_are_forgotten(tmp_path):
    lines = [json.dumps({"step": number}) for number in (1, 2, 3)]
    for name in (SHADOW_RECORDS, HEALTH_RECORDS):
        (tmp_path / name).write_text("\n".join(lines) + '\n{"step": 4', encoding="utf-8")
    Instruments(model(), folder=tmp_path).forget_after(2)
    for name in (SHADOW_RECORDS, HEALTH_RECORDS):
        assert [record["step"] for record in read_records(tmp_path / name)] == [1, 2]
