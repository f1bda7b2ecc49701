"""What a block keeps of its activations for the backward pass: every lever against memory that
grows with the sequence.

| lever | numbers a token that a block of width C keeps, its input included | computed again |
|---|---|---|
| none | 18 C: eight of the attention's half, ten of the feed-forward network's | nothing |
| sequence_chunk, parts "mlp" | 9 C: of the feed-forward network its input is left | c_fc |
| sequence_chunk, parts "all" | 5 C: the input, q, k, v and what attention reads | projections too |
| recompute "selective" | 2 C: the block's input and what attention reads | all but attention |
| recompute "block" | 1 C: the block's input | all |

sequence_chunk bounds what exists while a block is at work, too: of the feed-forward network, and
with "all" of the projections, one chunk's activations (`molegrad.chunked`); so it goes well with
recompute, which keeps less but needs a whole block's activations at a time. offload moves what a
recomputed block keeps, its input, to the host's memory while the blocks above it are at work
(`molegrad.offload`).

How: `model.set_activations(Activations(sequence_chunk=4096, recompute="block"))`; the flags
--sequence_chunk, --sequence_parts, --recompute and --offload of every training stage do that.
Evaluation and generation keep nothing anyway and take no notice of it.

Sources: checkpointing, Chen et al. (2016); keeping the attention alone, Korthikanti et al. (2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from molegrad.chunked import in_chunks
from molegrad.offload import HostOffload
from molegrad.targets import layer_role

Parts = Literal["mlp", "all"]
Recompute = Literal["none", "selective", "block"]
RunBlock = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def _lever(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Activations:
    """The levers; also the flags of the same names.

    Raises:
        ValueError: a value is out of range, or one has no meaning without another.
    """

    sequence_chunk: int = _lever(
        0,
        "tokens whose feed-forward activations exist at a time; the backward pass computes them "
        "again, chunk by chunk (4096 suits a GPU, whose host has work with each, 512 a CPU); 0 is "
        "off",
    )
    sequence_parts: Parts = _lever(
        "mlp",
        "what runs in chunks: mlp, or all, which takes the attention's projections too",
    )
    recompute: Recompute = _lever(
        "none",
        "what the backward pass computes again: block, everything from each block's input on, or "
        "selective, all but the attention",
    )
    offload: bool = _lever(
        False, "keep the inputs of recomputed blocks in pinned host memory (needs --recompute)"
    )

    def __post_init__(self) -> None:
        if self.sequence_chunk < 0:
            raise ValueError(f"sequence_chunk must not be negative, got {self.sequence_chunk}")
        for name, choices in (("sequence_parts", Parts), ("recompute", Recompute)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}")
        if self.sequence_parts == "all" and not self.sequence_chunk:
            raise ValueError(
                "sequence_parts='all' says what runs in chunks: set sequence_chunk too, to 4096 "
                "for example"
            )
        if self.offload and self.recompute == "none":
            raise ValueError(
                "offload=True moves what a recomputed block keeps: set recompute to 'block' or "
                "'selective' too"
            )

    def streams(self, name: str) -> bool:
        """Whether a layer of that name, such as "transformer.h.0.mlp.c_fc", runs in chunks."""
        roles = {"mlp": ("ffn",), "all": ("ffn", "attention")}[self.sequence_parts]
        return self.sequence_chunk > 0 and layer_role(name) in roles

    def run(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        offload: HostOffload | None = None,
    ) -> Tensor:
        """The stream x (B, T, C) after all blocks."""
        blocks = list(blocks)
        run = partial(streamed, how=self) if self.sequence_chunk else _plain
        if self.recompute != "none":
            run = partial(recomputed, run, self.recompute)
        for left, block in zip(reversed(range(len(blocks))), blocks, strict=True):
            with nullcontext() if offload is None else offload.block(x, left):
                x = run(block, x, cos, sin)
        return x


def _plain(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return block(x, cos, sin)


def streamed(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, how: Activations) -> Tensor:
    """A block (`molegrad.gpt.model.gpt.Block`) whose token-wise parts run in chunks."""
    attn, mlp, chunk = block.attn, block.mlp, how.sequence_chunk
    if how.sequence_parts == "mlp":
        x = block.attention(x, cos, sin)
        return in_chunks(block.feed_forward, (x,), (mlp.c_fc,), chunk, last=mlp.c_proj)
    projections = (attn.c_q, attn.c_k, attn.c_v)
    q, k, v = in_chunks(block.project, (x,), projections, chunk, positional=(cos, sin))
    y = attn.attend(q, k, v)
    del q, k, v
    return in_chunks(block.finish, (x, y), (attn.c_proj, mlp.c_fc), chunk, last=mlp.c_proj)


def recomputed(
    run: RunBlock, kind: Recompute, block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """A block whose activations are computed again in the backward pass."""
    options = {"use_reentrant": False, "preserve_rng_state": False}  # it draws no random numbers
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(run, block, x, cos, sin, **options)


_ATTENTION = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
)


def _keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    kept = op in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
