"""Float8 operands of a sketch, csrc/cuda/sketch.cu: against the same products of what the operands
stand for, in float64. What is lost to float8 itself is measured in tests/test_float8.py.
"""

import pytest
import torch

from molegrad.ops.checks import FLOAT8
from molegrad.ops.float8 import quantize_rows_reference, quantize_tensor_reference
from molegrad.ops.sketch import sketch_reference
from tests.cuda.test_sketch import DEVICE, TWO_PIECES, scratch
from tests.samples import error, orthonormal, randn, tokens

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PAIRS = [(E4M3, E5M2), (E5M2, E4M3), (E4M3, E4M3), (E5M2, E5M2)]
PAIRS += [(E4M3, BF16), (BF16, E5M2), (F16, E4M3), (E5M2, F16)]
SHAPES = [  # T, n, m, k
    (1, 7, 5, 1),
    (5, 13, 11, 7),  # T < k
    (130, 64, 256, 16),  # whole tiles, two of them of tokens
    (97, 104, 53, 32),
    (300, 72, 264, 50),
    (140, 40, 136, 128),
    (33, 24, 40, 140),  # two passes
]


def narrowed(x, dtype, kind="rows"):
    """x in `dtype`, its scale if that is float8, and what the two stand for."""
    if dtype not in FLOAT8:
        return x.to(dtype), None, x.to(dtype).double()
    quantize = quantize_rows_reference if kind == "rows" else quantize_tensor_reference
    data, scale = quantize(x, dtype == E5M2)
    return data, scale, data.double() * (scale.unsqueeze(-1) if kind == "rows" else scale).double()


def run(library, a, a_scale, b, b_scale, u, v, add_to=None, chunk=None, device=DEVICE):
    (t, n), m = a.shape, b.shape[1]
    kv, ku = (0 if basis is None else basis.shape[1] for basis in (v, u))
    y, w = add_to or (torch.full(size, torch.nan) for size in ((m, kv), (n, ku)))
    chunk = chunk or max(128, (t + 127) // 128 * 128)
    sizes = (t, n, m, kv, ku, chunk, *device)
    memory = scratch(library.value("molegrad_sketch_scratch", *sizes))

    def basis(x):
        return (F32, None, 0, 0, 0) if x is None else (x.dtype, x, *x.stride(), x.shape[1])

    def operand(x, scale):
        stride = 0 if scale is None or scale.dim() == 0 else scale.stride(0)
        return x.dtype, x, x.stride(0), scale, stride

    library.molegrad_sketch_scaled(
        *operand(a, a_scale), *operand(b, b_scale), t, n, m, *basis(v), *basis(u),
        y, y.stride(0), w, w.stride(0), int(add_to is not None), chunk, *device, memory,
    )  # fmt: skip
    return (None if v is None else y), (None if u is None else w)


@pytest.fixture
def library(emulated):
    return emulated


@pytest.mark.parametrize("kinds", ["rows", "tensor"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(d)[6:] for d in pair))
def test_every_pair_and_scale(library, order, dtypes, kinds):
    for t, n, m, k in SHAPES:
        a, b = tokens(t, n, m)
        a, b = a * (2 * randn(t, 1, seed=7)).exp(), 1e-4 * b  # tokens of different sizes
        a, a_scale, wide_a = narrowed(a, dtypes[0], kinds)
        b, b_scale, wide_b = narrowed(b, dtypes[1], kinds)
        u, v = orthonormal(m, min(m, k), 1), randn(n, k, seed=2)
        true = sketch_reference(wide_a, wide_b, u.double(), v.double())
        for x, exact in zip(run(library, a, a_scale, b, b_scale, u, v), true, strict=True):
            assert x.isfinite().all() and error(x, exact) < TWO_PIECES


@pytest.mark.parametrize("kinds", [("rows", "tensor"), ("tensor", "rows")])
def test_chunks_halves_and_sums(library, kinds):
    t, n, m = 300, 80, 48
    a, b = tokens(t, n, m)
    a, a_scale, wide_a = narrowed(a, E4M3, kinds[0])
    b, b_scale, wide_b = narrowed(b, E5M2, kinds[1])
    u, v = orthonormal(m, 20), orthonormal(n, 9)
    true = sketch_reference(wide_a, wide_b, u.double(), v.double())
    start = randn(m, 9), randn(n, 20)
    for chunk in (128, 256, 384):
        got = run(library, a, a_scale, b, b_scale, u, v, chunk=chunk)
        for x, exact in zip(got, true, strict=True):
            assert error(x, exact) < TWO_PIECES
        sums = tuple(x.clone() for x in start)
        got = run(library, a, a_scale, b, b_scale, u, v, sums, chunk)
        for x, before, exact in zip(got, start, true, strict=True):
            assert error(x - before, exact) < TWO_PIECES
    only_y, _ = run(library, a, a_scale, b, b_scale, None, v)
    _, only_w = run(library, a, a_scale, b, b_scale, u, None)
    assert error(only_y, true[0]) < TWO_PIECES and error(only_w, true[1]) < TWO_PIECES


@pytest.mark.parametrize("processors", [1, 7, 132])
def test_any_gpu(library, processors):
    a, b = tokens(200, 200, 300)
    a, a_scale, wide_a = narrowed(a, E4M3)
    b, b_scale, wide_b = narrowed(b, E5M2)
    u, v = orthonormal(300, 16), orthonormal(200, 16)
    true = sketch_reference(wide_a, wide_b, u.double(), v.double())
    got = run(library, a, a_scale, b, b_scale, u, v, device=(processors, 100 << 10))
    for x, exact in zip(got, true, strict=True):
        assert error(x, exact) < TWO_PIECES


@pytest.mark.parametrize("dtypes", PAIRS[:1] + PAIRS[4:6])
def test_strides_and_alignment_change_nothing(library, dtypes):
    t, n, m = 70, 48, 80
    a, b = tokens(t, n, m)
    a, a_scale, _ = narrowed(a, dtypes[0])
    b, b_scale, _ = narrowed(b, dtypes[1])
    u, v = orthonormal(m, 6), orthonormal(n, 5)
    expected = run(library, a, a_scale, b, b_scale, u, v)
    for left, gap in ((0, 16), (16, 48), (1, 5), (3, 8)):
        views = []
        for x in (a, b):
            wide = torch.full((t, left + x.shape[1] + gap), torch.nan).to(x.dtype)
            wide[:, left : left + x.shape[1]] = x
            views.append(wide[:, left : left + x.shape[1]])
        got = run(library, views[0], a_scale, views[1], b_scale, u.mT.contiguous().mT, v.to(F64))
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("other", [E4M3, BF16, F16])
def test_every_number_of_float8_is_read_as_it_is(library, dtype, other):
    """A basis of unit vectors picks out columns: Y = Bᵀ A V shows the codes of A, W those of B."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()]
    n = codes.numel()
    a = codes.view(1, n)
    b = torch.ones(1, 8).to(other)
    one = torch.tensor(1.0)
    scales = (one, None if other in (BF16, F16) else one)
    for first in range(0, n, 64):
        v = torch.eye(n)[:, first : first + 64]
        y, w = run(library, a, scales[0], b, scales[1], torch.eye(8), v)
        assert torch.equal(y[3], codes[first : first + 64].float())
    assert torch.equal(w[:, 5], codes.float())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_not_finite_shows_and_stays_where_it_belongs(library, dtype):
    a, b = tokens(150, 40, 16)
    a[140, 7] = torch.nan
    a, a_scale, _ = narrowed(a, dtype)
    b, b_scale, _ = narrowed(b, E5M2)
    y, w = run(library, a, a_scale, b, b_scale, orthonormal(16, 3), orthonormal(40, 5))
    assert not y.isfinite().any()
    assert not w[7].isfinite().any() and w[torch.arange(40) != 7].isfinite().all()


def test_no_tokens_and_repeated_results(library):
    for t in (0, 500):
        a, b = tokens(t, 40, 56)
        a, a_scale, _ = narrowed(a, E4M3)
        b, b_scale, _ = narrowed(b, E5M2)
        u, v = orthonormal(56, 16), orthonormal(40, 16)
        first = run(library, a, a_scale, b, b_scale, u, v, chunk=256)
        again = run(library, a, a_scale, b, b_scale, u, v, chunk=256)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        assert t > 0 or not (first[0].any() or first[1].any())
