import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from molegrad import MoleGradConfig, MoleLinear, convert, plan, revert
from tests.models import SMALL, TinyGPT


def taken(model, **fields):
    return [layer.name for layer in plan(model, MoleGradConfig.of(rank_k=4, **fields)).taken]


def test_groups_names_and_patterns():
    model = TinyGPT(depth=1)
    ffn = ["h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    attention = [f"h.0.attn.{c}" for c in ("c_q", "c_k", "c_v", "c_proj")]
    assert taken(model) == ffn
    assert taken(model, target_layers="attention_only") == attention
    assert taken(model, target_layers="all") == attention + ffn
    assert taken(model, target_layers=["c_fc"]) == ffn[:1]
    assert taken(model, target_layers=["mlp"]) == ffn
    assert taken(model, target_layers=["mlp.c_proj", "h.0.attn.c_q"]) == [attention[0], ffn[1]]
    assert taken(model, target_layers=[r".*attn\.c_[kv]"]) == attention[1:3]
    assert taken(model, target_layers=["lm_head"]) == ["lm_head"]


def test_the_plan_says_why_a_layer_is_left():
    model = TinyGPT(depth=1)
    model.lm_head.weight = model.wte.weight
    model.h[0].attn.c_q.weight.requires_grad_(False)
    parametrizations.weight_norm(model.h[0].attn.c_k)

    class Special(nn.Linear):
        pass

    model.h[0].attn.c_v = Special(32, 32)
    model.h[0].attn.c_proj = nn.Linear(32, 6)
    config = MoleGradConfig.of(
        rank_k=4, method="tangent", target_layers=[".*"], min_layer_utilization=0.7
    )
    reasons = {layer.name.split(".")[-1]: layer.reason for layer in plan(model, config).left}
    assert "tied" in reasons["lm_head"]
    assert "frozen" in reasons["c_q"]
    assert "parametrized" in reasons["c_k"]
    assert "Special" in reasons["c_v"]
    assert "too small for rank 4 (rank_k=4)" in reasons["c_proj"]
    small = plan(
        model, MoleGradConfig.of(rank_k=12, target_layers=["mlp"], min_layer_utilization=0.7)
    )
    assert "saves 44% of the dense gradient, less than min_layer_utilization=70%" in str(small)
    assert "taken" in str(
        plan(model, config)
    ) and "not a target of ffn_only (role: attention)" in str(
        plan(TinyGPT(), MoleGradConfig.of(rank_k=4))
    )


def test_every_layer_has_its_rank_and_the_plan_shows_it():
    config = MoleGradConfig.of(
        rank_k=0.25, target_layers="all", rank_overrides=r"attention=2,c_proj=4,h\.1\..*=6",
        min_layer_utilization=0,
    )  # fmt: skip
    planned = plan(TinyGPT(depth=2), config)
    ranks = {layer.name: int(layer.gets.split()[1]) for layer in planned.taken}
    assert ranks["h.0.mlp.c_fc"] == 8 and ranks["h.1.mlp.c_fc"] == 6
    assert ranks["h.1.mlp.c_proj"] == 4 and ranks["h.1.attn.c_proj"] == 2
    lines = {line.split()[0]: line for line in str(planned).splitlines()[1:]}
    assert lines["h.0.mlp.c_fc"].endswith("taken, rank 8 (rank_k=0.25)")
    assert lines["h.1.mlp.c_proj"].endswith("taken, rank 4 (c_proj=4)")
    model = convert(TinyGPT(depth=2), config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoleLinear)}
    assert {name: layer.rank for name, layer in layers.items()} == ranks
    loss = model(torch.randint(50, (2, 7))).square().mean()
    loss.backward()
    for name, layer in layers.items():
        assert torch.linalg.matrix_rank(layer.weight.grad) <= ranks[name], name


def test_an_override_that_is_too_large_or_matches_nothing_is_told():
    config = MoleGradConfig.of(
        rank_k=4, method="tangent", target_layers="all", rank_overrides="c_fc=20"
    )
    assert "left: too small for rank 20 (c_fc=20)" in str(plan(TinyGPT(), config))
    for wrong in ("atention=4", "mlp=8,c_fc=4"):
        config = MoleGradConfig.of(rank_k=4, rank_overrides=wrong)
        name = wrong.split(",")[-1]
        with pytest.raises(ValueError, match=f"{name}' is for no linear"):
            plan(TinyGPT(), config)


def test_converting_nothing_is_an_error_that_shows_the_plan():
    with pytest.raises(ValueError, match=r"no layer to convert:\n.*\n.*matches none of nothing"):
        convert(TinyGPT(depth=1), SMALL, target_layers=["nothing"])


@pytest.mark.parametrize("mode", ["grad", "factors"])
def test_convert_and_back_keep_parameters_hooks_sharing_and_state(mode):
    model = TinyGPT(depth=2)
    model.h[1].mlp = model.h[0].mlp  # a shared module
    calls = []
    model.h[0].mlp.c_fc.register_forward_hook(lambda *args: calls.append(1))
    weights = {name: p for name, p in model.named_parameters()}
    reference = copy.deepcopy(model).eval()
    model.eval()
    idx = torch.randint(50, (2, 7))
    assert convert(model, SMALL, gradient_mode=mode) is model
    assert isinstance(model.h[0].mlp.c_fc, MoleLinear) and not model.h[0].mlp.c_fc.training
    assert model.h[0].mlp is model.h[1].mlp
    assert model.h[0].mlp.c_fc.weight is weights["h.0.mlp.c_fc.weight"]
    assert model.state_dict().keys() == reference.state_dict().keys()
    torch.testing.assert_close(model(idx), reference(idx))
    assert len(calls) == 4  # twice each in the model and in the copy it is compared with
    again = plan(model, SMALL)
    assert not again.taken and "is converted already" in str(again)
    revert(model)
    assert not any(isinstance(m, MoleLinear) for m in model.modules())
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in weights.items()}
    assert all(p.requires_grad for p in model.parameters())
    assert not list(model.buffers())
    torch.testing.assert_close(model(idx), reference(idx))


def test_a_linear_itself_is_converted_too():
    layer = nn.Linear(24, 40)
    mole = convert(layer, SMALL, target_modules=[".*", ""])
    assert isinstance(mole, MoleLinear) and mole.weight is layer.weight
    assert type(revert(mole)) is nn.Linear


def test_peft_spelling():
    model = convert(TinyGPT(depth=1), rank_k=4, target_modules="all-linear")
    assert sum(isinstance(m, MoleLinear) for m in model.modules()) == 6
