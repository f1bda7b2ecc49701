"""The ops of csrc/cuda/{sketch_op.cpp,power.cu,grouped.cu} with emulated kernels, on tensors of the
CPU, by every path.

What is called is the kernel registered for CUDA: everything but the GPU itself is what runs there.
"""

import ctypes

import pytest
import torch

from molegrad.ops.checks import FLOAT8, acc_dtype
from molegrad.ops.float8 import quantize_rows_reference, quantize_tensor_reference
from molegrad.ops.power import lowrank_grad_reference
from molegrad.ops.random import rademacher_reference
from molegrad.ops.sketch import sketch_reference
from tests.cuda import build
from tests.cuda.build import call_op
from tests.cuda.pairs import pairwise
from tests.samples import error, orthonormal, randn, tokens

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
E4M3, E5M2 = FLOAT8
TOLERANCE = {F32: 2e-6, F64: 1e-14, BF16: 2e-5, F16: 1e-5}
PATHS = ["own", "cublaslt", "auto", "fused", "24x40x64=fused,cublaslt"]
pytestmark = pytest.mark.usefixtures("emulated_ops")


@pytest.fixture
def path(request, monkeypatch):
    monkeypatch.setenv("MOLEGRAD_SKETCH_PATH", request.param)


def close(results, truths, tolerance, times=1):
    for x, exact in zip(results, truths, strict=True):
        assert error(x, times * exact) < tolerance


# Sizes that the stand-in for cuBLASLt supports, does not, and partly does; in the last one it is
# the rest behind chunks of tokens that it does not.
SHAPES = [(100, 24, 40, 6), (33, 17, 9, 5), (60, 25, 40, 8), (1, 4, 6, 1), (701, 24, 40, 6)]


@pytest.mark.parametrize(
    "path, dtype, shape", pairwise(PATHS, [F32, F64, BF16, F16], SHAPES), indirect=["path"]
)
def test_sketches_and_power_iterations(path, shape, dtype):
    t, n, m, k = shape
    tolerance = TOLERANCE[dtype]
    a, b = tokens(t, n, m, dtype)
    u, v = orthonormal(m, max(1, k - 1), 1), orthonormal(n, k, 2)
    true = sketch_reference(a.double(), b.double(), u.double(), v.double())
    y, w = call_op("sketch", a, b, u, v)
    assert y.dtype == w.dtype == acc_dtype(dtype)
    close((y, w), true, tolerance)
    call_op("sketch_accumulate_", y, w, a.view(1, t, n), b.view(1, t, m), u.double(), v)
    close((y, w), true, tolerance, 2)
    probes = rademacher_reference(n, 3, torch.tensor(4), 1)
    for power_iters, omega in ((0, probes), (1, None), (3, probes)):
        got = call_op("lowrank_grad", a, b, v.to(dtype), power_iters, omega, 1e3)
        exact = lowrank_grad_reference(
            a.double(), b.double(), v.to(dtype).double(), power_iters,
            None if omega is None else omega.double(),
        )  # fmt: skip
        assert error(got[0].double() @ got[1].double().mT, exact[0] @ exact[1].mT) < 4 * tolerance
        assert error(got[2], exact[2]) < 2 * tolerance
        assert got[0].dtype == got[1].dtype == got[2].dtype == y.dtype
        assert got[2].shape == () and got[3].dtype == torch.int32
        assert int(got[3]) == int(exact[3])


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_no_tokens(dtype):
    a, b = tokens(0, 6, 5, dtype)
    u, v = orthonormal(5, 2), orthonormal(6, 3)
    y, w = call_op("sketch", a, b, u, v)
    assert not y.any() and not w.any() and y.shape == (5, 3) and w.shape == (6, 2)
    before = y + 1, w + 1
    call_op("sketch_accumulate_", *before, a, b, u, v)
    assert (before[0] == 1).all() and (before[1] == 1).all()
    u, w, norm_sq, status = call_op("lowrank_grad", a, b, orthonormal(6, 2), 1, None, 1e3)
    assert int(status) == 2 and not w.any() and norm_sq == 0


def narrowed(x, dtype, by_row):
    """x in `dtype`, its scale if that is float8, and what the two stand for."""
    if dtype not in FLOAT8:
        return x.to(dtype), None, x.to(dtype).double()
    quantize = quantize_rows_reference if by_row else quantize_tensor_reference
    data, scale = quantize(x, dtype == E5M2)
    return data, scale, data.double() * (scale.unsqueeze(-1) if by_row else scale).double()


@pytest.mark.parametrize("path", ["auto", "cublaslt"], indirect=True)
@pytest.mark.parametrize("shape, by_row", [((100, 24, 40, 6), True), ((33, 17, 9, 5), False)])
@pytest.mark.parametrize(
    "dtypes",
    [(E4M3, E5M2), (E5M2, E5M2), (E4M3, BF16), (F16, E5M2), (F32, E4M3), (E5M2, F64)],
    ids=str,
)
def test_float8_operands(path, shape, by_row, dtypes):
    t, n, m, k = shape
    wide = F64 if F64 in dtypes else F32
    tolerance = 1e-6 if F32 in dtypes or F64 in dtypes else 2e-5
    a, b = tokens(t, n, m)
    a, a_scale, wide_a = narrowed(a, dtypes[0], by_row)
    b, b_scale, wide_b = narrowed(1e-5 * b, dtypes[1], by_row)
    u, v = orthonormal(m, k - 1, 1), orthonormal(n, k, 2)
    true = sketch_reference(wide_a, wide_b, u.double(), v.double())
    y, w = call_op("sketch", a, b, u, v, a_scale, b_scale)
    assert y.dtype == w.dtype == wide
    close((y, w), true, tolerance)
    scales = [x.view(1, t) if x is not None and x.dim() else x for x in (a_scale, b_scale)]
    call_op("sketch_accumulate_", y, w, a.view(1, t, n), b.view(1, t, m), u.double(), v, *scales)
    close((y, w), true, tolerance, 2)
    got = call_op("lowrank_grad", a, b, v, 2, torch.ones(n, 2), 1e3, a_scale, b_scale)
    exact = lowrank_grad_reference(wide_a, wide_b, v.double(), 2, torch.ones(n, 2).double())
    assert error(got[0].double() @ got[1].double().mT, exact[0] @ exact[1].mT) < 10 * tolerance
    assert error(got[2], exact[2]) < 4 * tolerance


def test_float8_in_any_layout():
    a, b = tokens(60, 24, 18)
    (a, a_scale), (b, b_scale) = quantize_rows_reference(a), quantize_rows_reference(b, True)
    u, v = orthonormal(18, 4), orthonormal(24, 5)
    expected = call_op("sketch", a, b, u, v, a_scale, b_scale)
    gaps = torch.stack([a_scale, -a_scale], dim=1)[:, 0]
    got = call_op("sketch", a.mT.contiguous().mT, b, u, v, gaps, b_scale)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_widening_is_said_once():
    done = build.run_check(
        "import torch, molegrad.ops\n"
        "from tests.cuda import build\n"
        "build.load()\n"
        "a = torch.ones(3, 4).to(torch.float8_e4m3fn), torch.ones(3, 5), torch.ones(5, 2)\n"
        "for _ in range(2):\n"
        "    build.call_op('sketch', *a, torch.ones(4, 2), torch.tensor(1.0), None)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a float8 operand beside one of torch.float32 is converted") == 1


def test_a_path_that_does_not_exist_is_named(monkeypatch):
    args = randn(3, 4), randn(3, 5), randn(5, 1), randn(4, 1)
    monkeypatch.setenv("MOLEGRAD_SKETCH_PATH", "fast")
    with pytest.raises(RuntimeError, match="auto, own, cublaslt or fused, or rules .*; got fast"):
        call_op("sketch", *args)
    monkeypatch.delenv("MOLEGRAD_SKETCH_PATH")
    monkeypatch.setenv("MOLEGRAD_GROUPED_PATH", "both")
    y, w = torch.zeros(5, 1), torch.zeros(4, 1)
    with pytest.raises(RuntimeError, match="must be auto, together or single, got both"):
        call_op("sketch_accumulate_many_", *([x] for x in (y, w, *args)))


def test_the_path_is_read_at_every_call(emulated, monkeypatch):
    for path, expected in (
        ("auto", [2, 2, 2, 2, 1, 2, 1, 1]),
        ("own", [1] * 8),
        ("cublaslt", [2, 2, 2, 2, 2, 2, 1, 1]),
        ("fused", [2, 2, 2, 2, 3, 3, 1, 1]),
        ("768x3072x8192x32=fused,cublaslt", [2, 2, 2, 2, 3, 2, 1, 1]),
    ):
        monkeypatch.setenv("MOLEGRAD_SKETCH_PATH", path)
        sizes = [(dtype, 768, 3072, 8192, rank) for dtype in range(4) for rank in (32, 200)]
        assert [emulated.value("molegrad_sketch_path", *size) for size in sizes] == expected


# ---- several layers ------------------------------------------------------------------------------


def layer(t, n, m, kv, ku, dtype, seed):
    a, b = tokens(t, n, m, dtype, seed=seed)
    acc = acc_dtype(dtype)
    y, w = torch.zeros(m, kv, dtype=acc), torch.zeros(n, ku, dtype=acc)
    return y, w, a, b, orthonormal(m, ku, seed + 1), orthonormal(n, kv, seed + 2)


def add(layers):
    call_op("sketch_accumulate_many_", *map(list, zip(*layers, strict=True)))


def check(layers, times=1):
    for y, w, a, b, u, v in layers:
        true = sketch_reference(a.double(), b.double(), u.double(), v.double())
        close((y, w), true, TOLERANCE[a.dtype], times)


@pytest.fixture(params=["auto", "together", "single"])
def grouped(request, monkeypatch):
    monkeypatch.setenv("MOLEGRAD_GROUPED_PATH", request.param)
    return request.param


@pytest.mark.parametrize("path", ["own", "cublaslt", "auto", "fused"], indirect=True)
def test_layers_of_every_kind(path, grouped):
    # dtypes and ranks that share a launch and that do not, no tokens, more tokens than a chunk
    layers = [
        layer(100, 24, 40, 6, 5, BF16, 0), layer(33, 17, 9, 5, 8, BF16, 1),
        layer(60, 25, 40, 8, 20, BF16, 2), layer(0, 8, 6, 2, 2, BF16, 3),
        layer(700, 24, 40, 16, 16, BF16, 4), layer(5, 12, 30, 7, 3, BF16, 5),
        layer(40, 24, 40, 6, 5, F16, 6), layer(50, 20, 11, 2, 3, F16, 7),
        layer(40, 24, 40, 6, 5, F32, 8), layer(40, 9, 40, 6, 5, F64, 9),
        layer(40, 150, 140, 130, 3, BF16, 10), layer(1, 4, 6, 1, 2, BF16, 11),
    ]  # fmt: skip
    add(layers)
    check(layers)
    add(layers)
    check(layers, 2)


def test_layouts_and_layers_that_are_used_twice():
    # leading dimensions, columns that are not neighbours, rows that share their memory
    y, w, a, b, u, v = layer(60, 24, 40, 6, 5, BF16, 0)
    other = layer(30, 12, 10, 3, 4, BF16, 1)
    b_columns = b.mT.contiguous().mT.view(3, 20, 40)
    add([other, (y, w, a.view(3, 20, 24), b_columns, u.mT.clone().mT, v)])
    check([(y, w, a, b, u, v), other])
    # two uses add to one sum
    y, w, a, b, u, v = layer(60, 24, 40, 6, 5, BF16, 0)
    c, d = tokens(20, 24, 40, BF16, seed=9)
    add([(y, w, a, b, u, v), layer(8, 24, 40, 6, 5, BF16, 3), (y, w, c, d, u, v)])
    check([(y, w, torch.cat([a, c]), torch.cat([b, d]), u, v)])


@pytest.mark.parametrize("path", ["own", "cublaslt", "auto", "fused"], indirect=True)
def test_launches(emulated, path, grouped, request):
    """The emulated L2 holds 36 KB of A and B."""
    counter = ctypes.CDLL(str(emulated.path)).emulation_launches
    counter.restype = ctypes.POINTER(ctypes.c_int64)

    def launches(layers):
        before = counter().contents.value
        add(layers)
        return counter().contents.value - before

    wide = [layer(64, 24, 40, 6, 5, BF16, i) for i in range(24)]  # 16 KB in tiles of 128 tokens
    alone, together = sum(launches([x]) for x in wide), launches(wide)
    check(wide, 2)
    tall = [layer(700, 24, 40, 6, 5, BF16, i) for i in range(3)]  # 90 KB each
    tall_alone, tall_together = sum(launches([x]) for x in tall), launches(tall)
    check(tall, 2)
    if request.node.callspec.params["path"] in ("own", "auto") and grouped != "single":
        chunks = -(-24 // 2)
        assert together == 1 + 3 * chunks <= 4 * chunks and alone == 24 * 4
        # layers of several chunks each: in a group they would take more launches
        assert (tall_together > tall_alone) == (grouped == "together")
    else:
        assert together == alone and tall_together == tall_alone
