"""Clipping by the global gradient norm where some gradients are sketches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molegrad.linear import MoleLinear
from molegrad.ops.checks import acc_dtype


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
    """Scale all gradients of `model` so that their joint 2-norm is at most `max_norm`.

    torch.nn.utils.clip_grad_norm_ would count the sketches of a layer with gradient_mode="factors"
    as if they were its gradient; here such a layer counts with the norm of the estimate Ĝ that its
    sketches stand for.

    Returns:
        the norm before clipping (scalar tensor, on the device of the first gradient).

    Raises:
        ValueError: max_norm is negative, or a layer has gradient_mode="momentum", where no gradient
            exists.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
    """
    if max_norm < 0:
        raise ValueError(f"max_norm must not be negative, got {max_norm}")
    squares, sketches = [], set()
    for layer in model.modules():
        if isinstance(layer, MoleLinear) and layer.config.gradient_mode == "momentum":
            raise ValueError(
                f"layer {layer.name or 'MoleLinear'} has gradient_mode='momentum', where the "
                "gradient is added to the momentum as it arises and there is none to clip. Muon's "
                "update does not depend on its norm: leave clipping off or use gradient_mode='grad'"
            )
        if isinstance(layer, MoleLinear) and layer.sketches:
            sketches.update(map(id, layer.sketches))
            norm_sq = layer.config.estimator.norm_sq(layer.state)
            squares += [] if norm_sq is None else [norm_sq]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        if p.grad is not None and id(p) not in sketches:
            dtype = acc_dtype(p.grad.dtype)
            squares.append(torch.linalg.vector_norm(p.grad, dtype=dtype).square())
    if not squares:
        return torch.zeros(())
    device = squares[0].device
    total = torch.stack([s.to(device, torch.float64) for s in squares]).sum().sqrt()
    total = total.to(squares[0].dtype)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"the gradient norm is {total.item()}, so the gradients cannot be clipped; find the "
            "layer with molegrad's health report or pass error_if_nonfinite=False"
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.device, grad.dtype))
    return total
