"""The most bytes of tensors that are alive at a time while a function runs, measured.

    peak_bytes(lambda: train(model, batch), torch.device("cpu"))

On CUDA the allocator keeps that number by itself. On the CPU it has no such counter, and the
process's resident memory holds libraries and what the allocator has not returned; so the events of
every allocation are recorded by torch's profiler and added up in their order. Both see what a
TorchDispatchMode does not: buffers that C++ kernels allocate for themselves.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_MEMORY_EVENT = "[memory]"


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes of the device's tensors alive while `function` runs, what was there before it
    included.

    On the CPU: of the tensors that were there before, those count that Python can reach, gradients
    among them; to be sure that all is counted, let `function` make everything itself. Memory that
    kernels take without torch's allocator is not seen. The recording costs a few microseconds per
    allocation, so a peak is not measured together with times.

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
        if event.name() == _MEMORY_EVENT and event.device_type() == torch.autograd.DeviceType.CPU
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
