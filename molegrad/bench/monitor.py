"""What watching a training run costs: whole steps with the instruments against steps without.

    python -m scripts.bench_monitor --device=cpu --json
    python -m scripts.bench_monitor --depth=8 --batch=8x512 --methods=balanced,tangent

Two copies of one training make their steps in turn in one process. The bare one trains and reads
its loss. The watched one does besides what a run of scripts.base_train does by default: phase times
and a line of metrics.jsonl at every step, all metrics of all layers and the health checks at every
tenth (`every`).

- cost: of whole windows of `every` steps, as the work is done at one of them: the median of the
  windows' own ratios, watched to bare, less 1, with an interval that holds it with 95% confidence.
- own: the host's time within the instruments and the logger, relative to the bare steps. It varies
  less, but lacks what they do to others: emptied caches, a device that has to be waited for.
- shadow_ms: what the comparison with the true gradient adds to a step, the median of steps in turn;
  shadow_cost: that, spread over the `shadow_every` steps from one to the next.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from molegrad import build_info
from molegrad.bench.step import StepBenchConfig, Training
from molegrad.bench.table import table
from molegrad.gpt.train import flags
from molegrad.gpt.train.base import make_instruments
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.hardware import device_name, keep_freed_memory
from molegrad.gpt.train.logger import METRICS, RunLogger
from molegrad.lab.methods import Method, parse_methods
from molegrad.lab.table import median_interval


@dataclass(frozen=True)
class MonitorBenchConfig:
    """Time training steps with the instruments against steps without.

    Raises:
        ValueError: a number or size that cannot be timed; the message names it.
    """

    device: str = flag("cpu", "cpu or cuda")
    depth: int = flag(4, "transformer blocks")
    aspect_ratio: int = flag(64, "width per block")
    vocab: int = flag(4096, "entries of the vocabulary")
    batch: str = flag("4x256", "sequences x tokens of a step")
    methods: str = flag("balanced,tangent", "methods, as scripts.compare takes them")
    dtype: str = flag("auto", "of the matrix products: auto, bfloat16 or float32")
    every: int = flag(10, "steps between readings of the metrics, and length of a window")
    windows: int = flag(20, "windows of every method that count")
    shadow_every: int = flag(250, "steps between shadow comparisons that their cost is spread over")
    shadows: int = flag(5, "shadow comparisons of every method; 0 for none")
    threads: int = flag(0, "CPU threads; 0 leaves torch's own number")
    seed: int = flag(0, "of weights and tokens")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: bool = flag(False, "print the table as Markdown")

    def __post_init__(self) -> None:
        for name in ("every", "windows", "shadow_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shadows < 0:
            raise ValueError(f"shadows must not be negative, got {self.shadows}")
        if len(self.training.batch_list) != 1:
            raise ValueError(f"batch={self.batch} should be a single one, such as 4x256")

    @property
    def training(self) -> StepBenchConfig:
        """The same training, as `molegrad.bench.step` builds it."""
        return StepBenchConfig(
            device=self.device,
            depth=self.depth,
            aspect_ratio=self.aspect_ratio,
            vocab=self.vocab,
            batches=self.batch,
            dtype=self.dtype,
            seed=self.seed,
        )


class BareSteps:
    """Steps of a training that nobody watches."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def step(self) -> float:
        """One step; its seconds, until the device is done."""
        start = time.perf_counter()
        loss = self.training.loss()
        loss.backward()
        loss.item()
        self._update()
        self._wait()
        return time.perf_counter() - start

    def _update(self) -> None:
        for optimizer in self.training.optimizers:
            optimizer.step()
        for optimizer in self.training.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _wait(self) -> None:
        device = self.training.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class WatchedSteps(BareSteps):
    """Steps with the instruments that `molegrad.gpt.train.base` makes, in the loop's order.

    Args:
        folder: for metrics.jsonl and the instruments' own records.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training)
        self.watch = make_instruments(
            training.config, training.model, training.optimizers, Path(folder)
        )
        self.logger = RunLogger(folder, dashboards="none")
        self.number = 0
        self.own = 0.0  # seconds within the instruments and the logger

    def step(self, metrics: bool = False, shadow: bool = False) -> float:
        watch, timer = self.watch, self.watch.timer
        start = time.perf_counter()
        self.number += 1
        self._timed(lambda: watch.begin(self.number, metrics=metrics, shadow=shadow))
        self._timed(lambda: watch.micro_batch(self.training.loss))
        with timer("forward"):
            loss = self.training.loss()
        with timer("backward"):
            loss.backward()
        self._timed(watch.backward_done)
        value = loss.item()
        with timer("optimizer"):
            self._update()
        self._wait()
        self._timed(lambda: self._log(value))
        return time.perf_counter() - start

    def _log(self, loss: float) -> None:
        self.watch.timer.step()
        values = self.watch.read()
        times = self.watch.timer.read()
        self.logger.log({"step": self.number, "train/loss": loss, **times, **values})

    def _timed(self, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        self.own += time.perf_counter() - start


def bench_method(config: MonitorBenchConfig, method: Method) -> dict:
    """The row of a method."""
    (batch,) = config.training.batch_list
    with tempfile.TemporaryDirectory() as folder:
        bare = BareSteps(Training(config.training, method, batch, False))
        watched = WatchedSteps(Training(config.training, method, batch, False), Path(folder))
        with watched.logger:
            _window(config, bare, watched)  # allocates what is allocated once
            watched.own = 0.0
            windows = [_window(config, bare, watched) for _ in range(config.windows)]
            own = watched.own
            lines = (Path(folder) / METRICS).read_bytes().splitlines()
            extra = [_pair(bare, watched, i, shadow=True) for i in range(config.shadows)]
    seconds = [pair for window in windows for pair in window]
    ratios = [sum(w for _, w in window) / sum(b for b, _ in window) for window in windows]
    low, high = median_interval(ratios)
    bare_seconds = sum(b for b, _ in seconds)
    row = {
        "method": method.label,
        "bare_ms": 1e3 * statistics.median(b for b, _ in seconds),
        "read_ms": 1e3 * statistics.median(window[-1][1] - window[-1][0] for window in windows),
        "cost": statistics.median(ratios) - 1,
        "cost_low": low - 1,
        "cost_high": high - 1,
        "own": own / bare_seconds,
        "line_bytes": max(map(len, lines)),
    }
    if extra:
        shadow = statistics.median(w - b for b, w in extra)
        row["shadow_ms"] = 1e3 * shadow
        row["shadow_cost"] = shadow / (config.shadow_every * bare_seconds / len(seconds))
    return row


def _window(config: MonitorBenchConfig, bare: BareSteps, watched: WatchedSteps) -> list[tuple]:
    """(bare, watched) seconds of `every` steps, the metrics read at the last of them."""
    numbers = range(1, config.every + 1)
    return [_pair(bare, watched, n, metrics=n == config.every) for n in numbers]


def _pair(bare: BareSteps, watched: WatchedSteps, number: int, **due: bool) -> tuple[float, float]:
    """Seconds of a step of each; who goes first alternates."""
    if number % 2:
        seconds = bare.step()
        return seconds, watched.step(**due)
    seconds = watched.step(**due)
    return bare.step(), seconds


def bench(config: MonitorBenchConfig) -> dict:
    """Every measurement of a configuration, and on what machine.

    Raises:
        ValueError: an unknown method, one without converted layers, or a device that is not there.
    """
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device; use --device=cpu")
    methods = parse_methods(config.methods)[1:]
    if not methods or any(not m.flags.get("enable_streaming", False) for m in methods):
        raise ValueError(
            f"methods={config.methods}: only methods with converted layers are watched, such as "
            "balanced or tangent"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        return {
            "rows": [bench_method(config, method) for method in methods],
            "device": device_name(device),
            "config": flags.resolved(config),
            "build_info": build_info(),
        }
    finally:
        torch.set_num_threads(threads)


_COLUMNS = {  # heading: (key, format)
    "method": ("method", "s"), "ms a step": ("bare_ms", ".1f"), "ms a reading": ("read_ms", ".1f"),
    "cost": ("shown", "s"), "own": ("own", ".2%"), "bytes a line": ("line_bytes", "d"),
    "ms a shadow": ("shadow_ms", ".1f"), "shadow cost": ("shadow_cost", ".2%"),
}  # fmt: skip


def shown(rows: list[dict], markdown: bool = False) -> str:
    """The rows of `bench` as aligned text or as Markdown."""
    return table([{**row, "shown": _interval(row)} for row in rows], markdown, _COLUMNS)


def _interval(row: dict) -> str:
    return f"{row['cost']:+.2%} ({row['cost_low']:+.2%} to {row['cost_high']:+.2%})"


@flags.command("bench_monitor")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(MonitorBenchConfig, argv, prog="python -m scripts.bench_monitor")
    try:
        result = bench(config)
    except ValueError as error:
        print(f"bench_monitor: {error}")
        return 2
    sizes = f"depth {config.depth}, width {config.depth * config.aspect_ratio}"
    print(f"{result['device']}, torch {result['build_info']['torch']}, {sizes}, {config.batch}\n")
    print(shown(result["rows"], config.markdown))
    if config.json:
        print(json.dumps(result))
    return 0
