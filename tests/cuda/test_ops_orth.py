"""The ops of csrc/cuda/{orth,polar,update}.cu with emulated kernels, on tensors of the CPU."""

import pytest
import torch

from molegrad.ops.orth import orthonormalize_reference, polar_factor_reference
from molegrad.ops.update import lowrank_update_many_reference, lowrank_update_reference
from tests.cuda.build import call_op
from tests.samples import randn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]


pytestmark = pytest.mark.usefixtures("emulated_ops")


def close(x, expected, tolerance=1e-3):
    assert x.shape == expected.shape and x.dtype == expected.dtype
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_and_layouts(dtype):
    y = randn(2, 3, 70, 9, dtype=dtype)
    tall = randn(600, 24, dtype=dtype)  # too large for one block
    for x in (y, y[0, 1], y[:, 1], y.mT.contiguous().mT, y[..., 1:6], y[:, :0], y[..., :1], tall):
        for got, expected in zip(
            call_op("orthonormalize", x, 1e3), orthonormalize_reference(x), strict=True
        ):
            close(got, expected)
        close(call_op("polar_factor", x), polar_factor_reference(x))


def layouts(weight):
    storage = torch.zeros(24, 40, dtype=weight.dtype)
    yield weight.clone()
    yield weight.mT.contiguous().mT
    yield storage[3:15, 2:21].copy_(weight)
    yield storage[::2, 1:39:2].copy_(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_of_any_layout(dtype):
    weight, u, w = randn(12, 19, dtype=dtype), randn(12, 3), randn(3, 19).mT
    for got in layouts(weight):
        expected = weight.clone()
        call_op("lowrank_update_", got, u, w, 0.5, 0.125)
        lowrank_update_reference(expected, u, w, 0.5, 0.125)
        close(got, expected, 1e-5 if dtype == F32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_updates_of_mixed_layouts(dtype):
    weights = [list(layouts(randn(12, 19, seed=i, dtype=dtype)))[i] for i in (0, 1, 2, 3, 1)]
    before = [weight.clone() for weight in weights]
    u, w = randn(5, 12, 4), randn(5, 4, 19).mT
    call_op("lowrank_update_many_", weights, u, w, 0.5, 0.25, False, None, 0)
    expected = [weight.clone() for weight in before]
    lowrank_update_many_reference(expected, u, w, 0.5, 0.25)
    for weight, other in zip(weights, expected, strict=True):
        close(weight, other, 1e-5 if dtype == F32 else 1e-2)


def test_stochastic_rounding_is_the_references_in_any_layout():
    weights = [list(layouts(randn(12, 19, seed=i, dtype=BF16)))[i] for i in (0, 1, 2, 3, 1)]
    expected = [weight.clone() for weight in weights]
    # Products of few bits are exact, so that both round the same numbers.
    u, w = randn(5, 12, 1).mul(4).round(), randn(5, 1, 19).mT.mul(64).round() / 4096
    rest = (0.5, 0.0, True, torch.tensor(4), -3)
    call_op("lowrank_update_many_", weights, u, w, *rest)
    lowrank_update_many_reference(expected, u, w, *rest)
    assert all(torch.equal(x, other) for x, other in zip(weights, expected, strict=True))
