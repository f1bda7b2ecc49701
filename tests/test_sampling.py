"""The sampled estimate: unbiased, as exact as it says, exact where enough is zero; the momentum
mode built on it; inputs kept in float8."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from molegrad import MoleGradConfig, MoleLinear, clip_grad_norm_, convert, linear, ops, plan
from molegrad.config import PRESETS
from molegrad.monitor import layer_metrics, memory_bytes
from molegrad.optim import AdamW, Muon, matrix_param_groups
from tests.samples import randn, tokens

F64 = torch.float64
FLOAT8 = torch.ones(30, 8).to(torch.float8_e4m3fn)


def counter(step: int = 0) -> torch.Tensor:
    return torch.tensor(step)


def sampled(a, b, share, block=4, seed=0, step=0, scale=None):
    grad = torch.zeros(b.shape[-1], a.shape[-1], dtype=torch.promote_types(b.dtype, torch.float32))
    stats = ops.sampled_grad_(grad, a, b, scale, counter(step), share, block, 1.0, seed)
    return grad, stats


@pytest.mark.parametrize(("n", "m"), [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("block", [1, 5, 16])
def test_unbiased_with_the_variance_it_reports(n, m, block):
    a, b = tokens(60, n, m, F64)
    wide = a if n > m else b
    wide.clamp_(min=0)
    g = b.mT @ a
    estimates = torch.stack([sampled(a, b, 0.3, block, step=i)[0] for i in range(600)])
    error = (estimates - g).square().sum((1, 2)).mean()
    stats = sampled(a, b, 0.3, block)[1]
    terms = (a.square().sum(1) * b.square().sum(1)).sum()
    assert 0.9 < error / (stats[1] * terms) < 1.1
    # The mean of N draws is off by the error of one over √N.
    assert (estimates.mean(0) - g).square().sum() < 1.5 * error / len(estimates)
    assert abs(stats[0].item() - 0.3) < 0.06


def test_samples_differ_by_seed_and_step_and_repeat():
    a, b = tokens(50, 12, 20)
    first = sampled(a, b, 0.2)[0]
    assert torch.equal(first, sampled(a, b, 0.2)[0])
    assert not torch.equal(first, sampled(a, b, 0.2, seed=1)[0])
    assert not torch.equal(first, sampled(a, b, 0.2, step=1)[0])


@pytest.mark.parametrize("wide_a", [False, True])
def test_exact_where_enough_is_zero(wide_a):
    """An eighth of X is not zero: a quarter share takes all of it, with weight 1."""
    x, z = randn(400, 64, dtype=F64), randn(400, 16, seed=1, dtype=F64)
    x = x * (torch.rand(400, 64, generator=torch.Generator().manual_seed(2)) < 0.125)
    a, b = (x, z) if wide_a else (z, x)
    grad, stats = sampled(a, b, 0.25, block=1)
    assert (grad - b.mT @ a).norm() < 0.02 * (b.mT @ a).norm()
    assert stats[1] < 0.01
    coarse = sampled(a, b, 0.25, block=16)[1]
    assert coarse[1] > 10 * stats[1]  # hardly a block of 16 is all zero


def test_smaller_blocks_and_larger_shares_have_less_noise():
    a, b = tokens(300, 16, 64)
    b.relu_()
    noise = [[float(sampled(a, b, s, k)[1][1]) for s in (0.1, 0.3, 0.6)] for k in (1, 4, 16)]
    for row in noise:
        assert row[0] > row[1] > row[2] > 0
    for left, right in zip(noise, noise[1:], strict=False):
        assert all(x < y for x, y in zip(left, right, strict=True))


def test_adds_in_place_with_alpha_and_share_one_is_exact():
    a, b = tokens(30, 8, 12)
    grad = torch.ones(12, 8)
    stats = ops.sampled_grad_(grad, a, b, None, counter(), 1.0, 4, -2.0)
    torch.testing.assert_close(grad, 1 - 2 * (b.mT @ a), rtol=1e-4, atol=1e-4)
    assert stats.tolist() == [1.0, 0.0]
    half = torch.ones(12, 8, dtype=torch.bfloat16)
    ops.sampled_grad_(half, a, b, None, counter(), 1.0, 4, -2.0)
    assert torch.equal(half, grad.to(torch.bfloat16))


@pytest.mark.parametrize("t", [0, 1, 3])
@pytest.mark.parametrize("zero", ["a", "b", "neither"])
def test_few_tokens_and_zeros_stay_finite(t, zero):
    a, b = tokens(t, 8, 12)
    (a if zero == "a" else b if zero == "b" else a[:0]).zero_()
    grad, stats = sampled(a, b, 0.01)
    assert grad.isfinite().all() and stats.isfinite().all()
    if zero != "neither" or t == 0:
        assert not grad.any()


def test_nan_reaches_the_gradient():
    a, b = tokens(30, 8, 12)
    b[3, 2] = float("nan")
    assert sampled(a, b, 0.5)[0].isnan().any()


def test_float8_rows():
    x = randn(3, 7, 33) * torch.logspace(-6, 6, 7)[:, None]
    x[1, 2] = 0
    data, scale = ops.quantize_rows(x)
    back = data.float() * scale.unsqueeze(-1)
    largest = x.abs().amax(-1, keepdim=True)
    assert data.dtype == torch.float8_e4m3fn and scale.shape == (3, 7)
    assert ((back - x).abs() <= x.abs() / 16 + largest * 2.0**-17).all()
    assert torch.equal(back.abs().amax(-1), x.abs().amax(-1)) or torch.allclose(
        back.abs().amax(-1, keepdim=True), largest
    )
    a, b = tokens(64, 16, 24)
    data, scale = ops.quantize_rows(a)
    direct = sampled(data.float() * scale[:, None], b, 0.4)[0]
    torch.testing.assert_close(sampled(data, b, 0.4, scale=scale)[0], direct)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, "fraction must be positive, got 0.0"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"grad": torch.zeros(3, 3)}, r"expected grad of shape \(12, 8\), got \(3, 3\)"),
        ({"a_scale": torch.ones(30)}, "a_scale belongs to a float8 a, got a of torch.float32"),
        ({"a": FLOAT8}, "a of torch.float8_e4m3fn needs a_scale, what quantize_rows returned"),
        (
            {"a": FLOAT8, "a_scale": torch.ones(30, 1)},
            r"expected a_scale in torch.float32, one for each token of a \(30, 8\), got \(30, 1\)",
        ),
        ({"a": FLOAT8, "a_scale": torch.ones(30, dtype=F64)}, r"got \(30\) of torch.float64"),
        ({"counter": torch.zeros(2)}, "counter as an int64 scalar"),
    ],
)
def test_bad_arguments_are_named(change, message):
    a, b = tokens(30, 8, 12)
    given = {"grad": torch.zeros(12, 8), "a": a, "b": b, "a_scale": None, "counter": counter()}
    with pytest.raises(RuntimeError, match=f"molegrad::sampled_grad_: .*{message}"):
        ops.sampled_grad_(**{**given, "fraction": 0.5, "block": 4, **change})


@pytest.mark.parametrize("shape", [(13, 1), (1, 11)])
def test_add_quantized_rounds_to_half_a_step(shape):
    data, scale = torch.zeros(13, 11, dtype=torch.int8), torch.ones(shape)
    x = randn(13, 11) * torch.logspace(-3, 3, shape[0] + shape[1] - 1).view(shape)
    total = torch.zeros(13, 11)
    for _ in range(3):
        ops.add_quantized_(data, scale, x)
        total += x
        assert ((data * scale - total).abs() <= 1.51 * scale).all()
    ops.add_quantized_(data, scale, -(data * scale))
    assert not data.any() and torch.equal(scale, torch.ones(shape))
    ops.add_quantized_(data, scale, torch.full((13, 11), float("nan")))
    assert (data * scale).isnan().all()
    with pytest.raises(RuntimeError, match=r"molegrad::add_quantized_: expected scale \(13, 1\)"):
        ops.add_quantized_(data, torch.ones(11), x)


# The layer


def layer(n=16, m=64, **fields) -> MoleLinear:
    torch.manual_seed(0)
    fields = {"method": "sampled", "gradient_mode": "momentum", **fields}
    return MoleLinear(n, m, config=MoleGradConfig(**fields), name="mlp")


def twin(of: MoleLinear) -> torch.nn.Linear:
    linear = torch.nn.Linear(of.in_features, of.out_features)
    linear.load_state_dict(of.state_dict())
    return linear


@pytest.mark.parametrize("fp8", [False, True])
def test_momentum_mode_with_share_one_is_the_dense_gradient(fp8):
    moled = layer(sample_share=1.0, saved_inputs="fp8" if fp8 else "full")
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


def test_dense_mode_and_momentum_mode_take_the_same_sample():
    one, other = layer(sample_share=0.3), layer(sample_share=0.3, gradient_mode="dense")
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


def test_a_cuda_graph_in_the_making_shares_nothing(monkeypatch):
    """What was computed before it would be replayed for every later content of x, and what is
    computed in it does not exist until it is replayed."""
    x, made = randn(32, 16), []
    layers = [layer(saved_inputs="fp8") for _ in range(2)]
    original = linear.torch.ops.molegrad.quantize_rows
    counting = SimpleNamespace(quantize_rows=lambda x: made.append(1) or original(x))
    layers[0](x)

    monkeypatch.setattr(linear, "_makes_anew", lambda x: True)  # as while one is captured
    known = x._molegrad_float8
    for each in layers:
        each(x)
    assert x._molegrad_float8 is known
    monkeypatch.setattr(linear, "torch", SimpleNamespace(ops=SimpleNamespace(molegrad=counting)))
    for _ in range(3):
        linear._float8(x)
    assert len(made) == 3


def test_whether_a_cuda_graph_is_in_the_making(monkeypatch):
    x = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert linear._makes_anew(x) and not linear._makes_anew(randn(2, 2))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not linear._makes_anew(x)


def test_momentum_under_float16_autocast_is_warned_of_once():
    linear._warn_of_float16.cache_clear()
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
    with warnings.catch_warnings(), torch.autocast("cpu", torch.float16):
        warnings.simplefilter("error")
        moled(x)


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
    moled = layer(sample_share=1.0, momentum_dtype=dtype)
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
    exact, small = layer(sample_share=1.0), layer(sample_share=1.0, momentum_dtype="int8")
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


def test_clipping_and_other_optimizers_are_refused():
    moled = layer()
    with pytest.raises(ValueError, match="mlp is in momentum mode.*leave clipping off"):
        clip_grad_norm_(moled, 1.0)
    with pytest.raises(ValueError, match="got 'momentum'.*needs molegrad.optim.Muon"):
        AdamW(matrix_param_groups(moled), lr=0.1)


def test_layers_have_shares_of_their_own():
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(16, 64) for name in ("attn_q", "mlp_up", "mlp_down")}
    )
    config = MoleGradConfig(
        sample_share=0.25,
        sample_overrides="attn_q=1,mlp_down=0.125",
        target_layers="attn_q,mlp_up,mlp_down",
    )
    assert config == MoleGradConfig(**config.to_dict())
    assert "taken, mlp_down=0.125" in str(plan(model, config))
    convert(model, config)
    assert [layer.share for layer in model.values()] == [1.0, 0.25, 0.125]
    plan(model, MoleGradConfig(sample_overrides="attention=1"))  # a role may be absent
    with pytest.raises(ValueError, match="the override 'head=0.5' sets the rank or share of no"):
        plan(model, MoleGradConfig(sample_overrides="head=0.5"))


def test_presets():
    for name in PRESETS:
        assert MoleGradConfig.preset(name) == MoleGradConfig(**PRESETS[name])
    assert MoleGradConfig.preset("balanced", sample_share=0.5).sample_share == 0.5
    with pytest.raises(ValueError, match="no preset 'best': choose among exact, balanced, minimal"):
        MoleGradConfig.preset("best")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "sampled", "gradient_mode": "factored"}, "has no factors.*method='tangent'"),
        ({"method": "tangent", "gradient_mode": "momentum"}, "needs method='sampled'"),
        ({"method": "sampled", "probes": 2}, "probes=2 has no meaning for method='sampled'"),
        ({"sample_share": 0.0}, "sample_share must be above 0"),
        ({"sample_share": 1.5}, "sample_share must be above 0 and at most 1"),
        ({"sample_overrides": "ffn=2"}, "the share of 'ffn' must be above 0 and at most 1"),
        ({"sample_overrides": "ffn=0.5", "rank_k": 8}, "no meaning for method='tangent'"),
        ({"saved_inputs": "int4"}, "saved_inputs must be one of full, fp8"),
    ],
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MoleGradConfig(**fields)


@pytest.mark.parametrize("mode", ["momentum", "dense"])
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
    if mode == "dense":
        torch.testing.assert_close(eager.weight.grad, compiled.weight.grad)
    assert int(compiled.counter) == 2
