import pytest
import torch

from molegrad.ops.power import lowrank_grad_reference
from molegrad.optim import Muon, matrix_param_groups, newton_schulz
from molegrad.optim.muon import lr_scale
from molegrad.optim.muon import polar as polar_of_cores
from tests.optim.common import F64, factored_layer
from tests.samples import randn, tokens


def step(layer, a, b, **options):
    options = {"lr": 0.1, "momentum": 0.0, "nesterov": False, "adjust_lr": "none", **options}
    optimizer = Muon(matrix_param_groups(layer), **options)
    before = layer.weight.detach().clone()
    layer(a).backward(b)
    optimizer.step()
    return (before - layer.weight.detach()) / options["lr"], optimizer


def polar(g: torch.Tensor, tolerance: float = 1e-6) -> torch.Tensor:
    left, s, right = torch.linalg.svd(g, full_matrices=False)
    return left @ torch.diag((s > tolerance * s[0]).to(g.dtype)) @ right


@pytest.mark.parametrize("method", ["tangent", "power"])
def test_the_first_update_is_the_polar_factor_of_the_estimate(method):
    layer = factored_layer(method=method)
    u, v = layer.basis_u.detach().clone(), layer.basis_v.detach().clone()
    a, b = tokens(100, 24, 40, F64, rank=20)
    g = b.mT @ a
    if method == "tangent":
        y, w = g @ v, g.mT @ u
        estimate = u @ w.mT + (y - u @ (u.mT @ y)) @ v.mT
    else:
        left, right, *_ = lowrank_grad_reference(a, b, v)
        estimate = left @ right.mT
    update, _ = step(layer, a, b)
    torch.testing.assert_close(update, polar(estimate), rtol=1e-5, atol=1e-6)


def test_gradient_and_momentum_cores_stand_for_their_matrices():
    """Two steps against the same recursion on matrices of full size, with an exact truncation."""
    for method in ("tangent", "power"):
        k, mu = 4, 0.9
        layer = factored_layer(method=method, warm_start_decay=1.0)
        optimizer = Muon(
            matrix_param_groups(layer),
            lr=0.1, momentum=mu, nesterov=True, adjust_lr="none", truncation_iters=400,
        )  # fmt: skip
        momentum = torch.zeros(40, 24, dtype=F64)
        for i in range(3):
            u, v = layer.basis_u.detach().clone(), layer.basis_v.detach().clone()
            a, b = tokens(100, 24, 40, F64, rank=7, seed=10 * i)
            g = b.mT @ a
            y, w = g @ v, g.mT @ u
            estimate = u @ w.mT + (y - u @ (u.mT @ y)) @ v.mT
            if method == "power":
                left, right, *_ = lowrank_grad_reference(a, b, v)
                estimate = left @ right.mT
            before = layer.weight.detach().clone()
            layer.zero_grad()
            layer(a).backward(b)
            optimizer.step()
            momentum = mu * momentum + (1 - mu) * estimate
            expected = polar(mu * momentum + (1 - mu) * estimate)
            left, s, right = torch.linalg.svd(momentum)
            momentum = left[:, :k] @ torch.diag(s[:k]) @ right[:k]
            update = (before - layer.weight.detach()) / 0.1
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
            core = optimizer.state[layer.basis_u]["core"]
            kept = layer.basis_u.detach() @ core @ layer.basis_v.detach().mT
            torch.testing.assert_close(
                kept, momentum, rtol=1e-5, atol=1e-5 * momentum.norm().item()
            )


def test_the_learning_rate_follows_the_shape():
    assert lr_scale("spectral", 4, 16) == 0.5 and lr_scale("original", 4, 16) == 1.0
    assert lr_scale("match_rms_adamw", 4, 16) == pytest.approx(0.8)
    assert lr_scale("none", 3, 5) == 1.0


def test_dense_group_is_muon():
    weight = torch.nn.Parameter(randn(6, 10))
    optimizer = Muon([weight], lr=0.1, momentum=0.9, nesterov=False, adjust_lr="none")
    before, buffer = weight.detach().clone(), torch.zeros(6, 10)
    for i in range(3):
        weight.grad = randn(6, 10, seed=i)
        buffer = 0.9 * buffer + 0.1 * weight.grad
        optimizer.step()
        update = (before - weight.detach()) / 0.1
        cosine = (update * polar(buffer)).sum() / (update.norm() * polar(buffer).norm())
        assert cosine > 0.97
        before = weight.detach().clone()


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


@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9)])
def test_the_polar_factor_of_cores_of_every_shape(shape):
    core = randn(2, *shape, dtype=F64)
    expected = torch.stack([polar(each) for each in core])
    torch.testing.assert_close(polar_of_cores(core), expected, rtol=1e-6, atol=1e-7)
