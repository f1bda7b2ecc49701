"""Base training: a GPT from scratch on text, from flags to the last checkpoint.

What: `base_train(config)` reads the data, builds the model, converts it where --enable_streaming
asks for that, trains it with `molegrad.gpt.train.loop.Trainer` and leaves under
$MOLEGRAD_HOME/runs/RUN/base the configuration, the metrics, the tokenizer and the checkpoints.

How to run:

    python -m scripts.base_train --run=first --depth=4 --num-iterations=200
    torchrun --nproc-per-node=2 -m scripts.base_train -- --depth=12
    python -m scripts.base_train --run=first --depth=4 --num-iterations=200 --resume
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from molegrad import MoleGradConfig, build_info
from molegrad.gpt import paths
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.loader import PackedLoader, validation_batches
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.data.tokens import CorpusTokens
from molegrad.gpt.model.bpb import bits_per_byte
from molegrad.gpt.model.engine import generate
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train import checkpoint, checkpoint_files, flags, hardware, schedule, setup
from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, device_of, resolve
from molegrad.gpt.train.environment import machine_record
from molegrad.gpt.train.logger import RunLogger
from molegrad.gpt.train.loop import Trainer
from molegrad.monitor import Health, Instruments, Shadow, memory_bytes, parse_actions
from molegrad.plan.simulate import planned_memory

BuildOptimizers = Callable[[GPT, BaseTrainConfig], list[torch.optim.Optimizer]]
PROMPTS = (
    "Return a new array",
    "The function computes",
    "If the value is negative,",
    "The capital of France is",
)


@flags.command("base_train")
def main(argv: list[str] | None = None) -> int:
    """The command: 0 when training reached its end, 130 when a signal ended it earlier."""
    config = flags.parse(BaseTrainConfig, argv, prog="python -m scripts.base_train")
    return 130 if base_train(config)["interrupted"] else 0


def base_train(config: BaseTrainConfig, optimizers: BuildOptimizers | None = None) -> dict:
    """Train; returns the last metrics, with "interrupted", "folder" and "best_bpb".

    Args:
        optimizers: (model, resolved config) -> optimizers, in place of
            `molegrad.gpt.train.setup.build_optimizers`. Their groups need no "initial_lr" and no "name".

    Raises:
        ValueError, FileNotFoundError: flags or data do not fit; the message names the remedy.
        molegrad.gpt.train.guard.NonFiniteError: the loss or a gradient became NaN or infinite.
    """
    processes = setup.Processes.from_environment()
    device = device_of(config, processes.local_rank)
    config = resolve(config, device, processes.world_size)
    prepare_device(config, device)
    folder = checkpoint.stage_dir(config.run, "base", config.model_tag)
    saved_folder = find_start(config, folder, processes.print)
    processes.start(device)
    try:
        return _train(config, processes, device, folder, saved_folder, optimizers)
    finally:
        processes.end()


def _train(config, processes, device, folder: Path, saved_folder: Path | None, build) -> dict:
    if config.overwrite and processes.first:
        clear(folder)
    tokenizer = Tokenizer.load(paths.tokenizer_dir(config.tokenizer))
    corpus = open_corpus(config.data, config.val_data, config.data_max_bytes)
    rows, length, world = config.device_batch_size, config.max_seq_len, processes.world_size
    loader = PackedLoader(
        CorpusTokens(corpus, "train", tokenizer),
        rows,
        length,
        device,
        processes.rank,
        world,
        config.seed,
    )
    val_source = CorpusTokens(corpus, "val", tokenizer)

    model = GPT(model_config(config, tokenizer.vocab_size), seed=config.seed)
    setup.place(model, config, device)
    planned = setup.equip(model, config)
    optimizers = (build or setup.build_optimizers)(model, config)
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("name", "?")
    token_bytes = tokenizer.token_bytes()
    eval_steps = max(1, config.eval_tokens // (rows * length * world))

    def validation(steps: int):
        return validation_batches(val_source, rows, length, steps, device, processes.rank, world)

    if config.eval_every >= 0:
        next(validation(1))  # too little text is found here, not after the first hours

    def evaluate() -> dict:
        batches = validation(eval_steps)
        return {"val/bpb": bits_per_byte(model, batches, token_bytes, compute_dtype(config), world)}

    def sample() -> list[str]:
        return sample_texts(model, tokenizer, compute_dtype(config))

    return run_stage(
        config,
        processes,
        folder,
        saved_folder,
        model,
        tokenizer,
        planned,
        optimizers,
        loader,
        total_steps(config, model),
        evaluate,
        sample,
        name=config.run,
        record={"corpus": corpus.manifest},
    )


def total_steps(config: BaseTrainConfig, model: GPT) -> int:
    """Steps of a base training, from whichever flag sets them."""
    counts = model.count_parameters()
    return schedule.total_steps(
        config.total_batch_size,
        config.num_iterations,
        config.max_train_tokens,
        config.target_param_data_ratio,
        counts["matrix"] + counts["head"],
    )


def run_stage(
    config,
    processes: setup.Processes,
    folder: Path,
    saved_folder: Path | None,
    model: GPT,
    tokenizer: Tokenizer,
    planned,
    optimizers: list[torch.optim.Optimizer],
    loader,
    steps: int,
    evaluate: Callable[[], dict],
    sample: Callable[[], list[str]],
    *,
    name: str,
    record: dict,
    note: str = "",
    counters: Callable[[], dict] | None = None,
) -> dict:
    """What every stage does once its parts are there: tell, record, resume, train, account.

    Args:
        config: resolved flags. planned: the conversion plan, or None. loader: as Trainer takes it.
        name: the run's name for dashboards. record: what config.json says beside the flags.
        note: printed after the configuration. counters: further metrics of the stage.

    Returns:
        the last metrics, the memory held, "interrupted", "folder" and "best_bpb".
    """
    device, world = model.device, processes.world_size
    costs = hardware.flops_per_token(model, config.max_seq_len)
    peak = hardware.peak_flops(device, compute_dtype(config))
    saved_config = {**flags.resolved(config), "tokenizer": tokenizer.fingerprint}
    processes.print(describe(config, model, planned, optimizers, costs, steps, device, peak))
    if note:
        processes.print(note)
    saved = None
    if saved_folder is not None:
        saved = checkpoint.load(saved_folder, processes.rank, world)
        check_same_model(saved, model, tokenizer)
        check_same_method(saved, config)
    full = {**saved_config, "steps": steps, "parameters": model.count_parameters()}
    full |= {"machine": machine_record(device, world), **record}
    if processes.first:
        tokenizer.save(folder / "tokenizer")
        (folder / "config.json").write_text(json.dumps(full, indent=1, default=str))

    instruments = make_instruments(config, model, optimizers, folder if processes.first else None)
    with RunLogger(
        folder,
        name=name,
        config=full,
        dashboards=config.dashboards,
        resume_step=None if saved is None else saved.step,
        active=processes.first,
    ) as logger:
        trainer = Trainer(
            config,
            model,
            setup.wrap(model, config, processes),
            optimizers,
            loader,
            steps,
            folder,
            logger,
            evaluate=evaluate,
            sample=sample,
            monitor=counters,
            instruments=instruments,
            flops=costs,
            peak=peak[0],
            processes=processes,
            saved_config=saved_config,
        )
        if saved is not None:
            trainer.resume(saved)
            instruments.forget_after(saved.step)
            if processes.first:
                checkpoint_files.set_aside_after(folder, saved.step)
            processes.print(f"resumed {saved.folder} at step {saved.step}")
        result = trainer.run()
        held = {f"memory/{k}": v for k, v in memory_bytes(model, optimizers).items()}
        counted = counters() if counters else {}
        logger.log({"step": trainer.progress.step, **counted, **held})
    return {**result, **held, "folder": str(folder), "best_bpb": trainer.progress.best_bpb}


def make_instruments(config, model: GPT, optimizers, folder: Path | None) -> Instruments:
    """What the flags ask to be watched; `folder` is None on all processes but the first."""
    shadow = health = None
    if config.enable_streaming and config.shadow_every > 0:
        shadow = Shadow(model, config.shadow_layers, optimizers)
    if config.enable_streaming and config.monitor_every > 0:
        say = print if folder else lambda line: None
        actions = parse_actions(config.health)
        health = Health(model, optimizers, actions, config.health_thresholds(), say)
    return Instruments(model, optimizers, shadow, health, folder, config.layer_metrics)


def prepare_device(config, device: torch.device) -> None:
    """Process-wide settings of a training process."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        hardware.keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")  # TF32 where a product stays in float32


def model_config(config: BaseTrainConfig, vocab_size: int) -> GPTConfig:
    """The sizes that the flags and the tokenizer ask for."""
    return GPTConfig(
        depth=config.depth,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        kv_groups=config.kv_groups,
        vocab_size=vocab_size,
        max_seq_len=config.max_seq_len,
        loss_chunk=config.loss_chunk,
    )


def find_start(config, folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to go on from, or None for a new run. `say` is told which checkpoints are
    left out because they are not whole.

    Raises:
        FileNotFoundError: --resume-from-step names a step that was not saved.
        ValueError: a new run would mix with the checkpoints of an earlier one; or there are
            checkpoints to resume and none is whole.
    """
    if config.resume_from_step >= 0:
        return checkpoint.find(folder, config.resume_from_step)
    there = checkpoint.step_folders(folder)
    if not there or config.overwrite:
        return None
    if not config.resume:
        raise ValueError(
            f"{folder} has a checkpoint of an earlier run ({there[-1].name}): --resume goes on "
            "from it, --overwrite deletes it, --run=NAME starts another run"
        )
    newest = checkpoint.latest(folder, say)
    if newest is None:
        raise ValueError(
            f"{folder} has {len(there)} checkpoints and none is whole (see above): there is "
            "nothing to resume; --overwrite deletes them and starts anew"
        )
    return newest


def clear(folder: Path) -> None:
    """Delete the checkpoints of an earlier run."""
    checkpoint_files.remove_all(folder)


def check_same_model(saved: checkpoint.Checkpoint, model: GPT, tokenizer: Tokenizer) -> None:
    """ValueError where a checkpoint is of a model of other sizes, or of another tokenizer."""
    now = vars(model.config)
    differ = [
        f"{name}={saved.model_config[name]} (now {now[name]})"
        for name in now
        if name != "loss_chunk" and saved.model_config.get(name) != now[name]
    ]
    if differ:
        raise ValueError(f"{saved.folder} was saved with {', '.join(differ)}: use the same flags")
    if saved.config.get("tokenizer") != tokenizer.fingerprint:
        raise ValueError(
            f"{saved.folder} was trained with another tokenizer than this run's; a copy of its own "
            f"is in {saved.folder.parent / 'tokenizer'}"
        )


def check_same_method(saved: checkpoint.Checkpoint, config) -> None:
    """ValueError where a checkpoint is of a run that made its gradients in another way."""

    def facts(streaming: MoleGradConfig | None, head_rank: int) -> dict:
        found = {"enable_streaming": streaming is not None}
        for name in ("method", "gradient_mode"):
            found[f"streaming_{name}"] = streaming and getattr(streaming, name)
        return {**found, "head_rank": head_rank}

    values = saved.config
    streaming = None
    if values.get("enable_streaming"):
        names = [field.name for field in fields(MoleGradConfig)]
        known = {n: values[flags.PREFIX + n] for n in names if flags.PREFIX + n in values}
        streaming = MoleGradConfig(**known)
    before = facts(streaming, values.get("head_rank", 0))
    now = facts(config.streaming_config(), config.head_rank)
    differ = [f"{n}={before[n]} (now {now[n]})" for n in now if before[n] != now[n]]
    if differ:
        raise ValueError(
            f"{saved.folder} was saved with {', '.join(differ)}: resume with the same flags"
        )


def sample_texts(model: GPT, tokenizer: Tokenizer, dtype: torch.dtype, tokens: int = 24):
    """Greedy continuations of `PROMPTS`, as text."""
    was_training = model.training
    model.eval()
    texts = []
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        for prompt in PROMPTS:
            ids = [tokenizer.bos, *tokenizer.encode(prompt)][-model.config.max_seq_len :]
            stop = [tokenizer.bos]
            answer = generate(model, ids, tokens, temperature=0.0, stop_tokens=stop)
            texts.append(tokenizer.decode([*ids[1:], *answer]))
    model.train(was_training)
    return texts


def describe(config, model, planned, optimizers, costs, steps: int, device, peak) -> str:
    """Everything that was decided, as the text at the start of a run's log."""
    sizes = model.config
    memory = planned_memory(config, sizes)
    counts = ", ".join(f"{k} {v:,}" for k, v in model.count_parameters().items())
    native = build_info()
    total = config.total_batch_size * steps
    where = " in the blocks" if config.head_rank else ""
    groups = [g for o in optimizers for g in o.param_groups]
    rates = ", ".join(f"{g['name']} {g['lr']:.3g}" for g in groups)
    word = "fewer" if costs.saving >= 0 else "more"
    changed = planned or config.head_rank
    low_rank = f", {100 * abs(costs.saving):.1f}% {word} than dense" if changed else ""
    lines = [
        flags.show(config),
        f"device: {hardware.device_name(device)}, peak {peak[0] / 1e12:.3g} TFLOP/s ({peak[1]}); "
        f"native kernels: {native_kernels(native, device)}",
        f"model: {sizes.depth} blocks, width {sizes.width}, {sizes.n_head} heads of "
        f"{sizes.head_dim}, vocabulary {sizes.vocab_size}, context {sizes.max_seq_len}",
        f"parameters: {counts}",
        str(planned) if planned else f"MoleGrad: off{where} (dense weight gradients)",
        *([head_line(model.lm_head, config.head_rank)] if config.head_rank else []),
        f"learning rates: {rates}",
        f"training: {steps:,} steps of {config.total_batch_size:,} tokens, {total:,} tokens",
        f"FLOPs per token: {costs.actual:.4g}{low_rank}; in all {costs.actual * total:.4g}",
        "memory expected at the peak, eager, MiB: "
        + ", ".join(f"{part} {size / 2**20:,.1f}" for part, size in memory.items()),
        *(f"note: {line}" for line in setup.notes(model, config)),
    ]
    return "\n".join(lines)


def native_kernels(info: dict, device: torch.device) -> str:
    """What of `build_info()` is true of tensors on `device`, for people."""
    if not info["native"]:
        return "no, plain torch"
    if device.type == "cpu" or (device.type == "cuda" and info.get("cuda")):
        return "yes"
    remedy = "; remedy: MOLEGRAD_CUDA=ON pip install -e ." if device.type == "cuda" else ""
    return f"CPU ops only; {device.type} tensors run on plain torch{remedy}"


def head_line(head: nn.Linear, rank: int) -> str:
    """What --head_rank makes of the output head: two sketches, of two products each with A and
    with B, in place of one product BᵀA."""
    m, n = head.weight.shape
    share = 2 * rank * (m + n) / (m * n)
    return (
        f"output head: rank {rank} sketches, {100 * share:.0f}% of the dense weight gradient's "
        + ("FLOPs, which is more work, not less" if share > 1 else "FLOPs")
    )
