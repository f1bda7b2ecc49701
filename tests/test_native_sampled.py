"""The native sampled_grad_ against the reference in float64, which takes the same sample.

A pair of token and block is taken where a hash lies below a probability, so that the two differ
in a pair whose hash meets the probability to the last bits; none of these inputs has one.
"""

import os
import subprocess
import sys

import pytest
import torch

from molegrad import _native, ops
from molegrad.ops.checks import acc_dtype
from molegrad.ops.registry import OPS
from molegrad.ops.sampled import sampled_grad_reference
from tests.samples import error, layouts, randn, tokens

MODULE, REASON = _native.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"native kernels: {REASON}")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
F8 = torch.float8_e4m3fn
STEP = torch.tensor(5)
SHAPES = [  # T, n, m, share
    (0, 7, 5, 0.5),
    (1, 7, 5, 0.5),
    (5, 13, 11, 0.3),
    (64, 48, 96, 0.25),  # whole tiles
    (97, 101, 53, 0.25),
    (130, 30, 30, 0.5),
    (777, 70, 133, 0.01),
    (1300, 140, 33, 0.9),  # several chunks
    (8195, 24, 18, 0.25),
    (160, 130, 150, 1.0),
    (600, 150, 130, 3.0),
]


def sparse_tokens(t, n, m, dtype=F32):
    """A and B of which the wider is, like relu², zero for the most part."""
    a, b = tokens(t, n, m, F64)
    if n > m:
        a = (a - 1.5).relu().square()
    else:
        b = b * (a[:, :1] * b > 0) * (randn(t, m, seed=9) > 0.5)
    return a.to(dtype), b.to(dtype)


def truth(grad, a, b, a_scale, share, block, alpha=1.0, seed=0):
    """grad + alpha Ĝ in float64, and stats."""
    out = grad.double().clone()
    scale = None if a_scale is None else a_scale.double()
    stats = sampled_grad_reference(
        out, a.double(), b.double(), scale, STEP, share, block, alpha, seed
    )
    return out, stats


def check(grad, a, b, a_scale, share, block, alpha=1.0, seed=0):
    """Runs the op on a copy of `grad` and compares all that it gives."""
    got = grad.clone()
    stats = ops.sampled_grad_(got, a, b, a_scale, STEP, share, block, alpha, seed)
    expected, true_stats = truth(grad, a, b, a_scale, share, block, alpha, seed)
    eps = torch.finfo(acc_dtype(b.dtype)).eps
    change = (expected - grad.double()).norm().item()
    # The sum's own rounding, and half an ulp of the gradient's dtype.
    bound = 20 * eps * (change + 1) + torch.finfo(grad.dtype).eps / 2 * expected.norm().item()
    assert (got.double() - expected).norm().item() <= bound
    torch.testing.assert_close(stats, true_stats, rtol=1e-4, atol=1e-6)
    return got


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [tokens, sparse_tokens])
def test_it_takes_the_sample_of_the_reference(make, shape, dtype):
    t, n, m, share = shape
    a, b = make(t, n, m, dtype=dtype)
    grad = randn(m, n, dtype=dtype)
    for block in (1, 2, 3, 4, 7, 8, 16, 64, 1000):
        check(grad, a, b, None, share, block, -0.5, block)


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
    for share in (0.05, 0.3, 1.0):
        check(torch.zeros(m, n), a, b, None, share, block)
        check(torch.zeros(n, m), b, a, None, share, block)


def test_native_code_runs(monkeypatch):
    def forbidden(*args):
        raise AssertionError("the reference ran instead of the native kernel")

    monkeypatch.setattr(sys.modules["molegrad.ops.sampled"], "_scores", forbidden)
    a, b = tokens(30, 6, 5)
    ops.sampled_grad_(torch.zeros(5, 6), a, b, None, STEP, 0.5)


@pytest.mark.parametrize("n, m", [(40, 24), (24, 40)])
def test_layouts(n, m):
    a, b = sparse_tokens(90, n, m)
    wide = torch.zeros(90, 2 * n + 3)
    wide[:, 2 : n + 2] = a
    operands = [
        (wide[:, 2 : n + 2], b.mT.contiguous().mT),
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


@pytest.mark.parametrize("n, m", [(50, 24), (24, 50), (31, 31)])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_float8_activations(n, m, share, dtype):
    a, b = tokens(140, n, m, dtype)
    a8 = a.float().to(F8)
    assert (a8.float().abs() < 2**-6).any()  # subnormal numbers too
    for scale in (torch.ones(140), torch.rand(140) + 0.5):
        check(randn(m, n), a8, b, scale, share, 8)
    check(randn(m, n), a8.view(7, 20, n), b.view(7, 20, m), torch.rand(7, 20), share, 8)


def test_every_float8_number():
    codes = torch.arange(256, dtype=torch.uint8).view(F8)
    finite = codes[codes.float().isfinite()]
    a, b = finite[:, None], torch.eye(len(finite))
    grad = torch.zeros(len(finite), 1)
    ops.sampled_grad_(grad, a, b, torch.ones(len(finite)), STEP, 1.0)
    assert torch.equal(grad[:, 0], finite.float())
    for code in (0x7F, 0xFF):
        nan = torch.tensor([[code]], dtype=torch.uint8).view(F8)
        grad = torch.zeros(1, 1)
        ops.sampled_grad_(grad, nan, torch.ones(1, 1), torch.ones(1), STEP, 1.0)
        assert grad.isnan().all()


@pytest.mark.parametrize("grad_dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_gradients_of_another_dtype_are_rounded_once(dtype, grad_dtype):
    a, b = tokens(1500, 20, 36, dtype)
    grad = randn(36, 20, dtype=grad_dtype)
    got = check(grad, a, b, None, 0.4, 8, alpha=0.01)
    expected = truth(grad, a, b, None, 0.4, 8, alpha=0.01)[0]
    ulp = torch.finfo(grad_dtype).eps
    assert (
        (got.double() - expected).abs() <= ulp / 2 * expected.abs() + 1e-6 * expected.abs().max()
    ).all()


@pytest.mark.parametrize("n, m", [(40, 24), (24, 40)])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_zeros_give_exactly_nothing(n, m, share):
    a, b = tokens(70, n, m)
    grad = randn(m, n)
    for x, y in ((a * 0, b), (a, b * 0), (a * 0, b * 0)):
        got = grad.clone()
        stats = ops.sampled_grad_(got, x, y, None, STEP, share)
        assert torch.equal(got, grad) and stats.tolist() == [float(share >= 1), 0.0]
    rows = (torch.arange(70) % 3 == 0)[:, None]
    for x, y in ((a * rows, b), (a, b * rows), (a * (torch.arange(n) > 17), b)):
        check(grad, x, y, None, share, 4)
    first = torch.zeros(1100, 1)  # tokens that the threshold sees
    first[1] = 1
    a, b = tokens(1100, n, m)
    check(grad, a * first, b, None, share, 4)


@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (0, 0)])
def test_no_features(n, m):
    arguments = torch.zeros(m, n), torch.zeros(3, n), torch.zeros(3, m)
    assert ops.sampled_grad_(*arguments, None, STEP, 0.5)[1] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n, m", [(40, 24), (24, 40)])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_what_is_not_finite_shows(n, m, share, bad):
    for token in (0, 1, 699):  # the threshold sees none but the first
        for side in (0, 1):
            inputs = sparse_tokens(1100, n, m)
            inputs[side][token, 7] = bad
            grad = torch.zeros(m, n)
            ops.sampled_grad_(grad, *inputs, None, STEP, share, 8)
            line = grad[:, 7] if side == 0 else grad[7]
            assert not line.isfinite().all()
            # also where the other operand has nothing but zeros
            inputs[1 - side][token] = 0
            grad.zero_()
            ops.sampled_grad_(grad, *inputs, None, STEP, share, 8)
            assert not grad.isfinite().all()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_numbers_of_any_size(share):
    a, b = tokens(60, 20, 30)
    plain = torch.zeros(30, 20)
    ops.sampled_grad_(plain, a, b, None, STEP, share)
    for scale in (1e-12, 1e14) + ((1e25,) if share == 1 else ()):
        grad = torch.zeros(30, 20)
        ops.sampled_grad_(grad, a, b * scale, None, STEP, share)
        torch.testing.assert_close(grad / scale, plain, rtol=1e-4, atol=1e-3)


def test_alpha_zero_and_repeated_calls():
    a, b = tokens(64, 20, 30)
    grad = randn(30, 20)
    got = grad.clone()
    stats = ops.sampled_grad_(got, a, b, None, STEP, 0.25, 8, 0.0)
    assert torch.equal(got, grad) and stats[0] > 0
    for alpha in (1.0, -1.0):
        ops.sampled_grad_(got, a, b, None, STEP, 0.25, 8, alpha)
    assert (got - grad).abs().max() < 1e-4


@pytest.mark.parametrize("n, m", [(24, 900), (900, 24)])
@pytest.mark.parametrize("block", [4, 7])
def test_threads_do_not_change_a_bit(n, m, block):
    a, b = sparse_tokens(1200, n, m)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            grad = torch.zeros(m, n)
            results.append((grad, ops.sampled_grad_(grad, a, b, None, STEP, 0.25, block)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for r in results[1:] for x, y in zip(r, results[0], strict=True))


def test_more_features_than_are_summed_at_a_time():
    a, b = tokens(20, 140_000, 5)
    check(torch.zeros(5, 140_000), a, b, None, 0.25, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"grad": torch.zeros(4, 3)},
        {"a": randn(6, 4)},
        {"b": randn(5, 3).half()},
        {"a_scale": torch.ones(4)},
        {"a_scale": torch.ones(5)},  # of what is not float8
        {"a": randn(5, 4).to(F8)},  # without a scale
        {"a": randn(5, 4).to(F8), "a_scale": torch.ones(5, dtype=F64)},
        {"a": randn(5, 4).to(F8), "a_scale": torch.ones(5, 1)},
        {"a": randn(5, 4).to(F8), "a_scale": torch.tensor(1.0)},
        {"a": randn(5, 4).to(torch.float8_e5m2), "a_scale": torch.ones(5)},
        {"counter": torch.tensor(1.0)},
        {"counter": torch.zeros(1, dtype=torch.int64)},
        {"fraction": 0.0},
        {"fraction": -0.25},
        {"block": 0},
        {"a": randn(3)},
        {"a": randn(6, 4).to(F8)},
        {"grad": torch.zeros(3, 4).to(F8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_bad_input_is_refused_in_the_words_of_the_reference(change):
    arguments = {
        "grad": torch.zeros(3, 4), "a": randn(5, 4), "b": randn(5, 3), "a_scale": None,
        "counter": STEP, "fraction": 0.5, "block": 4,
    } | change  # fmt: skip
    with pytest.raises(RuntimeError) as expected:
        OPS["sampled_grad_"].check(**arguments)
    with pytest.raises(RuntimeError) as caught:
        ops.sampled_grad_(**arguments)
    assert str(caught.value) == str(expected.value)


_PROBE = """
from molegrad import _native
from tests import test_native_sampled as t
for dtype in (t.F32, t.F64, t.BF16, t.F16):
    for shape in t.SHAPES[:8]:
        for make in (t.tokens, t.sparse_tokens):
            t.test_it_takes_the_sample_of_the_reference(make, shape, dtype)
for block in (1, 4, 16):
    t.test_every_kind_of_tile(block)
t.test_every_float8_number()
print("RESULT", _native.build_info()["cpu_capability"])
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_narrower_instruction_sets_compute_the_same(capability):
    env = os.environ | {"MOLEGRAD_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", _PROBE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("baseline", capability)
