"""The training loop: one for base training and fine-tuning.

What: `Trainer` runs forward, backward, optimizer step, with gradient accumulation, schedules,
evaluation, samples, checkpoints, a line per step, a stop on non-finite numbers and a clean end on
Ctrl-C, between two micro-batches. What differs between stages (where batches come from, how to
evaluate) is handed in.

Why the host waits for the device once per `log_every` steps only: the loss and the check of the
gradients stay on the device until a line is due. It is read before the optimizer's step, so that
with log_every=1 a NaN never reaches a weight.

How to run: see `molegrad.gpt.train.base.base_train`, which builds one and calls `run()`.
"""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from molegrad import clip_grad_norm_
from molegrad.gpt.train import checkpoint, guard
from molegrad.gpt.train import resume as resuming
from molegrad.gpt.train.config import compute_dtype
from molegrad.gpt.train.hardware import Flops, flops_per_token, peak_flops, peak_memory_bytes
from molegrad.gpt.train.logger import RunLogger
from molegrad.gpt.train.schedule import lr_multiplier, momentum_at
from molegrad.gpt.train.setup import Processes, wrap
from molegrad.gpt.train.signals import StopSignals
from molegrad.monitor import Instruments
from molegrad.optim import Muon
from molegrad.optim.rank import RankController

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


class Trainer:
    """One training run.

    Args:
        config: a resolved `TrainFlags`.
        model: the bare GPT, converted and on its device.
        called: what forward is called on: `model` itself, compiled or data-parallel.
        optimizers: from `molegrad.gpt.train.setup.build_optimizers`.
        loader: has next_batch() -> (inputs, targets), state_dict, load_state_dict and epoch.
        steps: the length of the run.
        folder: of the stage; checkpoints and reports go there.
        logger: receives the metrics.
        evaluate: () -> metrics, such as {"val/bpb": 1.2}; called every `eval_every` steps.
        sample: () -> texts; called every `sample_every` steps, on the first process alone.
        monitor: () -> further metrics, read every `monitor_every` steps at the next log line.
        instruments: watch the converted layers and time the phases; made plainly where not given.
        flops: operations per token, for MFU; counted where not given.
        peak: FLOP/s of one device at its best; looked up or measured where not given.
        processes: this process among its like.
        saved_config: what is written into checkpoints.
    """

    def __init__(
        self,
        config,
        model,
        called,
        optimizers: list[torch.optim.Optimizer],
        loader,
        steps: int,
        folder: Path,
        logger: RunLogger,
        evaluate: Callable[[], dict] | None = None,
        sample: Callable[[], list[str]] | None = None,
        monitor: Callable[[], dict] | None = None,
        instruments: Instruments | None = None,
        flops: Flops | None = None,
        peak: float | None = None,
        processes: Processes | None = None,
        saved_config: dict | None = None,
    ):
        self.config, self.model, self.called = config, model, called
        self.optimizers, self.loader, self.steps = optimizers, loader, steps
        self.folder, self.logger = Path(folder), logger
        self.evaluate, self.sample, self.monitor = evaluate, sample, monitor
        self.instruments = instruments or Instruments(model, optimizers)
        self.timer = self.instruments.timer
        self.processes = processes or Processes()
        self.saved_config = saved_config or {}
        self.progress = Progress()
        self.device, self.dtype = model.device, compute_dtype(config)
        self.flops = flops or flops_per_token(model, config.max_seq_len)
        self.peak = peak or peak_flops(self.device, self.dtype)[0]
        micro = config.device_batch_size * config.max_seq_len * self.processes.world_size
        self.accumulation = max(1, config.total_batch_size // micro)
        self.guard = guard.NonFiniteGuard(model)
        streaming = config.streaming_config()
        adaptive = streaming is not None and streaming.energy_target > 0
        self.ranks = RankController(model, optimizers, streaming) if adaptive else None
        self.signals = StopSignals(self.processes.print)
        self._agreed_to_stop = False  # of several processes
        self._batch: tuple[Tensor, Tensor] | None = None
        self._position: dict = {}
        self._loss = torch.zeros((), device=self.device)  # of the micro-batches done
        self._mark = 0.0  # when the last log line was told, pauses left out
        self._paces: deque[float] = deque(maxlen=25)  # seconds a step, for the time to go

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint: everything is put back, the data position included.

        Raises:
            ValueError: the sizes of batches do not fit (`molegrad.gpt.train.resume`).
        """
        told = {"logged": saved.step, **saved.extra["progress"]}
        masked = getattr(self.loader, "masks_targets", False)
        micro, note = resuming.check_batches(saved, self.config, masked, told.get("micro", 0))
        with self._other_shapes() if self.ranks else contextlib.nullcontext():
            checkpoint.restore(saved, self.model, self.optimizers, self.loader, self.ranks)
        self.progress = Progress(**{**told, "micro": micro})
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
        config, progress = self.config, self.progress
        self.model.train()
        with self.signals:
            self._fetch()
            self._mark = self._now() - progress.pending
            while progress.step < self.steps and not self._stops:
                step, since = progress.step + 1, progress.logged
                due = step % config.log_every == 0 or step == self.steps
                # A step that an earlier process began can't be seen as a whole.
                seen = due and not progress.micro
                watch = seen and _passed(config.monitor_every, since, step)
                shadow = seen and _passed(config.shadow_every, since, step)
                multiplier = self._set_schedules(progress.step)
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
                if self.ranks:
                    self._adapt_ranks(self.ranks)
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

    def _set_schedules(self, step: int) -> float:
        c = self.config
        multiplier = lr_multiplier(
            step, self.steps, c.warmup_steps, c.warmdown_ratio, c.final_lr_frac
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum_at(
                        step, c.momentum_start, c.momentum, c.momentum_warmup_steps
                    )
        return multiplier

    @property
    def _stops(self) -> bool:
        """Whether to stop now. Several processes stop where they have agreed to, at a log line: one
        that went by its own signal would leave the others waiting for it."""
        return self._agreed_to_stop if self.processes.world_size > 1 else bool(self.signals.stop)

    def _forward_backward(self) -> Tensor | None:
        """The micro-batches that the step still lacks; the mean loss of all, on the device. None
        where a signal came before the last of them: then the gradients so far are there."""
        progress = self.progress
        for micro in range(progress.micro, self.accumulation):
            inputs, targets = self._batch
            last = micro == self.accumulation - 1
            silent = self.processes.world_size > 1 and not last
            self.instruments.micro_batch(lambda x=inputs, y=targets: self._plain_loss(x, y))
            with self.called.no_sync() if silent else contextlib.nullcontext():
                with self.timer("forward"), self._autocast():
                    loss = self.called(inputs, targets)
                with self.timer("backward"):
                    (loss / self.accumulation).backward()
            self._loss += loss.detach() / self.accumulation
            stop = self._stops and not last and self.processes.world_size == 1
            with self.timer("data"):
                self._fetch(position=last or stop)  # while the device is busy
            if stop:
                progress.micro = micro + 1
                return None
        progress.micro, total = 0, self._loss
        self._loss = torch.zeros_like(total)
        self.instruments.backward_done()
        if self.ranks:
            self.ranks.observe()
        if self.config.grad_clip > 0:
            clip_grad_norm_(self.model, self.config.grad_clip)
        return total

    def _plain_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """A micro-batch's share of the step's loss, by the bare model."""
        with self._autocast():
            return self.model(inputs, targets) / self.accumulation

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

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
        """Around a change of the parameters' shapes: what knows the old ones is made anew."""
        rewrap = self.config.compile or self.processes.world_size > 1
        if rewrap:
            self.called = None  # data parallelism lets go of the parameters
        yield
        self.flops = flops_per_token(self.model, self.config.max_seq_len)
        if rewrap:
            if self.config.compile:
                torch.compiler.reset()  # every change would count towards its limit of compilations
            self.called = wrap(self.model, self.config, self.processes)

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
            guard.stop(report, self.folder)
        return value

    def _learning_rates(self) -> dict[str, float]:
        return {g.get("name", "?"): g["lr"] for o in self.optimizers for g in o.param_groups}

    # What is told, and done now and then

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _observations(self, watch: bool) -> dict:
        """What the instruments, and `monitor` where `watch` says so, have to tell at a log line."""
        extra = self.instruments.read()
        if watch and self.monitor is not None:
            extra |= self.monitor()
        if watch and self.ranks:
            extra |= {f"streaming/{k}": v for k, v in self.ranks.metrics().items()}
        return {**self.timer.read(), **extra}

    def _log(self, value: float, multiplier: float, dt: float, since: int, extra: dict) -> None:
        p, c = self.progress, self.config
        done = p.step - since
        p.seconds += dt * done
        p.reads += 1
        p.smooth = _SMOOTHING * p.smooth + (1 - _SMOOTHING) * value
        smooth = p.smooth / (1 - _SMOOTHING**p.reads)
        rate = c.total_batch_size / dt
        top = self.peak * self.processes.world_size
        p.flops += self.flops.actual * c.total_batch_size * done
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
            "train/tokens": p.step * c.total_batch_size,
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
        c, p = self.config, self.progress
        evaluate = self.evaluate is not None and self._due(c.eval_every)
        sample = self.sample is not None and self._due(c.sample_every)
        save = not self._keeps_nothing and self._due(max(0, c.save_every))
        if not (evaluate or sample or save):
            return
        p.pending = self._now() - self._mark
        if evaluate:
            metrics = self.evaluate()
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
            for text in self.sample():
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
        progress = {name: getattr(self.progress, name) for name in Progress.__dataclass_fields__}
        progress["last"] = {k: v for k, v in self.progress.last.items() if _finite(v)}
        return checkpoint.save(
            self.folder,
            self.progress.step,
            self.model,
            self.optimizers,
            config=self.saved_config,
            loader=self._position,
            extra={
                "progress": progress,
                "steps": self.steps,
                "batches": resuming.batch_sizes(self.config),
                "instruments": self.instruments.state_dict(),
            },
            keep_last=self.config.keep_last,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            ranks=self.ranks,
            accumulated=accumulated,
        )

    @property
    def _keeps_nothing(self) -> bool:
        return self.config.save_every == -2

    def _interrupted(self) -> None:
        step, micro = self.progress.step, self.progress.micro
        stopped = f"stopped after step {step} of {self.steps}"
        if micro:
            stopped += f" and {micro} of {self.accumulation} micro-batches of the next"
        if self._keeps_nothing:
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
