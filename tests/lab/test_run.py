"""Runs that are trained for real, in this process where that is possible."""

import contextlib
import io
import json
import signal
import time

import pytest

from molegrad.gpt import paths
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.lab import store
from molegrad.lab.run import WARM_UP, Process, build_optimizers, time_in_turn, train, work_off
from molegrad.lab.sweep import CompareConfig, cells, make_run, prepare_text

TINY = {
    "vocab": "bytes",
    "sizes": "2x64",
    "max_seq_len": 32,
    "device_batch_size": 2,
    "num_iterations": "6",
    "eval_tokens": 128,
    "device_type": "cpu",
    "threads": 1,
}


@pytest.fixture
def tiny(corpus):
    """tiny(method) -> Run of it."""

    def build(method="dense", lr=0.02, **values):
        config = CompareConfig(data=str(corpus), methods=method, **{**TINY, **values})
        with contextlib.redirect_stdout(io.StringIO()):
            text = prepare_text(config)
        return make_run(config, text, cells(config)[-1], lr, 0)

    return build


def test_a_run_is_trained_once_and_stored(tiny):
    run = tiny("tangent:rank=8:probes=2")
    record = train(run)
    stored = store.read(store.RUNS)
    assert stored == {run.key: json.loads(json.dumps(record))} and train(run) == stored[run.key]
    assert record["status"] == "ok" and 1 < record["bpb"] < 9
    assert [step for step, _ in record["curve"]] == [2, 4, 6]
    assert record["tokens"] == 6 * 64 and record["peak_memory_bytes"] > 2**20
    assert 0 < record["streaming"]["streaming/energy_capture"] <= 1
    matrix = record["flops"]
    # 4k + 2r numbers per row and column of the four feed-forward matrices, 2mn of the others
    assert matrix["weight_gradient"] == 4 * (4 * 8 + 2 * 2) * (64 + 256) + 8 * 2 * 64 * 64
    assert matrix["weight_gradient_dense"] == 2 * 2 * 12 * 64 * 64
    held = record["memory"]
    assert held["gradients"] == 4 * (8 * 64 * 64 + 4 * (8 + 2) * (64 + 256))
    assert held["saved"] == 4 * 64 * 2 * (64 + 64 + 64 + 256)
    assert not list(paths.run_dir(run.config.run).rglob("*.safetensors"))


def test_a_run_that_diverges_is_a_result(tiny):
    run = tiny("dense:embedding_lr=1e38")
    record = train(run)
    assert record["status"] == "failed" and "loss" in record["reason"]
    assert str(paths.home()) not in record["reason"]
    assert store.read(store.RUNS)[run.key] == record


def test_a_peer_takes_the_place_of_the_matrices_optimizer(tiny):
    run = tiny("dion:rank=8", lr=0.003)
    model = GPT(GPTConfig(depth=2, aspect_ratio=32, vocab_size=265, max_seq_len=32))
    adamw, other = build_optimizers(run, model, run.config)
    names = [group["name"] for group in adamw.param_groups]
    matrices = [p for group in other.param_groups for p in group["params"]]
    assert names == ["embedding", "head"]
    assert {id(p) for p in matrices} == {id(p) for p in model.parameter_groups()["matrix"]}
    assert {group["lr"] for group in other.param_groups} == {0.003}
    record = train(run)
    assert record["status"] == "ok" and record["peer"]["name"] == "dion"


def test_a_process_makes_one_step_when_asked(tiny):
    run = tiny("balanced")
    process = Process(run, "pace")
    try:
        begun = time.perf_counter()
        seconds = [process.step() for _ in range(3)]
        elapsed = time.perf_counter() - begun
        time.sleep(1.0)  # waiting is no part of a step
        seconds.append(process.step())
        assert 0 < sum(seconds) <= elapsed + time.perf_counter() - begun - 1.0
    finally:
        process.close()
    assert not paths.run_dir(run.config.run).joinpath("worker.log").exists()
    assert store.read(store.RUNS) == {}


def test_a_process_that_fails_says_why_and_one_that_is_killed_too(tiny):
    bad = tiny("tangent:rank=8:head_rank=1000")  # more than the head has
    with pytest.raises(RuntimeError, match="head_rank=1000 must be at most"):
        Process(bad, "pace")
    endless = Process(tiny(num_iterations="1000000"))
    assert endless.result() is None
    endless._process.send_signal(signal.SIGKILL)
    endless._process.wait()
    record = endless.result()
    assert (record["status"], record["reason"]) == ("failed", "SIGKILL ended the process")
    assert "worker.log" in record["log"] and store.read(store.RUNS) == {}


class Clock:
    """A machine that gets slower with every pair; balanced takes three quarters of dense's time."""

    def __init__(self, broken=False):
        self.runs, self.order, self.open, self.broken = [], [], 0, broken

    def __call__(self, run, task):
        if self.broken and run.config.enable_streaming:
            raise RuntimeError("out of memory")
        self.runs.append(run)
        self.open += 1
        return Steps(self, run)


class Steps:
    def __init__(self, clock, run):
        self.clock, self.run, self.taken = clock, run, 0

    def step(self):
        self.clock.order.append(self.run.label)
        self.taken += 1
        slow = 100.0 if self.taken <= WARM_UP else self.taken - WARM_UP
        return slow * (0.75 if self.run.config.enable_streaming else 1.0)

    def close(self):
        self.clock.open -= 1


def test_ratios_pair_the_steps(tiny):
    clock = Clock()
    found = time_in_turn(tiny("balanced"), tiny(), 19, clock)
    assert len(clock.order) == 2 * (WARM_UP + 19)
    assert clock.order[:4] == ["balanced", "dense", "dense", "balanced"]  # in turn
    assert len({run.config.run for run in clock.runs}) == 2  # side by side in two folders
    assert {run.config.threads for run in clock.runs} == {0}  # all, whatever the sweep had
    assert min(run.config.num_iterations for run in clock.runs) > WARM_UP + 19
    assert {(run.config.eval_every, run.config.save_every) for run in clock.runs} == {(-1, -2)}
    assert found["ratio"] == found["ratio_low"] == found["ratio_high"] == 0.75
    assert (found["ms"], found["steps"], found["method"]) == (7500, 19, "balanced")
    broken = Clock(broken=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        time_in_turn(tiny("balanced"), tiny(), 3, broken)
    assert clock.open == broken.open == 0  # also the one whose partner did not come


def test_work_goes_on_in_parallel_until_nothing_is_wanted(tiny):
    runs = [tiny(lr=lr) for lr in (0.1, 0.2, 0.3, 0.4)]
    done, at_once, most = {}, set(), []

    class Slow:
        def __init__(self, run):
            self.run, self.asked = run, 0
            at_once.add(run.key)
            most.append(len(at_once))

        def result(self):
            self.asked += 1
            if self.asked == 3:
                at_once.discard(self.run.key)
                return {"lr": self.run.config.matrix_lr}

    def wanted():
        return [run for run in runs if run.key not in done]

    work_off(wanted, lambda run, record: done.update({run.key: record}), 2, Slow)
    assert [done[run.key]["lr"] for run in runs] == [0.1, 0.2, 0.3, 0.4]
    assert most == [1, 2, 1, 2]


def test_an_interrupt_ends_all(tiny):
    closed, runs = [], [tiny(lr=0.1), tiny(lr=0.2)]

    class Interrupted:
        def __init__(self, run):
            self.key = run.key

        def result(self):
            raise KeyboardInterrupt

        def close(self):
            closed.append(self.key)

    with pytest.raises(KeyboardInterrupt):
        work_off(lambda: runs, lambda *result: None, 2, Interrupted)
    assert closed == [run.key for run in runs]
