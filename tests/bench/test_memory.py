import json
import signal

import pytest
import torch

from molegrad import build_info
from molegrad.bench import memory, memory_predictions
from molegrad.bench.memory import MemoryBenchConfig, bench, measured_peaks, memory_targets, slope
from molegrad.bench.memory_predictions import NOT_PREDICTED, Predictions
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


@pytest.fixture
def known(result, monkeypatch):
    """What has been predicted once is not simulated again."""
    rows = {
        (row["variant"], row["tokens"]): {key: row[key] for key in NOT_PREDICTED}
        for row in result["peaks"]
    }
    monkeypatch.setattr(Predictions, "peak", lambda self, *of: rows[of])


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


def test_the_result_says_which_kernels_ran(result):
    assert result["attention"] == "flash_attention" and result["predictions"] is None
    assert result["config"]["attention"] == "auto" and "interrupted" not in result


def row(variant, tokens, measured, predicted=100):
    fits = {"measured_to_predicted": measured / predicted} if measured else {}
    return {"variant": variant, "tokens": tokens, "measured": measured, **fits}


SIZES = {"depth": 12, "aspect_ratio": 64, "vocab": 32768}


def on_gpu(**values) -> dict:
    whole = {
        "config": {"device": "cuda", "cap_gib": 32.0} | SIZES,
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
            {
                "what": "deepest model",
                "variant": CHUNKS,
                "depth": 30,
                "predicted_depth": 31,
                "tried": [31, 30],
                "trains": True,
            },
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
    assert len(memory_targets(on_gpu(peaks=[], slopes=[], times=[], capped=[]))) == 6
    assert other[0]["result"] == "not measured" and "4096 tokens: 0.45" in other[0]["note"]


@pytest.mark.parametrize("name", ["depth", "aspect_ratio", "vocab"])
def test_smaller_models_measure_no_target(name):
    config = {"device": "cuda", "cap_gib": 32.0} | SIZES
    rows = memory_targets(on_gpu(config=config | {name: config[name] // 2}))
    assert {row["result"] for row in rows} == {"not measured"}


def test_that_dense_trains_at_65536_tokens_meets_no_target():
    only = [{"what": "65536 tokens", "variant": DENSE, "trains": True}]
    assert memory_targets(on_gpu(capped=only))[4]["result"] == "not measured"


def test_targets_of_what_trains_not_and_of_what_failed():
    deepest = {"what": "deepest model", "variant": CHUNKS, "depth": 0, "predicted_depth": 31}

    def target(**values):
        return memory_targets(on_gpu(capped=[{**deepest, **values}]))[5]

    neither = target(tried=[31, 30], trains=False)
    assert neither["result"] == "not met" and neither["note"] == f"{CHUNKS}: no d31 or d30 trains"
    failed = target(tried=[31], trains=None, note="RuntimeError: broken")
    assert failed["result"] == "not measured" and failed["note"].endswith("RuntimeError: broken")
    unknown = [{"what": "65536 tokens", "variant": CHUNKS, "trains": None}]
    assert memory_targets(on_gpu(capped=unknown))[4]["result"] == "not measured"


ERRORS = {
    "out of memory": torch.OutOfMemoryError("no room"),
    "API call": RuntimeError("torch_call_dispatcher() API call failed at library.h"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_a_row(known, monkeypatch, error):
    true = memory._training

    def limited(config, name, tokens, depth=0):
        if tokens > 32 and name == DENSE:
            raise error
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


def test_what_fails_is_a_row_and_the_rest_goes_on(known, monkeypatch, capsys):
    def failing(config, name, tokens, depth=0):
        if (name, tokens) == (DENSE, 96):
            raise RuntimeError("broken\nand more")
        return 9 * tokens, 8 * tokens

    monkeypatch.setattr(memory, "measured_peaks", failing)
    arguments = [f"--{k}={v}" for k, v in {**TINY, "time_at": -1}.items()]
    assert memory.main([*arguments, f"--variants={PLAIN}", "--json"]) == 1
    said = capsys.readouterr()
    rows = json.loads(said.out.splitlines()[-1])["peaks"]
    assert rows[1]["note"] == "RuntimeError: broken" and rows[1]["predicted"] > 0
    assert [row["measured"] is None for row in rows] == [False, True, False, False]
    assert "Traceback" in said.err


def test_what_cannot_be_predicted_is_measured(monkeypatch):
    def failing(settings, vocab):
        raise RuntimeError("no such op")

    monkeypatch.setattr(memory_predictions, "simulated", failing)
    result = bench(MemoryBenchConfig(variants=DENSE, **{**TINY, "time_at": -1}))
    assert [row["note"] for row in result["peaks"]] == ["RuntimeError: no such op"] * 2
    assert all(row["measured"] > 0 for row in result["peaks"])
    assert result["slopes"][0]["measured"] is None and "no such op" in shown(result)


def test_ctrl_c_prints_what_has_been_measured(known, monkeypatch, capsys):
    def interrupted(config, name, tokens, depth=0):
        if (name, tokens) == (PLAIN, 96):
            signal.raise_signal(signal.SIGINT)
        return 9 * tokens, 8 * tokens

    monkeypatch.setattr(memory, "measured_peaks", interrupted)
    arguments = [f"--{k}={v}" for k, v in TINY.items()]
    assert memory.main([*arguments, f"--variants={PLAIN}", "--json"]) == 130
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["interrupted"] is True and result["times"] == []
    assert [(r["variant"], r["tokens"]) for r in result["peaks"]] == [
        (DENSE, 32), (DENSE, 96), (PLAIN, 32),
    ]  # fmt: skip
    assert result["slopes"][0]["measured"] == 8 and result["slopes"][1]["measured"] is None


def deepest(monkeypatch, fits: int, predicted: int) -> tuple[list, list[dict]]:
    """What is tried and the rows, where models up to a depth fit."""
    tried, rows = [], []

    def peaks(config, name, tokens, depth=0):
        tried.append((tokens, depth))
        return None if depth > fits else (7, 6)

    monkeypatch.setattr(memory, "measured_peaks", peaks)
    monkeypatch.setattr(
        memory_predictions,
        "largest_depth",
        lambda config, budget, vocab: (predicted, budget) if budget == 2.5 * 2**30 else None,
    )
    config = MemoryBenchConfig(device="cuda", variants=PLAIN, cap_gib=4)
    known = [{"variant": DENSE, "tokens": 65536, "measured": None, "note": "out of memory"}]
    memory._capped(config, known, Predictions(config), rows)
    return tried, rows


def test_the_deepest_model_is_as_predicted_or_one_block_less(monkeypatch):
    tried, rows = deepest(monkeypatch, fits=6, predicted=7)
    assert tried[0] == (65536, 0) and tried[1:3] == [(8192, 7), (8192, 6)]  # dense's row is reused
    assert [r["trains"] for r in rows] == [False, True, True, True]
    assert rows[0]["note"] == "out of memory"
    deep = rows[-1]
    assert (deep["depth"], deep["predicted_depth"], deep["measured"]) == (6, 7, 7)


def test_the_deepest_model_is_tried_twice_at_most(monkeypatch):
    tried, rows = deepest(monkeypatch, fits=1, predicted=7)
    assert tried.count((8192, 7)) == tried.count((8192, 6)) == 2 and len(tried) == 5
    assert (rows[-1]["depth"], rows[-1]["trains"], rows[-1]["tried"]) == (0, False, [7, 6])


def test_a_peak_is_the_trainings_alone():
    config = MemoryBenchConfig(variants=PLAIN, **TINY)
    first = measured_peaks(config, PLAIN, 32)
    kept = torch.zeros(2**20)  # of somebody else
    again = measured_peaks(config, PLAIN, 32)
    assert again == pytest.approx(first, abs=2**16) and kept.nbytes > 2**20


def test_slope():
    assert slope([1, 2, 4], [5, 7, 11]) == pytest.approx(2.0)
    assert slope([1], [5]) is None


def test_the_command(known, capsys):
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
        ({"device": "cuda", "cap_gib": 1}, "cap_gib=1 leaves no model any room"),
        ({"attention": "fast"}, "attention=fast is not one of auto, flash"),
        ({"predict_only": True}, "name it by predictions=FILE"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        MemoryBenchConfig(**values)
