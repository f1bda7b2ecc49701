"""Low-rank updates of one weight and of many, to nearest and rounded at random."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.update import (
    lowrank_update_many_reference,
    lowrank_update_reference,
    round_randomly,
)
from tests.ops.samples import BF16, DTYPES, F16, F64, assert_refused, counter
from tests.samples import layouts, pairwise, randn

SIZES = [(1, 1, 1), (2, 5, 1), (53, 101, 7), (130, 67, 33), (50, 96, 64), (1030, 3, 2)]  # m, n, k


@pytest.mark.parametrize("update", [ops.lowrank_update_, lowrank_update_reference])
@pytest.mark.parametrize("size, dtype", pairwise(SIZES, DTYPES), ids=str)
def test_every_layout_against_float64(update, size, dtype):
    m, n, k = size
    weight, u, w = randn(m, n, dtype=dtype), randn(m, k, seed=1), randn(n, k, seed=2)
    truth = weight.double() * 0.75 + 0.5 * u.double() @ w.double().mT
    views, nothing_outside = layouts(m, n, dtype)
    for view in views:
        view.copy_(weight)
        before = view.data_ptr()
        update(view, u, w, 0.5, 0.25)
        # Half an ulp of the weight's dtype, and the float32 sum's own rounding.
        bound = torch.finfo(dtype).eps / 2 * truth.abs() + 4e-7 * k * truth.abs().max()
        assert ((view.double() - truth).abs() <= bound).all() and view.data_ptr() == before
    assert nothing_outside()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_it_rounds_to_nearest_even(dtype):
    values = torch.tensor([1.0, 1e-3, 65504.0, 6e-8, 3e-5, 1e30, -1.0, 0.3333])
    w = torch.cat([values, values * (1 + torch.finfo(dtype).eps / 2)]).unsqueeze(1)
    weight = torch.zeros(1, len(w), dtype=dtype)
    ops.lowrank_update_(weight, torch.ones(1, 1), w, 1.0)
    assert torch.equal(weight, w.mT.to(dtype))
    ops.lowrank_update_(weight, torch.full((1, 1), torch.nan), w, 1.0)
    assert weight.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_are_the_update_of_each(dtype):
    u, w = randn(4, 17, 4), randn(4, 11, 4)
    views, nothing_outside = layouts(17, 11, dtype)
    weights = [view.copy_(randn(17, 11, seed=i, dtype=dtype)) for i, view in enumerate(views[:3])]
    expected = [weight.clone() for weight in weights]
    ops.lowrank_update_many_(weights, u[:3], w[:3], -0.3, 0.1)
    for i, weight in enumerate(expected):
        ops.lowrank_update_(weight, u[i], w[i], -0.3, 0.1)
        assert torch.equal(weight, weights[i])
    assert nothing_outside()


def neighbours(x):
    """The two numbers of bfloat16 around x, the one nearer to zero first."""
    near = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return near, (near.view(torch.int32) + (1 << 16)).view(torch.float32)


def test_stochastic_rounding_takes_a_neighbour_and_has_no_bias():
    trials = 2000
    start, u, w = randn(5, 13, dtype=BF16), randn(1, 5, 2), 1e-3 * randn(1, 13, 2)
    exact = torch.addmm(start.float(), u[0], w[0].mT)
    near, far = neighbours(exact)
    total = torch.zeros_like(exact, dtype=F64)
    moved = torch.zeros_like(exact, dtype=torch.bool)
    for seed in range(trials):
        weight = start.clone()
        ops.lowrank_update_many_([weight], u, w, 1.0, 0.0, True, counter(9), seed)
        assert ((weight.float() == near) | (weight.float() == far)).all()
        total += weight.double()
        moved |= weight != start
    error = (total / trials - exact.double()) / (far - near).abs()
    assert error.abs().max() < 5 * 0.5 / trials**0.5 and error.mean().abs() < 0.005
    nearest = exact.to(BF16)
    assert (nearest == start).any() and moved[nearest == start].any()  # nothing is lost for good


def test_stochastic_rounding_follows_from_counter_and_seed():
    u, w = randn(2, 1030, 3), randn(2, 14, 3)  # more rows than are computed at once
    weights = [randn(1030, 14, seed=i, dtype=BF16) for i in range(2)]

    def run(step, seed, layout=lambda x: x):
        copies = [layout(weight.clone()) for weight in weights]
        ops.lowrank_update_many_(copies, u, w, 0.1, 0.25, True, counter(step), seed)
        return torch.stack(copies)

    first = run(5, 1)
    assert torch.equal(first, run(5, 1))
    assert torch.equal(first, run(5, 1, lambda x: x.mT.contiguous().mT))
    for other in (run(6, 1), run(5, 2)):
        assert not torch.equal(first, other)
    exact = torch.stack(weights).double() * 0.75 + 0.1 * u.double() @ w.double().mT
    assert ((first.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-6).all()
    copies = [weights[0].clone() for _ in range(2)]  # each weight has random numbers of its own
    arguments = u[:1].expand(2, -1, -1), w[:1].expand(2, -1, -1), 0.1, 0.0, True, counter(5), 1
    lowrank_update_many_reference(copies, *arguments)
    assert not torch.equal(*copies) and not torch.equal(copies[0][:1024][:6], copies[0][1024:])
    native = [weights[0].clone() for _ in range(2)]
    ops.lowrank_update_many_(native, *arguments)
    assert all(torch.equal(x, y) for x, y in zip(native, copies, strict=True))


def test_rounding_of_what_needs_none_and_of_what_is_not_finite():
    x = torch.tensor([0.0, -0.0, 1.0, -3.5, torch.inf, -torch.inf, torch.nan])
    for bits in (0, 2**24 - 1):
        rounded = round_randomly(x, torch.full_like(x, bits, dtype=torch.int64))
        assert torch.equal(rounded.float().nan_to_num(7), x.nan_to_num(7))
        assert torch.equal(rounded.signbit()[:6], x.signbit()[:6])
    x = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-9])  # shares 1/2, 1/2, 3/4
    bits = (torch.arange(2**16) << 8).unsqueeze(1).expand(-1, 3)
    rounded = round_randomly(x.expand(2**16, 3), bits).double()
    assert torch.equal(rounded.mean(0), x.double())  # exactly, over all numbers that may be drawn


WEIGHTS = [randn(5, 6), randn(5, 6)]
HALF = [x.bfloat16() for x in WEIGHTS]
U, W = randn(2, 5, 3), randn(2, 6, 3)
ROW, COLUMN = randn(1, 6).expand(5, 6), randn(5, 1).expand(5, 6)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("lowrank_update_", (WEIGHTS[0], U[0], W[0, :-1]), "expected w with 6 rows"),
        ("lowrank_update_", (WEIGHTS[0], U[0], W[0, :, :1]), "one rank k"),
        ("lowrank_update_", (ROW, U[0], W[0]), r"weight \(5, 6\) is expanded.*give a clone"),
        ("lowrank_update_", (COLUMN, U[0], W[0]), r"weight \(5, 6\) is expanded"),
        ("lowrank_update_many_", ([ROW], U[:1], W[:1]), r"weights\[0\] \(5, 6\) is expanded"),
        ("lowrank_update_many_", ([], U, W), "expected at least one weight"),
        ("lowrank_update_many_", ([randn(5, 6), randn(6, 5)], U, W), "weights of one shape"),
        ("lowrank_update_many_", ([randn(5, 6), HALF[0]], U, W), "float32 on cpu and, at 1"),
        ("lowrank_update_many_", ([randn(5)], U, W), r"weights\[0\] must be a matrix"),
        ("lowrank_update_many_", (WEIGHTS, U[:1], W), r"expected u \(2, 5, k\), got \(1, 5, 3\)"),
        ("lowrank_update_many_", (WEIGHTS, U, W[0]), r"expected w \(2, 6, k\), got \(6, 3\)"),
        ("lowrank_update_many_", (WEIGHTS, U, W[..., :2]), "one rank k"),
        ("lowrank_update_many_", (WEIGHTS, U.int(), W), "u must be floating point"),
        ("lowrank_update_many_", (WEIGHTS, U, W, 1.0, 0.0, True, counter()),
         "is for weights of torch.bfloat16"),
        ("lowrank_update_many_", (HALF, U, W, 1.0, 0.0, True), "needs a counter"),
        ("lowrank_update_many_", (HALF, U, W, 1.0, 0.0, True, torch.tensor(1.0)),
         "expected counter as an int64 scalar"),
    ],
)  # fmt: skip
def test_bad_input_says_what_was_wrong(name, args, message):
    assert_refused(name, args, message)


def test_a_stride_without_meaning_is_no_expansion():
    one = randn(1, 1).expand(1, 4)[:, :1]
    ops.lowrank_update_(one, randn(1, 2), randn(1, 2))
