import contextlib
import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from molegrad import MoleGradConfig, MoleLinear, convert, ignored_by_ddp
from molegrad.monitor.shadow import SHADOW_METRICS, Shadow, choose_layers
from molegrad.ops.power import hutch_norm_sq
from tests.models import TinyGPT
from tests.monitor.shadow_steps import (
    EVERY,
    F64,
    LAYER,
    accumulates,
    build,
    label,
    loss_of,
    step,
    tokens,
    true_gradients,
)


def estimate_by_hand(layer: MoleLinear, before) -> torch.Tensor:
    """Ĝ without trust factor, from what the backward passes have left."""
    if layer.config.gradient_mode == "grad":
        return layer.weight.grad.double()
    if layer.config.gradient_mode == "momentum":
        return momentum_of(layer) - before
    k = layer.rank
    u, v = layer.basis_u.detach()[:, :k], layer.basis_v.detach()[:, :k]
    y, w = layer.basis_u.grad[:, :k], layer.basis_v.grad[:, :k]
    if layer.config.estimator.one_sided:
        return y @ w.mT
    return u @ w.mT + (torch.eye(len(u), dtype=u.dtype) - u @ u.mT) @ y @ v.mT


def momentum_of(layer: MoleLinear) -> torch.Tensor | None:
    tensors = layer.state.tensors
    if "momentum" not in tensors:
        return None
    return tensors["momentum"].detach().double() * tensors.get("momentum_scale", 1.0)


TANGENT = {"gradient_mode": "factors", "method": "tangent", "rank_k": 4, "probes": 6}


@pytest.mark.parametrize("fields", EVERY, ids=label)
def test_numbers_are_those_of_the_definitions(fields):
    model, optimizers = build(fields)
    step(model, optimizers, [tokens(0)])  # bases and momentum are somewhere
    batches = [tokens(1), tokens(2)] if accumulates(fields) else [tokens(1)]
    layer = model.get_submodule(LAYER)
    truth = true_gradients(model, batches)[LAYER]
    shadow = Shadow(model, LAYER, optimizers, spectrum=64)
    before = momentum_of(layer)
    shadow.begin()
    for idx in batches:
        shadow.observe(lambda idx=idx: loss_of(model, idx, len(batches)))
        loss_of(model, idx, len(batches)).backward()
    estimate = estimate_by_hand(layer, before)
    shadow.compare()
    got, (record,) = shadow.read()[LAYER], shadow.records()
    assert tuple(got) == SHADOW_METRICS

    norm, values = truth.norm(), torch.linalg.svdvals(truth)
    cosine = ((truth * estimate).sum() / (norm * estimate.norm())).item()
    probabilities = values / values.sum()
    wanted = {
        "cosine": cosine,
        "energy_capture": max(0.0, cosine),
        "norm_ratio": (estimate.norm() / norm).item(),
        "relative_error": ((estimate - truth).norm() / norm).item(),
        "effective_rank": (-(probabilities * probabilities.log()).sum()).exp().item(),
    }
    ranked = fields["method"] != "sampled"
    if ranked:
        rank = 4 * (2 if fields["method"] == "tangent" else 1)
        rank *= len(batches) if fields["gradient_mode"] == "grad" else 1
        wanted["best_energy"] = (values[:rank].norm() / norm).item()
        assert record["rank"] == rank and got["best_energy"] >= got["energy_capture"] > 0
        assert got["cosine"] < 1 - 1e-3
    else:
        assert record["rank"] == 0 and math.isnan(got["best_energy"])
    # An int8 momentum is rounded to float32 scales, a float32 one to its own size.
    tolerance = 1e-9 if ranked or fields["gradient_mode"] == "grad" else 1e-4
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, rel=tolerance), key
    torch.testing.assert_close(torch.tensor(record["spectrum"], dtype=F64), values)
    theirs = torch.linalg.svdvals(estimate)
    atol = max(tolerance, 1e-7) * float(theirs[0])  # small values come from a Gram matrix
    spectrum = torch.tensor(record["estimate_spectrum"], dtype=F64)
    torch.testing.assert_close(spectrum, theirs, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("method", ["tangent", "power"])
@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_free_estimates_against_the_truth(mode, method):
    fields = {"gradient_mode": mode, "method": method, "rank_k": 4, "probes": 6}
    model, optimizers = build(fields)
    layer = model.get_submodule(LAYER)
    batches = [tokens(1), tokens(2)] if accumulates(fields) else [tokens(1)]
    # In dense mode the statistics are those of the last micro-batch.
    own = batches[-1:] if mode == "grad" else batches
    truth = true_gradients(model, own)[LAYER].norm() * len(own) / len(batches)
    shadow = Shadow(model, LAYER, optimizers)
    shadow.begin()
    for idx in batches:
        shadow.observe(lambda idx=idx: loss_of(model, idx, len(batches)))
        loss_of(model, idx, len(batches)).backward()
    shadow.compare()
    norm_sq, captured_sq = layer.stats[:2].double()
    if mode == "factors":
        captured_sq = estimate_by_hand(layer, None).square().sum()
    if (mode, method) == ("factors", "tangent"):
        y, v = layer.basis_u.grad, layer.basis_v.detach()
        norm_sq = hutch_norm_sq(y[:, :4], y[:, 4:], v[:, :4], v[:, 4:])
    got = shadow.read()[LAYER]
    assert 1e-6 < abs(got["norm_estimate_error"]) < 0.5
    assert got["norm_estimate_error"] == pytest.approx((norm_sq.sqrt() / truth - 1).item(), 1e-6)
    error = (captured_sq / norm_sq).sqrt() - captured_sq.sqrt() / truth
    assert got["energy_estimate_error"] == pytest.approx(error.item(), 1e-4, abs=1e-7)
    if mode == "factors":  # the optimizer's own statistics say the same
        optimizers[0].step()
        assert optimizers[0].state[layer.basis_v]["stats"][1] == pytest.approx(captured_sq.item())


@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_a_trust_factor_belongs_to_the_estimate_and_not_to_its_energy(mode):
    fields = {"gradient_mode": mode, "method": "tangent", "rank_k": 4, "probes": 6}
    results = {}
    for scaled in (False, True):
        model, optimizers = build({**fields, "trust_scaling": scaled})
        shadow = Shadow(model, LAYER, optimizers)
        results[scaled] = step(model, optimizers, [tokens(1)], shadow)[LAYER]
        if scaled:
            layer = model.get_submodule(LAYER)
            own = optimizers[0].state[layer.basis_v]["stats"] if mode == "factors" else layer.stats
            trust = own[2].item()
    plain, scaled = results[False], results[True]
    assert trust > 1.01
    assert scaled["norm_ratio"] == pytest.approx(trust * plain["norm_ratio"], 1e-5)
    for key in ("energy_capture", "norm_estimate_error", "energy_estimate_error"):
        assert scaled[key] == pytest.approx(plain[key], 1e-6)
    assert plain["norm_ratio"] == pytest.approx(plain["energy_capture"], 1e-9)  # a projection


def test_trust_max_is_the_optimizer_s():
    model, optimizers = build({**TANGENT, "rank_k": 2, "trust_scaling": True})
    shadow, stale = Shadow(model, LAYER, optimizers), Shadow(model, LAYER)
    for group in optimizers[0].param_groups:
        group["trust_max"] = 1.01
    for s in (shadow, stale):
        s.begin()
        s.observe(lambda: loss_of(model, tokens(1)))
    loss_of(model, tokens(1)).backward()
    for s in (shadow, stale):
        s.compare()
    limited, free = (s.read()[LAYER] for s in (shadow, stale))
    assert limited["norm_ratio"] == pytest.approx(1.01 * limited["energy_capture"])
    assert free["norm_ratio"] > 1.02 * free["energy_capture"]


@pytest.mark.parametrize("mode", ["grad", "momentum"])
def test_all_products_are_the_gradient_itself(mode):
    model, optimizers = build({"gradient_mode": mode, "method": "exact"})
    got = step(model, optimizers, [tokens(1), tokens(2)], Shadow(model, "all"))
    assert len(got) == 6
    for values in got.values():
        tolerance = 1e-12 if mode == "grad" else 1e-6  # the momentum is float32
        assert values["cosine"] == pytest.approx(1, abs=tolerance)
        assert values["relative_error"] < tolerance
        assert abs(values["energy_estimate_error"]) < tolerance


@pytest.mark.parametrize("mode", ["grad", "momentum"])
def test_the_sampling_noise_claimed_is_the_noise_found(mode):
    fields = {"method": "sampled", "sampling_fraction": 0.2, "sampling_block": 1}
    model, optimizers = build({"gradient_mode": mode, **fields})
    shadow, claimed, errors = Shadow(model, LAYER), [], []
    layer = model.get_submodule(LAYER)
    optimizers = [optimizers[1]]  # the layer's weight stays, so that draws are alike
    for _ in range(20):
        errors.append(step(model, optimizers, [tokens(1), tokens(2)], shadow)[LAYER])
        claimed.append(layer.stats[1].item())
        layer.weight.grad = None
    claim = sum(claimed) / len(claimed)
    mean = sum(e["energy_estimate_error"] for e in errors) / len(errors)
    assert claim > 0.05 and abs(mean) < 0.15 * claim
    assert max(abs(e["energy_estimate_error"]) for e in errors) > 1e-3 * claim


@pytest.mark.parametrize("mode", ["grad", "momentum"])
def test_under_autocast_the_truth_is_of_the_rounded_inputs(mode):
    model, optimizers = build({"gradient_mode": mode, "method": "exact"}, dtype=torch.float32)
    shadow = Shadow(model, "all")
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, optimizers, [tokens(1)], shadow)
    for values in got.values():
        # The momentum is summed in float32, a dense gradient made in bfloat16.
        assert values["relative_error"] < (4e-3 if mode == "grad" else 1e-6)
    spectrum = torch.tensor(shadow.records()[0]["spectrum"])
    assert len(spectrum) == 32 and not torch.equal(spectrum, spectrum.bfloat16().float())


def test_no_number_is_made_up():
    fields = {"gradient_mode": "grad", "method": "tangent", "rank_k": 4, "probes": 2}
    model, _ = build(fields, dtype=torch.float32)
    shadow = Shadow(model, LAYER, spectrum=3)
    assert shadow.read() == {} and shadow.records() == []

    def values(scale):
        shadow.begin()
        shadow.observe(lambda: loss_of(model, tokens(1)) * scale)
        (loss_of(model, tokens(1)) * scale).backward()
        shadow.compare()
        model.zero_grad()
        return shadow.read()[LAYER]

    for scale in (0.0, float("nan")):
        assert all(math.isnan(value) for value in values(scale).values())
    assert [len(shadow.records()[0][key]) for key in ("spectrum", "estimate_spectrum")] == [3, 3]
    tiny = values(1e-30)  # whose squares float32 does not have
    assert 0 < tiny["energy_capture"] <= tiny["best_energy"] <= 1


def test_which_layers_are_chosen():
    model, _ = build({"gradient_mode": "grad", "method": "tangent", "rank_k": 4}, depth=5)
    for block in (0, 2, 4):  # the largest of a role; of equal ones the first
        assert f"h.{block}.mlp.c_fc" in choose_layers(model)
        assert f"h.{block}.attn.c_q" in choose_layers(model)
    assert len(choose_layers(model)) == 6
    assert len(choose_layers(model, "all")) == 30
    assert len(choose_layers(model, "ffn_only")) == 10
    assert list(choose_layers(model, [r"h\.1\..*c_v", "h.0.mlp.c_fc"])) == [
        "h.0.mlp.c_fc",
        "h.1.attn.c_v",
    ]
    model.h[0].requires_grad_(False)
    assert len(choose_layers(model, "ffn_only")) == 8
    with pytest.raises(ValueError, match="'c_fcc' matches no converted"):
        Shadow(model, "c_fc,c_fcc")
    with pytest.raises(ValueError, match="no MoleLinear that is trained"):
        Shadow(TinyGPT())
    with pytest.raises(TypeError, match="shadow layers"):
        Shadow(model, 3)
    with pytest.raises(ValueError, match="spectrum"):
        Shadow(model, spectrum=-1)
    flat = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    convert(flat, MoleGradConfig.of(method="sampled", sampling_fraction=0.5, target_layers=r".*"))
    assert list(choose_layers(flat)) == ["0", "2", "4"]


def test_wrong_order_is_refused():
    model, _ = build({"gradient_mode": "grad", "method": "tangent", "rank_k": 4})
    shadow = Shadow(model, LAYER)
    with pytest.raises(RuntimeError, match=r"begin\(\)"):
        shadow.observe(lambda: loss_of(model, tokens(1)))
    with pytest.raises(RuntimeError, match=r"begin\(\)"):
        shadow.compare()
    shadow.begin()
    with pytest.raises(RuntimeError, match=r"without observe\(\)"):
        shadow.compare()
    with torch.no_grad(), pytest.raises(RuntimeError, match="depends on none"):
        shadow.observe(lambda: torch.zeros(()))
    shadow.observe(lambda: loss_of(model, tokens(1)))
    with pytest.raises(RuntimeError, match="has a gradient"):
        shadow.compare()


PARALLEL = [
    {"gradient_mode": "grad", "method": "exact"},
    {"gradient_mode": "momentum", "method": "exact"},
    {"gradient_mode": "factors", "method": "tangent", "rank_k": 4, "probes": 4},
]


def half(rank: int, fields) -> tuple[dict, list]:
    """What one of two processes sees, which has half of every micro-batch."""
    model, optimizers = build(fields)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [*(name for name, _ in model.named_buffers()), *ignored_by_ddp(model)]
    )
    called, shadow = DistributedDataParallel(model), Shadow(model, LAYER, optimizers)
    shadow.begin()
    for seed in (1, 2):
        idx = tokens(seed)[3 * rank : 3 * rank + 3]
        shadow.observe(lambda idx=idx: loss_of(model, idx, 2))
        with called.no_sync() if seed == 1 else contextlib.nullcontext():
            loss_of(called, idx, 2).backward()
    shadow.compare()
    return shadow.read()[LAYER], shadow.records()[0]["spectrum"]


def worker(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results[rank] = [half(rank, fields) for fields in PARALLEL]
    finally:
        dist.destroy_process_group()


def test_two_processes_compare_means():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, args=(port, results), nprocs=2)
        both = list(zip(results[0], results[1], strict=True))
    for fields, ((first, spectrum), (second, _)) in zip(PARALLEL, both, strict=True):
        model, optimizers = build(fields)
        shadow = Shadow(model, LAYER, optimizers)
        alone = step(model, optimizers, [tokens(1), tokens(2)], shadow)[LAYER]
        assert spectrum == pytest.approx(shadow.records()[0]["spectrum"], 1e-6, abs=1e-8)
        for key in ("cosine", "norm_ratio", "effective_rank", "norm_estimate_error"):
            assert first[key] == pytest.approx(second[key], 1e-12, nan_ok=True)
            assert first[key] == pytest.approx(alone[key], 1e-5, nan_ok=True)
