"""Runs that are trained for real, in this process where that is possible."""

import contextlib
import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from molegrad.gpt import paths
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.lab import store
from molegrad.lab.sweep import LabConfig, cells, make_run, prepare_text
from molegrad.lab.worker import Pacer, Workers, build_optimizers, memory, train, work_off

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
def tiny(home):
    """tiny(method) -> Run of it."""
    file = home / "text.txt"
    file.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i} * {i * i}" for i in range(900)))

    def build(method="dense", lr=0.02, **values):
        config = LabConfig(data=str(file), methods=method, **{**TINY, **values})
        with contextlib.redirect_stdout(io.StringIO()):
            text = prepare_text(config)
        return make_run(config, text, cells(config)[-1], lr, 0)

    return build


def test_a_run_is_trained_once_and_stored(tiny):
    run = tiny("factored-tangent:rank=8:probes=2")
    record = train(run)
    assert store.read_runs() == {run.key: record} and train(run) == record
    assert record["status"] == "ok" and 1 < record["bpb"] < 9
    assert [step for step, _ in record["curve"]] == [2, 4, 6]
    assert record["tokens"] == 6 * 64 and record["peak_memory_bytes"] > 2**20
    assert 0 < record["streaming"]["streaming/energy_capture"] <= 1
    matrix = record["flops"]
    # 4k + 2r numbers per row and column of the four feed-forward matrices, 2mn of the others
    assert matrix["weight_gradient"] == 4 * (4 * 8 + 2 * 2) * (64 + 256) + 8 * 2 * 64 * 64
    assert matrix["weight_gradient_dense"] == 2 * 2 * 12 * 64 * 64
    held = record["memory"]["matrix"]
    assert held["gradients"] == 4 * (8 * 64 * 64 + 4 * (8 + 2) * (64 + 256))
    assert held["saved"] == 4 * 64 * 2 * (64 + 64 + 64 + 256)
    assert not list(paths.run_dir(run.config.run).rglob("*.safetensors"))


def test_a_run_that_diverges_is_a_result(tiny):
    run = tiny("dense:embedding_lr=1e38")
    record = train(run)
    assert record["status"] == "failed" and "loss" in record["reason"]
    assert str(paths.home()) not in record["reason"]
    assert store.read_runs()[run.key] == record


@pytest.mark.parametrize("name", ["dion:rank=8", "in-backward-muon"])
def test_a_peer_takes_the_place_of_the_matrices_optimizer(name, tiny):
    run = tiny(name, lr=0.003)
    model = GPT(GPTConfig(depth=2, aspect_ratio=32, vocab_size=265, max_seq_len=32))
    adamw, other = build_optimizers(run, model, run.config)
    names = [group["name"] for group in adamw.param_groups]
    matrices = [p for group in other.param_groups for p in group["params"]]
    assert names == ["embedding", "head"]
    assert {id(p) for p in matrices} == {id(p) for p in model.parameter_groups()["matrix"]}
    assert {group["lr"] for group in other.param_groups} == {0.003}
    record = train(run)
    assert record["status"] == "ok" and record["peer"]["name"] == run.peer.name


def test_gradients_that_never_exist_together_are_not_counted_together(tiny):
    run = tiny("in-backward-muon")
    model = GPT(GPTConfig(depth=2, aspect_ratio=32, vocab_size=265, max_seq_len=32))
    counted = memory(model, run.config, build_optimizers(run, model, run.config))
    assert counted["matrix"]["gradients"] == 4 * 64 * 256
    assert counted["model"]["gradients"] == 4 * (64 * 256 + 2 * 265 * 64)


@pytest.mark.parametrize("name", ["dense", "balanced", "in-backward-muon"])
def test_a_pacer_makes_one_step_when_told(name, tiny):
    run = tiny(name)
    pacer = Pacer(run)
    try:
        begun = time.perf_counter()
        seconds = [pacer.step() for _ in range(3)]
        assert 0 < sum(seconds) <= time.perf_counter() - begun
        time.sleep(0.3)  # waiting is no part of a step
        assert pacer.step() < 0.25 + max(seconds)
    finally:
        pacer.close()
    assert not paths.run_dir(run.config.run).joinpath("worker.log").exists()
    assert store.read_runs() == {}


def test_a_pacer_whose_process_fails_says_why(tiny):
    pacer = Pacer(tiny(num_iterations="1"))
    try:
        with pytest.raises(RuntimeError, match="ended with status 0"):
            for _ in range(2):
                pacer.step()
    finally:
        pacer.close()
    with pytest.raises(RuntimeError, match="head_rank=1000 must be at most"):
        Pacer(tiny("factored-tangent:rank=8:head_rank=1000"))


def test_a_process_that_fails_says_why_and_one_that_is_killed_too(tiny):
    run = tiny("factored-tangent:rank=8:head_rank=1000")  # more than the head has
    workers = Workers()
    failed = workers(run)
    assert failed["status"] == "failed" and "head_rank=1000 must be" in failed["reason"]
    assert "Traceback" in Path(failed["log"]).read_text() and store.read_runs() == {}
    results = []
    endless = tiny(num_iterations="1000000")
    thread = threading.Thread(target=lambda: results.append(workers(endless)))
    thread.start()
    while not workers._processes:
        time.sleep(0.01)
    for process in list(workers._processes):
        os.kill(process.pid, signal.SIGKILL)
    thread.join(20)
    assert results[0]["reason"] == "SIGKILL ended the process"


def test_work_goes_on_in_parallel_until_nothing_is_wanted(tiny):
    runs = [tiny(lr=lr) for lr in (0.1, 0.2, 0.3, 0.4)]
    done, at_once, most = {}, set(), []

    def perform(run):
        at_once.add(run.key)
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.discard(run.key)
        return {"lr": run.config.matrix_lr}

    def wanted():
        return [run for run in runs if run.key not in done]

    work_off(wanted, lambda run, record: done.update({run.key: record}), 2, perform)
    assert [done[run.key]["lr"] for run in runs] == [0.1, 0.2, 0.3, 0.4]
    assert max(most) == 2 and len(most) == 4


def test_an_interrupt_ends_all(tiny):
    def perform(run):
        raise KeyboardInterrupt

    run, finished = tiny(), []
    with pytest.raises(KeyboardInterrupt):
        work_off(lambda: [run], lambda *result: finished.append(result), 1, perform)
    assert finished == []
