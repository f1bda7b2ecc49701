"""The ops of csrc/cuda/ops_orth.cpp with emulated kernels, on tensors of the CPU."""

import pytest
import torch

from molegrad.ops.checks import acc_dtype
from molegrad.ops.orth import orthonormalize_reference, polar_factor_reference
from molegrad.ops.update import lowrank_update_many_reference, lowrank_update_reference
from tests.cuda.build import call_op
from tests.samples import orthonormal, randn, tangent_truth

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]


@pytest.fixture(autouse=True)
def ops(emulated_op):
    emulated_op("orth", "orth", "polar", "update")


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_tangent_factors(dtype):
    acc = acc_dtype(dtype)
    u, v = orthonormal(30, 4, 1, acc).to(dtype), orthonormal(9, 4, 2, acc).to(dtype)
    y, w = randn(30, 4, dtype=dtype), randn(4, 9, dtype=dtype).mT
    left, right = call_op("tangent_factors", u, v, y, w, 1e3)
    plain = tangent_truth(u, v, y, w)
    close(left @ right.mT, plain[0] @ plain[1].mT)
    close(left, plain[0])


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


NOTHING = (1.0, 0.0, False, None, 0)
RANDOM = (1.0, 0.0, True, None, 0)
U, W = randn(1, 3, 2), randn(1, 4, 2)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("orthonormalize", (randn(3, 4), 1e3), "rank k=4"),
        ("polar_factor", (randn(3),), "w needs at least two dimensions"),
        (
            "tangent_factors",
            (randn(5, 3), randn(4, 3), randn(5, 3), randn(4, 3), 1e3),
            "rank k=3 needs 1 <= 2k <= m=5",
        ),
        ("lowrank_update_", (randn(3, 4), randn(3, 2), randn(4, 1), 1.0, 0.0), "of one rank k"),
        ("lowrank_update_many_", ([], U, W, *NOTHING), "expected at least one weight, got none"),
        (
            "lowrank_update_many_",
            ([randn(3, 4), randn(4, 3)], U, W, *NOTHING),
            "got (3, 4) of torch.float32 on cpu and, at 1, (4, 3) of torch.float32 on cpu",
        ),
        (
            "lowrank_update_many_",
            ([randn(3, 4)], U[0], W, *NOTHING),
            "expected u (1, 3, k), got (3, 2)",
        ),
        ("lowrank_update_many_", ([randn(3, 4)], U, W[..., :1], *NOTHING), "u and w of one rank k"),
        (
            "lowrank_update_many_",
            ([randn(3, 4)], U, W, *RANDOM),
            "stochastic rounding is for weights of torch.bfloat16, got torch.float32",
        ),
        (
            "lowrank_update_many_",
            ([randn(3, 4, dtype=BF16)], U, W, *RANDOM),
            "stochastic rounding needs a counter, got none",
        ),
        (
            "lowrank_update_many_",
            ([randn(3, 4, dtype=BF16)], U, W, 1.0, 0.0, True, torch.tensor(1.0), 0),
            "expected counter as an int64 scalar",
        ),
    ],
)
def test_bad_input_is_named_in_the_words_of_the_reference(name, args, message):
    for call in (call_op, lambda name, *args: getattr(torch.ops.molegrad, name)(*args)):
        with pytest.raises(RuntimeError) as caught:
            call(name, *args)
        assert str(caught.value).startswith(f"molegrad::{name}: ") and message in str(caught.value)
