"""bfloat16 weights that are rounded at random: nothing is lost in the mean, and runs repeat."""

import copy

import pytest
import torch

from molegrad import MoleGradConfig, MoleLinear
from molegrad.optim import matrix_param_groups
from molegrad.optim.rounding import add_rounded_
from tests.optim.common import ALL, config
from tests.samples import randn

BF16 = torch.bfloat16
N, M = 24, 40
CASES = [("muon", "momentum"), *((name, kind) for name in ALL for kind in ("grad", "factors"))]
# At which a step moves the weights, ones, by a small part of the distance of two bfloat16 numbers.
SMALL = {"muon": 2e-3, "adamw": 6e-4, "adafactor": 4e-4}
each_case = pytest.mark.parametrize(("name", "kind"), CASES)


def layer(kind: str, dtype=BF16) -> torch.nn.Linear:
    if kind == "grad":
        made = torch.nn.Linear(N, M, bias=False)
    elif kind == "momentum":
        exact = MoleGradConfig.of("exact", gradient_mode="momentum")
        made = MoleLinear(N, M, bias=False, config=exact)
    else:
        made = MoleLinear(N, M, bias=False, config=config(warm_start_decay=1.0))
    with torch.no_grad():
        made.weight.fill_(1.0)
    return made.to(dtype)


def optimizer_of(name: str, model, rounding: bool, **options):
    options = {"lr": SMALL[name], "stochastic_rounding": rounding, **options}
    return ALL[name](matrix_param_groups(model), **options)


def step(model, optimizer, seed: int = 0, zero: bool = False) -> None:
    """With the same gradient whatever the weights are."""
    dtype = model.weight.dtype
    a, b = (randn(50, width, seed=seed + width).to(BF16).to(dtype) for width in (N, M))
    optimizer.zero_grad()
    model(a * (not zero)).backward(b)
    optimizer.step()


def moved(model) -> torch.Tensor:
    return model.weight.detach().double() - 1.0


@each_case
def test_small_steps_do_not_vanish_in_the_mean(name, kind):
    exact, rounded, nearest = layer(kind, torch.float32), layer(kind), layer(kind)
    runs = [
        (model, optimizer_of(name, model, model is rounded)) for model in (exact, rounded, nearest)
    ]
    for _ in range(60):
        for model, optimizer in runs:
            step(model, optimizer)
    assert not moved(nearest).any()  # all is lost
    wanted, got = moved(exact), moved(rounded)
    assert wanted.abs().max() > 2**-8
    # Each weight's own error is up to a unit, that along the step an average over 960 of them.
    assert (got * wanted).sum() / wanted.square().sum() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(("name", "kind"), CASES[::3])
def test_a_small_weight_decay_does_not_vanish(name, kind):
    rounded, nearest = layer(kind), layer(kind)
    for model in (rounded, nearest):
        rate = {"lr": 0.01, "weight_decay": 0.1}
        optimizer = optimizer_of(name, model, model is rounded, **rate)
        for _ in range(30):
            step(model, optimizer, zero=True)
    assert not moved(nearest).any()
    assert moved(rounded).mean().item() == pytest.approx((1 - 0.001) ** 30 - 1, rel=0.1)


@each_case
def test_a_resumed_run_rounds_as_the_first(name, kind):
    model = layer(kind)
    optimizer = optimizer_of(name, model, True)
    for seed in range(3):
        step(model, optimizer, seed)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    twin = layer(kind)
    resumed = optimizer_of(name, twin, True)
    twin.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    if kind == "momentum":
        twin.counter.copy_(model.counter)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(twin, resumed, seed)
    assert torch.equal(model.weight, twin.weight)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for key, value in optimizer.state[p].items():  # none was rounded to the weight's dtype
            torch.testing.assert_close(resumed.state[q][key], value, rtol=0, atol=0, equal_nan=True)
    steps = {int(state["step"]) for state in resumed.state.values() if "step" in state}
    assert steps == {6}


@each_case
def test_weights_with_equal_gradients_are_rounded_differently(name, kind):
    layers = torch.nn.ModuleList(layer(kind) for _ in range(2))
    optimizer = optimizer_of(name, layers, True)
    for each in layers:
        each(randn(50, N, dtype=BF16)).backward(randn(50, M, dtype=BF16))
    optimizer.step()
    assert moved(layers[0]).any() and not torch.equal(layers[0].weight, layers[1].weight)


def test_the_sum_is_rounded_to_a_neighbour_without_bias():
    start, update, trials = randn(1030, 2, dtype=BF16), 1e-3 * randn(1030, 2), 400
    exact = start.float() * (1 - 0.001) - 0.5 * update
    near = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
    far = (near.view(torch.int32) + (1 << 16)).view(torch.float32)
    total = torch.zeros_like(exact, dtype=torch.float64)
    for trial in range(trials):
        weight = start.clone()
        add_rounded_(weight, update, -0.5, 0.001, torch.tensor(trial), 3)
        assert ((weight.float() == near) | (weight.float() == far)).all()
        total += weight.double()
    error = (total / trials - exact.double()) / (far - near).abs()
    assert error.abs().max() < 6 * 0.5 / trials**0.5 and error.mean().abs() < 0.005
    first, other = start.clone(), start.clone()
    add_rounded_(first, update, -0.5, 0.001, torch.tensor(0), 3)
    add_rounded_(other, update, -0.5, 0.001, torch.tensor(0), 4)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("name", "kind"), CASES[::2])
@pytest.mark.parametrize("before", [False, True])
def test_a_state_of_the_other_rounding_is_taken_and_the_option_stays(name, kind, before):
    model = layer(kind)
    optimizer = optimizer_of(name, model, before)
    step(model, optimizer)
    other = optimizer_of(name, model, not before)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["stochastic_rounding"] is not before
    start = model.weight.detach().clone()
    for _ in range(30):
        step(model, other)
    assert torch.equal(model.weight, start) == before


def test_it_is_off_by_default_and_for_states_from_before_it():
    model = layer("grad")
    optimizer = ALL["muon"](matrix_param_groups(model))
    step(model, optimizer)
    assert "step" not in optimizer.state[model.weight]
    state = optimizer.state_dict()
    del state["param_groups"][0]["stochastic_rounding"]
    optimizer.load_state_dict(state)
    step(model, optimizer)
    assert optimizer.param_groups[0]["stochastic_rounding"] is False


@pytest.mark.parametrize("kind", ["grad", "momentum", "factors"])
def test_weights_that_need_no_rounding_are_refused(kind):
    with pytest.raises(ValueError, match="for weights of torch.bfloat16, got a weight .40, 24"):
        optimizer_of("muon", layer(kind, torch.float32), True)
