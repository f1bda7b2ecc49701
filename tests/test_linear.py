import copy
import functools
import io
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from molegrad import (
    MoleGradConfig,
    MoleLinear,
    bases_state_dict,
    convert,
    load_bases_state_dict,
)
from tests.models import perceptron
from tests.samples import tokens

MODES = [(mode, method) for mode in ("grad", "factors") for method in ("power", "tangent")]


def config(mode="grad", method="tangent", **fields):
    fields.setdefault("rank_k", 4)
    return MoleGradConfig.of(gradient_mode=mode, method=method, target_layers="all", **fields)


def layer_estimate(layer: MoleLinear) -> torch.Tensor:
    """Ĝ of a factored layer from its sketches."""
    estimator, state = layer.config.estimator, layer.state
    return estimator.matrix(state, estimator.accumulated(state)).matrix


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mode", "method"), MODES)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 5, 24), (0, 24)])
def test_forward_and_input_gradient_are_those_of_linear(mode, method, shape, bias):
    plain, mole = perceptron(bias=bias), perceptron(config(mode, method), bias=bias)
    x = torch.randn(shape)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = plain(x1), mole(x2)
    torch.testing.assert_close(y1, y2)
    y1.square().sum().backward()
    y2.square().sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    if bias:
        torch.testing.assert_close(plain[0].bias.grad, mole[0].bias.grad)
    if mode == "factors":
        assert all(layer.weight.grad is None for layer in (mole[0], mole[2]))
        assert mole[0].basis_u.grad.shape == (40, 4) and mole[0].basis_v.grad.shape == (24, 4)
        estimate = layer_estimate(mole[0])
    else:
        estimate = mole[0].weight.grad
    rank = torch.linalg.matrix_rank(estimate, rtol=1e-4)
    assert rank <= (4 if method == "power" else 8)
    truth = plain[0].weight.grad  # both estimates are projections of the true gradient
    assert ((truth - estimate) * estimate).sum().abs() <= 1e-3 * truth.square().sum()
    assert estimate.norm() <= truth.norm() * (1 + 1e-5)


@pytest.mark.parametrize("method", ["power", "tangent"])
def test_warm_start_finds_the_leading_modes(method):
    layer = MoleLinear(24, 40, bias=False, config=config("grad", method, warm_start_decay=1.0))
    a, b = tokens(500, 24, 40, rank=16)
    truth = b.mT @ a
    best = torch.linalg.svdvals(truth)[:4].norm()
    captured = []
    for _ in range(40):
        layer.weight.grad = None
        layer(a).backward(b)
        captured.append(layer.weight.grad.norm() / best)
    assert captured[0] < 0.95 and captured[-1] > 0.99
    assert layer.counter.item() == 40
    assert layer.stats[4] < 0.01  # the basis has come to rest


def test_exploration_replaces_the_weakest_and_finds_a_new_mode():
    """A basis that is blind to a direction stays blind without exploration, and finds it with."""
    found = {}
    for decay in (1.0, 0.5):
        layer = MoleLinear(
            24, 40, bias=False, config=config("grad", "power", warm_start_decay=decay)
        )
        layer.basis_v.copy_(torch.eye(24, 4))
        a, b = torch.zeros(30, 24), torch.zeros(30, 40)
        a[0, 0], b[0, 0] = 1.0, 1.0
        a[1, 9], b[1, 9] = 5.0, 5.0  # the strongest mode, orthogonal to the basis
        for _ in range(3):
            layer.weight.grad = None
            layer(a).backward(b)
        found[decay] = layer.weight.grad[9, 9].item()
    assert found[1.0] == 0.0 and found[0.5] == pytest.approx(25.0, rel=1e-4)


def test_bases_are_seeded_by_config_and_name():
    def basis(seed, name):
        return MoleLinear(24, 40, config=config(seed=seed), name=name).basis_v

    assert torch.equal(basis(1, "a"), basis(1, "a"))
    assert not torch.allclose(basis(1, "a"), basis(2, "a"))
    assert not torch.allclose(basis(1, "a"), basis(1, "b"))


@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_zero_gradient_keeps_the_basis_and_nan_never_enters_it(mode):
    layer = MoleLinear(24, 40, config=config(mode, warm_start_decay=1.0))
    before = layer.basis_v.detach().clone()
    layer(torch.randn(6, 24)).backward(torch.zeros(6, 40))
    torch.testing.assert_close(layer.basis_v.detach(), before)
    layer(torch.full((6, 24), float("nan"))).sum().backward()
    assert layer.basis_v.isfinite().all()
    grad = layer.weight.grad if mode == "grad" else layer.basis_v.grad
    assert not grad.isfinite().all()


def test_trust_scaling_restores_the_norm():
    fields = {"probes": 8, "trust_max": 10.0}
    a, b = tokens(400, 24, 40, rank=20)
    norms = {}
    for trust in (False, True):
        layer = MoleLinear(24, 40, config=config("grad", trust_scaling=trust, **fields))
        layer(a).backward(b)
        norms[trust] = layer.weight.grad.norm().item()
        gradient_sq, captured_sq, factor = layer.stats[:3].tolist()
        assert factor == pytest.approx(
            (gradient_sq / captured_sq) ** 0.5 if trust else 1.0, rel=1e-4
        )
    truth = (b.mT @ a).norm().item()
    assert norms[False] < 0.9 * truth
    assert norms[True] == pytest.approx(truth, rel=0.25)


def test_state_dict_is_that_of_linear_both_ways():
    for mode in ("grad", "factors"):
        plain, mole = perceptron(), perceptron(config(mode))
        with torch.no_grad():
            plain[0].weight.add_(1)
        assert mole.state_dict().keys() == plain.state_dict().keys()
        mole.load_state_dict(plain.state_dict())
        assert torch.equal(mole[0].weight, plain[0].weight)
        perceptron().load_state_dict(mole.state_dict())
        with pytest.raises(RuntimeError, match="Missing key.*0.bias"):
            mole.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "0.bias"})
        file = io.BytesIO()
        torch.save(mole.state_dict(), file)
        file.seek(0)
        mole.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize(("mode", "method"), MODES)
def test_deepcopy_and_pickle_are_independent_and_equal(mode, method):
    layer = MoleLinear(24, 40, config=config(mode, method), name="x")
    for duplicate in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        other = duplicate(layer)
        x = torch.randn(9, 24)
        for one in (layer, other):
            one.zero_grad()
            one(x).square().sum().backward()
        for (name, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
            assert p is not q and (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)
        if mode == "grad":  # the bases moved alike, but not together
            assert torch.equal(layer.basis_v, other.basis_v)
            assert layer.basis_v.data_ptr() != other.basis_v.data_ptr()


@pytest.mark.parametrize(("mode", "method"), MODES)
def test_autocast(mode, method):
    mole, plain = perceptron(config(mode, method)), perceptron()
    x = torch.randn(2, 9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, truth = mole(x), plain(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, truth)
    y.float().square().sum().backward()
    for p in mole.parameters():
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all())


@pytest.mark.parametrize(("mode", "method"), MODES)
def test_a_backward_pass_inside_of_autocast_is_the_same(mode, method):
    found = []
    for inside in (False, True):
        mole = perceptron(config(mode, method))
        with torch.autocast("cpu", torch.bfloat16):
            loss = mole(torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad for p in mole.parameters()] + list(mole.buffers()))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_other_dtypes_keep_bases_in_full_precision(mode, dtype):
    model = perceptron(config(mode)).to(dtype)
    before = model[0].basis_v.detach().clone()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert model[0].basis_v.dtype == expected and model[0].weight.dtype == dtype
    gram = model[0].basis_v.detach().mT @ model[0].basis_v.detach()
    torch.testing.assert_close(gram, torch.eye(4, dtype=expected), atol=1e-5, rtol=0)
    model(torch.randn(7, 24, dtype=dtype)).square().sum().backward()
    grad = model[0].weight.grad if mode == "grad" else model[0].basis_v.grad
    assert grad.isfinite().all() and grad.dtype == (dtype if mode == "grad" else expected)
    assert before.dtype == expected


@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_meta_device_then_to_empty(mode):
    with torch.device("meta"):
        layer = MoleLinear(24, 40, config=config(mode), name="a")
    assert layer.basis_v.is_meta
    layer.to_empty(device="cpu")
    assert torch.equal(layer.basis_v, MoleLinear(24, 40, config=config(mode), name="a").basis_v)


def test_no_gradient_no_work():
    layer = MoleLinear(24, 40, config=config())
    counter = layer.counter.clone()
    with torch.no_grad():
        layer(torch.randn(3, 24))
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 24, requires_grad=True)).sum().backward()
    assert layer.counter == counter and layer.weight.grad is None


def test_a_layer_used_twice_in_one_pass():
    for mode in ("grad", "factors"):
        layer = MoleLinear(24, 24, config=config(mode))
        layer(layer(torch.randn(5, 24)).tanh()).square().sum().backward()
        grad = layer.weight.grad if mode == "grad" else layer.basis_v.grad
        assert grad.isfinite().all() and grad.norm() > 0


@pytest.mark.parametrize(("mode", "method"), [("factors", "tangent")])
def test_accumulation_over_micro_batches_is_exact(mode, method):
    x = torch.randn(12, 24, dtype=torch.float64)
    whole = perceptron(config(mode, method, probes=2), dtype=torch.float64)
    parts = copy.deepcopy(whole)
    whole(x).square().sum().backward()
    for chunk in x.split(5):
        parts(chunk).square().sum().backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_the_power_method_refuses_to_accumulate_factors():
    model = perceptron(config("factors", "power"))
    for copied in (model, copy.deepcopy(model)):
        copied(torch.randn(5, 24)).sum().backward()
        copied.zero_grad()
        copied(torch.randn(5, 24)).sum().backward()
        with pytest.raises(RuntimeError, match="layer .*not linear.*Use method='tangent'"):
            copied(torch.randn(5, 24)).sum().backward()


@pytest.mark.parametrize(("mode", "method"), MODES)
def test_compile_fullgraph_agrees_with_eager(mode, method):
    model = perceptron(config(mode, method, probes=2))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 9, 24)
        for one in (model, compiled):
            one.zero_grad()
            one(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, msg=name)
        for p, q in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(p, q, equal_nan=True)


def test_compile_with_inductor_and_autocast():
    model = perceptron(config("grad", "tangent", probes=2))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    x = torch.randn(4, 9, 24)
    for one in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        y.float().square().sum().backward()
    error = (model[0].weight.grad - other[0].weight.grad).norm() / model[0].weight.grad.norm()
    assert error < 0.02


def test_bases_state_dict_resumes_exactly():
    model = perceptron(config("grad"))
    for _ in range(3):
        model(torch.randn(9, 24)).square().sum().backward()
    fresh = perceptron(config("grad"))
    fresh.load_state_dict(model.state_dict())
    load_bases_state_dict(fresh, {k: v.clone() for k, v in bases_state_dict(model).items()})
    x = torch.randn(9, 24)
    for one in (model, fresh):
        one.zero_grad()
        one(x).square().sum().backward()
    assert torch.equal(model[0].weight.grad, fresh[0].weight.grad)
    with pytest.raises(RuntimeError, match=r"bases do not fit this model: missing \['0.basis_u'"):
        load_bases_state_dict(fresh, {})
    other = perceptron(config("grad", rank_k=3))
    with pytest.raises(RuntimeError, match="was rank_k or probes changed"):
        load_bases_state_dict(other, bases_state_dict(model))


def test_a_rank_that_does_not_fit_is_refused_and_repr_says_what_there_is():
    with pytest.raises(ValueError, match="needs a layer of at least 8 features.*lower rank_k"):
        MoleLinear(6, 40, config=config())
    assert "rank 4 (rank_k=4), method=tangent, gradient_mode=grad" in repr(
        MoleLinear(24, 40, config=config())
    )


def test_any_torch_optimizer_works_in_dense_mode():
    x = torch.randn(256, 24)
    target = torch.sin(x @ torch.randn(24, 20))
    for make in (
        lambda ps: torch.optim.AdamW(ps, lr=1e-2),
        lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9),
        lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], lr=2e-2, weight_decay=0.0),
        lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    ):
        model = perceptron(config("grad", rank_k=6))
        optimizer = make(list(model.parameters()))
        losses = []
        for _ in range(60):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.85 * losses[0], (type(optimizer), losses[0], losses[-1])


def test_converted_modules_with_hugging_face_names():
    """gate/up/down as Llama has them, trained one step after conversion."""

    class LlamaMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = nn.Linear(32, 64, bias=False)
            self.up_proj = nn.Linear(32, 64, bias=False)
            self.down_proj = nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    model = convert(nn.ModuleDict({"mlp": LlamaMLP()}), MoleGradConfig.of(rank_k=4))
    model["mlp"](torch.randn(2, 5, 32)).sum().backward()
    assert all(isinstance(m, MoleLinear) for m in model["mlp"].children())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "values",
    [
        {"rank_k": 4, "method": "tangent", "gradient_mode": "grad"},
        {"rank_k": 4, "method": "tangent", "gradient_mode": "factors"},
        {"method": "sampled", "sampling_fraction": 0.5},
        {"method": "exact", "gradient_mode": "grad", "saved_inputs": "fp8"},
    ],
    ids=lambda values: "-".join([values["method"], *map(str, list(values.values())[2:])]),
)
def test_checkpointing_and_changes_in_place_are_those_of_nn_linear(values):
    """A bias and a three-dimensional input: torch's own linear returns a view there."""

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = MoleLinear(16, 24, config=MoleGradConfig.of(**values))
        x = torch.randn(2, 5, 16, requires_grad=True)

        def run(x):
            return torch.relu_(layer(x))

        if checkpointed:
            run = functools.partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False)
        run(x).square().sum().backward()
        return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) >= 3
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
