"""Flags of training, and what they come to on a machine.

What: `TrainFlags`, those that every stage shares, and `BaseTrainConfig`, base training's own, are
frozen dataclasses whose fields are the command line (`molegrad.gpt.train.flags`), named as in
nanochat. `resolve` fills in what depends on the device, so that the configuration which is printed
and saved holds no "auto". `molegrad.gpt.train.setup` reads that and builds from it what training is
made of; nothing else takes a configuration.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from molegrad.config import MoleGradConfig
from molegrad.gpt.model.activations import Activations
from molegrad.gpt.train.flags import Prefixed, flag
from molegrad.gpt.train.hardware import pick_device
from molegrad.gpt.train.logger import parse_dashboards
from molegrad.gpt.train.streaming import AS_GIVEN, Streaming, with_method
from molegrad.monitor.health import DEFAULT_ACTIONS, KINDS, HealthThresholds, parse_actions

# Where matrix_lr is not given; see the optimizers' docstrings for what a learning rate means. In
# the subspace of factors AdamW takes twice the rate.
MATRIX_LR = {"muon": 0.02, "adamw": 0.002, "adafactor": 0.002}


@dataclass(frozen=True)
class TrainFlags(Activations):
    """Flags of every training stage.

    Raises:
        ValueError: a value is out of range or two values contradict; the message names them.
    """

    run: str = flag("dummy", "name of the run: everything lies under runs/NAME")
    model_tag: str = flag("", "suffix of the stage's folder, to keep several models in one run")
    device_type: str = flag("", "cuda, cpu or mps; empty takes the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "dtype of the matrix products (autocast); auto is bfloat16 on CUDA, else float32"
    )
    weight_dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "dtype of the weights; auto is float32, with a bfloat16 embedding under bfloat16"
    )
    stochastic_rounding: bool = flag(
        False,
        "round bfloat16 weights of matrices at random after a step, so that steps too small for "
        "bfloat16 are not lost in the mean; the rest, in torch's AdamW, is rounded to nearest",
    )
    compile: bool | None = flag(
        None,
        "torch.compile the model; None compiles on CUDA, but not with streaming_group_mib or "
        "offload",
    )
    seed: int = flag(0, "seed of the start weights and of the data order")
    threads: int = flag(0, "CPU threads of torch; 0 leaves torch's choice")
    dashboards: str = flag(
        "wandb",
        "where metrics go beside metrics.jsonl: wandb (offline unless WANDB_MODE says otherwise), "
        "trackio, both (wandb,trackio) or none",
    )

    max_seq_len: int = flag(0, "tokens per sequence; 0 takes 2048 on CUDA, 256 elsewhere")
    device_batch_size: int = flag(
        0,
        "sequences per micro-batch and device; 0 takes 32 on CUDA, 16 elsewhere. May differ after "
        "--resume where micro-batches add up: without MoleGrad, exact, sampled, tangent in factors",
    )
    total_batch_size: int = flag(
        0,
        "tokens per step over all devices, reached by gradient accumulation; 0 takes 524288 on "
        "CUDA and one micro-batch elsewhere",
    )
    num_iterations: int = flag(-1, "number of steps; -1 derives it from the flags below")
    max_train_tokens: int = flag(-1, "train on this many tokens; -1 is no limit of this kind")

    optimizer: Literal["muon", "adamw", "adafactor"] = flag(
        "muon", "optimizer of the block matrices (molegrad.optim)"
    )
    matrix_lr: float = flag(
        0.0,
        "learning rate of the block matrices; 0 takes 0.02 for muon, 0.002 for adamw (0.004 where "
        "gradients are factors) and 0.002 for adafactor",
    )
    embedding_lr: float = flag(0.2, "learning rate of the embedding (AdamW)")
    unembedding_lr: float = flag(0.004, "learning rate of the output head (AdamW)")
    scalar_lr: float = flag(0.01, "learning rate of parameters that are no matrices (AdamW)")
    weight_decay: float = flag(0.0, "decoupled weight decay of the block matrices")
    momentum: float = flag(0.95, "momentum of Muon, after its warm-up")
    momentum_start: float = flag(0.85, "Muon's momentum at the first step")
    momentum_warmup_steps: int = flag(300, "steps of Muon's momentum warm-up")
    warmup_steps: int = flag(0, "steps of linear learning-rate warm-up")
    warmdown_ratio: float = flag(0.4, "last share of the run, of linear warm-down")
    final_lr_frac: float = flag(0.0, "learning rate at the end, as a share of the full one")
    grad_clip: float = flag(0.0, "clip the gradient's norm to this; 0 is off")

    head_rank: int = flag(
        0,
        "rank of the output head's weight gradient, which then is a pair of sketches for AdamW in "
        "their subspace; 0 is the exact gradient",
    )

    log_every: int = flag(1, "steps between log lines; the loss is read back only then")
    monitor_every: int = flag(
        10,
        "steps between readings of the converted layers' metrics (streaming/..., layer/...) and "
        "health checks, at the next log line; 0 is off",
    )
    layer_metrics: bool = flag(True, "log each converted layer's metrics (layer/...) too")
    shadow_every: int = flag(
        250,
        "steps between comparisons of estimated gradients with the true ones (shadow/...), an "
        "extra pass each that changes nothing; 0 is off",
    )
    shadow_layers: str = flag(
        "auto",
        "layers that are compared: auto (see molegrad.monitor.shadow), all, or names and patterns "
        "as --streaming_target_layers takes them",
    )
    eval_every: int = flag(250, "steps between evaluations of val/bpb; 0: at the end only; -1: no")
    eval_tokens: int = flag(0, "tokens per evaluation; 0 takes 10485760 on CUDA, 65536 elsewhere")
    sample_every: int = flag(2000, "steps between samples; 0: at the end only; -1: no")
    save_every: int = flag(
        -1, "steps between checkpoints; -1 or 0: at the end only; -2: never, not even on Ctrl-C"
    )
    keep_last: int = flag(2, "checkpoints to keep; 0 keeps all")
    if_needed: bool = flag(
        False,
        "do what is left to do: nothing where this run has ended with the same flags and data, the "
        "rest where it was interrupted, all of it where anything differs (as --overwrite does)",
    )
    resume: bool = flag(
        False, "go on from the newest whole checkpoint of this run, if there is one"
    )
    resume_from_step: int = flag(-1, "go on from the checkpoint of this step; -1 is off")
    overwrite: bool = flag(False, "delete the checkpoints of an earlier run of this name")

    streaming: MoleGradConfig | None = field(default=None, metadata={"group": Streaming()})
    # Why `streaming` has its method; "" where `resolve` is to choose between power and tangent.
    method_because: str = field(default=AS_GIVEN, metadata={"hidden": True})
    health: str = flag(
        "default",
        "what a health finding leads to: off, warn, reset (the layer's bases) or raise, for all of "
        f"{', '.join(KINDS)} or single ones (frozen=reset,nan=raise); default is "
        f"{','.join(f'{kind}={action}' for kind, action in DEFAULT_ACTIONS.items())}",
    )
    health_limits: HealthThresholds = field(
        default=HealthThresholds(),
        metadata={"group": Prefixed("health_limits", HealthThresholds, "health_")},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ranges()
        parse_dashboards(self.dashboards)  # all checked now, not when the model is there
        parse_actions(self.health)
        if self.stochastic_rounding and self.weight_dtype != "bfloat16":
            raise ValueError(
                "stochastic_rounding=True is for bfloat16 weights, got "
                f"weight_dtype={self.weight_dtype}: give weight_dtype=bfloat16 too, or leave it off"
            )
        if self.resuming and self.overwrite or self.if_needed and (self.resuming or self.overwrite):
            raise ValueError(
                "overwrite starts over, resume goes on, if_needed does what is left: give one"
            )
        if self.offload and self.compile:
            raise ValueError(
                "offload=True is not for compiled models, whose graphs cannot choose streams and "
                "buffers: give compile=False, or offload=False"
            )
        if self.grouped and self.compile:
            raise ValueError(
                "streaming_group_mib is not for compiled models: give compile=False, or leave it "
                "at 0"
            )
        if self.streaming is not None and self.streaming.gradient_mode == "momentum":
            for name, wanted in (("optimizer", "muon"), ("grad_clip", 0.0)):
                if getattr(self, name) != wanted:
                    raise ValueError(
                        f"streaming_gradient_mode='momentum' needs {name}={wanted}, got "
                        f"{getattr(self, name)}: Muon steps from the momentum that the backward "
                        "passes add to; for anything else take streaming_gradient_mode='grad'"
                    )

    def _check_ranges(self) -> None:
        non_negative = (
            "threads max_seq_len device_batch_size total_batch_size matrix_lr embedding_lr "
            "unembedding_lr scalar_lr weight_decay momentum_warmup_steps warmup_steps grad_clip "
            "eval_tokens keep_last seed monitor_every shadow_every head_rank"
        )
        for name in non_negative.split():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmdown_ratio", "final_lr_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("momentum", "momentum_start"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.save_every < -2:
            raise ValueError(
                f"save_every must be a number of steps, -1 (at the end) or -2 (never), got "
                f"{self.save_every}"
            )
        if self.log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {self.log_every}")
        if self.num_iterations == 0 or self.max_train_tokens == 0:
            raise ValueError("num_iterations and max_train_tokens must be positive, or -1 for off")

    @property
    def resuming(self) -> bool:
        return self.resume or self.resume_from_step >= 0

    @property
    def enable_streaming(self) -> bool:
        return self.streaming is not None

    @property
    def grouped(self) -> bool:
        """Whether sketches of several layers are computed together."""
        return self.streaming is not None and self.streaming.estimator.shared() is not None

    @property
    def factors(self) -> bool:
        """Whether the blocks' gradients are factors."""
        return self.streaming is not None and self.streaming.gradient_mode == "factors"


@dataclass(frozen=True)
class BaseTrainConfig(TrainFlags):
    """Train a GPT from scratch on text.

    One dial, --depth, sets the model's size. Everything is written under
    $MOLEGRAD_HOME/runs/RUN/base.
    """

    depth: int = flag(12, "number of transformer blocks; the width is aspect_ratio * depth")
    aspect_ratio: int = flag(64, "width per block")
    head_dim: int = flag(0, "numbers per attention head; 0 takes 128, or less for narrow models")
    kv_groups: int = flag(1, "query heads that share one key/value head")
    loss_chunk: int = flag(0, "tokens whose logits exist at a time; 0 fits them to the device")
    target_param_data_ratio: float = flag(
        12.0, "tokens per parameter (block matrices and head) where no number of steps is given"
    )
    data: str = flag(
        "embedded", "corpus: embedded, a file or folder of text, or NAME:SHARDS to download"
    )
    val_data: str = flag("", "validation text for local data; empty splits some off")
    data_max_bytes: int = flag(0, "use only this much of the corpus; 0 is all")
    tokenizer: str = flag("", "name of a tokenizer that tok_train made; empty is the default one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_iterations < 0 and self.max_train_tokens < 0:
            ratio = self.target_param_data_ratio
            if ratio <= 0:
                raise ValueError(
                    f"target_param_data_ratio must be positive, got {ratio}, where neither "
                    "num_iterations nor max_train_tokens is given"
                )


def resolve(config, device: torch.device, world_size: int = 1):
    """`config` with every "auto" replaced by its value on `device`, and the low-rank method that
    its steps need.

    Raises:
        ValueError: total_batch_size is no multiple of one micro-batch of all devices; or the
            streaming flags do not go with accumulation or with several processes.
    """
    gpu = device.type == "cuda"
    length = config.max_seq_len or (2048 if gpu else 256)
    rows = config.device_batch_size or (32 if gpu else 16)
    micro = length * rows * world_size
    total = config.total_batch_size or (max(1, 524288 // micro) * micro if gpu else micro)
    if total % micro:
        below, above = total // micro * micro, (total // micro + 1) * micro
        raise ValueError(
            f"total_batch_size={total} is no multiple of one micro-batch of all devices, "
            f"{rows} x {length} x {world_size} = {micro} tokens: take "
            f"{f'{below} or ' if below else ''}{above}, or another device_batch_size"
        )
    if config.grouped and world_size > 1:
        raise ValueError(
            f"streaming_group_mib is not for data parallelism, got {world_size} processes: leave "
            "it at 0"
        )
    values = {"device_type": device.type, "max_seq_len": length, "device_batch_size": rows}
    values["total_batch_size"] = total
    if config.dtype == "auto":
        values["dtype"] = "bfloat16" if gpu else "float32"
    if config.weight_dtype == "auto":
        values["weight_dtype"] = "float32"
    if config.compile is None:
        values["compile"] = gpu and not config.grouped and not config.offload
    if config.matrix_lr == 0:
        doubled = config.factors and config.optimizer == "adamw"
        values["matrix_lr"] = MATRIX_LR[config.optimizer] * (2 if doubled else 1)
    if config.eval_tokens == 0:
        values["eval_tokens"] = 20 * 524288 if gpu else 65536
    return with_method(replace(config, **values), world_size)


def micro_tokens(config) -> int:
    """Tokens of a micro-batch of one process."""
    return config.device_batch_size * config.max_seq_len


def compute_dtype(config) -> torch.dtype:
    """The dtype of the matrix products of a resolved configuration."""
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def device_of(config, local_rank: int = 0) -> torch.device:
    """The device of this process; with several on one machine each takes its own GPU."""
    device = pick_device(config.device_type)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", local_rank)
    return device
