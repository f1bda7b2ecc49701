"""Peaks of functions whose tensors are known."""

import pytest
import torch

from molegrad.monitor.memory import peak_bytes

SIZE = 4 * 250_000


def block() -> torch.Tensor:
    return torch.empty(250_000)


@pytest.fixture
def before() -> int:
    """Bytes of what is alive in this process anyway."""
    return peak_bytes(lambda: None)


def test_tensors_that_are_alive_together_add_up(before):
    def two_at_a_time():
        a, b = block(), block()
        del a
        c = block()
        c.add_(b)  # in place: nothing new

    assert peak_bytes(two_at_a_time) - before == pytest.approx(2 * SIZE, rel=1e-3)

    def three():
        return [block() for _ in range(3)]

    assert peak_bytes(three) - before == pytest.approx(3 * SIZE, rel=1e-3)


def test_memory_that_kernels_take_for_themselves_counts(before):
    x = block()

    def sort():  # its values and indices are 3 SIZE
        x.view(500, 500).t().sort(dim=0)

    assert peak_bytes(sort) - before > 3.5 * SIZE


def test_what_was_there_before_counts_until_it_is_freed(before):
    held = [block()]
    assert peak_bytes(lambda: None) - before == SIZE

    def free_and_take():
        held.clear()
        block()

    assert peak_bytes(free_and_take) - before == pytest.approx(SIZE, rel=1e-3)
    held.append(block())

    def take_and_free():
        kept = block()
        held.clear()
        return kept

    assert peak_bytes(take_and_free) - before == pytest.approx(2 * SIZE, rel=1e-3)


def test_gradients_and_views_of_before(before):
    weight = torch.nn.Parameter(torch.ones(250_000))
    weight.sum().backward()
    view = weight.detach()[10:]
    assert peak_bytes(lambda: None) - before == 2 * SIZE

    def drop_gradient():
        weight.grad = None
        block()

    assert peak_bytes(drop_gradient) - before == pytest.approx(2 * SIZE, rel=1e-3)
    assert view.shape == (249_990,)


def test_a_backward_pass(before):
    """x -> three factors: the products that autograd saves are alive at once."""
    x = block().fill_(1.0).requires_grad_()

    def passes():
        y = x
        for _ in range(3):
            y = torch.exp(y * 0.1)  # keeps its result
        y.sum().backward()

    taken = peak_bytes(passes) - before - SIZE
    assert 4 * SIZE <= taken <= 6 * SIZE


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="cpu and cuda, got device meta"):
        peak_bytes(lambda: None, "meta")


def test_cuda_asks_the_allocator(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: calls.append("read") or 7)
    assert peak_bytes(lambda: calls.append("run"), "cuda") == 7
    assert calls == ["reset", "run", "read"]
