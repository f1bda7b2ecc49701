"""Every peer: learning, bytes of state, options, first gradients of zero; Dion's formula."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from molegrad.lab.peers import OPTIONS, PEERS, Peer
from molegrad.monitor import memory_bytes
from tests.samples import orthonormal, randn

F64 = torch.float64
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch", "fira": "fira"}
LR = {"dion": 0.02}  # others 0.005


def need(name: str) -> None:
    """Skip where the package is missing. It is looked for, not imported: importing it whole needs
    bitsandbytes, which the peers do not."""
    package = PACKAGES.get(name)
    if package is not None:
        pytest.importorskip("transformers")
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'molegrad[peers]'")


def make(name, params, lr=None, rank=4, **options):
    need(name)
    return Peer(name, rank, options).build(list(params), LR.get(name, 0.005) if lr is None else lr)


def net():
    """Two layers, wide and tall."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 8, bias=False))


def train(model, optimizer, steps):
    losses = []
    for i in range(steps):
        x = randn(32, 12, seed=i % 4)
        loss = (model(x) - x[:, :8].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def filled(name, rank=4, **options):
    """An optimizer, its parameters, and a function that takes one step with given gradients."""
    params = [nn.Parameter(randn(*shape, seed=30)) for shape in ((10, 16), (16, 10), (12, 12))]
    optimizer = make(name, params, 0.01, rank, **options)

    def step(seed=0, zero=False):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p) if zero else randn(*p.shape, seed=seed)
        optimizer.step()
        return [old - p.detach() for old, p in zip(before, params, strict=True)]

    return optimizer, params, step


STATE = {  # numbers kept of an (m, n) matrix of smaller side d and larger side D, at rank r
    "galore": lambda m, n, d, D, r: d * r + 2 * r * D,
    "apollo": lambda m, n, d, D, r: d * r + 2 * r * D + 1,  # 1: the norm that limits its growth
    "fira": lambda m, n, d, D, r: d * r + 2 * r * D + 1,
    "dion": lambda m, n, d, D, r: m * n + n * r,
}


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_learns_and_keeps_what_its_paper_says(name):
    model = net()
    optimizer = make(name, model.parameters())
    losses = train(model, optimizer, 150)
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    shapes = [tuple(p.shape) for p in model.parameters()]
    numbers = sum(STATE[name](*s, min(s), max(s), 4) for s in shapes)
    assert memory_bytes(model, [optimizer])["optimizer_state"] == 4 * numbers
    for tensor in (t for state in optimizer.state.values() for t in state.values()):
        if isinstance(tensor, torch.Tensor):  # no view that keeps more alive than it shows
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("name", PEERS)
def test_learning_rates_are_read_from_the_groups_at_every_step(name):
    changes = []
    for lr in (0.0, 0.001, 0.002):
        optimizer, _, step = filled(name, weight_decay=0.1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        changes.append(step())
    for none, slow, fast in zip(*changes, strict=True):
        assert not none.any() and slow.any()
        torch.testing.assert_close(2 * slow, fast, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_a_first_gradient_of_zero_does_not_spoil_the_subspace(name):
    _, params, step = filled(name)
    _, others, other_step = filled(name)
    other_step(zero=True)
    for seed in range(3):
        step(seed)
        other_step(seed)
    assert all(torch.equal(p, other) for p, other in zip(params, others, strict=True))


@pytest.mark.parametrize("name", PEERS)
def test_a_rank_can_be_a_share_of_the_smaller_side_and_is_checked(name):
    params = [nn.Parameter(randn(*shape)) for shape in ((16, 24), (48, 32), (16, 16))]
    groups = make(name, params, rank=0.25).param_groups
    ranks = {tuple(p.shape): group["rank"] for group in groups for p in group["params"]}
    assert ranks == {(16, 24): 4, (48, 32): 8, (16, 16): 4}
    with pytest.raises(ValueError, match="rank 17 is more than a matrix of shape .*at most 16"):
        make(name, params, rank=17)


CHANGED = {"betas": (0.1, 0.5), "eps": 1.0, "weight_decay": 3.0, "update_proj_gap": 1, "scale": 4.0}
CHANGED |= {"proj_type": "left", "scale_type": "tensor", "alpha": 1.0, "momentum": 0.5, "seed": 1}


@pytest.mark.parametrize(
    "name, option", [(name, option) for name in PEERS for option in OPTIONS[name]]
)
def test_every_option_reaches_the_optimizer(name, option):
    _, params, step = filled(name)
    _, others, other_step = filled(name, **{option: CHANGED[option]})
    for seed in range(2):
        step(seed)
        other_step(seed)
    assert any(not torch.allclose(p, q, 1e-4) for p, q in zip(params, others, strict=True))


def test_what_the_packages_make_of_a_gradient():
    for change in filled("galore")[2]():
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4
    for change in filled("fira")[2]():
        assert torch.linalg.matrix_rank(change, rtol=1e-4) > 4
    ratios = filled("apollo")[2]()[1] / randn(16, 10)  # a tall matrix: one step size a row
    torch.testing.assert_close(ratios, ratios[:, :1].expand(16, 10), rtol=1e-3, atol=1e-6)
    _, _, mini = filled("apollo", rank=1, scale=128.0, scale_type="tensor")
    ratio = mini()[0] / randn(10, 16)  # APOLLO-Mini: one step size for all
    torch.testing.assert_close(ratio, ratio.mean().expand(10, 16), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_errors_name_the_value_and_the_remedy(name):
    with pytest.raises(ValueError, match=f"{name} has no option nonsense: it takes .*weight_decay"):
        Peer(name, 2, {"nonsense": 1})
    with pytest.raises(ValueError, match="(lr|learning rate)"):
        make(name, [nn.Parameter(torch.zeros(6, 10))], -0.01, 2)


def test_more_errors(monkeypatch):
    for name, options, message in (
        ("sgd", {}, "unknown peer 'sgd': choose among galore"),
        ("galore", {"proj_type": "up"}, "proj_type must be one of std, left, right; got 'up'"),
        ("apollo", {"scale_type": "row"}, "scale_type must be one of channel, tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            Peer(name, 2, options)
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\), got lr=0.01, momentum=1.0"):
        Peer("dion", 2, {"momentum": 1.0}).build([nn.Parameter(torch.zeros(6, 10))], 0.01)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in PACKAGES.items():
        with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'moleg"):
            Peer(name, 2).build([nn.Parameter(torch.zeros(6, 10))], 0.01)


def test_the_packages_themselves_stay_untouched():
    """In a process of its own: nothing is imported under the packages' names, nor bitsandbytes."""
    for name in PACKAGES:
        need(name)
    code = (
        "import sys, torch; from molegrad.lab.peers import Peer\n"
        "p = torch.nn.Parameter(torch.ones(6, 8))\n"
        f"for name in {list(PACKAGES)}: Peer(name, 2).build([p], 0.1)\n"
        f"print([m for m in {[*PACKAGES.values(), 'bitsandbytes']} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Dion


def dion(rank, shape, **options):
    """An optimizer of one matrix in float64, and step(gradient) -> its direction."""
    p = nn.Parameter(randn(*shape, seed=50, dtype=F64))
    optimizer = Peer("dion", rank, options).build([p], 0.02)

    def step(gradient):
        before, p.grad = p.detach().clone(), gradient.clone()
        optimizer.step()
        return (before - p.detach()) / 0.02

    return optimizer.state[p], step


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize("rank", [2, 6])
def test_dions_error_feedback_loses_nothing(shape, rank):
    """M + (1 − μ) P Rᵀ is the old M plus G, and the update is √(m/n) P Qᵀ."""
    mu = 0.9
    state, step = dion(rank, shape, momentum=mu)
    step(randn(*shape, seed=0, dtype=F64))
    for seed in range(1, 4):
        g, old, q_old = randn(*shape, seed=seed, dtype=F64), state["momentum"].clone(), state["q"]
        change = step(g)
        left = torch.linalg.qr((old + g) @ q_old)[0]
        right = (old + g).mT @ left
        q = right / right.norm(dim=0)
        torch.testing.assert_close(state["q"], q)
        torch.testing.assert_close(change, (shape[0] / shape[1]) ** 0.5 * left @ q.mT)
        torch.testing.assert_close(state["momentum"] + (1 - mu) * left @ right.mT, old + g)


def test_dion_of_full_rank_is_heavy_ball_momentum_whose_update_becomes_polar():
    state, step = dion(6, (6, 9), momentum=0.5)
    left, right = orthonormal(6, 6, 1, F64), orthonormal(9, 6, 2, F64)
    g = left @ torch.diag(torch.tensor([32.0, 16, 8, 4, 2, 1], dtype=F64)) @ right.mT
    momentum = torch.zeros(6, 9, dtype=F64)
    for _ in range(40):
        change = step(g)
        momentum = 0.5 * (momentum + g)
        torch.testing.assert_close(state["momentum"], momentum)
    scale = (6 / 9) ** 0.5
    torch.testing.assert_close(change, scale * left @ right.mT, rtol=1e-6, atol=1e-6)


def test_dion_keeps_its_directions_through_a_gradient_of_zero():
    state, step = dion(3, (6, 9))
    step(randn(6, 9, seed=0, dtype=F64))
    state["momentum"].zero_()
    q = state["q"].clone()
    assert not step(torch.zeros(6, 9, dtype=F64)).any() and torch.equal(state["q"], q)
