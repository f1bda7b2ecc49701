"""Products of float8 operands in low-rank layers: products="fp8"."""

import copy

import pytest
import torch

from molegrad import MoleGradConfig, MoleLinear, convert, linear, ops
from molegrad.estimators import inputs, lowrank_sums
from molegrad.optim import Muon, matrix_param_groups
from tests.models import TinyGPT, perceptron
from tests.samples import randn, tokens

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MODES = [(mode, method) for mode in ("grad", "factors") for method in ("power", "tangent")]


def error(x, truth) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def widened(x, e5m2: bool):
    """What float8 rows stand for, in float64."""
    data, scale = ops.quantize_rows(x, e5m2)
    return data.double() * scale.double()[:, None]


def config(mode, method, products="fp8", **fields):
    fields = {"rank_k": 4, "target_layers": "all"} | fields
    return MoleGradConfig.of(gradient_mode=mode, method=method, products=products, **fields)


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize(("mode", "method"), MODES)
def test_gradients_are_those_of_float8_operands(mode, method, probes):
    fp8, full = (
        MoleLinear(24, 40, config=config(mode, method, p, probes=probes)) for p in ("fp8", "full")
    )
    full.load_state_dict(fp8.state_dict())
    a, b = tokens(90, 24, 40)
    x8, x = (a.view(3, 30, 24).clone().requires_grad_() for _ in range(2))
    y8, y = fp8(x8), full(x)
    assert torch.equal(y8, y)
    for one in (y8, y):
        one.backward(b.view(3, 30, 40))
    torch.testing.assert_close(x8.grad, x.grad)  # the input's gradient is computed in full
    pairs = list(zip(gradients(fp8), gradients(full), strict=True))
    assert pairs and all(0 < error(g8, g.double()) < 0.05 for g8, g in pairs if g.dim() == 2)
    if mode == "factors" and method == "tangent":
        wide_a, wide_b = widened(a, False), widened(b, True)
        true = ops.sketch(wide_a, wide_b, fp8.basis_u.double(), fp8.basis_v.double())
        assert error(fp8.basis_u.grad, true[0]) < 1e-6 and error(fp8.basis_v.grad, true[1]) < 1e-6


def test_what_is_kept_of_the_input_is_float8():
    layer = MoleLinear(24, 40, config=config("grad", "power"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(randn(7, 24).requires_grad_())
    assert sorted(str(x.dtype) for x in kept if x is not layer.weight) == sorted(
        map(str, (E4M3, F32))
    )
    assert layer.config.saved_inputs == "fp8"


@pytest.mark.parametrize("method", ["power", "tangent"])
def test_accumulation(method):
    """Scales belong to tokens, so a sum over micro-batches is that over the batch, where the
    method is linear; in dense mode each micro-batch moves the bases."""
    x = randn(12, 24)
    whole = perceptron(config("factors", "tangent", probes=2))
    parts = copy.deepcopy(whole)
    whole(x).square().sum().backward()
    for chunk in x.split(5):
        parts(chunk).square().sum().backward()
    for p, q in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    dense = perceptron(config("grad", method))
    for chunk in x.split(5):
        dense(chunk).square().sum().backward()
    assert all(g.isfinite().all() for g in gradients(dense)) and int(dense[0].counter) == 3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("mode", "method"), MODES)
def test_autocast_and_compile(mode, method, autocast):
    model = perceptron(config(mode, method, probes=2))
    other = copy.deepcopy(model)
    torch._dynamo.reset()  # it compiles one function for a few configurations only
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = randn(2, 9, 24)
    for one in (model, compiled):
        with torch.autocast("cpu", BF16, enabled=autocast):
            y = one(x)
        y.float().square().sum().backward()
    torch._dynamo.reset()
    # tanh's own gradient is rounded to bfloat16 elsewhere in a compiled graph
    tolerance = 0.02 if autocast else 1e-6
    for p, q in zip(gradients(model), gradients(other), strict=True):
        assert p.isfinite().all() and error(q, p.double()) < tolerance


@pytest.mark.parametrize("dtype", [BF16, F64])
@pytest.mark.parametrize(("mode", "method"), MODES)
def test_other_dtypes(mode, method, dtype):
    model = perceptron(config(mode, method, probes=2)).to(dtype)
    model(randn(7, 24, dtype=dtype)).square().sum().backward()
    for p in model.parameters():
        assert p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all())


def test_a_device_without_float8_computes_in_bfloat16_and_says_so_once(monkeypatch, recwarn):
    inputs._float8_works.cache_clear()
    assert inputs.float8_works("cpu") and inputs.float8_works("meta") and not recwarn.list
    with pytest.warns(UserWarning, match="tensors on 'mps' cannot be float8.*in bfloat16"):
        assert not inputs.float8_works("mps")
    assert not inputs.float8_works("mps") and not recwarn.list
    for module in (linear, lowrank_sums):
        monkeypatch.setattr(module, "float8_works", lambda device_type: False)
    layer = MoleLinear(24, 40, config=config("factors", "tangent"))
    a, b = tokens(50, 24, 40)
    layer(a).backward(b)
    u, v = layer.basis_u.detach(), layer.basis_v.detach()
    expected = ops.sketch(a.bfloat16(), b.bfloat16(), u, v)
    assert torch.equal(layer.basis_u.grad, expected[0])
    assert torch.equal(layer.basis_v.grad, expected[1])


@pytest.mark.parametrize(("mode", "method"), [("grad", "power"), ("factors", "tangent")])
def test_training_loses_as_it_does_in_full(mode, method):
    """100 steps of Muon on sequences to be learnt by heart, loss 3.5 down to 0.42: averaged over
    ten steps the two curves differ by 0.6% at most (another seed of the bases: by 0.9%)."""
    curves = {}
    text = torch.randint(50, (8, 33), generator=torch.Generator().manual_seed(1))
    for products in ("full", "fp8"):
        torch.manual_seed(0)
        settings = config(mode, method, products, rank_k=8, min_layer_utilization=0.0)
        model = convert(TinyGPT(), settings)
        groups = matrix_param_groups(model.h)
        matrices = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in model.parameters() if id(p) not in matrices and p.requires_grad]
        optimizers = [Muon(groups, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]
        losses = []
        for _ in range(100):
            logits = model(text[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        curves[products] = torch.tensor(losses).view(10, 10).mean(1)
    assert curves["full"][0] > 3.0 and curves["full"][-1] < 0.5
    assert (curves["fp8"] / curves["full"] - 1).abs().max() < 0.015
