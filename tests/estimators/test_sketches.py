"""The formulas of the low-rank estimates, where they stand once."""

import pytest
import torch

from molegrad.estimators.sketches import Sketch, trust_factor
from tests.samples import orthonormal, randn

M, N, K = 20, 30, 4


def sketch(one_sided=False, batch=()):
    g = randn(*batch, M, N, dtype=torch.float64)
    u = orthonormal(M, K, 1).double().expand(*batch, M, K)
    v = orthonormal(N, K, 2).double().expand(*batch, N, K)
    return g, Sketch(u, v, u if one_sided else g @ v, g.mT @ u, one_sided)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_estimate_is_a_projection_of_the_gradient(one_sided, batch):
    g, s = sketch(one_sided, batch)
    p, q = s.u @ s.u.mT, s.v @ s.v.mT
    expected = p @ g if one_sided else p @ g + g @ q - p @ g @ q
    torch.testing.assert_close(s.matrix(), expected)
    torch.testing.assert_close(s.norm_sq(), expected.square().sum((-2, -1)))
    assert s.factors()[0].shape == (*batch, M, K if one_sided else 2 * K)


@pytest.mark.parametrize("one_sided", [False, True])
def test_energies_are_those_of_smaller_ranks(one_sided):
    g, s = sketch(one_sided)
    found = s.energies()
    for j in range(1, K + 1):
        u, v = s.u[:, :j], s.v[:, :j]
        smaller = Sketch(u, v, u if one_sided else g @ v, g.mT @ u, one_sided)
        torch.testing.assert_close(found[j - 1], smaller.norm_sq())


def test_the_trust_factor_is_bounded():
    norm, captured = torch.tensor([4.0, 100.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 4.0, 0.0])
    assert trust_factor(norm, captured, 3.0).tolist() == [2.0, 3.0, 1.0, 1.0]
    assert trust_factor(norm, captured, 0.0).tolist() == [1.0] * 4
