"""The training loop: one for base training and fine-tuning.

What: `Trainer` runs forward, backward, optimizer step, with gradient accumulation, schedules,
evaluation, samples, checkpoints, a line per step, a stop on non-finite numbers and a clean end on
Ctrl-C, between two micro-batches. What differs between stages (where batches come from, how to
evaluate) is handed in.

Why the host waits for the device once per `every.log` steps only: the loss and the check of the
gradients stay on the device until a line is due. It is read before the optimizer's step, so that
with a line a step a NaN never reaches a weight.

How to run: `molegrad.gpt.train.stage.run` builds one and calls `run()`.
"""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from molegrad import clip_grad_norm_
from molegrad.gpt.train import checkpoint, guard
from molegrad.gpt.train import resume as resuming
from molegrad.gpt.train.hardware import flops_per_token, peak_memory_bytes
from molegrad.gpt.train.logger import RunLogger
from molegrad.gpt.train.schedule import Schedule
from molegrad.gpt.train.setup import BatchSizes, Parts, Processes
from molegrad.optim.rank import RankController, layer_ranks

_SMOOTHING = 0.9  # of the printed loss, an exponential average without bias at the start


@dataclass
class Progress:
    """The loop's own numbers that a resumed run goes on from."""

    step: int = 0  # completed steps
    micro: int = 0  # micro-batches done of the step that follows; of one process alone
    logged: int = 0  # the step of the last log line
    pending: float = 0.0  # seconds spent since that line, where a checkpoint was made
    seconds: float = 0.0  # spent training; evaluation, samples and checkpoints are not counted
    flops: float = 0.0  # done, all devices
    reads: int = 0  # of the loss
    smooth: float = 0.0  # sum of the exponential average over the reads
    best_bpb: float | None = None
    last: dict = field(default_factory=dict)  # the newest metrics

    @property
    def loss(self) -> float:
        """The smoothed loss; nan before the first step."""
        return self.last.get("train/loss", math.nan)


@dataclass(frozen=True)
class Every:
    """Steps between what is done now and then. `log` is at least 1; 0 switches `monitor` and
    `shadow` off; `evaluate`, `sample` and `save` are for the end alone at 0 and off below."""

    log: int = 1
    monitor: int = 0
    shadow: int = 0
    evaluate: int = -1
    sample: int = -1
    save: int = -1


@dataclass(frozen=True)
class Hooks:
    """What a stage does in its own way, each or None.

    evaluate: () -> metrics, such as {"val/bpb": 1.2}. sample: () -> texts, on the first process
    alone. counters: () -> further metrics, read with the layers'.
    """

    evaluate: Callable[[], dict] | None = None
    sample: Callable[[], list[str]] | None = None
    counters: Callable[[], dict] | None = None


class Trainer:
    """One training run.

    Args:
        parts: model, optimizers, instruments, from `molegrad.gpt.train.setup`.
        loader: has next_batch() -> (inputs, targets), state_dict, load_state_dict and epoch.
        schedule: its `steps` are the length of the run.
        logger: receives the metrics; its folder gets the report of non-finite numbers.
        store: of the checkpoints; None saves nothing.
        processes: this process among its like.
    """

    def __init__(
        self,
        parts: Parts,
        loader,
        schedule: Schedule,
        sizes: BatchSizes,
        every: Every,
        logger: RunLogger,
        store: checkpoint.Store | None = None,
        hooks: Hooks | None = None,
        processes: Processes | None = None,
    ):
        self.parts, self.loader, self.schedule, self.sizes = parts, loader, schedule, sizes
        self.every, self.logger, self.store = every, logger, store
        self.hooks, self.processes = hooks or Hooks(), processes or Processes()
        self.model, self.optimizers = parts.model, parts.optimizers
        self.instruments, self.timer = parts.instruments, parts.instruments.timer
        self.called = parts.wrap()
        self.steps, self.device = schedule.steps, parts.model.device
        self.progress = Progress()
        self.flops = flops_per_token(self.model, sizes.length)
        self.guard = guard.NonFiniteGuard(self.model)
        self.signals = guard.StopSignals(self.processes.print)
        self._agreed_to_stop = False  # of several processes
        self._batch: tuple[Tensor, Tensor] | None = None
        self._position: dict = {}
        self._loss = torch.zeros((), device=self.device)  # of the micro-batches done
        self._mark = 0.0  # when the last log line was printed, pauses left out
        self._paces: deque[float] = deque(maxlen=25)  # seconds a step, for the time to go

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint: everything is put back, the data position included.

        Raises:
            ValueError: the sizes of batches do not fit (`molegrad.gpt.train.resume`).
        """
        before = {"logged": saved.step, **saved.extra["progress"]}
        masked = getattr(self.loader, "masks_targets", False)
        micro, note = resuming.check_batches(
            saved, self.sizes, self.parts.streaming, masked, before.get("micro", 0)
        )
        ranks = self.parts.ranks
        with self._other_shapes() if ranks else contextlib.nullcontext():
            checkpoint.restore(saved, self.model, self.optimizers, self.loader, ranks)
        self.progress = Progress(**{**before, "micro": micro})
        if micro:
            accumulated = dict(saved.accumulated)
            self._loss = accumulated.pop("loss").to(self.device)
            resuming.load_accumulated(self.model, accumulated)
        if note:
            self.processes.print(note)
        self.instruments.load_state_dict(saved.extra.get("instruments", {}))

    def run(self) -> dict:
        """Train to the end, or until a signal; returns the last metrics, "interrupted" among them.

        Raises:
            NonFiniteError: the loss or a gradient became NaN or infinite.
        """
        every, progress = self.every, self.progress
        self.model.train()
        with self.signals:
            self._fetch()
            self._mark = self._now() - progress.pending
            while progress.step < self.steps and not self._stops:
                step, since = progress.step + 1, progress.logged
                due = step % every.log == 0 or step == self.steps
                # A step that an earlier process began can't be seen as a whole.
                seen = due and not progress.micro
                watch = seen and _passed(every.monitor, since, step)
                shadow = seen and _passed(every.shadow, since, step)
                multiplier = self.schedule.apply(self.optimizers, progress.step)
                self.instruments.begin(step, metrics=watch, shadow=shadow)
                loss = self._forward_backward()
                if loss is None:
                    break
                finite = self.guard.update(progress.step)
                if due:
                    value = self._read(loss, finite, progress.step)
                with self.timer("optimizer"):
                    for optimizer in self.optimizers:
                        optimizer.step()
                    for optimizer in self.optimizers:
                        optimizer.zero_grad(set_to_none=True)
                progress.step += 1
                self.timer.step()
                if due:
                    now = self._now()
                    extra = self._observations(watch)
                    self._log(value, multiplier, (now - self._mark) / (step - since), since, extra)
                    self._mark, progress.logged = now, progress.step
                if self.parts.ranks:
                    self._adapt_ranks(self.parts.ranks)
                self._occasional()
            progress.pending = self._now() - self._mark
        if progress.step < self.steps:
            self._interrupted()
        return {**progress.last, "interrupted": progress.step < self.steps}

    # One step

    def _fetch(self, position: bool = True) -> None:
        """The next batch, with the loader's position before it: a checkpoint between two steps
        must not count the batch that is already waiting."""
        if position:
            self._position = self.loader.state_dict()
        self._batch = self.loader.next_batch()

    @property
    def _stops(self) -> bool:
        """Whether to stop now. Several processes stop where they have agreed to, at a log line: one
        that went by its own signal would leave the others waiting for it."""
        return self._agreed_to_stop if self.processes.world_size > 1 else bool(self.signals.stop)

    def _forward_backward(self) -> Tensor | None:
        """The micro-batches that the step still lacks; the mean loss of all, on the device. None
        where a signal came before the last of them: then the gradients so far are there."""
        progress = self.progress
        for micro in range(progress.micro, self.sizes.accumulation):
            inputs, targets = self._batch
            last = micro == self.sizes.accumulation - 1
            silent = self.processes.world_size > 1 and not last
            self.instruments.micro_batch(lambda x=inputs, y=targets: self._plain_loss(x, y))
            with self.called.no_sync() if silent else contextlib.nullcontext():
                with self.timer("forward"), self._autocast():
                    loss = self.called(inputs, targets)
                with self.timer("backward"):
                    (loss / self.sizes.accumulation).backward()
            self._loss += loss.detach() / self.sizes.accumulation
            stop = self._stops and not last and self.processes.world_size == 1
            with self.timer("data"):
                self._fetch(position=last or stop)  # while the device is busy
            if stop:
                progress.micro = micro + 1
                return None
        progress.micro, total = 0, self._loss
        self._loss = torch.zeros_like(total)
        self.instruments.backward_done()
        if self.parts.ranks:
            self.parts.ranks.observe()
        if self.parts.grad_clip > 0:
            clip_grad_norm_(self.model, self.parts.grad_clip)
        return total

    def _plain_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """A micro-batch's share of the step's loss, by the bare model."""
        with self._autocast():
            return self.model(inputs, targets) / self.sizes.accumulation

    def _autocast(self):
        dtype = self.parts.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _adapt_ranks(self, ranks: RankController) -> None:
        """Ranks follow the captured energy, where a decision is due; between two steps."""
        changes = ranks.decide()
        if changes:
            with self._other_shapes():
                ranks.apply(changes)
            for change in changes:
                self.processes.print(f"step {self.progress.step:05d} | {change}")

    @contextlib.contextmanager
    def _other_shapes(self):
        """Around a change of the parameters' shapes: what knows the old ones is made again."""
        rewrap = self.called is not self.model
        if rewrap:
            self.called = None  # data parallelism lets go of the parameters
        yield
        self.flops = flops_per_token(self.model, self.sizes.length)
        if rewrap:
            torch.compiler.reset()  # every change would count towards its limit of compilations
            self.called = self.parts.wrap()

    def _read(self, loss: Tensor, finite: Tensor, step: int) -> float:
        """The loss averaged over processes: the one place that waits for the device."""
        row = torch.stack([loss.float(), finite.float(), loss.new_tensor(bool(self.signals.stop))])
        if self.processes.world_size > 1:  # a signal to one process stops all at the same step
            torch.distributed.all_reduce(row)
        total, finite_on, stopped = row.tolist()
        count = self.processes.world_size
        self._agreed_to_stop = stopped > 0
        value = total / count
        self.guard.losses.append((step, value))
        if finite_on < count or not math.isfinite(value):
            report = self.guard.report(step, value, self._learning_rates())
            guard.stop(report, self.logger.folder)
        return value

    def _learning_rates(self) -> dict[str, float]:
        return {g.get("name", "?"): g["lr"] for o in self.optimizers for g in o.param_groups}

    # What is logged, and done now and then

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _observations(self, watch: bool) -> dict:
        """Metrics of the instruments; with `watch` also the stage's counters and the ranks."""
        extra = self.instruments.read()
        if watch and self.hooks.counters is not None:
            extra |= self.hooks.counters()
        if watch and self.parts.ranks:
            extra |= {f"streaming/{k}": v for k, v in self.parts.ranks.metrics().items()}
        return {**self.timer.read(), **extra}

    def _log(self, value: float, multiplier: float, dt: float, since: int, extra: dict) -> None:
        p, tokens = self.progress, self.sizes.total
        done = p.step - since
        p.seconds += dt * done
        p.reads += 1
        p.smooth = _SMOOTHING * p.smooth + (1 - _SMOOTHING) * value
        smooth = p.smooth / (1 - _SMOOTHING**p.reads)
        rate = tokens / dt
        top = self.parts.peak * self.processes.world_size
        p.flops += self.flops.actual * tokens * done
        memory = peak_memory_bytes(self.device)
        p.last |= {
            "step": p.step,
            "total_training_time": p.seconds,
            "total_training_flops": p.flops,
            "train/loss": smooth,
            "train/loss_raw": value,
            "train/lrm": multiplier,
            "train/dt": dt,
            "train/tok_per_sec": rate,
            "train/mfu": 100 * self.flops.actual * rate / top,
            "train/mfu_dense_equivalent": 100 * self.flops.dense * rate / top,
            "train/epoch": self.loader.epoch,
            "train/peak_memory_bytes": memory,
            "train/tokens": p.step * tokens,
        }
        fresh = {k: v for k, v in p.last.items() if not k.startswith("val/")}
        self.logger.log({**fresh, **extra})
        self._paces.append(dt)
        eta = (self.steps - p.step) * statistics.median(self._paces)
        self.processes.print(
            f"step {p.step:05d}/{self.steps:05d} ({100 * p.step / self.steps:.1f}%) | "
            f"loss {smooth:.4f} | lrm {multiplier:.2f} | dt {1e3 * dt:.0f} ms | "
            f"tok/s {rate:,.0f} | mfu {p.last['train/mfu']:.1f}% | "
            f"peak {memory / 2**20:,.0f} MiB | eta {_duration(eta)}"
        )

    def _occasional(self) -> None:
        """Evaluation, samples, checkpoint, where they are due; their time counts as a pause."""
        p, every, hooks = self.progress, self.every, self.hooks
        evaluate = hooks.evaluate is not None and self._due(every.evaluate)
        sample = hooks.sample is not None and self._due(every.sample)
        save = self.store is not None and self._due(max(0, every.save))
        if not (evaluate or sample or save):
            return
        p.pending = self._now() - self._mark
        if evaluate:
            metrics = hooks.evaluate()
            p.last |= metrics
            bpb = metrics.get("val/bpb")
            if bpb is not None and not (p.best_bpb is not None and p.best_bpb <= bpb):
                p.best_bpb = bpb
            self.logger.log(
                {"step": p.step, "total_training_time": p.seconds, **metrics}
                | {"total_training_flops": p.flops}
            )
            shown = " | ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.processes.print(f"step {p.step:05d} | {shown}")
        if sample and self.processes.first:
            for text in hooks.sample():
                self.processes.print(f"sample | {text!r}")
        if save:
            self.processes.print(f"saved {self.save()}")
        self._mark = self._now() - p.pending

    def _due(self, every: int) -> bool:
        """every < 0: never; 0: at the end; otherwise also at multiples."""
        step = self.progress.step
        return every >= 0 and (step == self.steps or (every > 0 and step % every == 0))

    def save(self) -> Path:
        """A checkpoint of this moment, between two steps or, of one process alone, where a signal
        has ended the run between two micro-batches."""
        accumulated = {}
        if self.progress.micro:
            accumulated = {"loss": self._loss, **resuming.accumulated_state(self.model)}
        progress = asdict(self.progress)
        progress["last"] = {k: v for k, v in self.progress.last.items() if _finite(v)}
        ranks = self.parts.ranks
        record = checkpoint.Record(
            loader=self._position,
            ranks=ranks.state_dict() if ranks else {"ranks": layer_ranks(self.model)},
            extra={
                "progress": progress,
                "steps": self.steps,
                "batches": self.sizes.record(),
                "instruments": self.instruments.state_dict(),
            },
            accumulated=accumulated,
        )
        return self.store.save(self.progress.step, self.model, self.optimizers, record)

    def _interrupted(self) -> None:
        step, micro = self.progress.step, self.progress.micro
        stopped = f"stopped after step {step} of {self.steps}"
        if micro:
            stopped += f" and {micro} of {self.sizes.accumulation} micro-batches of the next"
        if self.store is None:
            self.processes.print(f"{stopped}; nothing is saved (--save-every=-2)")
            return
        self.processes.print(
            f"{stopped}; saved {self.save()}\n"
            f"To go on: the same command with --resume (or --resume-from-step={step})"
        )


def _passed(every: int, since: int, step: int) -> bool:
    """Whether a multiple of `every` lies after step `since` and up to `step`; 0: never."""
    return every > 0 and step // every > since // every


def _finite(value) -> bool:
    """Whether JSON can hold the value."""
    return not isinstance(value, float) or math.isfinite(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"
