import json
import signal

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
    config = StepBenchConfig(methods="balanced,tangent:rank=8", **TINY)
    result = bench(config)
    dense, balanced, factored = result["rows"]
    assert [row["method"] for row in result["rows"]] == [
        "dense", "balanced", "tangent:rank=8",
    ]  # fmt: skip
    assert dense["ratio"] == 1.0 and dense["ratio_low"] == dense["ratio_high"] == 1.0
    weights = 2 * 12 * 64 * 64 * 4 / 2**20
    assert dense["gradients_mib"] == pytest.approx(weights) and balanced["gradients_mib"] == 0
    assert 0 < factored["gradients_mib"] < dense["gradients_mib"]
    assert balanced["inputs_mib"] < dense["inputs_mib"] / 3
    for row in result["rows"]:
        assert (row["sequences"], row["tokens"], row["compiled"]) == (2, 16, False)
        assert "peak_mib" not in row  # a process has one peak on the CPU
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


NO_ROOM = {
    "out of memory": torch.OutOfMemoryError("no room for two"),
    "API call": RuntimeError("torch_call_dispatcher() API call failed at library.h"),
}
ARGUMENTS = ["--depth=2", "--aspect-ratio=32", "--vocab=300", "--batches=2x16", "--steps=2"]
ARGUMENTS += ["--dtype=float32", "--json"]


def failing(monkeypatch, label: str, error: BaseException, at: int) -> None:
    """From its `at`-th training on, a method fails."""
    made = []

    class Failing(Training):
        def __init__(self, config, method, batch, compiled):
            super().__init__(config, method, batch, compiled)
            made.append(method.label)
            if method.label == label and made.count(label) >= at:
                raise error

    monkeypatch.setattr(step, "Training", Failing)


def command(capsys, *arguments) -> tuple[int, list[dict], str]:
    """The exit status, the rows and all that was printed."""
    status = step.main([*ARGUMENTS, *arguments])
    said = capsys.readouterr()
    return status, json.loads(said.out.splitlines()[-1])["rows"], said.out + said.err


@pytest.mark.parametrize("at", [1, 2], ids=["alone", "beside dense"])
@pytest.mark.parametrize("error", NO_ROOM.values(), ids=NO_ROOM)
def test_what_does_not_fit_is_a_row(monkeypatch, capsys, error, at):
    failing(monkeypatch, "exact", error, at)
    status, rows, _ = command(capsys, "--methods=exact,minimal")
    assert status == 0 and rows[1]["note"] == "out of memory" and "ratio" not in rows[1]
    assert rows[0]["ratio"] == 1.0 and rows[2]["ratio"] > 0


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch, capsys):
    failing(monkeypatch, "exact", ValueError("broken\nand more"), at=2)  # where steps are timed
    status, rows, said = command(capsys, "--methods=exact,minimal")
    assert status == 1 and rows[1]["note"] == "ValueError: broken" and "Traceback" in said
    assert rows[1]["inputs_mib"] > 0 and "ratio" not in rows[1] and rows[2]["ratio"] > 0


def test_without_dense_there_is_memory_alone(monkeypatch, capsys):
    failing(monkeypatch, "dense", torch.OutOfMemoryError("no room"), at=1)
    status, rows, _ = command(capsys, "--methods=exact")
    assert status == 0 and [row["method"] for row in rows] == ["dense", "exact"]
    assert rows[1]["note"] == "not timed, as dense failed: out of memory"
    assert rows[1]["inputs_mib"] > 0 and all("ratio" not in row for row in rows)


def test_ctrl_c_prints_what_has_been_measured(monkeypatch, capsys):
    def interrupt(config, dense, method, batch, compiled):
        if method.label == "minimal":
            signal.raise_signal(signal.SIGINT)
        return timed(config, dense, method, batch, compiled)

    timed = step._time
    monkeypatch.setattr(step, "_time", interrupt)
    assert step.main([*ARGUMENTS, "--methods=exact,minimal", "--batches=2x16,1x16"]) == 130
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["interrupted"] is True and len(result["rows"]) == 3
    assert ["ratio" in row for row in result["rows"]] == [True, True, False]
    assert all(row["inputs_mib"] > 0 for row in result["rows"])


def test_the_process_is_set_up_as_for_training_and_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with step.prepared(StepBenchConfig(device="cuda", threads=threads + 1)) as device:
        assert device.type == "cuda" and torch.get_num_threads() == threads + 1
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_num_threads() == threads
    assert torch.get_float32_matmul_precision() == precision == "highest"


def test_nothing_measured_is_said():
    assert step.shown([]) == step.shown([], markdown=True) == "no rows"


def test_the_command(capsys):
    arguments = ["--depth=2", "--aspect-ratio=32", "--vocab=300", "--batches=2x16", "--steps=2"]
    arguments += ["--methods=exact", "--dtype=float32"]
    assert step.main([*arguments, "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert len(json.loads(last)["rows"]) == 2 and any("exact" in line for line in text)
    assert json.loads(last)["attention"] == "flash_attention" in text[0].split()
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
