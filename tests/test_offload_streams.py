"""The order of copies and waits on a GPU, shown without one: streams that put every copy off for as
long as they may, until somebody waits for it."""

import contextlib
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from molegrad import offload as offload_module
from tests.stacks import Stack, assert_same, batch, gradients, loss_of, plain


class Event:
    """A place in a stream: `at` counts what the compute stream had been given."""

    def __init__(self, copy=None, at=None):
        self.copy, self.at = copy, at


class Copy:
    """A copy that is made when it is waited for. It keeps no memory alive, as a GPU does not."""

    def __init__(self, destination, source):
        self.pair = [self._weakly(x) for x in (destination, source)]
        destination.fill_(torch.nan)  # what is read too early
        self.done = False

    @staticmethod
    def _weakly(x):
        layout = (x.storage_offset(), x.size(), x.stride())
        return StorageWeakRef(x.untyped_storage()), x.dtype, layout

    def run(self):
        if self.done:
            return
        tensors = []
        for memory, dtype, layout in self.pair:
            storage = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
            assert storage is not None, "memory was freed while a copy was under way"
            tensors.append(torch.empty(0, dtype=dtype).set_(storage, *layout))
        tensors[0].copy_(tensors[1])
        self.done = True


class Compute:
    """The stream of the blocks. It computes at once; what it waits for happens then."""

    def __init__(self, cuda):
        self.cuda = cuda

    def record_event(self):
        return Event(at=len(self.cuda.log))

    def wait_event(self, event):
        if not event.copy.done:
            self.cuda.run_until(event.copy)
            self.cuda.note("wait for", event.copy)


class Side:
    """The stream of the copies, in whose `with` statement a copy is put off."""

    def __init__(self, cuda):
        self.cuda = cuda
        self.behind = None

    def wait_event(self, event):
        self.behind = event.at

    def record_event(self):
        return Event(copy=self.cuda.pending[-1])


class PutOff(TorchDispatchMode):
    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.copy_.default, f"{func} on the side stream"
        destination, source, non_blocking = args
        assert non_blocking
        side = self.cuda.side
        assert side.behind == len(self.cuda.log), "a copy must come behind all that was computed"
        with torch._C._DisableTorchDispatch():
            copy = Copy(destination, source)
        self.cuda.begin(copy, destination, source)
        return destination


class FakeCuda:
    """As much of torch.cuda as offloading may use: no synchronize, no record_stream.

    Attributes:
        log: what the streams did, in order: ("out", i), ("back", i), ("wait for", "out", i), and
            what a test adds itself.
    """

    def __init__(self):
        self.log, self.pending, self.buffers = [], [], []
        self.compute, self.side = Compute(self), Side(self)

    def Stream(self, device):
        return self.side

    def current_stream(self, device):
        return self.compute

    @contextlib.contextmanager
    def stream(self, stream):
        assert stream is self.side
        with PutOff(self):
            yield

    def begin(self, copy, destination, source):
        pointers = [x.untyped_storage().data_ptr() for x in (destination, source)]
        out = pointers[0] in self.buffers
        copy.name = ("out" if out else "back", self.buffers.index(pointers[0 if out else 1]))
        self.pending.append(copy)
        self.log.append(copy.name)

    def run_until(self, copy):
        """A stream does its work in order."""
        while not copy.done:
            self.pending.pop(0).run()

    def note(self, what, copy):
        self.log.append((what, *copy.name))


class Lane(offload_module._StreamLane):
    def _allocate(self, size):
        buffer = torch.empty(size, dtype=torch.uint8)
        self._cuda.buffers.append(buffer.untyped_storage().data_ptr())
        return buffer


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(offload_module, "_lane_of", lambda device: Lane(device, fake))
    return fake


def stack(cuda, **values):
    """A stack whose blocks note in the log that they run."""
    model = Stack(**values)
    for block in model.blocks:
        block.before = lambda number: cuda.log.append(("block", number))
    return model


FORWARD = [
    ("out", 0), ("block", 0), ("wait for", "out", 0),
    ("out", 1), ("block", 1), ("wait for", "out", 1),
    ("out", 2), ("block", 2), ("wait for", "out", 2),
    ("block", 3),
]  # fmt: skip
BACKWARD = [
    ("back", 2), ("block", 3),
    ("wait for", "back", 2), ("back", 1), ("block", 2),
    ("wait for", "back", 1), ("back", 0), ("block", 1),
    ("wait for", "back", 0), ("block", 0),
]  # fmt: skip


def test_copies_run_beside_the_blocks_and_come_back_one_ahead(cuda):
    model, data = stack(cuda), batch()
    loss = loss_of(model, data)
    assert cuda.log == FORWARD
    loss.backward()
    assert cuda.log == FORWARD + BACKWARD
    assert_same(gradients(model), plain(data))
    assert not cuda.pending and len(cuda.buffers) == 3


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_many_steps(cuda, keep, dtype):
    model = stack(cuda, keep=keep)
    for seed in range(3):
        data = batch(tokens=3 + seed, seed=seed)
        loss_of(model, data, dtype).backward()
        assert_same(gradients(model), plain(data, dtype))
    assert not cuda.pending and model.offload.buffers_in_use == 0


@pytest.mark.parametrize("keep", [0, 1])
def test_micro_batches_keep_apart(cuda, keep):
    model, data = stack(cuda, keep=keep), [batch(seed=seed) for seed in range(3)]
    losses = [loss_of(model, part) for part in data]
    for position in (1, 0, 2):
        losses[position].backward()
        assert_same(gradients(model), plain(data[position]))
        assert not cuda.pending  # nothing of another micro-batch is fetched
    losses.clear()
    assert not cuda.pending and model.alive() == [] and model.offload.buffers_in_use == 0


def test_a_retained_graph(cuda):
    model, data = stack(cuda), batch()
    loss = loss_of(model, data)
    loss.backward(retain_graph=True)
    assert_same(gradients(model), plain(data))
    loss.backward()
    assert_same(gradients(model), plain(data))
    assert cuda.log == FORWARD + BACKWARD + BACKWARD


def stop(number):
    if number == 2:
        raise ArithmeticError("stopped on purpose")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_no_memory_is_freed_while_it_is_copied_when_a_step_is_given_up(cuda, when):
    model, data = stack(cuda), batch()
    for _ in range(2):
        loss = loss_of(model, data) if when == "backward" else None
        earlier, model.blocks[2].before = model.blocks[2].before, stop
        with pytest.raises(ArithmeticError):
            (loss_of(model, data) if loss is None else loss).backward()
        del loss
        gc.collect()
        while cuda.pending:  # the device catches up; a copy asserts that its memory is there
            cuda.pending.pop(0).run()
        assert model.alive() == [] and model.offload.buffers_in_use == 0
        model.zero_grad()
        model.blocks[2].before = earlier
        loss_of(model, data).backward()
        assert_same(gradients(model), plain(data))


def test_nor_when_a_graph_is_dropped(cuda):
    model, data = stack(cuda, keep=0), batch()
    loss = loss_of(model, data)
    del loss
    assert not cuda.pending and model.offload.buffers_in_use == 0
    loss = loss_of(model, data)
    weight = model.blocks[3].wide.weight  # its block alone: the one before is fetched in vain
    torch.autograd.grad(loss, weight)
    assert [copy.name for copy in cuda.pending] == [("back", 2)]
    del loss
    assert not cuda.pending and cuda.log[-1] == ("wait for", "back", 2)


def test_a_host_that_can_pin_no_more_says_what_it_was_for():
    if torch.cuda.is_available():
        pytest.skip("here memory can be pinned")
    lane = offload_module._StreamLane(torch.device("cpu"), FakeCuda())
    with pytest.raises(RuntimeError, match="no 3 MiB of memory left to pin.*leave offloading off"):
        lane.take(3 << 20)
    assert lane.buffers == 0 and lane.bytes == 0
