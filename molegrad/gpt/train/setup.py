"""Setting a training run up: processes, model, conversion, optimizers.

| parameters | optimizer | learning rate |
|---|---|---|
| block matrices, dense or factored | --optimizer, of molegrad.optim | matrix_lr |
| embedding | AdamW | embedding_lr · (width / 768)^-½ |
| output head | AdamW (molegrad.optim's with --head_rank) | unembedding_lr · (width / 768)^-½ |
| anything else | AdamW | scalar_lr |

The factor (width / 768)^-½ on the AdamW parts is nanochat's: its learning rates were tuned at
width 768. Muon needs no such factor, as its update has a norm of its own.
"""

import gc
import os
from dataclasses import dataclass

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
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.model.loss import require_head
from molegrad.gpt.train.config import compute_dtype

ADAM_EPS = 1e-10


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

    def start(self, device: torch.device) -> None:
        """Join the process group (nccl on CUDA, gloo elsewhere) where there are several."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.world_size > 1 and not torch.distributed.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend)

    def end(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            # A wrapped model that is only waiting for the collector would keep the group's threads
            # running, and one that frees a tensor while Python shuts down aborts the process.
            gc.collect()
            torch.distributed.destroy_process_group()

    def print(self, *words) -> None:
        """print on the first process alone."""
        if self.first:
            print(*words, flush=True)


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
    model.set_activations(config.activations())
    planned = _equip_blocks(model, config.streaming_config())
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
    return MoleGradConfig(
        rank_k=config.head_rank,
        gradient_mode="factors",
        method="tangent",
        target_layers=("lm_head",),
        min_layer_utilization=0.0,
        seed=config.streaming_seed,
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
    lines = []
    tokens = config.device_batch_size * config.max_seq_len
    if config.sequence_chunk >= tokens:
        lines.append(
            f"sequence_chunk={config.sequence_chunk} makes one chunk of a micro-batch, which has "
            f"{tokens} tokens: activations are computed again, not divided"
        )
    streaming = config.streaming_config()
    if streaming is None or not config.sequence_chunk:
        return lines
    layers = [n for n, layer in model.named_modules() if isinstance(layer, MoleLinear)]
    layers = [n for n in layers if n != "lm_head"]
    streamed = sum(model.activations.streams(n) for n in layers)
    for name, idle in (("saved_inputs", "full"), ("group_mib", 0)):
        value = getattr(streaming, name)
        if streamed and value != idle:
            lines.append(
                f"streaming_{name}={value} has no effect on the {streamed} of {len(layers)} "
                "converted layers that run in chunks, which keep no input"
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
            group["name"] = "head_factored"
        optimizers.append(
            optim.AdamW(
                head,
                lr=config.unembedding_lr * scale,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=ADAM_EPS,
                stochastic_rounding=config.stochastic_rounding,
            )
        )
    adam = [group for group in adam if group["params"]]
    adamw = torch.optim.AdamW(
        adam,
        betas=(config.adam_beta1, config.adam_beta2),
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
        return optim.Muon(
            groups,
            momentum=config.momentum,
            nesterov=config.muon_nesterov,
            adjust_lr=config.muon_adjust_lr,
            **shared,
        )
    if config.optimizer == "adamw":
        return optim.AdamW(
            groups, betas=(config.adam_beta1, config.adam_beta2), eps=ADAM_EPS, **shared
        )
    # Projections start at zero here: steps in proportion to the weight would hardly move them.
    return optim.Adafactor(groups, relative=False, **shared)


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
