"""The weight gradient of one linear layer, gathered chunk by chunk of its tokens.

What: `chunked_gradient(layer, dtype)` gives an object that is told A (t, n) and B (t, m) of one
chunk after the other, and at the end has the gradients of the layer's parameters: what
`MoleLinear`'s own backward pass would have made of the whole A and B. Sums of products and of
sketches are the same to rounding, as they are linear in the gradient. Method "sampled" draws a
sample of each chunk: as unbiased, and for share 1 the same.

Why: whoever recomputes activations a chunk at a time (`molegrad.streaming`), or makes the gradient
of logits that exist a chunk at a time (`molegrad.gpt.model.loss`), never has the whole A and B. Nothing
is kept of them here either, so `saved_inputs` has no meaning and A is taken as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from molegrad.autograd import STATS, tangent_estimate, tangent_start
from molegrad.config import explored_directions
from molegrad.linear import MoleLinear
from molegrad.ops.amp import without_autocast
from molegrad.ops.checks import acc_dtype

_SAMPLED = slice(STATS.index("sampled_share"), len(STATS))


def require_chunkable(layer: nn.Linear, where: str) -> None:
    """ValueError where the layer's gradient cannot be gathered from chunks of tokens.

    Args:
        where: what asks for it, for the message; a flag, "--sequence_chunk", also as the way out.
    """
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{where} takes linear layers, got {type(layer).__name__}")
    off = f", or give {where}=0" if where.startswith("--") else ""
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"{where} takes plain weights, and this layer's is parametrized (weight_norm and its "
            f"like), so that its parameters would get no gradient: leave the layer out{off}"
        )
    if type(layer) not in (nn.Linear, MoleLinear) or "forward" in vars(layer):
        raise ValueError(
            f"{where} takes nn.Linear and MoleLinear, got {type(layer).__name__} with a forward "
            "pass that may be its own, which chunks, products with its weight, would leave out: "
            f"merge its adapter, or leave the layer out{off}"
        )
    if not isinstance(layer, MoleLinear) or not layer.trains:
        return
    reason = {
        "power": "makes two passes over all tokens, the second with what the first has found",
        "projected": "keeps a projection of its whole input, where streaming keeps no input at all",
    }.get(layer.config.method)
    if reason:
        raise ValueError(
            f"layer {layer.name or 'MoleLinear'}: method={layer.config.method!r} {reason}, which "
            f"{where} cannot give it: choose method='tangent' or 'sampled', or leave the layer "
            f"out{off}"
        )


def parameters_of(layer: nn.Linear) -> tuple[Tensor, ...]:
    """The parameters that `ChunkedGradient.finish` gives gradients for, in its order."""
    factored = isinstance(layer, MoleLinear) and layer.config.gradient_mode == "factored"
    own = (layer.basis_u, layer.basis_v) if factored else (layer.weight,)
    return own if layer.bias is None else (*own, layer.bias)


def trains(layer: nn.Linear) -> bool:
    """Whether a layer's weight is trained, in whatever mode."""
    return layer.trains if isinstance(layer, MoleLinear) else layer.weight.requires_grad


def chunked_gradient(layer: nn.Linear) -> ChunkedGradient:
    """The accumulator that a layer's configuration asks for; `require_chunkable` said yes."""
    if not trains(layer):
        return ChunkedGradient(layer)
    if not isinstance(layer, MoleLinear):
        return _Dense(layer)
    if layer.config.method == "sampled":
        return _Sampled(layer)
    return _Factored(layer) if layer.config.gradient_mode == "factored" else _Tangent(layer)


class ChunkedGradient:
    """Of a frozen weight: of the bias alone. Others add the weight's."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._bias: Tensor | None = None

    @without_autocast
    def add(self, a: Tensor, b: Tensor) -> None:
        """A chunk's inputs A (…, n) and output gradients B (…, m)."""
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        if self.layer.bias is not None and self.layer.bias.requires_grad:
            part = b.sum(0, dtype=acc_dtype(b.dtype))
            self._bias = part if self._bias is None else self._bias.add_(part)
        self._add(a, b)

    @without_autocast
    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients of `parameters_of(layer)`; None where there is none to give."""
        own = self._finish()
        if self.layer.bias is None:
            return own
        return (*own, None if self._bias is None else self._bias.to(self.layer.bias.dtype))

    def _add(self, a: Tensor, b: Tensor) -> None:
        pass

    def _finish(self) -> tuple[Tensor | None, ...]:
        return (None,) * (len(parameters_of(self.layer)) - (self.layer.bias is not None))


class _Dense(ChunkedGradient):
    """G = BᵀA of a plain layer, in the weight's dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._sum: Tensor | None = None

    def _add(self, a: Tensor, b: Tensor) -> None:
        if self._sum is None:
            self._sum = (b.mT @ a).to(self.layer.weight.dtype)
        elif self._sum.dtype == b.dtype:
            self._sum.addmm_(b.mT, a)
        else:
            self._sum += b.mT @ a

    def _finish(self) -> tuple[Tensor | None, ...]:
        return (self._sum,)


class _Sketch(ChunkedGradient):
    """Y = G [V, Ω] and W = Gᵀ U."""

    def __init__(self, layer: MoleLinear) -> None:
        super().__init__(layer)
        self._sketches: tuple[Tensor, Tensor] | None = None

    def _bases(self) -> tuple[Tensor, Tensor]:
        return self.layer.basis_u.detach(), self.layer.basis_v.detach()

    def _add(self, a: Tensor, b: Tensor) -> None:
        u, v = self._bases()
        scales = (None, None)
        if self.layer.config.products == "fp8":
            a, b, scales = _float8(a, b)
        if self._sketches is None:
            dtype = acc_dtype(a.dtype, b.dtype)
            y = torch.zeros(b.shape[-1], v.shape[1], dtype=dtype, device=a.device)
            w = torch.zeros(a.shape[-1], u.shape[1], dtype=dtype, device=a.device)
            self._sketches = y, w
        torch.ops.molegrad.sketch_accumulate_(*self._sketches, a, b, u, v, *scales)


class _Factored(_Sketch):
    """The sketches themselves, as gradients of the two bases."""

    def _finish(self) -> tuple[Tensor | None, ...]:
        if self._sketches is None:
            return None, None
        y, w = self._sketches
        return y.to(self.layer.basis_u.dtype), w.to(self.layer.basis_v.dtype)


class _Tangent(_Sketch):
    """Ĝ as a matrix; bases and statistics move when it is made."""

    def __init__(self, layer: MoleLinear) -> None:
        super().__init__(layer)
        c = layer.config
        self._start = tangent_start(layer.basis_v, c.probes, layer.counter, layer._seed)

    def _bases(self) -> tuple[Tensor, Tensor]:
        return self.layer.basis_u, self._start

    def _finish(self) -> tuple[Tensor | None, ...]:
        if self._sketches is None:
            return (None,)
        layer, c = self.layer, self.layer.config
        y, w = (x.to(layer.basis_v.dtype) for x in self._sketches)
        estimate = tangent_estimate(
            y, w, self._start, layer.basis_u, layer.basis_v, layer.counter, layer.stats,
            c.trust_max if c.trust_scaling else 0.0,
            explored_directions(layer.rank, c.warm_start_decay), layer._seed, c.cond_max,
        )  # fmt: skip
        return (estimate.to(layer.weight.dtype),)


class _Sampled(ChunkedGradient):
    """A sample of each chunk's products, added to the momentum where there is one. A narrow
    momentum gets their sum at the end, so that it is rounded once and not by each chunk."""

    def __init__(self, layer: MoleLinear) -> None:
        super().__init__(layer)
        momentum = layer.momentum
        self._at_once = momentum is not None and momentum.dtype in (torch.float32, torch.float64)
        self._target = momentum.detach() if self._at_once else None
        self._told: Tensor | float = 0.0  # what the samples tell of themselves, times tokens
        self._tokens = 0

    def _add(self, a: Tensor, b: Tensor) -> None:
        layer, c = self.layer, self.layer.config
        if self._target is None:
            narrow = layer.momentum is not None and layer.momentum.is_floating_point()
            like = layer.momentum if narrow else layer.weight
            self._target = torch.zeros_like(like.detach())
        told = torch.ops.molegrad.sampled_grad_(
            self._target, a, b, None, layer.counter, layer.share, c.sample_block, 1.0, layer._seed
        )
        self._told, self._tokens = self._told + told * a.shape[0], self._tokens + a.shape[0]
        layer.counter.add_(1)

    def _finish(self) -> tuple[Tensor | None, ...]:
        layer = self.layer
        if self._tokens:
            layer.stats[_SAMPLED] = self._told / self._tokens
        if layer.momentum is None:
            return (self._target,)
        if not self._at_once and self._target is not None:
            if layer.momentum_scale is None:
                layer.momentum.detach().add_(self._target)
            else:
                torch.ops.molegrad.add_quantized_(
                    layer.momentum, layer.momentum_scale, self._target
                )
        return (None,)


def _float8(a: Tensor, b: Tensor):
    """Chunks as `products="fp8"` reads them, with their scales."""
    a, a_scale = torch.ops.molegrad.quantize_rows(a)
    b, b_scale = torch.ops.molegrad.quantize_rows(b, True)
    return a, b, (a_scale, b_scale)
