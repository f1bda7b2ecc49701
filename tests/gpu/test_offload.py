"""Inputs of blocks in pinned host memory, on streams that are real."""

import pytest
import torch

from molegrad.monitor.memory import peak_bytes
from tests.gpu.device import DEVICE, needs_cuda, needs_device, no_waiting
from tests.stacks import Stack, assert_same, batch, gradients, loss_of, plain

pytestmark = needs_device
F32, BF16 = torch.float32, torch.bfloat16
WIDTH, MIB = 256, 2**20


def stack(depth=4, keep=1):
    return Stack(depth, keep, WIDTH).to(DEVICE)


def data(tokens=512, seed=1):
    return batch(2, tokens, WIDTH, seed, DEVICE)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("keep", [0, 1, 9])
def test_gradients_are_those_of_checkpointing_to_the_last_bit(keep, dtype):
    model = stack(keep=keep)
    for seed in range(3):
        loss_of(model, data(seed=seed), dtype).backward()
        assert_same(gradients(model), plain(data(seed=seed), dtype))
    assert model.offload.buffers == max(0, 4 - keep) and model.offload.buffers_in_use == 0


def test_copies_that_take_longer_than_their_blocks_are_waited_for():
    """x of 32 MiB beside hardly any work: the bus is far behind the blocks."""
    model, wide = Stack(6, 1, 4).to(DEVICE), batch(2, 2**20, 4, device=DEVICE)
    model.seen = None
    for _ in range(3):
        loss_of(model, wide).backward()
        assert_same(gradients(model), plain(wide, depth=6))


def test_micro_batches_and_a_retained_graph():
    model = stack()
    losses = [loss_of(model, data(seed=seed)) for seed in range(2)]
    for position in (0, 1):
        for retained in (True, False):
            losses[position].backward(retain_graph=retained)
            assert_same(gradients(model), plain(data(seed=position)))
    losses.clear()
    assert model.alive() == [] and model.offload.buffers_in_use == 0


def test_steps_that_are_given_up_harm_no_later_one():
    model = stack()

    def stop(number):
        raise ArithmeticError("stopped on purpose")

    for when in ("forward", "backward"):
        for _ in range(3):
            loss = loss_of(model, data(seed=7)) if when == "backward" else None
            model.blocks[2].before = stop
            with pytest.raises(ArithmeticError):
                (loss_of(model, data(seed=8)) if loss is None else loss).backward()
            model.blocks[2].before = loss = None
            model.zero_grad()
            loss_of(model, data()).backward()
            assert_same(gradients(model), plain(data()))
    assert model.offload.buffers_in_use == 0


def test_steps_after_the_first_wait_for_nothing_and_take_no_memory():
    model, given = stack(depth=6), data(2048)
    for _ in range(2):
        loss_of(model, given).backward()
        gradients(model)
    pool = (model.offload.buffers, model.offload.host_bytes)
    before = torch.cuda.memory_stats() if DEVICE.type == "cuda" else {}
    with no_waiting():
        for _ in range(4):
            loss_of(model, given).backward()
            gradients(model)
    after = torch.cuda.memory_stats() if DEVICE.type == "cuda" else {}
    assert pool == (5, 5 * 4 * MIB) == (model.offload.buffers, model.offload.host_bytes)
    for key in ("num_device_alloc", "segment.all.allocated", "allocated_bytes.all.current"):
        assert after.get(key) == before.get(key), key


@needs_cuda
def test_the_device_holds_few_inputs_at_a_time():
    """Without waiting in between, however far the host runs ahead. Of ten inputs two or three are
    there, where checkpointing alone has all."""
    given, depth = data(4096), 10
    size = given[0].nbytes
    peaks = []
    for offloads in (False, True):
        model = stack(depth)
        if not offloads:
            model.offload = None
        loss_of(model, given).backward()  # gradients and buffers are there
        peaks.append(peak_bytes(lambda model=model: loss_of(model, given).backward(), DEVICE))
        del model
    assert size == 8 * MIB and peaks[0] - peaks[1] > (depth - 4) * size


@needs_cuda
def test_buffers_are_pinned_and_copies_have_a_stream_of_their_own():
    model, given = stack(), data(4096)
    loss_of(model, given).backward()
    (lane,) = model.offload._lanes.values()
    assert all(buffer.is_pinned() for buffer in lane._free + lane._returned)
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        loss_of(model, given).backward()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    out = [e for e in events if "DtoH" in e.name and "Pinned" in e.name]
    back = [e for e in events if "HtoD" in e.name and "Pinned" in e.name]
    assert len(out) == len(back) == 3
