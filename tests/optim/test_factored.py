"""What every optimizer of the package does alike: training, resuming, odd gradients, ranks."""

import copy
import io

import pytest
import torch

from molegrad import MoleGradConfig, bases_state_dict, convert, load_bases_state_dict
from molegrad.optim import Adafactor, AdamW, Muon, matrix_param_groups, other_params
from tests.models import TinyGPT, perceptron
from tests.optim.common import ALL, F64, backward, config, factored_layer, make, train
from tests.samples import tokens

each = pytest.mark.parametrize("name", list(ALL))
# Every optimizer with both methods, for what does not depend on the other parameters.
PAIRS = [("muon", "tangent"), ("adamw", "power"), ("adafactor", "tangent"), ("muon", "power")]


@pytest.mark.parametrize(
    ("name", "mode", "method"),
    [
        ("muon", "grad", "power"),
        ("muon", "factors", "tangent"),
        ("adamw", "factors", "power"),
        ("adafactor", "factors", "tangent"),
    ],
)
def test_it_trains(name, mode, method):
    losses = train(*make(name, mode, method), 60)
    assert losses[-1] < 0.7 * losses[0]


def test_groups_cover_every_parameter_once():
    for mode in ("grad", "factors"):
        model, (muon, adam) = make("muon", mode)
        owned = [p for o in (muon, adam) for g in o.param_groups for p in g["params"]]
        assert len({id(p) for p in owned}) == len(owned)
        assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
        assert [g["kind"] for g in muon.param_groups] == [mode]


def test_layers_of_different_ranks_share_a_group():
    """They train as they do alone, and keep their ranks."""
    model = perceptron(config(rank_overrides="2=6"), dtype=F64)
    groups = matrix_param_groups(model)
    assert len(groups) == 1 and (model[0].rank, model[2].rank) == (4, 6)
    alone = copy.deepcopy(model)
    together = Muon(groups)
    single = [Muon(matrix_param_groups(alone[i])) for i in (0, 2)]
    for seed in range(3):
        x = tokens(50, 24, 20, F64, seed=seed)[0]
        for each_model in (model, alone):
            each_model.zero_grad()
            each_model(x).square().mean().backward()
        together.step()
        for optimizer in single:
            optimizer.step()
        if seed == 0:  # later the random directions differ: they depend on the place in the group
            torch.testing.assert_close(model[0].weight, alone[0].weight)
            torch.testing.assert_close(model[2].weight, alone[2].weight)
    assert (model[0].rank, model[2].rank) == (4, 6)
    assert together.state[model[2].basis_u]["core"].shape == (6, 6)


@each
@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_state_dict_resumes_bit_exactly_with_weights_only(name, mode):
    model, optimizers = make(name, mode)
    train(model, optimizers, 5)
    file = io.BytesIO()
    saved = {"model": model.state_dict(), "bases": bases_state_dict(model),
             "optimizers": [o.state_dict() for o in optimizers]}  # fmt: skip
    torch.save(saved, file)
    expected = train(model, optimizers, 5, start=5)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh, fresh_optimizers = make(name, mode, seed=7)
    fresh.load_state_dict(loaded["model"])
    load_bases_state_dict(fresh, loaded["bases"])
    for optimizer, state in zip(fresh_optimizers, loaded["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    assert train(fresh, fresh_optimizers, 5, start=5) == expected
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


@each
def test_bfloat16_weights_keep_a_float32_state(name):
    model = convert(TinyGPT(depth=1), config()).to(torch.bfloat16)
    optimizer = ALL[name](matrix_param_groups(model.h))
    model(torch.randint(50, (2, 5))).float().square().mean().backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    layer = model.h[0].mlp.c_fc
    for basis in (layer.basis_u, layer.basis_v):
        state = optimizer.state[basis]
        assert state["basis"].data_ptr() == basis.data_ptr()
        assert {x.dtype for k, x in state.items() if k != "step"} == {torch.float32}
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.isfinite().all()


def test_schedulers_and_groups():
    model, (muon, _) = make("muon", "factors")
    scheduler = torch.optim.lr_scheduler.LambdaLR(muon, lambda step: 0.5**step)
    train(model, (muon,), 1)
    scheduler.step()
    assert all(g["lr"] == 0.01 for g in muon.param_groups)
    muon.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, 4))], "lr": 0.5})
    assert muon.param_groups[-1]["kind"] == "grad"


@each
def test_a_closure_is_called_with_gradients_on(name):
    layer = factored_layer()
    optimizer = ALL[name](matrix_param_groups(layer))
    before = layer.weight.detach().clone()
    a, b = tokens(50, 24, 40, F64)

    def closure():
        loss = (layer(a) * b).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == (a @ before.mT * b).sum().item()
    assert not torch.equal(layer.weight.detach(), before)


@pytest.mark.parametrize(
    ("name", "method", "value"),
    [
        ("muon", "tangent", float("nan")),
        ("muon", "power", 1e25),
        ("adamw", "power", float("inf")),
        ("adamw", "tangent", 1e25),
        ("adafactor", "power", float("nan")),
        ("adafactor", "tangent", float("inf")),
    ],
)
def test_bad_gradients_spare_bases_and_state(name, method, value):
    """NaN and Inf show in the weight, as with a dense gradient; the squares of 1e25 overflow."""
    layer = factored_layer(torch.float32, method=method, probes=2)
    optimizer = ALL[name](matrix_param_groups(layer))
    backward(layer)
    optimizer.step()
    before = copy.deepcopy([optimizer.state[b] for b in (layer.basis_u, layer.basis_v)])
    layer.zero_grad()
    a, b = tokens(50, 24, 40)
    a[0, 0] = value
    layer(a).backward(b)
    optimizer.step()
    assert value == 1e25 or not layer.weight.isfinite().all()
    for old, basis in zip(before, (layer.basis_u, layer.basis_v), strict=True):
        new = optimizer.state[basis]
        assert basis.isfinite().all()
        for key in old.keys() - {"step", "stats"}:
            assert new[key].isfinite().all()
            if not (value == 1e25 and name == "muon"):  # which can do with it
                width = 4 if key == "basis" else None  # the probes are drawn anew
                assert torch.equal(new[key][..., :width], old[key][..., :width]), key


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_zero_gradient_changes_nothing(name, method):
    """At the first step, as with a zero-initialised projection before it."""
    layer = factored_layer(torch.float32, method=method, warm_start_decay=1.0)
    optimizer = ALL[name](matrix_param_groups(layer), lr=0.1)
    before = layer.weight.detach().clone()
    layer(torch.zeros(3, 24)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight.detach(), before)
    for basis in (layer.basis_u, layer.basis_v):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4))
    backward(layer)
    optimizer.step()
    assert layer.weight.isfinite().all() and not torch.equal(layer.weight.detach(), before)


@pytest.mark.parametrize(("name", "t"), [("muon", 0), ("adamw", 1), ("adafactor", 3), ("muon", 3)])
def test_fewer_tokens_than_the_rank(name, t):
    layer = factored_layer(torch.float32, probes=2)
    optimizer = ALL[name](matrix_param_groups(layer), lr=0.01)
    for seed in range(3):
        backward(layer, seed, t=t)
        optimizer.step()
    assert layer.weight.isfinite().all()
    for basis in (layer.basis_u, layer.basis_v):
        bases = basis.detach()[:, :4]
        torch.testing.assert_close(bases.mT @ bases, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "n", "m", "k"),
    [("muon", 24, 40, 20), ("muon", 40, 24, 24), ("adamw", 6, 8, 5), ("adafactor", 40, 24, 24)],
)
def test_any_rank_up_to_the_layers_width(name, n, m, k):
    """Above half of it, Ĝ = G by the power method at full rank."""
    layer = factored_layer(n=n, m=m, k=k, method="power", warm_start_decay=1.0)
    optimizer = ALL[name](matrix_param_groups(layer), lr=0.01)
    dense = torch.nn.Parameter(layer.weight.detach().clone())
    reference = ALL[name]([dense], lr=0.01)
    for seed in range(3):
        dense.grad = backward(layer, seed)
        optimizer.step()
        reference.step()
    assert layer.weight.isfinite().all() and layer.rank == k
    if k == min(m, n) and name == "adafactor":
        torch.testing.assert_close(layer.weight, dense)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize(("name", "method"), PAIRS[:3])
def test_resize_rank(name, method, k):
    layer = factored_layer(method=method, probes=2, warm_start_decay=1.0)
    optimizer = ALL[name](matrix_param_groups(layer), lr=0.01)
    for seed in range(2):
        backward(layer, seed)
        optimizer.step()
    old = copy.deepcopy({b: dict(optimizer.state[b]) for b in (layer.basis_u, layer.basis_v)})
    old_u, old_v = old.values()
    kept = min(4, k)
    new = []
    for basis in (layer.basis_u, layer.basis_v):
        rest = torch.randn(len(basis), k - kept, dtype=F64)
        wide = torch.linalg.qr(torch.cat([basis.detach()[:, :kept], rest], 1))[0]
        wide[:, :kept] = basis.detach()[:, :kept]
        new.append(torch.cat([wide, basis.detach()[:, 4:]], 1))
    optimizer.resize_rank(layer.basis_u, layer.basis_v, *new)
    for basis, value in zip((layer.basis_u, layer.basis_v), new, strict=True):
        assert torch.equal(basis, value) and basis.grad is None and layer.rank == k
        assert optimizer.state[basis]["basis"].data_ptr() == basis.data_ptr() != value.data_ptr()
    state_u, state_v = optimizer.state[layer.basis_u], optimizer.state[layer.basis_v]
    if name == "muon":
        assert torch.equal(state_u["core"][:kept, :kept], old_u["core"][:kept, :kept])
        assert state_u["core"].shape == (k, k) and not state_u["core"][kept:].any()
        assert not state_u["core"][:, kept:].any()
    elif name == "adamw":
        first, second = state_v["exp_avg"], state_v["exp_avg_sq"]
        assert first.shape == second.shape == (24, k)
        assert torch.equal(first[:, :kept], old_v["exp_avg"][:, :kept])
        assert torch.equal(second[:, :kept], old_v["exp_avg_sq"][:, :kept])
        assert not first[:, kept:].any()
        assert (second[:, kept:] == old_v["exp_avg_sq"][:, 3:4]).all()
    else:
        assert torch.equal(state_u["row"], old_u["row"])
        assert torch.equal(state_v["column"], old_v["column"])
    # It goes on, and a state_dict of the new rank is taken by a layer of the old one.
    fresh = factored_layer(method=method, probes=2, warm_start_decay=1.0)
    fresh.load_state_dict(layer.state_dict())
    resumed = ALL[name](matrix_param_groups(fresh), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.rank == k
    for seed in range(2):
        for each_layer, each_optimizer in ((layer, optimizer), (fresh, resumed)):
            backward(each_layer, seed)
            each_optimizer.step()
    assert torch.equal(layer.weight, fresh.weight) and layer.weight.isfinite().all()


def test_resize_before_the_first_step_and_with_bad_shapes():
    layer, other = factored_layer(probes=1), factored_layer(probes=1)
    optimizer = Muon(matrix_param_groups(layer))
    optimizer.resize_rank(
        layer.basis_u, layer.basis_v, torch.eye(40, 3, dtype=F64), torch.eye(24, 3, dtype=F64)
    )
    assert layer.rank == 2
    backward(layer)
    optimizer.step()
    assert optimizer.state[layer.basis_u]["core"].shape == (2, 2)
    eye = torch.eye(40, 5)
    with pytest.raises(ValueError, match="no group of kind 'factors' of this optimizer"):
        optimizer.resize_rank(other.basis_u, other.basis_v, eye, eye[:24])
    for u, v in ((eye, eye), (eye, eye[:24, :4]), (eye[:, :1], eye[:24, :1])):
        with pytest.raises(ValueError, match=r"expected bases \(40, k \+ 1\) and \(24, k \+ 1\)"):
            optimizer.resize_rank(layer.basis_u, layer.basis_v, u, v)


def test_a_state_of_another_model_is_refused():
    state = {}
    for n in (24, 30):
        layer = factored_layer(n=n)
        optimizer = Muon(matrix_param_groups(layer))
        backward(layer)
        optimizer.step()
        state = state or optimizer.state_dict()
    with pytest.raises(ValueError, match="the saved basis has 24 rows, the layer needs 30"):
        optimizer.load_state_dict(state)


def test_statistics_of_a_factored_layer():
    for optimizer_class in ALL.values():
        layer = factored_layer(torch.float32, probes=6)
        optimizer = optimizer_class(matrix_param_groups(layer), lr=0.01)
        for _ in range(3):
            u, v = (x.detach()[:, :4].double().clone() for x in (layer.basis_u, layer.basis_v))
            g = backward(layer, t=300, rank=20).double()
            optimizer.step()
        stats = optimizer.state[layer.basis_v]["stats"]
        y, w = g @ v, g.mT @ u
        captured = w.square().sum() + (y - u @ (u.mT @ y)).square().sum()
        assert stats[1].item() == pytest.approx(captured.item(), rel=1e-4)
        assert stats[0].item() == pytest.approx(g.square().sum().item(), rel=0.5)
        assert stats[2] == 1 and stats[3] > 1 and 0 <= stats[4] <= 1


@each
@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_weight_decay_is_decoupled(name, mode):
    layer = factored_layer() if mode == "factors" else torch.nn.Linear(24, 40, bias=False).double()
    optimizer = ALL[name](matrix_param_groups(layer), lr=0.1, weight_decay=0.5)
    before = layer.weight.detach().clone()
    layer(torch.zeros(3, 24, dtype=F64)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), 0.95 * before)


def matrix(*shape):
    return torch.nn.Parameter(torch.zeros(shape or (3, 3)))


@pytest.mark.parametrize(
    ("cls", "params", "options", "message"),
    [
        (Muon, [matrix(3)], {}, "Muon is for matrices"),
        (Muon, [matrix()], {"lr": -1.0}, "Muon: lr must lie between"),
        (Muon, [matrix()], {"momentum": 2.0}, "momentum must lie between"),
        (Muon, [matrix()], {"adjust_lr": "x"}, "adjust_lr must be one of"),
        (Muon, [matrix()], {"weight_decay": -1.0}, "Muon: weight_decay must lie between"),
        (AdamW, [matrix()], {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        (AdamW, [matrix()], {"eps": -1.0}, "AdamW: eps must lie between"),
        (Adafactor, [matrix()], {"eps": (0.0, 1.0)}, "eps must be two numbers, the first above 0"),
        (Adafactor, [matrix()], {"clip": 0.0}, "clip must be above 0"),
        (Adafactor, [matrix()], {"beta2_decay": 0.5}, "beta2_decay must lie between"),
        (Muon, [{"params": [matrix()], "kind": "x"}], {}, "kind must be"),
        (
            Muon,
            [{"params": [matrix()], "kind": "factors"}],
            {},
            "a 'factors' group holds weight.* without probes",
        ),
    ],
)
def test_bad_options(cls, params, options, message):
    with pytest.raises(ValueError, match=message):
        cls(params, **options)


def test_perceptron_with_biases_splits():
    model = perceptron(MoleGradConfig.of(rank_k=4, target_layers="all", gradient_mode="factors"))
    groups = matrix_param_groups(model)
    assert [p.dim() for p in other_params(model, groups)] == [1, 1]


def test_steps_multiply_in_full_precision(monkeypatch):
    seen, step = [], Muon._factors_step
    layer = factored_layer()
    optimizer = Muon(matrix_param_groups(layer), lr=0.1)
    backward(layer)

    def watched(self, bucket):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        step(self, bucket)

    monkeypatch.setattr(Muon, "_factors_step", watched)
    optimizer.step()
    assert seen == ["ieee"]
