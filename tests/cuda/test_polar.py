"""Polar factors of csrc/cuda against the reference."""

import pytest
import torch

from molegrad.ops.checks import acc_dtype
from molegrad.ops.orth import polar_factor_reference
from tests.cuda.pairs import pairwise
from tests.samples import error, orthonormal, randn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def polar_factor(emulated, w):
    kernels = emulated
    *batch, n, k = w.shape
    count = w.numel() // (n * k)
    p = torch.full(w.shape, 7.0, dtype=acc_dtype(w.dtype))
    size = kernels.value("molegrad_polar_factor_scratch", count, n, k, w.dtype)
    scratch = torch.full((size + 320,), 0xFF, dtype=torch.uint8)
    start = -scratch.data_ptr() % 256
    kernels.molegrad_polar_factor(w, w.dtype, w.stride(-2), count, n, k, p, scratch[start:])
    assert (scratch[start + size :] == 0xFF).all()
    return p


def with_modes(n, k, singular):
    """W (n, k) with these singular values, and its polar factor."""
    rank = len(singular)
    left, right = orthonormal(n, rank, 1, F64), orthonormal(k, rank, 2, F64)
    return left @ torch.diag(singular.double()) @ right.mT, left @ right.mT


SHAPES = [(1, 1), (5, 1), (33, 33), (149, 7), (211, 32), (64, 64)]


@pytest.mark.parametrize(
    "shape, rank, log_cond, dtype", pairwise(SHAPES, [0.3, 0.6, 1.0], [0, 2, 4], [F32, F64])
)
def test_every_rank_and_condition_number(emulated, shape, rank, log_cond, dtype):
    n, k = shape
    w, truth = with_modes(n, k, torch.logspace(0, -log_cond, max(1, int(rank * k))))
    p = polar_factor(emulated, w.to(dtype))
    plain = polar_factor_reference(w.to(dtype))
    eps = torch.finfo(dtype).eps
    assert error(p, truth) < max(4 * error(plain, truth), 30 * eps * 10**log_cond)


@pytest.mark.parametrize("n, k, dtype", [(140, 100, F32), (160, 128, F32), (165, 160, F32),
                                         (120, 112, F64), (120, 115, F64)])  # fmt: skip
def test_many_columns(emulated, n, k, dtype):
    w, truth = with_modes(n, k, torch.logspace(0, -3, k - 5))
    assert error(polar_factor(emulated, w.to(dtype)), truth) < 100 * torch.finfo(dtype).eps * 1e3


def test_order_of_threads_does_not_matter(emulated, monkeypatch):
    w = torch.stack([randn(90, 21), with_modes(90, 21, torch.logspace(0, -4, 11))[0].float()])
    results = []
    for name in ("forward", "reverse"):
        monkeypatch.setenv("MOLEGRAD_EMULATION_ORDER", name)
        results.append(polar_factor(emulated, w))
    assert torch.equal(*results)


def test_modes_below_rounding_are_zero(emulated, order):
    values = torch.linalg.svdvals(polar_factor(emulated, randn(20, 2) @ randn(2, 5)))
    torch.testing.assert_close(values, torch.tensor([1.0, 1, 0, 0, 0]), atol=1e-4, rtol=0)
    w, truth = with_modes(80, 9, torch.tensor([1.0, 1e-1, 1e-2, 3e-3, 1e-7, 3e-8]))
    kept = with_modes(80, 9, torch.tensor([1.0, 1e-1, 1e-2, 3e-3, 0, 0]))[0]
    left, _, right = torch.linalg.svd(kept)
    truth = left[:, :4] @ right[:4]
    assert error(polar_factor(emulated, w.float()), truth) < 1e-4
    for zero in (torch.zeros(2, 6, 3), torch.zeros(70, 40, dtype=F64)):
        assert torch.equal(polar_factor(emulated, zero), zero)
    column = torch.zeros(70, 4)
    column[:, 2] = randn(70)
    p = polar_factor(emulated, column)
    torch.testing.assert_close(p, column / column.norm())


@pytest.mark.parametrize(
    "order, dtype, scale",
    pairwise(["forward", "reverse"], [F32, F64], [1e-30, 1e30, 1e-40]),
    indirect=["order"],
)
def test_scales(emulated, order, scale, dtype):
    w, truth = with_modes(75, 6, torch.logspace(0, -1, 6))
    tolerance = 1e-5 if scale > 1e-35 else 1e-3  # subnormal numbers
    assert error(polar_factor(emulated, (w * scale).to(dtype)), truth) < tolerance


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_matrices(emulated, order, bad):
    w = randn(3, 80, 3)
    w[1, 74, 2] = bad
    p = polar_factor(emulated, w)
    assert p[1].isnan().all() and p[0].isfinite().all() and p[2].isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_dtypes_rows_and_batches(emulated, dtype):
    w = randn(2, 3, 75, 40, dtype=dtype)[..., 3:20]
    p, plain = polar_factor(emulated, w), polar_factor_reference(w)
    torch.testing.assert_close(p, plain, rtol=1e-4, atol=1e-5)
    for i in range(6):
        assert torch.equal(polar_factor(emulated, w.flatten(0, 1)[i]), p.flatten(0, 1)[i])
