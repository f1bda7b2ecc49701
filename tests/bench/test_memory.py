import json

import pytest
import torch

from molegrad import build_info
from molegrad.bench import memory
from molegrad.bench.memory import MemoryBenchConfig, bench, measured_peaks, memory_targets, slope
from molegrad.bench.memory_report import CHUNKS, DENSE, PLAIN, shown

TINY = {
    "depth": 2,
    "aspect_ratio": 32,
    "vocab": 300,
    "lengths": "32,96",
    "sequence_chunk": 16,
    "dtype": "float32",
    "steps": 2,
    "time_at": 32,
}
FEW = f"{PLAIN},{CHUNKS}"
# References make temporaries; of so few tokens they are much of a peak, and not all are predicted.
NATIVE = build_info()["native"]
NEAR = 0.03 if NATIVE else 0.1


@pytest.fixture(scope="module")
def result() -> dict:
    return bench(MemoryBenchConfig(variants=FEW, **TINY))


def test_measured_and_predicted_peaks_agree(result):
    assert [(r["variant"], r["tokens"]) for r in result["peaks"]] == [
        (name, tokens) for name in (DENSE, PLAIN, CHUNKS) for tokens in (32, 96)
    ]
    for row in result["peaks"]:
        assert row["measured_to_predicted"] == pytest.approx(1.0, abs=NEAR)
        assert row["measured_passes"] == pytest.approx(row["predicted_passes"], rel=NEAR)
        assert row["measured_passes"] <= 1.01 * row["measured"]
        assert row["measured"] > 2**20 and sum(row["parts"].values()) == row["predicted"]


def test_slopes_are_of_the_passes(result):
    dense, plain, chunks = result["slopes"]
    rows = [r for r in result["peaks"] if r["variant"] == DENSE]
    rise = (rows[1]["measured_passes"] - rows[0]["measured_passes"]) / 64
    assert dense["measured"] == pytest.approx(rise)
    assert dense["measured_to_dense"] == dense["rest_to_dense"] == 1.0
    assert chunks["measured"] < plain["measured"]
    assert plain["measured"] < dense["measured"] or not NATIVE
    for row in result["slopes"]:
        assert row["rest"] == pytest.approx(row["measured"] - row["own"]) and row["own"] > 0
        assert row["measured"] == pytest.approx(row["predicted"], rel=0.1 if NATIVE else 0.15)


def test_steps_are_timed_against_dense_and_chunks_against_none(result):
    assert [(t["variant"], t["reference"]) for t in result["times"]] == [
        (PLAIN, DENSE), (CHUNKS, DENSE), (CHUNKS, PLAIN),
    ]  # fmt: skip
    for row in result["times"]:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert 0.2 < row["ms"] / row["reference_ms"] / row["ratio"] < 5


def test_another_device_measures_no_target_and_says_what_it_found(result):
    assert {row["result"] for row in result["targets"]} == {"not measured"}
    notes = [row["note"] for row in result["targets"]]
    assert "cpu, depth 2, 96 tokens: 0." in notes[0] and "cpu, depth 2, 32 tokens" in notes[2]
    text = shown(result)
    assert "measured / predicted" in text and "without stream, K, V" in text


def row(variant, tokens, measured, predicted=100):
    fits = {"measured_to_predicted": measured / predicted} if measured else {}
    return {"variant": variant, "tokens": tokens, "measured": measured, **fits}


def on_gpu(**values) -> dict:
    whole = {
        "config": {"device": "cuda", "depth": 12, "cap_gib": 32.0},
        "peaks": [row(DENSE, 8192, 100), row(PLAIN, 8192, 80, 80), row(CHUNKS, 8192, 45, 41)],
        "slopes": [
            {"variant": DENSE, "rest_to_dense": 1.0},
            {"variant": CHUNKS, "rest_to_dense": 0.11},
            {"variant": PLAIN, "rest_to_dense": None},
        ],
        "times": [{"variant": CHUNKS, "reference": PLAIN, "tokens": 8192, "ratio": 1.2}],
        "capped": [
            {"what": "65536 tokens", "variant": DENSE, "trains": False},
            {"what": "65536 tokens", "variant": CHUNKS, "trains": True},
            {"what": "deepest model", "variant": CHUNKS, "depth": 30, "predicted_depth": 31},
        ],
    }
    return {**whole, **values}


def test_targets_of_a_gpu():
    rows = memory_targets(on_gpu())
    assert [r["result"] for r in rows] == ["met", "not met", "met", "met", "met", "not met"]
    assert rows[0]["measured"] == 0.45 and rows[0]["note"] == CHUNKS
    assert rows[3]["measured"] == pytest.approx(45 / 41 - 1)
    assert rows[4]["measured"] == 65536 and rows[5]["note"].endswith("d30 trains")


def test_targets_of_what_did_not_fit_or_was_not_asked_for():
    rows = memory_targets(on_gpu(peaks=[row(DENSE, 8192, None)], slopes=[], times=[], capped=[]))
    assert {r["result"] for r in rows} == {"not measured"}
    failed = [{"what": "65536 tokens", "variant": CHUNKS, "trains": False}]
    assert memory_targets(on_gpu(capped=failed))[4]["result"] == "not met"
    other = memory_targets(on_gpu(peaks=[row(DENSE, 4096, 100), row(CHUNKS, 4096, 45)]))
    assert other[0]["result"] == "not measured" and "4096 tokens: 0.45" in other[0]["note"]


def test_what_does_not_fit_is_a_row(monkeypatch):
    true = memory._training

    def limited(config, name, tokens, depth=0):
        if tokens > 32 and name == DENSE:
            raise torch.cuda.OutOfMemoryError("no room")
        return true(config, name, tokens, depth)

    monkeypatch.setattr(memory, "_training", limited)
    result = bench(MemoryBenchConfig(variants=PLAIN, **{**TINY, "time_at": 96}))
    assert result["peaks"][1]["note"] == "out of memory"
    assert result["peaks"][1]["measured"] is None and result["peaks"][1]["predicted"] > 0
    dense, plain = result["slopes"]
    assert dense["measured"] is None and plain["measured"] > 0
    assert plain["measured_to_dense"] is None
    assert result["times"][0]["note"].startswith("out of memory")
    assert "out of memory" in shown(result)


def test_the_deepest_model_is_tried_downwards(monkeypatch):
    tried = []

    def peaks(config, name, tokens, depth=0):
        tried.append((tokens, depth))
        return None if depth > 5 else (7, 6)

    monkeypatch.setattr(memory, "measured_peaks", peaks)
    monkeypatch.setattr(memory, "largest_depth", lambda config, budget, vocab: (7, budget))
    config = MemoryBenchConfig(device="cuda", variants=PLAIN, cap_gib=1)
    rows = memory._capped(config)
    assert [r["trains"] for r in rows] == [True] * 4
    assert tried[:2] == [(65536, 0)] * 2 and tried[2:5] == [(8192, 7), (8192, 6), (8192, 5)]
    deepest = rows[-1]
    assert (deepest["depth"], deepest["predicted_depth"], deepest["measured"]) == (5, 7, 7)


def test_a_peak_is_the_trainings_alone():
    config = MemoryBenchConfig(variants=PLAIN, **TINY)
    first = measured_peaks(config, PLAIN, 32)
    kept = torch.zeros(2**20)  # of somebody else
    again = measured_peaks(config, PLAIN, 32)
    assert again == pytest.approx(first, abs=2**16) and kept.nbytes > 2**20


def test_slope():
    assert slope([1, 2, 4], [5, 7, 11]) == pytest.approx(2.0)
    assert slope([1], [5]) is None


def test_the_command(capsys):
    arguments = [f"--{k}={v}" for k, v in {**TINY, "time_at": -1}.items()]
    assert memory.main([*arguments, f"--variants={PLAIN}", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["times"] == [] and any("| target |" in line for line in text)
    if not torch.cuda.is_available():
        assert memory.main(["--device=cuda"]) == 2
        assert "torch finds no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lengths": "64"}, "lengths=64 needs two lengths"),
        ({"lengths": "a,b"}, "should look like 2048,8192"),
        ({"variants": "magic"}, "variants=magic is not among dense"),
        ({"cap_gib": 32}, "limits a GPU's memory"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        MemoryBenchConfig(**values)
