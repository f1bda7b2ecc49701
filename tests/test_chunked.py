"""Functions run in chunks of tokens: values, gradients, what is kept, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from molegrad import MoleGradConfig, convert, in_chunks
from tests.models import MLP

B, T, C = 2, 21, 12


def hidden(x, c_fc):
    return F.rms_norm(c_fc(F.rms_norm(x, (C,))).relu(), (4 * C,))


def with_residual(x, c_fc):
    return hidden(x, c_fc), x


def plain(mlp, x, residual: bool):
    y = mlp.c_proj(hidden(x, mlp.c_fc))
    return x + y if residual else y


def make(config: MoleGradConfig | None = None, bias: bool = False, dtype=torch.float64):
    torch.manual_seed(3)
    mlp = MLP(C, 4 * C, bias).to(dtype)
    return mlp if config is None else convert(mlp, config)


def sample(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(B, T, C, generator=generator, dtype=dtype).requires_grad_()


def gradients(mlp, y, x):
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [x.grad, *(p.grad for p in mlp.parameters())]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 10, 42, 1000])
def test_equals_the_function_on_the_whole(chunk, bias, residual):
    function = with_residual if residual else hidden
    mlp, x = make(bias=bias), sample()
    ours = copy.deepcopy(mlp)
    y = in_chunks(function, (x,), (ours.c_fc,), chunk, last=ours.c_proj)
    found = gradients(ours, y, x)
    x = sample()
    expected = plain(mlp, x, residual)
    torch.testing.assert_close(y, expected)
    for a, b in zip(found, gradients(mlp, expected, x), strict=True):
        torch.testing.assert_close(a, b)


def test_several_inputs_outputs_and_positional_tensors():
    def function(x, z, angle, first, second):
        return first(x * angle) + z, second(z).unflatten(-1, (3, 4)), x

    torch.manual_seed(0)
    layers = [nn.Linear(C, C).double() for _ in range(2)]
    angle = torch.linspace(0, 1, T, dtype=torch.float64)[:, None]

    def run(call):
        x, z = sample(), sample().detach().requires_grad_()
        for layer in layers:
            layer.zero_grad()
        outputs = call(x, z)
        sum((i + 1) * (y * y).sum() for i, y in enumerate(outputs)).backward()
        own = [p.grad for layer in layers for p in layer.parameters()]
        return [*(y.detach() for y in outputs), x.grad, z.grad, *own]

    ours = run(lambda x, z: in_chunks(function, (x, z), layers, 8, positional=(angle,)))
    theirs = run(lambda x, z: function(x, z, angle, *layers))
    assert ours[1].shape == (B, T, 3, 4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_it_computes_what_the_layers_compute():
    mlp, x = make(dtype=torch.float32), sample(torch.float32)
    ours = copy.deepcopy(mlp)
    with torch.autocast("cpu", torch.bfloat16):
        y = in_chunks(with_residual, (x,), (ours.c_fc,), 8, last=ours.c_proj)
    found = gradients(ours, y, x)
    x = sample(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(mlp, x, True)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    for a, b in zip(found, gradients(mlp, expected, x), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < 0.01 * b.norm()


def test_only_the_inputs_are_kept():
    mlp, x, kept = make(), sample(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj)
    own = {p.data_ptr() for p in mlp.parameters()}
    assert [t.data_ptr() for t in kept if t.data_ptr() not in own] == [x.data_ptr()]


def test_activations_of_one_chunk_exist_at_a_time():
    mlp, x, rows = make(), sample(), []

    def watched(x, c_fc):
        h = hidden(x, c_fc)
        rows.append(h.shape[0] * h.shape[1])
        return h

    in_chunks(watched, (x,), (mlp.c_fc,), 8, last=mlp.c_proj).sum().backward()
    assert set(rows) == {8, 2} and sum(rows) == 2 * B * T


@pytest.mark.parametrize("mode", ["plain", "factors"])
def test_every_parameter_gets_its_gradient_once(mode):
    config = MoleGradConfig.of(
        method="tangent", rank_k=2, gradient_mode="factors", min_layer_utilization=0.0
    )
    mlp, x, arrived = make(None if mode == "plain" else config), sample(), []
    for name, p in mlp.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: arrived.append(name))
    for _ in range(2):  # accumulation: once a micro-batch
        in_chunks(with_residual, (x,), (mlp.c_fc,), 4, last=mlp.c_proj).sum().backward()
    wanted = [name for name, p in mlp.named_parameters() if p.requires_grad]
    assert sorted(arrived) == sorted(2 * wanted)


def test_an_input_without_gradient_and_frozen_weights():
    mlp, x = make(), sample().detach()
    in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj).sum().backward()
    expected = make()
    plain(expected, x, True).sum().backward()
    torch.testing.assert_close(mlp.c_fc.weight.grad, expected.c_fc.weight.grad)
    mlp, x = make(), sample()
    mlp.requires_grad_(False)
    in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj).sum().backward()
    assert x.grad is not None and mlp.c_fc.weight.grad is None


def test_layers_with_forward_hooks_are_called_with_their_whole_input():
    mlp, x, seen = make(), sample(), []
    mlp.c_fc.register_forward_hook(lambda layer, args, y: seen.append(args[0].shape))
    y = in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj)
    assert seen == [(B, T, C)]
    torch.testing.assert_close(y, plain(make(), sample(), True))


def test_without_gradients_nothing_is_kept():
    mlp, x = make(), sample()
    with torch.no_grad():
        y = in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj)
    assert not y.requires_grad
    torch.testing.assert_close(y, plain(mlp, x, True).detach())


def test_a_weight_that_changes_before_the_backward_pass_is_an_error():
    mlp, x = make(), sample()
    y = in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj)
    with torch.no_grad():
        mlp.c_fc.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_backward_pass_gives_the_same_and_a_second_derivative_is_refused():
    mlp, x = make(), sample()
    y = in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    second = torch.autograd.grad(y, x, create_graph=True)
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate twice"):
        second[0].sum().backward()


def test_an_output_that_nothing_depends_on():
    def function(x, layer):
        return layer(x), x.detach() + 1.0

    torch.manual_seed(0)
    layer, x = nn.Linear(C, C).double(), sample()
    y, rest = in_chunks(function, (x,), (layer,), 8)
    (y.sum() + rest.sum()).backward()
    torch.testing.assert_close(layer.weight.grad[0], x.detach().sum((0, 1)))


def with_dropout(x, c_fc):
    return F.dropout(hidden(x, c_fc), 0.5), F.dropout(x, 0.3)


def test_dropout_draws_the_same_in_both_passes_and_the_generator_goes_on():
    mlp, x, masks = make(), sample(), []

    def watched(x, c_fc):
        h, r = with_dropout(x, c_fc)
        masks.append((h != 0).detach())
        return h, r

    torch.manual_seed(11)
    y = in_chunks(watched, (x,), (mlp.c_fc,), 8, last=mlp.c_proj)
    after_forward = torch.rand(3)
    found = gradients(mlp, y, x)
    after_backward = torch.rand(3)
    half = len(masks) // 2
    assert half == 6 and all(map(torch.equal, masks[:half], masks[half:]))
    assert not torch.equal(masks[0], masks[1])

    other, z, parts = make(), sample(), []
    torch.manual_seed(11)  # chunk by chunk, by autograd
    for part in z.split(4, 1):
        h, r = with_dropout(part, other.c_fc)
        parts.append(r + other.c_proj(h))
    assert torch.equal(torch.rand(3), after_forward)
    assert torch.equal(torch.rand(3), after_backward)
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(y, expected)
    for a, b in zip(found, gradients(other, expected, z), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(B, 0, C), (0, T, C), (0, 0, C)])
@pytest.mark.parametrize(
    "fields",
    [
        None,
        {"method": "tangent", "rank_k": 2, "min_layer_utilization": 0.0},
        {"method": "tangent", "rank_k": 2, "products": "fp8", "min_layer_utilization": 0.0},
        {
            "method": "tangent",
            "rank_k": 2,
            "gradient_mode": "factors",
            "min_layer_utilization": 0.0,
        },
        {"method": "sampled", "sampling_fraction": 0.5},
        {"method": "sampled", "gradient_mode": "momentum", "momentum_dtype": "int8"},
    ],
)
def test_no_tokens(fields, shape):
    config = None if fields is None else MoleGradConfig.of(**fields)
    mlp, x = make(config, bias=True, dtype=torch.float32), torch.zeros(shape).requires_grad_()
    y = in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and not mlp.c_fc.bias.grad.any()
    if fields is None:
        assert not mlp.c_fc.weight.grad.any()


def test_parameters_of_the_functions_own_are_refused():
    """They would get no gradient; frozen ones may be there, and none is asked for without."""
    mlp, norm = make(), nn.LayerNorm(C).double()

    def normed(x, c_fc):
        return c_fc(norm(x)).relu(), x

    def run(function=normed):
        return in_chunks(function, (sample(),), (mlp.c_fc,), 8, last=mlp.c_proj)

    with pytest.raises(ValueError, match=r"parameters of its own, of shape \(12,\), \(12,\)"):
        run()
    with torch.no_grad():
        run()
    gate = nn.Parameter(torch.ones(3, dtype=torch.float64))
    scale = gate.sum()  # no leaf itself
    with pytest.raises(ValueError, match=r"parameters of its own, of shape \(3,\), which"):
        run(lambda x, c_fc: (hidden(x, c_fc) * scale, x))
    with pytest.raises(ValueError, match=r"of shape \(3,\), which"):  # where nothing else trains
        mlp.requires_grad_(False)
        x = sample().detach()
        in_chunks(lambda x, c_fc: c_fc(x).sum(-1, True) * gate, (x,), (mlp.c_fc,), 8)
    norm.requires_grad_(False)
    run().sum().backward()


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1.0


def test_layers_that_are_more_than_their_weight_are_refused():
    x = sample()
    parametrized = nn.utils.parametrizations.weight_norm(make().c_fc)
    patched = make().c_fc
    patched.forward = lambda x: x
    for layer, message in (
        (Adapted(C, 4 * C), "got Adapted with a forward pass that may be its own"),
        (patched, "got Linear with a forward pass that may be its own"),
        (parametrized, "parametrized .* its parameters would get no gradient"),
    ):
        with pytest.raises(ValueError, match=f"in_chunks takes .*{message}"):
            in_chunks(hidden, (x,), (layer,), 8)
        with pytest.raises(ValueError, match=message):
            in_chunks(hidden, (x,), (make().c_fc,), 8, last=layer)


def test_hooks_of_either_pass_see_the_whole():
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        mlp, x, seen = make(), sample(), []
        getattr(mlp.c_fc, register)(
            lambda layer, *grads, seen=seen: seen.append(grads[-1][0].shape)
        )
        in_chunks(with_residual, (x,), (mlp.c_fc,), 8, last=mlp.c_proj).sum().backward()
        assert seen == [(B, T, 4 * C)]


@pytest.mark.parametrize("hooked", [False, True])
def test_wrong_results_of_the_function(hooked):
    mlp, x = make(), sample()
    if hooked:
        mlp.c_fc.register_forward_hook(lambda *_: None)

    def run(function, last=mlp.c_proj):
        return in_chunks(function, (x,), (mlp.c_fc,), 8, last=last)

    with pytest.raises(ValueError, match=r"returns its input h, or \(h, r\), got 3 tensors"):
        run(lambda x, c_fc: (hidden(x, c_fc), x, x))
    with pytest.raises(TypeError, match="must return a tensor or a tuple of tensors, got list"):
        run(lambda x, c_fc: [hidden(x, c_fc), x])
    with pytest.raises(TypeError, match=r"got \(Tensor, NoneType\)"):
        run(lambda x, c_fc: (hidden(x, c_fc), None))
    with pytest.raises(ValueError, match=r"treat each token by itself: .* returned \(2, 1, 48\)"):
        run(lambda x, c_fc: hidden(x, c_fc).sum(1, keepdim=True), last=None)


def test_wrong_calls_say_what_is_wrong():
    mlp, x = make(), sample()
    layers = (mlp.c_fc,)
    with pytest.raises(ValueError, match="chunk must be a number of tokens >= 1, got 0"):
        in_chunks(hidden, (x,), layers, 0)
    for chunk in ("16", 1.5, None):
        with pytest.raises(TypeError, match=f"chunk must be an integer.*, got {chunk!r}"):
            in_chunks(hidden, (x,), layers, chunk)
    with pytest.raises(ValueError, match=r"one or more tensors \(B, T, …\), got none"):
        in_chunks(hidden, (), layers, 8)
    with pytest.raises(ValueError, match=r"one or more tensors \(B, T, …\), got \(12,\)"):
        in_chunks(hidden, (x[0, 0],), layers, 8)
    angle = torch.ones(T, 1, requires_grad=True)
    with pytest.raises(ValueError, match="positional tensors get no gradient, and one of them"):
        in_chunks(hidden, (x,), layers, 8, positional=(angle,))
    with pytest.raises(ValueError, match=r"inputs must agree in \(B, T\)"):
        in_chunks(hidden, (x, x[:, 1:]), layers, 8)
    with pytest.raises(ValueError, match="positional tensors need T=21 rows"):
        in_chunks(hidden, (x,), layers, 8, positional=(torch.ones(20, 1),))
    power = make(MoleGradConfig.of(method="power", rank_k=2, min_layer_utilization=0.0))
    with pytest.raises(ValueError, match="method='power' makes two passes"):
        in_chunks(hidden, (x,), (power.c_fc,), 8)
