"""Fine-tuning on conversations: from a base checkpoint to a model that answers.

What: `chat_sft(config)` opens runs/RUN/base, trains on conversations (only what the assistant says
is learnt) with the loop, the optimizers and the MoleGrad flags of base training, and leaves
checkpoints, tokenizer, config.json and metrics.jsonl in runs/RUN/sft.

Metrics: those of base training; val/bpb and val/loss (nats per token) are over the assistant's
tokens of held-out conversations; train/skipped_rows counts rows without any target.

How to run:

    python -m scripts.chat_sft --run=first
    python -m scripts.chat_sft --run=first --enable_streaming=True --streaming_rank_k=32
    python -m scripts.chat_sft --run=first --resume
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from molegrad.gpt import runs
from molegrad.gpt.data.conversations import WEIGHTS, conversation_mixture
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.packing import ConversationLoader, held_out_batches, render
from molegrad.gpt.model.bpb import bits_per_byte
from molegrad.gpt.model.engine import answer
from molegrad.gpt.train import checkpoint, flags, schedule, setup
from molegrad.gpt.train.config import TrainFlags, compute_dtype, device_of, resolve
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.loop import Hooks
from molegrad.gpt.train.stage import Stage

QUESTIONS = ("What is 12 + 7?", "Spell the word tensor", "What does torch.relu do?", "Hello")


@dataclass(frozen=True)
class SFTConfig(TrainFlags):
    """Fine-tune the base model of a run on conversations.

    Starts from runs/RUN/base and writes runs/RUN/sft. Learning rates are those of base training
    times --init-lr-frac.
    """

    base_tag: str = flag(
        "", "tag of the base model; empty takes base-MODEL_TAG where there is one, else base"
    )
    base_step: int = flag(-1, "base checkpoint to start from; -1 is the newest")
    init_lr_frac: float = flag(0.2, "factor on every learning rate")
    num_epochs: float = flag(
        1.0, "passes over the conversations, where neither steps nor tokens are given"
    )
    conversations: int = flag(20_000, "training conversations to draw from the sources")
    val_conversations: int = flag(500, "held-out conversations")
    mixture: str = flag(
        "", "weights of the sources, as in summary=1,arithmetic=0.5; empty takes the usual ones"
    )
    data: str = flag(
        "embedded", "corpus of the summaries and the words to spell; see base_train --data"
    )
    data_max_bytes: int = flag(
        -1, "use only this much of the corpus; 0 is all, -1 what the base run used of it"
    )
    device_batch_size: int = flag(8, "rows of packed conversations per micro-batch and device")
    total_batch_size: int = flag(
        0, "tokens per step over all devices, padding included; 0 takes one micro-batch"
    )
    max_seq_len: int = flag(0, "tokens per row; 0 takes the base model's context")
    eval_every: int = flag(100, "steps between evaluations; 0: at the end only; -1: no")
    sample_every: int = flag(0, "steps between sample answers; 0: at the end only; -1: no")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("conversations", "val_conversations", "device_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.init_lr_frac > 0 or not self.num_epochs > 0:
            raise ValueError(
                f"init_lr_frac and num_epochs must be positive, got {self.init_lr_frac} and "
                f"{self.num_epochs}"
            )
        parse_mixture(self.mixture)


def parse_mixture(text: str) -> dict[str, float] | None:
    """ "summary=1,arithmetic=0.5" -> weights of the sources; None for "".

    Raises:
        ValueError: an entry is not SOURCE=NUMBER with a known source.
    """
    if not text.strip():
        return None
    weights = {}
    for entry in text.split(","):
        name, _, value = (part.strip() for part in entry.partition("="))
        try:
            weights[name] = float(value)
        except ValueError:
            raise ValueError(
                f"mixture has {entry!r}: expected SOURCE=NUMBER, as in summary=1,arithmetic=0.5"
            ) from None
        if name not in WEIGHTS or not 0 <= weights[name] < float("inf"):
            raise ValueError(
                f"mixture has {entry!r}: sources are {', '.join(WEIGHTS)}, weights >= 0"
            )
    return weights


@flags.command("chat_sft")
def main(argv: list[str] | None = None) -> int:
    """The command: 0 when training reached its end, 130 when a signal ended it earlier."""
    config = flags.parse(SFTConfig, argv, prog="python -m scripts.chat_sft")
    return 130 if chat_sft(config)["interrupted"] else 0


def chat_sft(config: SFTConfig) -> dict:
    """Fine-tune; returns the last metrics, with "interrupted", "folder" and "skipped_rows".

    Raises:
        FileNotFoundError: the run has no base checkpoint.
        ValueError: flags, model or conversations do not fit; the message names the remedy.
        molegrad.gpt.train.guard.NonFiniteError: the loss or a gradient became NaN or infinite.
    """
    # What this run is, and whether it has been made already.
    processes = setup.Processes.from_environment()
    rank, world = processes.rank, processes.world_size
    device = device_of(config, processes.local_rank)
    base = open_base(config)
    config = resolve_sft(config, base, device, world)
    setup.prepare_device(config, device)
    tokenizer, model = base.tokenizer, base.model
    corpus = open_corpus(config.data, max_bytes=config.data_max_bytes)
    inputs = {"tokenizer": tokenizer.fingerprint, "corpus": corpus.manifest["sha256"]}
    inputs |= {"base": base.name, "weights": checkpoint.weights_checksum(base.folder, base.step)}
    stage = Stage.open(config, "sft", processes, inputs)
    if stage.start.done:
        return stage.already_done()

    with processes.joined(device):
        # Conversations to train on, and those that are held out.
        rows, length, dtype = config.device_batch_size, config.max_seq_len, compute_dtype(config)
        weights = parse_mixture(config.mixture)
        talks = {
            split: conversation_mixture(corpus, split, size, config.seed, weights)
            for split, size in (("train", config.conversations), ("val", config.val_conversations))
        }
        train, val = (render(talks[split], tokenizer, length) for split in ("train", "val"))
        sharing = (device, rank, world)
        loader = ConversationLoader(train, rows, length, tokenizer.bos, *sharing, config.seed)
        token_bytes = tokenizer.token_bytes()

        def held_out() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return held_out_batches(val, rows, length, tokenizer.bos, config.eval_tokens, *sharing)

        # The model, its layers converted, and its optimizers.
        built = setup.build(model, config, device, build_optimizers)
        steps = total_steps(config, loader.rows_per_epoch, world)

        # Training.
        def evaluate() -> dict:
            return {
                "val/bpb": bits_per_byte(model, held_out(), token_bytes, dtype, world),
                "val/loss": mean_loss(model, held_out(), dtype, world),
            }

        def sample() -> list[str]:
            model.eval()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                texts = [f"{q} -> {answer(model, tokenizer, q)}" for q in QUESTIONS]
            model.train()
            return texts

        sources = {s: dict(Counter(talk["source"] for talk in part)) for s, part in talks.items()}
        result = stage.run(
            built,
            tokenizer,
            loader,
            steps,
            Hooks(evaluate, sample, lambda: {"train/skipped_rows": loader.skipped}),
            record={
                "corpus": corpus.manifest,
                "conversation_sources": sources,
                "started_from": base.name,
                "base_stage": base.folder.name,
            },
            note=f"start: {base.name}; conversations: {json.dumps(sources)}",
        )
    if loader.skipped:
        processes.print(f"{loader.skipped} rows had no target and were skipped")
    return {**result, "skipped_rows": loader.skipped}


def open_base(config: SFTConfig) -> runs.OpenStage:
    """The base model to start from, on the CPU."""
    tag = config.base_tag
    if not tag and config.model_tag:
        names = [folder.name for folder in runs.stage_folders(config.run)]
        tag = config.model_tag if f"base-{config.model_tag}" in names else ""
    return runs.open_stage(config.run, "base", tag, config.base_step)


def resolve_sft(
    config: SFTConfig, base: runs.OpenStage, device: torch.device, world_size: int
) -> SFTConfig:
    """`config` with what depends on the base model and the device filled in.

    Raises:
        ValueError: max_seq_len is beyond the base model's context.
    """
    context = base.model.config.max_seq_len
    length = config.max_seq_len or context
    if length > context:
        raise ValueError(
            f"max_seq_len={length} is beyond the base model's context of {context} tokens "
            f"({base.name}): leave it at 0 or take at most {context}"
        )
    total = config.total_batch_size or length * config.device_batch_size * world_size
    limit = config.data_max_bytes
    if limit < 0:
        same = config.data == base.config.get("data")
        limit = base.config.get("data_max_bytes", 0) if same else 0
    values = {"max_seq_len": length, "total_batch_size": total, "data_max_bytes": limit}
    return resolve(replace(config, **values, base_step=base.step), device, world_size)


def build_optimizers(model, config: SFTConfig) -> list[torch.optim.Optimizer]:
    """Base training's optimizers with every learning rate times init_lr_frac."""
    names = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")
    scaled = {name: getattr(config, name) * config.init_lr_frac for name in names}
    return setup.build_optimizers(model, replace(config, **scaled))


def total_steps(config: SFTConfig, rows_per_epoch: int, world_size: int = 1) -> int:
    """Steps of the run: --num-iterations, --max-train-tokens, or --num-epochs over the rows."""
    if config.num_iterations > 0 or config.max_train_tokens > 0:
        return schedule.total_steps(
            config.total_batch_size, config.num_iterations, config.max_train_tokens
        )
    rows_per_step = config.total_batch_size // config.max_seq_len
    return max(1, round(config.num_epochs * rows_per_epoch / rows_per_step))


@torch.no_grad()
def mean_loss(model, batches, dtype: torch.dtype = torch.float32, world_size: int = 1) -> float:
    """Nats per target (those that are not -1) over `batches`; nan where there is none."""
    device = model.device
    sums = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    was_training = model.training
    model.eval()
    for inputs, targets in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            nats = model(inputs, targets, loss_reduction="sum")
        sums[0] += nats.to(sums.device, sums.dtype)
        sums[1] += (targets >= 0).sum().to(sums.device)
    model.train(was_training)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    nats, count = sums.tolist()
    return nats / count if count else float("nan")
