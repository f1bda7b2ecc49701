"""Clipping by the global gradient norm where some gradients are sketches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molegrad.linear import MoleLinear
from molegrad.ops.checks import acc_dtype


def factored_norm_sq(layer: MoleLinear) -> Tensor:
    """‖Ĝ‖²_F of a layer in factored mode from its sketches, without Ĝ (scalar).

    Tangent: ‖W‖² + ‖(I − UUᵀ) Y‖². Power: ‖W‖².
    """
    k = layer.rank
    w = layer.basis_v.grad[:, :k]
    norm_sq = w.square().sum()
    if layer.config.method == "tangent":
        u, y = layer.basis_u.detach()[:, :k], layer.basis_u.grad[:, :k]
        norm_sq = norm_sq + (y - u @ (u.mT @ y)).square().sum()
    return norm_sq


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
    """Scale all gradients of `model` so that their joint 2-norm is at most `max_norm`.

    torch.nn.utils.clip_grad_norm_ would count the sketches of a factored layer as if they were its
    gradient; here such a layer counts with the norm of the estimate Ĝ its sketches stand for.

    Returns:
        the norm before clipping (scalar tensor, on the device of the first gradient).

    Raises:
        ValueError: max_norm is negative, or a layer is in momentum mode, where no gradient exists.
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
    """
    if max_norm < 0:
        raise ValueError(f"max_norm must not be negative, got {max_norm}")
    squares, grads, bases = [], [], set()
    for layer in model.modules():
        if isinstance(layer, MoleLinear) and layer.config.gradient_mode == "momentum":
            raise ValueError(
                f"layer {layer.name or 'MoleLinear'} is in momentum mode, where the gradient is "
                "added to the momentum as it arises and there is none to clip. Muon's update does "
                "not depend on its norm: leave clipping off or use gradient_mode='dense'"
            )
        if isinstance(layer, MoleLinear) and layer.config.gradient_mode == "factored":
            bases.update((id(layer.basis_u), id(layer.basis_v)))
            if layer.basis_v.grad is not None and layer.basis_u.grad is not None:
                squares.append(factored_norm_sq(layer))
    for p in model.parameters():
        if p.grad is not None:
            grads.append(p.grad)
            if id(p) not in bases:
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
