"""`lowrank_update_many_`: many weights at once, bfloat16 ones rounded at random."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.update import round_randomly
from tests.samples import randn

BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16, torch.float16])
def test_it_is_the_update_of_each(dtype):
    u, w = randn(3, 17, 4), randn(3, 11, 4)
    weights = [randn(17, 11, seed=i, dtype=dtype) for i in range(3)]
    weights[1] = weights[1].mT.contiguous().mT
    expected = [weight.clone() for weight in weights]
    pointers = [weight.data_ptr() for weight in weights]
    ops.lowrank_update_many_(weights, u, w, -0.3, 0.1)
    for i, weight in enumerate(expected):
        ops.lowrank_update_(weight, u[i], w[i], -0.3, 0.1)
        assert torch.equal(weight, weights[i]) and weights[i].data_ptr() == pointers[i]


def neighbours(x):
    """The two numbers of bfloat16 around x, the one nearer to zero first."""
    near = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return near, (near.view(torch.int32) + (1 << 16)).view(torch.float32)


def test_stochastic_rounding_takes_a_neighbour_and_has_no_bias():
    trials = 2000
    start, u, w = randn(5, 13, dtype=BF16), randn(1, 5, 2), 1e-3 * randn(1, 13, 2)
    exact = torch.addmm(start.float(), u[0], w[0].mT)
    near, far = neighbours(exact)
    total = torch.zeros_like(exact, dtype=torch.float64)
    moved = torch.zeros_like(exact, dtype=torch.bool)
    for seed in range(trials):
        weight = start.clone()
        ops.lowrank_update_many_([weight], u, w, 1.0, 0.0, True, torch.tensor(9), seed)
        assert ((weight.float() == near) | (weight.float() == far)).all()
        total += weight.double()
        moved |= weight != start
    error = (total / trials - exact.double()) / (far - near).abs()
    assert error.abs().max() < 5 * 0.5 / trials**0.5 and error.mean().abs() < 0.005
    nearest = exact.to(BF16)
    assert (nearest == start).any() and moved[nearest == start].any()  # nothing is lost for good


def test_stochastic_rounding_follows_from_counter_and_seed():
    u, w = randn(2, 9, 3), randn(2, 14, 3)
    weights = [randn(9, 14, seed=i, dtype=BF16) for i in range(2)]

    def run(counter, seed, layout=lambda x: x):
        copies = [layout(weight.clone()) for weight in weights]
        ops.lowrank_update_many_(copies, u, w, 0.1, 0.0, True, torch.tensor(counter), seed)
        return torch.stack(copies)

    first = run(5, 1)
    assert torch.equal(first, run(5, 1))
    assert torch.equal(first, run(5, 1, lambda x: x.mT.contiguous().mT))
    for other in (run(6, 1), run(5, 2)):
        assert not torch.equal(first, other)
    same = [weights[0].clone(), weights[0].clone()]  # each weight has random numbers of its own
    same_u, same_w = u[:1].expand(2, -1, -1), w[:1].expand(2, -1, -1)
    ops.lowrank_update_many_(same, same_u, same_w, 0.1, 0.0, True, torch.tensor(5), 1)
    assert not torch.equal(*same)


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
U, W = randn(2, 5, 3), randn(2, 6, 3)


@pytest.mark.parametrize(
    "args, message",
    [
        (([], U, W), "expected at least one weight"),
        (([randn(5, 6), randn(6, 5)], U, W), "expected weights of one shape"),
        (([randn(5, 6), randn(5, 6).half()], U, W), "float32 on cpu and, at 1"),
        (([randn(5)], U, W), r"weights\[0\] must be a matrix"),
        ((WEIGHTS, U[:1], W), r"expected u \(2, 5, k\), got \(1, 5, 3\)"),
        ((WEIGHTS, U, W[0]), r"expected w \(2, 6, k\), got \(6, 3\)"),
        ((WEIGHTS, U, W[..., :2]), "one rank k"),
        ((WEIGHTS, U.int(), W), "u must be floating point"),
        ((WEIGHTS, U, W, 1.0, 0.0, True, torch.tensor(1)), "is for weights of torch.bfloat16"),
        (([x.bfloat16() for x in WEIGHTS], U, W, 1.0, 0.0, True), "needs a counter"),
        (
            ([x.bfloat16() for x in WEIGHTS], U, W, 1.0, 0.0, True, torch.tensor(1.0)),
            "expected counter as an int64 scalar",
        ),
    ],
)
def test_bad_input_says_what_was_wrong(args, message):
    with pytest.raises(RuntimeError, match=f"molegrad::lowrank_update_many_: .*{message}"):
        torch.ops.molegrad.lowrank_update_many_(*args)


@pytest.mark.parametrize("shape", [(5, 1), (1, 4)])
def test_an_expanded_weight_is_refused_in_the_words_of_the_reference(shape):
    """Its numbers share memory: each would be updated several times."""
    wide, u, w = randn(*shape).expand(5, 4), randn(1, 5, 2), randn(1, 4, 2)
    for name, given in (
        ("lowrank_update_", (wide, u[0], w[0])),
        ("lowrank_update_many_", ([wide], u, w)),
    ):
        with pytest.raises(RuntimeError, match=r"\(5, 4\) is expanded"):
            getattr(ops, name)(*given)
    one = randn(1, 1).expand(1, 4)[:, :1]  # a stride without meaning
    ops.lowrank_update_(one, randn(1, 2), randn(1, 2))
