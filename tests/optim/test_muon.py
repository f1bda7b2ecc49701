import copy
import io

import pytest
import torch

from molegrad import MoleGradConfig, MoleLinear, bases, reference
from molegrad.optim import Muon, matrix_param_groups, other_params
from molegrad.optim.factored import truncate
from molegrad.optim.muon import lr_scale
from tests.models import TinyGPT, perceptron
from tests.samples import orthonormal, randn, tokens

F64 = torch.float64


def config(mode="factored", method="tangent", **fields):
    return MoleGradConfig(
        **{"rank_k": 4, "target_layers": "all", "gradient_mode": mode, "method": method, **fields}
    )


def factored_layer(dtype=F64, **fields):
    return MoleLinear(24, 40, bias=False, dtype=dtype, config=config(**fields))


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
        left, right, *_ = reference.lowrank_grad(a, b, v)
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
                left, right, *_ = reference.lowrank_grad(a, b, v)
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


def test_weight_decay_scale_and_learning_rate():
    assert lr_scale("spectral", 4, 16) == 0.5 and lr_scale("original", 4, 16) == 1.0
    assert (
        lr_scale("match_rms_adamw", 4, 16) == pytest.approx(0.8) and lr_scale("none", 3, 5) == 1.0
    )
    for mode in ("dense", "factored"):
        layer = MoleLinear(24, 40, bias=False, dtype=F64, config=config(mode))
        optimizer = Muon(matrix_param_groups(layer), lr=0.1, weight_decay=0.5)
        before = layer.weight.detach().clone()
        layer(torch.zeros(3, 24, dtype=F64)).sum().backward()
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), 0.95 * before)


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


def make(mode, method="tangent", seed=0, **fields):
    torch.manual_seed(seed)
    from molegrad import convert

    model = convert(TinyGPT(depth=1), config(mode, method, probes=2, **fields))
    groups = matrix_param_groups(model.h)
    muon = Muon(groups, lr=0.02)
    adam = torch.optim.AdamW(other_params(model, groups), lr=1e-3)
    return model, (muon, adam)


def train(model, optimizers, steps, start=0):
    losses = []
    for i in range(start, start + steps):
        idx = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(i % 3))
        logits = model(idx[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", ["tangent", "power"])
@pytest.mark.parametrize("mode", ["dense", "factored"])
def test_it_trains(mode, method):
    losses = train(*make(mode, method), 60)
    assert losses[-1] < 0.7 * losses[0]


def test_groups_cover_every_parameter_once():
    for mode in ("dense", "factored"):
        model, (muon, adam) = make(mode)
        owned = [p for o in (muon, adam) for g in o.param_groups for p in g["params"]]
        assert len({id(p) for p in owned}) == len(owned)
        assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
        kinds = [g["kind"] for g in muon.param_groups]
        assert kinds == (["factored"] if mode == "factored" else ["dense"])


@pytest.mark.parametrize("mode", ["dense", "factored"])
def test_state_dict_resumes_bit_exactly_with_weights_only(mode):
    from molegrad import bases_state_dict, load_bases_state_dict

    model, optimizers = make(mode)
    train(model, optimizers, 5)
    file = io.BytesIO()
    saved = {"model": model.state_dict(), "bases": bases_state_dict(model),
             "optimizers": [o.state_dict() for o in optimizers]}  # fmt: skip
    torch.save(saved, file)
    expected = train(model, optimizers, 5, start=5)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh, fresh_optimizers = make(mode, seed=7)
    fresh.load_state_dict(loaded["model"])
    load_bases_state_dict(fresh, loaded["bases"])
    for optimizer, state in zip(fresh_optimizers, loaded["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    assert train(fresh, fresh_optimizers, 5, start=5) == expected
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


def test_bfloat16_weights_keep_a_float32_state():
    from molegrad import convert

    model = convert(TinyGPT(depth=1), config()).to(torch.bfloat16)
    groups = matrix_param_groups(model.h)
    optimizer = Muon(groups)
    model(torch.randint(50, (2, 5))).float().square().mean().backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    basis = model.h[0].mlp.c_fc.basis_u
    assert basis.dtype == optimizer.state[basis]["core"].dtype == torch.float32
    assert optimizer.state[basis]["basis"].data_ptr() == basis.data_ptr()
    assert model.h[0].mlp.c_fc.weight.dtype == torch.bfloat16


def test_schedulers_and_groups():
    model, (muon, _) = make("factored")
    scheduler = torch.optim.lr_scheduler.LambdaLR(muon, lambda step: 0.5**step)
    train(model, (muon,), 1)
    scheduler.step()
    assert all(g["lr"] == 0.01 for g in muon.param_groups)
    muon.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, 4))], "lr": 0.5})
    assert muon.param_groups[-1]["kind"] == "dense"


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ([torch.nn.Parameter(torch.zeros(3))], {}, "Muon is for matrices"),
        ([torch.nn.Parameter(torch.zeros(3, 3))], {"lr": -1.0}, "lr must lie between"),
        ([torch.nn.Parameter(torch.zeros(3, 3))], {"momentum": 2.0}, "momentum must lie between"),
        ([torch.nn.Parameter(torch.zeros(3, 3))], {"adjust_lr": "x"}, "adjust_lr must be one of"),
        ([{"params": [torch.nn.Parameter(torch.zeros(3, 3))], "kind": "x"}], {}, "kind must be"),
        (
            [{"params": [torch.nn.Parameter(torch.zeros(3, 3))], "kind": "factored"}],
            {},
            "a factored group holds weight.* without probes",
        ),
    ],
)
def test_bad_options(params, options, message):
    with pytest.raises(ValueError, match=message):
        Muon(params, **options)


def test_non_finite_gradients_show_in_the_weight_but_spare_the_bases():
    layer = factored_layer(torch.float32)
    before = layer.basis_v.detach().clone()
    a, b = tokens(50, 24, 40)
    a[0, 0] = float("nan")
    _, optimizer = step(layer, a, b)
    assert not layer.weight.isfinite().all()
    assert torch.equal(layer.basis_v, before)
    assert optimizer.state[layer.basis_u]["core"].isfinite().all()


def test_statistics_of_a_factored_layer():
    layer = factored_layer(torch.float32, probes=6)
    a, b = tokens(300, 24, 40, rank=20)
    for _ in range(3):
        layer.zero_grad()
        k = 4
        u, v = (x.detach()[:, :k].double().clone() for x in (layer.basis_u, layer.basis_v))
        _, optimizer = step(layer, a, b)
    stats = optimizer.state[layer.basis_v]["stats"]
    g = b.double().mT @ a.double()
    y, w = g @ v, g.mT @ u
    captured = w.square().sum() + (y - u @ (u.mT @ y)).square().sum()
    assert stats[1].item() == pytest.approx(captured.item(), rel=1e-4)
    assert stats[0].item() == pytest.approx(g.square().sum().item(), rel=0.5)
    assert stats[2] == 1 and stats[3] > 1 and 0 <= stats[4] <= 1


def test_extend_keeps_both_blocks():
    u = orthonormal(30, 5, dtype=F64)
    for block in (randn(30, 5, dtype=F64), torch.zeros(30, 5, dtype=F64), 2 * u):
        q, u_c, block_c = bases.extend(u, block, 1e3)
        torch.testing.assert_close(q @ u_c, u)
        torch.testing.assert_close(q @ block_c, block)
        torch.testing.assert_close(q.mT @ q, torch.eye(10, dtype=F64))


def test_perceptron_with_biases_splits():
    model = perceptron(config())
    groups = matrix_param_groups(model)
    assert [p.dim() for p in other_params(model, groups)] == [1, 1]
