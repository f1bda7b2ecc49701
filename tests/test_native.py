"""The native CPU kernels against the reference in float64, at shapes that fit no tile.

Measure of rightness: the relative error against a float64 truth may be at most FACTOR times that
of the same formula in plain torch products on the same data.
"""

import os
import subprocess
import sys

import pytest
import torch

from molegrad import _native, ops
from molegrad.ops.checks import acc_dtype
from molegrad.ops.float8 import add_quantized_reference, quantize_rows_reference
from molegrad.ops.orth import orthonormalize_reference
from molegrad.ops.power import lowrank_grad_reference
from molegrad.ops.random import rademacher_reference
from molegrad.ops.sketch import sketch_reference
from tests.samples import error, layouts, orthonormal, randn, tokens

MODULE, REASON = _native.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"native kernels: {REASON}")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FACTOR = 4.0
SHAPES = [  # T, n, m, k
    (0, 7, 5, 3),
    (1, 7, 5, 1),
    (5, 13, 11, 7),  # T < k
    (24, 48, 96, 16),  # whole tiles
    (97, 101, 53, 32),
    (97, 53, 101, 33),
    (193, 67, 149, 50),
    (300, 257, 31, 17),
]


def assert_as_good_as_torch(x, plain, truth, dtype):
    floor = torch.finfo(acc_dtype(dtype)).eps
    assert error(x, truth) <= FACTOR * max(error(plain, truth), floor)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sketch(shape, dtype):
    t, n, m, k = shape
    a, b = tokens(t, n, m, dtype)
    u, v = orthonormal(m, min(m, k), 1), randn(n, k, seed=2)
    truth = sketch_reference(a.double(), b.double(), u.double(), v.double())
    plain = sketch_reference(a, b, u, v)
    for x, p, true in zip(ops.sketch(a, b, u, v), plain, truth, strict=True):
        assert x.dtype == p.dtype and x.shape == p.shape
        assert_as_good_as_torch(x, p, true, dtype)


def test_the_shapes_above_run_native_code(monkeypatch):
    def forbidden(*args):
        raise AssertionError("the reference ran instead of the native kernel")

    monkeypatch.setattr(sys.modules["molegrad.ops.sketch"], "token_chunks", forbidden)
    a, b = tokens(10, 6, 5)
    ops.sketch(a, b, orthonormal(5, 2), orthonormal(6, 2))


def test_sketch_of_many_tokens_is_no_worse_than_torch():
    a, b = randn(4096, 96), randn(4096, 200)
    u, v = orthonormal(200, 32), orthonormal(96, 32)
    truth = sketch_reference(a.double(), b.double(), u.double(), v.double())
    for x, p, true in zip(ops.sketch(a, b, u, v), sketch_reference(a, b, u, v), truth, strict=True):
        assert error(x, true) <= 1.5 * error(p, true)
        bias = ((x.double() - true) * true.sign()).mean().abs() / true.abs().mean()
        assert bias < 2e-7


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("power_iters", [0, 1, 3])
def test_lowrank_grad(shape, dtype, power_iters):
    t, n, m, k = shape
    k = min(k, n, m)
    a, b = tokens(t, n, m, dtype)
    v, probes = orthonormal(n, k), randn(n, 3).sign()
    u, w, norm_sq, status = ops.lowrank_grad(a, b, v, power_iters, probes)
    assert (u.double().mT @ u.double() - torch.eye(k, dtype=F64)).norm() < 1e-6 * m * k
    # U is not unique where G is rank-deficient, so the truth is built on the returned U.
    g = b.double().mT @ a.double()
    truth = g @ v.double() @ v.double().mT if power_iters == 0 else u.double() @ (u.double().mT @ g)
    # v itself is orthonormal to float32 only
    assert error(u.double() @ w.double().mT, truth) < (2e-5 if dtype != F64 or t == 0 else 2e-6)
    expected = lowrank_grad_reference(
        a.double(), b.double(), v.double(), power_iters, probes.double()
    )[2]
    assert norm_sq.item() == pytest.approx(expected.item(), rel=1e-4)
    assert status.item() == (2 if t < k else status.item()) and status.item() in (0, 1, 2)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize(
    "m, n, k", [(1, 1, 1), (2, 5, 1), (53, 101, 7), (130, 67, 33), (50, 96, 64)]
)
def test_lowrank_update(m, n, k, dtype):
    weight, u, w = randn(m, n, dtype=dtype), randn(m, k, seed=1), randn(n, k, seed=2)
    truth = weight.double() * 0.75 + 0.5 * u.double() @ w.double().mT
    views, nothing_outside = layouts(m, n, dtype)
    for view in views:
        view.copy_(weight)
        ops.lowrank_update_(view, u, w, 0.5, 0.25)
        # Half an ulp of the weight's dtype, and the float32 sum's own rounding.
        bound = torch.finfo(dtype).eps / 2 * truth.abs() + 4e-7 * k * truth.abs().max()
        assert ((view.double() - truth).abs() <= bound).all()
    assert nothing_outside()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_lowrank_update_rounds_to_nearest_even(dtype):
    values = torch.tensor([1.0, 1e-3, 65504.0, 6e-8, 3e-5, 1e30, -1.0, 0.3333])
    w = torch.cat([values, values * (1 + torch.finfo(dtype).eps / 2)]).unsqueeze(1)
    weight = torch.zeros(1, len(w), dtype=dtype)
    ops.lowrank_update_(weight, torch.ones(1, 1), w, 1.0)
    assert torch.equal(weight, w.mT.to(dtype))
    ops.lowrank_update_(weight, torch.full((1, 1), torch.nan), w, 1.0)
    assert weight.isnan().all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("m, k", [(1, 1), (7, 7), (101, 33), (257, 32)])
@pytest.mark.parametrize("log_cond", [0, 2.5, 5, 9])
def test_orthonormalize(m, k, log_cond, dtype):
    columns = torch.diag(torch.logspace(0, -log_cond, k, dtype=F64))
    y = (orthonormal(m, k, 1, F64) @ columns @ orthonormal(k, k, 2, F64).mT).to(dtype)
    q, r, status = ops.orthonormalize(y)
    eps = torch.finfo(dtype).eps
    assert (q.double().mT @ q.double() - torch.eye(k, dtype=F64)).norm() < 4 * eps * k
    assert error(q.double() @ r.double(), y.double()) < 4 * eps * k**0.5
    assert status.item() == orthonormalize_reference(y)[2].item()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n, k", [(5, 1), (33, 33), (149, 7), (211, 32)])
@pytest.mark.parametrize("rank", [0.3, 0.6, 1.0])
def test_polar_factor(n, k, rank, dtype):
    rank = max(1, int(rank * k))
    singular = torch.logspace(0, -4, rank, dtype=F64)
    left, right = orthonormal(n, rank, 1, F64), orthonormal(k, rank, 2, F64)
    w = (left @ torch.diag(singular) @ right.mT).to(dtype)
    p = ops.polar_factor(w)
    assert error(p, left @ right.mT) < 50 * torch.finfo(dtype).eps * 1e4  # condition 1e4
    assert torch.equal(ops.polar_factor(torch.zeros_like(w)), torch.zeros_like(w))


@pytest.mark.parametrize("seed", [0, 7, -9, 2**62])
def test_rademacher_is_the_reference_bit_for_bit(seed):
    for rows, cols, counter in ((33, 7, 5), (1, 1, 0), (0, 4, 1), (129, 3, -2)):
        step = torch.tensor(counter)
        assert torch.equal(
            ops.rademacher(rows, cols, step, seed), rademacher_reference(rows, cols, step, seed)
        )


def test_results_repeat_bit_for_bit_at_each_thread_count():
    a, b = tokens(700, 60, 90)
    v, u = orthonormal(60, 20), orthonormal(90, 20)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        first = (*ops.sketch(a, b, u, v), *ops.lowrank_grad(a, b, v)[:3])
        again = (*ops.sketch(a, b, u, v), *ops.lowrank_grad(a, b, v)[:3])
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        truth = sketch_reference(a.double(), b.double(), u.double(), v.double())
        assert error(first[0], truth[0]) < 1e-6 and error(first[1], truth[1]) < 1e-6


def test_layouts_give_the_same_bits():
    a, b = tokens(60, 24, 18)
    u, v = orthonormal(18, 4), orthonormal(24, 5)
    expected = ops.sketch(a, b, u, v)
    wide = torch.zeros(60, 50)
    wide[:, 3:27] = a
    for x, y in (
        (a.view(3, 4, 5, 24), b.view(3, 4, 5, 18)),
        (wide[:, 3:27], b.mT.contiguous().mT),
        (a.view(12, 5, 24).transpose(0, 1), b.view(12, 5, 18).transpose(0, 1)),
    ):
        got = ops.sketch(x, y, u.mT.contiguous().mT, v)
        if x.stride()[0] != 24:  # same token order
            assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))
        torch.testing.assert_close(got, expected)
    row = b[:1].expand(60, 18)
    torch.testing.assert_close(ops.sketch(a, row, u, v), ops.sketch(a, row.contiguous(), u, v))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.sketch(randn(3, 4), randn(2, 5), randn(5, 1), randn(4, 1)),
         "sketch: expected a and b to agree in every dimension but the last, got a (3, 4)"),
        (lambda: ops.sketch(randn(3, 4), randn(3, 5).half(), randn(5, 1), randn(4, 1)),
         "expected a and b of the same dtype, got torch.float32 and torch.float16"),
        (lambda: ops.sketch(randn(3, 4).int(), randn(3, 5), randn(5, 1), randn(4, 1)),
         "a must be floating point"),
        (lambda: ops.sketch_accumulate_(randn(1, 5).mT, randn(4, 2).half(), randn(3, 4),
                                        randn(3, 5), randn(5, 2), randn(4, 1)),
         "sketch_accumulate_: expected w contiguous of shape (4, 2) and torch.float32"),
        (lambda: ops.lowrank_grad(randn(3, 4), randn(3, 5), randn(4, 5)), "rank k=5"),
        (lambda: ops.lowrank_grad(randn(3, 4), randn(3, 5), randn(4, 2), -2),
         "power_iters must be >= 0, got -2"),
        (lambda: ops.orthonormalize(randn(3, 4)), "rank k=4"),
        (lambda: ops.orthonormalize(randn(4, 3), 0.5), "cond_max must be at least 1, got 0.5"),
        (lambda: ops.polar_factor(randn(3)), "polar_factor: w needs at least two dimensions"),
        (lambda: ops.lowrank_update_(randn(3, 4), randn(3, 2), randn(4, 1)), "of one rank k"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value).startswith("molegrad::") and message in str(caught.value)


_PROBE = """
import torch
from molegrad import ops, build_info
from molegrad.ops.sketch import sketch_reference
torch.set_num_threads(1)
torch.manual_seed(0)
a, b, u, v = torch.randn(77, 31), torch.randn(77, 53), torch.randn(53, 21), torch.randn(31, 9)
worst = 0.0
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x, y = a.to(dtype), b.to(dtype)
    truth = sketch_reference(x.double(), y.double(), u.double(), v.double())
    for got, true in zip(ops.sketch(x, y, u, v), truth):
        worst = max(worst, ((got - true).norm() / true.norm()).item())
q, r, _ = ops.orthonormalize(u)
worst = max(worst, ((q @ r - u).norm() / u.norm()).item())
print("RESULT", build_info()["cpu_capability"], worst)
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_narrower_instruction_sets_compute_the_same(capability):
    env = os.environ | {"MOLEGRAD_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env=env, capture_output=True, text=True, check=True
    )
    _, name, worst = done.stdout.split()
    assert name in ("baseline", capability) and float(worst) < 1e-6


def test_build_info():
    info = _native.build_info()
    assert info["native"] and info["torch"] == torch.__version__
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512")
    assert set(info["paths"]) == {"kernels", "fp8", "grouped", "cublaslt_grouped", "sketch"}
    assert all(set(path) >= {"supported", "reason"} for path in info["paths"].values())
    if not info["cuda"]:
        none = {"supported": False, "reason": "this build has the CPU ops only"}
        assert all(path == none for path in info["paths"].values())
        with pytest.raises(RuntimeError, match="this build has the CPU ops only"):
            MODULE.sketch_path("bfloat16", 768, 3072, 8192, 32)


def test_the_path_of_a_sketch_is_read_at_every_call(monkeypatch):
    if not _native.build_info()["cuda"]:
        pytest.skip("this build has the CPU ops only")

    def path(wanted, dtype="bfloat16", tokens=8192):
        monkeypatch.setenv("MOLEGRAD_SKETCH_PATH", wanted)
        return MODULE.sketch_path(dtype, 768, 3072, tokens, 32)

    assert [path(x) for x in ("own", "fused", "auto", "own")] == ["own", "fused", "own", "own"]
    assert path("fused", "float16") == "own"
    known = _native.build_info()["paths"]["sketch"]
    assert known["wanted"] == "fused" and known["bfloat16"] == "fused" and known["float16"] == "own"
    rules = "768x3072x4096=fused,own"
    assert path(rules) == "fused" and path(rules, tokens=4095) == "own"
    known = _native.build_info()["paths"]["sketch"]
    assert known["wanted"] == rules and known["bfloat16"] == "own"
    with pytest.raises(RuntimeError, match="must be auto, own, cublaslt or fused, .*; got fast"):
        path("fast")
    known = _native.build_info()["paths"]["sketch"]
    assert not known["supported"] and known["reason"].endswith("got fast")


def test_a_dtype_that_no_sketch_takes_is_named():
    with pytest.raises(ValueError, match="float32, float64, bfloat16 or float16, got int8"):
        MODULE.sketch_path("int8", 768, 3072, 8192, 32)


def test_which_sketches_the_fused_launch_takes():
    h100, rtx5090 = (132, 228 << 10), (170, 100 << 10)
    assert MODULE.fused_fits(8192, 768, 3072, 32, *h100)
    assert MODULE.fused_fits(8192, 1280, 5120, 32, *h100)
    assert not MODULE.fused_fits(8192, 1280, 5120, 32, *rtx5090)  # too little shared memory
    assert not MODULE.fused_fits(8192, 1280, 5120, 128, *h100)  # too large a rank
    assert not MODULE.fused_fits(8192, 4096, 14336, 32, *h100)  # too wide for a cluster
    assert not MODULE.fused_fits(8192, 1281, 5120, 32, *h100)  # rows start at odd addresses
    assert not MODULE.fused_fits(0, 768, 3072, 32, *h100)


def test_cuda_paths_follow_capability_and_library():
    def supported(capability, cublaslt):
        paths = MODULE.cuda_paths(capability, cublaslt, "90a-real,100,120-real")
        names = ("kernels", "fp8", "grouped", "cublaslt_grouped")
        found = [paths[name]["supported"] for name in names]
        assert found[0] == found[1] == found[2]
        return found[1:]

    assert supported(0, 130400) == [False, False, False]
    assert supported(80, 130400) == supported(89, 130400) == [False, False, False]
    assert supported(90, 130300) == [True, True, False]
    assert supported(90, 130400) == [True, True, True]
    assert supported(100, 130200) == [True, True, True]
    assert supported(120, 130500) == [True, True, False]


@pytest.mark.parametrize(
    "sketch, grouped, words",
    [
        (
            "auto",
            "auto",
            "kernels of ours for layers of bfloat16 and float16 that fit L2 and ranks",
        ),
        ("own", "together", "for layers of bfloat16 and float16 and ranks up to 128, the others"),
        ("cublaslt", "auto", "kernels of ours for layers of float16 that fit L2"),
        ("auto", "single", "one layer at a time (MOLEGRAD_GROUPED_PATH=single)"),
        ("auto", "none", "MOLEGRAD_GROUPED_PATH is none"),
    ],
)
def test_how_layers_are_grouped_is_told(monkeypatch, sketch, grouped, words):
    monkeypatch.setenv("MOLEGRAD_SKETCH_PATH", sketch)
    monkeypatch.setenv("MOLEGRAD_GROUPED_PATH", grouped)
    assert words in MODULE.cuda_paths(90, 130000, "90")["grouped"]["reason"]


@pytest.mark.parametrize(
    "architectures, runs",
    [
        ("90a-real,120-real,120-virtual", {90, 120, 121}),
        ("90", {90, 100, 103, 120, 121}),
        ("90-real", {90}),
        ("90-virtual", {90, 100, 103, 120, 121}),
        ("100-real", {100, 103}),
        ("120a-real", {120}),
        ("native", {90, 100, 103, 120, 121}),
    ],
)
def test_which_gpus_the_kernels_run_on(architectures, runs):
    for capability in (0, 75, 80, 89, 90, 100, 103, 120, 121):
        path = MODULE.cuda_paths(capability, 130000, architectures)["kernels"]
        assert path["supported"] == (capability in runs), capability
    older = MODULE.cuda_paths(89, 130000, architectures)["kernels"]["reason"]
    assert "9.0 or newer" in older and "MOLEGRAD_BUILD=0" in older
    if runs == {120}:
        reason = MODULE.cuda_paths(90, 130000, architectures)["kernels"]["reason"]
        assert reason.startswith("built for 120a-real, not for this GPU") and "=native" in reason


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("shape", [(5,), (7, 3), (2, 5, 11), (300, 257), (0, 4)], ids=str)
def test_quantize_rows_bit_for_bit(shape, dtype):
    x = randn(*shape) * (3 * randn(*shape, seed=1)).exp()
    if x.dim() == 2 and len(x) > 6:
        x[0], x[1], x[2, 0], x[3] = 0.0, torch.nan, torch.inf, -0.0
        x[4] *= 1e-41
    x = x.to(dtype)
    data, scale = ops.quantize_rows(x)
    expected, expected_scale = quantize_rows_reference(x)
    assert data.shape == x.shape and torch.equal(scale, expected_scale)
    assert torch.equal(data.float().nan_to_num(999), expected.float().nan_to_num(999))


def test_quantize_rows_rounds_every_magnitude_as_torch_does():
    bits = torch.arange(0, 2**31, 4999, dtype=torch.int64).to(torch.int32)
    x = bits.view(F32)
    x = x[x <= 448]
    x = torch.cat([x, -x, torch.tensor([448.0])])  # the largest is 448: the scale is 1
    assert torch.equal(ops.quantize_rows(x)[0].float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("m, n", [(13, 11), (300, 257), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("by_column", [False, True])
def test_add_quantized_bit_for_bit(m, n, dtype, by_column):
    x = 5 * randn(m, n, dtype=dtype)
    scale = randn(1, n).abs() if by_column else randn(m, 1).abs()
    data = (40 * randn(m, n, seed=3)).clamp(-127, 127).to(torch.int8)
    expected, expected_scale = data.clone(), scale.clone()
    ops.add_quantized_(data, scale, x)
    add_quantized_reference(expected, expected_scale, x)
    assert torch.equal(data, expected) and torch.equal(scale, expected_scale)
    strided = torch.zeros(n, m, dtype=torch.int8).mT
    strided.copy_(data)
    ops.add_quantized_(strided, scale, x)
    add_quantized_reference(data, expected_scale, x)
    assert torch.equal(strided, data) and torch.equal(scale, expected_scale)
