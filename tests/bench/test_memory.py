import json
import signal
from types import SimpleNamespace

import pytest
import torch

from molegrad import build_info
from molegrad.bench import memory
from molegrad.bench.memory import CHUNKS, MemoryBenchConfig, bench, measured_peaks, shown
from molegrad.lab.methods import parse_methods

TINY = {
    "depth": 2,
    "aspect_ratio": 32,
    "vocab": 300,
    "lengths": "32,96",
    "dtype": "float32",
}
CHUNKED = CHUNKS.format(16)
# Reference formulas make temporaries, which are not predicted and of so few tokens are much.
NATIVE = build_info()["native"]
NEAR = 0.03 if NATIVE else 0.3
ARGUMENTS = [*(f"--{k}={v}" for k, v in TINY.items()), "--methods=balanced", "--json"]


@pytest.fixture(scope="module")
def result() -> dict:
    return bench(MemoryBenchConfig(methods=f"balanced,{CHUNKED}", **TINY))


@pytest.fixture
def known(monkeypatch):
    """Nothing is simulated."""
    row = {"predicted": 100, "phase": "forward", "predicted_passes": 90, "own_passes": 9, "host": 0}
    monkeypatch.setattr(memory, "predicted_peaks", lambda *of: row)


def test_measured_and_predicted_peaks_agree(result):
    assert [(r["method"], r["tokens"]) for r in result["peaks"]] == [
        (name, tokens) for name in ("dense", "balanced", CHUNKED) for tokens in (32, 96)
    ]
    for row in result["peaks"]:
        assert row["measured_to_predicted"] == pytest.approx(1.0, abs=NEAR)
        assert row["measured_passes"] == pytest.approx(row["predicted_passes"], rel=NEAR)
        assert row["measured_passes"] <= 1.01 * row["measured"] and row["measured"] > 2**20
    assert result["attention"] == "flash_attention" and "interrupted" not in result


def test_slopes_are_of_the_passes(result):
    dense, plain, chunks = result["slopes"]
    rows = [r for r in result["peaks"] if r["method"] == "dense"]
    rise = (rows[1]["measured_passes"] - rows[0]["measured_passes"]) / 64
    own = (rows[1]["own_passes"] - rows[0]["own_passes"]) / 64
    assert dense["measured"] == pytest.approx(rise) and dense["rest"] == pytest.approx(rise - own)
    assert dense["measured_to_dense"] == dense["rest_to_dense"] == 1.0
    assert chunks["measured"] < plain["measured"]
    text = shown(result)
    assert "measured / predicted" in text and "without stream, K, V" in text


ERRORS = {
    "out of memory": torch.OutOfMemoryError("no room"),
    "API call": RuntimeError("torch_call_dispatcher() API call failed at library.h"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_a_row(known, monkeypatch, error):
    class Limited(memory.Training):
        def __init__(self, config, method, batch, compiled):
            if batch[1] > 32 and method.label == "dense":
                raise error
            super().__init__(config, method, batch, compiled)

    monkeypatch.setattr(memory, "Training", Limited)
    result = bench(MemoryBenchConfig(methods="balanced", **TINY))
    assert result["peaks"][1]["note"] == "out of memory"
    assert result["peaks"][1]["measured"] is None and result["peaks"][1]["predicted"] > 0
    dense, plain = result["slopes"]
    assert dense["measured"] is None and plain["measured"] > 0
    assert plain["measured_to_dense"] is None and "out of memory" in shown(result)


def test_what_fails_is_a_row_and_the_rest_goes_on(known, monkeypatch, capsys):
    def failing(config, method, tokens, depth=0):
        if (method.label, tokens) == ("dense", 96):
            raise RuntimeError("broken\nand more")
        return 9 * tokens, 8 * tokens

    monkeypatch.setattr(memory, "measured_peaks", failing)
    assert memory.main(ARGUMENTS) == 1
    said = capsys.readouterr()
    rows = json.loads(said.out.splitlines()[-1])["peaks"]
    assert rows[1]["note"] == "RuntimeError: broken" and rows[1]["predicted"] > 0
    assert [row["measured"] is None for row in rows] == [False, True, False, False]
    assert "Traceback" in said.err


def test_what_cannot_be_predicted_is_measured(monkeypatch):
    def failing(*args):
        raise RuntimeError("no such op")

    monkeypatch.setattr(memory, "simulate", failing)
    monkeypatch.setattr(memory, "measured_peaks", lambda config, method, tokens: (9, 8))
    result = bench(MemoryBenchConfig(methods="dense", **TINY))
    assert [row["note"] for row in result["peaks"]] == ["RuntimeError: no such op"] * 2
    assert all(row["measured"] > 0 for row in result["peaks"])
    assert result["slopes"][0]["measured"] is None and "no such op" in shown(result)


def test_ctrl_c_prints_what_has_been_measured(known, monkeypatch, capsys):
    def interrupted(config, method, tokens, depth=0):
        if (method.label, tokens) == ("balanced", 96):
            signal.raise_signal(signal.SIGINT)
        return 9 * tokens, 8 * tokens

    monkeypatch.setattr(memory, "measured_peaks", interrupted)
    assert memory.main(ARGUMENTS) == 130
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["interrupted"] is True
    assert [(r["method"], r["tokens"]) for r in result["peaks"]] == [
        ("dense", 32), ("dense", 96), ("balanced", 32),
    ]  # fmt: skip
    assert result["slopes"][0]["measured"] == 8 and result["slopes"][1]["measured"] is None


def test_a_peak_is_the_trainings_alone():
    config, method = MemoryBenchConfig(methods="balanced", **TINY), parse_methods("balanced")[1]
    first = measured_peaks(config, method, 32)
    kept = torch.zeros(2**20)  # of somebody else
    again = measured_peaks(config, method, 32)
    assert again == pytest.approx(first, abs=2**16) and kept.nbytes > 2**20


def test_a_gpu_is_limited_and_cudnns_attention_left_out(known, monkeypatch):
    made, fractions, cudnn = [], [], [True]
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=8 << 30),
        "get_device_name": lambda device: "a GPU",
        "empty_cache": lambda: None,
        "set_per_process_memory_fraction": lambda share, index: fractions.append((share, index)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: cudnn[-1])
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    monkeypatch.setattr(memory, "attention_taken", lambda config: f"cudnn {cudnn[-1]}")

    def peaks(config, method, tokens, depth=0):
        made.append((method.label, tokens, depth, cudnn[-1]))
        return 9, 8

    monkeypatch.setattr(memory, "measured_peaks", peaks)
    result = bench(MemoryBenchConfig(device="cuda", methods="balanced", cap_gib=4, **TINY))
    assert result["attention"] == "cudnn False" and cudnn[-1]
    # What libraries allocate at their first call is there before the first row.
    assert made[:2] == [("dense", 32, 1, False), ("balanced", 32, 1, False)] and len(made) == 6
    assert fractions == [(0.5, 0), (1.0, 0)]
    with pytest.raises(ValueError, match="cap_gib=9, but the GPU has 8"):
        bench(MemoryBenchConfig(device="cuda", methods="dense", cap_gib=9, **TINY))


def test_defaults_follow_the_device():
    cpu, cuda = MemoryBenchConfig(), MemoryBenchConfig(device="cuda")
    assert (cpu.depth, cpu.vocab, cpu.length_list) == (4, 2048, [256, 512, 1024])
    assert (cuda.depth, cuda.vocab, cuda.length_list[-1]) == (12, 32768, 65536)
    labels = [method.label for method in parse_methods(cuda.methods)]
    assert labels[0] == "dense" and len(labels) == 6
    assert all("sequence_chunk=4096" in label for label in labels[3:])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lengths": "64"}, "lengths=64 needs two lengths"),
        ({"lengths": "a,b"}, "should look like 2048,8192"),
        ({"cap_gib": 32}, "limits a GPU's memory"),
        ({"depth": -1}, "depth must be at least 1"),
        ({"dtype": "int8"}, "dtype=int8 is not one of"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        MemoryBenchConfig(**values)
