"""Layers of the projected method: what they keep of their input, the basis that follows, momentum,
compilation, recomputation; and what else has to know of the method."""

import copy
import math

import pytest
import torch

from molegrad import MoleGradConfig, MoleLinear, convert, plan
from molegrad.gpt.model.activations import Activations
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train.hardware import flops_per_token
from molegrad.monitor import LayerMetrics, Shadow, layer_metrics, saved_bytes
from molegrad.monitor.estimates import estimate_of
from molegrad.monitor.health_rules import HealthThresholds, History, degenerate
from molegrad.optim import Muon, matrix_param_groups
from tests.models import TinyGPT, perceptron
from tests.samples import projection, randn, tokens

F64 = torch.float64


def layer(n=16, m=64, **fields) -> MoleLinear:
    torch.manual_seed(0)
    fields = {"method": "projected", "rank_k": 2, "project_stride": 4, **fields}
    return MoleLinear(n, m, config=MoleGradConfig(**fields), name="mlp")


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 5, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_input_gradient_are_those_of_linear(shape, bias):
    config = MoleGradConfig(
        method="projected", rank_k=4, target_layers="all", min_layer_utilization=0.0
    )
    plain, moled = perceptron(bias=bias), perceptron(config, bias=bias)
    x = torch.randn(shape)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    for model, x_i in ((plain, x1), (moled, x2)):
        model(x_i).square().sum().backward()
    torch.testing.assert_close(plain(x), moled(x))
    torch.testing.assert_close(x1.grad, x2.grad)
    if bias:
        torch.testing.assert_close(plain[0].bias.grad, moled[0].bias.grad)
    if x.numel() == 24:  # one token, taken with certainty
        torch.testing.assert_close(plain[0].weight.grad, moled[0].weight.grad)


def test_gradients_of_input_and_bias_by_finite_differences():
    moled = layer(5, 7).double()
    moled.weight.requires_grad_(False)  # what it would be given is an estimate

    def run(x, bias):
        p, rows, scale, index, v, stride = projection(x.detach(), moled.basis_v, moled.counter, 3)
        return torch.ops.molegrad.linear_projected(
            x, moled.weight, bias, p, v, rows, scale, index, moled.basis_v, None, None,
            moled.counter, moled.stats, stride, 0, 0, 1e3,
        )  # fmt: skip

    x, bias = randn(2, 4, 5, dtype=F64).requires_grad_(), randn(7, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, bias))


def test_dense_mode_and_momentum_mode_take_the_same_sample_and_add_up():
    one, other = layer(gradient_mode="momentum"), layer(gradient_mode="dense")
    x = randn(40, 16)
    for _ in range(2):  # another sample and another basis the second time
        for each in (one, other):
            each(x).square().sum().backward()
        torch.testing.assert_close(one.momentum, other.weight.grad)
    assert int(one.counter) == 2 and one.weight.grad is None
    torch.testing.assert_close(one.basis_v, other.basis_v)
    assert (one.basis_v.mT @ one.basis_v - torch.eye(2)).abs().max() < 1e-5
    assert one.basis_u.shape == (64, 0) and one.rank == 2


def test_the_mean_over_steps_is_the_gradient_though_the_basis_moves():
    moled = layer(12, 20, warm_start_decay=0.5).double()
    a, b = tokens(50, 12, 20, F64)
    truth, errors = b.mT @ a, []
    total = torch.zeros_like(truth)
    for _ in range(300):
        moled.weight.grad = None
        moled(a).backward(b)
        total += moled.weight.grad / 300
        errors.append((moled.weight.grad - truth).square().sum())
    assert (total - truth).square().sum() < 4 * torch.stack(errors).mean() / 300


def test_two_uses_before_a_backward_pass_keep_a_basis_each():
    """The first backward pass moves V, and the second still goes by the one of its forward."""
    moled = layer(12, 20, project_stride=1).double()
    x, y = randn(9, 12, dtype=F64), randn(9, 12, seed=1, dtype=F64)
    before = moled.basis_v.clone()
    (moled(x).square().sum() + moled(y).square().sum()).backward()
    plain = torch.nn.Linear(12, 20).double()
    plain.load_state_dict(moled.state_dict())
    (plain(x).square().sum() + plain(y).square().sum()).backward()
    torch.testing.assert_close(moled.weight.grad, plain.weight.grad)
    assert not torch.allclose(moled.basis_v, before)


def test_the_basis_finds_what_the_sample_would_miss():
    """Strong directions of the inputs, and an output gradient that sees some tokens more."""
    moled = layer(24, 40, rank_k=4, project_stride=4, warm_start_decay=1.0)
    noise = []
    for step in range(30):
        a, b = tokens(400, 24, 40, rank=4, seed=1)
        a, b = a + 0.1 * randn(400, 24, seed=step), b * (1 + randn(400, 1, seed=step).abs())
        moled.weight.grad = None
        moled(a).backward(b)
        noise.append(float(moled.stats[-1]))
    assert noise[-1] < 0.3 * noise[0]
    gram = a.mT @ (b.square().sum(1, keepdim=True) * a)
    best = torch.linalg.eigh(gram)[1][:, -4:]
    assert (best.mT @ moled.basis_v).square().sum() > 0.95 * 4
    assert moled.stats[4] < 0.05 and moled.stats[5] == 0


def test_nan_reaches_the_gradient_and_no_basis():
    moled = layer(8, 12)
    before = moled.basis_v.clone()
    moled(torch.full((30, 8), float("nan"))).sum().backward()
    assert torch.equal(moled.basis_v, before) and moled.weight.grad.isnan().any()


@pytest.mark.parametrize("float8", [False, True])
def test_what_is_kept_is_a_share_of_the_input(float8):
    moled = layer(64, 32, rank_k=4, project_stride=8, saved_inputs="fp8" if float8 else "full")
    x = randn(4, 100, 64)
    found = saved_bytes([moled], lambda: moled(x))
    groups = 400 // 8
    rows = groups * (64 + 4) if float8 else groups * 64 * 4
    assert found == 400 * 4 * 4 + rows + groups * 8 + 64 * 4 * 4  # P, rows, index, V
    assert found < 0.3 * x.nbytes


def test_layers_with_one_input_keep_it_once():
    x = randn(64, 16)
    layers = [layer(seed=i) for i in range(3)]
    alone = saved_bytes(layers[:1], lambda: layers[0](x.clone()))
    assert saved_bytes(layers, lambda: [each(x) for each in layers]) == alone
    first = x._molegrad_projection
    x.mul_(2)
    layers[0](x)
    made = x._molegrad_projection  # x has changed since
    assert made is not first
    p, v, rows, _, index = made.kept
    torch.testing.assert_close(p, x @ layers[0].basis_v)
    torch.testing.assert_close(rows, x[index])
    layers[1](x)
    assert x._molegrad_projection is made
    layers[1](x)  # once more: another sample
    assert x._molegrad_projection is not made
    for other in ({"project_stride": 2}, {"rank_k": 3}, {"saved_inputs": "fp8"}):
        layer(**other)(x)
        p, v, rows, scale, index = x._molegrad_projection.kept
        assert len(index) == (32 if "project_stride" in other else 16)
        assert p.shape[1] == (3 if "rank_k" in other else 2)
        assert (scale is not None) == ("saved_inputs" in other)


def test_a_shared_projection_gives_each_layer_its_own_gradient():
    """With the first one's basis the others' have the right mean, and each its basis to follow."""
    layers = [layer(12, 20, seed=i).double() for i in range(2)]
    a, b = tokens(24, 12, 20, F64)
    truth, total, errors = -b.mT @ a, 0.0, []
    for _ in range(300):
        x = a.clone()
        ys = [each(x) for each in layers]
        layers[1].weight.grad = None
        torch.autograd.backward(ys, [b, -b])
        total = total + layers[1].weight.grad / 300
        errors.append((layers[1].weight.grad - truth).square().sum())
    assert (total - truth).square().sum() < 4 * torch.stack(errors).mean() / 300
    assert layers[0].counter == layers[1].counter == 300
    assert not torch.allclose(layers[1].basis_v, layer(12, 20, seed=1).basis_v.double())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("saved", ["full", "fp8"])
def test_training_state_moves_saves_and_resumes(dtype, saved):
    x = randn(50, 16)

    def build():
        moled = layer(gradient_mode="momentum", momentum_dtype=dtype, saved_inputs=saved)
        return moled, Muon(matrix_param_groups(moled), lr=0.05)

    def train(moled, optimizer, steps):
        for _ in range(steps):
            loss = moled(x.clone()).square().mean()  # with rows of its own
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    moled, optimizer = build()
    first = train(moled, optimizer, 1)
    train(moled, optimizer, 3)
    state = copy.deepcopy(
        (moled.state_dict(), optimizer.state_dict(), moled.counter, moled.basis_v)
    )
    assert set(state[0]) == {"weight", "bias"}
    assert train(moled, optimizer, 6) < 0.8 * first
    again, resumed = build()
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    again.counter.copy_(state[2])
    again.basis_v.copy_(state[3])
    train(again, resumed, 6)
    assert torch.equal(again.weight, moled.weight)
    assert torch.equal(again.momentum, moled.momentum)
    assert not again.to_linear()._buffers


@pytest.mark.parametrize(("mode", "saved"), [("momentum", "full"), ("dense", "fp8")])
def test_compiled_training_agrees_with_eager(mode, saved):
    torch.compiler.reset()  # one limit of recompilations counts for the layers of all tests
    eager = layer(gradient_mode=mode, saved_inputs=saved)
    compiled = copy.deepcopy(eager)
    called = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for rows in (60, 61):
        x = randn(rows, 16)
        eager(x).square().mean().backward()
        called(x).square().mean().backward()
    own, other = (
        each.momentum if mode == "momentum" else each.weight.grad for each in (eager, compiled)
    )
    torch.testing.assert_close(own, other)
    torch.testing.assert_close(eager.basis_v, compiled.basis_v)
    torch.testing.assert_close(eager.stats, compiled.stats, equal_nan=True)
    assert int(compiled.counter) == 2
    torch.compiler.reset()


def test_autocast_and_other_dtypes():
    moled = layer(project_stride=1)
    x = randn(40, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = moled(x)
    assert y.dtype == torch.bfloat16 and x._molegrad_projection.kept[2].dtype == torch.bfloat16
    y.float().square().sum().backward()
    plain = torch.nn.functional.linear(x.detach(), moled.weight, moled.bias)
    truth = 2 * plain.mT @ x.detach()
    assert (moled.weight.grad - truth).norm() < 0.02 * truth.norm()
    assert moled.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    half = layer(project_stride=1).bfloat16()
    half(x.detach().bfloat16()).float().square().sum().backward()
    assert half.basis_v.dtype == torch.float32 and half.weight.grad.dtype == torch.bfloat16
    assert (half.weight.grad - truth).norm() < 0.03 * truth.norm()


# Beside the layer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradient_mode": "factored"}, "'projected' has no factors.*method='tangent'"),
        ({"probes": 2}, "probes=2 has no meaning for method='projected'"),
        ({"energy_target": 0.5, "probes": 1}, "=.* has no meaning for method='projected'"),
        ({"sample_share": 0.5}, "sample_share=0.5 has no meaning for method='projected'"),
        ({"sample_block": 4}, "sample_block=4 has no meaning for method='projected'"),
        ({"sample_overrides": "ffn=0.5"}, "no meaning for method='projected'"),
        ({"products": "fp8"}, "products='fp8' has no meaning for method='projected'"),
        ({"power_iters": 2}, "power_iters=2 has no meaning for method='projected'"),
        ({"group_mib": 4}, "group_mib=4 needs gradient_mode='factored'"),
        ({"project_stride": 0}, "project_stride must be at least 1, got 0"),
        ({"method": "tangent", "project_stride": 4}, "project_stride=4 has no meaning for method="),
    ],
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MoleGradConfig(**{"method": "projected", **fields})
    with pytest.raises(TypeError, match="project_stride must be an integer, got 2.5"):
        MoleGradConfig(method="projected", project_stride=2.5)


def test_the_plan_goes_by_the_input_that_is_saved():
    config = MoleGradConfig(
        method="projected", rank_k=16, rank_overrides="c_proj=0.25", target_layers="all"
    )
    assert config == MoleGradConfig(**config.to_dict())
    text = str(plan(TinyGPT(width=32, hidden=64), config))
    assert "rank_k=16, project_stride=8, method=projected" in text
    assert "h.0.attn.c_q" in text and "saves 38% of its input, less than" in text
    assert "taken, rank 8 (c_proj=0.25)" in text
    assert config.saved_share(64, 32) == 1 - 16 / 32 - 1 / 8
    with pytest.raises(ValueError, match="needs a layer of at least 16 features on both sides"):
        MoleLinear(8, 64, config=config)


def test_metrics_shadow_and_health():
    model = convert(
        TinyGPT(width=32, hidden=64),
        method="projected", gradient_mode="dense", target_layers="all", rank_k=4, project_stride=4,
    )  # fmt: skip
    idx = torch.randint(50, (4, 32))
    watch, shadow = LayerMetrics(model), Shadow(model, "c_fc")

    def loss():
        return model(idx).square().mean()

    watch.snapshot()
    shadow.begin()
    shadow.observe(loss)
    loss().backward()
    shadow.compare()
    watch.after_backward()
    values = watch.read()["h.0.mlp.c_fc"]
    assert values["sampled_share"] == 0.25 and values["sampling_noise"] > 0
    assert 0 < values["subspace_quality"] <= 1 and values["orthogonality_error"] < 1e-5
    assert math.isfinite(values["condition_number"]) and values["subspace_drift"] > 0
    for unknown in ("energy_capture", "gradient_norm", "trust_factor", "effective_rank"):
        assert math.isnan(values[unknown])
    truth = shadow.read()["h.0.mlp.c_fc"]
    assert 0 < truth["relative_error"] < 20 and math.isnan(truth["best_energy"])
    assert abs(truth["energy_estimate_error"]) < 2 * values["sampling_noise"]
    made = model.get_submodule("h.0.mlp.c_fc")
    found = estimate_of(made)
    assert found.rank == 0 and torch.equal(found.matrix, made.weight.grad)
    noisy = degenerate(made, {"sampling_noise": 30.0}, History(), HealthThresholds())
    assert "lower --streaming_project_stride (here 4)" in noisy.remedy
    dead = {"sampled_share": 0.0, "estimate_norm": math.nan}
    gone = degenerate(made, dead, History(nonzero=True), HealthThresholds())
    assert "its gradient is zero" in gone.what
    assert degenerate(made, {"orth_status": 2.0}, History(), HealthThresholds()) is None
    momentum = layer(gradient_mode="momentum")
    momentum(randn(30, 16)).sum().backward()
    assert layer_metrics(momentum)[""]["memory_saved_mb"] == 16 * 64 * 4 / 2**20


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recomputed_blocks_train_alike(recompute):
    """What is recomputed takes the sample that the first forward pass took."""

    def momenta(how: str) -> dict[str, torch.Tensor]:
        model = GPT(GPTConfig(depth=2, aspect_ratio=32, vocab_size=50, max_seq_len=32))
        convert(
            model, method="projected", gradient_mode="momentum", target_layers="all", rank_k=8,
            project_stride=4, min_layer_utilization=0.0,
        )  # fmt: skip
        model.set_activations(Activations(recompute=how))
        idx = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            model(idx, idx).backward()
        return {n: p for n, p in model.named_parameters() if n.endswith(".momentum")}

    plain, recomputed = momenta("none"), momenta(recompute)
    assert len(plain) == 12 and any(p.any() for p in plain.values())
    assert all(torch.equal(p, recomputed[name]) for name, p in plain.items())


def test_operations_are_counted():
    model = GPT(GPTConfig(depth=1, aspect_ratio=64, vocab_size=50, max_seq_len=16))
    dense = flops_per_token(model, 16)
    convert(model, method="projected", target_layers="c_fc", rank_k=8, project_stride=4)
    c = flops_per_token(model, 16)
    saved = 2 * 64 * 256 - 2 * 8 * (64 + 256) - 2 * (256 + 8) * 64 / 4
    assert dense.actual - c.actual == saved and c.dense == dense.dense
