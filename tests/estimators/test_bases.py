import torch

from molegrad.estimators import bases


def test_new_directions_are_orthogonal_to_the_old_which_stay():
    old = bases.initial_basis(50, 8, 1)
    more = bases.resized(old, 24, seed=5, step=3)
    assert torch.equal(more[:, :8], old)
    torch.testing.assert_close(more.mT @ more, torch.eye(24), atol=1e-5, rtol=0)
    assert torch.equal(more, bases.resized(old, 24, seed=5, step=3))
    assert not torch.equal(more, bases.resized(old, 24, seed=5, step=4))
    assert torch.equal(bases.resized(more, 4, 5, 3), old[:, :4])
    full = bases.resized(old, 50, seed=5, step=0)
    torch.testing.assert_close(full.mT @ full, torch.eye(50), atol=1e-4, rtol=0)
