import json

import pytest

from molegrad.gpt import paths
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.train.flags import resolved
from molegrad.lab import store
from molegrad.lab.sweep import (
    CompareConfig,
    cells,
    compare,
    main,
    make_run,
    next_runs,
    prepare_text,
    search,
)
from tests.lab.conftest import fake_record, faked


def complete(config, text, record=fake_record):
    """All runs of a sweep in the order in which they come up, and what is known at the end."""
    known, order = {}, []
    while runs := next_runs(config, text, known):
        order.append(runs[0])
        known[runs[0].key] = record(runs[0])
    return order, known


def test_every_method_gets_its_own_learning_rate_and_all_seeds(text):
    config = CompareConfig(methods="tangent,adamw:matrix_lrs=0.01|0.02|0.04", seeds=3)
    order, known = complete(config, text)
    assert len(order) == 3 * (3 + 2)
    for cell in cells(config):
        found = search(config, text, cell, known)
        assert found.lr == 0.02 and not found.edge and not found.missing
    assert sorted(r.config.seed for r in order if r.config.optimizer == "adamw") == [0, 0, 0, 1, 2]


def test_the_rates_are_extended_twice_at_most(text):
    config = CompareConfig(methods="dense", matrix_lrs="0.08,0.16", seeds=1)
    order, known = complete(config, text)
    assert [r.config.matrix_lr for r in order] == [0.08, 0.16, 0.04, 0.02]
    found = search(config, text, cells(config)[0], known)
    assert found.lr == 0.02 and found.edge  # still at the edge
    assert [lr for lr, _ in found.sweep] == [0.02, 0.04, 0.08, 0.16]
    rising = complete(CompareConfig(methods="dense", matrix_lrs="0.004,0.01", seeds=1), text)[0]
    assert [r.config.matrix_lr for r in rising] == [0.004, 0.01, 0.02, 0.04]
    fixed = CompareConfig(methods="dense", matrix_lrs="0.08,0.16", seeds=1, extend_lrs=False)
    assert len(complete(fixed, text)[0]) == 2
    assert len(complete(CompareConfig(methods="dense", matrix_lrs="0.08", seeds=1), text)[0]) == 1


def test_runs_that_fail_rank_last(text):
    def record(run):
        failed = {"status": "failed", "reason": "step 3: loss nan"}
        return failed if run.config.matrix_lr >= limit else fake_record(run)

    config = CompareConfig(methods="dense", seeds=2)
    for limit, expected in ((0.02, [0.005, 0.01]), (0.0, [0.005, 0.0025])):
        order, known = complete(config, text, record)
        assert [r.config.matrix_lr for r in order] == [0.01, 0.02, 0.04, *expected]
        found = search(config, text, cells(config)[0], known)
        assert (found.lr, found.best is None) == ((0.01, False) if limit else (0.0025, True))


def test_the_axes_span_the_cells(text):
    config = CompareConfig(
        methods="tangent:rank=8,tangent:rank=16",
        sizes="2x64,4x128",
        batch_sizes="512,2048,8192",
        num_iterations="40,80",
    )
    found = cells(config)
    assert len(found) == 2 * 3 * 2 * 3
    runs = [make_run(config, text, cell, 0.02, 1) for cell in found]
    assert {(r.config.depth, r.config.aspect_ratio) for r in runs} == {(2, 32), (4, 32)}
    rows = {r.config.total_batch_size: r.config.device_batch_size for r in runs}
    assert rows == {512: 2, 2048: 8, 8192: 8}
    assert {r.config.num_iterations for r in runs} == {40, 80}
    assert all(r.config.seed == 1 for r in runs)
    assert {r.config.streaming.seed for r in runs if r.config.streaming is not None} == {1}


def test_runs_of_one_seed_differ_in_nothing_but_the_method(text):
    config = CompareConfig(methods="lowrank")
    runs = [make_run(config, text, cell, 0.02, 1).config for cell in cells(config)]
    dense, low = map(resolved, runs)
    differ = {k for k in {*dense, *low} if dense.get(k) != low.get(k)}
    assert {k for k in differ if not k.startswith("streaming_")} == {"run", "enable_streaming"}
    assert dense["save_every"] == -2 and dense["dashboards"] == "none"


def test_four_evaluations_whatever_the_length(text):
    for steps in (4, 7, 301):
        config = CompareConfig(methods="dense", num_iterations=str(steps))
        every = make_run(config, text, cells(config)[0], 0.02, 0).config.eval_every
        assert len({*range(every, steps + 1, every), steps}) == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"time_steps": -1}, "time_steps must not be negative"),
        ({"equal_time": True, "time_steps": 0}, "equal_time needs step times"),
        ({"matrix_lrs": "0.1,-1"}, "learning rates must be positive"),
        ({"sizes": "4-128"}, "'4-128' should look like 4x128"),
        ({"sizes": "3x128"}, "no multiple of its depth"),
        ({"batch_sizes": "3000"}, "3000 tokens are no multiple of one micro-batch of 2048"),
        ({"batch_sizes": "300"}, "300 tokens are no multiple of one sequence of 256"),
        ({"num_iterations": "many"}, "num_iterations='many' should be positive integers"),
        ({"vocab": "words"}, "vocab='words'"),
        ({"methods": "sparse"}, "unknown method 'sparse'"),
    ],
)
def test_bad_flags_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        CompareConfig(**values)


def test_a_width_that_is_no_multiple_of_the_heads_is_refused(text):
    config = CompareConfig(sizes="2x48")
    with pytest.raises(ValueError, match="width 48 is no multiple of the heads' 32"):
        next_runs(config, text, {})


def test_tokenizers_are_trained_once_and_lie_beside_the_default(corpus):
    bytewise = prepare_text(CompareConfig(data=str(corpus), vocab="bytes"))
    assert Tokenizer.load(paths.tokenizer_dir("bytes")).vocab_size == 265
    made = (paths.tokenizer_dir("bytes") / "tokenizer.json").stat().st_mtime_ns
    assert prepare_text(CompareConfig(data=str(corpus), vocab="bytes")) == bytewise
    assert (paths.tokenizer_dir("bytes") / "tokenizer.json").stat().st_mtime_ns == made
    merged = prepare_text(CompareConfig(data=str(corpus), vocab="300"))
    assert Tokenizer.load(paths.tokenizer_dir(merged.name)).vocab_size == 300
    with pytest.raises(FileNotFoundError, match="tok_train"):
        prepare_text(CompareConfig(data=str(corpus)))


def silent(words):
    pass


def test_what_is_known_is_not_trained_again(home, text):
    known, fake = {}, faked()
    for expected, seeds in ((4, 2), (4, 2), (6, 4)):
        config = CompareConfig(methods="dense", seeds=seeds, time_steps=0)
        compare(config, text, known, silent, fake)
        assert len(fake.runs["train"]) == expected == len(known)


def test_a_run_that_ends_badly_does_not_stop_the_sweep(home, text):
    said, known, fake = [], {}, faked(lambda c: c.matrix_lr == 0.01)
    compare(CompareConfig(methods="dense", jobs=2, time_steps=0), text, known, said.append, fake)
    assert len(fake.runs["train"]) == 4
    assert [r["status"] for r in known.values()].count("failed") == 1
    assert any("failed, loss nan | gradients (a.log)" in words for words in said)


@pytest.mark.parametrize("bad, statuses", [("adamw", ["ok", "failed"]), ("muon", ["failed", "ok"])])
def test_a_method_that_always_fails_keeps_its_row(home, text, bad, statuses):
    config = CompareConfig(methods="adamw", seeds=1, time_steps=3)
    rows = compare(config, text, {}, silent, faked(lambda c: c.optimizer == bad))
    assert [row["status"] for row in rows] == statuses
    assert rows[statuses.index("failed")]["reason"] == "loss nan | gradients"
    if bad == "muon":  # without a reference there is no gap and no ratio
        assert rows[1]["gap_percent"] is None and rows[1]["time"] is None


def test_times_are_stored_and_shared_by_lengths(home, text):
    config, fake = CompareConfig(methods="tangent", seeds=1, num_iterations="200,300"), faked()
    rows = compare(config, text, {}, silent, fake)
    assert [row["time"]["ratio"] for row in rows] == [1.0, 0.5, 1.0, 0.5]
    assert len(fake.runs["pace"]) == 4  # dense against itself, tangent against dense
    more = CompareConfig(methods="tangent,balanced", seeds=1, num_iterations="200")
    compare(more, text, {}, silent, fake)
    assert len(fake.runs["pace"]) == 6 and len(store.read(store.TIMES)) == 3


def test_what_cannot_be_timed_is_left_out(home, text):
    said, fake = [], faked(untimed=lambda c: c.enable_streaming)
    dense, low = compare(CompareConfig(methods="tangent", seeds=1), text, {}, said.append, fake)
    assert dense["time"]["ratio"] == 1.0 and low["time"] is None
    assert "tangent could not be timed: out of memory" in said


def test_equal_time_trains_once_more(home, text):
    known, fake = {}, faked()
    config = CompareConfig(methods="tangent", seeds=2, equal_time=True)
    dense, low = compare(config, text, known, silent, fake)
    assert dense["equal_time"] is None and len(low["equal_time"]["gaps"]) == 2
    assert [run.config.num_iterations for run in fake.runs["train"]].count(600) == 2
    assert compare(config, text, known, silent, fake) == [dense, low]
    assert len(fake.runs["train"]) == 2 * 4 + 2


TINY = [
    *("--vocab=bytes", "--matrix-lrs=0.02", "--seeds=1", "--sizes=2x64", "--max-seq-len=32"),
    *("--device-batch-size=2", "--num-iterations=8", "--eval-tokens=128", "--device-type=cpu"),
    *("--threads=1", "--time-steps=0"),
]


def test_the_command_trains_for_real(home, corpus, capsys):
    arguments = [f"--data={corpus}", *TINY, "--methods=tangent:rank=8", "--jobs=2", "--json"]
    arguments += [f"--plots={home / 'plots'}"]
    assert main([*arguments, "--list"]) == 0
    shown = capsys.readouterr().out
    assert "2 runs can be made now:\ndense, 2x64, 64 tokens a step, 8 steps, lr 0.02" in shown
    assert main(arguments) == 0
    out = capsys.readouterr().out
    dense, low = json.loads(out.splitlines()[-1])["rows"]
    assert dense["tokens"] == low["tokens"] == 8 * 64
    assert 1 < dense["bpb"] < 9 and 1 < low["bpb"] < 9 and dense["bpb"] != low["bpb"]
    assert low["gap_percent"] == pytest.approx(100 * (low["bpb"] / dense["bpb"] - 1))
    assert low["gradient_flops_ratio"] < 1 == dense["gradient_flops_ratio"]
    for what in ("gradients", "state"):
        assert low["memory"][what] < dense["memory"][what]
    matrix = 4 * 2 * 12 * 64 * 64
    assert dense["memory"]["gradients"] == dense["memory"]["state"] == matrix
    assert dense["memory"]["saved"] == 4 * 64 * 2 * (64 + 64 + 64 + 256)
    assert "### 2 blocks of width 64, 64 tokens a step, 8 steps" in out
    assert (home / "plots" / "gap_memory.svg").exists()
    assert not list((home / "runs").iterdir())  # nothing is left but the records
    assert main(arguments) == 0  # all is known
    assert "bits per byte in" not in capsys.readouterr().out
