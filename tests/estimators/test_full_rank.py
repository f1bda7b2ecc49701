"""Layers with estimates of full rank: the exact gradient and a sample of it."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from molegrad import MoleGradConfig, MoleLinear, clip_grad_norm_, convert, plan
from molegrad.estimators import inputs
from molegrad.monitor import layer_metrics, memory_bytes
from molegrad.optim import AdamW, Muon, matrix_param_groups
from tests.samples import randn


def layer(n=16, m=64, **fields) -> MoleLinear:
    torch.manual_seed(0)
    fields = {"method": "sampled", "gradient_mode": "momentum", **fields}
    return MoleLinear(n, m, config=MoleGradConfig.of(**fields), name="mlp")


def twin(of: MoleLinear) -> torch.nn.Linear:
    linear = torch.nn.Linear(of.in_features, of.out_features)
    linear.load_state_dict(of.state_dict())
    return linear


@pytest.mark.parametrize("fp8", [False, True])
def test_momentum_mode_of_exact_is_the_dense_gradient(fp8):
    moled = layer(method="exact", saved_inputs="fp8" if fp8 else "full")
    dense = twin(moled)
    x = randn(2, 9, 16).requires_grad_()
    y = x.detach().clone().requires_grad_()
    for _ in range(2):  # backward passes add up
        moled(x).square().sum().backward()
        dense(y).square().sum().backward()
    tolerance = 0.05 * dense.weight.grad.norm() if fp8 else 1e-4
    assert (moled.momentum - dense.weight.grad).norm() < tolerance
    assert moled.weight.grad is None and moled.weight.requires_grad
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(moled.bias.grad, dense.bias.grad)


def test_grad_mode_and_momentum_mode_take_the_same_sample():
    one, other = layer(sampling_fraction=0.3), layer(sampling_fraction=0.3, gradient_mode="grad")
    x = randn(40, 16)
    for each in (one, other):
        each(x).square().sum().backward()
    torch.testing.assert_close(one.momentum, other.weight.grad)
    assert int(one.counter) == 1
    one(x).square().sum().backward()
    other(x).square().sum().backward()  # another sample, added
    torch.testing.assert_close(one.momentum, other.weight.grad)


@pytest.mark.parametrize(("saved", "wanted"), [("full", 128 * 16 * 4), ("fp8", 128 * (16 + 4))])
def test_float8_inputs_are_what_is_kept(saved, wanted):
    kept, moled = [], layer(saved_inputs=saved)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moled(randn(128, 16))
    own = {p.data_ptr() for p in moled.parameters()}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == wanted


def test_layers_with_one_input_keep_one_copy_of_it():
    x = randn(32, 16)
    layers = [layer(saved_inputs="fp8") for _ in range(3)]
    kept = set()
    own = {p.data_ptr() for each in layers for p in each.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, id):
        for each in layers:
            each(x)
        assert len(kept - own) == 2  # data and scale
        x.mul_(2)
        layers[0](x)
        assert len(kept - own) == 4  # x has changed since


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_state_moves_saves_and_resumes(dtype):
    x = randn(50, 16)

    def build():
        moled = layer(momentum_dtype=dtype)
        return moled, Muon(matrix_param_groups(moled), lr=0.05)

    def train(moled, optimizer, steps):
        for _ in range(steps):
            moled(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    moled, optimizer = build()
    assert "momentum" not in moled.state_dict() and moled.momentum.dtype == getattr(torch, dtype)
    train(moled, optimizer, 3)
    saved = copy.deepcopy((moled.state_dict(), optimizer.state_dict(), moled.counter.clone()))
    train(moled, optimizer, 3)
    again, resumed = build()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again.counter.copy_(saved[2])
    assert again.momentum.dtype == getattr(torch, dtype)
    train(again, resumed, 3)
    assert torch.equal(again.weight, moled.weight)
    assert torch.equal(again.momentum, moled.momentum)
    assert moled.double().momentum.dtype == getattr(torch, dtype)
    plain = again.to_linear()
    assert type(plain) is torch.nn.Linear and set(plain._parameters) == {"weight", "bias"}
    assert not plain._buffers


@pytest.mark.parametrize(
    ("nesterov", "dtype", "tolerance"),
    [(False, "float32", 1e-5), (True, "float32", 0.02), (True, "bfloat16", 0.02),
     (True, "int8", 0.05)],
)  # fmt: skip
def test_muon_on_momentum_mode_is_muon_on_gradients(nesterov, dtype, tolerance):
    """Up to the rounding of the int8 snapshot that nesterov needs, and of the momentum."""
    moled = layer(method="exact", momentum_dtype=dtype)
    dense = twin(moled)
    start = dense.weight.detach().clone()
    options = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "nesterov": nesterov}
    steps = [Muon(matrix_param_groups(model), **options) for model in (moled, dense)]
    for i in range(4):
        x = randn(50, 16, seed=i)
        for model, optimizer in zip((moled, dense), steps, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.bias.grad = None
    assert (moled.weight - dense.weight).norm() < tolerance * (dense.weight - start).norm()


def test_an_int8_momentum_stays_near_the_exact_one():
    exact, small = layer(method="exact"), layer(method="exact", momentum_dtype="int8")
    optimizers = [
        Muon(matrix_param_groups(each), lr=0.0, nesterov=False) for each in (exact, small)
    ]
    for i in range(10):
        x = randn(50, 16, seed=i)
        for each in (exact, small):
            each(x).square().mean().backward()
        value = small.momentum * small.momentum_scale
        assert (value - exact.momentum).norm() < 0.03 * exact.momentum.norm()
        for optimizer in optimizers:
            optimizer.step()
    assert memory_bytes(small, optimizers[1:])["optimizer_state"] == 16 * 64 + 64 * 4


def test_memory_and_metrics():
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(16, 64)})
    convert(model, MoleGradConfig.preset("balanced", momentum_dtype="float32"))
    optimizer = Muon(matrix_param_groups(model))
    model["mlp"](randn(50, 16)).relu().square().mean().backward()
    memory = memory_bytes(model, [optimizer])
    assert memory["gradients"] == 64 * 4  # the bias's
    assert memory["optimizer_state"] == 16 * 64 * 4  # the momentum
    assert memory["weights"] == 16 * 64 * 4 + 64 * 4
    optimizer.step()
    # The momentum counts once; the snapshot for nesterov takes a byte a number, and its scales.
    assert memory_bytes(model, [optimizer])["optimizer_state"] == 16 * 64 * (4 + 1) + 64 * 4
    metrics = layer_metrics(model, [optimizer])["mlp"]
    assert 0.15 < metrics["sampled_share"] < 0.35 and metrics["sampling_noise"] > 0
    assert metrics["memory_saved_mb"] == 16 * 64 * 4 / 2**20


@pytest.mark.parametrize("mode", ["momentum", "grad"])
def test_compiled_training_agrees_with_eager(mode):
    eager = layer(gradient_mode=mode, saved_inputs="fp8")
    compiled = copy.deepcopy(eager)
    called = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    x = randn(60, 16)
    for _ in range(2):
        eager(x).square().mean().backward()
        called(x).square().mean().backward()
    names = ("momentum",) if mode == "momentum" else ()
    for name in names:
        torch.testing.assert_close(getattr(eager, name), getattr(compiled, name))
    if mode == "grad":
        torch.testing.assert_close(eager.weight.grad, compiled.weight.grad)
    assert int(compiled.counter) == 2


def test_a_cuda_graph_in_the_making_shares_nothing(monkeypatch):
    """What was computed before it would be replayed for every later content of x, and what is
    computed in it does not exist until it is replayed."""
    x, made = randn(32, 16), []
    layers = [layer(saved_inputs="fp8") for _ in range(2)]
    original = torch.ops.molegrad.quantize_rows
    layers[0](x)
    known = x._molegrad_float8
    monkeypatch.setattr(inputs, "_computes_afresh", lambda x: True)  # as while one is captured
    for each in layers:
        each(x)
    assert x._molegrad_float8 is known
    counting = SimpleNamespace(quantize_rows=lambda x: made.append(1) or original(x))
    monkeypatch.setattr(inputs, "torch", SimpleNamespace(ops=SimpleNamespace(molegrad=counting)))
    for _ in range(3):
        inputs.float8_rows(x)
    assert len(made) == 3


@pytest.mark.parametrize("capturing", [True, False])
def test_whether_a_cuda_graph_is_in_the_making(monkeypatch, capturing):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert inputs._computes_afresh(SimpleNamespace(is_cuda=True)) == capturing
    assert not inputs._computes_afresh(randn(2, 2))


def test_momentum_under_float16_autocast_is_warned_of_once():
    moled, x = layer(), randn(4, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            moled(x)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.warns(UserWarning, match="GradScaler cannot unscale .* Use bfloat16 autocast"),
    ):
        moled(x)
    Muon(matrix_param_groups(moled))  # no other warning is due
    with warnings.catch_warnings(), torch.autocast("cpu", torch.float16):
        warnings.simplefilter("error")
        moled(x)


def test_clipping_and_other_optimizers_are_refused():
    moled = layer()
    with pytest.raises(ValueError, match="mlp has .*momentum.*leave clipping off"):
        clip_grad_norm_(moled, 1.0)
    with pytest.raises(ValueError, match="got 'momentum'.*needs molegrad.optim.Muon"):
        AdamW(matrix_param_groups(moled), lr=0.1)


def test_layers_have_fractions_of_their_own():
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(16, 64) for name in ("attn_q", "mlp_up", "mlp_down")}
    )
    config = MoleGradConfig.of(
        method="sampled",
        sampling_fraction=0.25,
        sampling_overrides="attn_q=1,mlp_down=0.125",
        target_layers="attn_q,mlp_up,mlp_down",
    )
    assert "taken, sampling fraction 0.125 (mlp_down=0.125)" in str(plan(model, config))
    convert(model, config)
    assert [layer.state.setting for layer in model.values()] == [1.0, 0.25, 0.125]
    costs = [config.estimator.cost(64, 16, name) for name in model]
    assert costs == [2 * 64 * 16 * f for f in (1.0, 0.25, 0.125)]
    absent = config.changed(sampling_overrides="attention=1")  # a role may be absent
    plan(model, absent)
    with pytest.raises(ValueError, match="the override 'head=0.5' is for no linear layer"):
        plan(model, config.changed(sampling_overrides="head=0.5"))
