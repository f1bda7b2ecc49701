"""The inputs of checkpointed blocks in host memory between the forward and the backward pass.

    offload = HostOffload()                      # an attribute of the model
    for left, block in zip(reversed(range(len(blocks))), blocks):
        with offload.block(x, left): x = checkpoint(block, x, *rest, use_reentrant=False)

A block under `torch.utils.checkpoint` (use_reentrant=False) keeps its arguments and nothing else,
as tensors saved for the backward pass, so the hooks that are active outside of the checkpoint see
them. Of these the one that the caller names, the residual stream x (B, T, C), goes to host memory;
weights, rotary tables and whatever else is saved stay where they are.

On CUDA, x is copied to a pinned buffer on a stream of its own while its block computes, and comes
back on that stream while the block behind it is recomputed and differentiated:

| moment | device | host |
|---|---|---|
| block i begins | x_i, and its copy starts behind what made it | a buffer of the pool |
| block i ends | the compute stream waits for the copy; x_i is let go | x_i |
| backward wants x_i | the compute stream waits for it, and the copy of x_(i-1) starts | |
| the graph is freed | | the buffer goes back to the pool |

The host waits for nothing: all waiting is between streams, by events. Both tensors on the device
are allocated on the compute stream and freed after it waits for the copy, so that their memory can
be used again at once, in the order of the program, however far the host runs ahead of the device.
(`Tensor.record_stream` would put off the reuse until the host has seen the copy end, and let one x
per block pile up.) The device holds two or three of the x at any time.

On a CPU the same happens with plain copies, for tests. Gradients are those of checkpointing alone,
bit for bit. What works: several micro-batches, forward passes without a backward pass,
retain_graph=True, shapes that differ from step to step, exceptions in either pass, several models
with an object each.

torch.compile: compile the blocks one by one (`block.compile()`) and leave the loop over them as it
is. A graph cannot hold the loop, as streams and buffers are chosen while the program runs:
compiling the model around it gives the right gradients, but runs all of the loop uncompiled, and
is an error with fullgraph=True.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

REFUSAL = (
    "offloading cannot be compiled into a graph: compile the blocks one by one (block.compile()) "
    "and not the model around them, or leave offloading off"
)
CHANGED = (
    "a block's input was changed in place, and the backward pass needs it as it was: write "
    "x = x + y instead of x += y"
)


class HostOffload:
    """Keeps the inputs of a model's checkpointed blocks in host memory.

    Holds the pool of host buffers, so it belongs to one model. A copy of it, by deepcopy or pickle,
    starts with an empty pool.

    Args:
        keep: the input of that many last blocks stays on the device: the backward pass asks for
            them first, and copies would hardly be done before.

    Raises:
        ValueError: `keep` is negative.
    """

    def __init__(self, keep: int = 1) -> None:
        if keep < 0:
            raise ValueError(f"keep must be a number of blocks, 0 or more, got {keep!r}")
        self.keep = keep
        self._lanes: dict[torch.device, _Lane] = {}
        self._newest: tuple[weakref.ref[_Saved], int] | None = None

    def __reduce__(self):
        return type(self), (self.keep,)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the pool holds, used or not."""
        return sum(lane.bytes for lane in self._lanes.values())

    @property
    def buffers(self) -> int:
        """Host buffers that the pool holds."""
        return sum(lane.buffers for lane in self._lanes.values())

    @property
    def buffers_in_use(self) -> int:
        """Host buffers that a graph needs: 0 after the backward pass."""
        return sum(lane.buffers - lane.unused for lane in self._lanes.values())

    @contextlib.contextmanager
    def block(self, x: Tensor, left: int) -> Iterator[None]:
        """Around the call of one block, under checkpoint, with the argument x.

        Args:
            x: the tensor that goes to host memory where it is saved for the backward pass; of any
                shape and dtype, on a CUDA device (or a CPU). The block must not change it in place.
            left: blocks still to come, 0 for the last. With fewer than `keep` to come x stays on
                the device. As it falls within a forward pass, it tells where another begins.

        Raises:
            ValueError: `x` is on another device.
            RuntimeError: the block has changed x in place, the host has no memory to pin, or this
                is being traced by torch.compile.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(REFUSAL)
        if x.device.type not in ("cuda", "cpu"):
            raise ValueError(f"x is on {x.device}: there is offloading from cuda (and cpu) alone")
        if not torch.is_grad_enabled() or x.numel() == 0:
            yield
            return
        call = _Call(self, x, left)
        try:
            with saved_tensors_hooks(call.pack, _unpack):
                yield
        finally:
            version = call.end()
        if version is not None and x._version != version:
            raise RuntimeError(CHANGED)

    def _save(self, x: Tensor, left: int) -> _Saved:
        if x.device not in self._lanes:
            self._lanes[x.device] = _lane_of(x.device)
        saved = _Saved(self._lanes[x.device], x, stays=left < self.keep)
        if self._newest is not None and left < self._newest[1]:  # of the same forward pass
            saved.before = self._newest[0]
        self._newest = weakref.ref(saved), left
        return saved


class _Call:
    """One call of a block: what its pack hook needs while it lasts, and nothing afterwards, since
    the graph keeps the hook."""

    def __init__(self, owner: HostOffload, x: Tensor, left: int) -> None:
        self.owner, self.x, self.left = owner, x, left
        self.entry: _Saved | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        x = self.x
        same = (
            x is not None
            and tensor.data_ptr() == x.data_ptr()
            and tensor.dtype == x.dtype
            and tensor.shape == x.shape
            and tensor.stride() == x.stride()
        )
        if not same:
            return tensor
        if self.entry is None:  # else a second use of x: one copy serves both
            self.entry = self.owner._save(tensor, self.left)
        return self.entry

    def end(self) -> int | None:
        """From here on the device's x may go: what computes next waits for its copy. Returns which
        version of x was saved, None where x was not."""
        entry, self.x, self.entry = self.entry, None, None
        if entry is None:
            return None
        entry.leave()
        return entry.version


def _unpack(packed: Tensor | _Saved) -> Tensor:
    return packed.take() if isinstance(packed, _Saved) else packed


class _Saved:
    """One x that a graph has saved: on the device (`here`), or in a buffer of the host.

    A copy is its destination, and a function that lets the compute stream wait for its end.
    """

    def __init__(self, lane: _Lane, tensor: Tensor, stays: bool) -> None:
        self.lane = lane
        self.before: weakref.ref[_Saved] | None = None
        self.here: Tensor | None = tensor if stays else None
        self.host: Tensor | None = None
        self.leaving: Callable[[], None] | None = None  # the copy to the host
        self.coming: tuple[Tensor, Callable[[], None]] | None = None  # the one back, not taken yet
        self.version = tensor._version
        if not stays:
            # The same strides, so that what is computed from it is the same to the last bit.
            self.layout = tensor.shape, torch.empty_like(tensor, device="meta").stride()
            self.buffer = lane.take(tensor.nbytes)
            whole = self.buffer[: tensor.nbytes].view(tensor.dtype)
            self.host = whole.as_strided(*self.layout)
            self.leaving = lane.copy(self.host, tensor)

    def leave(self) -> None:
        """The device's own x is free to go once the compute stream comes past this point."""
        if self.leaving is not None:
            self.leaving()
            self.leaving = None

    def fetch(self) -> None:
        """Start the copy back, behind everything that the compute stream has been given."""
        if self.host is not None and self.coming is None:
            device = self.lane.device
            x = torch.empty_strided(*self.layout, dtype=self.host.dtype, device=device)
            self.coming = x, self.lane.copy(x, self.host)

    def take(self) -> Tensor:
        """x on the device for what the compute stream is given next. A second backward pass over
        a retained graph takes it again."""
        if self.here is not None and self.here._version != self.version:
            raise RuntimeError(CHANGED)
        self.fetch()
        tensor = self.here
        if self.coming is not None:
            (tensor, wait), self.coming = self.coming, None
            wait()
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return tensor

    def __del__(self) -> None:
        # A copy may be under way to memory that is about to be free, if a backward pass was given
        # up: what uses that memory next has to wait.
        self.leave()
        if self.coming is not None:
            self.coming[1]()
        if self.host is not None:
            self.lane.give(self.buffer)


class _Lane:
    """The way between one device and the host, with a pool of the buffers at its end.

    As many buffers are held as were used at the same time, each as large as the largest that was
    wanted of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers = self.bytes = 0
        self._free: list[Tensor] = []
        # The collector may return a buffer at any moment, in the middle of `take` too.
        self._returned: list[Tensor] = []

    @property
    def unused(self) -> int:
        return len(self._free) + len(self._returned)

    def take(self, size: int) -> Tensor:
        """A buffer of at least `size` bytes, uint8: the smallest free one that is large enough, or
        a new one, in the place of a smaller one where such a one is free."""
        while self._returned:
            self._free.append(self._returned.pop())
        self._free.sort(key=Tensor.numel)
        for position, buffer in enumerate(self._free):
            if buffer.numel() >= size:
                return self._free.pop(position)
        if self._free:
            self.buffers -= 1
            self.bytes -= self._free.pop().numel()
        buffer = self._allocate(size)
        self.buffers += 1
        self.bytes += size
        return buffer

    def give(self, buffer: Tensor) -> None:
        self._returned.append(buffer)

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, destination: Tensor, source: Tensor) -> Callable[[], None]:
        """Copy behind what the compute stream has been given; lets it wait for the end."""
        destination.copy_(source)
        return lambda: None


class _StreamLane(_Lane):
    """Pinned buffers, and copies on a stream of their own. One stream for both directions: a
    buffer that is given back while it is read is not written before that is over."""

    def __init__(self, device: torch.device, cuda=torch.cuda) -> None:
        super().__init__(device)
        self._cuda = cuda
        self._stream = cuda.Stream(device)

    def _allocate(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"the host has no {size / 2**20:.0f} MiB of memory left to pin for offloading, "
                f"beside {self.bytes / 2**20:.0f} MiB in {self.buffers} buffers: keep the inputs "
                "of more blocks on the device, take shorter sequences, or leave offloading off"
            ) from error

    def copy(self, destination: Tensor, source: Tensor) -> Callable[[], None]:
        compute = self._cuda.current_stream(self.device)
        self._stream.wait_event(compute.record_event())
        with self._cuda.stream(self._stream):
            destination.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        return lambda: compute.wait_event(done)


def _lane_of(device: torch.device) -> _Lane:
    return _StreamLane(device) if device.type == "cuda" else _Lane(device)
