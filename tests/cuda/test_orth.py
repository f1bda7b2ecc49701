"""Orthonormal bases of csrc/cuda against the reference."""

import pytest
import torch

from molegrad.ops.checks import acc_dtype
from molegrad.ops.orth import orthonormalize_reference
from tests.cuda.pairs import pairwise
from tests.samples import error, orthonormal, randn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SAFE, ILL, DEFICIENT, NON_FINITE = 0, 1, 2, 3
ORDERS, WAYS = ["forward", "reverse"], ["launches", "in one block"]


@pytest.fixture(params=WAYS)
def library(request, emulated):
    """orthonormalize(y, cond_max) as the op calls it, both ways of doing it."""
    return emulated, request.param == "in one block"


def orthonormalize(library, y, cond_max=1e3):
    """y (…, m, k), a view with rows of whatever length."""
    kernels, in_block = library
    *batch, m, k = y.shape
    count = 1
    for size in batch:
        count *= size
    if in_block and not kernels.value("molegrad_orthonormalize_in_block", m, k, y.dtype):
        pytest.skip("too large for one block")
    assert y.stride(-1) == 1
    dtype = acc_dtype(y.dtype)
    q, r = (
        torch.full((*batch, m, k), 7.0, dtype=dtype),
        torch.full((*batch, k, k), 7.0, dtype=dtype),
    )
    status = torch.full(batch, -5, dtype=torch.int32)
    size = kernels.value("molegrad_orthonormalize_scratch", count, m, k, y.dtype, int(in_block))
    guard = 64
    scratch = torch.full((size + 256 + guard,), 0xFF, dtype=torch.uint8)
    start = -scratch.data_ptr() % 256
    kernels.molegrad_orthonormalize(
        y, y.dtype, y.stride(-2), count, m, k, cond_max, int(in_block), q, r, status,
        scratch[start:],
    )  # fmt: skip
    assert (scratch[start + size :] == 0xFF).all() and (scratch[:start] == 0xFF).all()
    return q, r, status


def distance_from_orthonormal(q):
    k = q.shape[-1]
    return (q.double().mT @ q.double() - torch.eye(k, dtype=F64)).norm(dim=(-2, -1)).max().item()


def conditioned(m, k, log_cond, seed=0):
    columns = torch.diag(torch.logspace(0, -log_cond, k, dtype=F64))
    return orthonormal(m, k, seed + 1, F64) @ columns @ orthonormal(k, k, seed + 2, F64).mT


SHAPES = [(1, 1), (7, 7), (70, 1), (101, 33), (257, 32), (33, 33)]


@pytest.mark.parametrize(
    "library, shape, log_cond, dtype",
    pairwise(WAYS, SHAPES, [0, 2.5, 4, 5, 9], [F32, F64]),
    indirect=["library"],
)
def test_every_condition_number(library, shape, log_cond, dtype):
    m, k = shape
    y = conditioned(m, k, log_cond).to(dtype)
    q, r, status = orthonormalize(library, y)
    eps = torch.finfo(dtype).eps
    assert distance_from_orthonormal(q) < 4 * eps * k
    assert error(q.double() @ r.double(), y.double()) < 8 * eps * k**0.5
    assert torch.equal(r, r.triu()) and (r.diagonal() >= 0).all()
    assert status.item() == orthonormalize_reference(y)[2].item()


@pytest.mark.parametrize("m, k", [(300, 70), (150, 130), (130, 128)])
def test_many_columns(library, m, k):
    for log_cond in (1, 3.7):
        y = conditioned(m, k, log_cond).float()
        q, r, status = orthonormalize(library, y)
        assert distance_from_orthonormal(q) < 5e-7 * k
        assert error(q.double() @ r.double(), y.double()) < 1e-6 * k**0.5
        assert status.item() == orthonormalize_reference(y)[2].item()


def test_many_columns_of_float64(library):
    y = conditioned(150, 120, 4).double()
    q, r, status = orthonormalize(library, y)
    assert distance_from_orthonormal(q) < 1e-13 and error(q @ r, y) < 1e-14


def test_order_of_threads_does_not_matter(library, monkeypatch):
    y = torch.stack([randn(150, 20), conditioned(150, 20, 4).float(), torch.ones(150, 20)])
    results = []
    for name in ("forward", "reverse"):
        monkeypatch.setenv("MOLEGRAD_EMULATION_ORDER", name)
        results.append(orthonormalize(library, y))
    assert all(torch.equal(x, z) for x, z in zip(*results, strict=True))
    assert results[0][2].tolist() == [SAFE, ILL, DEFICIENT]


@pytest.mark.parametrize(
    "library, order, dtype, scale",
    pairwise(WAYS, ORDERS, [F32, F64], [1e-30, 1e30, 1e-42]),
    indirect=["library", "order"],
)
def test_scales(library, order, dtype, scale):
    y = (conditioned(90, 5, 1) * scale).to(dtype)
    q, r, status = orthonormalize(library, y)
    eps = torch.finfo(dtype).eps
    assert distance_from_orthonormal(q) < 4 * eps * 5 and status.item() == SAFE
    rounding = max(eps, 2e-45 / scale if dtype == F32 else 0.0)  # of subnormal numbers
    assert error(q.double() @ (r.double() / scale), y.double() / scale) < 20 * rounding


def test_scales_that_change_from_row_to_row(library):
    """Parts of a sum that are far below the others, in whatever order they come."""
    for rows in (torch.logspace(-30, 30, 200), torch.logspace(30, -30, 200)):
        y = randn(200, 3) * rows[:, None]
        q, r, status = orthonormalize(library, y)
        plain = orthonormalize_reference(y)
        assert distance_from_orthonormal(q) < 2e-6 and status.item() == plain[2].item()
        assert error(q.double() @ r.double(), y.double()) < 2e-6


def test_scales_of_columns(library):
    y = orthonormal(140, 6) * torch.logspace(-15, 15, 6)
    q, r, status = orthonormalize(library, y)
    assert status.item() == SAFE
    torch.testing.assert_close(q, orthonormal(140, 6), rtol=1e-5, atol=1e-6)


CASES = ["zero", "zero column", "repeated", "rank 1", "square", "tiny rest"]


@pytest.mark.parametrize(
    "library, order, case, dtype",
    pairwise(WAYS, ORDERS, CASES, [F32, F64]),
    indirect=["library", "order"],
)
def test_deficient_blocks_are_completed(library, order, case, dtype):
    m, k = 70, 5
    y = randn(m, k, dtype=dtype)
    if case == "zero":
        y = torch.zeros(m, k, dtype=dtype)
    elif case == "zero column":
        y[:, 2] = 0
    elif case == "repeated":
        y[:, 4] = y[:, 1]
    elif case == "rank 1":
        y = randn(m, 1, dtype=dtype) @ randn(1, k, dtype=dtype)
    elif case == "square":
        y = torch.ones(5, 5, dtype=dtype)
    else:
        y[:, 3] = y[:, 2] * 2
        y[1, 3] += torch.finfo(dtype).eps
    q, r, status = orthonormalize(library, y)
    eps = torch.finfo(dtype).eps
    assert status.item() == DEFICIENT
    assert distance_from_orthonormal(q) < 40 * eps
    assert (q @ r - y).norm() <= 40 * eps * max(y.norm().item(), 1.0)
    assert torch.equal(r, r.triu()) and (r.diagonal() >= 0).all()


@pytest.mark.parametrize(
    "library, order, bad",
    pairwise(WAYS, ORDERS, [float("nan"), float("inf"), -float("inf")]),
    indirect=["library", "order"],
)
def test_non_finite_blocks(library, order, bad):
    y = randn(3, 80, 3)
    y[1, 74, 2] = bad
    y[1, 75, 2] = 1.0
    q, r, status = orthonormalize(library, y)
    assert status.tolist() == [SAFE, NON_FINITE, SAFE]
    assert torch.equal(q[1], torch.eye(80, 3)) and r[1].isnan().all()
    assert distance_from_orthonormal(q) < 2e-6 and r[0].isfinite().all() and r[2].isfinite().all()


@pytest.mark.parametrize(
    "library, order, dtype",
    pairwise(WAYS, ORDERS, [BF16, F16, F32]),
    indirect=["library", "order"],
)
def test_dtypes_rows_and_batches(library, order, dtype):
    wide = randn(2, 3, 75, 40, dtype=dtype)
    y = wide[..., 3:20]
    q, r, status = orthonormalize(library, y)
    assert (status == SAFE).all()
    plain_q, plain_r, _ = orthonormalize_reference(y)
    torch.testing.assert_close(q, plain_q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(r, plain_r, rtol=1e-4, atol=1e-4)


def test_a_block_does_not_depend_on_the_batch(library):
    y = randn(4, 130, 9)
    y[1] = 0
    y[2] = conditioned(130, 9, 4.5).float()
    q, r, status = orthonormalize(library, y)
    for i in range(4):
        one = orthonormalize(library, y[i])
        assert torch.equal(one[0], q[i]) and torch.equal(one[1], r[i])
        assert one[2].item() == status[i].item()


def test_the_condition_number_that_is_allowed(library):
    y = conditioned(60, 4, 2).float()
    assert orthonormalize(library, y, 1.5e3)[2].item() == SAFE
    q, r, status = orthonormalize(library, y, 10.0)
    assert status.item() == ILL and distance_from_orthonormal(q) < 2e-6
