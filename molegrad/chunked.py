"""Token-wise parts of a model, run in chunks of tokens in the forward and in the backward pass.

`in_chunks(function, inputs, layers, chunk)` is `function(*inputs, *layers)` for a function that
treats every token by itself, such as a feed-forward network with its norm. Of everything that
arises inside, the activations of one chunk exist at a time: the backward pass runs the function on
each chunk again and goes back through it at once. Kept from the forward pass are `inputs` alone.

    def feed_forward(x, c_fc):                       # all but the last matrix
        return relu_squared(c_fc(norm(x))), x

    y = in_chunks(feed_forward, (x,), (mlp.c_fc,), chunk=1024, last=mlp.c_proj)   # x + c_proj(...)

`torch.utils.checkpoint` on chunks would add to `weight.grad` once a chunk. Here a `LayerGradient`
gathers each layer's gradient, and each parameter gets it once, when all chunks are through: hooks
run once, DistributedDataParallel works, sums of sketches are exact, and no gradient matrix exists
where the layer's configuration needs none. The product of `last` is not computed a second time;
those of `layers` are.

Random numbers that a function draws (dropout) are the same in both passes, by the generators'
states as `torch.utils.checkpoint` keeps them; only in the making of a CUDA graph they are not.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from torch.utils.checkpoint import get_device_states, set_device_states

from molegrad.linear import MoleLinear
from molegrad.ops.amp import without_autocast
from molegrad.ops.checks import acc_dtype

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


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
    if isinstance(layer, MoleLinear) and layer.trains:
        reason = layer.config.estimator.needs_all_tokens
        if reason is not None:
            raise ValueError(
                f"layer {layer.name or 'MoleLinear'} cannot run in chunks ({where}): {reason}, or "
                f"leave the layer out{off}"
            )


def trains(layer: nn.Linear) -> bool:
    """Whether a layer's weight is trained, in whatever mode."""
    return layer.trains if isinstance(layer, MoleLinear) else layer.weight.requires_grad


def parameters_of(layer: nn.Linear) -> tuple[Tensor, ...]:
    """The parameters that `LayerGradient.finish` gives gradients for, in its order."""
    sketches = layer.sketches if isinstance(layer, MoleLinear) else ()
    bias = () if layer.bias is None else (layer.bias,)
    return (layer.weight, *sketches, *bias)


class LayerGradient:
    """The gradients of a linear layer's parameters, gathered chunk by chunk of its tokens: what the
    layer's own backward pass would have made of the whole A and B.

    Sums of products and of sketches are the same to rounding; a sampled estimate draws a sample of
    each chunk. Nothing is kept of A and B, so `saved_inputs` has no meaning here. The layer has to
    pass `require_chunkable`.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self._sums = layer, None
        self._bias: Tensor | None = None
        if not trains(layer):
            return
        if isinstance(layer, MoleLinear):
            self._sums = layer.config.estimator.accumulator(layer.state)
        else:
            self._sums = _PlainSum(layer.weight)

    @without_autocast
    def add(self, a: Tensor, b: Tensor) -> None:
        """A chunk's inputs A (…, n) and output gradients B (…, m)."""
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        if self.layer.bias is not None and self.layer.bias.requires_grad:
            part = b.sum(0, dtype=acc_dtype(b.dtype))
            self._bias = part if self._bias is None else self._bias.add_(part)
        if self._sums is not None:
            self._sums.add(a, b)

    @without_autocast
    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients of `parameters_of(layer)`; None where there is none to give."""
        bias = self.layer.bias
        count = len(parameters_of(self.layer)) - (bias is not None)
        own = (None,) * count if self._sums is None else self._sums.finish()
        own = (*own, *(None,) * (count - len(own)))
        if bias is None:
            return own
        return (*own, None if self._bias is None else self._bias.to(bias.dtype))


class _PlainSum:
    """G = BᵀA of a plain layer, in the weight's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.sum: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.sum is None:
            self.sum = (b.mT @ a).to(self.dtype)
        elif self.sum.dtype == b.dtype:
            self.sum.addmm_(b.mT, a)
        else:
            self.sum += b.mT @ a

    def finish(self) -> tuple[Tensor | None]:
        return (self.sum,)


def in_chunks(
    function: Function,
    inputs: Sequence[Tensor],
    layers: Sequence[nn.Linear],
    chunk: int,
    *,
    last: nn.Linear | None = None,
    positional: Sequence[Tensor] = (),
) -> Tensor | tuple[Tensor, ...]:
    """`function(*inputs, *positional, *layers)`, a chunk of tokens at a time.

    Args:
        function: token-wise, the same in both passes, without trainable parameters of its own (such
            as a LayerNorm's: give the normalised tensor as an input) and without in-place changes
            of its arguments. Called with slices of `inputs` and `positional` and with the layers as
            callables; returns a tensor (B, t, …) or a tuple of them.
        inputs: (B, T, …) each; what is differentiated, and all that is kept.
        layers: linear layers, plain or MoleLinear, that `function` may call, each once.
        chunk: tokens of all B sequences together that exist at a time: max(1, chunk // B)
            positions.
        last: the layer that comes last. Then `function` returns its input h, or (h, r), and the
            result is last(h), or r + last(h).
        positional: (T, …) tensors without gradient, such as rotary tables.

    Where one of the layers has hooks nothing is chunked: hooks want to see a layer's calls as they
    are otherwise. Computed eagerly under torch.compile (the graph breaks here).

    Raises:
        TypeError: chunk is no integer, or what `function` returns no tensor or tuple of tensors.
        ValueError: shapes do not fit, chunk is not positive, `function` has trainable parameters of
            its own or returns more than `last` takes, or a layer cannot run in chunks (see
            `require_chunkable`).
    """
    try:
        chunk = operator.index(chunk)
    except TypeError:
        message = f"chunk must be an integer, a number of tokens, got {chunk!r}"
        raise TypeError(message) from None
    if chunk < 1:
        raise ValueError(f"chunk must be a number of tokens >= 1, got {chunk}")
    if not inputs or any(x.dim() < 2 for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"inputs must be one or more tensors (B, T, …), got {shapes or 'none'}")
    batch, length = inputs[0].shape[:2]
    if any(x.shape[:2] != (batch, length) for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"inputs must agree in (B, T), got {shapes}")
    if any(x.shape[0] != length for x in positional):
        shapes = ", ".join(str(tuple(x.shape)) for x in positional)
        raise ValueError(f"positional tensors need T={length} rows, got {shapes}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in positional):
        raise ValueError(
            "positional tensors get no gradient, and one of them requires it: give it as one of "
            "`inputs`, (B, T, …), or detach it"
        )
    used = [*layers, *([] if last is None else [last])]
    for layer in used:
        require_chunkable(layer, "in_chunks")
    positions = max(1, chunk // max(1, batch))
    return _in_chunks(function, tuple(inputs), tuple(positional), tuple(layers), last, positions)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@torch.compiler.disable
def _in_chunks(function, inputs, positional, layers, last, positions):
    used = (*layers, *(() if last is None else (last,)))
    if any(getattr(layer, hooks) for layer in used for hooks in _HOOKS):
        return _whole(function, inputs, positional, layers, last)
    if torch.is_grad_enabled():
        for layer in used:
            if isinstance(layer, MoleLinear) and layer.trains and layer.stepped is not None:
                layer.steps.expect(layer, inputs[0].device.type)
    call = _Call(function, positional, layers, last, positions, inputs[0].device.type)
    parameters = [p for layer in used for p in parameters_of(layer)]
    return _Chunks.apply(call, len(inputs), *inputs, *parameters)


def _whole(function, inputs, positional, layers, last):
    result = function(*inputs, *positional, *layers)
    outputs = _outputs(result, inputs[0].shape[:2], last)
    if last is None:
        return result
    h, *rest = outputs
    return rest[0] + last(h) if rest else last(h)


def _outputs(result, size: torch.Size, last) -> tuple[Tensor, ...]:
    """What a function has returned for (B, t) tokens, checked."""
    outputs = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(y, Tensor) for y in outputs) or not outputs:
        kinds = ", ".join(type(y).__name__ for y in outputs)
        raise TypeError(
            "a function in chunks must return a tensor or a tuple of tensors, got "
            + (f"({kinds})" if isinstance(result, tuple) else kinds)
        )
    if last is not None and len(outputs) > 2:
        raise ValueError(
            f"a function in chunks before `last` returns its input h, or (h, r), got "
            f"{len(outputs)} tensors: leave `last` out and call it after in_chunks to return more"
        )
    if any(y.shape[:2] != size for y in outputs):
        shapes = ", ".join(str(tuple(y.shape)) for y in outputs)
        raise ValueError(
            f"a function in chunks must treat each token by itself: given (B, t) = {tuple(size)} "
            f"tokens it returned {shapes}, expected {tuple(size)} in front"
        )
    return outputs


def _require_no_parameters(outputs: tuple[Tensor, ...]) -> None:
    """ValueError where outputs want a gradient although every argument was detached: the function
    uses tensors of its own that would get none."""
    nodes = [y.grad_fn for y in outputs if y.requires_grad and y.grad_fn is not None]
    own = {id(y): y for y in outputs if y.requires_grad and y.grad_fn is None}
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            own[id(node.variable)] = node.variable
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        nodes += following
    if own:
        shapes = ", ".join(str(tuple(p.shape)) for p in own.values())
        raise ValueError(
            f"the function in chunks uses parameters of its own, of shape {shapes}, which would "
            "get no gradient: in_chunks trains `inputs`, `layers` and `last` alone. Apply modules "
            "with parameters (norms) before in_chunks and give their result as one of `inputs`, "
            "leave this part of the model out of it, or freeze them with requires_grad_(False)"
        )


class _Call:
    """One call of `in_chunks`: what both passes need to know beside tensors that are saved."""

    def __init__(self, function, positional, layers, last, positions, device_type: str) -> None:
        self.function, self.positional = function, positional
        self.layers, self.last, self.positions = layers, last, positions
        self.device_type = device_type
        self.autocast = torch.is_autocast_enabled(device_type)
        self.autocast_dtype = torch.get_autocast_dtype(device_type)
        self.several = False  # whether the result is a tuple
        self.trains = torch.is_grad_enabled()
        self._random: tuple | None = None

    def cast(self, x: Tensor | None) -> Tensor | None:
        """x as autocast has the operands of a product."""
        if x is None or not self.autocast or x.dtype == torch.float64:
            return x
        return x.to(self.autocast_dtype)

    def casts(self) -> contextlib.AbstractContextManager:
        """Autocast as it was; without its cache, which would keep what is cast for one chunk."""
        return torch.autocast(
            self.device_type, self.autocast_dtype, enabled=self.autocast, cache_enabled=False
        )

    def chunks(self, length: int):
        starts = range(0, max(1, length), self.positions)  # of no tokens an empty one
        return [slice(i, min(i + self.positions, length)) for i in starts]

    def keep_random(self, x: Tensor) -> None:
        """Remember the generators' states of the host and of x's device; none of it waits."""
        if self.trains and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._random = torch.get_rng_state(), *get_device_states(x)

    @contextlib.contextmanager
    def same_random(self):
        """Random numbers as the forward pass drew them; afterwards the generators go on."""
        if self._random is None:
            yield
            return
        host, devices, states = self._random
        kind = self.device_type if devices else "cuda"
        with torch.random.fork_rng(devices, device_type=kind):
            torch.set_rng_state(host)
            set_device_states(devices, states, device_type=kind)
            yield


class _Layer:
    """A layer as `function` calls it: its product, in the backward pass with a gradient."""

    def __init__(self, layer: nn.Linear, call: _Call, backward: bool) -> None:
        self.call = call
        self.weight = call.cast(layer.weight.detach())
        self.bias = None if layer.bias is None else call.cast(layer.bias.detach())
        self.gradient = LayerGradient(layer) if backward else None
        # What the chunk's graph leads to where the layer's input has no gradient of its own.
        self.anchor = torch.zeros((), requires_grad=True) if backward else None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.call.cast(x)
        if self.gradient is None:
            return F.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.anchor, self)


class _Product(torch.autograd.Function):
    """y = x Wᵀ + bias; its backward pass hands (A, B) to the layer's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, b: Tensor):
        (x,) = ctx.saved_tensors
        ctx.layer.gradient.add(x, b)
        return (b @ ctx.layer.weight if ctx.needs_input_grad[0] else None), None, None


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, count: int, *tensors: Tensor):
        inputs = tensors[:count]
        length = inputs[0].shape[1]
        layers = [_Layer(layer, call, backward=False) for layer in call.layers]
        last = None if call.last is None else _Layer(call.last, call, backward=False)
        whole: list[Tensor] = []
        call.keep_random(inputs[0])
        for part in call.chunks(length):
            pieces = (*(x[:, part].detach() for x in inputs), *(x[part] for x in call.positional))
            with torch.set_grad_enabled(call.trains):  # all is detached: it finds what is not
                result = _whole(call.function, pieces, (), layers, last)
            call.several = isinstance(result, tuple)
            parts = result if call.several else (result,)
            _require_no_parameters(parts)
            if not whole:
                whole = [y.new_empty(y.shape[0], length, *y.shape[2:]) for y in parts]
            for y, piece in zip(whole, parts, strict=True):
                y[:, part] = piece
        ctx.call, ctx.count = call, count
        # The weights are saved for their versions: changed in between, autograd says so.
        weights = [layer.weight for layer in (*call.layers, call.last) if layer is not None]
        ctx.save_for_backward(*inputs, *weights)
        return tuple(whole) if call.several else whole[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        call, count = ctx.call, ctx.count
        inputs = ctx.saved_tensors[:count]
        needed = ctx.needs_input_grad[2 : 2 + count]
        layers = [_Layer(layer, call, backward=True) for layer in call.layers]
        last = None if call.last is None else _Layer(call.last, call, backward=True)
        grad_inputs = [
            torch.empty_like(x) if need else None for x, need in zip(inputs, needed, strict=True)
        ]
        wanted = [grad for grad in grad_inputs if grad is not None]
        with call.same_random():
            for part in call.chunks(inputs[0].shape[1]):
                found = _chunk_gradients(call, inputs, needed, grads, layers, last, part)
                for grad, gradient in zip(wanted, found, strict=False):
                    grad[:, part] = 0.0 if gradient is None else gradient
                del found  # before the next chunk
        of_layers = [g for layer in layers for g in layer.gradient.finish()]
        of_last = [] if last is None else last.gradient.finish()
        return None, None, *grad_inputs, *of_layers, *of_last


def _chunk_gradients(call: _Call, inputs, needed, grads, layers, last, part: slice):
    """Gradients of the inputs that need one; the layers' are told of the chunk."""
    pieces = [x[:, part].detach() for x in inputs]
    sources = [x for x, need in zip(pieces, needed, strict=True) if need]
    for x in sources:
        x.requires_grad_()
    with torch.enable_grad(), call.casts():
        result = call.function(*pieces, *(x[part] for x in call.positional), *layers)
    outputs = _outputs(result, pieces[0].shape[:2], last)
    given = [grad[:, part] for grad in grads]
    if last is not None:
        given = _through_last(last, outputs, given[0])
    return _gradients(outputs, given, [*sources, *(layer.anchor for layer in layers)])


def _through_last(last: _Layer, outputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """Gradients of `outputs`, (h,) or (h, r), from that of r + last(h)."""
    with torch.no_grad():
        h, b = last.call.cast(outputs[0].detach()), last.call.cast(grad)
        last.gradient.add(h, b)
        return [(b @ last.weight).to(outputs[0].dtype), grad][: len(outputs)]


def _gradients(outputs, given, sources) -> tuple[Tensor | None, ...]:
    """Of `sources`, in the chunk's own graph; a part of the outputs may not depend on any."""
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, given, strict=True) if y.requires_grad]
    if not pairs or not sources:
        return (None,) * len(sources)
    outputs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, sources, given, allow_unused=True)
