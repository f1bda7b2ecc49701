"""Faults of every kind, put into layers of every gradient mode, are found, told and acted on."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from molegrad import MoleGradConfig, convert
from molegrad.linear import MoleLinear
from molegrad.monitor import HealthThresholds, LayerMetrics, device_checks
from molegrad.monitor.health import (
    DEFAULT_ACTIONS,
    KINDS,
    Health,
    HealthError,
    parse_actions,
    reset_layer,
)
from molegrad.optim import AdamW, Muon, matrix_param_groups, other_params
from tests.gpt.model.test_gpt import small, tokens

LOW_RANK = {
    "grad-tangent": {"gradient_mode": "grad", "method": "tangent", "rank_k": 4, "probes": 4},
    "grad-power": {"gradient_mode": "grad", "method": "power", "rank_k": 4},
    "factors-tangent": {"gradient_mode": "factors", "method": "tangent", "rank_k": 4},
    "factors-power": {"gradient_mode": "factors", "method": "power", "rank_k": 4, "probes": 2},
}
MOMENTUM = {"gradient_mode": "momentum", "method": "sampled"}
MODES = {
    **LOW_RANK,
    "momentum": MOMENTUM,
    "momentum-int8": {**MOMENTUM, "momentum_dtype": "int8"},
}
# Every kind, every mode, and the pairs that differ in what is looked at or dropped.
CASES = [
    ("nan", "grad-power"),
    ("nan", "factors-power"),
    ("nan", "momentum"),
    ("nan", "momentum-int8"),
    ("exploding", "grad-tangent"),
    ("exploding", "factors-tangent"),
    ("exploding", "momentum-int8"),
    ("degenerate", "grad-tangent"),
    ("degenerate", "factors-power"),
    ("degenerate", "momentum"),
    ("frozen", "grad-power"),
    ("frozen", "factors-tangent"),
    ("orthogonality", "grad-tangent"),
    ("orthogonality", "factors-power"),
]


def read(model, optimizers) -> dict[str, dict[str, float]]:
    metrics = LayerMetrics(model, optimizers).read()
    checks = device_checks(model, optimizers)
    return {name: known | checks[name] for name, known in metrics.items()}


def options(mode, **changes):
    free = {"min_layer_utilization": 0} if mode in LOW_RANK else {}
    return {**MODES[mode], "target_layers": "all", **free, **changes}


def bases_of(layer):
    return layer.config.estimator.bases(layer.state)


class Rig:
    """Two linear layers on one batch, whose gradients have rank 4, and their health."""

    def __init__(self, mode="grad-tangent", actions="warn", lr=1e-3, optimizer=Muon, **changes):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 20, bias=False))
        self.model = convert(
            net,
            MoleGradConfig.of(**options(mode, **changes)),
        )
        self.optimizers = [optimizer(matrix_param_groups(self.model), lr=lr)]
        self.x = torch.randn(64, 4) @ torch.randn(4, 24)
        self.y = torch.randn(64, 20)
        self.said, self.step = [], 0
        self.health = Health(self.model, self.optimizers, actions, say=self.said.append)

    @property
    def layer(self) -> MoleLinear:
        return self.model[0]

    def train(self, steps=1, scale=1.0) -> float:
        for _ in range(steps):
            loss = (self.model(self.x) - self.y).square().mean()
            (loss * scale).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return loss.item()

    def check(self):
        return self.health.check(self.step, read(self.model, self.optimizers))

    def induce(self, kind: str) -> None:
        """Bring the layer "0" to where the next reading tells of this kind."""
        if kind in ("nan", "orthogonality"):
            self.train()
            assert self.check() == []
            with torch.no_grad():
                if kind == "orthogonality":
                    self.layer.basis_v.mul_(1.01)
                elif "momentum_scale" in self.layer.state.tensors:
                    self.layer.momentum_scale[0] = math.nan
                elif "momentum" in self.layer.state.tensors:
                    self.layer.momentum[3, 5] = math.nan
                else:
                    self.layer.basis_u[3, 2] = math.nan
        elif kind == "exploding":
            for _ in range(5):
                self.train()
                assert self.check() == []
            self.train(scale=1e6)
        elif self.layer.config.estimator.unbiased:  # degenerate: the gradient dies
            self.train()
            assert self.check() == []
            for _ in range(2):
                self.train(scale=0.0)
                assert self.check() == []
            self.train(scale=0.0)
        else:  # degenerate where the data has one direction, frozen where nothing is explored
            self.train(12)  # until the bases have found the gradient
            for _ in range(2):
                self.train(4)
                assert self.check() == []
            self.train(4)


def rig(kind: str, mode: str, action: str) -> Rig:
    changes = {"warm_start_decay": 1.0} if kind == "frozen" else {}
    made = Rig(mode, f"off,{kind}={action}", lr=1e-6, **changes)
    if kind == "degenerate" and mode in LOW_RANK:
        made.x = made.x[:1].expand(64, 24).clone()
        made.y = made.y[:1].expand(64, 20).clone()
    made.induce(kind)
    return made


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_a_fault_is_told_once_until_it_is_over(kind, mode):
    made = rig(kind, mode, "warn")
    before = {k: v.clone() for k, v in made.model.named_parameters()}
    metrics = read(made.model, made.optimizers)
    (finding, *_) = made.health.check(made.step, metrics)
    assert (finding.layer, finding.kind, finding.action) == ("0", kind, "warn")
    assert finding.step == made.step and finding.values
    assert made.said[0] == finding.message
    for part in (f"step {made.step}", "layer 0", "Nothing is changed", "Remedy: "):
        assert part in finding.message
    assert "--" in finding.message.split("Remedy: ")[1]
    told = len(made.said)
    (again, *_) = made.health.check(made.step + 1, metrics)
    assert (again.kind, again.step) == (kind, made.step + 1) and len(made.said) == told
    for name, p in made.model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=0, equal_nan=True)
    well = {"0": {"orthogonality_error": 0.0, "subspace_drift": 0.5, "estimate_norm": 1.0}}
    assert made.health.check(made.step + 2, well) == []
    assert made.said[told:] == [
        f"health: step {made.step + 2}: layer 0 has recovered from the finding {kind!r} of step "
        f"{made.step}"
    ]


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_a_reset_makes_training_go_on_well(kind, mode):
    made = rig(kind, mode, "reset")
    old = [b.detach().clone() for b in bases_of(made.layer)]
    (finding, *_) = made.check()
    k = made.layer.rank
    if kind == "degenerate" and not k:
        assert finding.action == "warn"  # no basis, and the momentum is not at fault
    else:
        assert finding.action == "reset" and ("are drawn again" in made.said[0]) == (k > 0)
    for basis, before in zip(bases_of(made.layer), old, strict=True):
        if k:
            assert not torch.equal(basis, before)
            torch.testing.assert_close(basis[:, :k].mT @ basis[:, :k], torch.eye(k))
    torch.manual_seed(5)
    made.x, made.y = torch.randn(64, 24), torch.randn(64, 20)  # what made the fault is over
    for group in made.optimizers[0].param_groups:
        group["lr"] = 0.01
    first = made.train()
    for _ in range(3):
        made.train(5)
        assert [f for f in made.check() if f.layer == "0"] == []
    assert made.train() < first
    assert any("layer 0 has recovered" in line for line in made.said)


@pytest.mark.parametrize(("kind", "mode"), CASES[::4])
def test_a_raise_ends_the_run(kind, mode):
    made = rig(kind, mode, "raise")
    with pytest.raises(HealthError, match=rf"step {made.step}: layer 0 is .* The run stops"):
        made.check()
    assert made.said == []


@pytest.mark.parametrize(("fault", "mode"), [("zero", "grad-power"), ("copies", "factors-tangent")])
def test_bases_that_are_zero_or_copies_of_one_column_are_found(fault, mode):
    made = Rig(mode, "warn,orthogonality=reset")
    made.train()
    with torch.no_grad():
        for basis in (made.layer.basis_u, made.layer.basis_v):
            basis.copy_(basis[:, :1].expand_as(basis) if fault == "copies" else basis * 0)
    assert [(f.layer, f.kind) for f in made.check()] == [("0", "orthogonality")]
    made.train()
    assert made.check() == []


@pytest.mark.parametrize("mode", ["grad-power", "factors-tangent", "momentum"])
def test_an_optimizer_state_that_is_not_finite_is_found_and_dropped(mode):
    made = Rig(mode, "nan=reset")
    made.train()
    states = made.optimizers[0].state
    key = made.layer.basis_u if mode.startswith("factors") else made.layer.weight
    name = "core" if mode.startswith("factors") else "momentum_buffer"
    with torch.no_grad():
        states[key][name][1, 1] = math.inf
    (finding,) = made.check()
    assert finding.values["state_nonfinite"] == 1 and "momentum is dropped" in finding.message
    assert math.isfinite(made.train()) and made.check() == []
    assert math.isfinite(made.train())


def test_a_weight_that_is_not_finite_cannot_be_reset():
    made = Rig("grad-tangent", "nan=reset")
    made.train()
    with torch.no_grad():
        made.layer.weight[2, 3] = math.nan
    with pytest.raises(HealthError, match=r"no reset mends a weight.*--resume"):
        made.check()


@pytest.mark.parametrize("optimizer", [Muon, AdamW])
def test_a_reset_layer_steps_as_a_fresh_one(optimizer):
    made, fresh = (Rig("factors-tangent", optimizer=optimizer, lr=0.01) for _ in range(2))
    made.train(3)
    fresh.model.load_state_dict(made.model.state_dict())
    for layer in made.model:
        reset_layer(layer, made.optimizers, draw=7)
    for layer in fresh.model:
        layer.reset(7)
    assert made.train() == fresh.train()
    for name, p in fresh.model.named_parameters():
        assert torch.equal(p, made.model.get_parameter(name)), name


def test_a_checkpoint_right_after_a_reset_has_the_new_bases():
    made, resumed = Rig("factors-tangent"), Rig("factors-tangent")
    made.train(2)
    resumed.train(1)
    reset_layer(made.layer, made.optimizers, draw=2)
    resumed.model.load_state_dict(made.model.state_dict())
    resumed.optimizers[0].load_state_dict(copy.deepcopy(made.optimizers[0].state_dict()))
    assert made.train(2) == resumed.train(2)
    assert torch.equal(made.layer.weight, resumed.layer.weight)


@pytest.mark.parametrize(
    ("mode", "optimizer", "lr"),
    [
        ("grad-power", Muon, 0.02),
        ("factors-tangent", Muon, 0.02),
        ("factors-power", AdamW, 0.002),
        ("momentum-int8", Muon, 0.02),
    ],
)
def test_a_healthy_run_from_zero_initialised_projections_has_no_finding(mode, optimizer, lr):
    model = small()
    convert(model, MoleGradConfig.of(**options(mode)))
    groups = matrix_param_groups(model.transformer["h"])
    rest = torch.optim.AdamW(other_params(model, groups), lr=3e-3)
    optimizers = [optimizer(groups, lr=lr), rest]
    said = []
    health = Health(model, optimizers, "warn", say=said.append)
    losses = []
    for step in range(40):
        idx, targets = tokens(8, 20, seed=step % 4)
        loss = model(idx, targets.clamp(min=0))
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)
        losses.append(loss.item())
        assert health.check(step + 1, read(model, optimizers)) == [], said
    assert said == [] and losses[-1] < losses[0]


def test_no_gradient_is_a_fault_only_after_there_was_one():
    made = Rig("grad-power", "warn")
    for _ in range(5):
        made.train(scale=0.0)
        assert made.check() == []  # orth_status is 2
    for _ in range(2):
        made.train()
        assert made.check() == []
    found = []
    for _ in range(3):
        made.train(scale=0.0)
        found.append([f.kind for f in made.check() if f.layer == "0"])
    assert found == [[], [], ["degenerate"]]
    assert "its gradient is zero" in made.said[0] and "in 3 readings in a row" in made.said[0]


def test_a_subspace_without_the_gradient_is_degenerate():
    made = Rig("grad-tangent")
    made.train()
    values = {"gradient_norm": 2.0, "estimate_norm": 0.02, "energy_capture": 0.01}
    found = [made.health.check(step, {"0": values}) for step in range(3)]
    assert [len(f) for f in found] == [0, 0, 1]
    assert found[2][0].kind == "degenerate" and "--streaming_rank_k" in found[2][0].message
    assert found[2][0].values == {"energy_capture": 0.01, "gradient_norm": 2.0}


def test_a_sample_with_too_much_noise_is_degenerate():
    made = Rig("momentum", "warn", sampling_fraction=0.02)
    torch.manual_seed(2)
    made.x = torch.ones(64, 24) + 0.1 * torch.randn(64, 24)
    found = []
    for _ in range(3):
        made.train()
        found += [f for f in made.check() if f.layer == "0"]
    assert [f.kind for f in found] == ["degenerate"] and found[0].values["sampling_noise"] > 10
    assert "raise --streaming_sampling_fraction (here 0.02)" in found[0].message


@pytest.mark.parametrize("mode", ["grad-power", "factors-tangent"])
def test_exploration_keeps_a_subspace_from_freezing(mode):
    made = Rig(mode, lr=1e-6)
    for _ in range(5):
        made.train(4)
        assert made.check() == []
    still = {"subspace_drift": 1e-3, "estimate_norm": 1.0}  # less than exploration alone makes
    found = [f for step in range(3) for f in made.health.check(step, {"0": still})]
    assert [f.kind for f in found] == ["frozen"]
    assert "the exploration does not reach it" in found[0].message


def test_an_explosion_lasts_until_the_norm_is_back():
    made = Rig("grad-tangent", "warn")
    norms = [1.0, 1.1, 0.9, 1.0, 1.2, 90.0, 107.0, 1e5, 1e5, 2.0, 300.0]
    found = [
        [f.values["gradient_norm"] for f in made.health.check(i, {"0": {"gradient_norm": norm}})]
        for i, norm in enumerate(norms)
    ]
    assert found == [[]] * 6 + [[107.0], [1e5], [1e5], [], [300.0]]
    assert [line.split(": ")[1] for line in made.said] == ["step 6", "step 9", "step 10"]
    assert "gradient_norm 107 is 102 times its median of the last 6 readings" in made.said[0]


def test_a_resumed_run_finds_the_same():
    readings = [{"gradient_norm": 1.0, "subspace_drift": 0.5}] * 5
    readings += [{"gradient_norm": 500.0, "subspace_drift": 1e-9}] * 4
    readings += [{"gradient_norm": 1.0, "subspace_drift": 0.5}]
    for cut in (3, 6, 8):
        whole, first, second = (Rig("grad-tangent", "warn") for _ in range(3))
        expected = [whole.health.check(i, {"0": r}) for i, r in enumerate(readings)]
        found = [first.health.check(i, {"0": r}) for i, r in enumerate(readings[:cut])]
        second.health.load_state_dict(json.loads(json.dumps(first.health.state_dict())))
        found += [second.health.check(cut + i, {"0": r}) for i, r in enumerate(readings[cut:])]
        assert found == expected and first.said + second.said == whole.said
    kinds = [[f.kind for f in each] for each in expected]
    assert kinds == [[]] * 5 + [["exploding"]] * 2 + [["exploding", "frozen"]] * 2 + [[]]
    with pytest.raises(ValueError, match=r"layers that this model has not: 9"):
        second.health.load_state_dict({"layers": {"9": {}}})


def test_device_checks_say_what_is_not_finite_and_the_norms_of_momenta():
    for mode in MODES:
        made = Rig(mode)
        made.train(2)
        checks = device_checks(made.model, made.optimizers)
        parts = ("basis_nonfinite", "state_nonfinite", "weight_nonfinite", "momentum_norm")
        for values in checks.values():
            assert tuple(values) == parts and values["momentum_norm"] > 0
            assert not any(values[part] for part in parts[:3])
        if "momentum" in made.layer.state.tensors:
            momentum = made.layer.momentum.float()
            if "momentum_scale" in made.layer.state.tensors:
                momentum = momentum * made.layer.momentum_scale
            norm = momentum.detach().norm().item()
            assert checks["0"]["momentum_norm"] == pytest.approx(norm)
        with torch.no_grad():
            made.model[1].weight[0, 0] = math.inf
        found = {n: v["weight_nonfinite"] for n, v in device_checks(made.model).items()}
        assert found == {"0": 0.0, "1": 1.0}
    assert device_checks(nn.Linear(2, 2)) == {}


def test_actions():
    assert parse_actions("") == parse_actions("default") == DEFAULT_ACTIONS
    assert parse_actions("warn") == dict.fromkeys(KINDS, "warn")
    assert parse_actions("frozen=reset, nan=warn") == {
        **DEFAULT_ACTIONS,
        "frozen": "reset",
        "nan": "warn",
    }
    mixed = parse_actions("off,nan=raise")
    assert mixed == {**dict.fromkeys(KINDS, "off"), "nan": "raise"}
    assert parse_actions(mixed) == mixed
    for text, message in (
        ("shout", r"'shout' is no action; give one of off, warn, reset, raise as"),
        ("cold=warn", r"'cold' is no kind of finding; there are nan, exploding, degenerate"),
        ("nan=shout", r"'shout' is no action; give one of off, warn"),
        ("nan=warn,nan=off", r"names nan twice"),
        ("warn,off", r"names all kinds twice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_actions(text)


def test_wrong_use_is_named():
    for values, message in (
        ({"patience": 0}, "patience must lie between 1 and inf, got 0"),
        ({"window": 2}, "window must lie between 5 and inf, got 2"),
        ({"explode_factor": 0.5}, "explode_factor must lie between 1 and inf, got 0.5"),
        ({"min_energy": math.nan}, "min_energy must lie between 0 and 1, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            HealthThresholds(**values)
    made = Rig("factors-tangent")
    with pytest.raises(ValueError, match=r"metrics name a layer 'x' .* are 0, 1"):
        made.health.check(1, {"x": {}})
    with pytest.raises(ValueError, match=r"none of the given optimizers has its bases"):
        Health(made.model, [], "nan=reset")
    Health(made.model, [], "warn")
    made.model.requires_grad_(False)
    assert made.health.check(1, {"0": {"orthogonality_error": 1.0}}) == []  # it is not trained
