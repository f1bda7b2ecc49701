"""What a comparison leaves untouched: the training that it watches."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from molegrad import MoleGradConfig, MoleLinear, bases_state_dict, convert
from molegrad.monitor.shadow import Shadow
from molegrad.optim.rank import RankController
from tests.monitor.shadow_steps import (
    EVERY,
    F64,
    LAYER,
    LOW_RANK,
    SAMPLED,
    accumulates,
    build,
    label,
    loss_of,
    step,
    tokens,
)


def everything(model, optimizers) -> dict[str, torch.Tensor]:
    state = {**model.state_dict(), **bases_state_dict(model)}
    state |= dict(model.named_parameters())
    for i, optimizer in enumerate(optimizers):
        for j, entries in optimizer.state_dict()["state"].items():
            state |= {f"{i}.{j}.{k}": torch.as_tensor(v) for k, v in entries.items()}
    return {key: value.detach().clone() for key, value in state.items()}


class WithDropoutAndNorm(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.gpt, self.norm = model, nn.BatchNorm1d(50).double()

    def forward(self, idx):
        logits = F.dropout(self.gpt(idx), 0.1)
        return self.norm(logits.flatten(0, 1)).view_as(logits)


@pytest.mark.parametrize("fields", [*LOW_RANK[::3], LOW_RANK[7], *SAMPLED[::3]], ids=label)
def test_training_is_the_same_to_the_bit(fields):
    ends = []
    parts = 2 if accumulates(fields) else 1
    for watched in (False, True):
        gpt, optimizers = build(fields)
        model = WithDropoutAndNorm(gpt)
        shadow = Shadow(model, "all", optimizers) if watched else None
        torch.manual_seed(3)
        for i in range(4):
            batches = [tokens(10 * i + part) for part in range(parts)]
            step(model, optimizers, batches, shadow if i != 1 else None)
        ends.append(everything(model, optimizers))
        assert all(not m._forward_hooks for m in model.modules())
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 10
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=0, atol=0, equal_nan=True, msg=key)


def test_dropout_is_that_of_the_pass_that_follows():
    gpt, optimizers = build({"gradient_mode": "grad", "method": "exact"})
    model = WithDropoutAndNorm(gpt)
    got = step(model, optimizers, [tokens(1), tokens(2)], Shadow(model, LAYER))
    assert got["gpt." + LAYER]["relative_error"] < 1e-12


def test_nothing_arises_and_hooks_go_when_the_loss_fails():
    model, optimizers = build({"gradient_mode": "factors", "method": "tangent", "rank_k": 4})
    shadow = Shadow(model, "all")
    fired = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(fired.append)
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    random = torch.get_rng_state()

    def fails():
        loss_of(model, tokens(1))
        torch.rand(3)
        raise KeyError("in the middle")

    shadow.begin()
    for loss in (fails, lambda: loss_of(model, tokens(1))):
        with contextlib.suppress(KeyError):
            shadow.observe(loss)
        assert all(not m._forward_hooks for m in model.modules())
        assert parameters == [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
        assert not fired and all(p.grad is None for p in model.parameters())
        assert torch.equal(random, torch.get_rng_state())
    loss_of(model, tokens(1)).backward()
    assert fired
    shadow.compare()  # the failed micro-batch counts for nothing
    assert shadow.read()[LAYER]["cosine"] > 0
    # A projection's: the truth is that of one micro-batch and not of two.
    values = shadow.read()[LAYER]
    assert values["norm_ratio"] == pytest.approx(values["cosine"], 1e-9)


def test_the_extra_pass_keeps_no_inputs_for_weight_gradients():
    model, _ = build({"gradient_mode": "grad", "method": "exact"})
    inputs, saved = [], set()
    hooks = [
        m.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
        for m in model.modules()
        if isinstance(m, MoleLinear) and m is not model.h[0].mlp.c_proj
    ]
    shadow = Shadow(model, LAYER)
    shadow.begin()

    def run():
        def pack(x):
            saved.add(x.data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return loss_of(model, tokens(1))

    shadow.observe(run)
    # The inputs themselves are in the list, so that nothing else has come to lie where they did.
    assert inputs and not saved & {x.data_ptr() for x in inputs}
    loss = run()
    assert saved & {x.data_ptr() for x in inputs}  # training does keep them
    del loss
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("fields", [EVERY[5], SAMPLED[1]], ids=label)
def test_compiled_graphs_stay_valid(fields):
    from torch._dynamo.testing import CompileCounter  # slow to import

    torch._dynamo.reset()
    model, optimizers = build(fields, dtype=torch.float32)
    counter = CompileCounter()
    called = torch.compile(model, backend=counter)
    shadow = Shadow(model, LAYER, optimizers)
    compiled = []
    for i in range(4):
        step(model, optimizers, [tokens(i)], shadow if i % 2 else None, called)
        compiled.append(counter.frame_count)
    assert compiled == [1, 1, 1, 1]
    # The compiled model itself runs as if it were not, hooks and all.
    shadow.begin()
    shadow.observe(lambda: loss_of(called, tokens(9)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_adaptive_ranks_may_change_between_steps(mode):
    adaptive = {"energy_target": 0.95, "rank_interval": 1, "rank_budget": 0, "rank_min": 2}
    fields = {"gradient_mode": mode, "method": "tangent", "rank_k": 4, "probes": 4}
    model, optimizers = build({**fields, **adaptive})
    layer = model.get_submodule(LAYER)
    controller = RankController(model, optimizers, layer.config)
    shadow, ranks, energies = Shadow(model, LAYER, optimizers), [], []
    for i in range(3):
        shadow.begin()
        shadow.observe(lambda i=i: loss_of(model, tokens(i)))
        loss_of(model, tokens(i)).backward()
        controller.observe()
        shadow.compare()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert shadow.records()[0]["rank"] == min(2 * layer.rank, 32)
        controller.step()
        ranks.append(layer.rank)
        energies.append(shadow.read()[LAYER]["energy_capture"])
    assert len(set(ranks)) > 1 and min(energies) > 0 and max(energies) < 1


def test_gradients_that_were_there_before_do_not_count():
    for fields in (EVERY[0], EVERY[4], SAMPLED[0]):
        results = []
        for left_over in (False, True):
            model, optimizers = build(fields)
            if left_over:
                for p in model.parameters():
                    if p.requires_grad:
                        p.grad = torch.randn_like(p)
            results.append(step(model, optimizers, [tokens(1)], Shadow(model, "all"))[LAYER])
        for key in ("cosine", "norm_ratio", "relative_error"):
            assert results[1][key] == pytest.approx(results[0][key], 1e-9)
    model, optimizers = build(LOW_RANK[6])
    loss_of(model, tokens(0)).backward()
    with pytest.raises(ValueError, match=r"h.0.*zero_grad\(set_to_none=True\)"):
        Shadow(model, LAYER).begin()


class Awkward(nn.Module):
    def __init__(self):
        super().__init__()
        self.inplace = nn.Linear(24, 24)
        self.twice = nn.Linear(24, 24)
        self.last = nn.Linear(24, 40)

    def forward(self, x):
        x = self.inplace(x).relu_()
        x = self.twice(self.twice(input=x).tanh_()).relu_()
        return checkpoint(lambda x: self.last(x).sigmoid_(), x, use_reentrant=False)


@pytest.mark.parametrize("layers", ["all", "inplace", "twice", "last"])
def test_layers_called_twice_or_from_checkpoints_or_changed_in_place(layers):
    torch.manual_seed(0)
    config = MoleGradConfig.of(method="exact", target_layers=r".*")
    model = convert(Awkward().double(), config)
    shadow, x = Shadow(model, layers), torch.randn(30, 24, dtype=F64)
    shadow.begin()
    shadow.observe(lambda: model(x).square().sum())
    model(x).square().sum().backward()
    shadow.compare()
    values = shadow.read()
    assert len(values) == (3 if layers == "all" else 1)
    for name, metrics in values.items():
        assert metrics["relative_error"] < 1e-12
        # Of a layer's two calls only the last one's sampling noise is known.
        noise = math.nan if name == "twice" else 0.0
        assert metrics["energy_estimate_error"] == pytest.approx(noise, abs=1e-12, nan_ok=True)


def test_an_input_that_is_changed_in_place_is_refused():
    model = nn.Sequential(MoleLinear(24, 24, config=MoleGradConfig.of(method="exact")))
    shadow = Shadow(model)
    shadow.begin()

    def loss():
        x = torch.randn(5, 24)
        y = model(x)
        x.zero_()
        return y.sum()

    with pytest.raises(RuntimeError, match="layer 0: its input is changed in place"):
        shadow.observe(loss)
