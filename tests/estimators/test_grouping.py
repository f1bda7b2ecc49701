"""Sketches that wait for others: `MoleGradConfig.group_mib`."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import molegrad
from molegrad import MoleGradConfig, clip_grad_norm_, convert, ops
from molegrad.estimators.grouping import SketchGroup
from molegrad.gpt.train.guard import NonFiniteGuard
from molegrad.linear import MoleLinear
from molegrad.ops.checks import acc_dtype
from molegrad.ops.registry import OPS
from molegrad.optim import Muon, matrix_param_groups
from tests.models import TinyGPT, perceptron
from tests.samples import orthonormal, randn, tokens

MANY = 1 << 20  # MiB: all at the end


def config(**fields):
    return MoleGradConfig.of(
        **{
            "rank_k": 4,
            "method": "tangent",
            "target_layers": "all",
            "gradient_mode": "factors",
            "group_mib": MANY,
        }
        | fields
    )


def pair(make=perceptron, **fields):
    """The same model with and without groups."""
    return [make(config(**{**fields, "group_mib": mib})) for mib in (MANY, 0)]


def tiny(settings):
    torch.manual_seed(0)
    return convert(TinyGPT(), settings)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MoleLinear)]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(one, other, exact=True):
    """Bit for bit where no sum has another order."""
    theirs = gradients(other)
    for name, grad in gradients(one).items():
        assert (grad is None) == (theirs[name] is None), name
        if grad is not None:
            tolerance = {"rtol": 0, "atol": 0} if exact else {}
            torch.testing.assert_close(grad, theirs[name], **tolerance, msg=name)


@pytest.fixture
def calls(monkeypatch):
    """Layers in each call of the op on the CPU's path: [2, 1] for two layers and then one."""
    counts, op = [], torch.ops.molegrad.sketch_accumulate_many_

    def counted(y, *rest):
        counts.append(len(y))
        return op(y, *rest)

    monkeypatch.setattr(torch.ops.molegrad, "sketch_accumulate_many_", counted)
    return counts


# The op


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_the_op_is_that_of_each_layer(dtype):
    acc = acc_dtype(dtype)
    layers, expected = [], []
    for i, (t, n, m, k) in enumerate([(9, 6, 5, 3), (0, 4, 8, 2), (130, 24, 40, 7), (1, 3, 3, 1)]):
        a, b = tokens(t, n, m, dtype, seed=i)
        u, v = orthonormal(m, min(k, m), i), orthonormal(n, k, i + 1)
        y, w = randn(m, k, dtype=acc), randn(n, min(k, m), dtype=acc)
        expected.append((y.clone(), w.clone()))
        ops.sketch_accumulate_(*expected[-1], a, b, u, v)
        layers.append((y, w, a.view(1, t, n), b.view(1, t, m), u, v))
    ops.sketch_accumulate_many_(*map(list, zip(*layers, strict=True)))
    for (y, w, *_), (true_y, true_w) in zip(layers, expected, strict=True):
        assert torch.equal(y, true_y) and torch.equal(w, true_w)


def test_the_op_adds_both_uses_of_a_layer():
    a, b = tokens(20, 6, 5)
    u, v = orthonormal(5, 2), orthonormal(6, 2)
    y, w = torch.zeros(5, 2), torch.zeros(6, 2)
    ops.sketch_accumulate_many_([y] * 2, [w] * 2, [a[:9], a[9:]], [b[:9], b[9:]], [u] * 2, [v] * 2)
    for x, true in zip((y, w), ops.sketch(a, b, u, v), strict=True):
        torch.testing.assert_close(x, true)


A, B, U, V = randn(3, 6), randn(3, 5), randn(5, 2), randn(6, 2)
Y, W = torch.zeros(5, 2), torch.zeros(6, 2)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "lists, message",
    [
        (
            ([], [], [], [], [], []),
            "sketch_accumulate_many_: expected at least one layer, got none",
        ),
        (([Y], [W], [A], [B], [U], [V, V]), "for each layer, got 1, 1, 1, 1, 1, 2"),
        (
            ([Y, Y], [W, W], [A, A], [B, B[1:]], [U, U], [V, V]),
            r"layer 1: expected a and b to agree in every dimension but the last, got a \(3, 6\)",
        ),
        (([W], [W], [A], [B], [U], [V]), r"layer 0: expected y contiguous of shape \(5, 2\)"),
        (([Y], [W], [A], [B], [U.int()], [V]), "layer 0: u must be floating point"),
    ],
)
def test_bad_input_of_the_op_is_named(lists, message, native):
    op = OPS["sketch_accumulate_many_"]
    with pytest.raises(RuntimeError, match=f"molegrad::.*{message}"):
        (ops.sketch_accumulate_many_ if native else op.check)(*lists)


# Training


@pytest.mark.parametrize("fields", [{}, {"probes": 2}, {"saved_inputs": "fp8"}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_without_a_group(fields, bias, calls):
    grouped, plain = pair(lambda c: perceptron(c, bias=bias), **fields)
    x = torch.randn(3, 7, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(i) for model, i in zip((grouped, plain), inputs, strict=True)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(*(i.grad for i in inputs)) and calls == [2]
    assert_same_gradients(grouped, plain)
    assert grouped[0].basis_u.grad is not None and grouped[0].weight.grad is None


def test_a_whole_model(calls):
    grouped, plain = pair(tiny)
    idx = torch.randint(50, (2, 9))
    for model in (grouped, plain):
        model(idx).square().mean().backward()
    assert_same_gradients(grouped, plain)
    assert (
        calls == [len(layers_of(grouped))]
        and len({layer.state.shared for layer in layers_of(grouped)}) == 1
    )


@pytest.mark.parametrize("mib, expected", [(1, [1, 1]), (2, [2]), (3, [2])])
def test_the_limit_counts_inputs_and_output_gradients(mib, expected, calls):
    """40 -> 20 and 24 -> 40 features in float32: 1.01 and 1.07 MiB."""
    model = perceptron(config(group_mib=mib))
    model(torch.randn(4400, 24)).sum().backward()
    assert calls == expected


def test_without_a_gradient_for_the_input(calls):
    model = perceptron(config())
    for p in model.parameters():
        if p.dim() == 1:
            p.requires_grad_(False)
    model(torch.randn(5, 24)).sum().backward()
    assert calls == [2] and model[0].basis_u.grad.norm() > 0


def test_accumulation_zero_grad_and_clipping(calls):
    grouped, plain = pair()
    x = torch.randn(12, 24)
    for model in (grouped, plain):
        for _ in range(2):
            for chunk in x.split(5):
                model(chunk).square().sum().backward()
            norm = clip_grad_norm_(model, 0.5)
            assert norm > 0.5
        model.zero_grad(set_to_none=False)
        model(x).sum().backward()
    assert_same_gradients(grouped, plain, exact=False)
    assert calls == [2] * 7


def test_optimizers_follow_the_same_path():
    results = []
    for model in pair(tiny):
        optimizer = Muon(matrix_param_groups(model.h), lr=0.02)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            idx = torch.randint(50, (4, 9), generator=generator)
            loss = nn.functional.cross_entropy(
                model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results)


def test_a_layer_used_twice_and_a_graph_used_twice(calls):
    grouped, plain = pair(lambda c: MoleLinear(24, 24, config=c))
    plain.load_state_dict(grouped.state_dict())
    x = torch.randn(5, 24)
    for model in (grouped, plain):
        loss = model(model(x).tanh()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert calls == [2, 2]
    assert_same_gradients(grouped, plain, exact=False)


def test_autocast_and_other_dtypes():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for autocast in (False, True):
            grouped, plain = (model.to(dtype) for model in pair())
            x = torch.randn(2, 9, 24, dtype=dtype)
            for model in (grouped, plain):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = model(x)
                y.float().square().sum().backward()
            assert y.dtype == (dtype if dtype == torch.float64 or not autocast else torch.bfloat16)
            assert_same_gradients(grouped, plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, calls):
    grouped, plain = pair(lambda c: convert(nn.ModuleList([perceptron(), perceptron()]), c))
    x = torch.randn(5, 24, requires_grad=True)
    for model in (grouped, plain):
        outputs = [
            torch.utils.checkpoint.checkpoint(part, x, use_reentrant=reentrant)
            if model is grouped
            else part(x)
            for part in model
        ]
        sum(y.sum() for y in outputs).backward()
    assert_same_gradients(grouped, plain)
    assert calls == ([2, 2] if reentrant else [4])  # a pass in the pass has an end of its own


def test_the_guard_sees_what_is_not_finite():
    model = perceptron(config())
    guard = NonFiniteGuard(model)
    x = torch.randn(5, 24)
    x[2, 3] = torch.nan
    model(x).sum().backward()
    assert not guard.update(4)
    assert {entry["name"] for entry in guard.report(4, 1.0, {})["gradients"]} >= {"0.basis_v"}


# What is computed at once


def test_hooks_of_the_bases_see_their_gradients(calls):
    grouped, plain = pair()
    x, seen = torch.randn(5, 24), {}
    for key, model in (("grouped", grouped), ("plain", plain)):
        seen[key] = []
        model[0].basis_u.register_post_accumulate_grad_hook(
            lambda p, key=key: seen[key].append(p.grad.clone())
        )
        model[2].basis_v.register_hook(lambda grad: 2 * grad)
        model(x).square().sum().backward()
    assert calls == [] and len(seen["grouped"]) == 1
    assert torch.equal(seen["grouped"][0], seen["plain"][0])
    assert_same_gradients(grouped, plain)


def test_gradients_that_are_asked_for_or_left_out(calls):
    grouped, plain = pair()
    x = torch.randn(5, 24)
    results = []
    for model in (grouped, plain):
        loss, wanted = model(x).square().sum(), [model[0].basis_v, model[2].bias]
        results.append(torch.autograd.grad(loss, wanted))
        model(x).square().sum().backward(inputs=[model[0].bias])
        assert model[0].basis_u.grad is None and model[2].basis_v.grad is None
        model(x).square().sum().backward(inputs=[model[2].basis_u])
        assert model[2].basis_v.grad is None and model[2].basis_u.grad is not None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert_same_gradients(grouped, plain)
    assert calls == []


# Ends of a pass


def test_an_exception_in_a_backward_pass_leaves_nothing_behind(calls):
    grouped, plain = pair()
    x = torch.randn(5, 24)
    marks = []

    def fail(grad):
        marks.append(weakref.ref(next(iter(grouped[0].state.shared._passes.values()))))
        raise ValueError("in the middle")

    hidden = grouped[0](x)
    hidden.register_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        grouped[2](hidden.tanh()).square().sum().backward()
    gc.collect()
    assert marks[0]() is None and len(grouped[0].state.shared._passes) == 0 and calls == []
    assert grouped[2].basis_u.grad is None
    grouped.zero_grad()
    for model in (grouped, plain):
        model(x).square().sum().backward()
    assert calls == [2] and len(grouped[0].state.shared._passes) == 0
    assert_same_gradients(grouped, plain)


def test_nothing_is_held_after_a_pass():
    model = perceptron(config())
    hidden = []
    model[0].register_forward_hook(
        lambda module, inputs, output: hidden.append(weakref.ref(output))
    )
    model(torch.randn(5, 24)).sum().backward()
    gc.collect()
    assert hidden[0]() is None


def test_a_change_in_place_while_a_sketch_waits_is_an_error():
    model = perceptron(config())
    x = torch.randn(5, 24)

    def change(grad):
        with torch.no_grad():
            model[2].basis_u.add_(1.0)

    hidden = model[0](x)
    hidden.register_hook(change)
    with pytest.raises(RuntimeError, match="changed in place while its sketch waited.*group_mib=0"):
        model[2](hidden.tanh()).sum().backward()


def test_a_second_derivative_is_refused():
    model, x = perceptron(config()), torch.randn(5, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# What is refused


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_is_refused(fullgraph):
    compiled = torch.compile(perceptron(config()), fullgraph=fullgraph, backend="aot_eager")
    for _ in range(2):
        with pytest.raises(Exception, match="group_mib is not for torch.compile"):
            compiled(torch.randn(5, 24))


def test_several_processes_are_refused(monkeypatch):
    model = perceptron(config())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="group_mib is not for data parallelism"):
        model(torch.randn(5, 24))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    model(torch.randn(5, 24)).sum().backward()
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", model)
    with pytest.raises(RuntimeError, match="group_mib is not for data parallelism"):
        model(torch.randn(5, 24))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "power"},
        {"gradient_mode": "grad"},
        {"products": "fp8"},
    ],
    ids=str,
)
def test_other_modes_are_refused(fields):
    with pytest.raises(ValueError, match="group_mib=1 needs .*leave it at 0"):
        config(group_mib=1, **fields)


def test_the_limit_is_checked():
    with pytest.raises(ValueError, match="group_mib must be at least 0, got -1"):
        config(group_mib=-1)
    with pytest.raises(TypeError, match="group_mib must be an integer, got 1.5"):
        config(group_mib=1.5)


def test_bad_input_is_named_as_without_a_group():
    layer = MoleLinear(24, 40, config=config())
    with pytest.raises(RuntimeError, match="linear_lowrank: expected x with 24 features"):
        layer(torch.randn(3, 23))
    with pytest.raises(RuntimeError, match="expected x and weight of the same dtype"):
        layer(torch.randn(3, 24).double())


# Copies and conversion


def test_copies_have_a_group_of_their_own_and_share_it(calls):
    model = perceptron(config(group_mib=7))
    for duplicate in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        other = duplicate(model)
        groups = {layer.state.shared for layer in layers_of(other)}
        assert len(groups) == 1 and groups != {model[0].state.shared} and groups.pop().mib == 7
        x = torch.randn(5, 24)
        for one in (model, other):
            one.zero_grad()
            one(x).square().sum().backward()
        assert_same_gradients(model, other)
    assert calls == [2] * 4


def test_state_dict_revert_and_single_layers():
    grouped, plain = pair()
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    assert plain[0].state.shared is None and isinstance(grouped[0].state.shared, SketchGroup)
    own = [MoleLinear(24, 40, config=config()) for _ in range(2)]
    assert own[0].state.shared is not own[1].state.shared
    linear = molegrad.revert(grouped)[0]
    assert type(linear) is nn.Linear and "_shared" not in linear.__dict__
