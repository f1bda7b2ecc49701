"""One run in a process of its own; several at once, and the steps of two in turn.

Why processes: the peak of resident memory belongs to the process, threads are set for the whole
process, and a run that dies takes nothing else with it. `python -m molegrad.lab.run train` reads a
run from its standard input, trains it and adds the record to the store itself (nothing is lost
where the parent dies first). A run is claimed while it trains: a second sweep over the same store
waits for it in place of repeating it.

A run whose loss or gradients became NaN or infinite is a result and is stored as failed. Whatever
else ends a run (a bug, a kill) is reported and tried again next time.

Times taken while several runs share the processor say nothing, and a machine that is slower for a
minute slows whatever runs then. So `time_in_turn` starts a method and dense in two processes of
which only one is at work: each waits while the other makes its step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from molegrad.gpt import paths
from molegrad.gpt.train import setup
from molegrad.gpt.train.base import base_train
from molegrad.gpt.train.config import compute_dtype
from molegrad.gpt.train.guard import NonFiniteError
from molegrad.gpt.train.hardware import device_name, flops_per_token
from molegrad.gpt.train.logger import read_metrics
from molegrad.lab import store
from molegrad.lab.store import Run
from molegrad.lab.table import median_interval
from molegrad.monitor import memory_bytes, saved_bytes

WARM_UP = 5  # pairs of steps at the start that do not count


def build_optimizers(run: Run, model, config) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: base training's own, or the peer beside its AdamW."""
    made = setup.build_optimizers(model, config)
    if run.peer is None:
        return made
    adamw = [optimizer for optimizer in made if isinstance(optimizer, torch.optim.AdamW)]
    matrices = model.parameter_groups()["matrix"]
    peer = run.peer.build(matrices, config.matrix_lr)
    for group in peer.param_groups:
        group["name"] = f"matrix_{run.peer.name}"
    return [*adamw, peer]


def measure(run: Run) -> dict:
    """Train, and all that is kept of it; see `train` for the store.

    Raises:
        KeyboardInterrupt: a signal ended the run.
    """
    held: dict = {}

    def build(model, config):
        held.update(model=model, config=config, optimizers=build_optimizers(run, model, config))
        return held["optimizers"]

    record = {**run.to_dict(), "key": run.key, "torch": torch.__version__}
    try:
        result = base_train(run.config, build)
    except NonFiniteError as error:
        reason = str(error).partition(" The report is in")[0]
        return {**record, "status": "failed", "reason": reason}
    if result["interrupted"]:
        raise KeyboardInterrupt("a signal ended the run")
    if not math.isfinite(result["val/bpb"]):
        return {**record, "status": "failed", "reason": f"bits per byte are {result['val/bpb']}"}
    metrics = read_metrics(Path(result["folder"]))
    streaming: dict = {}
    for line in metrics:
        streaming |= {k: v for k, v in line.items() if k.startswith("streaming/")}
    return {
        **record,
        "status": "ok",
        "bpb": result["val/bpb"],
        "curve": [[m["step"], m["val/bpb"]] for m in metrics if "val/bpb" in m],
        "train_loss": result["train/loss"],
        "tokens": result["train/tokens"],
        "seconds": result["total_training_time"],
        "peak_memory_bytes": result["train/peak_memory_bytes"],
        "streaming": streaming,
        "memory": memory(**held),
        "flops": flops(held["model"], held["config"].max_seq_len),
        "device": device_name(held["model"].device),
    }


def memory(model, config, optimizers) -> dict[str, int]:
    """Bytes of the block matrices' layers.

    gradients: of weights, or what stands for them. state: of the optimizers, bases included.
    saved: what the linear layers keep of one micro-batch for the backward pass.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.device_batch_size, config.max_seq_len)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
    inputs, targets = tokens.to(model.device)
    dtype = compute_dtype(config)

    def forward():
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            return model(inputs, targets)

    model.train()
    blocks = model.transformer["h"]
    counted = memory_bytes(blocks, optimizers)
    return {
        "gradients": counted["gradients"],
        "state": counted["optimizer_state"] + counted["bases"],
        "saved": saved_bytes(
            [m for m in blocks.modules() if isinstance(m, torch.nn.Linear)], forward
        ),
    }


def flops(model, seq_len: int) -> dict[str, float]:
    """Operations per token of the block matrices' weight gradients, and of all training; those of
    the same model with dense gradients beside them."""
    costs = flops_per_token(model, seq_len)
    head = 2.0 * model.count_parameters()["head"]  # its weight gradient, dense in every method
    gradient = costs.weight_gradient - head
    return {
        "weight_gradient": gradient,
        "weight_gradient_dense": gradient + costs.dense - costs.actual,
        "actual": costs.actual,
        "dense": costs.dense,
    }


def train(run: Run) -> dict:
    """The record of a run: from the store, or trained now and added to it."""
    with store.claim(run.key):
        known = store.read(store.RUNS).get(run.key)
        if known is None:
            known = measure(run)
            store.append(store.RUNS, known)
        return known


class _Enough(Exception):
    """Nobody wants another step."""


def pace(run: Run) -> None:
    """Train one step for every line of standard input, and answer with its seconds.

    A step lasts from one call of an optimizer to the next; the first one is taken unasked.
    """
    begun: list[float] = []
    answers = sys.stdout

    def turn(optimizer, args, kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        print(now - begun.pop() if begun else 0.0, file=answers, flush=True)
        if not sys.stdin.readline():
            raise _Enough
        begun.append(time.perf_counter())

    def build(model, config) -> list[torch.optim.Optimizer]:
        made = build_optimizers(run, model, config)
        made[0].register_step_post_hook(turn)
        return made

    with contextlib.suppress(_Enough), contextlib.redirect_stdout(sys.stderr):
        base_train(run.config, build)


class Process:
    """A run in a process of its own; what it prints goes to worker.log in the run's folder.

    Args:
        task: "train", whose end `result` waits for, or "pace", which makes a step when `step` is
            called.
    """

    def __init__(self, run: Run, task: str = "train") -> None:
        self._run, self._folder = run, paths.run_dir(run.config.run)
        self._log = self._folder / "worker.log"
        threads = {"OMP_NUM_THREADS": str(run.config.threads)} if run.config.threads else {}
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "molegrad.lab.run", task],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if task == "pace" else log,
                stderr=log,
                env={**os.environ, **threads},
                text=True,
            )
        self._send(json.dumps(run.to_dict()))
        if task == "pace":
            self._answer()

    def result(self) -> dict | None:
        """The record, None while it trains. A run that did not end of itself gives one with status
        "failed", the reason and its log; it is not in the store."""
        status = self._process.poll()
        if status is None:
            return None
        if status != 0:
            return {"status": "failed", "reason": self._ending(), "log": str(self._log)}
        self.close()
        return store.read(store.RUNS)[self._run.key]

    def step(self) -> float:
        """The seconds of a training step that is made now.

        Raises:
            RuntimeError: the process ended; the message says why. (By the constructor too.)
        """
        self._send("")
        return self._answer()

    def close(self) -> None:
        """End it; what it wrote is deleted."""
        self._process.terminate()
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the log says why it ended
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _answer(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._ending())
        return float(line)

    def _ending(self) -> str:
        status = self._process.wait()
        if status < 0:
            return f"{signal.Signals(-status).name} ended the process"
        lines = self._log.read_text(encoding="utf-8").strip().splitlines()
        return f"{lines[-1] if lines else 'no message'} (status {status})"


def time_in_turn(run: Run, dense: Run, steps: int, start: Callable = Process) -> dict:
    """Step time of a run, and its ratio to that of dense: the median of the pairs' own ratios, with
    an interval that holds it with 95% confidence whatever the ratios' distribution.

    Args:
        steps: pairs that count, after `WARM_UP`; the first of a pair goes second in the next.
        start: as `Process`: what makes the steps of a run.

    Raises:
        RuntimeError: one of the two cannot be trained.
    """
    pairs: list[tuple[float, float]] = []
    with contextlib.ExitStack() as stack:
        made = []
        for number, one in enumerate((dense, run)):
            short = replace(
                one.config,
                run=f"time-{number}-{one.time_key}",
                num_iterations=WARM_UP + steps + 2,
                eval_every=-1,
                monitor_every=0,
                threads=0,
            )
            made.append(start(replace(one, config=short), "pace"))
            stack.callback(made[-1].close)
        for number in range(WARM_UP + steps):
            order = made if number % 2 else made[::-1]
            first, second = (process.step() for process in order)
            pairs.append((first, second) if number % 2 else (second, first))
    ratios = [own / reference for reference, own in pairs[WARM_UP:]]
    low, high = median_interval(ratios)
    return {
        "method": run.label,
        "ms": 1e3 * statistics.median(own for _, own in pairs[WARM_UP:]),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "steps": steps,
    }


def work_off(
    wanted: Callable[[], list[Run]],
    finished: Callable[[Run, dict], None],
    jobs: int = 1,
    start: Callable = Process,
) -> None:
    """Train what `wanted` names, `jobs` runs at a time, until it names nothing more.

    Args:
        wanted: asked again whenever a run ends.
        finished: gets every record (see `Process.result`), so that it can change that answer.
        start: as `Process`: what trains a run.
    """
    active: dict[str, tuple[Run, Process]] = {}
    try:
        while True:
            waiting = [run for run in wanted() if run.key not in active]
            for run in waiting[: jobs - len(active)]:
                active[run.key] = run, start(run)
            if not active:
                return
            while not (ended := {k: r for k, (_, p) in active.items() if (r := p.result())}):
                time.sleep(0.05)
            for key, record in ended.items():
                finished(active.pop(key)[0], record)
    finally:
        for _, process in active.values():
            process.close()


if __name__ == "__main__":
    {"train": train, "pace": pace}[sys.argv[1]](Run.from_dict(json.loads(sys.stdin.readline())))
