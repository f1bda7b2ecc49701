"""Sampled products: unbiased, as noisy as they say, exact where enough is zero; and the native op
against the reference in float64, which takes the same sample.

A pair of token and block is taken where a hash lies below a probability, so that the two differ
in a pair whose hash meets the probability to the last bits; none of these inputs has one.
"""

import pytest
import torch

from molegrad import ops
from molegrad.ops.sampled import sampled_grad_reference
from tests.ops.samples import (
    BF16,
    DTYPES,
    E4M3,
    E5M2,
    F32,
    F64,
    assert_refused,
    counter,
    eps,
    needs_native,
    without_reference,
)  # fmt: skip
from tests.samples import error, layouts, pairwise, randn, tokens

STEP = counter(5)
BLOCKS = [1, 2, 3, 4, 7, 8, 16, 64, 1000]
SHAPES = [  # T, n, m, fraction
    (0, 7, 5, 0.5), (1, 7, 5, 0.5), (5, 13, 11, 0.3),
    (64, 48, 96, 0.25),  # whole tiles
    (97, 101, 53, 0.25), (130, 30, 30, 0.5), (777, 70, 133, 0.01),
    (1300, 140, 33, 0.9),  # several chunks
    (8195, 24, 18, 0.25),  # more tokens than a reference takes at once
    (160, 130, 150, 1.0), (600, 150, 130, 3.0),
]  # fmt: skip


def sparse_tokens(t, n, m, dtype=F32):
    """A and B of which the wider is, like relu², zero for the most part."""
    a, b = tokens(t, n, m, F64)
    if n > m:
        a = (a - 1.5).relu().square()
    else:
        b = b * (a[:, :1] * b > 0) * (randn(t, m, seed=9) > 0.5)
    return a.to(dtype), b.to(dtype)


def truth(grad, a, b, a_scale, fraction, block, alpha=1.0, seed=0):
    """grad + alpha Ĝ in float64, and stats."""
    out = grad.double().clone()
    scale = None if a_scale is None else a_scale.double()
    stats = sampled_grad_reference(
        out, a.double(), b.double(), scale, STEP, fraction, block, alpha, seed
    )
    return out, stats


def check(grad, a, b, a_scale, fraction, block, alpha=1.0, seed=0, op=ops.sampled_grad_):
    """Runs the op on a copy of `grad` and compares all that it gives."""
    got = grad.clone()
    stats = op(got, a, b, a_scale, STEP, fraction, block, alpha, seed)
    expected, true_stats = truth(grad, a, b, a_scale, fraction, block, alpha, seed)
    change = (expected - grad.double()).norm().item()
    # The sum's own rounding, and half an ulp of the gradient's dtype.
    bound = 20 * eps(b.dtype) * (change + 1) + torch.finfo(grad.dtype).eps / 2 * expected.norm()
    assert (got.double() - expected).norm() <= bound
    torch.testing.assert_close(stats, true_stats, rtol=1e-4, atol=1e-6)
    return got


@pytest.mark.parametrize(
    "shape, dtype, block, make",
    pairwise(SHAPES, DTYPES, BLOCKS, [tokens, sparse_tokens]),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_it_takes_the_sample_of_the_reference(make, shape, dtype, block):
    t, n, m, fraction = shape
    a, b = make(t, n, m, dtype=dtype)
    check(randn(m, n, dtype=dtype), a, b, None, fraction, block, -0.5, block)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_in_every_dtype_is_that_in_float64(dtype):
    for n, m in ((20, 30), (30, 20)):
        a, b = sparse_tokens(90, n, m, dtype)
        check(randn(m, n, dtype=dtype), a, b, None, 0.3, 4, 0.5, op=sampled_grad_reference)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
def test_every_kind_of_tile(block):
    """Columns that are dense, sparse by single values, by pairs, by fours and empty."""
    t, n, m = 520, 20, 150
    a, b = tokens(t, n, m)
    kinds = torch.arange(m) // 32
    for kind, width in enumerate((1, 2, 4, 8)):
        columns = (kinds == kind).nonzero().flatten()
        keep = randn(t, len(columns) // width + 1, seed=kind) > 0.8
        b[:, columns] *= keep.repeat_interleave(width, 1)[:, : len(columns)]
    b[:, 3:5] = 0
    b[64:128] = 0
    for fraction in (0.05, 0.3, 1.0):
        check(torch.zeros(m, n), a, b, None, fraction, block)
        check(torch.zeros(n, m), b, a, None, fraction, block)


@needs_native
def test_native_code_runs(monkeypatch):
    without_reference(monkeypatch, "sampled", "_scores")
    a, b = tokens(30, 6, 5)
    ops.sampled_grad_(torch.zeros(5, 6), a, b, None, STEP, 0.5)


@pytest.mark.parametrize("n, m", [(40, 24), (24, 40)])
def test_layouts(n, m):
    a, b = sparse_tokens(90, n, m)
    wide = torch.zeros(90, 2 * n + 3)
    wide[:, 2 : n + 2] = a
    gaps = torch.zeros(90, 2 * n)
    gaps[:, ::2] = a
    operands = [
        (wide[:, 2 : n + 2], b.mT.contiguous().mT),
        (gaps[:, ::2], b),
        (a.view(3, 2, 15, n), b.view(3, 2, 15, m)),
        (a[::2], b[::2]),
        (a.view(6, 15, n).transpose(0, 1), b.view(6, 15, m).transpose(0, 1)),
        (a[:1].expand(90, n), b),
    ]
    grads, nothing_outside = layouts(m, n)
    for x, y in operands:
        for grad in grads:
            grad.copy_(randn(m, n))
            expected = truth(grad, x, y, None, 0.3, 4)[0]
            ops.sampled_grad_(grad, x, y, None, STEP, 0.3, 4)
            assert error(grad, expected) < 1e-6
    assert nothing_outside()


@pytest.mark.parametrize(
    "n, dtype, fraction", pairwise([50, 24, 31], [F32, BF16, F64], [0.3, 1.0]), ids=str
)
def test_float8_activations(n, dtype, fraction):
    m = {50: 24, 24: 50, 31: 31}[n]
    a, b = tokens(140, n, m, dtype)
    a8 = a.float().to(E4M3)
    assert (a8.float().abs() < 2**-6).any()  # subnormal numbers too
    for scale in (torch.ones(140), torch.rand(140) + 0.5):
        check(randn(m, n), a8, b, scale, fraction, 8)
    check(randn(m, n), a8.view(7, 20, n), b.view(7, 20, m), torch.rand(7, 20), fraction, 8)


def test_every_float8_number():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    finite = codes[codes.float().isfinite()]
    a, b = finite[:, None], torch.eye(len(finite))
    grad = torch.zeros(len(finite), 1)
    ops.sampled_grad_(grad, a, b, torch.ones(len(finite)), STEP, 1.0)
    assert torch.equal(grad[:, 0], finite.float())
    for code in (0x7F, 0xFF):
        nan = torch.tensor([[code]], dtype=torch.uint8).view(E4M3)
        grad = torch.zeros(1, 1)
        ops.sampled_grad_(grad, nan, torch.ones(1, 1), torch.ones(1), STEP, 1.0)
        assert grad.isnan().all()


@pytest.mark.parametrize("dtype, grad_dtype", pairwise([F32, F64, BF16], DTYPES), ids=str)
def test_gradients_of_another_dtype_are_rounded_once(dtype, grad_dtype):
    a, b = tokens(1500, 20, 36, dtype)
    grad = randn(36, 20, dtype=grad_dtype)
    got = check(grad, a, b, None, 0.4, 8, alpha=0.01)
    expected = truth(grad, a, b, None, 0.4, 8, alpha=0.01)[0]
    bound = torch.finfo(grad_dtype).eps / 2 * expected.abs() + 1e-6 * expected.abs().max()
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("n, m, fraction", [(40, 24, 0.25), (24, 40, 0.25), (40, 24, 1.0)])
def test_zeros_give_exactly_nothing(n, m, fraction):
    a, b = tokens(70, n, m)
    grad = randn(m, n)
    for x, y in ((a * 0, b), (a, b * 0), (a * 0, b * 0)):
        got = grad.clone()
        stats = ops.sampled_grad_(got, x, y, None, STEP, fraction)
        assert torch.equal(got, grad) and stats.tolist() == [float(fraction >= 1), 0.0]
    rows = (torch.arange(70) % 3 == 0)[:, None]
    for x, y in ((a * rows, b), (a, b * rows), (a * (torch.arange(n) > 17), b)):
        check(grad, x, y, None, fraction, 4)
    first = torch.zeros(1100, 1)  # tokens that the threshold sees
    first[1] = 1
    a, b = tokens(1100, n, m)
    check(grad, a * first, b, None, fraction, 4)


@needs_native
@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (0, 0)])
def test_no_features(n, m):
    arguments = torch.zeros(m, n), torch.zeros(3, n), torch.zeros(3, m)
    assert ops.sampled_grad_(*arguments, None, STEP, 0.5)[1] == 0


@pytest.mark.parametrize("t", [0, 1, 3])
@pytest.mark.parametrize("zero", ["a", "b", "neither"])
def test_few_tokens_and_zeros_stay_finite(t, zero):
    a, b = tokens(t, 8, 12)
    (a if zero == "a" else b if zero == "b" else a[:0]).zero_()
    grad, stats = sampled(a, b, 0.01)
    assert grad.isfinite().all() and stats.isfinite().all()
    if zero != "neither" or t == 0:
        assert not grad.any()


@pytest.mark.parametrize(
    "bad, size, fraction",
    pairwise([torch.nan, torch.inf, -torch.inf], [(40, 24), (24, 40)], [0.25, 1.0]), ids=str,
)  # fmt: skip
def test_what_is_not_finite_shows(bad, size, fraction):
    n, m = size
    for token in (0, 1, 699):  # the threshold sees none but the first
        for side in (0, 1):
            inputs = sparse_tokens(1100, n, m)
            inputs[side][token, 7] = bad
            grad = torch.zeros(m, n)
            ops.sampled_grad_(grad, *inputs, None, STEP, fraction, 8)
            line = grad[:, 7] if side == 0 else grad[7]
            assert not line.isfinite().all()
            # also where the other operand has nothing but zeros
            inputs[1 - side][token] = 0
            grad.zero_()
            ops.sampled_grad_(grad, *inputs, None, STEP, fraction, 8)
            assert not grad.isfinite().all()


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_numbers_of_any_size(fraction):
    a, b = tokens(60, 20, 30)
    plain = torch.zeros(30, 20)
    ops.sampled_grad_(plain, a, b, None, STEP, fraction)
    for scale in (1e-12, 1e14) + ((1e25,) if fraction == 1 else ()):
        grad = torch.zeros(30, 20)
        ops.sampled_grad_(grad, a, b * scale, None, STEP, fraction)
        torch.testing.assert_close(grad / scale, plain, rtol=1e-4, atol=1e-3)


def test_alpha_zero_and_opposite_calls():
    a, b = tokens(64, 20, 30)
    grad = randn(30, 20)
    got = grad.clone()
    stats = ops.sampled_grad_(got, a, b, None, STEP, 0.25, 8, 0.0)
    assert torch.equal(got, grad) and stats[0] > 0
    for alpha in (1.0, -1.0):
        ops.sampled_grad_(got, a, b, None, STEP, 0.25, 8, alpha)
    assert (got - grad).abs().max() < 1e-4


@needs_native
@pytest.mark.parametrize("n, m, block", [(24, 900, 4), (900, 24, 7)])
def test_threads_do_not_change_a_bit(n, m, block):
    a, b = sparse_tokens(1200, n, m)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        grad = torch.zeros(m, n)
        results.append((grad, ops.sampled_grad_(grad, a, b, None, STEP, 0.25, block)))
    assert all(torch.equal(x, y) for r in results[1:] for x, y in zip(r, results[0], strict=True))


def test_more_features_than_are_summed_at_a_time():
    a, b = tokens(20, 140_000, 5)
    check(torch.zeros(5, 140_000), a, b, None, 0.25, 4)


def sampled(a, b, fraction, block=4, seed=0, step=0, scale=None):
    grad = torch.zeros(b.shape[-1], a.shape[-1], dtype=torch.promote_types(b.dtype, F32))
    stats = ops.sampled_grad_(grad, a, b, scale, counter(step), fraction, block, 1.0, seed)
    return grad, stats


@pytest.mark.parametrize(("n", "m", "block"), [(24, 40, 1), (40, 24, 5), (24, 24, 16)])
def test_unbiased_with_the_variance_it_reports(n, m, block):
    a, b = tokens(60, n, m, F64)
    (a if n > m else b).clamp_(min=0)
    g = b.mT @ a
    estimates = torch.stack([sampled(a, b, 0.3, block, step=i)[0] for i in range(600)])
    error = (estimates - g).square().sum((1, 2)).mean()
    stats = sampled(a, b, 0.3, block)[1]
    terms = (a.square().sum(1) * b.square().sum(1)).sum()
    assert 0.9 < error / (stats[1] * terms) < 1.1
    # The mean of N draws is off by the error of one over √N.
    assert (estimates.mean(0) - g).square().sum() < 1.5 * error / len(estimates)
    assert abs(stats[0].item() - 0.3) < 0.06


def test_samples_differ_by_seed_and_step_and_repeat():
    a, b = tokens(50, 12, 20)
    first = sampled(a, b, 0.2)[0]
    assert torch.equal(first, sampled(a, b, 0.2)[0])
    assert not torch.equal(first, sampled(a, b, 0.2, seed=1)[0])
    assert not torch.equal(first, sampled(a, b, 0.2, step=1)[0])


@pytest.mark.parametrize("wide_a", [False, True])
def test_exact_where_enough_is_zero(wide_a):
    """An eighth of X is not zero: a quarter of the pairs takes all of it, with weight 1."""
    x, z = randn(400, 64, dtype=F64), randn(400, 16, seed=1, dtype=F64)
    x = x * (torch.rand(400, 64, generator=torch.Generator().manual_seed(2)) < 0.125)
    a, b = (x, z) if wide_a else (z, x)
    grad, stats = sampled(a, b, 0.25, block=1)
    assert (grad - b.mT @ a).norm() < 0.02 * (b.mT @ a).norm()
    assert stats[1] < 0.01
    coarse = sampled(a, b, 0.25, block=16)[1]
    assert coarse[1] > 10 * stats[1]  # hardly a block of 16 is all zero


def test_smaller_blocks_and_larger_fractions_have_less_noise():
    a, b = tokens(300, 16, 64)
    b.relu_()
    noise = [[float(sampled(a, b, s, k)[1][1]) for s in (0.1, 0.3, 0.6)] for k in (1, 4, 16)]
    for row in noise:
        assert row == sorted(row, reverse=True)
    for column in zip(*noise, strict=True):
        assert list(column) == sorted(column)


def test_a_fraction_of_one_is_the_product():
    a, b = tokens(50, 8, 12)
    grad = torch.ones(12, 8)
    stats = ops.sampled_grad_(grad, a, b, None, counter(), 1.0, 4, -2.0)
    torch.testing.assert_close(grad, 1 - 2 * (b.mT @ a), rtol=1e-4, atol=1e-4)
    assert stats.tolist() == [1.0, 0.0]
    half = torch.ones(12, 8, dtype=BF16)
    ops.sampled_grad_(half, a, b, None, counter(), 1.0, 4, -2.0)
    assert torch.equal(half, grad.to(BF16))


A, B, F8 = randn(5, 4), randn(5, 3), randn(5, 4).to(E4M3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(4, 3)}, r"expected grad of shape \(3, 4\), got \(4, 3\)"),
        ({"grad": torch.zeros(3, 4).to(E4M3)}, "grad must be floating point of 16 bits or more"),
        ({"a": randn(6, 4)}, r"agree in every dimension but the last, got a \(6, 4\)"),
        ({"a": randn(6, 4).to(E4M3)}, "agree in every dimension but the last"),
        ({"a": randn(3)}, "at least two dimensions"),
        ({"a": A.to("meta")}, "on the same device"),
        ({"a": A.to(E5M2), "a_scale": torch.ones(5)}, "a must be floating point of 16 bits"),
        ({"b": B.half()}, "same dtype, got torch.float32 and torch.float16"),
        ({"a_scale": torch.ones(5)}, "a_scale belongs to a float8 a, got a of torch.float32"),
        ({"a": F8}, "a of torch.float8_e4m3fn needs a_scale, what quantize_rows returned"),
        ({"a": F8, "a_scale": torch.ones(5, 1)},
         r"a_scale in torch.float32, one for each token of a \(5, 4\), got \(5, 1\)"),
        ({"a": F8, "a_scale": torch.ones(5, dtype=F64)}, r"got \(5\) of torch.float64"),
        ({"a": F8, "a_scale": torch.tensor(1.0)}, r"got \(\) of torch.float32"),
        ({"counter": torch.tensor(1.0)}, "counter as an int64 scalar"),
        ({"counter": torch.zeros(1, dtype=torch.int64)}, "counter as an int64 scalar"),
        ({"fraction": 0.0}, "fraction must be positive, got 0.0"),
        ({"fraction": -0.25}, "fraction must be positive, got -0.25"),
        ({"block": 0}, "block must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_says_what_was_wrong(change, message):
    given = {"grad": torch.zeros(3, 4), "a": A, "b": B, "a_scale": None, "counter": STEP,
             "fraction": 0.5, "block": 4} | change  # fmt: skip
    assert_refused("sampled_grad_", given.values(), message)
