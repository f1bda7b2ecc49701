"""The block power method: modes, norms, float8 operands and what they cost in accuracy."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.power import lowrank_grad_reference
from tests.ops.samples import (
    BF16,
    DTYPES,
    E4M3,
    E5M2,
    F32,
    F64,
    assert_refused,
    counter,
    distance_from_orthonormal,
    narrowed,
)  # fmt: skip
from tests.ops.test_sketch import FLOAT8_PAIRS, SHAPES
from tests.samples import error, orthonormal, pairwise, randn, tokens


def assert_modes(u, w, g, v, power_iters, tolerance):
    """U is not unique where G is rank-deficient, so the truth is built on the returned U."""
    u64, v64 = u.double(), v.double()
    truth = u64 @ (u64.mT @ g) if power_iters else g @ v64 @ v64.mT
    assert error(u64 @ w.double().mT, truth) < tolerance


@pytest.mark.parametrize(
    "shape, dtype, power_iters, probes",
    pairwise([*SHAPES, (77, 5, 5, 5)], DTYPES, [0, 1, 3], [0, 3]), ids=str,
)  # fmt: skip
def test_modes_against_float64(shape, dtype, power_iters, probes):
    t, n, m, k = shape
    k = min(k, n, m)
    a, b = tokens(t, n, m, dtype)
    v, omega = orthonormal(n, k), randn(n, probes).sign() if probes else None
    u, w, norm_sq, status = ops.lowrank_grad(a, b, v, power_iters, omega)
    assert distance_from_orthonormal(u) < 1e-6 * m * k
    # v itself is orthonormal to float32 only
    tolerance = 2e-6 if dtype == F64 and t else 2e-5
    assert_modes(u, w, b.double().mT @ a.double(), v, power_iters, tolerance)
    wide = None if omega is None else omega.double()
    expected = lowrank_grad_reference(a.double(), b.double(), v.double(), power_iters, wide)[2]
    assert norm_sq.item() == pytest.approx(expected.item(), rel=1e-4)
    assert status.dtype == torch.int32 and status.item() in ((2,) if t < k else (0, 1, 2))


def test_power_iterations_capture_more_and_the_full_rank_everything():
    a, b = tokens(200, 40, 30, F64, rank=20)
    g = b.mT @ a
    v = orthonormal(40, 6, dtype=F64)
    captured = [ops.lowrank_grad(a, b, v, p)[1].norm().item() for p in (0, 1, 2, 60)]
    assert captured == sorted(captured) and captured[0] < 0.9 * captured[-1]
    best = torch.linalg.svdvals(g)[:6].norm().item()
    assert captured[-1] == pytest.approx(best, rel=1e-3)
    u, w, *_ = ops.lowrank_grad(a, b, orthonormal(40, 30, dtype=F64))
    torch.testing.assert_close(u @ w.mT, g)


def test_norm_estimate_is_unbiased_and_exact_for_a_captured_gradient():
    a, b = tokens(300, 32, 24, F64, rank=10)
    true = (b.mT @ a).square().sum().item()
    v = orthonormal(32, 4, dtype=F64)
    estimates = torch.stack(
        [ops.lowrank_grad(a, b, v, 1, ops.rademacher(32, 4, counter(), s))[2] for s in range(400)]
    )
    standard_error = (estimates.std() / 20).item()
    assert abs(estimates.mean().item() - true) < 4 * standard_error
    assert standard_error < 0.05 * true
    low = torch.zeros_like(a)
    low[:, :8] = a[:, :8]  # a gradient whose row space the basis below holds
    basis, omega = torch.eye(32, 8, dtype=F64), ops.rademacher(32, 2, counter(), 1)
    exact = ops.lowrank_grad(low, b, basis, 1, omega)[2]
    assert exact.item() == pytest.approx((b.mT @ low).square().sum().item(), rel=1e-10)


def test_layouts():
    a, b = tokens(60, 24, 18)
    v = orthonormal(24, 4)
    u, w, *_ = ops.lowrank_grad(a, b, v)
    wide_a, wide_b = torch.zeros(60, 48), torch.zeros(18, 60)
    wide_a[:, ::2], wide_b[:] = a, b.mT
    for x, y, basis in (
        (a.view(3, 4, 5, 24), b.view(3, 4, 5, 18), v),
        (wide_a[:, ::2], wide_b.mT, v.mT.contiguous().mT),
        (a.view(12, 5, 24).transpose(0, 1).contiguous().transpose(0, 1), b.view(12, 5, 18), v),
    ):
        u_, w_, *_ = ops.lowrank_grad(x, y, basis)
        torch.testing.assert_close(u_ @ w_.mT, u @ w.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_enters_no_basis(bad):
    a, b = tokens(30, 8, 6)
    a[3, 2] = bad
    u, w, _, status = ops.lowrank_grad(a, b, orthonormal(8, 3))
    assert u.isfinite().all() and not w.isfinite().all() and status.item() == 3


@pytest.mark.parametrize(
    "dtypes, by_row, power_iters", pairwise(FLOAT8_PAIRS, [True, False], [0, 2]), ids=str
)
def test_float8_operands_are_what_they_stand_for(dtypes, by_row, power_iters):
    a, b = tokens(97, 101, 53)
    a, a_scale, wide_a = narrowed(a * (2 * randn(97, 1, seed=7)).exp(), dtypes[0], by_row)
    b, b_scale, wide_b = narrowed(1e-5 * b, dtypes[1], by_row)
    v = orthonormal(101, 32, seed=2)
    u, w, norm_sq, _ = ops.lowrank_grad(a, b, v, power_iters, None, 1e3, a_scale, b_scale)
    assert_modes(u, w, wide_b.mT @ wide_a, v, power_iters, 2e-5)
    assert norm_sq.item() == pytest.approx(w.square().sum().item(), rel=1e-4)


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


@pytest.mark.parametrize("seed, k, largest, by_row",
                         [(0, 8, 4.0, True), (10, 16, 4.5, False), (0, 32, 6.0, False),
                          (10, 32, 6.0, True)])  # fmt: skip
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
    assert 1 - (estimate * true).sum() / (estimate.norm() * true.norm()) < 4e-4
    bias = ((estimate - true) * true.sign()).mean() / true.abs().mean()
    assert bias.abs() < 0.01
    assert norm8.item() == pytest.approx(norm_sq.item(), rel=0.03)
    for x, y in ((u8, u), (w8, w)):
        assert angles(x, y).max() < largest and angles(x, y).median() < 2.0


A, B, V = randn(9, 6), randn(9, 5), orthonormal(6, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((A, B[:-1], V), "expected a and b to agree in every dimension but the last"),
        ((A, B.double(), V), "same dtype"),
        ((A, B.to(BF16), V), "got torch.float32 and torch.bfloat16"),
        ((A.int(), B.int(), V), "a must be floating point"),
        ((A, B, V[:-1]), "expected v with 6 rows"),
        ((A, B, randn(6, 6)), "rank k=6 of v exceeds 5: choose a smaller rank"),
        ((A, B, V[:, :0]), "rank k=0"),
        ((A, B, V, -1), "power_iters must be >= 0, got -1"),
        ((A, B, V, 1, randn(5, 1)), "expected probes with 6 rows"),
        ((A[0], B[0], V), "at least two dimensions"),
        ((A, B, V, 1, None, 0.5), "cond_max must be at least 1, got 0.5"),
        ((A.to("meta"), B.to("meta"), V), "a and v on the same device, got meta and cpu"),
    ],
)
def test_bad_input_says_what_was_wrong(args, message):
    assert_refused("lowrank_grad", args, message)


def test_dtypes_of_results():
    a, b = tokens(20, 8, 6, BF16)
    u, w, norm_sq, _ = ops.lowrank_grad(a, b, orthonormal(8, 3))
    assert u.dtype == w.dtype == norm_sq.dtype == F32
    assert ops.lowrank_grad(a.double(), b.double(), orthonormal(8, 3))[0].dtype == F64
