import pytest
import torch

from molegrad.optim import Adafactor, matrix_param_groups
from tests.optim.common import F64, backward, estimate, factored_layer
from tests.samples import randn


def test_dense_groups_are_torch_where_epsilon_is_small():
    ours, theirs = (torch.nn.Parameter(randn(6, 10, dtype=F64)) for _ in range(2))
    optimizers = (
        Adafactor([ours], lr=0.02, weight_decay=0.1),
        torch.optim.Adafactor([theirs], lr=0.02, weight_decay=0.1),
    )
    for seed in range(5):
        for p in (ours, theirs):
            p.grad = randn(6, 10, seed=seed, dtype=F64) * 10.0**seed
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def paper(weight, gradients, lr, eps, clip, decay, relative):
    """Algorithm 4 of Shazeer and Stern (2018), with sums as written there."""
    (m, n), (eps1, eps2) = weight.shape, eps
    r, c = torch.zeros(m, 1, dtype=F64), torch.zeros(1, n, dtype=F64)
    x = weight.clone()
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**decay
        alpha = lr
        if relative:
            alpha = max(eps2, x.square().mean().sqrt().item()) * min(lr, t**-0.5)
        r = beta * r + (1 - beta) * (g**2 + eps1) @ torch.ones(n, 1, dtype=F64)
        c = beta * c + (1 - beta) * torch.ones(1, m, dtype=F64) @ (g**2 + eps1)
        v = r @ c / (torch.ones(1, m, dtype=F64) @ r)
        u = g / v.sqrt()
        x = x - alpha * u / max(1.0, u.square().mean().sqrt().item() / clip)
    return x


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("eps", [(1e-30, 1e-3), (0.01, 3.0)])
def test_the_algorithm_of_the_paper(relative, eps):
    gradients = [randn(6, 10, seed=s, dtype=F64) * 0.1 for s in range(4)]
    weight = torch.nn.Parameter(randn(6, 10, dtype=F64))
    options = {"lr": 0.6, "eps": eps, "clip": 0.7, "beta2_decay": -0.6, "relative": relative}
    expected = paper(weight.detach(), gradients, 0.6, eps, 0.7, -0.6, relative)
    optimizer = Adafactor([weight], **options)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "relative", "k", "eps1", "clip"),
    [
        ("tangent", True, 4, 10.0, 0.1),
        ("tangent", False, 15, 1e-30, 9.0),
        ("power", True, 15, 1e-30, 1.0),
        ("power", False, 4, 10.0, 0.1),
    ],
)
def test_factored_is_dense_with_the_materialised_estimate(method, relative, k, eps1, clip):
    options = {
        "lr": 0.1, "eps": (eps1, 1e-3), "relative": relative, "clip": clip, "weight_decay": 0.1,
    }  # fmt: skip
    layers = torch.nn.ModuleList(factored_layer(k=k, method=method) for _ in range(2))
    optimizer = Adafactor(matrix_param_groups(layers), **options)
    dense = [torch.nn.Parameter(layer.weight.detach().clone()) for layer in layers]
    reference = Adafactor(dense, **options)
    for seed in range(5):
        for i, layer in enumerate(layers):
            backward(layer, 7 * seed + i)
            dense[i].grad = estimate(layer)
        optimizer.step()
        reference.step()
        for i, layer in enumerate(layers):
            torch.testing.assert_close(layer.weight, dense[i], rtol=1e-9, atol=1e-11)
            row, column = (
                optimizer.state[basis][name]
                for basis, name in ((layer.basis_u, "row"), (layer.basis_v, "column"))
            )
            torch.testing.assert_close(row, reference.state[dense[i]]["row"])
            torch.testing.assert_close(column, reference.state[dense[i]]["column"])


def test_float32_is_close_to_float64():
    """Also with rows and columns of very different size."""
    layer = factored_layer(torch.float32)
    dense = torch.nn.Parameter(layer.weight.detach().double())
    options = {"lr": 0.1, "relative": False, "clip": 0.1}
    optimizer = Adafactor(matrix_param_groups(layer), **options)
    reference = Adafactor([dense], **options)
    for seed in range(4):
        a, b = randn(50, 24, seed=seed), randn(50, 40, seed=seed + 9)
        a, b = a * torch.logspace(0, -4, 24), b * torch.logspace(-4, 0, 40)
        layer.zero_grad()
        layer(a).backward(b)
        dense.grad = _estimate64(layer)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(layer.weight.double(), dense, rtol=1e-4, atol=1e-5)


def _estimate64(layer):
    u, v = layer.basis_u.detach().double(), layer.basis_v.detach().double()
    y, w = layer.basis_u.grad.double(), layer.basis_v.grad.double()
    return u @ w.mT + (y - u @ (u.mT @ y)) @ v.mT


def test_the_step_is_a_share_of_the_weight_or_the_rate_itself():
    for relative, expected in ((True, 0.05 * 2.0), (False, 0.05)):
        layer = factored_layer()
        torch.nn.init.normal_(layer.weight, std=2.0)
        optimizer = Adafactor(matrix_param_groups(layer), lr=0.05, relative=relative)
        before = layer.weight.detach().clone()
        backward(layer)
        optimizer.step()
        step = (layer.weight.detach() - before).square().mean().sqrt().item()
        assert step == pytest.approx(expected, rel=0.1)
