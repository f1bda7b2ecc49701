"""The GPT this pipeline trains: one dial, `depth`, sets every size.

What: a decoder-only transformer of the nanochat class. Rotary positions, QK-norm, parameter-free
RMSNorm, relu² feed-forward of four times the width, no biases, untied head, logits bounded by a
tanh softcap, output projections that start at zero. Attention is torch's
`scaled_dot_product_attention`, so that it runs on every device that torch knows.

Why its own file and not a library's model: the module names (`transformer.h.0.mlp.c_fc`, ...) are
those of GPT-2 and nanochat, every matrix is a plain `nn.Linear` that `molegrad.convert` can swap,
and the loss never holds more logits than one chunk of tokens (`molegrad.gpt.model.loss`).

How to run:

    model = GPT(GPTConfig(depth=4, vocab_size=4096, max_seq_len=256))
    loss = model(inputs, targets)          # scalar, float32
    logits = model(inputs)                 # (B, T, vocab_size), float32

Shapes: B sequences, T tokens each, C width, H heads of D numbers, C = H·D.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molegrad.gpt.model.activations import Activations
from molegrad.gpt.model.loss import linear_cross_entropy, softcap
from molegrad.linear import MoleLinear
from molegrad.offload import HostOffload


def _size(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. `width`, `n_head` and `n_kv_head` follow from the other fields.

    Raises:
        ValueError: a size is out of range or does not divide; the message names it.
    """

    depth: int = _size(12, "number of transformer blocks")
    aspect_ratio: int = _size(64, "width per block: width = aspect_ratio * depth, rounded up")
    head_dim: int = _size(
        0, "numbers per attention head; 0 takes 128, or 64 or 32 for narrow models"
    )
    kv_groups: int = _size(1, "query heads that share one key/value head (1: none share)")
    vocab_size: int = _size(32768, "number of tokens known")
    max_seq_len: int = _size(2048, "context length in tokens")
    softcap: float = _size(15.0, "logits stay within +-softcap; 0 switches it off")
    rope_base: float = _size(10000.0, "base of the rotary frequencies")
    loss_chunk: int = _size(0, "tokens whose logits exist at a time; 0 fits them to the device")

    def __post_init__(self) -> None:
        for name in ("depth", "aspect_ratio", "kv_groups", "vocab_size", "max_seq_len"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("head_dim", "softcap", "loss_chunk"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.head_dim == 0:
            wish = self.aspect_ratio * self.depth
            auto = next((d for d in (128, 64, 32) if wish >= 4 * d), 32)
            object.__setattr__(self, "head_dim", auto)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.n_head % self.kv_groups:
            raise ValueError(
                f"kv_groups={self.kv_groups} must divide the {self.n_head} heads "
                f"(width {self.width} / head_dim {self.head_dim})"
            )

    @property
    def width(self) -> int:
        """C: aspect_ratio * depth, rounded up to whole heads."""
        return -(-self.aspect_ratio * self.depth // self.head_dim) * self.head_dim

    @property
    def n_head(self) -> int:
        return self.width // self.head_dim

    @property
    def n_kv_head(self) -> int:
        return self.n_head // self.kv_groups


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension, in x's dtype; no parameters.

    CUDA's autocast would make it float32 and keep a copy of x in that for the backward pass; the
    kernel sums in float32 all the same.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, head_dim / 2) float32, of position times inverse frequency.

    Source: Su et al., RoFormer (arXiv:2104.09864); a head's first half pairs with its second.
    """
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) turned by the angles of its positions; cos and sin (T, 1, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.kv_groups > 1
        kv_width = config.n_kv_head * config.head_dim
        self.c_q = nn.Linear(config.width, config.width, bias=False)
        self.c_k = nn.Linear(config.width, kv_width, bias=False)
        self.c_v = nn.Linear(config.width, kv_width, bias=False)
        self.c_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache=None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `cache`: see `molegrad.gpt.model.engine.KVCache`."""
        q, k, v = self.project(x, cos, sin, self.c_q, self.c_k, self.c_v)
        return self.c_proj(self.attend(q, k, v, cache))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, c_q, c_k, c_v) -> tuple[Tensor, ...]:
        """x (B, T, C) -> q, k, v (B, T, heads, D), turned and normalised; of each token alone."""
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.head_dim) for layer in (c_q, c_k, c_v))
        return rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache=None) -> Tensor:
        """q, k, v (B, T, heads, D) -> (B, T, C), what each token reads of those before it."""
        batch, length = q.shape[:2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        mask = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            if 1 < length < k.size(2):  # new tokens see all earlier ones and their own past
                mask = torch.ones(length, k.size(2), dtype=torch.bool, device=q.device)
                mask = mask.tril(k.size(2) - length)
        causal = mask is None and length == k.size(2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped
        )
        return y.transpose(1, 2).reshape(batch, length, -1)


class ReluSquared(torch.autograd.Function):
    """relu(x)². Keeps relu(x) alone, from which the backward pass is one product, 2 relu(x) grad:
    the chain of relu and square takes six passes over the widest activation instead of two."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(grad, positive).mul_(2.0)


class MLP(nn.Module):
    """Feed-forward layer: C -> 4C, relu², 4C -> C. Source: So et al. (arXiv:2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width, bias=False)
        self.c_proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(ReluSquared.apply(self.c_fc(x)))


class Block(nn.Module):
    """One transformer block: attention, then feed-forward, each on the normalised stream.

    The methods beside `forward` are its token-wise parts, which `Activations` runs in chunks.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache=None) -> Tensor:
        x = self.attention(x, cos, sin, cache)
        return x + self.mlp(rms_norm(x))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache=None) -> Tensor:
        """The first half: x and what the tokens read of one another."""
        return x + self.attn(rms_norm(x), cos, sin, cache)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, c_q, c_k, c_v) -> tuple[Tensor, ...]:
        """q, k and v (B, T, heads, D) of the stream x (B, T, C)."""
        return self.attn.project(rms_norm(x), cos, sin, c_q, c_k, c_v)

    def feed_forward(self, x: Tensor, c_fc) -> tuple[Tensor, Tensor]:
        """What mlp.c_proj takes (B, T, 4C), and what is added to its result, x itself."""
        return ReluSquared.apply(c_fc(rms_norm(x))), x

    def finish(self, x: Tensor, y: Tensor, c_proj, c_fc) -> tuple[Tensor, Tensor]:
        """`feed_forward` of the stream to which what attention read, y (B, T, C), is added."""
        return self.feed_forward(x + c_proj(y), c_fc)


class GPT(nn.Module):
    """The model. `state_dict()` holds the weights alone, under GPT-2's names."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        """Weights are drawn on the CPU from `seed`, the same for every device."""
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.width),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.depth)),
            }
        )
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.set_activations(Activations())
        self.reset_buffers()
        if not self.lm_head.weight.is_meta:
            self.reset_parameters(seed)

    @classmethod
    def made_on(cls, device: torch.device, config: GPTConfig, seed: int = 0) -> "GPT":
        """A model whose weights are drawn on `device`: on the CPU those of `GPT(config, seed)`, on
        a GPU others of the same distributions, by its own generator, in a fraction of the time."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device=device)
        model.reset_buffers()
        model.reset_parameters(seed)
        return model

    def set_activations(self, how: Activations) -> None:
        """What training passes keep of a block's activations."""
        self.activations = how
        self._offload = HostOffload() if how.offload else None

    def reset_buffers(self) -> None:
        """Make the rotary tables, on the weights' device."""
        c = self.config
        cos, sin = rotary_tables(c.max_seq_len, c.head_dim, c.rope_base)
        self.register_buffer("cos", cos.to(self.device), persistent=False)
        self.register_buffer("sin", sin.to(self.device), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Embedding N(0, 1); head N(0, 0.001²); c_proj zero, so that every block starts as the
        identity; the other matrices uniform with standard deviation 1/sqrt(C)."""
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        bound = math.sqrt(3.0 / self.config.width)
        self.transformer["wte"].weight.normal_(0.0, 1.0, generator=generator)
        self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        for block in self.transformer["h"]:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                matrix.weight.uniform_(-bound, bound, generator=generator)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def hidden(self, idx: Tensor, cache=None) -> Tensor:
        """idx (B, T) integer tokens -> (B, T, C), the normalised output of the last block.

        Raises:
            ValueError: the sequence (with what `cache` holds) is longer than max_seq_len.
        """
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        if end > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {end} tokens does not fit max_seq_len={self.config.max_seq_len}: "
                "shorten the input or build the model with a larger max_seq_len"
            )
        x = rms_norm(self.transformer["wte"](idx))
        if torch.is_autocast_enabled(x.device.type):  # one stream dtype, whatever the weights'
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos = self.cos[start:end, None].to(x.dtype)
        sin = self.sin[start:end, None].to(x.dtype)
        blocks = self.transformer["h"]
        if cache is None and torch.is_grad_enabled():
            x = self.activations.run(blocks, x, cos, sin, self._offload)
        else:  # nothing is kept anyway
            for block in blocks:
                x = block(x, cos, sin, cache)
        if cache is not None:
            cache.advance(idx.size(1))
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> (..., vocab_size) float32 (float64 for a float64 model)."""
        raw = self.lm_head(hidden)
        return softcap(raw if raw.dtype == torch.float64 else raw.float(), self.config.softcap)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache=None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            idx: (B, T) int64 tokens.
            targets: (B, T) int64 tokens to predict, -1 where a position does not count.
            cache: a `KVCache` whose tokens precede idx, for generation.
            loss_reduction: "mean" over the targets that count (0 where none does), "sum", or
                "none", which gives (B, T) with 0 at the positions that do not count.

        Returns:
            (B, T, vocab_size) float32 logits, or the loss in nats, float32.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x)
        c = self.config
        return linear_cross_entropy(
            x, self.lm_head, targets, c.softcap, c.loss_chunk, loss_reduction
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Weights by role: "embedding", "head", "matrix" (2-D weights of the blocks) and "scalar"
        (any other), whether or not they take a gradient of their own."""
        layers = [m for m in self.modules() if isinstance(m, MoleLinear)]
        working = {id(p) for layer in layers for p in layer.working_parameters}
        blocks = [p for p in self.transformer["h"].parameters() if id(p) not in working]
        return {
            "embedding": [self.transformer["wte"].weight],
            "head": [self.lm_head.weight],
            "matrix": [p for p in blocks if p.ndim == 2],
            "scalar": [p for p in blocks if p.ndim != 2],
        }

    def count_parameters(self) -> dict[str, int]:
        """Number of weights by role, and "total"."""
        counts = {k: sum(p.numel() for p in v) for k, v in self.parameter_groups().items()}
        return {**counts, "total": sum(counts.values())}
