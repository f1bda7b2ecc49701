"""Rank-k updates of weights in csrc/cuda against the reference."""

import pytest
import torch

from molegrad.ops.checks import acc_dtype
from molegrad.ops.update import lowrank_update_many_reference
from tests.cuda.build import Struct
from tests.cuda.pairs import pairwise
from tests.samples import randn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]


def update(emulated, weight, u, w, alpha, decay=0.0):
    """weight (m, n) with rows of any length."""
    update_many(emulated, [weight], u[None], w[None], alpha, decay)


def update_many(emulated, weights, u, w, alpha, decay=0.0, counter=None, seed=0, layers=None):
    """Weights all row-major or all transposed."""
    m, n = weights[0].shape
    transposed = weights[0].stride(1) != 1
    rows, cols = (n, m) if transposed else (m, n)
    left, right = (w, u) if transposed else (u, w)
    steps = (1, n) if transposed else (n, 1)
    lds = Struct(*(x.stride(1 if transposed else 0) for x in weights))
    emulated.molegrad_lowrank_update_many(
        Struct(*weights), lds, Struct(*(layers or range(len(weights)))), len(weights),
        weights[0].dtype, left, left.dtype, left.stride(1), right, right.dtype, right.stride(1),
        rows, cols, u.shape[2], 1.0 - decay, alpha, int(counter is not None), *steps,
        counter, seed,
    )  # fmt: skip


def assert_rounded_once(weight, truth, k):
    # Half a unit of the weight's last place, and the rounding of a sum in float32.
    acc = torch.finfo(acc_dtype(weight.dtype)).eps
    bound = torch.finfo(weight.dtype).eps / 2 * truth.abs() + 4 * acc * k * truth.abs().max()
    assert ((weight.double() - truth).abs() <= bound).all()


SHAPES = [(1, 1, 1), (2, 5, 1), (53, 101, 7), (130, 264, 33), (64, 128, 64), (70, 136, 5)]


@pytest.mark.parametrize(
    "order, shape, dtype", pairwise(["forward", "reverse"], SHAPES, DTYPES), indirect=["order"]
)
def test_update(emulated, order, shape, dtype):
    m, n, k = shape
    weight, u, w = randn(m, n, dtype=dtype), randn(m, k, seed=1), randn(n, k, seed=2)
    truth = weight.double() * 0.75 + 0.5 * u.double() @ w.double().mT
    for width, offset in ((n, 0), (n + 3, 1), ((n + 15) // 8 * 8, 8)):
        storage = torch.zeros(m + 2, width + offset, dtype=dtype)
        view = storage[1 : m + 1, offset : offset + n]
        view.copy_(weight)
        update(emulated, view, u, w, 0.5, 0.25)
        assert_rounded_once(view, truth, k)
        view.zero_()
        assert (storage == 0).all()  # nothing outside the view was touched


@pytest.mark.parametrize("u_dtype, w_dtype", [(BF16, F32), (F16, BF16), (F64, F32)])
def test_dtypes_and_rows_of_factors(emulated, u_dtype, w_dtype):
    u, w = randn(40, 20, dtype=u_dtype)[:, 3:12], randn(30, 9, dtype=w_dtype)
    for dtype in (F32, F64):
        weight = randn(40, 30, dtype=dtype)
        acc = acc_dtype(dtype)
        truth = weight.double() - u.to(acc).double() @ w.to(acc).double().mT
        update(emulated, weight, u, w, -1.0)
        assert_rounded_once(weight, truth, 9)


def test_the_error_is_that_of_float32(emulated):
    """Not of tf32, and without a tendency towards zero."""
    u, w = randn(64, 64), randn(128, 64)
    weight = torch.zeros(64, 128)
    update(emulated, weight, u, w, 1.0)
    truth = u.double() @ w.double().mT
    difference = weight.double() - truth
    plain = (u @ w.mT).double() - truth
    assert difference.norm() <= 2 * plain.norm()
    assert (difference * truth.sign()).mean().abs() / truth.abs().mean() < 1e-7


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_to_nearest_even(emulated, dtype):
    values = torch.tensor([1.0, 1e-3, 65504.0, 6e-8, 3e-5, 1e30, -1.0, 0.3333]).to(dtype).float()
    w = torch.cat([values, values * (1 + torch.finfo(dtype).eps / 2)]).unsqueeze(1)
    w = w[w.isfinite()].unsqueeze(1)
    weight = torch.zeros(1, len(w), dtype=dtype)
    update(emulated, weight, torch.ones(1, 1), w, 1.0)
    assert torch.equal(weight, w.mT.to(dtype))
    update(emulated, weight, torch.full((1, 1), torch.nan), w, 1.0)
    assert weight.isnan().all()


@pytest.mark.parametrize(
    "order, dtype, transposed",
    pairwise(["forward", "reverse"], DTYPES, [False, True]),
    indirect=["order"],
)
def test_many(emulated, order, dtype, transposed):
    m, n, k, count = 33, 141, 6, 67  # more than one launch takes
    if dtype in (F64, F16):
        count = 3
    u, w = randn(count, m, k), randn(count, n, k, seed=1)
    weights = [randn(m, n, seed=i, dtype=dtype) for i in range(count)]
    if transposed:
        weights = [weight.mT.contiguous().mT for weight in weights]
    before = [weight.clone() for weight in weights]
    update_many(emulated, weights, u, w, -0.5, 0.25)
    for i, (weight, old) in enumerate(zip(weights, before, strict=True)):
        truth = 0.75 * old.double() - 0.5 * u[i].double() @ w[i].double().mT
        assert_rounded_once(weight, truth, k)


def test_weights_take_the_factors_of_their_number(emulated):
    u, w = randn(3, 8, 2), randn(3, 9, 2)
    weights = [torch.zeros(8, 9), torch.zeros(8, 9)]
    update_many(emulated, weights, u, w, 1.0, layers=[2, 0])
    torch.testing.assert_close(weights[0], u[2] @ w[2].mT)
    torch.testing.assert_close(weights[1], u[0] @ w[0].mT)


@pytest.mark.parametrize("transposed", [False, True])
def test_stochastic_rounding_is_the_references(emulated, order, transposed):
    m, n, count = 21, 133, 3
    # Products of few bits are exact, so that both round the same numbers.
    u = randn(count, m, 1).mul(8).round()
    w = randn(count, n, 1).mul(64).round() / 4096
    weights = [randn(m, n, seed=i, dtype=BF16) for i in range(count)]
    if transposed:
        weights = [weight.mT.contiguous().mT for weight in weights]
    expected = [weight.clone() for weight in weights]
    counter = torch.tensor(7)
    update_many(emulated, weights, u, w, 0.5, 0.0, counter, -11)
    lowrank_update_many_reference(expected, u, w, 0.5, 0.0, True, counter, -11)
    for weight, other in zip(weights, expected, strict=True):
        assert torch.equal(weight, other)


def test_stochastic_rounding_takes_a_neighbour_without_bias(emulated):
    m, n, k, trials = 8, 32, 3, 300
    start, u, w = randn(m, n, dtype=BF16), randn(1, m, k), 1e-3 * randn(1, n, k)
    exact = torch.zeros(m, n)
    update(emulated, exact, u[0], w[0], 1.0)
    exact = start.float() + exact
    down = (exact.view(torch.int32) & -(1 << 16)).view(F32)
    up = (down.view(torch.int32) + (1 << 16)).view(F32)
    total = torch.zeros(m, n, dtype=F64)
    for seed in range(trials):
        weight = start.clone()
        update_many(emulated, [weight], u, w, 1.0, 0.0, torch.tensor(3), seed)
        assert ((weight.float() == down) | (weight.float() == up)).all()
        total += weight.double()
    distance = (up - down).abs().double()
    error = (total / trials - exact.double()) / distance
    assert error.abs().max() < 5 * 0.5 / trials**0.5 and error.mean().abs() < 0.01
    special = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]]).to(BF16)
    zeros = torch.zeros(1, 1, 1), torch.zeros(1, 4, 1)
    update_many(emulated, [special], *zeros, 1.0, 0.0, torch.tensor(3), 1)
    assert special[0, :2].tolist() == [torch.inf, -torch.inf]
    assert special[0, 2].isnan() and special[0, 3] == 0
