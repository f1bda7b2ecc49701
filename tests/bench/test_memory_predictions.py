"""Predictions written by one call of the command, and read by another."""

import json

import pytest

from molegrad.bench import memory, memory_predictions
from molegrad.bench.memory import MemoryBenchConfig, bench
from molegrad.bench.memory_predictions import Predictions
from molegrad.bench.memory_report import CHUNKS, DENSE, PLAIN

TINY = {
    "depth": 2,
    "aspect_ratio": 32,
    "vocab": 300,
    "lengths": "32,96",
    "variants": f"{PLAIN},{CHUNKS}",
    "sequence_chunk": 16,
}
CUDA = {**TINY, "device": "cuda", "cap_gib": 4.0}


def command(**values) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def cannot(*args):
    raise AssertionError("simulated again")


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    """A file of predictions for CUDA, written without one, and what the command said; the deepest
    model is not simulated."""
    monkeypatch.setattr(memory_predictions, "largest_depth", lambda *args: (31, args[1]))
    file = tmp_path / "new" / "predictions.json"
    assert memory.main(command(**CUDA, predictions=file, predict_only=True)) == 0
    monkeypatch.setattr(memory_predictions, "simulated", cannot)
    monkeypatch.setattr(memory_predictions, "largest_depth", cannot)
    return file, capsys.readouterr().out


def test_a_file_of_predictions_needs_no_gpu_and_stands_for_the_simulation(written):
    file, text = written
    assert "written:" in text and f"deepest model at 8192 tokens under 4 GiB, {CHUNKS}: 31" in text
    read = Predictions(MemoryBenchConfig(**CUDA, predictions=str(file)))
    assert read.depth(DENSE) == read.depth(CHUNKS) == 31
    assert read.source["file"] == str(file) and read.source["torch"]
    fewer = MemoryBenchConfig(**{**CUDA, "variants": CHUNKS, "cap_gib": 0}, predictions=str(file))
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6
    assert Predictions(fewer).peak(CHUNKS, 96) == {
        key: value for key, value in rows[-1].items() if key not in ("variant", "tokens")
    }


def test_predictions_that_are_read_are_those_that_are_simulated(tmp_path, monkeypatch):
    file = str(tmp_path / "predictions.json")
    config = {**TINY, "variants": DENSE, "time_at": -1, "dtype": "float32"}
    assert memory.main(command(**config, predictions=file, predict_only=True, json=True)) == 0
    monkeypatch.setattr(memory, "measured_peaks", lambda *args: (7, 6))
    simulated = bench(MemoryBenchConfig(**config))
    monkeypatch.setattr(memory_predictions, "simulated", cannot)
    read = bench(MemoryBenchConfig(**config, predictions=file))
    for ours, theirs in zip(read["peaks"], simulated["peaks"], strict=True):
        assert ours["predicted"] == theirs["predicted"] and ours["parts"] == theirs["parts"]
        assert ours["own_passes"] == theirs["own_passes"] and "note" not in ours
    assert read["predictions"]["file"] == file


@pytest.mark.parametrize(
    "values, message",
    [
        ({"depth": 3}, r"was written for depth=2 \(now 3\): write it anew with --predict-only"),
        ({"dtype": "float32"}, r"dtype=bfloat16 \(now float32\)"),
        ({"sequence_chunk": 32}, r"sequence_chunk=16 \(now 32\), .* with .*sequence_chunk.: 16"),
        ({"cap_gib": 8.0}, r"cap_gib=4.0 \(now 8.0\)"),
        ({"lengths": "32,64,96"}, "has no dense at 64 tokens, MoleGrad at 64 tokens"),
        ({"variants": "MoleGrad + recompute"}, r"has no MoleGrad \+ recompute at 32 tokens"),
        ({"variants": PLAIN}, "has no MoleGrad's deepest model"),
    ],
)
def test_a_file_of_another_configuration_is_refused(written, values, message):
    file, _ = written
    with pytest.raises(ValueError, match=message):
        Predictions(MemoryBenchConfig(**{**CUDA, **values}, predictions=str(file)))


def test_a_file_that_holds_no_predictions_is_refused(tmp_path, capsys):
    file = tmp_path / "predictions.json"
    assert memory.main(command(**TINY, predictions=file)) == 2
    assert "No such file or directory; write it anew with --predict-only" in capsys.readouterr().out
    for text, message in (("{", "is no JSON"), ("{}", "no file of predictions")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Predictions(MemoryBenchConfig(**TINY, predictions=str(file)))


def test_ctrl_c_leaves_no_file(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(memory_predictions, "simulated", interrupted)
    file = tmp_path / "predictions.json"
    assert memory.main(command(**TINY, predictions=file, predict_only=True)) == 130
    assert "nothing is written" in capsys.readouterr().out and not file.exists()
