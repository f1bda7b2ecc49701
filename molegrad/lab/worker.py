"""One run in a process of its own, and several such processes at once.

Why processes: the peak of resident memory belongs to the process, threads are set for the whole
process, and a run that dies takes nothing else with it. `Workers` starts `python -m
molegrad.lab.worker`, which reads a run from its standard input, trains it, adds the record to the
store itself (nothing is lost where the parent dies first) and prints the record. A run is claimed
while it trains: a second sweep over the same store waits for it in place of repeating it. `Pacer`
starts a process that trains one step whenever it is told to.

A run whose loss or gradients became NaN or infinite is a result and is stored as failed. Whatever
else ends a run (a bug, a kill) is told and tried again next time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
from molegrad.lab.methods import Peer, peer_module
from molegrad.lab.store import Run
from molegrad.monitor import memory_bytes, saved_bytes

LOG = "worker.log"


def build_optimizers(run: Run, model, config) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: base training's own, or the peer beside its AdamW."""
    made = setup.build_optimizers(model, config)
    if run.peer is None:
        return made
    adamw = [optimizer for optimizer in made if isinstance(optimizer, torch.optim.AdamW)]
    peer = build_peer(run.peer, model.parameter_groups()["matrix"], config)
    for group in peer.param_groups:
        group["name"] = f"matrix_{run.peer.name}"
    return [*adamw, peer]


def build_peer(peer: Peer, matrices: list[torch.nn.Parameter], config) -> torch.optim.Optimizer:
    """The optimizer that a peer is, for the block matrices.

    Raises:
        ValueError, TypeError: an option or the rank does not fit. ImportError: a missing package.
    """
    options = dict(peer.options)
    if peer.name.startswith("in-backward"):
        options["grad_clip"] = config.grad_clip
    lr, rank = config.matrix_lr, peer.rank or 1
    return peer_module().build(peer.name, matrices, lr=lr, rank=rank, **options)


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
    curve = [[m["step"], m["val/bpb"]] for m in metrics if isinstance(m.get("val/bpb"), float)]
    monitored = [m for m in metrics if any(name.startswith("streaming/") for name in m)]
    last = monitored[-1] if monitored else {}
    return {
        **record,
        "status": "ok",
        "bpb": result["val/bpb"],
        "curve": curve,
        "train_loss": result["train/loss"],
        "tokens": result["train/tokens"],
        "seconds": result["total_training_time"],
        "peak_memory_bytes": result["train/peak_memory_bytes"],
        "streaming": {k: v for k, v in last.items() if k.startswith("streaming/")},
        "parameters": held["model"].count_parameters(),
        "memory": memory(**held),
        "flops": flops(held["model"], held["config"].max_seq_len),
        "device": device_name(held["model"].device),
    }


def memory(model, config, optimizers) -> dict[str, dict[str, int]]:
    """Bytes of the block matrices' layers ("matrix") and of the whole model ("model").

    gradients: of weights, or what stands for them. state: of the optimizers, bases included.
    saved: what the linear layers (the whole model) keep of one micro-batch for the backward pass.
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
    linear = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
    result = {}
    for name, part, hooked in (("matrix", blocks, linear), ("model", model, [model])):
        counted = memory_bytes(part, optimizers)
        result[name] = {
            "gradients": counted["gradients"],
            "state": counted["optimizer_state"] + counted["bases"],
            "saved": saved_bytes(hooked, forward),
        }
    return result


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
        known = store.read_runs().get(run.key)
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

    def turn(optimizer, args, kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        print(now - begun.pop() if begun else READY, file=sys.__stdout__, flush=True)
        if not sys.stdin.readline():
            raise _Enough
        begun.append(time.perf_counter())

    def build(model, config) -> list[torch.optim.Optimizer]:
        made = build_optimizers(run, model, config)
        made[0].register_step_post_hook(turn)
        return made

    with contextlib.suppress(_Enough):
        base_train(run.config, build)


READY = "ready"
TASKS: dict[str, Callable[[Run], object]] = {"train": train, "pace": pace}


def main() -> int:
    """The process: a line with task and run as JSON from standard input, the result to standard
    output."""
    job = json.loads(sys.stdin.readline())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = TASKS[job["task"]](Run.from_dict(job["run"]))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(json.dumps({"status": "failed", "reason": reason}), flush=True)
        return 1
    if result is not None:
        print(json.dumps(result), flush=True)
    return 0


def start(run: Run, task: str, folder: Path) -> subprocess.Popen:
    """The process of a task, whose job is told and whose messages go to a log in the folder."""
    environment = dict(os.environ)
    if run.config.threads:
        environment["OMP_NUM_THREADS"] = str(run.config.threads)
    with open(folder / LOG, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "molegrad.lab.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
    process.stdin.write(json.dumps({"task": task, "run": run.to_dict()}) + "\n")
    process.stdin.flush()
    return process


class Pacer:
    """A run in a process of its own that trains step by step.

    Raises:
        RuntimeError: the process ended before its first step was done; the message says why.
    """

    def __init__(self, run: Run) -> None:
        self._folder = paths.run_dir(run.config.run)
        self._process = start(run, "pace", self._folder)
        self._answer()

    def step(self) -> float:
        """Train one step; its seconds.

        Raises:
            RuntimeError: the process ended.
        """
        with contextlib.suppress(BrokenPipeError):  # the answer says why it ended
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process; what it wrote is deleted."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if line and not line.startswith("{"):
            return line.strip()
        status = self._process.wait()
        raise RuntimeError(json.loads(line)["reason"] if line else _ending(status))


class Workers:
    """Starts processes and can end them."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen] = set()

    def __call__(self, run: Run) -> dict:
        """The record of a run, trained in a process of its own.

        A run that did not end of itself gives a record with status "failed" and the reason; it is
        not stored, and its folder with worker.log is left.

        Raises:
            KeyboardInterrupt: a signal ended the process.
        """
        folder = paths.run_dir(run.config.run)
        process = start(run, "train", folder)
        self._processes.add(process)
        try:
            output, _ = process.communicate()
        finally:
            self._processes.discard(process)
        if process.returncode == 130:
            raise KeyboardInterrupt("a signal ended the run")
        if process.returncode == 0:
            shutil.rmtree(folder, ignore_errors=True)
            return json.loads(output)
        if output:
            failed = json.loads(output)
        else:
            failed = {"status": "failed", "reason": _ending(process.returncode)}
        return {**failed, "log": str(folder / LOG)}

    def stop(self) -> None:
        """End all processes that run."""
        for process in list(self._processes):
            process.terminate()


def _ending(status: int) -> str:
    if status >= 0:
        return f"the process ended with status {status}"
    return f"{signal.Signals(-status).name} ended the process"


def work_off(
    wanted: Callable[[], list[Run]],
    finished: Callable[[Run, dict], None],
    jobs: int = 1,
    perform: Callable[[Run], dict] | None = None,
) -> None:
    """Perform what `wanted` names, `jobs` runs at a time, until it names nothing more.

    Args:
        wanted: asked anew after every run.
        finished: told every result, so that it can change the answer; like `wanted` it is called
            from this thread alone.
        perform: run -> record; by default in processes.
    """
    workers = Workers()
    running: dict[Future, Run] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                active = {run.key for run in running.values()}
                waiting = [run for run in wanted() if run.key not in active]
                for run in waiting[: jobs - len(running)]:
                    running[pool.submit(perform or workers, run)] = run
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finished(running.pop(future), future.result())
        except BaseException:
            workers.stop()
            raise


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that no process is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
