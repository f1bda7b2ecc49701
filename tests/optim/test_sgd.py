import pytest
import torch

from molegrad.optim import SGD, matrix_param_groups
from tests.optim.common import F64, backward, estimate, factored_layer
from tests.samples import orthonormal, randn


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_dense_groups_are_torch(momentum, nesterov):
    ours, theirs = (torch.nn.Parameter(randn(6, 10)) for _ in range(2))
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
    optimizers = SGD([ours], **options), torch.optim.SGD([theirs], **options)
    for seed in range(4):
        ours.grad, theirs.grad = randn(6, 10, seed=seed), randn(6, 10, seed=seed)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert bool(optimizers[0].state[ours]) == (momentum > 0)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("method", ["tangent", "power"])
@pytest.mark.parametrize("decay", [1.0, 0.75])
def test_factored_is_dense_where_the_rank_suffices(momentum, nesterov, method, decay):
    """Gradients with three modes, in which the bases (k = 4) start; exploration takes the fourth
    direction alone, so that the momentum loses nothing."""
    layer = factored_layer(method=method, warm_start_decay=decay)
    left, right = orthonormal(40, 3, 1, F64), orthonormal(24, 3, 2, F64)
    with torch.no_grad():
        for basis, modes in ((layer.basis_u, left), (layer.basis_v, right)):
            basis.copy_(torch.linalg.qr(torch.cat([modes, basis[:, 3:]], 1))[0])
    dense = torch.nn.Parameter(layer.weight.detach().clone())
    options = {"lr": 0.01, "momentum": momentum, "nesterov": nesterov and momentum > 0}
    optimizer = SGD(matrix_param_groups(layer), **options)
    reference = torch.optim.SGD([dense], **options)
    for seed in range(6):
        a = randn(50, 3, seed=seed, dtype=F64) @ right.mT
        b = randn(50, 3, seed=seed + 50, dtype=F64) @ left.mT
        layer.zero_grad()
        layer(a).backward(b)
        optimizer.step()
        dense.grad = b.mT @ a
        reference.step()
        torch.testing.assert_close(layer.weight, dense, rtol=1e-10, atol=1e-12)


def test_the_momentum_is_truncated_to_its_leading_modes():
    layer = factored_layer(warm_start_decay=1.0)
    optimizer = SGD(
        matrix_param_groups(layer), lr=1.0, momentum=0.9, nesterov=False, truncation_iters=400
    )
    momentum = torch.zeros(40, 24, dtype=F64)
    for seed in range(3):
        backward(layer, seed)
        momentum = 0.9 * momentum + estimate(layer)
        before = layer.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - layer.weight.detach(), momentum)
        left, s, right = torch.linalg.svd(momentum)
        momentum = left[:, :4] @ torch.diag(s[:4]) @ right[:4]
        core = optimizer.state[layer.basis_u]["core"]
        kept = layer.basis_u.detach() @ core @ layer.basis_v.detach().mT
        torch.testing.assert_close(kept, momentum, rtol=1e-5, atol=1e-6 * s[0].item())
