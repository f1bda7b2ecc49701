"""The sketches of several layers in a few launches, csrc/cuda/grouped.cu, against float64.

Measure of rightness as in test_sketch.py: two 16-bit numbers for each of a basis, of P and of R.
"""

import pytest
import torch

from molegrad.ops.sketch import sketch_reference
from tests.cuda import build
from tests.cuda.test_sketch import BF16, F16, F64, TWO_PIECES, scratch
from tests.samples import error, orthonormal, randn, tokens

DEVICE = (4, 228 << 10)  # multiprocessors, shared memory of each
PLENTY = 1 << 30  # bytes of a chunk
MIXED = [  # T, n, m, kv, ku: one padded rank
    (1, 7, 5, 1, 16),
    (5, 13, 11, 7, 3),  # T < k
    (130, 64, 256, 16, 16),  # whole tiles
    (97, 104, 53, 9, 12),
    (257, 53, 301, 2, 16),
    (40, 320, 24, 16, 1),
]


def layer_of(shape, dtype, seed=0, basis=torch.float32):
    """A, B, U and V."""
    t, n, m, kv, ku = shape
    a, b = tokens(t, n, m, dtype, seed=seed)
    return a, b, randn(m, ku, seed=seed + 1, dtype=basis), randn(n, kv, seed=seed + 2, dtype=basis)


def run(library, layers, sums=None, chunk=PLENTY, device=DEVICE):
    """Y and W of every layer, added to `sums`."""
    sums = sums or [
        (torch.zeros(b.shape[1], v.shape[1]), torch.zeros(a.shape[1], u.shape[1]))
        for a, b, u, v in layers
    ]
    table = build.Struct(
        *(
            field
            for (a, b, u, v), (y, w) in zip(layers, sums, strict=True)
            for field in (
                a, a.stride(0), b, b.stride(0), a.shape[0], a.shape[1], b.shape[1],
                v, v.dtype, *v.stride(), v.shape[1], u, u.dtype, *u.stride(), u.shape[1], y, w,
            )
        )
    )  # fmt: skip
    rank = max(max(u.shape[1], v.shape[1]) for _, _, u, v in layers)
    sizes = (table, len(layers), rank, chunk, *device)
    memory = scratch(library.value("molegrad_sketch_many_scratch", *sizes))
    library.molegrad_sketch_many(layers[0][0].dtype, *sizes, memory)
    return sums


def assert_right(sums, layers, times=1):
    for (y, w), (a, b, u, v) in zip(sums, layers, strict=True):
        truth = sketch_reference(a.double(), b.double(), u.double(), v.double())
        for x, exact in zip((y, w), truth, strict=True):
            assert x.isfinite().all() and error(x, times * exact) < TWO_PIECES


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rank", [16, 32, 64, 128])
def test_mixed_shapes(emulated, order, rank, dtype):
    shapes = [(t, n, m, kv * rank // 16, ku * rank // 16) for t, n, m, kv, ku in MIXED]
    layers = [layer_of(shape, dtype, i) for i, shape in enumerate(shapes)]
    assert_right(run(emulated, layers), layers)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kilobytes", [1, 40, 150, 400])
def test_chunks_of_any_size(emulated, order, kilobytes, dtype):
    """From a tile of tokens at a time to several layers: cut in the middle of a layer or not."""
    shapes = [(300, 40, 56, 5, 4), (129, 24, 300, 8, 3), (1, 24, 16, 2, 3), (513, 72, 40, 6, 6)]
    layers = [layer_of(shape, dtype, i) for i, shape in enumerate(shapes)]
    assert_right(run(emulated, layers, chunk=kilobytes << 10), layers)


@pytest.mark.parametrize("processors", [1, 7, 132])
def test_any_gpu(emulated, processors):
    layers = [layer_of((260, 200, 300, 16, 16), BF16), layer_of((70, 64, 90, 3, 10), BF16, 1)]
    for shared in (100 << 10, 228 << 10):
        assert_right(run(emulated, layers, device=(processors, shared)), layers)


def test_more_layers_than_a_table_holds(emulated):
    layers = [layer_of((20 + i, 8 + i % 5, 9 + i % 7, 3, 4), BF16, i) for i in range(70)]
    library = emulated
    assert_right(run(library, layers), layers)
    assert_right(run(library, layers, chunk=5000), layers)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_sums_are_added_to_and_repeat_bit_for_bit(emulated, dtype):
    layers = [layer_of(shape, dtype, i) for i, shape in enumerate(MIXED[2:5])]
    library = emulated
    once = run(library, layers, chunk=60_000)
    again = run(library, layers, chunk=60_000)
    for first, second in zip(once, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert_right(run(library, layers, sums=once, chunk=60_000), layers, times=2)


def test_strides_alignment_and_bases_of_any_dtype(emulated):
    library = emulated
    layers = [layer_of((70, 40, 48, 6, 5), BF16), layer_of((33, 24, 16, 2, 3), BF16, 3)]
    expected = run(library, layers)
    for left, gap in ((0, 8), (8, 24), (1, 5), (3, 8)):
        moved = []
        for a, b, u, v in layers:
            wide = [
                torch.full((len(x), left + x.shape[1] + gap), torch.nan).to(BF16) for x in (a, b)
            ]
            views = [x[:, left : x.shape[1] - gap] for x in wide]
            views[0].copy_(a)
            views[1].copy_(b)
            moved.append((*views, u.mT.contiguous().mT, v.to(F64)))
        for got, exact in zip(run(library, moved), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(got, exact, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_layer(emulated, bad):
    layers = [layer_of((150, 24, 16, 5, 3), BF16, i) for i in range(3)]
    layers[1][0][140, 7] = bad
    sums = run(emulated, layers)
    assert not sums[1][0].isfinite().any() and not sums[1][1][7].isfinite().any()
    assert_right([sums[0], sums[2]], [layers[0], layers[2]])


def test_float16_of_very_different_sizes(emulated):
    """P and R have a power of two for each tile of tokens: not that of another layer."""
    layers = []
    for i, scale in enumerate((1e-6, 1.0, 1e-4)):
        a, b, u, v = layer_of((200, 40, 56, 8, 8), F64, i)
        b = scale * b
        b[:130] *= 0.01
        layers.append(((1e3 * a).clamp(-6e4, 6e4).half(), b.half(), 30 * u.float(), 30 * v.float()))
    assert_right(run(emulated, layers, chunk=60_000), layers)


def test_orthonormal_bases_of_a_training_step(emulated):
    shapes = [(256, 96, 384), (256, 384, 96), (256, 96, 96)] * 2
    layers = [
        (*tokens(t, n, m, BF16, seed=i), orthonormal(m, 32, i), orthonormal(n, 32, i + 1))
        for i, (t, n, m) in enumerate(shapes)
    ]
    assert_right(run(emulated, layers, chunk=300_000), layers)
