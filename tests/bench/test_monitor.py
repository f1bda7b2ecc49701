import json
import time

import pytest

from molegrad.bench import monitor
from molegrad.bench.monitor import MonitorBenchConfig, WatchedSteps, bench, shown
from molegrad.bench.step import Training
from molegrad.gpt.train.logger import read_metrics
from molegrad.lab.methods import parse_methods
from molegrad.monitor import Instruments

TINY = {
    "depth": 2,
    "aspect_ratio": 32,
    "vocab": 300,
    "batch": "2x16",
    "every": 3,
    "windows": 4,
    "shadows": 2,
    "dtype": "float32",
}


def test_a_row_of_every_method():
    result = bench(MonitorBenchConfig(methods="balanced,tangent:rank=8", **TINY))
    assert [row["method"] for row in result["rows"]] == ["balanced", "tangent:rank=8"]
    for row in result["rows"]:
        assert row["cost_low"] <= row["cost"] <= row["cost_high"]
        assert row["own"] > 0 and row["bare_ms"] > 0 and row["line_bytes"] > 1000
        expected = row["shadow_ms"] / 250 / row["bare_ms"]
        assert row["shadow_cost"] == pytest.approx(expected, rel=0.9)
    assert "balanced" in shown(result["rows"]) and "shadow" in shown(result["rows"], markdown=True)
    without = bench(MonitorBenchConfig(methods="exact", **{**TINY, "shadows": 0}))["rows"][0]
    assert "shadow_cost" not in without and "shadow" not in shown([without])


@pytest.mark.parametrize("phase", ["backward_done", "read"])
def test_slow_instruments_are_seen(monkeypatch, phase):
    pause, original = 0.05, getattr(Instruments, phase)

    def slow(self):
        if self._metrics_due:
            time.sleep(pause)
        return original(self)

    config = MonitorBenchConfig(methods="exact", **{**TINY, "windows": 5, "shadows": 0})
    monkeypatch.setattr(Instruments, phase, slow)
    row = bench(config)["rows"][0]
    share = 1e3 * pause / (config.every * row["bare_ms"])
    assert row["read_ms"] > 45 and row["cost"] > 0.6 * share and row["own"] > 0.6 * share


def test_the_watched_training_trains_and_logs_like_a_run(tmp_path):
    config = MonitorBenchConfig(methods="tangent:rank=8", **TINY)
    method = parse_methods(config.methods)[1]
    steps = WatchedSteps(Training(config.training, method, (2, 16), False), tmp_path)
    before = steps.training.loss().item()
    with steps.logger:
        for number in range(1, 13):
            steps.step(metrics=number % 4 == 0, shadow=number == 8)
    assert steps.training.loss().item() < before - 0.05
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 13))
    read = [r["step"] for r in records if "streaming/subspace_quality" in r]
    assert read == [4, 8, 12]
    layer = "layer/transformer.h.0.mlp.c_fc/layer_memory_usage"
    assert [r["step"] for r in records if layer in r] == [4, 8, 12]
    assert [r["step"] for r in records if "shadow/cosine" in r] == [8]
    assert all(r["time/forward_ms"] > 0 and r["time/backward_ms"] > 0 for r in records)


def test_bare_and_watched_steps_do_the_same():
    config = MonitorBenchConfig(methods="exact", **TINY)
    losses = []

    class Noted(Training):
        def loss(self):
            loss = super().loss()
            if loss.requires_grad:
                losses.append(loss.item())
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "Training", Noted)
        bench(MonitorBenchConfig(methods="exact", **{**TINY, "windows": 1, "shadows": 0}))
    assert len(losses) == 2 * 2 * config.every
    assert losses[0] == losses[1] and losses[-1] == losses[-2] < losses[0]


def test_the_command(capsys):
    arguments = [
        f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "windows": 1}.items()
    ]
    assert monitor.main([*arguments, "--methods=exact", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["rows"][0]["method"] == "exact"
    assert any("exact" in line for line in text)
    assert monitor.main([*arguments, "--methods=adamw"]) == 2
    assert "only methods with converted layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, message",
    [
        ({"every": 0}, "every must be at least 1"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"shadow_every": 0}, "shadow_every must be at least 1"),
        ({"shadows": -1}, "shadows must not be negative"),
        ({"batch": "8"}, "should look like 1x8192"),
        ({"batch": "8x16,4x16"}, "a single one"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        MonitorBenchConfig(**values)
