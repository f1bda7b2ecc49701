import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from molegrad import offload as offload_module
from molegrad.offload import REFUSAL, HostOffload
from tests.stacks import WIDTH, Stack, assert_same, batch, gradients, loss_of, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_gradients_are_those_of_checkpointing_to_the_last_bit(keep, dtype):
    model, data = Stack(keep=keep), batch()
    loss_of(model, data, dtype).backward()
    assert_same(gradients(model), plain(data, dtype))
    assert model.offload.buffers == max(0, 4 - keep) and model.offload.buffers_in_use == 0


def test_of_what_a_block_saves_the_named_tensor_alone_leaves_the_device():
    model, (x, table) = Stack(), batch()
    memory = StorageWeakRef(table.untyped_storage())
    loss = loss_of(model, (x, table))
    assert model.alive() == [3]  # the last block's, which stays
    assert model.offload.host_bytes == 3 * 2 * 5 * WIDTH * 4  # no table among them
    del x, table
    assert not memory.expired()  # the blocks need it, and it is where it was
    loss.backward()
    assert model.alive() == [] and model.offload.buffers_in_use == 0


def test_few_blocks_have_their_input_on_the_device_at_a_time():
    model, most = Stack(depth=6), []
    for block in model.blocks:
        block.before = lambda number: most.append(len(model.alive()))
    loss = loss_of(model, batch())
    assert most == [1] * 6  # its own; those before it have gone
    tensors = []

    class Fetched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty_strided.default:
                tensors.append(StorageWeakRef(result.untyped_storage()))
            return result

    def count(number):
        assert sum(not memory.expired() for memory in tensors) <= 2  # its own and the next

    for block in model.blocks:
        block.before = count
    with Fetched():
        loss.backward()
    assert len(tensors) == 5 and all(memory.expired() for memory in tensors)


def test_shapes_that_differ_from_step_to_step_share_buffers():
    model = Stack()
    for tokens in (5, 3, 9, 1, 9, 4):
        before = held(model)
        data = batch(tokens=tokens)
        loss_of(model, data).backward()
        assert_same(gradients(model), plain(data))
        assert model.offload.buffers == 3 and model.offload.buffers_in_use == 0
    assert model.offload.host_bytes == 3 * 2 * 9 * WIDTH * 4
    assert held(model) == before


def held(model):
    """Where the pool's buffers lie."""
    lanes = model.offload._lanes.values()
    return {buffer.data_ptr() for lane in lanes for buffer in lane._returned + lane._free}


def test_a_buffer_that_fits_is_preferred_to_a_larger_one():
    lane = offload_module._Lane(torch.device("cpu"))
    small, large = lane.take(10), lane.take(100)
    lane.give(large)
    lane.give(small)
    assert lane.take(8) is small and lane.take(8) is large
    assert lane.unused == 0 and lane.buffers == 2 and lane.bytes == 110
    lane.give(small)
    other = lane.take(50)
    assert other is not large and lane.buffers == 2 and lane.bytes == 150


@pytest.mark.parametrize("order", [1, -1])
def test_several_micro_batches(order):
    parts = [batch(seed=1), batch(seed=2)]
    wanted = [x + y for x, y in zip(*map(plain, parts), strict=True)]
    model = Stack()
    losses = [loss_of(model, data) for data in parts]
    assert model.offload.buffers_in_use == 6
    for loss in losses[::order]:
        loss.backward()
    for x, y in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(x, y)
    del losses, loss
    assert model.offload.buffers_in_use == 0 and model.alive() == []


def test_a_forward_pass_without_a_backward_pass_leaves_nothing():
    model, data = Stack(), batch()
    for _ in range(3):
        loss = loss_of(model, data)
        del loss
        assert model.offload.buffers_in_use == 0 and model.alive() == []
    assert model.offload.buffers == 3
    with torch.no_grad():
        assert loss_of(model, data).isfinite() and model.alive() == []
    loss_of(model, data).backward()
    assert_same(gradients(model), plain(data))


def stop(number):
    if number == 2:
        raise ArithmeticError("stopped on purpose")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_leaves_nothing(when):
    model, data = Stack(), batch()
    loss = loss_of(model, data) if when == "backward" else None
    model.blocks[2].before = stop
    with pytest.raises(ArithmeticError):
        (loss_of(model, data) if loss is None else loss).backward()
    del loss
    gc.collect()
    assert model.offload.buffers_in_use == 0 and model.alive() == []
    model.zero_grad()
    model.blocks[2].before = None
    loss_of(model, data).backward()
    assert_same(gradients(model), plain(data))


def test_a_retained_graph_is_gone_through_twice():
    model, data = Stack(), batch()
    loss = loss_of(model, data)
    loss.backward(retain_graph=True)
    assert_same(gradients(model), plain(data))
    assert model.offload.buffers_in_use == 3 and model.alive() == [3]  # all at its place again
    loss.backward()
    assert_same(gradients(model), plain(data))
    del loss
    assert model.offload.buffers_in_use == 0 and model.alive() == []


def test_gradients_of_some_blocks_alone():
    model, data = Stack(), batch()
    loss = loss_of(model, data)
    weight = model.blocks[3].wide.weight
    (grad,) = torch.autograd.grad(loss, weight)
    position = [p is weight for p in model.parameters()].index(True)
    assert torch.equal(grad, plain(data)[position])
    del loss
    assert model.offload.buffers_in_use == 0 and model.alive() == []


@pytest.mark.parametrize("shared", [False, True])
def test_two_models(shared):
    one, two, data = Stack(), Stack(depth=6), batch()
    if shared:
        two.offload = one.offload
    losses = [loss_of(two, data), loss_of(one, data)]
    for loss in losses:
        loss.backward()
    assert_same(gradients(one), plain(data))
    assert_same(gradients(two), plain(data, depth=6))
    assert (one.offload.buffers, two.offload.buffers) == ((8, 8) if shared else (3, 5))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copied_model_has_an_empty_pool_of_its_own(duplicate):
    offload, data = HostOffload(keep=2), batch()
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    layers.offload = offload

    def run(layers):
        x = data[0]
        for left, layer in zip((2, 1, 0), layers, strict=True):
            with layers.offload.block(x, left):
                x = checkpoint(layer, x, use_reentrant=False)
        x.square().sum().backward()
        return gradients(layers)

    wanted = run(layers)
    other = duplicate(layers)
    assert other.offload is not offload and other.offload.keep == 2
    assert other.offload.buffers == 0 and offload.buffers == 1
    assert_same(run(other), wanted)


class Cube(torch.autograd.Function):
    """Saves its input, as torch before 2.13 saves the arguments of a checkpoint."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x**3 * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return 3 * grad * x**2 * scale, None


def test_a_tensor_saved_by_a_function_and_saved_twice_has_one_buffer():
    offload, x = HostOffload(), torch.randn(3, 4, requires_grad=True)
    with offload.block(x.exp(), 1):
        pass  # saved before, and not within
    moved, scale = x * 1.0, torch.tensor(2.0)
    memory = StorageWeakRef(moved.untyped_storage())
    with offload.block(moved, 1):
        y = Cube.apply(moved, scale) + Cube.apply(moved, scale)
    del moved
    assert memory.expired() and offload.buffers_in_use == 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, 12 * x.detach() ** 2)
    del y
    assert offload.buffers_in_use == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "view", [lambda x: x.mT, lambda x: x[:, ::2], lambda x: x[:1].expand(3, -1, -1), torch.clone]
)
def test_values_and_strides_come_back(view, dtype):
    x = view(torch.randn(2, 4, 6, dtype=dtype, requires_grad=True))
    offload = HostOffload(keep=0)
    with offload.block(x, 0):
        y = Cube.apply(x, torch.tensor(1.0))
    (back, _) = y.grad_fn.saved_tensors
    assert torch.equal(back, x) and back.dtype == dtype and back.data_ptr() != x.data_ptr()
    dense = torch.ops.aten.is_non_overlapping_and_dense(x)
    assert back.stride() == x.stride() if dense else back.is_contiguous()


def test_an_input_changed_in_place_is_an_error():
    def add_to(x):
        return x.add_(torch.ones_like(x))

    for left in (1, 0):
        offload, x = HostOffload(), torch.randn(3, requires_grad=True) * 1.0
        with pytest.raises(RuntimeError, match="changed in place"), offload.block(x, left):
            checkpoint(add_to, x, use_reentrant=False)
    offload, x = HostOffload(), torch.randn(3, requires_grad=True) * 1.0
    with offload.block(x, 0):  # the last, which stays on the device
        y = checkpoint(torch.exp, x, use_reentrant=False)
    x.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="keep must be a number of blocks.*-1"):
        HostOffload(-1)
    offload, x = HostOffload(), torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match="x is on meta"):
        offload.block(x.to("meta"), 0).__enter__()
    with offload.block(x[:0], 3):  # nothing to save
        checkpoint(torch.exp, x[:0], use_reentrant=False).sum().backward()
    assert offload.buffers == 0


def test_compiled_blocks(compiler):
    model, data = Stack(), batch()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        loss_of(model, data).backward()
        assert_same(gradients(model), plain(data))
    assert model.offload.buffers == 3 and model.offload.buffers_in_use == 0


def test_a_compiled_loop_is_refused_or_left_uncompiled(compiler):
    model, data = Stack(), batch()
    model.seen = None
    with pytest.raises(Exception, match="compile the blocks one by one") as error:
        torch.compile(model, backend="eager", fullgraph=True)(*data)
    assert REFUSAL in str(error.value)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(*data).square().sum().backward()
    assert_same(gradients(model), plain(data))
    assert model.offload.buffers == 3
