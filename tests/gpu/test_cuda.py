"""What only a GPU can show. `bash scripts/gpu/on-gpu.sh tests` runs it.

Measure of rightness: the error against a float64 truth may be at most FACTOR times that of the
same formula in torch's own products (cuBLAS) on the same data and device.
"""

import pytest
import torch
from torch import nn

from molegrad import MoleGradConfig, MoleLinear, build_info, convert, ops
from molegrad.bench.timing import has_native
from molegrad.config import PRESETS
from molegrad.ops import OPS
from molegrad.ops.checks import FLOAT8, acc_dtype
from molegrad.ops.float8 import add_quantized_reference
from molegrad.ops.power import lowrank_grad_reference
from molegrad.ops.sampled import sampled_grad_reference
from molegrad.ops.sketch import sketch_reference
from molegrad.optim import Muon, matrix_param_groups
from tests.gpu.device import DEVICE, needs_cuda, needs_device, no_waiting
from tests.ops.samples import opchecks, sample_inputs
from tests.samples import error, orthonormal, randn, tokens

pytestmark = needs_device

GPU = DEVICE
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FACTOR = 4.0
SHAPES = [  # T, n, m, k
    (0, 7, 5, 3),
    (1, 7, 5, 1),
    (5, 13, 11, 7),  # T < k
    (97, 101, 53, 32),
    (300, 257, 31, 17),
    (2048, 768, 3072, 32),
    (8192, 1280, 640, 64),
    (1024, 512, 512, 128),
]
COMPOSED = [name for name, op in OPS.items() if op.composed]  # of other ops, on every device
FACTORED = {
    "rank_k": 8,
    "min_layer_utilization": 0.0,
    "target_layers": "all",
    "gradient_mode": "factors",
}


def each_tensor(values, fn):
    """fn of every tensor, in lists too; what is none stays."""
    return tuple(
        [fn(part) for part in x]
        if isinstance(x, list)
        else fn(x)
        if isinstance(x, torch.Tensor)
        else x
        for x in values
    )


def on_gpu(values):
    return each_tensor(values, lambda x: x.to(GPU))


def assert_as_good_as_torch(x, plain, truth, dtype, tokens_summed):
    assert x.dtype == plain.dtype and x.shape == plain.shape and x.device == plain.device
    floor = torch.finfo(acc_dtype(dtype)).eps * tokens_summed**0.5
    assert error(x, truth) <= FACTOR * max(error(plain, truth), floor)
    if truth.norm() > 0 and truth.numel() > 1000:
        cosine = torch.nn.functional.cosine_similarity(x.double().flatten(), truth.flatten(), 0)
        assert cosine > 1 - 1e-5
        bias = ((x.double() - truth) * truth.sign()).mean().abs() / truth.abs().mean()
        assert bias < 1e-5 if dtype in (BF16, F16) else bias < 1e-6


@needs_cuda
@pytest.mark.parametrize("name", [n for n in OPS if n not in COMPOSED])
def test_every_op_has_a_cuda_kernel(name):
    if not build_info()["cuda"]:
        pytest.skip("this build has the CPU ops only")
    assert has_native(name, GPU)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sketch(shape, dtype):
    t, n, m, k = shape
    a, b = on_gpu(tokens(t, n, m, dtype))
    u, v = orthonormal(m, min(m, k), 1).to(GPU), randn(n, k, seed=2).to(GPU)
    truth = sketch_reference(a.double(), b.double(), u.double(), v.double())
    plain = sketch_reference(a, b, u, v)
    for x, p, true in zip(ops.sketch(a, b, u, v), plain, truth, strict=True):
        assert_as_good_as_torch(x, p, true, dtype, max(t, 1))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("power_iters", [0, 1, 3])
def test_lowrank_grad(shape, dtype, power_iters):
    t, n, m, k = shape
    k = min(k, n, m)
    a, b = on_gpu(tokens(t, n, m, dtype))
    v, probes = orthonormal(n, k).to(GPU), randn(n, 3).sign().to(GPU)
    u, w, norm_sq, _ = ops.lowrank_grad(a, b, v, power_iters, probes)
    eye = torch.eye(k, dtype=F64, device=GPU)
    assert (u.double().mT @ u.double() - eye).norm() < 1e-6 * m * k
    g = b.double().mT @ a.double()
    truth = g @ v.double() @ v.double().mT if power_iters == 0 else u.double() @ (u.double().mT @ g)
    assert error(u.double() @ w.double().mT, truth) < (2e-5 if dtype == F32 else 2e-3)
    expected = lowrank_grad_reference(
        a.double(), b.double(), v.double(), power_iters, probes.double()
    )[2]
    torch.testing.assert_close(norm_sq.double(), expected, rtol=1e-2, atol=0.0)


def float8(x, dtype, by_row):
    """x in float8, its scale, and what the two stand for."""
    quantize = ops.quantize_rows if by_row else ops.quantize_tensor
    data, scale = quantize(x, dtype == torch.float8_e5m2)
    return data, scale, data.double() * (scale.unsqueeze(-1) if by_row else scale).double()


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 72, 264, 50), (70, 48, 80, 140)], ids=str)
def test_products_of_float8(shape, by_row):
    t, n, m, k = shape
    a, b = on_gpu(tokens(t, n, m))
    u, v = orthonormal(m, min(m, k), 1).to(GPU), randn(n, k, seed=2).to(GPU)
    for dtypes in ((0, 1), (1, 0), (1, 1), (0, BF16), (F16, 1), (0, F32)):
        (x, x_scale, wide_x), (z, z_scale, wide_z) = (
            float8(y, FLOAT8[dtype], by_row)
            if isinstance(dtype, int)
            else (y.to(dtype), None, y.to(dtype).double())
            for y, dtype in zip((a, 1e-4 * b), dtypes, strict=True)
        )
        truth = sketch_reference(wide_x, wide_z, u.double(), v.double())
        got = ops.sketch(x, z, u, v, x_scale, z_scale)
        for y, true in zip(got, truth, strict=True):
            # Bases, P and R in two bfloat16 numbers; tensor cores cut sums off.
            assert y.dtype == F32 and error(y, true) < 1e-4
        sums = tuple(torch.ones_like(y) for y in got)
        ops.sketch_accumulate_(*sums, x, z, u, v, x_scale, z_scale)
        torch.testing.assert_close(sums, tuple(y + 1 for y in got), rtol=1e-5, atol=1e-5)
        if t > 0 and k <= min(n, m):
            basis = orthonormal(n, k).to(GPU)
            left, right, *_ = ops.lowrank_grad(x, z, basis, 1, None, 1e3, x_scale, z_scale)
            left = left.double()
            true = left @ (left.mT @ (wide_z.mT @ wide_x))
            assert error(left @ right.double().mT, true) < 2e-4


def test_every_number_of_float8_is_read_as_it_is():
    one = torch.ones((), device=GPU)
    for dtype in FLOAT8:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        codes = codes[codes.float().isfinite()].to(GPU)
        n = codes.numel()
        for other in (torch.float8_e4m3fn, BF16, F16):
            b = torch.ones(1, 8, device=GPU).to(other)
            scale = one if other.itemsize == 1 else None
            u, v = torch.eye(8, device=GPU), torch.eye(n, device=GPU)
            y, w = ops.sketch(codes.view(1, n), b, u, v, one, scale)
            assert torch.equal(y[3], codes.float()) and torch.equal(w[:, 5], codes.float())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("share, block", [(0.25, 64), (0.25, 16), (0.3, 2), (1.0, 64)])
def test_sampled_grad(dtype, share, block):
    a = randn(700, 130).relu().square().to(dtype).to(GPU)
    b, grad = randn(700, 96, seed=1).to(dtype).to(GPU), randn(96, 130, seed=2).to(GPU)
    counter = torch.tensor(3, device=GPU)
    own, plain = grad.clone(), grad.clone()
    stats = ops.sampled_grad_(own, a, b, None, counter, share, block, 0.5, 7)
    expected = sampled_grad_reference(plain, a, b, None, counter, share, block, 0.5, 7)
    # A pair whose chance lies within rounding of its random number may be taken by one alone.
    torch.testing.assert_close(stats, expected, rtol=1e-2, atol=1e-3)
    assert (own - plain).norm() < 0.02 * (plain - grad).norm()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_quantized_rows_and_sums(dtype):
    x = (randn(300, 1000) * (2 * randn(300, 1, seed=1)).exp()).to(dtype).to(GPU)
    for name in ("quantize_rows", "quantize_tensor"):
        for e5m2 in (False, True):
            data, scale = getattr(ops, name)(x, e5m2)
            expected, expected_scale = OPS[name].reference(x, e5m2)
            assert torch.equal(data.float(), expected.float())
            assert torch.equal(scale, expected_scale)
    for shape in ((300, 1), (1, 1000)):
        sums, scales = torch.zeros(300, 1000, dtype=torch.int8, device=GPU), randn(*shape).abs()
        scales = scales.to(GPU)
        other, other_scales = sums.clone(), scales.clone()
        ops.add_quantized_(sums, scales, x)
        add_quantized_reference(other, other_scales, x)
        assert torch.equal(sums, other) and torch.equal(scales, other_scales)


def test_random_signs_are_those_of_the_cpu():
    counter = torch.tensor(5)
    signs = ops.rademacher(100, 33, counter, -7)
    assert torch.equal(ops.rademacher(100, 33, counter.to(GPU), -7).cpu(), signs)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    for args in sample_inputs(name):
        args = on_gpu(args)
        torch.library.opcheck(getattr(torch.ops.molegrad, name), args, test_utils=opchecks(args))


@needs_cuda
@pytest.mark.parametrize("name", [n for n in OPS if n not in COMPOSED])
def test_a_captured_graph_computes_what_eager_code_does_and_nothing_waits(name):
    if not has_native(name, GPU):
        pytest.skip("the reference may wait")
    op = getattr(torch.ops.molegrad, name)
    for args in sample_inputs(name):
        eager, captured = on_gpu(args), on_gpu(args)
        eager, copies = each_tensor(eager, torch.clone), each_tensor(captured, torch.clone)
        op(*copies)  # warm up: algorithms are chosen, kernels loaded
        with no_waiting():
            expected = op(*eager)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = op(*captured)
        graph.replay()
        torch.cuda.synchronize()
        for x, y in zip(flat((captured, result)), flat((eager, expected)), strict=True):
            assert torch.equal(x.float().nan_to_num(9), y.float().nan_to_num(9))


def wide_layers(count, dtype=BF16):
    """Arguments of sketch_accumulate_many_: layers of a small model, and three of other shapes."""
    shapes = [(1024, 768, 3072, 32)] * count + [(0, 64, 64, 8), (77, 130, 53, 20), (5, 40, 24, 7)]
    layers = []
    for i, (t, n, m, k) in enumerate(shapes):
        a, b = on_gpu((randn(t, n, seed=i, dtype=dtype), randn(t, m, seed=i + 1, dtype=dtype)))
        u, v = orthonormal(m, k, i).to(GPU), orthonormal(n, k, i + 1).to(GPU)
        acc = acc_dtype(dtype)
        y, w = (torch.zeros(rows, k, dtype=acc, device=GPU) for rows in (m, n))
        layers.append((y, w, a, b, u, v))
    return tuple(map(list, zip(*layers, strict=True)))


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_a_group_of_sketches_is_that_of_each_layer(dtype):
    y, w, a, b, u, v = wide_layers(3, dtype)
    ops.sketch_accumulate_many_(y, w, a, b, u, v)
    for i in range(len(a)):
        truth = sketch_reference(a[i].double(), b[i].double(), u[i].double(), v[i].double())
        plain = sketch_reference(a[i], b[i], u[i], v[i])
        for x, p, true in zip((y[i], w[i]), plain, truth, strict=True):
            assert_as_good_as_torch(x, p, true, dtype, max(len(a[i]), 1))


@needs_cuda
def test_a_captured_group_of_sketches_adds_what_a_call_adds_and_nothing_waits():
    eager, captured = wide_layers(24), wide_layers(24)
    ops.sketch_accumulate_many_(*wide_layers(24))  # warm up
    with no_waiting():
        ops.sketch_accumulate_many_(*eager)
        ops.sketch_accumulate_many_(*eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sketch_accumulate_many_(*captured)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for x, true in zip(flat(captured[:2]), flat(eager[:2]), strict=True):
        assert torch.equal(x, true)


def flat(values):
    """The tensors among values, in tuples and lists too."""
    if isinstance(values, torch.Tensor):
        return (values,)
    nested = isinstance(values, tuple | list)
    return tuple(x for part in values for x in flat(part)) if nested else ()


CONFIGS = {
    "factors-grouped": MoleGradConfig.of(**FACTORED, method="tangent", group_mib=64),
    **{name: MoleGradConfig.preset(name) for name in PRESETS},
    "grad-power": MoleGradConfig.of(**{**FACTORED, "gradient_mode": "grad"}, method="power"),
    "grad-tangent": MoleGradConfig.of(**{**FACTORED, "gradient_mode": "grad"}, method="tangent"),
    "factors-tangent": MoleGradConfig.of(**FACTORED, method="tangent"),
    "grad-power-fp8": MoleGradConfig.of(
        **{**FACTORED, "gradient_mode": "grad"}, method="power", products="fp8"
    ),
    "factors-tangent-fp8": MoleGradConfig.of(**FACTORED, method="tangent", products="fp8"),
}


def model_of(config, device):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)
    convert(layers, config)
    assert any(isinstance(layer, MoleLinear) for layer in layers)
    return layers, Muon(matrix_param_groups(layers))


def train(layers, optimizer, x, steps, called=None):
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (called or layers)(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_that_of_the_cpu_and_waits_for_nothing(name):
    results = []
    for device in (torch.device("cpu"), GPU):
        layers, optimizer = model_of(CONFIGS[name], device)
        x = randn(96, 64).to(device)
        train(layers, optimizer, x, 2)
        with no_waiting():
            train(layers, optimizer, x, 3)
        results.append(torch.cat([p.detach().cpu().flatten() for p in layers.parameters()]))
    assert (results[0] - results[1]).norm() < 0.02 * results[0].norm()


@needs_cuda
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_after_the_first_ones_take_no_memory_from_the_device(name):
    layers, optimizer = model_of(CONFIGS[name], GPU)
    x = randn(512, 64).to(GPU)
    train(layers, optimizer, x, 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    train(layers, optimizer, x, 5)
    after = torch.cuda.memory_stats()
    for key in ("segment.all.allocated", "num_device_alloc", "allocated_bytes.all.current"):
        assert after.get(key) == before.get(key), key


# torch.compile refuses group_mib; minimal is balanced but for the dtype of its momentum.
@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("factors-grouped", "minimal")])
def test_compiled_layers_train_alike(name, compiler):
    x = randn(96, 64).to(GPU)
    weights = []
    for compiled in (False, True):
        layers, optimizer = model_of(CONFIGS[name], GPU)
        train(layers, optimizer, x, 3, torch.compile(layers) if compiled else None)
        weights.append(torch.cat([p.detach().flatten() for p in layers.parameters()]))
    assert (weights[0] - weights[1]).norm() < 0.01 * weights[0].norm()
