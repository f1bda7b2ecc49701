"""Layers in momentum and factored mode warn where no optimizer steps from what they make."""

import copy
import functools
import io
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from molegrad import MoleGradConfig, in_chunks
from molegrad.gpt.model.loss import linear_cross_entropy
from molegrad.optim import Muon, matrix_param_groups
from tests.models import perceptron

UNSTEPPED = {
    "momentum": {"method": "sampled", "gradient_mode": "momentum"},
    "factors": {"rank_k": 4, "method": "tangent", "gradient_mode": "factors"},
}


def unstepped(mode: str) -> torch.nn.Module:
    model = perceptron(MoleGradConfig.of(**UNSTEPPED[mode], target_layers="all"))
    assert all(model[i].config.gradient_mode == mode for i in (0, 2))
    return model


def train_once(model, optimizer=None, call=None) -> None:
    (call or model)(torch.randn(30, 24)).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", list(UNSTEPPED))
def test_where_nobody_steps_a_warning_says_so_once(mode):
    """A foreign optimizer of the weights trains nothing, and says nothing."""
    model = unstepped(mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_once(model, optimizer)
    message = f"layer 0 is in gradient_mode='{mode}', and n.*Muon"
    with pytest.warns(UserWarning, match=message) as said:
        train_once(model, optimizer)
    assert len(said) == 1  # for both layers together
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_once(model, optimizer)
    assert torch.equal(model[0].weight.detach(), before)
    twin = copy.deepcopy(model)  # a model of its own
    train_once(twin)
    with pytest.warns(UserWarning, match="layer 0 is in"):
        train_once(twin)
    plain = model[0].to_linear()
    assert not hasattr(plain, "steps")


@pytest.mark.parametrize("mode", list(UNSTEPPED))
def test_a_layer_that_an_optimizer_has_is_not_warned_of(mode):
    def quiet(model, call=None):
        optimizer = Muon(matrix_param_groups(model))
        before = model[0].weight.detach().clone()
        for _ in range(3):
            train_once(model, optimizer, call)
        assert not torch.equal(model[0].weight.detach(), before)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = unstepped(mode)
        train_once(model)  # gradients may come before the optimizer is made
        quiet(model)
        quiet(copy.deepcopy(model))
        both = copy.deepcopy((model, Muon(matrix_param_groups(model))))
        for _ in range(3):
            train_once(*both)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        quiet(torch.load(file, weights_only=False))
        quiet(model.double().float())
        adamw = torch.optim.AdamW(unstepped(mode).parameters())  # that of another model
        assert adamw.param_groups


@pytest.mark.parametrize("mode", list(UNSTEPPED))
def test_what_is_no_second_step_is_not_warned_of(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = unstepped(mode)
        recomputed = functools.partial(checkpoint, model, use_reentrant=False)
        train_once(model, call=recomputed)
        assert len(model[0].steps.seen) == 2
        other = unstepped(mode)
        with torch.no_grad():
            for _ in range(3):
                other(torch.randn(3, 24))
        other.eval()
        for _ in range(3):
            other(torch.randn(3, 24))
        other.train().requires_grad_(False)
        for _ in range(3):
            other(torch.randn(3, 24))
    with pytest.warns(UserWarning, match="layer 0 is in"):
        train_once(model, call=recomputed)


def test_layers_in_chunks_are_warned_of_too():
    model = unstepped("momentum")

    def run():
        x = torch.randn(2, 5, 24)
        in_chunks(lambda x, up: up(x).relu(), (x,), (model[0],), 8, last=model[2]).sum().backward()

    run()
    with pytest.warns(UserWarning, match="layer 0 is in gradient_mode='momentum'"):
        run()


@pytest.mark.parametrize("mode", list(UNSTEPPED))
def test_compiled_layers_are_quiet_and_work(mode, compiler):
    model = unstepped(mode)
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "layer .* is in gradient_mode")
        for _ in range(3):
            train_once(model, call=called)


def test_an_output_head_of_low_rank_is_warned_of_too():
    head = torch.nn.ModuleList([unstepped("factors")[0]])

    def run():
        targets = torch.zeros(5, dtype=torch.int64)
        linear_cross_entropy(torch.randn(5, 24), _bare(head[0]), targets).backward()

    run()
    with pytest.warns(UserWarning, match="layer 0 is in gradient_mode='factors'"):
        run()


def _bare(layer):
    layer.bias = None
    return layer
