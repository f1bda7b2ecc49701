"""Memory, measured on the tensors that exist: weights, bases, gradients, optimizer state, and what
the forward pass keeps for the backward pass.

    memory_bytes(model, optimizers)                          # of everything
    memory_bytes(model.transformer["h"], optimizers)         # of the blocks alone
    layers = [m for m in model.transformer["h"].modules() if isinstance(m, torch.nn.Linear)]
    saved_bytes(layers, lambda: model(inputs, targets))      # what the linear layers keep

Why measure: an estimate counts what a method should keep, not the copies that it makes. Both
functions wait for nothing on the device, but belong outside of training: call them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from molegrad.linear import MoleLinear


def memory_bytes(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> dict[str, int]:
    """Bytes of weights, bases, gradients and optimizer state, counted on the tensors that exist.

    Where a gradient is not there just now (after zero_grad), the parameter that will get one
    stands for it, as both have one shape and dtype. Storage shared by several tensors (the
    optimizer's references to the bases) counts once.

    Args:
        model: whose parameters count; a part of a model gives that part's share.
        optimizers: state kept for parameters outside of `model` is left out. One with a method
            gradient_bytes() -> int is asked for the gradients of its parameters.
    """
    optimizers = list(optimizers)
    bases, momenta, own = set(), set(), set()
    for layer in model.modules():
        if isinstance(layer, MoleLinear):
            bases.update((layer.basis_u, layer.basis_v))
            if layer.momentum is not None:  # the gradient never exists beside it
                momenta.add(layer.momentum)
                if layer.momentum_scale is not None:
                    momenta.add(layer.momentum_scale)
                own.add(layer.weight)
    parameters = set(model.parameters())
    weights = [p for p in parameters if p not in bases | momenta]
    gradients = 0
    for optimizer in optimizers:
        if hasattr(optimizer, "gradient_bytes"):
            held = {p for group in optimizer.param_groups for p in group["params"]} & parameters
            own |= held
            gradients += optimizer.gradient_bytes() if held else 0
    for p in parameters - own:
        if p.grad is not None:
            gradients += _bytes(p.grad)
        elif p.requires_grad:
            gradients += _bytes(p)
    seen = {t.untyped_storage().data_ptr() for t in (*weights, *bases, *momenta)}
    state = [
        tensor
        for optimizer in optimizers
        for key, entries in optimizer.state.items()
        if not isinstance(key, Tensor) or key in parameters
        for tensor in _tensors(entries)
        if tensor.untyped_storage().data_ptr() not in seen
    ]
    return {
        "weights": sum(map(_bytes, weights)),
        "bases": sum(map(_bytes, bases)),
        "gradients": gradients,
        "optimizer_state": sum(map(_bytes, state)) + sum(map(_bytes, momenta)),
    }


def saved_bytes(modules: Iterable[nn.Module], forward: Callable[[], object]) -> int:
    """Bytes that `modules` keep for their backward pass, measured during one forward pass.

    Every storage counts once and in full, however many tensors keep it alive and however small a
    view of it they are. Parameters and buffers of the modules do not count, nor do the copies that
    autocast makes of parameters: these are recognised by shape and dtype, as they are tensors of
    their own.

    Args:
        modules: none inside another. forward: runs a forward pass with gradients, eagerly; what it
            returns is kept until the bytes are counted.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
    handles, entered = [], []

    def enter(module: nn.Module, inputs: tuple) -> None:
        own = [*module.parameters(), *module.buffers()]
        excluded = {_address(t) for own_tensor in own for t in _parts(own_tensor)}
        given = {_address(t) for x in inputs if isinstance(x, Tensor) for t in _parts(x)}
        casts = {tuple(p.shape) for p in own if p.dim() == 2}
        casts |= {(n, m) for m, n in casts}
        dtypes = {p.dtype for p in own if p.is_floating_point()}

        def pack(tensor: Tensor) -> Tensor:
            device = tensor.device.type
            cast = (
                torch.is_autocast_enabled(device)
                and tensor.dtype == torch.get_autocast_dtype(device)
                and tensor.dtype not in dtypes
                and tuple(tensor.shape) in casts
            )
            for part in _parts(tensor):
                address = _address(part)
                if address not in excluded and not (cast and address not in given):
                    kept[address] = part.untyped_storage()
            return tensor

        hooks = saved_tensors_hooks(pack, lambda tensor: tensor)
        hooks.__enter__()
        entered.append(hooks)

    def leave(module: nn.Module, inputs: tuple, output) -> None:
        entered.pop().__exit__(None, None, None)

    for module in modules:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        result = forward()
        total = sum(storage.nbytes() for storage in kept.values())
        del result
    finally:
        for handle in handles:
            handle.remove()
        while entered:  # a module that fails is not left by its hook where its pre-hook failed
            entered.pop().__exit__(None, None, None)
    return total


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of (a subclass may wrap several)."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _tensors(value) -> Iterator[Tensor]:
    """All plain tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield from _parts(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in _parts(tensor))
