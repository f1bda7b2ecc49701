"""The model: sizes, start values, causality, loss, compilation, conversion, state dicts."""

import pytest
import torch
import torch.nn.functional as F

from molegrad import MoleGradConfig, convert
from molegrad.gpt.model.gpt import GPT, GPTConfig, ReluSquared, rotary_tables, rotate

SMALL = dict(depth=2, aspect_ratio=32, head_dim=16, vocab_size=61, max_seq_len=24, loss_chunk=16)


def small(**changes):
    return GPT(GPTConfig(**{**SMALL, **changes}), seed=1)


def stirred(model, std=0.1):
    """`model` with every weight random, the zero-initialised ones too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, std, generator=generator)
    return model


def tokens(batch=3, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, 61, (batch, length), generator=generator)
    return idx, torch.randint(-1, 61, (batch, length), generator=generator)


@pytest.mark.parametrize(
    ("depth", "width", "head_dim", "heads"),
    [(2, 128, 32, 4), (4, 256, 64, 4), (12, 768, 128, 6), (16, 1024, 128, 8)],
)
def test_one_dial_sets_the_sizes(depth, width, head_dim, heads):
    config = GPTConfig(depth=depth)
    assert (config.width, config.head_dim, config.n_head) == (width, head_dim, heads)
    assert GPTConfig(depth=3, aspect_ratio=50, head_dim=64).width == 192  # whole heads


def test_parameter_counts():
    model = small()
    counts = model.count_parameters()
    assert counts == {
        "embedding": 61 * 64,
        "head": 61 * 64,
        "matrix": 2 * 12 * 64 * 64,
        "scalar": 0,
        "total": sum(p.numel() for p in model.parameters()),
    }


def test_made_on_a_device_it_is_the_same_model():
    made, usual = GPT.made_on(torch.device("cpu"), GPTConfig(**SMALL), seed=1), small()
    assert made.state_dict().keys() == usual.state_dict().keys()
    tensors = zip(
        [*made.parameters(), *made.buffers()],
        [*usual.parameters(), *usual.buffers()],
        strict=True,
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in tensors)
    other = GPT.made_on(torch.device("cpu"), GPTConfig(**SMALL), seed=2)
    assert not torch.equal(other.lm_head.weight, made.lm_head.weight)


def test_module_names_are_those_of_gpt2():
    names = set(small().state_dict())
    assert {
        "transformer.wte.weight",
        "transformer.h.0.attn.c_q.weight",
        "transformer.h.0.attn.c_k.weight",
        "transformer.h.0.attn.c_v.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_proj.weight",
        "lm_head.weight",
    } <= names
    assert all(name.endswith("weight") for name in names)


def test_start_is_reproducible_and_near_uniform():
    model, again = small(), small()
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for block in model.transformer["h"]:
        assert block.attn.c_proj.weight.abs().max() == 0
        assert block.mlp.c_proj.weight.abs().max() == 0
    loss = model(*tokens())
    assert abs(loss.item() - torch.tensor(61.0).log().item()) < 0.05


def test_loss_equals_cross_entropy_of_the_logits():
    model = stirred(small())
    idx, targets = tokens()
    logits = model(idx)
    assert logits.shape == (3, 20, 61) and logits.abs().max() <= 15.0
    flat = (logits.view(-1, 61), targets.view(-1))
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(*flat, ignore_index=-1, reduction=reduction)
        ours = model(idx, targets, loss_reduction=reduction)
        torch.testing.assert_close(ours.reshape(-1), expected.reshape(-1))


def test_every_parameter_takes_a_gradient():
    model = stirred(small())
    model(*tokens()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_all_targets_ignored_is_no_nan():
    model = stirred(small())
    idx, targets = tokens()
    loss = model(idx, torch.full_like(targets, -1))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("kv_groups", [1, 2])
def test_no_position_sees_the_future(kv_groups):
    model = stirred(small(kv_groups=kv_groups), std=0.3)
    idx, _ = tokens()
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12] - after[:, 12]).abs().max() > 1e-3


def test_rotary_scores_depend_on_distance_alone():
    cos, sin = rotary_tables(32, 16, 10000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(i, j):
        return (rotate(q, cos[i : i + 1, None], sin[i : i + 1, None])).flatten() @ rotate(
            k, cos[j : j + 1, None], sin[j : j + 1, None]
        ).flatten()

    torch.testing.assert_close(score(5, 2), score(25, 22))
    assert abs(score(5, 2) - score(5, 4)) > 1e-3
    torch.testing.assert_close(score(0, 0), q.flatten() @ k.flatten())


def test_relu_squared_gradient():
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    torch.testing.assert_close(ReluSquared.apply(x), F.relu(x).square())
    assert torch.autograd.gradcheck(ReluSquared.apply, (x,))


def test_autocast_runs_in_bfloat16():
    model = stirred(small())
    idx, targets = tokens()
    exact = model(idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(idx).dtype == torch.bfloat16
        loss = model(idx, targets)
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.05
    assert model.lm_head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_graph_equals_eager(autocast):
    model = stirred(small())
    idx, targets = tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = {}
    for call in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = call(idx, targets)
        loss.backward()
        results[call] = loss, {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
    (loss, expected), (compiled_loss, gradients) = results.values()
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_converted_model_has_the_same_forward_and_state_dict():
    model = stirred(small())
    idx, targets = tokens()
    before, names = model(idx, targets).item(), list(model.state_dict())
    model = convert(
        model, MoleGradConfig.of(rank_k=4, target_layers="all", gradient_mode="factors")
    )
    assert list(model.state_dict()) == names
    assert model(idx, targets).item() == pytest.approx(before, rel=1e-6)
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    assert fresh(idx, targets).item() == pytest.approx(before, rel=1e-6)
    assert model.count_parameters() == fresh.count_parameters()


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"kv_groups": 3}, "kv_groups=3 must divide the 4 heads"),
        ({"softcap": -1.0}, "softcap must not be negative"),
    ],
)
def test_wrong_sizes_are_named(changes, phrase):
    with pytest.raises(ValueError, match=phrase):
        GPTConfig(**{**SMALL, **changes})


def test_too_long_a_sequence_is_named():
    with pytest.raises(ValueError, match="25 tokens does not fit max_seq_len=24"):
        small()(torch.zeros(1, 25, dtype=torch.int64))
