import pytest
import torch
from torch import nn

from molegrad.monitor import memory_bytes, saved_bytes
from molegrad.monitor.memory import peak_bytes
from tests.monitor.test_metrics import trained

SIZE = 4 * 250_000


def test_memory_is_counted_on_the_tensors():
    model, optimizers = trained("factors", probes=0)
    counted = memory_bytes(model, optimizers)
    weights = 24 * 40 + 40 + 40 * 20 + 20
    bases = 4 * (24 + 40) + 4 * (40 + 20)
    assert counted["weights"] == 4 * weights
    assert counted["bases"] == 4 * bases
    assert counted["gradients"] == 4 * (bases + 60)  # sketches and two biases
    kept = {
        id(value): value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "basis"  # a reference to the parameter
    }
    assert counted["optimizer_state"] == sum(kept.values()) > 2 * 4 * 60
    dense, dense_optimizers = trained("grad", probes=0)
    counted = memory_bytes(dense, dense_optimizers)
    assert counted["gradients"] == 4 * weights and counted["bases"] == 4 * bases


def test_the_parts_of_a_model_add_up():
    model, optimizers = trained("grad", probes=0)
    whole = memory_bytes(model, optimizers)
    parts = [memory_bytes(layer, optimizers) for layer in model]
    assert parts[0]["optimizer_state"] > 0
    assert {k: sum(part[k] for part in parts) for k in whole} == whole


def test_gradients_that_do_not_exist_yet_count_as_they_will_be():
    model = nn.Linear(3, 5)
    assert memory_bytes(model)["gradients"] == 4 * 20
    model.bias.requires_grad_(False)
    assert memory_bytes(model)["gradients"] == 4 * 15


class Frugal(torch.optim.SGD):
    """Holds one number of gradient, and state in the shapes that optimizers put it."""

    def gradient_bytes(self):
        return 4

    def fill(self, parameter):
        self.state[parameter] = {
            "step": 3,
            "nested": [torch.zeros(7), {"deep": (torch.zeros(2, dtype=torch.bfloat16),)}],
        }
        self.state["of_no_parameter"] = {"a": torch.zeros(1)}


def test_an_optimizer_may_say_what_gradients_it_holds():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = Frugal(model[0].parameters(), lr=0.1)
    optimizer.fill(model[0].weight)
    counted = memory_bytes(model, [optimizer])
    assert counted["gradients"] == 4 + 4 * 12
    assert counted["optimizer_state"] == 4 * 7 + 2 * 2 + 4
    assert memory_bytes(model[1], [optimizer])["gradients"] == 4 * 12
    assert memory_bytes(model[1], [optimizer])["optimizer_state"] == 4


def test_what_layers_save_counts_once_per_storage():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(2, 4)

        def forward(self, x):
            # a and b share their input; c keeps a view, hence all of x
            return self.a(x) + self.b(x) + self.c(x[:, :2])

    model, x = Two(), torch.randn(5, 8)
    assert saved_bytes([model.a, model.b, model.c], lambda: model(x)) == 4 * 5 * 8
    assert saved_bytes([model.c], lambda: model(x)) == 4 * 5 * 8
    assert saved_bytes([model.c], lambda: model(x.clone()[:2])) == 4 * 5 * 8
    assert saved_bytes([model], lambda: torch.relu(model(x))) == 4 * 5 * 8  # relu is outside
    with torch.no_grad():
        assert saved_bytes([model.a, model.b, model.c], lambda: model(x)) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_autocast_copies_of_inputs_count_and_those_of_weights_do_not():
    model, x = nn.Linear(8, 4), torch.randn(5, 8)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert saved_bytes([model], forward) == 2 * 5 * 8


def test_a_failing_forward_pass_leaves_nothing_behind():
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no")

    model = Fails(2, 2)
    with pytest.raises(RuntimeError, match="no"):
        saved_bytes([model], lambda: model(torch.zeros(1, 2)))
    assert not model._forward_hooks and not model._forward_pre_hooks
    w = torch.ones(2, requires_grad=True)
    (w * w).sum().backward()  # the hooks on saved tensors are gone
    assert torch.equal(w.grad, torch.full((2,), 2.0))


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


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="cpu and cuda, got device meta"):
        peak_bytes(lambda: None, "meta")


def test_cuda_asks_the_allocator(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: calls.append("read") or 7)
    assert peak_bytes(lambda: calls.append("run"), "cuda") == 7
    assert calls == ["reset", "run", "read"]
