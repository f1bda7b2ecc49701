"""The products of a sketch, csrc/cuda/sketch.cu, against the reference in float64.

Measure of rightness: relative error, cosine and signed bias at most FACTOR times those of torch's
own chain on the same data: bases, P and R rounded to the inputs' dtype, sums in float32. Float32
and float64 are held to the reference in their own precision.
"""

import pytest
import torch

from molegrad.ops.checks import acc_dtype
from molegrad.ops.sketch import sketch_reference
from tests.cuda import build
from tests.cuda.pairs import pairwise
from tests.samples import error, orthonormal, randn, tokens

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FACTOR = 4.0
# With two 16-bit numbers for each of a basis, of P and of R. A GPU's tensor cores cut off what does
# not fit a sum, so that long sums come out a little small; the emulation cuts the sums of one
# instruction only.
TWO_PIECES = 1e-4 if build.ON_GPU else 2e-5
SHARED = build.shared_memory()
DEVICE = (4, SHARED)  # multiprocessors, shared memory of each: few, so that sums are cut up
SHAPES = [  # T, n, m, k
    (1, 7, 5, 1),
    (5, 13, 11, 7),  # T < k
    (130, 64, 256, 16),  # whole tiles, two of them of tokens
    (97, 104, 53, 32),
    (97, 53, 101, 33),
    (300, 72, 264, 50),
    (140, 40, 136, 128),
    (33, 24, 40, 140),  # two passes
]


@pytest.fixture
def kernels(emulated):
    return emulated


def scratch(bytes_):
    return torch.full((bytes_,), 255, dtype=torch.uint8)  # NaN


def product(library, left, right, out, add=False, processors=DEVICE[0]):
    """out = or += leftᵀ right."""
    sizes = (left.dtype, left.shape[1], left.shape[0], right.shape[1])
    memory = scratch(library.value("molegrad_product_scratch", *sizes, processors))
    library.molegrad_product(
        *sizes, left, *left.stride(), right, *right.stride(), out, out.stride(0), int(add),
        processors, memory,
    )  # fmt: skip


def run(kernels, a, b, u, v, add_to=None, chunk=None, device=DEVICE):
    """Y and W; None for the half whose basis is None."""
    (t, n), m = a.shape, b.shape[1]
    kv, ku = (0 if basis is None else basis.shape[1] for basis in (v, u))
    dtype = acc_dtype(a.dtype)
    y, w = add_to or (torch.full(size, torch.nan, dtype=dtype) for size in ((m, kv), (n, ku)))
    library = kernels
    if a.dtype in (F32, F64):
        for x, z, s, out in ((a, b, v, y), (b, a, u, w)):
            if s is not None:
                p = torch.full((t, s.shape[1]), torch.nan, dtype=dtype)
                product(library, x.mT, s.to(dtype), p, False, device[0])
                product(library, z, p, out, add_to is not None, device[0])
    else:
        chunk = chunk or max(128, (t + 127) // 128 * 128)
        sizes = (t, n, m, kv, ku, chunk, *device)
        memory = scratch(library.value("molegrad_sketch_scratch", *sizes))

        def basis(x):
            return (a.dtype, None, 0, 0, 0) if x is None else (x.dtype, x, *x.stride(), x.shape[1])

        library.molegrad_sketch(
            a.dtype, a, a.stride(0), b, b.stride(0), t, n, m, *basis(v), *basis(u),
            y, y.stride(0), w, w.stride(0), int(add_to is not None), chunk, *device, memory,
        )  # fmt: skip
    return (None if v is None else y), (None if u is None else w)


def truth(a, b, u, v):
    return sketch_reference(a.double(), b.double(), u.double(), v.double())


def chain(a, b, u, v):
    """What torch's own products make of it: bases, P and R in the dtype of A, sums in float32."""
    if a.dtype in (F32, F64):
        return sketch_reference(a, b, u, v)

    def narrow(x):
        return x.to(a.dtype).float()

    wide_a, wide_b = narrow(a), narrow(b)
    return wide_b.mT @ narrow(wide_a @ narrow(v)), wide_a.mT @ narrow(wide_b @ narrow(u))


def angle(x, true):
    x = x.double()
    return (1 - (x * true).sum() / (x.norm() * true.norm()).clamp_min(1e-300)).abs().item()


def bias(x, true):
    return (((x.double() - true) * true.sign()).mean() / true.abs().mean()).abs().item()


def assert_as_good(x, plain, true, dtype):
    eps = torch.finfo(acc_dtype(dtype)).eps
    assert x.isfinite().all()
    assert error(x, true) <= FACTOR * max(error(plain, true), eps)
    assert angle(x, true) <= FACTOR * max(angle(plain, true), eps)
    assert bias(x, true) <= FACTOR * max(error(plain, true), eps)


@pytest.mark.parametrize(
    "order, shape, dtype",
    pairwise(["forward", "reverse"], SHAPES, [F32, F64, BF16, F16]),
    indirect=["order"],
)
def test_against_float64(kernels, order, shape, dtype):
    t, n, m, k = shape
    a, b = tokens(t, n, m, dtype)
    u, v = orthonormal(m, min(m, k), 1), randn(n, k, seed=2)
    true, plain = truth(a, b, u, v), chain(a, b, u, v)
    for x, p, exact in zip(run(kernels, a, b, u, v), plain, true, strict=True):
        assert_as_good(x, p, exact, dtype)
        if dtype in (BF16, F16):
            assert error(x, exact) < TWO_PIECES


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_no_tokens_give_zero_or_what_was_there(kernels, dtype):
    a, b = tokens(0, 9, 7, dtype)
    u, v = orthonormal(7, 3), orthonormal(9, 2)
    acc = acc_dtype(dtype)
    y, w = run(kernels, a, b, u, v)
    assert torch.equal(y, torch.zeros(7, 2, dtype=acc))
    assert torch.equal(w, torch.zeros(9, 3, dtype=acc))
    before = randn(7, 2, dtype=acc), randn(9, 3, dtype=acc)
    after = run(kernels, a, b, u, v, add_to=tuple(x.clone() for x in before))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_accumulates_and_leaves_out_a_half(kernels, dtype):
    t, n, m = 150, 24, 40
    a, b = tokens(t, n, m, dtype)
    u, v = orthonormal(m, 4), orthonormal(n, 5)
    y, w = run(kernels, a, b, u, v)
    only_y, nothing = run(kernels, a, b, None, v)
    nothing_again, only_w = run(kernels, a, b, u, None)
    assert nothing is None and nothing_again is None
    torch.testing.assert_close(only_y, y)
    torch.testing.assert_close(only_w, w)
    start = randn(m, 5, dtype=y.dtype), randn(n, 4, dtype=y.dtype)
    more = run(kernels, a, b, u, v, add_to=tuple(x.clone() for x in start))
    torch.testing.assert_close(more[0], start[0] + y)
    torch.testing.assert_close(more[1], start[1] + w)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("t", [128, 256, 257, 511, 640])
def test_chunks_add_up(kernels, t, dtype):
    a, b = tokens(t, 72, 40, dtype)
    u, v = orthonormal(40, 20), orthonormal(72, 9)
    true, plain = truth(a, b, u, v), chain(a, b, u, v)
    for chunk in (128, 256, 384):
        for x, p, exact in zip(run(kernels, a, b, u, v, chunk=chunk), plain, true, strict=True):
            assert_as_good(x, p, exact, dtype)
            assert error(x, exact) < TWO_PIECES


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("processors", [1, 7, 132])
def test_any_gpu(kernels, processors, dtype):
    a, b = tokens(200, 200, 300, dtype)
    u, v = orthonormal(300, 16), orthonormal(200, 16)
    for x, exact in zip(
        run(kernels, a, b, u, v, device=(processors, 100 << 10)), truth(a, b, u, v), strict=True
    ):
        assert error(x, exact) < TWO_PIECES


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_strides_and_alignment(kernels, dtype):
    t, n, m = 70, 40, 48
    a, b = tokens(t, n, m, dtype)
    u, v = orthonormal(m, 6), orthonormal(n, 5)
    expected = run(kernels, a, b, u, v)
    for left, gap in ((0, 8), (8, 24), (1, 5), (3, 8)):
        wide_a = torch.full((t, left + n + gap), torch.nan, dtype=dtype)
        wide_a[:, left : left + n] = a
        wide_b = torch.full((t, left + m + gap), torch.nan, dtype=dtype)
        wide_b[:, left : left + m] = b
        got = run(
            kernels, wide_a[:, left : left + n], wide_b[:, left : left + m],
            u.mT.contiguous().mT, v.to(F64),
        )  # fmt: skip
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    row = b[:1].expand(t, m)  # rows that share their memory
    expected = run(kernels, a, row.contiguous(), u, v)
    got = run(kernels, a, row, u, v)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("basis", [F32, F64, BF16, F16])
def test_bases_of_any_dtype(kernels, basis, dtype):
    a, b = tokens(40, 24, 16, dtype)
    u, v = orthonormal(16, 3, dtype=basis), orthonormal(24, 5, dtype=basis)
    for x, exact in zip(run(kernels, a, b, u, v), truth(a, b, u, v), strict=True):
        assert error(x, exact) < TWO_PIECES


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-2, 1e2])
def test_float16_of_any_size(kernels, scale):
    """P and R are as exact where they are beyond what float16 can hold."""
    t, n, m = 300, 40, 56
    a, b = tokens(t, n, m, F64)
    a, b = (1e3 * a).clamp(-6e4, 6e4).half(), (scale * b).half()
    b[:130] *= 0.01  # tokens of very different sizes
    a[130:200] = 0
    u, v = 30 * orthonormal(m, 8), 30 * orthonormal(n, 8)
    true, plain = truth(a, b, u, v), sketch_reference(a, b, u, v)
    for x, p, exact in zip(run(kernels, a, b, u, v), plain, true, strict=True):
        assert error(x, exact) < TWO_PIECES and error(p, exact) < 2e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_what_is_not_finite_shows_and_stays_where_it_belongs(kernels, dtype, bad):
    a, b = tokens(150, 24, 16, dtype)
    u, v = orthonormal(16, 3), orthonormal(24, 5)
    a[140, 7] = bad
    y, w = run(kernels, a, b, u, v)
    assert not y.isfinite().any()
    assert not w[7].isfinite().any() and w[torch.arange(24) != 7].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_many_tokens(kernels, dtype):
    a, b = randn(2048, 40, dtype=dtype), randn(2048, 56, dtype=dtype)
    u, v = orthonormal(56, 16), orthonormal(40, 16)
    true = truth(a, b, u, v)
    first = run(kernels, a, b, u, v, chunk=1024)
    again = run(kernels, a, b, u, v, chunk=1024)
    for x, y, exact in zip(first, again, true, strict=True):
        assert torch.equal(x, y)
        assert error(x, exact) < TWO_PIECES and bias(x, exact) < TWO_PIECES / 20


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_pieces_around_the_products_of_a_library(emulated, dtype):
    """What surrounds a library's products of bfloat16: numbers in two pieces, there and back."""
    library = emulated
    t, n, m, k, rank = 50, 12, 20, 5, 8
    a, b = tokens(t, n, m, BF16)
    v = orthonormal(n, k, dtype=dtype)
    basis, q = torch.empty(n, 2 * rank, dtype=BF16), torch.empty(t, 2 * rank, dtype=BF16)
    library.molegrad_split(v.dtype, v, *v.stride(), n, k, rank, basis)
    high, low = basis.double().split(rank, dim=1)
    assert error((high + low)[:, :k], v.double()) < 1e-5 and not basis[:, k:rank].any()
    p = a.float() @ basis.float()
    library.molegrad_join(p, t, rank, q)
    high, low = q.double().split(rank, dim=1)
    assert error((high + low)[:, :k], a.double() @ v.double()) < 1e-5
    sums = b.float().mT @ q.float()
    true = b.double().mT @ (a.double() @ v.double())
    out = torch.full((m, k + 3), 7.0)
    library.molegrad_add_pieces(sums, m, k, rank, out, k + 3, 0)
    assert error(out[:, :k], true) < 1e-5 and (out[:, k:] == 7).all()
    library.molegrad_add_pieces(sums, m, k, rank, out, k + 3, 1)
    assert error(out[:, :k], 2 * true) < 1e-5


def run_fused(library, a, b, u, v, numbers=2, add_to=None, device=DEVICE):
    (t, n), m = a.shape, b.shape[1]
    y, w = add_to or (torch.full((x, s.shape[1]), torch.nan) for x, s in ((m, v), (n, u)))
    sizes = (t, n, m, v.shape[1], u.shape[1], numbers, *device)
    memory = scratch(library.value("molegrad_fused_scratch", *sizes))
    library.molegrad_sketch_fused(
        a, a.stride(0), b, b.stride(0), t, n, m, v.dtype, v, *v.stride(), v.shape[1],
        u.dtype, u, *u.stride(), u.shape[1], y, y.stride(0), w, w.stride(0),
        int(add_to is not None), numbers, *device, memory,
    )  # fmt: skip
    return y, w


@pytest.mark.parametrize("numbers", [1, 2])
@pytest.mark.parametrize(
    "shape, processors",
    [
        ((33, 24, 40, 7), 1),  # one block
        ((100, 48, 400, 16), 3),  # the last cluster has fewer tokens
        ((17, 8, 8, 32), 4),
        ((70, 1000, 904, 20), 4),  # clusters of four
        ((50, 200, 1600, 16), 5),  # of two
        ((40, 1200, 5000, 30), 17),  # of eight, two of them
        ((20, 600, 2000, 50), 8),
        ((1, 24, 16, 64), 1),
    ],
    ids=str,
)
def test_fused(emulated, order, shape, processors, numbers):
    t, n, m, k = shape
    a, b = tokens(t, n, m, BF16)
    u, v = orthonormal(m, min(m, k - 1), 1), randn(n, k, seed=2, dtype=F64)
    true, plain = truth(a, b, u, v), chain(a, b, u, v)
    device = (processors, SHARED)
    library = emulated
    if library.value("molegrad_fused_scratch", t, n, m, k, k, numbers, *device) == 0:
        assert build.ON_GPU, "these fit an H100"
        pytest.skip(f"does not fit {SHARED} bytes of shared memory")
    got = run_fused(library, a, b, u, v, numbers, device=device)
    for x, p, exact in zip(got, plain, true, strict=True):
        assert_as_good(x, p, exact, BF16)
        if numbers == 2:
            assert error(x, exact) < TWO_PIECES


def test_fused_strides_and_sums(emulated):
    library = emulated
    a, b = tokens(60, 40, 64, BF16)
    u, v = orthonormal(64, 9, 1), orthonormal(40, 12, 2)
    expected = run_fused(library, a, b, u, v)
    wide_a, wide_b = (torch.full((60, 200), torch.nan, dtype=BF16) for _ in range(2))
    wide_a[:, 8:48], wide_b[:, 16:80] = a, b
    start = randn(64, 12), randn(40, 9)
    got = run_fused(
        library, wide_a[:, 8:48], wide_b[:, 16:80], u.mT.contiguous().mT, v,
        add_to=tuple(x.clone() for x in start),
    )  # fmt: skip
    for x, before, y in zip(got, start, expected, strict=True):
        torch.testing.assert_close(x, before + y)
    # no room for the columns, and a rank beyond what registers hold
    for n, m, k in ((9000, 9000, 32), (64, 64, 65)):
        assert library.value("molegrad_fused_scratch", 100, n, m, k, k, 2, *DEVICE) == 0


@pytest.mark.parametrize("dtype", [F32, F64])
def test_norms_and_statuses(emulated, dtype):
    library = emulated
    memory = scratch(library.value("molegrad_norm_scratch"))
    for rows, k, r in ((300, 7, 3), (1, 1, 1), (2000, 40, 0)):
        g, overlap = randn(rows, k + r, dtype=dtype), randn(k, r, dtype=dtype)
        out = torch.zeros((), dtype=dtype)
        library.molegrad_norm(dtype, g, k + r, rows, k, r, overlap, out, memory)
        y, rest = g.double().split([k, r], dim=1)
        true = y.square().sum()
        if r > 0:
            true = true + (rest - y @ overlap.double()).square().sum() / r
        torch.testing.assert_close(out.double(), true, rtol=1e-6, atol=0)
    for one, other in ((0, 2), (3, 1), (1, 1)):
        status = torch.tensor([one, other], dtype=torch.int32)
        library.molegrad_worse(status, status[1:])
        assert status.tolist() == [max(one, other), other]
