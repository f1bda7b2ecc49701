import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from molegrad import MoleGradConfig, MoleLinear, clip_grad_norm_
from molegrad.estimators.lowrank import STATS
from molegrad.estimators.lowrank_sums import explored_directions
from molegrad.monitor import LayerMetrics, aggregate, layer_metrics, memory_bytes
from molegrad.monitor.metrics import METRICS
from molegrad.optim import AdamW, Muon, matrix_param_groups, other_params
from tests.models import perceptron

F64 = torch.float64
LOW_RANK = [(mode, method) for mode in ("grad", "factors") for method in ("tangent", "power")]


def build(mode, method="tangent", probes=8, optimizer=Muon, **fields):
    own = {} if method == "sampled" else {"rank_k": 4, "probes": probes}
    options = {"target_layers": "all", "gradient_mode": mode, **own, **fields}
    model = perceptron(MoleGradConfig.of(method, **options))
    groups = matrix_param_groups(model)
    others = other_params(model, groups)
    return model, [optimizer(groups), torch.optim.AdamW(others)]


def backward(model, seed=5, parts=1):
    torch.manual_seed(seed)
    for x in torch.randn(200, 24).chunk(parts):
        model(x).square().sum().backward()


def step(model, optimizers, seed=5):
    model.zero_grad()
    backward(model, seed)
    for optimizer in optimizers:
        optimizer.step()


def trained(mode, method="tangent", probes=8, **fields):
    model, optimizers = build(mode, method, probes, **fields)
    for _ in range(3):
        step(model, optimizers)
    return model, optimizers


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MoleLinear)}


def estimate(layer):
    """Ĝ as a matrix, in float64."""
    k = layer.rank
    if layer.config.gradient_mode == "grad":
        return layer.weight.grad.double()
    u, v = (x.detach()[:, :k].double() for x in (layer.basis_u, layer.basis_v))
    y, w = (x.grad[:, :k].double() for x in (layer.basis_u, layer.basis_v))
    if layer.config.estimator.one_sided:
        return y @ w.mT
    return u @ w.mT + (y - u @ (u.mT @ y)) @ v.mT


@pytest.mark.parametrize(("mode", "method"), LOW_RANK)
def test_every_metric_of_every_layer(mode, method):
    model, optimizers = trained(mode, method)
    watch = LayerMetrics(model, optimizers)
    watch.snapshot()
    model.zero_grad()
    backward(model)
    watch.after_backward()
    for optimizer in optimizers:
        optimizer.step()
    metrics = watch.read()
    assert list(metrics) == ["0", "2"]
    for values in metrics.values():
        assert tuple(values) == METRICS
        assert 0 < values["energy_capture"] <= 1
        assert values["trust_factor"] == values["trust_scaling_factor"] == 1
        assert values["gradient_norm_compression_ratio"] == values["energy_capture"]
        assert values["condition_number"] >= 1 and 0 <= values["subspace_drift"] <= 1
        assert 0 < values["orthogonality_error"] < 1e-5 and values["orth_status"] == 0
        assert 0 <= values["subspace_quality_min"] <= values["subspace_quality"] <= 1
        assert math.isnan(values["sampled_share"]) and math.isnan(values["sampling_noise"])
        known = [key for key in METRICS if not key.startswith("sampl")]
        assert all(math.isfinite(values[key]) for key in known)


@pytest.mark.parametrize(
    ("mode", "method"), [("grad", "power"), ("factors", "tangent"), ("factors", "power")]
)
def test_norms_are_those_of_the_gradient_and_its_estimate(mode, method):
    model, optimizers = trained(mode, method, probes=64)
    plain = perceptron()
    plain.load_state_dict(model.state_dict())
    model.zero_grad()
    backward(plain)
    backward(model)
    norms = {name: estimate(layer).norm().item() for name, layer in layers(model).items()}
    clip_grad_norm_(model, 1e9)
    for optimizer in optimizers:
        optimizer.step()
    for name, values in layer_metrics(model, optimizers).items():
        truth = plain.get_submodule(name).weight.grad.norm().item()
        assert values["estimate_norm"] == pytest.approx(norms[name], rel=1e-3)
        assert values["gradient_norm"] == pytest.approx(truth, rel=0.15)
        assert values["energy_capture"] == pytest.approx(norms[name] / truth, rel=0.15)


def test_clipping_leaves_the_captured_share_alone():
    for method in ("tangent", "power"):
        captured = []
        for limit in (1e9, 0.01):
            model, optimizers = build("factors", method)
            backward(model)
            clip_grad_norm_(model, limit)
            optimizers[0].step()
            captured.append([m["energy_capture"] for m in layer_metrics(model).values()])
        assert captured[0] == pytest.approx(captured[1], rel=1e-3) and max(captured[0]) < 1


@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_the_compression_ratio_is_that_of_the_gradient_that_is_used(mode):
    model, optimizers = trained(mode, probes=64, trust_scaling=True, trust_max=10.0)
    for values in layer_metrics(model, optimizers).values():
        assert values["trust_factor"] > 1.01 and values["energy_capture"] < 0.99
        assert values["gradient_norm_compression_ratio"] == pytest.approx(1, rel=1e-3)
        used = values["estimate_norm"] * values["trust_factor"]
        assert values["gradient_norm"] == pytest.approx(used, rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "method", "decay"),
    [("grad", "power", 0.75), ("factors", "tangent", 0.0), ("factors", "power", 1.0)],
)
def test_subspace_quality_is_the_cosines_of_the_principal_angles(mode, method, decay):
    model, optimizers = build(mode, method, warm_start_decay=decay)
    step(model, optimizers)
    watch = LayerMetrics(model, optimizers)
    old = copy.deepcopy(model)
    watch.snapshot()
    step(model, optimizers, seed=6)
    values = watch.read()
    kept = 4 - explored_directions(4, decay) or 4
    assert kept == {1.0: 4, 0.75: 3, 0.0: 4}[decay]
    for name, layer in layers(model).items():
        before = old.get_submodule(name)
        cosines = torch.cat(
            [
                torch.linalg.svdvals(getattr(before, b)[:, :4].mT @ getattr(layer, b)[:, :kept])
                for b in ("basis_u", "basis_v")
            ]
        )
        assert values[name]["subspace_quality"] == pytest.approx(cosines.mean().item(), rel=1e-4)
        least = cosines.min().item()
        assert values[name]["subspace_quality_min"] == pytest.approx(least, abs=1e-4)
        assert cosines.min() < 0.95 * cosines.max()
    assert math.isnan(watch.read()["0"]["subspace_quality"])  # the snapshot was that step's
    watch.snapshot()
    assert watch.read()["0"]["subspace_quality"] == pytest.approx(1, abs=1e-5)


def test_another_rank_since_the_snapshot_is_no_quality():
    model, optimizers = build("grad")
    watch = LayerMetrics(model, optimizers)
    watch.snapshot()
    first = model[0]
    first.replace(basis_u=first.basis_u[:, :3], basis_v=first.basis_v[:, :3])
    values = watch.read()
    assert math.isnan(values["0"]["subspace_quality"])
    assert values["2"]["subspace_quality"] == pytest.approx(1, abs=1e-5)


def roy_vetterli(matrix):
    values = torch.linalg.svdvals(matrix)
    p = values[values > 1e-9 * values[0]] / values.sum()
    return math.exp(-(p * p.log()).sum())


@pytest.mark.parametrize(
    ("mode", "method", "trust"),
    [*((*pair, False) for pair in LOW_RANK), ("grad", "tangent", True), ("grad", "power", True)],
)
def test_effective_rank_is_that_of_the_estimate(mode, method, trust):
    model, optimizers = build(mode, method, trust_scaling=trust)
    step(model, optimizers)
    model.zero_grad()
    backward(model, seed=6)
    clip_grad_norm_(model, 0.1)
    expected = {name: roy_vetterli(estimate(layer)) for name, layer in layers(model).items()}
    watch = LayerMetrics(model, optimizers)
    watch.after_backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    top = 8 if method == "tangent" else 4
    for name, values in watch.read().items():
        assert values["effective_rank"] == pytest.approx(expected[name], rel=2e-3)
        assert 1 < values["effective_rank"] < top
    assert math.isnan(watch.read()["0"]["effective_rank"])  # no gradient is left


def test_effective_rank_of_known_spectra():
    """One mode has rank 1, equal ones their number."""
    layer = MoleLinear(24, 40, bias=False, config=MoleGradConfig.of(rank_k=4, method="power"))
    q, p = (torch.linalg.qr(torch.randn(rows, 4))[0] for rows in (40, 24))
    for modes, expected in (([1, 0, 0, 0], 1), ([3, 3, 3, 3], 4), ([1, 1, 0, 0], 2)):
        layer.weight.grad = q @ torch.diag(torch.tensor(modes).float()) @ p.mT
        measured = layer_metrics(layer)[""]["effective_rank"]
        assert measured == pytest.approx(expected, rel=1e-3)
    for broken in (0.0, math.nan, math.inf):
        layer.weight.grad = torch.full((40, 24), broken)
        assert math.isnan(layer_metrics(layer)[""]["effective_rank"])


def test_bases_that_have_turned_tell_no_effective_rank():
    model, optimizers = build("factors")
    for _ in range(2):
        model.zero_grad()
        backward(model)
        before = layer_metrics(model, optimizers)
        for optimizer in optimizers:
            optimizer.step()
    assert all(math.isfinite(m["effective_rank"]) for m in before.values())
    after = layer_metrics(model, optimizers)
    assert all(math.isnan(m["effective_rank"]) for m in after.values())


@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_products_are_exact_where_training_allows_tf32(mode):
    """QᵀQ of perfect bases in TF32 would be as far from I as health allows."""
    model, optimizers = trained(mode)
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name in ("aten::mm", "aten::bmm"):
                products.append((args[0].dtype, *(x.fp32_precision for x in settings)))
            return function(*args, **(kwargs or {}))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    allowed = [x.fp32_precision for x in settings]
    try:
        model.zero_grad()
        watch = LayerMetrics(model, optimizers)
        watch.snapshot()
        backward(model)
        with Watch(), torch.autocast("cpu", torch.bfloat16):
            watch.after_backward()
            watch.read()
        assert "tf32" in allowed and [x.fp32_precision for x in settings] == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(products) >= 4  # QᵀQ and QᵀQ' of both sides at least
    assert {entry[1:] for entry in products} == {("ieee", "ieee")}
    assert torch.bfloat16 not in {entry[0] for entry in products}


def test_orthogonality_error_and_status():
    model, _ = trained("grad")
    with torch.no_grad():
        model[0].basis_u[:, 0] *= 1.5
        model[2].basis_v[0, 0] = math.nan
    first, second = layer_metrics(model).values()
    assert first["orthogonality_error"] == pytest.approx(1.25, rel=1e-3)
    assert math.isnan(second["orthogonality_error"])
    for mode in ("grad", "factors"):
        model, optimizers = build(mode)
        model.zero_grad()
        model(torch.full((5, 24), math.nan)).sum().backward()
        optimizers[0].step()
        for values in layer_metrics(model, optimizers).values():
            assert values["orth_status"] == 3 and values["orthogonality_error"] < 1e-5


@pytest.mark.parametrize("probes", [0, 8])
def test_memory_saved_is_measured_on_the_gradients(probes):
    dense, sketches = 4 * 24 * 40, 4 * (24 + 40) * (4 + probes)
    for mode, expected in (("grad", 0), ("factors", dense - sketches)):
        model, optimizers = trained(mode, probes=probes)
        watch = LayerMetrics(model, optimizers)
        watch.after_backward()
        model.zero_grad()
        assert watch.read()["0"]["memory_saved_mb"] * 2**20 == pytest.approx(expected)
        # With no gradient there, those to come stand for it.
        assert layer_metrics(model)["0"]["memory_saved_mb"] * 2**20 == pytest.approx(expected)
    model, optimizers = build("momentum", "sampled", momentum_dtype="int8")
    backward(model)
    assert layer_metrics(model)["0"]["memory_saved_mb"] == dense / 2**20
    model[0].weight.grad = torch.zeros(40, 24)  # one that exists is counted
    assert layer_metrics(model)["0"]["memory_saved_mb"] == 0
    model[0].weight.grad = None
    model[0].weight.requires_grad_(False)
    assert layer_metrics(model)["0"]["memory_saved_mb"] == 0  # there is none to save


@pytest.mark.parametrize(
    ("mode", "method", "optimizer"),
    [
        ("grad", "tangent", Muon),
        ("factors", "power", AdamW),
        ("momentum", "sampled", Muon),
    ],
)
def test_memory_of_a_layer_is_what_it_holds(mode, method, optimizer):
    probes = 0 if method == "sampled" else 8
    model, optimizers = build(mode, method, probes, optimizer=optimizer)
    step(model, optimizers)
    for name, values in layer_metrics(model, optimizers).items():
        layer = model.get_submodule(name)
        counted = sum(memory_bytes(layer, optimizers).values())
        counters = 8 + 4 * len(layer.config.estimator.STATS)
        measured = values["layer_memory_usage"] * 2**20
        assert measured == pytest.approx(counted + counters), (name, measured, counted)
        alone = layer_metrics(model)[name]["layer_memory_usage"] * 2**20
        state = memory_bytes(layer, optimizers)["optimizer_state"]
        own = 0 if mode != "momentum" else memory_bytes(layer)["optimizer_state"]
        assert measured - alone == pytest.approx(state - own)


def test_sampled_layers_know_their_sample():
    model, optimizers = trained("grad", "sampled", probes=0, sampling_fraction=0.5)
    for values in layer_metrics(model, optimizers).values():
        assert 0.3 < values["sampled_share"] < 0.7 and values["sampling_noise"] > 0
        for key in METRICS[:4] + ("effective_rank", "orthogonality_error", "gradient_norm"):
            assert math.isnan(values[key]), key


def test_unknown_is_nan_and_no_layers_is_empty():
    model, optimizers = trained("grad", probes=0)
    values = layer_metrics(model, optimizers)["0"]
    assert math.isnan(values["energy_capture"]) and math.isnan(values["gradient_norm"])
    assert values["estimate_norm"] > 0
    fresh, _ = build("grad")
    assert math.isnan(layer_metrics(fresh)["0"]["trust_factor"])
    assert layer_metrics(nn.Linear(2, 2)) == {}
    assert math.isnan(aggregate({})["energy_capture"]) and aggregate({})["memory_saved_mb"] == 0
    model[0].stats[STATS.index("captured_norm_sq")] = math.nan
    model[0].config = MoleGradConfig.of(rank_k=4, probes=1)
    assert math.isnan(layer_metrics(model)["0"]["energy_capture"])


def test_everything_comes_in_one_transfer(monkeypatch):
    model, optimizers = trained("factors")
    watch = LayerMetrics(model, optimizers)
    watch.snapshot()
    model.zero_grad()
    backward(model)
    moved = []
    to_host = torch.Tensor.cpu
    for name in ("item", "numpy", "__bool__", "__float__", "__int__"):
        refuse = lambda *_, name=name: pytest.fail(f"{name} waits for the device")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: moved.append(t.numel()) or to_host(t))
    watch.after_backward()
    assert moved == []
    watch.read()
    assert len(moved) == 1


def test_aggregate():
    names = ("a", "b", "c")
    metrics = {name: {key: float(i + 1) for key in METRICS} for i, name in enumerate(names)}
    metrics["c"]["energy_capture"] = math.nan
    metrics["a"]["condition_number"] = math.inf
    total = aggregate(metrics)
    assert total["memory_saved_mb"] == total["layer_memory_usage"] == 6
    assert total["energy_capture"] == 1.5 and total["energy_capture_min"] == 1
    assert total["condition_number"] == 2.5 and total["condition_number_max"] == 3
    assert total["orthogonality_error"] == 2 and total["orthogonality_error_max"] == 3
    assert total["subspace_quality"] == 2 and total["subspace_quality_min"] == 1
    assert set(total) >= set(METRICS)


@pytest.mark.parametrize(("mode", "method"), [*LOW_RANK, ("momentum", "sampled")])
def test_a_layer_says_the_same_of_itself_also_once_it_was_pickled(mode, method):
    model, optimizers = trained(mode, method)
    everything = layer_metrics(model, optimizers)
    for name, layer in layers(model).items():
        own = layer.metrics()
        assert own == pytest.approx({key: everything[name][key] for key in own})
        assert all(map(math.isfinite, own.values())) and len(own) >= 2
        fresh = MoleLinear(24, 40, config=layer.config).metrics()
        assert all(map(math.isnan, fresh.values()))
    again = pickle.loads(pickle.dumps(model))
    assert again[0].metrics() == model[0].metrics()
