"""Every peer: three steps, zero learning rates, resumed runs, bytes of state, clear errors."""

import importlib.util
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from molegrad.gpt.train import checkpoint, setup
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.gpt.train.logger import RunLogger
from molegrad.gpt.train.loop import Trainer
from molegrad.lab import peers
from molegrad.lab.peers import PEERS, build
from molegrad.monitor import memory_bytes
from molegrad.optim import Muon
from tests.gpt.model.test_gpt import small
from tests.gpt.train.test_loop import Batches
from tests.samples import randn

PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch", "fira": "fira"}
IN_BACKWARD = [name for name in PEERS if name.startswith("in-backward")]
ORDINARY = [name for name in PEERS if name not in IN_BACKWARD]
LOW_RANK = [name for name in ORDINARY if name not in ("adamw", "muon")]
OWN = [name for name in PEERS if name.split("-")[0] not in PACKAGES]
LR = {"muon": 0.02, "mofasgd": 0.02, "dion": 0.02, "in-backward-muon": 0.02}  # others 0.005


def need(name: str) -> None:
    """Skip where the package is missing. It is looked for, not imported: importing it whole needs
    bitsandbytes, which the peers do not."""
    package = PACKAGES.get(name.split("-")[0])
    if package is not None:
        pytest.importorskip("transformers")
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'molegrad[peers]'")


def net(seed=1):
    """Two layers, wide and tall."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 8, bias=False))


def make(name, model, lr=None, rank=4, **options):
    need(name)
    lr = LR.get(name, 0.005) if lr is None else lr
    return build(name, list(model.parameters()), lr, rank, **options)


def train(model, optimizer, steps, start=0):
    losses = []
    for i in range(start, start + steps):
        x = randn(32, 12, seed=i % 4)
        loss = (model(x) - x[:, :8].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def assert_close(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def filled(name, rank=4, **options):
    """An optimizer, its parameters, and a function that takes one step with given gradients."""
    need(name)
    params = [nn.Parameter(randn(*shape, seed=30)) for shape in ((10, 16), (16, 10), (12, 12))]
    optimizer = build(name, params, 0.01, rank, **options)

    def step(seed=0, zero=False):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p) if zero else randn(*p.shape, seed=seed)
        optimizer.step()
        return [old - p.detach() for old, p in zip(before, params, strict=True)]

    return optimizer, params, step


@pytest.mark.parametrize("name", PEERS)
def test_three_steps_in_float32_on_the_cpu(name):
    model = net()
    before = weights(model)
    losses = train(model, make(name, model), 3)
    for old, p in zip(before, model.parameters(), strict=True):
        assert p.dtype == torch.float32 and p.isfinite().all()
        assert (p.detach() - old).norm() > 1e-3 * old.norm()
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_learns(name):
    model = net()
    losses = train(model, make(name, model), 150)
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


@pytest.mark.parametrize("name", PEERS)
def test_a_learning_rate_of_zero_changes_nothing(name):
    model = net()
    optimizer = make(name, model, lr=0.0, weight_decay=0.1)
    before = weights(model)
    train(model, optimizer, 3)
    assert_equal(weights(model), before)


@pytest.mark.parametrize("name", PEERS)
def test_learning_rates_are_read_from_the_groups_at_every_step(name):
    slow, fast = net(), net()
    moved = []
    for model, lr in ((slow, 0.001), (fast, 0.002)):
        optimizer = make(name, model, lr=1.0)
        before = weights(model)
        for group in optimizer.param_groups:
            group["lr"] = lr
        train(model, optimizer, 1)
        moved.append([old - p for old, p in zip(before, weights(model), strict=True)])
    assert_close([2 * change for change in moved[0]], moved[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_state_dict_resumes_bit_exactly_with_weights_only(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 4, start=4)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = net(seed=2)
    fresh.load_state_dict(loaded["model"])
    resumed = make(name, fresh, lr=0.5)
    resumed.load_state_dict(loaded["optimizer"])
    train(fresh, resumed, 4, start=4)
    assert_equal(weights(model), weights(fresh))
    held = [
        memory_bytes(m, [o])["optimizer_state"] for m, o in ((model, optimizer), (fresh, resumed))
    ]
    assert held[0] == held[1]


@pytest.mark.parametrize("name", PEERS)
def test_asking_for_the_state_dict_leaves_the_optimizer_as_it_is(name):
    model, other = net(), net()
    asked, silent = make(name, model), make(name, other)
    for i in range(4):
        train(model, asked, 1, start=i)
        asked.state_dict()
        train(other, silent, 1, start=i)
    assert_equal(weights(model), weights(other))


STATE = {  # numbers kept of an (m, n) matrix of smaller side d and larger side D, at rank r
    "adamw": lambda m, n, d, D, r: 2 * m * n,
    "muon": lambda m, n, d, D, r: m * n,
    "galore": lambda m, n, d, D, r: d * r + 2 * r * D,
    "apollo": lambda m, n, d, D, r: d * r + 2 * r * D + 1,  # 1: the norm that limits its growth
    "apollo-mini": lambda m, n, d, D, r: d + 2 * D + 1,
    "fira": lambda m, n, d, D, r: d * r + 2 * r * D + 1,
    "ldadam": lambda m, n, d, D, r: d * r + 2 * r * D + m * n,
    "mofasgd": lambda m, n, d, D, r: (m + n + 1) * r,
    "dion": lambda m, n, d, D, r: m * n + n * r,
    "in-backward-muon": lambda m, n, d, D, r: m * n,
    "in-backward-adamw": lambda m, n, d, D, r: 2 * m * n,
}


@pytest.mark.parametrize("name", PEERS)
def test_bytes_of_state_are_the_papers(name):
    model = net()
    optimizer = make(name, model)
    train(model, optimizer, 2)
    shapes = [tuple(p.shape) for p in model.parameters()]
    counters = 2 if "adamw" in name else 0  # torch's AdamW counts steps in tensors
    numbers = counters + sum(STATE[name](*s, min(s), max(s), 4) for s in shapes)
    assert memory_bytes(model, [optimizer])["optimizer_state"] == 4 * numbers
    for tensor in (t for state in optimizer.state.values() for t in state.values()):
        if isinstance(tensor, torch.Tensor):  # no view that keeps more alive than it shows
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_first_gradient_of_zero_does_not_spoil_the_subspace(name):
    _, params, step = filled(name)
    _, others, other_step = filled(name)
    other_step(zero=True)
    assert_equal(params, others)
    for seed in range(3):
        step(seed)
        other_step(seed)
    assert_equal(params, others)


@pytest.mark.parametrize("name", [n for n in LOW_RANK if n != "apollo-mini"])
def test_a_rank_can_be_a_share_of_the_smaller_side(name):
    need(name)
    params = [nn.Parameter(randn(*shape)) for shape in ((16, 24), (48, 32), (16, 16))]
    groups = build(name, params, 0.01, 0.25).param_groups
    ranks = {tuple(p.shape): group["rank"] for group in groups for p in group["params"]}
    assert ranks == {(16, 24): 4, (48, 32): 8, (16, 16): 4}


# What the options do


@pytest.mark.parametrize("name", ORDINARY)
def test_weight_decay_is_decoupled(name):
    _, params, plain = filled(name)
    before = [p.detach().clone() for p in params]
    _, _, decayed = filled(name, weight_decay=3.0)
    for w, change, both in zip(before, plain(), decayed(), strict=True):
        decayed_one = w if name in OWN else w - change  # a package decays after its step
        torch.testing.assert_close(both - change, 0.01 * 3.0 * decayed_one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in ORDINARY if n not in ("muon", "mofasgd", "dion")])
def test_betas_and_eps_reach_the_adam_within(name):
    _, _, plain = filled(name)
    _, _, damped = filled(name, eps=1e3)
    for full, small_one in zip(plain(), damped(), strict=True):
        assert small_one.norm() < 0.1 * full.norm()
    (_, _, plain), (_, _, changed) = filled(name), filled(name, betas=(0.1, 0.5))
    for seed, alike in ((0, True), (1, False)):  # corrected for bias, the first step is the same
        a, b = plain(seed)[0], changed(seed)[0]
        assert ((a - b).norm() < 0.02 * a.norm()) == alike


def test_galores_options():
    _, _, step = filled("galore", scale=1.0)
    _, _, scaled = filled("galore", scale=0.5)
    first, half = step(0), scaled(0)
    assert_close([0.5 * x for x in first], half, rtol=1e-4, atol=1e-7)
    for change in first:
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4
    for gap, turns in ((1, True), (5, False)):
        optimizer, (p, *_), step = filled("galore", update_proj_gap=gap)
        step(0)
        projection = optimizer.state[p]["projection"].clone()
        step(1)
        assert torch.equal(projection, optimizer.state[p]["projection"]) is not turns
    for side, shapes in (("left", [(10, 4), (16, 4)]), ("right", [(4, 16), (4, 10)])):
        optimizer, params, step = filled("galore", proj_type=side)
        step(0)
        assert [tuple(optimizer.state[p]["projection"].shape) for p in params[:2]] == shapes


def test_fira_is_galore_where_nothing_is_left_and_of_full_rank_where_something_is():
    _, _, galore = filled("galore", rank=10, scale=1.0)
    _, _, fira = filled("fira", rank=10, alpha=1.0)
    for a, b in zip(galore(0)[:2], fira(0)[:2], strict=True):  # two matrices have rank 10
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    _, _, fira = filled("fira", rank=4)
    assert torch.linalg.matrix_rank(fira(0)[2], rtol=1e-4) == 12


def test_apollos_options():
    _, _, step = filled("apollo")
    _, _, scaled = filled("apollo", scale=4.0)
    first = step(0)
    assert_close([2 * x for x in first], scaled(0), rtol=1e-4, atol=1e-6)
    ratios = first[1] / randn(16, 10)  # a tall matrix: one step size a row
    torch.testing.assert_close(ratios, ratios[:, :1].expand(16, 10), rtol=1e-3, atol=1e-6)
    assert ratios[:, 0].std() > 0.01 * ratios.mean()
    optimizer, (p, *_), mini = filled("apollo-mini", rank=7)
    ratio = mini(0)[0] / randn(10, 16)  # one step size for all, from rank 1 whatever was asked
    torch.testing.assert_close(ratio, ratio.mean().expand(10, 16), rtol=1e-3, atol=1e-6)
    assert optimizer.state[p]["projection"].shape == (10, 1)


# In the backward pass


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_in_backward_is_the_ordinary_optimizer(name):
    model, other = net(), net()
    inside = make(name, model, weight_decay=0.1)
    ordinary = make(name.removeprefix("in-backward-"), other, lr=inside.defaults["lr"],
                    weight_decay=0.1)  # fmt: skip
    for i in range(5):
        for optimizer in (inside, ordinary):
            optimizer.param_groups[0]["lr"] *= 0.8
        assert train(model, inside, 1, start=i) == train(other, ordinary, 1, start=i)
        assert_equal(weights(model), weights(other))
    assert isinstance(inside, Muon) == (name == "in-backward-muon")  # for the momentum's schedule


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_in_backward_holds_one_gradient_at_a_time(name):
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12, bias=False) for _ in range(4)] + [nn.Linear(12, 30, bias=False)]
    model = nn.Sequential(*layers)
    optimizer = make(name, model)
    assert optimizer.gradient_bytes() == 4 * 12 * 30
    alive = []

    def count(module, grad_input, grad_output):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for layer in layers:
        layer.register_full_backward_hook(count)
    before = weights(model)
    model(randn(5, 12).requires_grad_()).square().mean().backward()
    assert len(alive) == 5 and max(alive) <= 1
    assert all(p.grad is None for p in model.parameters())
    after = weights(model)
    for old, p in zip(before, after, strict=True):
        assert not torch.equal(old, p)
    optimizer.step()
    assert_equal(weights(model), after)


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_in_backward_refuses_a_second_backward_pass(name):
    model = net()
    optimizer = make(name, model)
    loss = model(randn(4, 12)).square().mean()
    loss.backward()
    once = weights(model)
    with pytest.raises(RuntimeError, match="second backward pass before step"):
        model(randn(4, 12, seed=1)).square().mean().backward()
    assert_equal(weights(model), once)
    optimizer.step()
    train(model, optimizer, 2)  # one backward pass a step is fine


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_in_backward_refuses_what_needs_all_gradients(name, monkeypatch):
    with pytest.raises(ValueError, match="grad_clip=1"):
        make(name, net(), grad_clip=1.0)
    make(name, net(), grad_clip=0.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="over the 2 processes"):
        make(name, net())


# In the training loop


def trainer(folder, name, steps=6, batch=80, resume=None):
    need(name)
    config = BaseTrainConfig(
        max_seq_len=20, device_batch_size=4, total_batch_size=batch, warmdown_ratio=0.5,
        save_every=3, momentum_warmup_steps=4,
    )  # fmt: skip
    config = resolve(config, torch.device("cpu"), 1)
    model = small()  # projections are zero at the start, hence first gradients too
    matrices = model.parameter_groups()["matrix"]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    optimizers = [torch.optim.AdamW(others, lr=1e-3), build(name, matrices, 0.01, 4)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    logger = RunLogger(folder, dashboards="none", resume_step=resume)
    built = Trainer(
        config, model, setup.wrap(model, config, setup.Processes()), optimizers, Batches(), steps,
        folder, logger, peak=1e12,
    )  # fmt: skip
    if resume is not None:
        built.resume(checkpoint.load(checkpoint.find(folder, resume)))
    return built


@pytest.mark.parametrize("name", PEERS)
def test_a_resumed_run_repeats_the_uninterrupted_one(name, tmp_path):
    whole = trainer(tmp_path, name)
    before = weights(whole.model)
    whole.run()
    matrices = {id(p) for p in whole.model.parameter_groups()["matrix"]}
    for old, p in zip(before, whole.model.parameters(), strict=True):
        if id(p) in matrices:
            assert not torch.equal(old, p.detach()) and p.isfinite().all()
    resumed = trainer(tmp_path, name, resume=3)
    resumed.run()
    assert_equal(weights(whole.model), weights(resumed.model))


def test_the_loop_cannot_accumulate_in_backward(tmp_path):
    with pytest.raises(RuntimeError, match="total_batch_size = device_batch_size"):
        trainer(tmp_path, "in-backward-muon", batch=160).run()


# Errors


@pytest.mark.parametrize("name", PEERS)
def test_errors_name_the_value_and_the_remedy(name):
    need(name)
    matrix = nn.Parameter(torch.zeros(6, 10))
    with pytest.raises(ValueError, match=f"{name} has no option nonsense: it takes .*weight_decay"):
        build(name, [matrix], 0.01, 2, nonsense=1)
    with pytest.raises(ValueError, match="there is no matrix"):
        build(name, [], 0.01, 2)
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        build(name, [matrix, nn.Parameter(torch.zeros(6))], 0.01, 2)
    with pytest.raises(ValueError, match="(lr|learning rate)"):
        build(name, [matrix], -0.01, 2)
    if name in LOW_RANK and name != "apollo-mini":
        with pytest.raises(ValueError, match="rank 7 is more than a matrix of shape .*at most 6"):
            build(name, [matrix], 0.01, 7)
        with pytest.raises(ValueError, match="rank_k"):
            build(name, [matrix], 0.01, 0)
    else:
        build(name, [matrix], 0.01, 7)


def test_more_errors():
    matrix = nn.Parameter(torch.zeros(6, 10))
    with pytest.raises(ValueError, match="unknown peer 'sgd': choose among adamw"):
        build("sgd", [matrix], 0.01, 2)
    for name, options, message in (
        ("galore", {"update_proj_gap": 0}, "update_proj_gap must be at least 1"),
        ("galore", {"proj_type": "up"}, "proj_type must be one of std, left, right; got 'up'"),
        ("apollo", {"scale_type": "row"}, "scale_type must be one of channel, tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            build(name, [matrix], 0.01, 2, **options)


@pytest.mark.parametrize("name", ["galore", "apollo", "apollo-mini", "fira"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    package = PACKAGES[name.split("-")[0]]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'molegrad\["):
        build(name, [nn.Parameter(torch.zeros(6, 10))], 0.01, 2)


def test_the_packages_themselves_stay_untouched():
    """In a process of its own: nothing is imported under the packages' names, nor bitsandbytes."""
    for name in PACKAGES:
        need(name)
    code = (
        "import sys, torch; from molegrad.lab.peers import build\n"
        "p = torch.nn.Parameter(torch.ones(6, 8))\n"
        f"for name in {list(PACKAGES)}: build(name, [p], 0.1, 2)\n"
        f"print([m for m in {[*PACKAGES.values(), 'bitsandbytes']} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_peer_has_a_line_and_a_builder_with_options():
    tables = [peers._DENSE, peers._REFERENCES, peers._PACKAGES]
    assert sorted(name for table in tables for name in table) == sorted(PEERS)
    assert all(line and "\n" not in line for line in PEERS.values())
    for name, (_, _, known) in peers._DENSE.items():
        defaults = make(name, net()).defaults
        for option in set(known) - {"grad_clip"}:
            make(name, net(), **{option: defaults[option]})
