import contextlib
import copy
import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from molegrad import MoleGradConfig, MoleLinear, bases_state_dict, convert, ignored_by_ddp, revert
from molegrad.autograd import STATS
from molegrad.monitor.shadow import SHADOW_METRICS, Shadow, choose_layers
from molegrad.optim import Muon, matrix_param_groups, other_params
from molegrad.rank import RankController
from molegrad.reference import hutch_norm_sq
from tests.models import TinyGPT

F64 = torch.float64
LAYER = "h.0.mlp.c_fc"  # 32 -> 64
LOW_RANK = [
    {"gradient_mode": mode, "method": method, "rank_k": 4, "probes": probes}
    for mode in ("dense", "factored")
    for method in ("tangent", "power")
    for probes in (0, 6)
]
SAMPLED = [
    {"gradient_mode": "dense", "sample_share": 0.3},
    {"gradient_mode": "momentum", "sample_share": 0.3},
    {"gradient_mode": "momentum", "sample_share": 0.3, "momentum_dtype": "bfloat16"},
    {"gradient_mode": "momentum", "sample_share": 0.3, "momentum_dtype": "int8"},
    {"gradient_mode": "momentum", "sample_share": 0.3, "saved_inputs": "fp8"},
]
EVERY = LOW_RANK + SAMPLED


def label(fields) -> str:
    return "-".join(str(value) for value in fields.values())


def build(fields, depth=1, dtype=F64):
    torch.manual_seed(0)
    model = TinyGPT(depth=depth).to(dtype)
    convert(model, MoleGradConfig(target_layers="all", **fields))
    groups = matrix_param_groups(model.h)
    return model, [Muon(groups), torch.optim.AdamW(other_params(model, groups), lr=1e-3)]


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(50, (6, 17), generator=torch.Generator().manual_seed(seed))


def loss_of(model, idx, parts=1) -> torch.Tensor:
    logits = model(idx[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()) / parts


def step(model, optimizers, batches, shadow=None, called=None):
    """One step; with a shadow what `read` gives, as of before the optimizers' steps."""
    if shadow:
        shadow.begin()
    for idx in batches:
        if shadow:
            shadow.observe(lambda idx=idx: loss_of(model, idx, len(batches)))
        loss_of(model if called is None else called, idx, len(batches)).backward()
    if shadow:
        shadow.compare()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return shadow.read() if shadow else None


def true_gradients(model, batches) -> dict[str, torch.Tensor]:
    """Of nn.Linear with the same weights, by torch's own backward pass."""
    plain = revert(copy.deepcopy(model))
    for idx in batches:
        loss_of(plain, idx, len(batches)).backward()
    return {n: m.weight.grad for n, m in plain.named_modules() if isinstance(m, nn.Linear)}


def estimate_by_hand(layer: MoleLinear, before) -> torch.Tensor:
    """Ĝ without trust factor, from what the backward passes have left."""
    if layer.config.gradient_mode == "dense":
        return layer.weight.grad.double()
    if layer.config.gradient_mode == "momentum":
        return momentum_of(layer) - before
    k = layer.rank
    u, v = layer.basis_u.detach()[:, :k], layer.basis_v.detach()[:, :k]
    y, w = layer.basis_u.grad[:, :k], layer.basis_v.grad[:, :k]
    if layer.config.method == "power":
        return y @ w.mT
    return u @ w.mT + (torch.eye(len(u), dtype=u.dtype) - u @ u.mT) @ y @ v.mT


def momentum_of(layer: MoleLinear) -> torch.Tensor | None:
    if layer.momentum is None:
        return None
    value = layer.momentum.detach().double()
    return value if layer.momentum_scale is None else value * layer.momentum_scale.detach().double()


def accumulates(fields) -> bool:
    return (fields["gradient_mode"], fields.get("method")) != ("factored", "power")


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
    ranked = "method" in fields
    if ranked:
        rank = 4 * (2 if fields["method"] == "tangent" else 1)
        rank *= len(batches) if fields["gradient_mode"] == "dense" else 1
        wanted["best_energy"] = (values[:rank].norm() / norm).item()
        assert record["rank"] == rank and got["best_energy"] >= got["energy_capture"] > 0
        assert got["cosine"] < 1 - 1e-3
    else:
        assert record["rank"] == 0 and math.isnan(got["best_energy"])
    # An int8 momentum is rounded to float32 scales, a float32 one to its own size.
    tolerance = 1e-9 if ranked or fields["gradient_mode"] == "dense" else 1e-4
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, rel=tolerance), key
    torch.testing.assert_close(torch.tensor(record["spectrum"], dtype=F64), values)
    theirs = torch.linalg.svdvals(estimate)
    atol = max(tolerance, 1e-7) * float(theirs[0])  # small values come from a Gram matrix
    spectrum = torch.tensor(record["estimate_spectrum"], dtype=F64)
    torch.testing.assert_close(spectrum, theirs, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("method", ["tangent", "power"])
@pytest.mark.parametrize("mode", ["dense", "factored"])
def test_free_estimates_against_the_truth(mode, method):
    fields = {"gradient_mode": mode, "method": method, "rank_k": 4, "probes": 6}
    model, optimizers = build(fields)
    layer = model.get_submodule(LAYER)
    batches = [tokens(1), tokens(2)] if accumulates(fields) else [tokens(1)]
    # In dense mode the statistics are those of the last micro-batch.
    own = batches[-1:] if mode == "dense" else batches
    truth = true_gradients(model, own)[LAYER].norm() * len(own) / len(batches)
    shadow = Shadow(model, LAYER, optimizers)
    shadow.begin()
    for idx in batches:
        shadow.observe(lambda idx=idx: loss_of(model, idx, len(batches)))
        loss_of(model, idx, len(batches)).backward()
    shadow.compare()
    norm_sq, captured_sq = layer.stats[:2].double()
    if mode == "factored":
        captured_sq = estimate_by_hand(layer, None).square().sum()
    if (mode, method) == ("factored", "tangent"):
        y, v = layer.basis_u.grad, layer.basis_v.detach()
        norm_sq = hutch_norm_sq(y[:, :4], y[:, 4:], v[:, :4], v[:, 4:])
    got = shadow.read()[LAYER]
    assert 1e-6 < abs(got["norm_estimate_error"]) < 0.5
    assert got["norm_estimate_error"] == pytest.approx((norm_sq.sqrt() / truth - 1).item(), 1e-6)
    error = (captured_sq / norm_sq).sqrt() - captured_sq.sqrt() / truth
    assert got["energy_estimate_error"] == pytest.approx(error.item(), 1e-4, abs=1e-7)
    if mode == "factored":  # the optimizer's own statistics say the same
        optimizers[0].step()
        assert optimizers[0].state[layer.basis_v]["stats"][1] == pytest.approx(captured_sq.item())


@pytest.mark.parametrize("mode", ["dense", "factored"])
def test_a_trust_factor_belongs_to_the_estimate_and_not_to_its_energy(mode):
    fields = {"gradient_mode": mode, "method": "tangent", "rank_k": 4, "probes": 6}
    results = {}
    for scaled in (False, True):
        model, optimizers = build({**fields, "trust_scaling": scaled})
        shadow = Shadow(model, LAYER, optimizers)
        results[scaled] = step(model, optimizers, [tokens(1)], shadow)[LAYER]
        if scaled:
            layer = model.get_submodule(LAYER)
            own = optimizers[0].state[layer.basis_v]["stats"] if mode == "factored" else layer.stats
            trust = own[2].item()
    plain, scaled = results[False], results[True]
    assert trust > 1.01
    assert scaled["norm_ratio"] == pytest.approx(trust * plain["norm_ratio"], 1e-5)
    for key in ("energy_capture", "norm_estimate_error", "energy_estimate_error"):
        assert scaled[key] == pytest.approx(plain[key], 1e-6)
    assert plain["norm_ratio"] == pytest.approx(plain["energy_capture"], 1e-9)  # a projection


def test_trust_max_is_the_optimizer_s():
    model, optimizers = build(
        {"gradient_mode": "factored", "rank_k": 2, "probes": 6, "trust_scaling": True}
    )
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


@pytest.mark.parametrize("mode", ["dense", "momentum"])
def test_all_products_are_the_gradient_itself(mode):
    model, optimizers = build({"gradient_mode": mode, "sample_share": 1.0})
    got = step(model, optimizers, [tokens(1), tokens(2)], Shadow(model, "all"))
    assert len(got) == 6
    for values in got.values():
        tolerance = 1e-12 if mode == "dense" else 1e-6  # the momentum is float32
        assert values["cosine"] == pytest.approx(1, abs=tolerance)
        assert values["relative_error"] < tolerance
        assert abs(values["energy_estimate_error"]) < tolerance


@pytest.mark.parametrize("mode", ["dense", "momentum"])
def test_the_sampling_noise_claimed_is_the_noise_found(mode):
    model, optimizers = build({"gradient_mode": mode, "sample_share": 0.2, "sample_block": 1})
    shadow, claimed, errors = Shadow(model, LAYER), [], []
    layer = model.get_submodule(LAYER)
    optimizers = [optimizers[1]]  # the layer's weight stays, so that draws are alike
    for _ in range(20):
        errors.append(step(model, optimizers, [tokens(1), tokens(2)], shadow)[LAYER])
        claimed.append(layer.stats[STATS.index("sampling_noise")].item())
        layer.weight.grad = None
    claim = sum(claimed) / len(claimed)
    mean = sum(e["energy_estimate_error"] for e in errors) / len(errors)
    assert claim > 0.05 and abs(mean) < 0.15 * claim
    assert max(abs(e["energy_estimate_error"]) for e in errors) > 1e-3 * claim


def everything(model, optimizers) -> dict[str, torch.Tensor]:
    state = {**model.state_dict(), **bases_state_dict(model)}
    state |= dict(model.named_parameters())
    for i, optimizer in enumerate(optimizers):
        for j, entries in optimizer.state_dict()["state"].items():
            state |= {f"{i}.{j}.{k}": torch.as_tensor(v) for k, v in entries.items()}
    return {key: value.detach().clone() for key, value in state.items()}


class WithDropoutAndNorm(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.gpt, self.norm = model, nn.BatchNorm1d(50).double()

    def forward(self, idx):
        logits = F.dropout(self.gpt(idx), 0.1)
        return self.norm(logits.flatten(0, 1)).view_as(logits)


@pytest.mark.parametrize("fields", EVERY, ids=label)
def test_training_is_the_same_to_the_bit(fields):
    ends = []
    parts = 2 if accumulates(fields) else 1
    for watched in (False, True):
        gpt, optimizers = build(fields)
        model = WithDropoutAndNorm(gpt)
        shadow = Shadow(model, "all", optimizers) if watched else None
        torch.manual_seed(3)
        for i in range(4):
            batches = [tokens(10 * i + part) for part in range(parts)]
            step(model, optimizers, batches, shadow if i != 1 else None)
        ends.append(everything(model, optimizers))
        assert all(not m._forward_hooks for m in model.modules())
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 10
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=0, atol=0, equal_nan=True, msg=key)


def test_dropout_is_that_of_the_pass_that_follows():
    gpt, optimizers = build({"gradient_mode": "dense", "sample_share": 1.0})
    model = WithDropoutAndNorm(gpt)
    got = step(model, optimizers, [tokens(1), tokens(2)], Shadow(model, LAYER))
    assert got["gpt." + LAYER]["relative_error"] < 1e-12


def test_nothing_arises_and_hooks_go_when_the_loss_fails():
    model, optimizers = build({"gradient_mode": "factored", "rank_k": 4})
    shadow = Shadow(model, "all")
    fired = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(fired.append)
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    random = torch.get_rng_state()

    def fails():
        loss_of(model, tokens(1))
        torch.rand(3)
        raise KeyError("in the middle")

    shadow.begin()
    for loss in (fails, lambda: loss_of(model, tokens(1))):
        with contextlib.suppress(KeyError):
            shadow.observe(loss)
        assert all(not m._forward_hooks for m in model.modules())
        assert parameters == [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
        assert not fired and all(p.grad is None for p in model.parameters())
        assert torch.equal(random, torch.get_rng_state())
    loss_of(model, tokens(1)).backward()
    assert fired
    shadow.compare()  # the failed micro-batch counts for nothing
    assert shadow.read()[LAYER]["cosine"] > 0
    # A projection's: the truth is that of one micro-batch and not of two.
    values = shadow.read()[LAYER]
    assert values["norm_ratio"] == pytest.approx(values["cosine"], 1e-9)


def test_the_extra_pass_keeps_no_inputs_for_weight_gradients():
    model, _ = build({"gradient_mode": "dense", "sample_share": 1.0})
    inputs, saved = [], set()
    hooks = [
        m.register_forward_hook(lambda _, args, __: inputs.append(args[0].data_ptr()))
        for m in model.modules()
        if isinstance(m, MoleLinear) and m is not model.h[0].mlp.c_proj
    ]
    shadow = Shadow(model, LAYER)
    shadow.begin()

    def run():
        def pack(x):
            saved.add(x.data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return loss_of(model, tokens(1))

    shadow.observe(run)
    assert inputs and not saved & set(inputs)
    loss = run()
    assert saved & set(inputs)  # training does keep them
    del loss
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("fields", [EVERY[1], EVERY[5], SAMPLED[1]], ids=label)
def test_compiled_graphs_stay_valid(fields):
    from torch._dynamo.testing import CompileCounter  # slow to import

    torch._dynamo.reset()
    model, optimizers = build(fields, dtype=torch.float32)
    counter = CompileCounter()
    called = torch.compile(model, backend=counter)
    shadow = Shadow(model, LAYER, optimizers)
    compiled = []
    for i in range(4):
        step(model, optimizers, [tokens(i)], shadow if i % 2 else None, called)
        compiled.append(counter.frame_count)
    assert compiled == [1, 1, 1, 1]
    # The compiled model itself runs as if it were not, hooks and all.
    shadow.begin()
    shadow.observe(lambda: loss_of(called, tokens(9)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["dense", "factored"])
def test_adaptive_ranks_may_change_between_steps(mode):
    fields = {"gradient_mode": mode, "rank_k": 4, "probes": 4, "energy_target": 0.95}
    model, optimizers = build({**fields, "rank_interval": 1, "rank_budget": 0, "rank_min": 2})
    layer = model.get_submodule(LAYER)
    controller = RankController(model, optimizers, layer.config)
    shadow, ranks, energies = Shadow(model, LAYER, optimizers), [], []
    for i in range(3):
        shadow.begin()
        shadow.observe(lambda i=i: loss_of(model, tokens(i)))
        loss_of(model, tokens(i)).backward()
        controller.observe()
        shadow.compare()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert shadow.records()[0]["rank"] == min(2 * layer.rank, 32)
        controller.step()
        ranks.append(layer.rank)
        energies.append(shadow.read()[LAYER]["energy_capture"])
    assert len(set(ranks)) > 1 and min(energies) > 0 and max(energies) < 1


def test_gradients_that_were_there_before_do_not_count():
    for fields in (EVERY[0], EVERY[4], SAMPLED[0]):
        results = []
        for left_over in (False, True):
            model, optimizers = build(fields)
            if left_over:
                for p in model.parameters():
                    if p.requires_grad:
                        p.grad = torch.randn_like(p)
            results.append(step(model, optimizers, [tokens(1)], Shadow(model, "all"))[LAYER])
        for key in ("cosine", "norm_ratio", "relative_error"):
            assert results[1][key] == pytest.approx(results[0][key], 1e-9)
    model, optimizers = build(LOW_RANK[6])
    loss_of(model, tokens(0)).backward()
    with pytest.raises(ValueError, match=r"h.0.*zero_grad\(set_to_none=True\)"):
        Shadow(model, LAYER).begin()


class Awkward(nn.Module):
    def __init__(self):
        super().__init__()
        self.inplace = nn.Linear(24, 24)
        self.twice = nn.Linear(24, 24)
        self.last = nn.Linear(24, 40)

    def forward(self, x):
        x = self.inplace(x).relu_()
        x = self.twice(self.twice(input=x).tanh_()).relu_()
        return checkpoint(lambda x: self.last(x).sigmoid_(), x, use_reentrant=False)


@pytest.mark.parametrize("layers", ["all", "inplace", "twice", "last"])
def test_layers_called_twice_or_from_checkpoints_or_changed_in_place(layers):
    torch.manual_seed(0)
    config = MoleGradConfig(sample_share=1.0, target_layers=r".*")
    model = convert(Awkward().double(), config)
    shadow, x = Shadow(model, layers), torch.randn(30, 24, dtype=F64)
    shadow.begin()
    shadow.observe(lambda: model(x).square().sum())
    model(x).square().sum().backward()
    shadow.compare()
    values = shadow.read()
    assert len(values) == (3 if layers == "all" else 1)
    for name, metrics in values.items():
        assert metrics["relative_error"] < 1e-12
        # Of a layer's two calls only the last one's sampling noise is known.
        noise = math.nan if name == "twice" else 0.0
        assert metrics["energy_estimate_error"] == pytest.approx(noise, abs=1e-12, nan_ok=True)


def test_an_input_that_is_changed_in_place_is_refused():
    model = nn.Sequential(MoleLinear(24, 24, config=MoleGradConfig(sample_share=1.0)))
    shadow = Shadow(model)
    shadow.begin()

    def loss():
        x = torch.randn(5, 24)
        y = model(x)
        x.zero_()
        return y.sum()

    with pytest.raises(RuntimeError, match="layer 0: its input is changed in place"):
        shadow.observe(loss)


@pytest.mark.parametrize("mode", ["dense", "momentum"])
def test_under_autocast_the_truth_is_of_the_rounded_inputs(mode):
    model, optimizers = build({"gradient_mode": mode, "sample_share": 1.0}, dtype=torch.float32)
    shadow = Shadow(model, "all")
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, optimizers, [tokens(1)], shadow)
    for values in got.values():
        # The momentum is summed in float32, a dense gradient made in bfloat16.
        assert values["relative_error"] < (4e-3 if mode == "dense" else 1e-6)
    spectrum = torch.tensor(shadow.records()[0]["spectrum"])
    assert len(spectrum) == 32 and not torch.equal(spectrum, spectrum.bfloat16().float())


def test_the_comparison_itself_knows_no_autocast():
    model, _ = build(LOW_RANK[5], dtype=torch.float32)
    inside, outside = Shadow(model, LAYER), Shadow(model, LAYER)
    with torch.autocast("cpu", torch.bfloat16):
        for shadow in (inside, outside):
            shadow.begin()
            shadow.observe(lambda: loss_of(model, tokens(1)))
        loss_of(model, tokens(1)).backward()
        inside.compare()
    outside.compare()
    assert inside.records() == outside.records()


def test_no_number_is_made_up():
    fields = {"gradient_mode": "dense", "rank_k": 4, "probes": 2}
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
    model, _ = build({"gradient_mode": "dense", "rank_k": 4}, depth=5)
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
    convert(flat, MoleGradConfig(sample_share=0.5, target_layers=r".*"))
    assert list(choose_layers(flat)) == ["0", "2", "4"]


def test_wrong_order_is_refused():
    model, _ = build({"gradient_mode": "dense", "rank_k": 4})
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
    {"gradient_mode": "dense", "sample_share": 1.0},
    {"gradient_mode": "momentum", "sample_share": 1.0},
    {"gradient_mode": "factored", "rank_k": 4, "probes": 4},
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
