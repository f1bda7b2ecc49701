"""The linear ops: gradients by finite differences, and what their arguments must be."""

import torch

from tests.ops.samples import F64
from tests.samples import orthonormal, randn


def test_linear_gradients_with_a_full_rank_are_exact():
    """With k = min(m, n) the estimate is G itself, so gradcheck applies to the weight too."""
    x, weight, bias = randn(3, 4, 6, dtype=F64), randn(5, 6, dtype=F64), randn(5, dtype=F64)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def dense(x, weight, bias):
        basis_u, basis_v = orthonormal(5, 5, dtype=F64), orthonormal(6, 5, dtype=F64)
        counter, stats = torch.zeros((), dtype=torch.int64), torch.zeros(8)
        return torch.ops.molegrad.linear_dense(
            x,
            weight,
            bias,
            None,
            None,
            basis_u,
            basis_v,
            counter,
            stats,
            "power",
            1,
            0,
            0.0,
            0,
            0,
            1e3,
        )

    assert torch.autograd.gradcheck(dense, inputs)


def test_linear_factored_gradients_are_those_of_a_low_rank_offset():
    """basis grads are d L(W + U Vᵀ) at a point where the product is zero in one factor."""
    x, weight, bias = randn(7, 6, dtype=F64), randn(5, 6, dtype=F64), randn(5, dtype=F64)
    u, v = orthonormal(5, 2, dtype=F64), orthonormal(6, 2, dtype=F64)
    cotangent = randn(7, 5, dtype=F64)
    u_, v_ = u.clone().requires_grad_(), v.clone().requires_grad_()
    y = torch.ops.molegrad.linear_factored(
        x, weight, bias, None, None, u_, v_, torch.zeros(8), "tangent", 2, 1, 1e3
    )
    y.backward(cotangent)
    p, q = (
        torch.zeros(5, 2, dtype=F64).requires_grad_(),
        torch.zeros(6, 2, dtype=F64).requires_grad_(),
    )
    offset = p @ v.mT + u @ q.mT
    torch.nn.functional.linear(x, weight + offset, bias).backward(cotangent)
    torch.testing.assert_close(u_.grad, p.grad)
    torch.testing.assert_close(v_.grad, q.grad)
    for i in range(2):  # x and bias as nn.Linear has them
        leaf = [x, bias][i].clone().requires_grad_()
        args = [x, weight, bias]
        args[2 * i] = leaf
        assert torch.autograd.gradcheck(
            lambda t, args=args, i=i: torch.ops.molegrad.linear_factored(
                *[t if j == 2 * i else s for j, s in enumerate(args)],
                None, None, u, v, torch.zeros(8), "tangent", 2, 1, 1e3,
            ),
            [leaf],
        )  # fmt: skip
