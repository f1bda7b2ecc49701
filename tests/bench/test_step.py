import json

import pytest
import torch

from molegrad.bench import step
from molegrad.bench.step import PHASES, StepBenchConfig, Training, bench
from molegrad.lab.methods import parse_methods

TINY = {
    "depth": 2,
    "aspect_ratio": 32,
    "vocab": 300,
    "batches": "2x16",
    "steps": 4,
    "dtype": "float32",
}


def test_rows_pair_every_method_with_dense():
    config = StepBenchConfig(methods="balanced,factored-tangent:rank=8", **TINY)
    result = bench(config)
    dense, balanced, factored = result["rows"]
    assert [row["method"] for row in result["rows"]] == [
        "dense", "balanced", "factored-tangent:rank=8",
    ]  # fmt: skip
    assert dense["ratio"] == 1.0 and dense["ratio_low"] == dense["ratio_high"] == 1.0
    weights = 2 * 12 * 64 * 64 * 4 / 2**20
    assert dense["gradients_mib"] == pytest.approx(weights) and balanced["gradients_mib"] == 0
    assert 0 < factored["gradients_mib"] < dense["gradients_mib"]
    assert balanced["inputs_mib"] < dense["inputs_mib"] / 3
    for row in result["rows"]:
        assert (row["sequences"], row["tokens"], row["compiled"]) == (2, 16, False)
        assert row["in_turn"] and "peak_mib" not in row  # a process has one peak on the CPU
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        parts = sum(row[f"{phase}_ms"] for phase in PHASES)
        assert 0.3 * parts < row["ms"] < 3 * parts


def test_a_step_trains():
    config = StepBenchConfig(methods="balanced", **TINY)
    for method in parse_methods(config.methods):
        training = Training(config, method, (2, 16), False)
        before = training.loss().item()
        for _ in range(12):
            seconds = training.step()
        assert training.loss().item() < before - 0.05 and len(training.seconds) == 12
        assert seconds == pytest.approx(sum(training.seconds[-1].values()))


def test_what_does_not_fit_beside_dense_follows_it(monkeypatch):
    made = []

    class Large(Training):
        def __init__(self, config, method, batch, compiled):
            super().__init__(config, method, batch, compiled)
            made.append(method.label)
            if made[-2:] == ["dense", "exact"] and made.count("exact") == 2:
                raise torch.cuda.OutOfMemoryError("no room for two")

    monkeypatch.setattr(step, "Training", Large)
    rows = bench(StepBenchConfig(methods="exact", **TINY))["rows"]
    assert [row["in_turn"] for row in rows] == [True, False]
    assert made == ["dense", "exact", "dense", "exact", "exact"]  # memory, pair, alone


def test_the_command(capsys):
    arguments = ["--depth=2", "--aspect-ratio=32", "--vocab=300", "--batches=2x16", "--steps=2"]
    arguments += ["--methods=exact", "--dtype=float32"]
    assert step.main([*arguments, "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert len(json.loads(last)["rows"]) == 2 and any("exact" in line for line in text)
    assert step.main([*arguments, "--methods=adamw"]) == 0
    assert step.main([*arguments, "--methods=galore:rank=4"]) == 2
    assert "timed by scripts.compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, message",
    [
        ({"batches": "8"}, "should look like 1x8192"),
        ({"batches": "0x8"}, "at least one sequence"),
        ({"compile": "maybe"}, "no, yes, both"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        StepBenchConfig(**values)
