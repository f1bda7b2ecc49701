import json

import pytest

from molegrad.gpt import paths
from molegrad.lab import store
from molegrad.lab.command import CompareConfig, compare, main

TINY = [
    *("--vocab=bytes", "--matrix-lrs=0.02", "--seeds=1", "--sizes=2x64", "--max-seq-len=32"),
    *("--device-batch-size=2", "--num-iterations=8", "--eval-tokens=128", "--device-type=cpu"),
    "--threads=1",
]


def test_what_is_known_is_not_trained_again(home, text, fake):
    calls, known = [], {}
    for expected, seeds in ((4, 2), (4, 2), (6, 4)):
        config = CompareConfig(methods="dense", seeds=seeds, time_steps=0)
        compare(config, text, known, lambda words: None, fake(calls))
        assert len(calls) == expected == len(known)


def test_a_run_that_ends_badly_does_not_stop_the_sweep(home, text, fake):
    calls, said = [], []
    good = fake([])

    def perform(run):
        calls.append(run)
        if run.config.matrix_lr == 0.01:
            return {"status": "failed", "reason": "SIGKILL ended the process", "log": "a.log"}
        return good(run)

    known = {}
    config = CompareConfig(methods="dense", jobs=2, time_steps=0)
    compare(config, text, known, said.append, perform)
    assert len(calls) == 4 and [r["status"] for r in known.values()].count("failed") == 1
    assert any("failed: SIGKILL ended the process (a.log)" in words for words in said)


def test_equal_time_trains_once_more(home, text, fake):
    calls, known = [], {}
    config = CompareConfig(methods="factored-tangent", seeds=2, equal_time=True)

    class Steps:
        def __init__(self, run):
            self.seconds = 0.5 if run.config.enable_streaming else 1.0

        def step(self):
            return self.seconds

        def close(self):
            pass

    def rows():
        return compare(config, text, known, lambda words: None, fake(calls), Steps)

    dense, low = rows()
    assert low["time"]["ratio"] == 0.5 and low["equal_time"]["steps"] == 600
    assert "equal_time" not in dense and len(low["equal_time"]["gaps"]) == 2
    assert [run.config.num_iterations for run in calls].count(600) == 2
    assert rows() == [dense, low] and len(calls) == 2 * 4 + 2


@pytest.fixture
def data(home):
    file = home / "text.txt"
    file.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i} * {i * i}" for i in range(900)))
    return f"--data={file}"


def test_the_command_trains_for_real(home, data, capsys):
    arguments = [data, *TINY, "--methods=factored-tangent", "--ranks=8", "--jobs=2", "--json"]
    arguments += ["--time-steps=0", f"--plots={home / 'plots'}"]
    assert main([*arguments, "--list"]) == 0
    shown = capsys.readouterr().out
    assert "0 runs are in the store; 2 or more are to be made" in shown
    assert "factored-tangent, rank 8, 2x64, 64 tokens a step, 8 steps" in shown
    assert main([*arguments, f"--markdown={home / 'table.md'}"]) == 0
    out = capsys.readouterr().out
    dense, low = json.loads(out.splitlines()[-1])["rows"]
    assert dense["tokens"] == low["tokens"] == 8 * 64
    assert 1 < dense["bpb"] < 9 and 1 < low["bpb"] < 9 and dense["bpb"] != low["bpb"]
    assert low["gap_percent"] == pytest.approx(100 * (low["bpb"] / dense["bpb"] - 1))
    assert low["gradient_flops_ratio"] < 1 == dense["gradient_flops_ratio"]
    for what in ("gradients", "state"):
        assert low["memory"]["matrix"][what] < dense["memory"]["matrix"][what]
        assert dense["memory"]["matrix"][what] < dense["memory"]["model"][what]
    matrix = 4 * 2 * 12 * 64 * 64
    assert dense["memory"]["matrix"]["gradients"] == dense["memory"]["matrix"]["state"] == matrix
    assert dense["memory"]["matrix"]["saved"] == 4 * 64 * 2 * (64 + 64 + 64 + 256)
    assert dense["memory"]["model"]["saved"] > dense["memory"]["matrix"]["saved"]
    assert [step for step, _ in store.read_runs()[_key(dense)]["curve"]] == [2, 4, 6, 8]
    assert (home / "table.md").read_text().rstrip() in out
    drawn = sorted(file.name for file in (home / "plots").iterdir())
    assert drawn == ["gap_length.svg", "gap_memory.svg"]
    assert not list((home / "runs").iterdir())  # nothing is left but the records
    assert main(arguments) == 0  # all is known
    assert "bits per byte in" not in capsys.readouterr().out


def _key(row):
    (key,) = [k for k, r in store.read_runs().items() if r["bpb"] == row["bpb"]]
    return key


def test_contradictions_are_told_before_anything_is_trained(home, data, capsys):
    assert main([data, *TINY, "--methods=dense-tangent:power_iters=3"]) == 2
    assert "power_iters=3 has no meaning" in capsys.readouterr().err
    assert main([data, *TINY, "--methods=dion:momentun=0.9"]) == 2
    assert "dion has no option momentun" in capsys.readouterr().err
    for flag, words in (
        ("--methods=sparse", "unknown method 'sparse'"),
        ("--time-steps=-1", "time_steps must not be negative"),
        ("--equal-time=True --time-steps=0", "equal_time needs step times"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(flag.split())
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (paths.report_dir() / store.RUNS).exists()
