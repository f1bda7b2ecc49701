"""Bases, polar factors and updates on a GPU, at the sizes of a model's layers."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.checks import acc_dtype
from molegrad.ops.orth import orthonormalize_reference, polar_factor_reference
from tests.gpu.device import DEVICE, needs_device
from tests.samples import error, orthonormal, randn

pytestmark = needs_device

GPU = DEVICE
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAYERS = [(12, 3072, 32), (12, 768, 64), (12, 64, 32), (2, 5120, 128), (1, 700, 250), (3, 40, 1)]


def distance_from_orthonormal(q):
    eye = torch.eye(q.shape[-1], dtype=F64, device=q.device)
    return (q.double().mT @ q.double() - eye).norm(dim=(-2, -1)).max().item()


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_one_batch_of_every_kind_of_block(shape, dtype):
    """Well conditioned, ill conditioned, rank-deficient and not finite side by side."""
    batch, m, k = shape
    log_cond = [1.0, 4.0, 12.0, 2.0]
    y = torch.stack(
        [
            randn(m, k, seed=i, dtype=F64)
            @ torch.diag(torch.logspace(0, -log_cond[i % 4], k, dtype=F64))
            @ orthonormal(k, k, i, F64).mT
            for i in range(batch)
        ]
    )
    y = y.to(dtype).to(GPU)
    if batch > 2:
        y[1] = 0
        y[2, m // 2, k // 2] = torch.nan
    q, r, status = ops.orthonormalize(y)
    eps = torch.finfo(acc_dtype(dtype)).eps
    assert distance_from_orthonormal(q) < 8 * eps * max(k, 8)
    good = status != 3
    assert error((q.double() @ r.double())[good], y.double()[good]) < 16 * eps * k**0.5
    expected = orthonormalize_reference(y.cpu())[2]
    assert torch.equal(status.cpu() == 3, expected == 3)
    assert torch.equal(status.cpu() == 0, expected == 0)
    assert r[~good].isnan().all()
    again = ops.orthonormalize(y)
    assert torch.equal(q, again[0]) and torch.equal(status, again[2])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(12, 64, 64), (3, 128, 128), (2, 3072, 32), (1, 200, 170)])
@pytest.mark.parametrize("log_cond, rank", [(0.5, 1.0), (3, 1.0), (3, 0.4)])
def test_polar_factor(shape, log_cond, rank, dtype):
    batch, n, k = shape
    kept = int(rank * k)
    singular = torch.diag(torch.logspace(0, -log_cond, kept, dtype=F64))
    left = torch.stack([orthonormal(n, kept, i, F64) for i in range(batch)])
    right = torch.stack([orthonormal(k, kept, 50 + i, F64) for i in range(batch)])
    w = (left @ singular @ right.mT).to(dtype).to(GPU)
    truth = (left @ right.mT).to(GPU)
    p = ops.polar_factor(w)
    plain = error(polar_factor_reference(w.cpu()), truth.cpu())
    assert error(p, truth) < max(4 * plain, 30 * torch.finfo(dtype).eps * 10**log_cond)
    assert torch.equal(ops.polar_factor(torch.zeros_like(w)), torch.zeros_like(p))


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("m, n, k", [(768, 3072, 64), (130, 77, 33), (3072, 768, 16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_updates(m, n, k, dtype, transposed):
    count = 3
    weights = [randn(m, n, seed=i, dtype=dtype).to(GPU) for i in range(count)]
    if transposed:
        weights = [weight.mT.contiguous().mT for weight in weights]
    u, w = randn(count, m, k).to(GPU), randn(count, n, k, seed=1).to(GPU)
    truth = [
        0.75 * x.double() - 0.5 * a.double() @ b.double().mT
        for x, a, b in zip(weights, u, w, strict=True)
    ]
    single = weights[0].clone(memory_format=torch.preserve_format)
    ops.lowrank_update_(single, u[0], w[0], -0.5, 0.25)
    ops.lowrank_update_many_(weights, u, w, -0.5, 0.25)
    assert torch.equal(single, weights[0])
    acc = torch.finfo(acc_dtype(dtype)).eps
    for weight, true in zip(weights, truth, strict=True):
        bound = torch.finfo(dtype).eps / 2 * true.abs() + 4 * acc * k * true.abs().max()
        assert ((weight.double() - true).abs() <= bound).all()


def test_the_product_has_the_error_of_float32_and_no_tendency():
    u, w = randn(1024, 64).to(GPU), randn(2048, 64).to(GPU)
    weight = torch.zeros(1024, 2048, device=GPU)
    ops.lowrank_update_(weight, u, w, 1.0)
    truth = u.double() @ w.double().mT
    difference, plain = weight.double() - truth, (u @ w.mT).double() - truth
    assert difference.norm() <= 3 * plain.norm()
    assert (difference * truth.sign()).mean().abs() / truth.abs().mean() < 3e-7


def test_stochastic_rounding_is_that_of_the_cpu():
    # Products of few bits are exact, so that both round the same numbers.
    u, w = randn(2, 200, 1).mul(8).round(), randn(2, 333, 1).mul(64).round() / 4096
    weights = [randn(200, 333, seed=i, dtype=BF16) for i in range(2)]
    on_gpu = [weight.to(GPU) for weight in weights]
    rest = (0.5, 0.0, True, torch.tensor(9), -4)
    ops.lowrank_update_many_(weights, u, w, *rest)
    ops.lowrank_update_many_(on_gpu, u.to(GPU), w.to(GPU), *rest)
    for weight, other in zip(weights, on_gpu, strict=True):
        assert torch.equal(weight, other.cpu())
