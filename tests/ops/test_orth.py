"""Orthonormal columns and polar factors: every conditioning, scale and kind of broken block."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.orth import orthonormalize_reference, polar_factor_reference
from tests.ops.samples import (
    BF16,
    F16,
    F32,
    F64,
    MODULE,
    assert_refused,
    distance_from_orthonormal,
    eps,
)  # fmt: skip
from tests.samples import error, orthonormal, pairwise, randn


def conditioned(m, k, log_cond, scale=1.0):
    """(m, k) of singular values from 1 down to 10 ** -log_cond, times `scale`, in float64."""
    singular = torch.diag(torch.logspace(0, -log_cond, k, dtype=F64))
    return orthonormal(m, k, 1, F64) @ singular @ orthonormal(k, k, 2, F64).mT * scale


@pytest.mark.parametrize("orthonormalize", [ops.orthonormalize, orthonormalize_reference])
@pytest.mark.parametrize(
    "size, log_cond, scale, dtype",
    pairwise([(1, 1), (7, 7), (83, 12), (101, 33), (257, 32)], [0, 2, 2.5, 4, 6, 9],
             [1.0, 1e-30, 1e30], [F32, F64]), ids=str,
)  # fmt: skip
def test_every_condition_and_scale(orthonormalize, size, log_cond, scale, dtype):
    m, k = size
    y = conditioned(m, k, log_cond, scale).to(dtype)
    q, r, status = orthonormalize(y)
    native = orthonormalize is ops.orthonormalize
    assert distance_from_orthonormal(q) < (4 if native else 16) * eps(dtype) * max(k, 4)
    assert error(q.double() @ (r.double() / scale), y.double() / scale) < 16 * eps(dtype) * k**0.5
    assert torch.equal(r, r.triu()) and (r.diagonal() >= 0).all()
    if log_cond != 2.5:  # where the limit of 1e3 lies
        assert (status.item() == 0) == (log_cond <= 2 or k == 1)
    assert status.item() == orthonormalize_reference(y)[2].item()


def test_the_condition_number_that_is_allowed():
    y = conditioned(60, 4, 2).float()
    assert ops.orthonormalize(y, 1.5e3)[2].item() == 0
    q, _, status = ops.orthonormalize(y, 10.0)
    assert status.item() == 1 and distance_from_orthonormal(q) < 2e-6


def test_badly_scaled_columns_are_safe():
    q, _, status = ops.orthonormalize(orthonormal(40, 6) * torch.logspace(-15, 15, 6))
    assert status.item() == 0
    torch.testing.assert_close(q, orthonormal(40, 6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("orthonormalize", [ops.orthonormalize, orthonormalize_reference])
@pytest.mark.parametrize("case", ["zero", "zero column", "repeated", "rank 1", "square singular"])
def test_deficient_blocks_are_completed(case, orthonormalize):
    y = randn(20, 5)
    if case == "zero":
        y = torch.zeros(20, 5)
    elif case == "zero column":
        y[:, 2] = 0
    elif case == "repeated":
        y[:, 4] = y[:, 1]
    elif case == "rank 1":
        y = randn(20, 1) @ randn(1, 5)
    else:
        y = torch.ones(5, 5)
    q, r, status = orthonormalize(y)
    assert status.item() == 2
    assert distance_from_orthonormal(q) < 1e-5
    assert (q @ r - y).norm() <= 1e-5 * max(y.norm().item(), 1.0)
    again = orthonormalize(y)
    assert all(torch.equal(x, z) for x, z in zip((q, r, status), again, strict=True))


@pytest.mark.parametrize("polar_factor", [ops.polar_factor, polar_factor_reference])
@pytest.mark.parametrize("orthonormalize", [ops.orthonormalize, orthonormalize_reference])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_and_stays_in_its_block(bad, orthonormalize, polar_factor):
    y = randn(3, 8, 3)
    y[1, 4, 2] = bad
    q, r, status = orthonormalize(y)
    assert status.tolist() == [0, 3, 0]
    assert torch.equal(q[1], torch.eye(8, 3)) and r[1].isnan().all()
    assert r[0].isfinite().all() and r[2].isfinite().all()
    p = polar_factor(y)
    assert p[1].isnan().all() and p[0].isfinite().all() and p[2].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_batches_and_layouts(dtype):
    y = randn(2, 3, 40, 9, dtype=dtype)
    for x in (y, y[:, 1], y.mT.contiguous().mT, y[..., 1:6], y[:, :0], y[..., ::2]):
        q, r, status = ops.orthonormalize(x)
        assert q.shape == x.shape and r.shape == (*x.shape[:-2], x.shape[-1], x.shape[-1])
        assert status.shape == x.shape[:-2] and status.dtype == torch.int32
        for got, plain in zip((q, r), orthonormalize_reference(x)[:2], strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-3)
        p = ops.polar_factor(x)
        torch.testing.assert_close(p, polar_factor_reference(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("polar_factor", [ops.polar_factor, polar_factor_reference])
@pytest.mark.parametrize(
    "size, rank, dtype",
    pairwise([(4, 1), (7, 7), (33, 33), (149, 7), (211, 32)], [0.3, 0.6, 1.0], [F32, F64]), ids=str,
)  # fmt: skip
def test_polar_factor(polar_factor, size, rank, dtype):
    """Condition 1e4 and 1e3: what is above the rounding of W counts in full, zeros stay zero."""
    n, k = size
    kept = max(1, int(rank * k))
    left, right = orthonormal(n, kept, 1, F64), orthonormal(k, kept, 2, F64)
    w = (left @ torch.diag(torch.logspace(0, -4, kept, dtype=F64)) @ right.mT).to(dtype)
    p = polar_factor(w)
    plain = MODULE is None or polar_factor is polar_factor_reference
    gram = plain and dtype == F64  # a Gram matrix has half the digits
    assert error(p, left @ right.mT) < (1e-6 if gram else 50 * eps(dtype) * 1e4)
    assert torch.linalg.matrix_norm(p.double(), 2).item() == pytest.approx(1, abs=1e-2)
    assert torch.equal(polar_factor(torch.zeros_like(w)), torch.zeros_like(w))


def test_polar_factor_of_tiny_and_of_16_bits():
    tiny = ops.polar_factor(1e-30 * randn(9, 3))
    torch.testing.assert_close(tiny.mT @ tiny, torch.eye(3), atol=1e-4, rtol=0)
    w = conditioned(129, 33, 1).to(BF16)
    left, _, right = torch.linalg.svd(w.double(), full_matrices=False)
    p = ops.polar_factor(w)
    assert p.dtype == F32 and error(p, left @ right) < 1e-4


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("orthonormalize", (randn(3, 4),), r"rank k=4 must lie between 1 and m=3, got y \(3, 4\)"),
        ("orthonormalize", (randn(3),), "y needs at least two dimensions"),
        ("orthonormalize", (randn(4, 3).int(),), "y must be floating point"),
        ("orthonormalize", (randn(4, 3), 0.5), "cond_max must be at least 1, got 0.5"),
        ("polar_factor", (randn(3, 4),), "rank k=4 must lie between 1 and n=3"),
        ("polar_factor", (randn(3),), "w needs at least two dimensions"),
    ],
)
def test_bad_input_says_what_was_wrong(name, args, message):
    assert_refused(name, args, message)
