import pytest
import torch

from molegrad.optim import Muon, matrix_param_groups
from molegrad.optim.bucket import estimate, extend, truncate, two_sided
from tests.optim import common
from tests.optim.common import F64, backward
from tests.samples import orthonormal, randn


def test_extend_keeps_both_blocks():
    for rows in (30, 9):  # with room for both, and without
        u = orthonormal(rows, 5, dtype=F64).expand(2, rows, 5)
        for block in (randn(2, rows, 5, dtype=F64), torch.zeros(2, rows, 5, dtype=F64), 2 * u):
            q, u_c, block_c = extend(u, block, 1e3)
            width = min(10, rows)
            torch.testing.assert_close(q @ u_c, u)
            torch.testing.assert_close(q @ block_c, block)
            torch.testing.assert_close(q.mT @ q, torch.eye(width, dtype=F64).expand(2, -1, -1))


def test_truncation_keeps_the_leading_modes_in_order():
    core = randn(3, 16, 16, dtype=F64)
    start = torch.eye(16, 8, dtype=F64).expand(3, 16, 8)
    p, s, q, condition = truncate(core, start, 200, 1e3)
    best = torch.linalg.svdvals(core)[:, :8]
    torch.testing.assert_close(torch.linalg.svdvals(s), best, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(condition, best[:, 0] / best[:, -1], rtol=0.05, atol=0)
    rough = torch.linalg.svdvals(truncate(core, start, 2, 1e3)[1]).square().sum(-1)
    assert (rough > 0.9 * best.square().sum(-1)).all()
    assert p.shape == q.shape == (3, 16, 8)


@pytest.mark.parametrize(("method", "trust"), [("tangent", False), ("tangent", True), ("power", 0)])
@pytest.mark.parametrize("k", [4, 13])
def test_both_forms_are_the_estimate(method, trust, k):
    model = torch.nn.ModuleList(
        common.factored_layer(k=k, method=method, trust_scaling=bool(trust), probes=3)
        for _ in range(2)
    )
    optimizer = Muon(matrix_param_groups(model))
    for seed, layer in enumerate(model):
        backward(layer, seed, rank=20)
    (bucket,) = optimizer._buckets(optimizer.param_groups[0])
    assert (bucket.size, bucket.shape, bucket.rank) == (2, (40, 24), k)
    est = estimate(bucket)
    right, v_c, core = two_sided(bucket, est)
    one_sided = est.left @ est.sketch.matrix()
    torch.testing.assert_close(one_sided, est.left @ core @ right.mT)
    torch.testing.assert_close(right @ v_c, bucket.v)
    for i, layer in enumerate(model):
        plain = common.estimate(layer)
        torch.testing.assert_close(est.captured_sq[i], plain.square().sum())
        torch.testing.assert_close(one_sided[i], est.trust[i] * plain)
    assert (est.trust > 1).all() if trust and k == 4 else (est.trust >= 1).all()
    assert est.norm_sq.isnan().all() if method == "power" else est.norm_sq.isfinite().all()


def test_trust_scaling_of_the_power_method_is_refused():
    with pytest.raises(ValueError, match="needs method='tangent', got 'power'"):
        common.factored_layer(method="power", trust_scaling=True, probes=2)


def test_exploration_replaces_the_weakest_and_differs_between_layers_and_steps():
    layers = torch.nn.ModuleList(
        common.factored_layer(warm_start_decay=0.75, probes=1) for _ in range(2)
    )
    still = torch.nn.ModuleList(
        common.factored_layer(warm_start_decay=1.0, probes=1) for _ in range(2)
    )
    optimizers = [Muon(matrix_param_groups(x)) for x in (layers, still)]
    seen = []
    for step in range(2):
        for model, optimizer in zip((layers, still), optimizers, strict=True):
            for layer in model:
                backward(layer, seed=3)
            optimizer.step()
        if step == 0:  # the same gradients: only the last direction differs
            a, b = layers[0].basis_u.detach(), still[0].basis_u.detach()
            torch.testing.assert_close(a[:, :3], b[:, :3])
            assert (a[:, 3] @ b[:, 3]).abs() < 0.9
            assert (a[:, :3].mT @ a[:, 3]).abs().max() < 1e-12
        for layer in layers:  # nor is there momentum along the new one
            core = optimizers[0].state[layer.basis_u]["core"]
            assert not core[3].any() and not core[:, 3].any() and core[:3, :3].all()
        seen += [layer.basis_u.detach()[:, 3:].clone() for layer in layers]
    for i in range(4):
        assert set(seen[i][:, 1].tolist()) == {-1.0, 1.0}  # the probe
        for j in range(i):
            assert (seen[i][:, 0] @ seen[j][:, 0]).abs() < 0.9
            assert not torch.equal(seen[i][:, 1], seen[j][:, 1])


def test_both_sides_of_a_square_layer_explore_differently():
    layer = common.factored_layer(n=30, m=30, warm_start_decay=0.0, probes=1)
    optimizer = Muon(matrix_param_groups(layer))
    backward(layer)
    optimizer.step()
    u, v = layer.basis_u.detach(), layer.basis_v.detach()
    assert torch.linalg.matrix_norm(u[:, :4].mT @ v[:, :4], 2) < 0.95
    assert not torch.equal(u[:, 4], v[:, 4])
