"""From a resolved configuration to what training is made of: processes, model, conversion,
optimizers, instruments. This is the one place that reads a configuration.

| parameters | optimizer | learning rate |
|---|---|---|
| block matrices, in every gradient mode | --optimizer, of molegrad.optim | matrix_lr |
| embedding | AdamW | embedding_lr · (width / 768)^-½ |
| output head | AdamW (molegrad.optim's with --head_rank) | unembedding_lr · (width / 768)^-½ |
| anything else | AdamW | scalar_lr |

The factor (width / 768)^-½ on the AdamW parts is nanochat's: its learning rates were tuned at
width 768. Muon needs no such factor, as its update has a norm of its own.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from molegrad import (
    ConversionPlan,
    MoleGradConfig,
    MoleLinear,
    convert,
    ignored_by_ddp,
    optim,
    plan,
)
from molegrad.chunked import require_chunkable
from molegrad.gpt.model.activations import Activations
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.model.loss import default_chunk, require_head
from molegrad.gpt.train import hardware
from molegrad.gpt.train.config import compute_dtype
from molegrad.monitor import Health, Instruments, Shadow, memory_bytes, parse_actions
from molegrad.optim.rank import RankController

ADAM_EPS, ADAM_BETAS = 1e-10, (0.8, 0.95)


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; (0, 0, 1) without torchrun."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Read RANK, LOCAL_RANK and WORLD_SIZE."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if not all(name in os.environ for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Within the process group (nccl on CUDA, gloo elsewhere) where there are several."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.world_size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield
        finally:
            if self.world_size > 1 and torch.distributed.is_initialized():
                # A wrapped model that is only waiting for the collector would keep the group's
                # threads running, and one that frees a tensor while Python shuts down aborts the
                # process.
                gc.collect()
                torch.distributed.destroy_process_group()

    def print(self, *words) -> None:
        """print on the first process alone."""
        if self.first:
            print(*words, flush=True)


@dataclass(frozen=True)
class BatchSizes:
    """rows: sequences of a micro-batch of one process. length: tokens of a sequence. total: tokens
    of a step over all processes."""

    rows: int
    length: int
    total: int
    world_size: int = 1

    @classmethod
    def of(cls, config, world_size: int = 1) -> "BatchSizes":
        """Those of a resolved configuration."""
        sizes = (config.device_batch_size, config.max_seq_len, config.total_batch_size)
        return cls(*sizes, world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step, of one process."""
        return max(1, self.total // (self.rows * self.length * self.world_size))

    def record(self) -> dict[str, int]:
        """By the names of their flags."""
        return {
            "total_batch_size": self.total,
            "device_batch_size": self.rows,
            "max_seq_len": self.length,
        }


@dataclass(frozen=True)
class Built:
    """A model on its device, converted by the plan where there is one, and its optimizers."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    planned: ConversionPlan | None = None


def build(model: GPT, config, device: torch.device, optimizers: Callable | None = None) -> Built:
    """The model placed, converted and with its optimizers.

    Args:
        optimizers: (model, config) -> optimizers, in place of `build_optimizers`.

    Raises:
        ValueError: see `equip`.
    """
    place(model, config, device)
    planned = equip(model, config)
    return Built(model, (optimizers or build_optimizers)(model, config), planned)


@dataclass
class Parts:
    """What a step of training is made of.

    wrap: gives `model` as it is called in training, compiled and data-parallel where that is asked
    for; called again when parameters have other shapes. ranks: what adapts them, or None. dtype: of
    the matrix products. grad_clip: limit of the gradient's norm, 0 for none. peak: FLOP/s of a
    device at its best, and where that is from. streaming: how the blocks' gradients are estimated,
    or None.
    """

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    wrap: Callable[[], nn.Module]
    instruments: Instruments
    ranks: RankController | None = None
    dtype: torch.dtype = torch.float32
    grad_clip: float = 0.0
    peak: float = 1e12
    peak_source: str = "given"
    streaming: MoleGradConfig | None = None


def parts(
    built: Built,
    config,
    processes: Processes,
    folder: Path | None = None,
    peak: tuple[float, str] | None = None,
) -> Parts:
    """The parts of what was built.

    Args:
        folder: for the instruments' records; None on all processes but the first.
        peak: FLOP/s of a device and where that is from; looked up or measured where not given.
    """
    model, optimizers, streaming = built.model, built.optimizers, config.streaming
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("name", "?")
    dtype, adaptive = compute_dtype(config), streaming is not None and streaming.estimator.adaptive
    peak, source = peak or hardware.peak_flops(model.device, dtype)
    return Parts(
        model,
        optimizers,
        wrap=lambda: wrap(model, config, processes),
        instruments=make_instruments(config, model, optimizers, folder),
        ranks=RankController(model, optimizers, streaming) if adaptive else None,
        dtype=dtype,
        grad_clip=config.grad_clip,
        peak=peak,
        peak_source=source,
        streaming=streaming,
    )


def prepare_device(config, device: torch.device) -> None:
    """Process-wide settings of a training process."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        hardware.keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")  # TF32 where a product stays in float32


def make_instruments(config, model: GPT, optimizers, folder: Path | None) -> Instruments:
    """What the flags ask to be watched; `folder` is None on all processes but the first."""
    shadow = health = None
    if config.streaming is not None and config.shadow_every > 0:
        shadow = Shadow(model, config.shadow_layers, optimizers)
    if config.streaming is not None and config.monitor_every > 0:
        say = print if folder else lambda line: None
        actions = parse_actions(config.health)
        health = Health(model, optimizers, actions, config.health_limits, say)
    return Instruments(model, optimizers, shadow, health, folder, config.layer_metrics)


def place(model: GPT, config, device: torch.device) -> GPT:
    """`model` on `device` in the weights' dtype; under bfloat16 the embedding is bfloat16."""
    low = config.weight_dtype == "bfloat16"
    model.to(device=device, dtype=torch.bfloat16 if low else torch.float32)
    model.reset_buffers()  # the rotary tables stay float32
    if compute_dtype(config) == torch.bfloat16:
        model.transformer["wte"].to(torch.bfloat16)
    return model


def equip(model: GPT, config) -> ConversionPlan | None:
    """Convert the layers that the streaming flags name, and the output head where --head_rank is
    given, in place, and set what blocks keep for the backward pass; the plan of the former, or None
    if off.

    Raises:
        ValueError: no layer is taken, a converted layer does not go with --sequence_chunk, or
            --head_rank is too large.
    """
    names = [field.name for field in fields(Activations)]
    model.set_activations(Activations(**{name: getattr(config, name) for name in names}))
    planned = _equip_blocks(model, config.streaming)
    if config.head_rank:
        most = min(model.lm_head.weight.shape) // 2  # the tangent estimate has twice the rank
        if config.head_rank > most:
            raise ValueError(
                f"head_rank={config.head_rank} must be at most {most}, half of the output head's "
                "smaller side; 0 is the exact gradient"
            )
        convert(model, _head_config(config))
    require_head(model.lm_head)
    return planned


def _head_config(config) -> MoleGradConfig:
    return MoleGradConfig.of(
        method="tangent",
        rank_k=config.head_rank,
        gradient_mode="factors",
        target_layers=("lm_head",),
        min_layer_utilization=0.0,
        seed=0 if config.streaming is None else config.streaming.seed,
    )


def _equip_blocks(model: GPT, streaming: MoleGradConfig | None) -> ConversionPlan | None:
    if streaming is None:
        return None
    planned = plan(model, streaming)
    if not planned.taken:
        raise ValueError(
            f"--enable_streaming=True takes no layer of this model:\n{planned}\n"
            "Lower --streaming_rank_k or --streaming_min_layer_utilization, or name other layers"
        )
    convert(model, streaming)
    for name, layer in model.named_modules():
        if isinstance(layer, MoleLinear) and model.activations.streams(name):
            require_chunkable(layer, "--sequence_chunk")
    return planned


def notes(model: GPT, config) -> list[str]:
    """A line for each lever that does less than its flag says, for the start of a run's log.

    Args:
        model: as `equip` leaves it. config: resolved.
    """
    lines, tokens = [], config.device_batch_size * config.max_seq_len
    if config.sequence_chunk >= tokens:
        lines.append(
            f"sequence_chunk={config.sequence_chunk} makes one chunk of a micro-batch, which has "
            f"{tokens} tokens: activations are computed again, not divided"
        )
    streaming = config.streaming
    if streaming is None or not config.sequence_chunk:
        return lines
    layers = [n for n, layer in model.named_modules() if isinstance(layer, MoleLinear)]
    layers = [n for n in layers if n != "lm_head"]
    streamed = sum(model.activations.streams(n) for n in layers)
    idle = ["saved_inputs=fp8"] if streaming.saved_inputs == "fp8" else []
    idle += ["group_mib"] if config.grouped else []
    for name in idle if streamed else ():
        lines.append(
            f"streaming_{name} has no effect on the {streamed} of {len(layers)} converted layers "
            "that run in chunks, which keep no input"
        )
    return lines


def build_optimizers(model: GPT, config) -> list[torch.optim.Optimizer]:
    """The optimizers of a (converted) model, see the table above; "initial_lr" and "name" are set
    in every group."""
    groups = model.parameter_groups()
    scale = (model.config.width / 768) ** -0.5
    adam = [
        _adam_group("embedding", groups["embedding"], config.embedding_lr * scale),
        _adam_group("head", groups["head"], config.unembedding_lr * scale),
        _adam_group("scalar", groups["scalar"], config.scalar_lr),
    ]
    matrices = optim.matrix_param_groups(model.transformer["h"])
    for group in matrices:
        group["name"] = f"matrix_{group['kind']}"
    optimizers = [_matrix_optimizer(matrices, config)] if matrices else []
    if isinstance(model.lm_head, MoleLinear):
        head = optim.matrix_param_groups(model.lm_head)
        for group in head:
            group["name"] = "head_factors"
        optimizers.append(
            optim.AdamW(
                head,
                lr=config.unembedding_lr * scale,
                betas=ADAM_BETAS,
                eps=ADAM_EPS,
                stochastic_rounding=config.stochastic_rounding,
            )
        )
    adam = [group for group in adam if group["params"]]
    adamw = torch.optim.AdamW(
        adam,
        betas=ADAM_BETAS,
        eps=ADAM_EPS,
        weight_decay=0.0,
        fused=model.device.type in ("cuda", "cpu"),
    )
    optimizers.insert(0, adamw)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _matrix_optimizer(groups: list[dict], config) -> torch.optim.Optimizer:
    """What config.optimizer names, for the block matrices."""
    shared = {
        "lr": config.matrix_lr,
        "weight_decay": config.weight_decay,
        "stochastic_rounding": config.stochastic_rounding,
    }
    if config.optimizer == "muon":
        return optim.Muon(groups, momentum=config.momentum, adjust_lr="original", **shared)
    if config.optimizer == "adamw":
        return optim.AdamW(groups, betas=ADAM_BETAS, eps=ADAM_EPS, **shared)
    # Projections start at zero here: steps in proportion to the weight would hardly move them.
    return optim.Adafactor(groups, relative=False, **shared)


def expected_memory(built: Built, config) -> dict[str, int]:
    """Bytes by part that a step of training holds, by formula; `scripts.memory_plan` simulates it.

    Weights, bases and gradients are counted; Muon keeps one number a number it steps, AdamW two,
    Adafactor a row and a column. Blocks keep what the table of `molegrad.gpt.model.activations`
    says, and the loss one chunk of logits in float32 and their gradient.
    """
    model, sizes = built.model, built.model.config
    parts = memory_bytes(model, built.optimizers)
    for optimizer in built.optimizers:
        numbers = {"Muon": 1.0, "Adafactor": 0.01}.get(type(optimizer).__name__, 2.0)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.requires_grad:
                parts["optimizer_state"] += int(numbers * p.numel() * p.element_size())
    if config.recompute != "none":
        kept = {"selective": 2, "block": 1}[config.recompute]
    else:
        kept = {"mlp": 9, "all": 5}[config.sequence_parts] if config.sequence_chunk else 18
    tokens = config.device_batch_size * config.max_seq_len
    width = 2 if compute_dtype(config) == torch.bfloat16 else 4
    chunk = sizes.loss_chunk or default_chunk(sizes.vocab_size, model.device.type)
    parts["activations"] = tokens * sizes.depth * sizes.width * kept * width
    parts["logits"] = min(tokens, chunk) * sizes.vocab_size * 8
    return {**parts, "total": sum(parts.values())}


def wrap(model: GPT, config, processes: Processes) -> nn.Module:
    """`model` as it is called in training: compiled and data-parallel where that is asked for."""
    called: nn.Module = model
    if config.compile:
        called = torch.compile(called, dynamic=False)
    if processes.world_size > 1:
        # Every process computes its own buffers (rotary tables, bases, counters): none is sent.
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            called, [*(name for name, _ in called.named_buffers()), *ignored_by_ddp(called)]
        )
        ids = [processes.local_rank] if model.device.type == "cuda" else None
        called = nn.parallel.DistributedDataParallel(called, device_ids=ids)
    return called


def _adam_group(name: str, params: list[nn.Parameter], lr: float) -> dict:
    return {"name": name, "params": [p for p in params if p.requires_grad], "lr": lr}
