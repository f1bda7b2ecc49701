"""The CUDA sampled_grad_ against the reference in float64, which takes the same sample.

A pair of token and block is taken where a hash lies below a probability, so that the two differ
in a pair whose hash meets the probability to the last bits; none of these inputs has one.
"""

import pytest
import torch

from molegrad.ops.checks import acc_dtype
from tests.cuda.build import Struct, call_op
from tests.cuda.pairs import pairwise
from tests.ops.test_sampled import STEP, sparse_tokens, truth
from tests.samples import error, layouts, randn, tokens

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
F8 = torch.float8_e4m3fn
MEMORY = 1 << 27


@pytest.fixture
def sampled(emulated):
    """sampled_grad_ by the kernels, on matrices."""
    library = emulated

    def run(grad, a, b, a_scale, counter, share, block=2, alpha=1.0, seed=0, memory=MEMORY, tile=0):
        wide_a = a.shape[1] > b.shape[1]
        if a_scale is not None:
            a_scale = a_scale.flatten().to(acc_dtype(b.dtype))

        def operand(x, scale):
            return x, x.dtype, x.stride(0) if len(x) > 1 else x.shape[1], x.shape[1], scale

        sides = [operand(a, a_scale), operand(b, None)]
        strides = grad.stride() if not wide_a else grad.stride()[::-1]
        arguments = Struct(
            len(a), b.dtype, *sides[not wide_a], *sides[wide_a], counter, seed, block,
            float(share), float(alpha), grad, grad.dtype, *strides, memory, tile,
        )  # fmt: skip
        scratch = torch.full(
            (library.value("molegrad_sampled_scratch", arguments) + 256,), 255, dtype=torch.uint8
        )
        stats = torch.zeros(2)
        library.molegrad_sampled_grad(arguments, stats, scratch[-scratch.data_ptr() % 256 :])
        return stats

    return run


def check(sampled, grad, a, b, a_scale, share, block, alpha=1.0, seed=0, **options):
    """Runs the kernels on a copy of `grad` and compares all that they give."""
    got = grad.clone()
    stats = sampled(got, a, b, a_scale, STEP, share, block, alpha, seed, **options)
    expected, true_stats = truth(grad, a, b, a_scale, share, block, alpha, seed)
    change = (expected - grad.double()).norm().item()
    # What is weighted is rounded to the dtype of the product, as is a float8 operand with a scale;
    # then the sum's own rounding, and half an ulp of the gradient's dtype.
    accumulated = torch.finfo(acc_dtype(b.dtype)).eps
    bound = 20 * accumulated * (change + 1) + torch.finfo(b.dtype).eps * change
    bound += torch.finfo(grad.dtype).eps / 2 * expected.norm().item()
    assert (got.double() - expected).norm().item() <= bound
    torch.testing.assert_close(stats, true_stats, rtol=1e-4, atol=1e-6)
    return got


SHAPES = [  # T, n, m, share
    (0, 7, 5, 0.5),
    (1, 7, 5, 0.5),
    (5, 13, 11, 0.3),
    (33, 30, 30, 0.5),
    (64, 48, 96, 0.25),  # whole tiles
    (97, 133, 53, 0.25),
    (70, 40, 264, 0.1),
    (160, 40, 72, 1.0),
    (60, 130, 30, 3.0),
]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_takes_the_sample_of_the_reference(sampled, shape, dtype):
    t, n, m, share = shape
    for make, block in ((tokens, 64), (sparse_tokens, 8), (tokens, 1), (sparse_tokens, 3)):
        a, b = make(t, n, m, dtype=dtype)
        check(sampled, randn(m, n, dtype=dtype), a, b, None, share, block, -0.5, block)


@pytest.mark.parametrize("n, m", [(40, 264), (264, 40), (130, 136)])
@pytest.mark.parametrize("block", [2, 4, 16, 32, 64, 96, 128, 1000])
def test_blocks_of_any_size(sampled, n, m, block):
    a, b = sparse_tokens(70, n, m, BF16)
    check(sampled, torch.zeros(m, n), a, b, None, 0.3, block)
    a, b = a.float(), b.float()
    check(sampled, torch.zeros(m, n), a, b, None, 0.3, block)


@pytest.mark.parametrize(
    "dtype, tile, block, share", pairwise([BF16, F16], [128, 256], [64, 128], [0.4, 1.0])
)
def test_every_tile(sampled, dtype, tile, block, share):
    for t, n, m in ((100, 264, 392), (33, 136, 128), (270, 8, 64)):
        a, b = tokens(t, n, m, dtype)
        check(sampled, randn(m, n), a, b, None, share, block, 0.5, tile=tile)
        check(sampled, randn(n, m), b, a, None, share, block, 0.5, tile=tile)


def test_many_blocks_have_wide_tiles(sampled):
    a, b = tokens(40, 8, 64 * 132, BF16)
    check(sampled, torch.zeros(64 * 132, 8), a, b, None, 0.3, 64)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("share", [0.02, 1.0])
def test_more_tokens_than_are_listed_at_a_time(sampled, dtype, share):
    a, b = tokens(8230, 8, 24, dtype)
    b[100:4200] = 0  # a list that is nearly empty
    check(sampled, torch.zeros(24, 8), a, b, None, share, 8)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("t, m", [(512, 120), (512, 136), (1023, 72), (1300, 140)])
def test_more_scores_than_one_block_holds(sampled, dtype, t, m):
    a, b = tokens(t, 5, m, dtype)
    check(sampled, torch.zeros(m, 5, dtype=dtype), a, b, None, 0.1, 1)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("block", [64, 128])
def test_features_in_parts(sampled, dtype, share, block):
    a, b = tokens(40, 24, 1000, dtype)
    whole = check(sampled, torch.zeros(1000, 24), a, b, None, share, block)
    parts = check(sampled, torch.zeros(1000, 24), a, b, None, share, block, memory=1)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    "dtype, shape, share", pairwise([F32, BF16], [(40, 24), (24, 40), (64, 128)], [0.3, 1.0])
)
def test_layouts(sampled, shape, share, dtype):
    n, m = shape
    a, b = sparse_tokens(90, n, m, dtype)
    wide = torch.zeros(90, 2 * n + 3, dtype=dtype)
    wide[:, 3 : n + 3] = a
    aligned = torch.zeros(90, 3 * n, dtype=dtype)
    aligned[:, n : 2 * n] = a
    operands = [
        (wide[:, 3 : n + 3], b),
        (aligned[:, n : 2 * n], b),
        (a[::2], b[::2]),
        (a[:1].expand(90, n), b),
        (a, b[:1].expand(90, m)),
    ]
    grads, nothing_outside = layouts(m, n)
    for x, y in operands:
        for grad in grads:
            grad.copy_(randn(m, n))
            expected = truth(grad, x, y, None, share, 4)[0]
            sampled(grad, x, y, None, STEP, share, 4)
            assert error(grad, expected) < (1e-6 if dtype == F32 else 2e-3)
    assert nothing_outside()


@pytest.mark.parametrize(
    "shape, dtype, share",
    pairwise([(50, 24), (24, 50), (31, 31), (72, 128)], [F32, BF16, F16, F64], [0.3, 1.0]),
)
def test_float8_activations(sampled, shape, share, dtype):
    n, m = shape
    a, b = tokens(140, n, m, dtype)
    a8 = a.float().to(F8)
    for scale in (None, torch.rand(140) + 0.5):
        for block in (8, 64):
            check(sampled, randn(m, n), a8, b, scale, share, block)
    check(sampled, randn(m, n), a, b, torch.rand(140), share, 8)


def test_every_float8_number(sampled):
    codes = torch.arange(256, dtype=torch.uint8).view(F8)
    finite = codes[codes.float().isfinite()]
    for dtype in (F32, BF16, F16):
        a, b = finite[:, None], torch.eye(len(finite), dtype=dtype)
        grad = torch.zeros(len(finite), 1)
        sampled(grad, a, b, None, STEP, 1.0)
        assert torch.equal(grad[:, 0], finite.float())
        for code in (0x7F, 0xFF):
            nan = torch.tensor([[code]], dtype=torch.uint8).view(F8)
            grad = torch.zeros(1, 1)
            sampled(grad, nan, torch.ones(1, 1, dtype=dtype), None, STEP, 1.0)
            assert grad.isnan().all()


@pytest.mark.parametrize("grad_dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_gradients_of_another_dtype(sampled, dtype, grad_dtype):
    a, b = tokens(150, 20, 36, dtype)
    for grad in (randn(36, 20, dtype=grad_dtype), randn(20, 36, dtype=grad_dtype).mT):
        check(sampled, grad, a, b, None, 0.4, 8, alpha=0.01)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("n, m", [(40, 24), (24, 40)])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_zeros_give_exactly_nothing(sampled, n, m, share, dtype):
    a, b = tokens(70, n, m, dtype)
    grad = randn(m, n)
    for x, y in ((a * 0, b), (a, b * 0), (a * 0, b * 0)):
        got = grad.clone()
        stats = sampled(got, x, y, None, STEP, share)
        assert torch.equal(got, grad) and stats.tolist() == [float(share >= 1), 0.0]
    rows = (torch.arange(70) % 3 == 0)[:, None]
    for x, y in ((a * rows, b), (a, b * rows), (a * (torch.arange(n) > 17), b)):
        check(sampled, grad, x, y, None, share, 4)


@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (0, 0)])
def test_no_features(sampled, n, m):
    for share in (0.5, 1.0):
        stats = sampled(torch.zeros(m, n), torch.zeros(3, n), torch.zeros(3, m), None, STEP, share)
        assert stats.tolist() == [float(share >= 1), 0.0]


@pytest.mark.parametrize(
    "dtype, bad, shape, share",
    pairwise([F32, BF16], [torch.nan, -torch.inf], [(40, 24), (24, 40)], [0.25, 1.0]),
)
def test_what_is_not_finite_shows(sampled, shape, share, bad, dtype):
    n, m = shape
    for token in (0, 1, 1099):  # the threshold sees none but the first
        for side in (0, 1):
            inputs = sparse_tokens(1100, n, m, dtype)
            inputs[side][token, 7] = bad
            grad = torch.zeros(m, n)
            sampled(grad, *inputs, None, STEP, share, 8)
            line = grad[:, 7] if side == 0 else grad[7]
            assert not line.isfinite().all()
            # also where the other operand has nothing but zeros
            inputs[1 - side][token] = 0
            grad.zero_()
            sampled(grad, *inputs, None, STEP, share, 8)
            assert not grad.isfinite().all()


def test_a_weight_does_not_overflow_float16(sampled):
    a, b = tokens(200, 8, 64, F16)
    b = b * 1000
    a[::2] *= 1e-4  # rarely taken, with weights of thousands
    grad = torch.zeros(64, 8)
    for seed in range(4):
        sampled(grad, a, b, None, STEP, 0.05, 2, 1.0, seed)
    assert grad.isfinite().all()


def test_results_repeat_bit_for_bit_in_every_order(sampled, monkeypatch):
    a, b = sparse_tokens(150, 24, 200, BF16)
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("MOLEGRAD_EMULATION_ORDER", order)
        grad = torch.zeros(200, 24)
        results.append((grad, sampled(grad, a, b, None, STEP, 0.25, 64)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("n, m", [(40, 24), (24, 40)])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_op(emulated_ops, n, m, share, dtype):
    a, b = sparse_tokens(90, n, m, dtype)
    wide = torch.zeros(90, 2 * n, dtype=dtype)
    wide[:, :n] = a
    operands = [
        (a, b, None),
        (wide[:, :n], b.mT.contiguous().mT, None),
        (a.view(3, 2, 15, n), b.view(3, 2, 15, m), None),
        (a.float().to(F8), b, torch.rand(90)),
        (a.view(3, 2, 15, n).float().to(F8), b.view(3, 2, 15, m), torch.rand(3, 2, 15)),
        (a.view(6, 15, n).transpose(0, 1), b.view(6, 15, m).transpose(0, 1), None),
        (a[:1], b[:1], None),
    ]
    for x, y, scale in operands:
        grads = [randn(m, n), randn(n, m).mT, randn(m, 2 * n)[:, ::2]]
        if share == 1:  # the library's own products, by torch and by cuBLASLt
            grads += [grad.to(dtype) for grad in grads if dtype != F32]
        for grad in grads:
            got = grad.clone(memory_format=torch.preserve_format)
            arguments = x, y, scale, STEP, share, 4, 0.5, 3
            stats = call_op("sampled_grad_", got, *arguments)
            expected, true_stats = truth(grad, x, y, scale, share, 4, 0.5, 3)
            assert error(got, expected) < (1e-6 if dtype == F32 else 4e-3)
            torch.testing.assert_close(stats, true_stats, rtol=1e-4, atol=1e-6)
