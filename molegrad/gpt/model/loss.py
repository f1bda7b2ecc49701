"""Cross-entropy of the output head, one chunk of tokens at a time.

What: `linear_cross_entropy(hidden, weight, targets)` is the head's matrix product, the tanh
softcap and the cross-entropy as one differentiable function. The logits of `chunk` tokens exist at
a time, in the forward and in the backward pass.

Why: at a vocabulary of 32768 the logits of 32 x 2048 tokens take 8 GiB in float32, more than all
the weights. The gradient with respect to `hidden` and `weight` is linear in the gradient of the
scalar loss, so both are computed while the chunk's logits are there (three matrix products, none
repeated) and only scaled in the backward pass.

Mathematics, for one token with logits x = W h, z = c·tanh(x/c), target y, weight s:
    loss = s (log Σ exp(z) − z_y)      dz = s (softmax(z) − e_y)      dx = dz (1 − tanh²(x/c))
As |z| <= c, exp(z) cannot overflow for c <= 80 and no maximum is subtracted.
"""

import torch
from torch import Tensor, nn

from molegrad.chunked import LayerGradient
from molegrad.linear import MoleLinear

REDUCTIONS = ("mean", "sum", "none")
_SAFE_CAP = 80.0  # exp(80) = 5.5e34; times any vocabulary it stays below float32's 3.4e38


def default_chunk(vocab_size: int, device_type: str) -> int:
    """Tokens per chunk: 2^20 logits on the CPU, where a chunk should stay in the cache (4 MiB), and
    2^25 elsewhere (128 MiB in float32, of which two and a half exist), where products should be
    large and launches few."""
    return max(64, 2 ** (20 if device_type == "cpu" else 25) // vocab_size)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap), or the logits where cap is 0."""
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor | nn.Linear,
    targets: Tensor,
    cap: float = 0.0,
    chunk: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of `softcap(hidden @ weightᵀ)` against `targets`, in nats.

    The result is float32, or float64 where `hidden` is.

    Args:
        hidden: (..., C) floating point; under autocast computed in autocast's dtype.
        head: its weight (V, C), or the layer without bias; a MoleLinear in mode "factors" with
            method "tangent" gets sketches instead of a (V, C) gradient.
        targets: (...) int64 in [0, V), or -1 for a position that does not count.
        cap: bound of the logits, which tanh bends towards it; 0 for none.
        chunk: tokens whose (chunk, V) logits exist at a time; 0 takes `default_chunk`.
        reduction: "mean" over the targets that count (0 with zero gradients where none counts),
            "sum", or "none": (...) losses, 0 where the target is -1.

    Raises:
        ValueError: shapes, reduction, cap or the head's configuration are wrong.
    """
    layer = head if isinstance(head, nn.Linear) else None
    weight = head if layer is None else layer.weight
    if layer is not None:
        require_head(layer)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit: expected (..., C), (V, C) and (...)"
        )
    if not cap >= 0:
        raise ValueError(f"cap must be a bound of the logits above 0, or 0 for none, got {cap}")
    if chunk < 0:
        raise ValueError(f"chunk must be a number of tokens, or 0 for the default, got {chunk}")
    device = hidden.device.type
    chunk = chunk or default_chunk(weight.shape[0], device)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = (wanted >= 0).sum()
    scale = (wanted >= 0) / count.clamp(min=1) if reduction == "mean" else (wanted >= 0).float()
    scale = scale.double() if dtype == torch.float64 else scale
    options = (cap, chunk, dtype, reduction == "none")
    parameters = (weight,)
    sketched = layer if isinstance(layer, MoleLinear) and layer.trains else None
    if sketched is not None:
        parameters = (layer.basis_u, layer.basis_v)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            layer.steps.expect(layer, device)
    losses = _LinearCrossEntropy.apply(
        sketched, weight.detach(), wanted, scale, options, flat, *parameters
    )
    return losses.reshape(targets.shape) if reduction == "none" else losses


def require_head(layer: nn.Linear) -> None:
    """ValueError where the gradient of such an output head cannot be made with its logits."""
    if layer.bias is not None:
        raise ValueError("an output head with a bias is not supported: give it bias=False")
    if type(layer).forward not in (nn.Linear.forward, MoleLinear.forward):
        raise ValueError(
            f"an output head with a forward pass of its own ({type(layer).__name__}) is not "
            "supported, as the loss makes the product with its weight: merge its adapter, or take "
            "the loss of its logits"
        )
    if not isinstance(layer, MoleLinear) or not layer.trains:
        return
    mode, method = layer.config.gradient_mode, layer.config.method
    if mode != "factors" or not layer.config.estimator.adds_up:
        raise ValueError(
            f"the output head {layer.name!r} has gradient_mode={mode!r} and method={method!r}, but "
            "its gradient is gathered while the chunks of logits exist, in the forward pass, and "
            "scaled in the backward pass: choose gradient_mode='factors' with method='tangent', "
            "whose sketches allow that, or leave the head dense"
        )


def _chunk_loss(h: Tensor, weight: Tensor, targets: Tensor, cap: float):
    """Losses (t,) and what the gradient needs: softmax numerators, their sums, tanh or None.

    h (t, C) must be divided by cap already where cap > 0.
    """
    bounded = h @ weight.t()  # (t, V)
    bounded = bounded if bounded.dtype == torch.float64 else bounded.float()
    if cap > 0:
        bounded = bounded.tanh_()
        z = bounded * cap
        shift = None if cap <= _SAFE_CAP else z.amax(-1, keepdim=True)
    else:
        z, bounded = bounded, None
        shift = z.amax(-1, keepdim=True)
    at_target = z.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    if shift is not None:
        z = z.sub_(shift)
    numerator = z.exp_()
    total = numerator.sum(-1)
    log_total = total.log() if shift is None else total.log() + shift.squeeze(1)
    return log_total - at_target, numerator, total, bounded


def _chunk_gradient(numerator, total, bounded, targets, scale):
    """d(Σ scale·loss)/d(h @ weightᵀ), (t, V) float32; overwrites its arguments."""
    dz = numerator.mul_((scale / total)[:, None])
    dz = dz.scatter_add_(1, targets.clamp(min=0)[:, None], -scale[:, None])
    return dz if bounded is None else dz.addcmul_(dz, bounded.square_(), value=-1.0)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward; backward scales them ("none" makes them in backward)."""

    @staticmethod
    def forward(ctx, layer, weight, targets, scale, options, hidden, *parameters):
        *_, each = options
        needed = (False,) * (1 + len(parameters)) if each else ctx.needs_input_grad[5:]
        losses, found = _all_chunks(layer, weight, targets, scale, options, hidden, needed)
        ctx.layer, ctx.options = layer, options
        ctx.save_for_backward(*((weight, targets, scale, hidden) if each else found))
        return losses if each else losses.sum()

    @staticmethod
    def backward(ctx, grad):
        *_, each = ctx.options
        if each:
            weight, targets, scale, hidden = ctx.saved_tensors
            needed, scale = ctx.needs_input_grad[5:], scale * grad
            _, found = _all_chunks(ctx.layer, weight, targets, scale, ctx.options, hidden, needed)
        else:
            found = (g if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return None, None, None, None, None, *found


class _Matrix:
    """The gradient of the head's weight itself, in the weight's dtype."""

    def __init__(self, weight: Tensor, cap: float) -> None:
        self.total, self.factor = torch.zeros_like(weight), cap or 1.0

    def add(self, h: Tensor, dx: Tensor) -> None:
        """h / cap (t, C) and the gradient of its logits dx (t, V)."""
        if self.total.dtype == h.dtype:
            self.total.addmm_(dx.t(), h, alpha=self.factor)
        else:
            self.total.add_(dx.t() @ h, alpha=self.factor)

    def finish(self) -> tuple[Tensor, ...]:
        return (self.total,)


class _Sketches:
    """Its sketches, as the gradients of a converted head's bases."""

    def __init__(self, layer: MoleLinear, cap: float) -> None:
        self.gradient, self.factor = LayerGradient(layer), cap or 1.0

    def add(self, h: Tensor, dx: Tensor) -> None:
        self.gradient.add(h * self.factor, dx)

    def finish(self) -> tuple[Tensor, ...]:
        _, *sketches = self.gradient.finish()  # the weight itself has none
        return tuple(sketches)


def _all_chunks(layer, weight, targets, scale, options, hidden, needed):
    """Losses (T,) times scale, and the gradients of their sum with respect to hidden and to the
    parameters, None where they are not `needed`.

    layer: a head whose bases are the parameters; None where it is the weight (V, C).
    """
    cap, chunk, dtype, _ = options
    need_h, *need = needed
    compute_w = weight.to(dtype)
    grad_h = torch.empty_like(hidden) if need_h else None
    gradient = None
    if any(need):
        gradient = _Matrix(weight, cap) if layer is None else _Sketches(layer, cap)
    inverse_cap = 1.0 / cap if cap > 0 else 1.0

    def losses_of(part: slice) -> Tensor:  # a function, so that a chunk's logits go with it
        h = hidden[part].to(dtype) * inverse_cap
        loss, *state = _chunk_loss(h, compute_w, targets[part], cap)
        if any(needed):
            dx = _chunk_gradient(*state, targets[part], scale[part]).to(dtype)
            if need_h:
                grad_h[part] = dx @ compute_w
            if gradient is not None:
                gradient.add(h, dx)
        return loss * scale[part]

    losses = torch.empty_like(scale)
    for part in _chunks(hidden.size(0), chunk):
        losses[part] = losses_of(part)
    found = (None,) * len(need) if gradient is None else gradient.finish()
    return losses, (grad_h, *found)


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, tokens)) for i in range(0, tokens, chunk)]
