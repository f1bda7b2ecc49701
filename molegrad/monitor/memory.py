"""Memory, measured on the tensors that exist.

    memory_bytes(model, optimizers)                       # weights, bases, gradients, state
    memory_bytes(model.transformer["h"], optimizers)      # of the blocks alone
    saved_bytes(layers, lambda: model(inputs, targets))   # what layers keep for the backward pass
    peak_bytes(lambda: train(model, batch), "cpu")        # the most that is alive at a time

Why measure: an estimate counts what a method should keep, not the copies that it makes. All of it
belongs outside of training: call it once.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from molegrad.linear import MoleLinear

# Names of the tensors that a layer has with gradient_mode "momentum".
MOMENTUM = ("momentum", "momentum_scale")


def working_matrices(layer: MoleLinear) -> list[Tensor]:
    """The matrices that the layer's estimator works with: bases, where it has any."""
    tensors = layer.state.tensors
    return [t for key, t in tensors.items() if t.dim() == 2 and key not in MOMENTUM]


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
            bases.update(working_matrices(layer))
            if layer.config.gradient_mode == "momentum":  # the gradient never exists beside it
                tensors = layer.state.tensors
                momenta.update(tensors[key] for key in MOMENTUM if key in tensors)
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
            gradients += bytes_of(p.grad)
        elif p.requires_grad:
            gradients += bytes_of(p)
    seen = {t.untyped_storage().data_ptr() for t in (*weights, *bases, *momenta)}
    state = [
        tensor
        for optimizer in optimizers
        for key, entries in optimizer.state.items()
        if not isinstance(key, Tensor) or key in parameters
        for tensor in plain_tensors(entries)
        if tensor.untyped_storage().data_ptr() not in seen
    ]
    return {
        "weights": sum(map(bytes_of, weights)),
        "bases": sum(map(bytes_of, bases)),
        "gradients": gradients,
        "optimizer_state": sum(map(bytes_of, state)) + sum(map(bytes_of, momenta)),
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
        excluded = {address_of(t) for own_tensor in own for t in _parts(own_tensor)}
        given = {address_of(t) for x in inputs if isinstance(x, Tensor) for t in _parts(x)}
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
                address = address_of(part)
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


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes of the device's tensors alive while `function` runs, what was there before it
    included, and buffers that C++ kernels allocate for themselves.

    On CUDA the allocator keeps that number. On the CPU torch's profiler records the allocations,
    which costs a few microseconds each: do not measure times together with a peak. Of the tensors
    that were there before, those count that Python can reach, gradients among them; to be sure that
    all is counted, let `function` make everything itself.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        raise ValueError(f"peak_bytes measures on cpu and cuda, got device {device}")
    gc.collect()  # what is garbage now must not be freed inside
    before = _Before()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    alive = peak = before.bytes
    # The sort is stable: of one moment's events the order of recording counts.
    for _, change in sorted([*changes, *before.freed], key=lambda entry: entry[0]):
        alive += change
        peak = max(peak, alive)
    return peak


class _Before:
    """The CPU's tensors that are alive already: their bytes, and when which of them go.

    The allocator does not report the end of a block whose beginning it did not see.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.freed: list[tuple[int, int]] = []  # (nanoseconds, -bytes)
        self._watched: dict[int, weakref.ref] = {}
        for found in gc.get_objects():
            # Not isinstance, which would ask proxies what they stand for.
            if issubclass(type(found), Tensor):
                self._watch(found)
                if found.is_leaf and found.grad is not None:
                    self._watch(found.grad)

    def _watch(self, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return  # a subclass, whose parts are found as tensors of their own
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._watched:
            return
        self.bytes += size

        def gone(_, size=size) -> None:
            self.freed.append((time.time_ns(), -size))

        self._watched[address] = weakref.ref(storage, gone)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of (a subclass may wrap several)."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def plain_tensors(value) -> Iterator[Tensor]:
    """All plain tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield from _parts(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from plain_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from plain_tensors(item)


def address_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def bytes_of(tensor: Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in _parts(tensor))
