import pytest
import torch

from molegrad.optim import newton_schulz
from tests.samples import randn


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5), (3, 9, 4), (1, 7)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    g = randn(*shape)
    polar = newton_schulz(g)
    values = torch.linalg.svdvals(polar)
    assert polar.dtype == torch.float32 and (values > 0.6).all() and (values < 1.3).all()
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    cosine = (polar * (left @ right)).sum() / (polar.norm() * (left @ right).norm())
    assert cosine > 0.97


def test_scale_does_not_matter_and_zero_stays_zero():
    g = randn(6, 9)
    torch.testing.assert_close(newton_schulz(g), newton_schulz(1e4 * g), rtol=1e-3, atol=1e-4)
    assert torch.equal(newton_schulz(torch.zeros(4, 6)), torch.zeros(4, 6))
