"""Products of float8 operands: what they compute, what float8 costs in accuracy, and the layers."""

import copy

import pytest
import torch

from molegrad import MoleGradConfig, MoleLinear, convert, linear, ops
from molegrad.ops.checks import FLOAT8
from molegrad.ops.float8 import float8_dtype, quantize_rows_reference
from molegrad.ops.sketch import sketch_reference
from molegrad.optim import Muon, matrix_param_groups
from tests.models import TinyGPT, perceptron
from tests.samples import error, orthonormal, randn, tokens

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
E4M3, E5M2 = FLOAT8
PAIRS = [(x, y) for x in (E4M3, E5M2) for y in (E4M3, E5M2)]
PAIRS += [(E4M3, BF16), (F16, E5M2), (F32, E4M3), (E5M2, F64)]
SHAPES = [(0, 7, 5, 3), (1, 7, 5, 1), (5, 13, 11, 7), (97, 101, 53, 32), (193, 67, 149, 20)]
MODES = [(mode, method) for mode in ("dense", "factored") for method in ("power", "tangent")]


def narrowed(x, dtype, by_row=True):
    """x in `dtype`, its scale if that is float8, and what the two stand for."""
    if dtype not in FLOAT8:
        return x.to(dtype), None, x.to(dtype).double()
    data, scale = (ops.quantize_rows if by_row else ops.quantize_tensor)(x, dtype == E5M2)
    return data, scale, data.double() * (scale.unsqueeze(-1) if by_row else scale).double()


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(d)[6:] for d in pair))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_what_the_operands_stand_for(shape, dtypes, by_row):
    t, n, m, k = shape
    a, b = tokens(t, n, m)
    a, a_scale, wide_a = narrowed(a * (2 * randn(t, 1, seed=7)).exp(), dtypes[0], by_row)
    b, b_scale, wide_b = narrowed(1e-5 * b, dtypes[1], by_row)
    k = min(k, n, m)
    u, v = orthonormal(m, k, 1), orthonormal(n, k, seed=2)
    true = sketch_reference(wide_a, wide_b, u.double(), v.double())
    plain = sketch_reference(a, b, u, v, a_scale, b_scale)
    got = ops.sketch(a, b, u, v, a_scale, b_scale)
    acc = F64 if F64 in dtypes else F32
    floor = torch.finfo(acc).eps
    for x, p, exact in zip(got, plain, true, strict=True):
        assert x.dtype == p.dtype == acc and x.shape == p.shape
        assert error(x, exact) <= 4 * max(error(p, exact), floor)
    sums = tuple(torch.ones_like(x) for x in got)
    ops.sketch_accumulate_(*sums, a, b, u, v, a_scale, b_scale)
    torch.testing.assert_close(sums, tuple(x + 1 for x in got))
    if t == 0:
        return
    for power_iters in (0, 2):
        u, w, norm_sq, _ = ops.lowrank_grad(a, b, v, power_iters, None, 1e3, a_scale, b_scale)
        g = wide_b.mT @ wide_a
        exact = u.double() @ (u.double().mT @ g) if power_iters else g @ v.double() @ v.double().mT
        assert error(u.double() @ w.double().mT, exact) < 2e-5
        assert norm_sq.item() == pytest.approx(w.square().sum().item(), rel=1e-4)


def test_leading_dimensions_and_strides():
    a, b = tokens(60, 24, 18)
    (a, a_scale), (b, b_scale) = ops.quantize_rows(a), ops.quantize_rows(b, True)
    u, v = orthonormal(18, 4), orthonormal(24, 5)
    expected = ops.sketch(a, b, u, v, a_scale, b_scale)
    leading = (a.view(3, 20, 24), b.view(3, 20, 18), u, v, a_scale.view(3, 20), b_scale.view(3, 20))
    strided = (a.mT.contiguous().mT, b, u, v, torch.stack([a_scale, a_scale], 1)[:, 1], b_scale)
    for args in (leading, strided):
        torch.testing.assert_close(ops.sketch(*args), expected)


A, B, V, U = randn(9, 6), randn(9, 5), orthonormal(6, 2), orthonormal(5, 2)
A8, A_SCALE = quantize_rows_reference(A)
B8, B_SCALE = quantize_rows_reference(B, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((A8, B8, U, V, A_SCALE, None), "b of torch.float8_e5m2 needs b_scale, what quantize_rows"),
        ((A8, B8, U, V, None, B_SCALE), "a of torch.float8_e4m3fn needs a_scale"),
        ((A, B8, U, V, A_SCALE, B_SCALE), "a_scale belongs to a float8 a, got a of torch.float32"),
        ((A8, B8, U, V, A_SCALE[:3], B_SCALE), r"expected a_scale in torch.float32, .*got \(3\)"),
        (
            (A8, B8, U, V, A_SCALE[:, None], B_SCALE),
            r"each token of a \(9, 6\), got \(9, 1",
        ),
        ((A8, B8, U, V, A_SCALE, B_SCALE.double()), r"b_scale in torch.float32.*torch.float64"),
        ((A8, B8, U, V.to(E4M3), A_SCALE, B_SCALE), "v must be floating point of 16 bits or more"),
        ((A8.view(torch.int8), B8, U, V, None, B_SCALE), "a must be floating point"),
    ],
)
def test_scales_that_are_missing_or_odd_are_named(args, message):
    with pytest.raises(RuntimeError, match=f"molegrad::sketch: .*{message}"):
        torch.ops.molegrad.sketch(*args)


def test_there_is_no_derivative_and_it_says_so():
    y, _ = ops.sketch(A8, B8, U.clone().requires_grad_(), V, A_SCALE, B_SCALE)
    with pytest.raises(RuntimeError, match="sketch is not differentiable"):
        y.sum().backward()
    _, scale = ops.quantize_tensor(A.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="quantize_tensor is not differentiable"):
        scale.backward()


@pytest.mark.parametrize("e5m2", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (2, 5, 11), (300, 257), (0, 4)], ids=str)
def test_quantised_bit_for_bit(shape, dtype, e5m2):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    x = (x * (3 * x).exp()).clamp(-400, 400).to(dtype)  # beside NaN the scale is 1
    cases = [x, 0 * x, (1e-41 * x.float()).to(dtype), x.movedim(0, -1) if x.dim() else x]
    for bad in (torch.nan, torch.inf):
        if x.numel() > 0:
            cases.append(x.clone())
            cases[-1].view(-1)[x.numel() // 2] = bad
    for case in cases:
        names = ["quantize_tensor"] + ["quantize_rows"] * (case.dim() > 0 and case.shape[-1] > 0)
        for name in names:
            data, scale = getattr(ops, name)(case, e5m2)
            expected, expected_scale = ops.OPS[name].reference(case, e5m2)
            assert data.dtype == expected.dtype == (E5M2 if e5m2 else E4M3)
            assert data.shape == case.shape and torch.equal(scale, expected_scale)
            torch.testing.assert_close(
                data.float(), expected.float(), rtol=0, atol=0, equal_nan=True
            )
            assert not data.float().isnan().any() or not case.isfinite().all()


@pytest.mark.parametrize("e5m2", [False, True])
def test_every_magnitude_is_rounded_as_torch_does(e5m2):
    dtype = float8_dtype(e5m2)
    x = torch.arange(0, 2**31, 4999, dtype=torch.int64).to(torch.int32).view(F32)
    x = x[x <= torch.finfo(dtype).max]
    x = torch.cat([x, -x, torch.tensor([torch.finfo(dtype).max])])  # so that the scale is 1
    for quantize in (ops.quantize_rows, ops.quantize_tensor):
        data, scale = quantize(x, e5m2)
        assert scale.item() == 1 and torch.equal(data.float(), x.to(dtype).float())


def gradient_tokens(t=2048, n=192, m=256, seed=0):
    """Decaying spectrum, a few features of A twenty times the others, tokens of very different
    sizes, and B as small as gradients are."""
    signal = randn(t, 64, seed=seed) * torch.arange(1, 65).rsqrt()
    a = signal @ randn(64, n, seed=1) + 0.3 * randn(t, n, seed=2)
    b = signal @ randn(64, m, seed=3) + 0.3 * randn(t, m, seed=4)
    a[:, ::48] *= 20.0
    a = a * (0.5 * randn(t, 1, seed=5)).exp()
    return a, 1e-6 * b * (1.5 * randn(t, 1, seed=6)).exp()


def angles(x, y):
    """Principal angles between two subspaces, in degrees."""
    x, y = (torch.linalg.qr(z.double())[0] for z in (x, y))
    return torch.linalg.svdvals(x.mT @ y).clamp(max=1).arccos().rad2deg()


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(("k", "largest"), [(8, 4.0), (16, 4.5), (32, 6.0)])
@pytest.mark.parametrize("seed", [0, 10])
def test_what_e4m3_and_e5m2_cost(seed, k, largest, by_row):
    """Against float32, as measured: relative error 0.016 to 0.020 (bfloat16: 0.0007), 1 - cosine
    1.3e-4 to 1.8e-4, signed bias up to 0.006, largest principal angle 2.3, 2.8 and 3.9 degrees at
    rank 8, 16 and 32 (bfloat16: 0.1), in the median 1.2."""
    a, b = gradient_tokens(seed=seed)
    v = orthonormal(192, k)
    for _ in range(5):  # as warm as a basis is
        v = torch.linalg.qr(ops.lowrank_grad(a, b, v)[1])[0]
    u, w, norm_sq, _ = ops.lowrank_grad(a, b, v)
    true = u.double() @ w.double().mT
    a8, a_scale, _ = narrowed(a, E4M3, by_row)
    b8, b_scale, _ = narrowed(b, E5M2, by_row)
    u8, w8, norm8, _ = ops.lowrank_grad(a8, b8, v, 1, None, 1e3, a_scale, b_scale)
    estimate = u8.double() @ w8.double().mT
    assert 0.005 < error(estimate, true) < 0.03
    cosine = (estimate * true).sum() / (estimate.norm() * true.norm())
    assert 1 - cosine < 4e-4
    bias = ((estimate - true) * true.sign()).mean() / true.abs().mean()
    assert bias.abs() < 0.01
    assert norm8.item() == pytest.approx(norm_sq.item(), rel=0.03)
    for x, y in ((u8, u), (w8, w)):
        assert angles(x, y).max() < largest and angles(x, y).median() < 2.0


def test_scales_of_rows_keep_small_tokens_and_one_scale_does_not():
    x = randn(4, 64) * torch.tensor([[1.0], [1e-3], [1e-6], [1e-12]])
    for dtype, kept in ((E4M3, 2), (E5M2, 3)):
        of_rows, of_all = (
            [error(narrowed(x, dtype, by_row)[2][t], x[t].double()) for t in range(4)]
            for by_row in (True, False)
        )
        assert max(of_rows) < 0.07 and max(of_all[:kept]) < 0.2 and of_all[-1] == 1


# ---- layers -------------------------------------------------------------------------------------


def config(mode, method, products="fp8", **fields):
    fields = {"rank_k": 4, "target_layers": "all"} | fields
    return MoleGradConfig(gradient_mode=mode, method=method, products=products, **fields)


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
    if mode == "factored" and method == "tangent":
        wide_a, wide_b = narrowed(a, E4M3)[2], narrowed(b, E5M2)[2]
        true = sketch_reference(wide_a, wide_b, fp8.basis_u.double(), fp8.basis_v.double())
        assert error(fp8.basis_u.grad, true[0]) < 1e-6 and error(fp8.basis_v.grad, true[1]) < 1e-6


def test_what_is_kept_of_the_input_is_float8():
    layer = MoleLinear(24, 40, config=config("dense", "power"))
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
    whole = perceptron(config("factored", "tangent", probes=2))
    parts = copy.deepcopy(whole)
    whole(x).square().sum().backward()
    for chunk in x.split(5):
        parts(chunk).square().sum().backward()
    for p, q in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    dense = perceptron(config("dense", method))
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
    linear._float8_works.cache_clear()
    assert linear.float8_works("cpu") and linear.float8_works("meta") and not recwarn.list
    with pytest.warns(UserWarning, match="tensors on 'mps' cannot be float8.*in bfloat16"):
        assert not linear.float8_works("mps")
    assert not linear.float8_works("mps") and not recwarn.list
    monkeypatch.setattr(linear, "float8_works", lambda device_type: False)
    layer = MoleLinear(24, 40, config=config("factored", "tangent"))
    a, b = tokens(50, 24, 40)
    layer(a).backward(b)
    u, v = layer.basis_u.detach(), layer.basis_v.detach()
    expected = ops.sketch(a.bfloat16(), b.bfloat16(), u, v)
    assert torch.equal(layer.basis_u.grad, expected[0])
    assert torch.equal(layer.basis_v.grad, expected[1])


def test_the_configuration():
    assert MoleGradConfig(rank_k=8).products == "full"
    fp8 = MoleGradConfig(rank_k=8, products="fp8")
    assert fp8.saved_inputs == "fp8" and MoleGradConfig(**fp8.to_dict()) == fp8
    with pytest.raises(ValueError, match="no meaning for method='sampled'.*'power' or 'tangent'"):
        MoleGradConfig(products="fp8", method="sampled")
    with pytest.raises(ValueError, match="products must be one of full, fp8; got 'fp4'"):
        MoleGradConfig(products="fp4", rank_k=8)


@pytest.mark.parametrize(("mode", "method"), [("dense", "power"), ("factored", "tangent")])
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
