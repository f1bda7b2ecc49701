"""A stage of a run, base training or fine-tuning, from its folder to its last checkpoint.

What: `Stage.open` says what is to be done in runs/RUN/STAGE: start, go on from a checkpoint, or
nothing where it is done. `Stage.run` does what every stage does once its parts are there: describe
them, record them in config.json, resume, train, and count the memory held.

Three flags say what happens where a run of that name has been before: --resume goes on from its
newest whole checkpoint, --overwrite deletes its checkpoints, and --if-needed does what is left:
nothing where it has ended with the same flags and data, the rest where it was interrupted, all of
it where anything differs. Without them an earlier run is an error, not a loss.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from molegrad import build_info
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.train import checkpoint, checkpoint_files, flags, hardware, setup
from molegrad.gpt.train.logger import RunLogger
from molegrad.gpt.train.loop import Every, Hooks, Trainer
from molegrad.gpt.train.resume import check_same_run
from molegrad.gpt.train.schedule import Schedule
from molegrad.monitor import memory_bytes

# Flags that say what to do about an earlier run, not what this one is.
# The tokenizer is among the inputs, by what it holds; the flag is only a name for it.
_MANNERS = ("resume", "resume_from_step", "overwrite", "if_needed", "tokenizer")


@dataclass(frozen=True)
class Start:
    """saved: the checkpoint to go on from, or None. clear: whether those that are there go first.
    done: whether there is nothing to do."""

    saved: Path | None = None
    clear: bool = False
    done: bool = False


@dataclass(frozen=True)
class Stage:
    """What is known before data and model are there.

    config: resolved. folder: runs/RUN/STAGE. inputs: fingerprints of what the run is made from,
    JSON-able.
    """

    config: object
    folder: Path
    processes: setup.Processes
    start: Start
    inputs: dict = field(default_factory=dict)

    @classmethod
    def open(cls, config, name: str, processes: setup.Processes, inputs: dict) -> "Stage":
        """The stage `name` of the run that the flags name.

        Raises:
            ValueError, FileNotFoundError: see `find_start`.
        """
        folder = checkpoint.stage_dir(config.run, name, config.model_tag)
        start = find_start(config, folder, inputs, processes.print)
        return cls(config, folder, processes, start, inputs)

    def run(
        self,
        built: setup.Built,
        tokenizer: Tokenizer,
        loader,
        steps: int,
        hooks: Hooks,
        record: dict,
        note: str = "",
    ) -> dict:
        """Train, or go on training.

        Args:
            loader: as `Trainer` takes it. record: what config.json says beside the flags. note:
                printed after the configuration.

        Returns:
            the last metrics, the memory held, "interrupted", "folder" and "best_bpb".
        """
        config, folder, processes = self.config, self.folder, self.processes
        model, world, first = built.model, processes.world_size, processes.first
        saved_config = {**flags.resolved(config), "tokenizer": tokenizer.fingerprint}
        saved = None
        if self.start.saved is not None:
            saved = checkpoint.load(self.start.saved, processes.rank, world)
            check_same_run(saved, model, tokenizer, saved_config)
        elif self.start.clear and first:
            checkpoint_files.remove_all(folder)
        parts = setup.parts(built, config, processes, folder if first else None)
        processes.print(describe(config, built, parts, steps))
        if note:
            processes.print(note)
        full = {**saved_config, "steps": steps, "parameters": model.count_parameters()}
        full |= {"inputs": self.inputs, "machine": hardware.machine_record(model.device, world)}
        full |= record
        if first:
            tokenizer.save(folder / "tokenizer")
            (folder / "config.json").write_text(json.dumps(full, indent=1, default=str))
        store = checkpoint.Store(folder, saved_config, config.keep_last, processes.rank, world)
        with RunLogger(
            folder,
            name=config.run if folder.name.startswith("base") else f"{config.run}-{folder.name}",
            config=full,
            dashboards=config.dashboards,
            resume_step=None if saved is None else saved.step,
            active=first,
        ) as logger:
            trainer = Trainer(
                parts,
                loader,
                schedule_of(config, steps),
                setup.BatchSizes.of(config, world),
                every_of(config),
                logger,
                None if config.save_every == -2 else store,
                hooks,
                processes,
            )
            if saved is not None:
                trainer.resume(saved)
                parts.instruments.forget_after(saved.step)
                if first:
                    checkpoint_files.set_aside_after(folder, saved.step)
                processes.print(f"resumed {saved.folder} at step {saved.step}")
            result = trainer.run()
            held = memory_bytes(model, built.optimizers)
            held = {f"memory/{name}": size for name, size in held.items()}
            counted = hooks.counters() if hooks.counters else {}
            logger.log({"step": trainer.progress.step, **counted, **held})
        return {**result, **held, "folder": str(folder), "best_bpb": trainer.progress.best_bpb}

    def already_done(self) -> dict:
        """What `run` returns, where there is nothing to do; and a line that says so."""
        self.processes.print(
            f"{self.folder} is done with these flags and data (--overwrite trains it again)"
        )
        record = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return {"interrupted": False, "folder": str(self.folder), "step": record["steps"]}


def find_start(config, folder: Path, inputs: dict, say: Callable[[str], None] = print) -> Start:
    """What is to be done in a stage's folder; `say` gets a line for each checkpoint that is left
    out because it is not whole.

    Raises:
        FileNotFoundError: --resume-from-step names a step that was not saved.
        ValueError: a new run would mix with the checkpoints of an earlier one; or there are
            checkpoints to resume and none is whole.
    """
    if config.resume_from_step >= 0:
        return Start(checkpoint.find(folder, config.resume_from_step))
    there = checkpoint.step_folders(folder)
    if not there or config.overwrite:
        return Start(clear=config.overwrite)
    path = folder / "config.json"
    if config.if_needed:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        now = {k: v for k, v in flags.resolved(config).items() if k not in _MANNERS}
        now = json.loads(json.dumps({**now, "inputs": inputs}))
        differ = [name for name, value in now.items() if before.get(name) != value]
        if differ:
            say(f"{folder} was trained with other {', '.join(differ[:4])}: it is trained again")
            return Start(clear=True)
    elif not config.resume:
        raise ValueError(
            f"{folder} has a checkpoint of an earlier run ({there[-1].name}): --resume goes on "
            "from it, --overwrite deletes it, --run=NAME starts another run"
        )
    newest = checkpoint.latest(folder, say)
    if newest is None:
        raise ValueError(
            f"{folder} has {len(there)} checkpoints and none is whole (see above): there is "
            "nothing to resume; --overwrite deletes them and starts over"
        )
    done = config.if_needed and checkpoint_files.step_of(newest) == before["steps"]
    return Start(newest, done=done)


def schedule_of(config, steps: int) -> Schedule:
    """The schedule that the flags of these names ask for."""
    names = [field.name for field in fields(Schedule) if field.name != "steps"]
    return Schedule(steps, **{name: getattr(config, name) for name in names})


def every_of(config) -> Every:
    """What is done how often, by the flags."""
    return Every(
        log=config.log_every,
        monitor=config.monitor_every,
        shadow=config.shadow_every,
        evaluate=config.eval_every,
        sample=config.sample_every,
        save=config.save_every,
    )


def describe(config, built: setup.Built, parts: setup.Parts, steps: int) -> str:
    """Everything that was decided, as the text at the start of a run's log."""
    model, device, sizes = built.model, built.model.device, built.model.config
    costs = hardware.flops_per_token(model, config.max_seq_len)
    memory = setup.expected_memory(built, config)
    total = config.total_batch_size * steps
    groups = [g for o in built.optimizers for g in o.param_groups]
    rates = ", ".join(f"{g['name']} {g['lr']:.3g}" for g in groups)
    word = "fewer" if costs.saving >= 0 else "more"
    changed = built.planned or config.head_rank
    low_rank = f", {100 * abs(costs.saving):.1f}% {word} than dense" if changed else ""
    lines = [
        method_line(config),
        flags.show(config),
        f"device: {hardware.device_name(device)}, peak {parts.peak / 1e12:.3g} TFLOP/s "
        f"({parts.peak_source}); native kernels: {native_kernels(build_info(), device)}",
        f"model: {sizes.depth} blocks, width {sizes.width}, {sizes.n_head} heads of "
        f"{sizes.head_dim}, vocabulary {sizes.vocab_size}, context {sizes.max_seq_len}",
        "parameters: " + ", ".join(f"{k} {v:,}" for k, v in model.count_parameters().items()),
        *([str(built.planned)] if built.planned else []),
        *([head_line(model.lm_head, config.head_rank)] if config.head_rank else []),
        f"learning rates: {rates}",
        f"training: {steps:,} steps of {config.total_batch_size:,} tokens, {total:,} tokens",
        f"FLOPs per token: {costs.actual:.4g}{low_rank}; in all {costs.actual * total:.4g}",
        "memory expected, by formula, MiB: "
        + ", ".join(f"{part} {size / 2**20:,.1f}" for part, size in memory.items()),
        *(f"note: {line}" for line in setup.notes(model, config)),
    ]
    return "\n".join(lines)


def method_line(config) -> str:
    """Which estimate of the gradient a run uses, and why that one."""
    if config.streaming is None:
        return f"MoleGrad: off{' in the blocks' if config.head_rank else ''} (exact gradients)"
    method, mode = config.streaming.method, config.streaming.gradient_mode
    return f"MoleGrad: method {method}, gradient_mode {mode} ({config.method_because})"


def native_kernels(info: dict, device: torch.device) -> str:
    """What of `build_info()` is true of tensors on `device`, for people."""
    if not info["native"]:
        return "no, plain torch"
    if device.type == "cpu" or (device.type == "cuda" and info.get("cuda")):
        return "yes"
    remedy = "; remedy: MOLEGRAD_CUDA=ON pip install -e ." if device.type == "cuda" else ""
    return f"CPU ops only; {device.type} tensors run on plain torch{remedy}"


def head_line(head: torch.nn.Linear, rank: int) -> str:
    """What --head_rank makes of the output head: two sketches, of two products each with A and
    with B, in place of one product BᵀA."""
    m, n = head.weight.shape
    share = 2 * rank * (m + n) / (m * n)
    return (
        f"output head: rank {rank} sketches, {100 * share:.0f}% of the dense weight gradient's "
        + ("FLOPs, which is more work, not less" if share > 1 else "FLOPs")
    )
