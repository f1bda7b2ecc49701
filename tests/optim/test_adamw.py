import pytest
import torch

from molegrad.estimators.lowrank_sums import explored_directions
from molegrad.optim import AdamW, matrix_param_groups
from molegrad.optim.adamw import carried_second_moment
from tests.optim.common import F64, backward, estimate, factored_layer
from tests.samples import orthonormal, randn


def test_dense_groups_are_torch():
    ours, theirs = (torch.nn.Parameter(randn(6, 10)) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = AdamW([ours], **options), torch.optim.AdamW([theirs], fused=True, **options)
    for seed in range(4):
        ours.grad, theirs.grad = randn(6, 10, seed=seed), randn(6, 10, seed=seed)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["tangent", "power"])
def test_factored_is_dense_where_the_basis_is_axis_aligned(method):
    """The gradient's left modes are four of the outputs at every step: the subspace's coordinates
    are those of the weight."""
    layer = factored_layer(method=method, warm_start_decay=1.0)
    modes = orthonormal(24, 4, 2, F64)
    with torch.no_grad():
        layer.basis_u.copy_(torch.eye(40, 4, dtype=F64))
        layer.basis_v.copy_(modes)
    dense = torch.nn.Parameter(layer.weight.detach().clone())
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    optimizer = AdamW(matrix_param_groups(layer), **options)
    reference = torch.optim.AdamW([dense], **options)
    for seed in range(8):
        a = modes.mT * (0.1 + randn(4, 1, seed=seed, dtype=F64).abs())
        b = torch.eye(4, 40, dtype=F64)
        layer.zero_grad()
        layer(a).backward(b)
        optimizer.step()
        dense.grad = b.mT @ a
        reference.step()
        torch.testing.assert_close(layer.weight, dense, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.basis_u.detach(), torch.eye(40, 4, dtype=F64))


@pytest.mark.parametrize(("method", "decay"), [("tangent", 1.0), ("power", 0.75)])
def test_steps_follow_the_formulas_when_the_basis_turns(method, decay):
    layer = factored_layer(method=method, warm_start_decay=decay)
    (b1, b2), lr, eps = (0.8, 0.9), 0.01, 1e-4
    optimizer = AdamW(
        matrix_param_groups(layer), lr=lr, betas=(b1, b2), eps=eps, weight_decay=0.5,
        truncation_iters=400,
    )  # fmt: skip
    explored = explored_directions(4, decay)
    first, second = torch.zeros(24, 4, dtype=F64), torch.zeros(24, 4, dtype=F64)
    for t in range(1, 5):
        backward(layer, t)
        gradient, u = estimate(layer), layer.basis_u.detach().clone()
        before = layer.weight.detach().clone()
        optimizer.step()
        average = b1 * u @ first.mT + (1 - b1) * gradient
        turned = torch.linalg.svd(average)[0][:, :4]  # up to the signs of its columns
        kept = layer.basis_u.detach()[:, : 4 - explored]
        sign = (turned[:, : 4 - explored] * kept).sum(0).sign()
        torch.testing.assert_close(turned[:, : 4 - explored] * sign, kept, rtol=1e-4, atol=1e-6)

        rotation, new = torch.zeros(4, 4, dtype=F64), torch.zeros(24, 4, dtype=F64)
        for i in range(4):
            for j in range(4):
                rotation[i, j] = u[:, i] @ turned[:, j]
        if t > 1:
            m_hat, v_hat = first / (1 - b1 ** (t - 1)), second / (1 - b2 ** (t - 1))
            for j in range(4):
                variance = sum(rotation[i, j] ** 2 * (v_hat - m_hat**2)[:, i] for i in range(4))
                mean = sum(rotation[i, j] * m_hat[:, i] for i in range(4))
                new[:, j] = (1 - b2 ** (t - 1)) * (variance + mean**2).abs()
        g = gradient.mT @ turned
        first = b1 * first @ rotation + (1 - b1) * g
        second = b2 * new + (1 - b2) * g**2
        update = first / (1 - b1**t) / ((second / (1 - b2**t)).sqrt() + eps)
        expected = before * (1 - lr * 0.5) - lr * turned @ update.mT
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-7)

        # The test goes on in the layer's own coordinates, whose signs may be other ones.
        state = optimizer.state[layer.basis_v]
        torch.testing.assert_close(state["exp_avg_sq"], second, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            state["exp_avg"][:, : 4 - explored], first[:, : 4 - explored] * sign,
            rtol=1e-4, atol=1e-6,
        )  # fmt: skip
        assert not state["exp_avg"][:, 4 - explored :].any()
        first, second = state["exp_avg"].clone(), state["exp_avg_sq"].clone()


def test_the_second_moment_stays_where_the_basis_does():
    first, second = randn(2, 9, 4, dtype=F64) * 0.1, randn(2, 9, 4, dtype=F64).abs()
    eye, step = torch.eye(4, dtype=F64).expand(2, 4, 4), torch.full((2, 1, 1), 3.0, dtype=F64)
    same = carried_second_moment(first, second, eye, step, (0.9, 0.95))
    torch.testing.assert_close(same, second)
    swapped = carried_second_moment(first, second, -eye.flip(-1), step, (0.9, 0.95))
    torch.testing.assert_close(swapped, second.flip(-1))
    start = carried_second_moment(0 * first, 0 * second, eye, 0 * step, (0.9, 0.95))
    assert (start == 0).all()
