"""The layers' ops: schemas, fake kernels and derivatives."""

import pytest
import torch

from molegrad import ops
from tests.ops.samples import F64, opchecks
from tests.samples import orthonormal, randn


def state(m, n, k, dtype=torch.float32):
    """Bases, counter and statistics of a layer."""
    bases = orthonormal(m, k, 1, dtype), orthonormal(n, k, 2, dtype)
    return *bases, torch.zeros((), dtype=torch.int64), torch.zeros(6)


def samples(name, requires_grad=False):
    """Argument tuples for `torch.ops.molegrad.<name>`."""
    x, weight, bias = randn(2, 5, 11).requires_grad_(requires_grad), randn(13, 11), randn(13)
    saved, nothing = ops.quantize_rows(x.detach()), (None, None)
    u, v, counter, stats = state(13, 11, 4)
    momentum = torch.zeros(13, 11), None
    int8 = torch.zeros(13, 11, dtype=torch.int8), torch.ones(13, 1)
    step = 1, 3, 1e3  # explored, seed, cond_max
    factors = u.clone().requires_grad_(requires_grad), v.clone().requires_grad_(requires_grad)
    own = {
        "linear_exact": [(nothing, (*nothing, counter)), (saved, (*int8, counter))],
        "linear_sampled": [
            (nothing, (*nothing, counter, torch.zeros(2), 0.5, 2, 3)),
            (saved, (*momentum, counter, torch.zeros(2), 1.0, 4, 0)),
        ],
        "linear_lowrank": [
            (saved, (u, v, counter, stats, "power", 4, 1, 2, 0.0, *step, False, False)),
            (nothing, (u, v, counter, stats, "tangent", 4, 1, 3, 2.0, *step, False, False)),
            (saved, (u, v, counter, stats, "power", 4, 1, 0, 0.0, *step, True, False)),
            (nothing, (*factors, counter, stats, "tangent", 3, 1, 1, 0.0, *step, False, True)),
            (saved, (*factors, counter, stats, "tangent", 4, 1, 0, 0.0, *step, True, True)),
            (nothing, (*factors, counter, stats, "power", 3, 1, 1, 0.0, *step, True, True)),
        ],
    }[name]
    return [(x, weight, bias, *kept, *rest) for kept, rest in own]


NAMES = ["linear_exact", "linear_sampled", "linear_lowrank"]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, requires_grad):
    for args in samples(name, requires_grad):
        # Buffers that the backward pass moves, which opcheck refuses.
        without = ("test_aot_dispatch_dynamic",) if requires_grad and args[-1] is not True else ()
        op = getattr(torch.ops.molegrad, name)
        torch.library.opcheck(op, args, test_utils=opchecks(args, without))


def test_gradients_with_a_full_rank_are_exact():
    """With k = min(m, n) the estimate is G itself, so gradcheck applies to the weight too."""
    inputs = [randn(*shape, dtype=F64).requires_grad_() for shape in ((3, 4, 6), (5, 6), (5,))]

    def dense(x, weight, bias):
        own = (*state(5, 6, 5, F64), "power", 5, 1, 0, 0.0, 0, 0, 1e3, False, False)
        return torch.ops.molegrad.linear_lowrank(x, weight, bias, None, None, *own)

    assert torch.autograd.gradcheck(dense, inputs)


def test_factors_receive_the_gradients_of_a_low_rank_offset():
    """Those of L(W + U Vᵀ) at a point where the product is zero in one factor."""
    x, weight, bias = (randn(*shape, dtype=F64) for shape in ((7, 6), (5, 6), (5,)))
    cotangent = randn(7, 5, dtype=F64)
    u, v, *rest = state(5, 6, 2, F64)
    u_, v_ = u.clone().requires_grad_(), v.clone().requires_grad_()
    own = (u_, v_, *rest, "tangent", 2, 1, 0, 0.0, 0, 0, 1e3, False, True)
    torch.ops.molegrad.linear_lowrank(x, weight, bias, None, None, *own).backward(cotangent)
    p, q = (torch.zeros(rows, 2, dtype=F64).requires_grad_() for rows in (5, 6))
    offset = p @ v.mT + u @ q.mT
    torch.nn.functional.linear(x, weight + offset, bias).backward(cotangent)
    torch.testing.assert_close((u_.grad, v_.grad), (p.grad, q.grad))


X, W = randn(4, 11), randn(13, 11)
U, V, COUNTER, STATS = state(13, 11, 4)
LOWRANK = {"u": U, "v": V, "counter": COUNTER, "stats": STATS, "method": "tangent", "rank_k": 4,
           "power_iters": 1, "probes": 0, "trust_max": 0.0, "explored": 1, "seed": 0,
           "cond_max": 1e3, "fp8": False, "factors": False}  # fmt: skip
SAMPLED = {"momentum": None, "scale": None, "counter": COUNTER, "stats": STATS, "fraction": 0.5,
           "block": 2, "seed": 0}  # fmt: skip


@pytest.mark.parametrize(
    "name, own, message",
    [
        ("linear_lowrank", LOWRANK | {"u": U[:-1]}, "expected basis_u with 13 rows"),
        ("linear_lowrank", LOWRANK | {"rank_k": 5}, "rank k=5 must lie between 1 and 4"),
        ("linear_lowrank", LOWRANK | {"cond_max": 0.0}, "cond_max must be at least 1"),
        ("linear_sampled", SAMPLED | {"momentum": W[:3]}, "momentum of the weight's shape"),
        ("linear_sampled", SAMPLED | {"fraction": 0.0}, "fraction must be positive"),
        ("linear_sampled", SAMPLED | {"counter": torch.zeros(())}, "counter as an int64 scalar"),
    ],
)  # fmt: skip
def test_bad_state_is_named(name, own, message):
    with pytest.raises(RuntimeError, match=f"molegrad::{name}: .*{message}"):
        getattr(torch.ops.molegrad, name)(X, W, None, None, None, *own.values())
