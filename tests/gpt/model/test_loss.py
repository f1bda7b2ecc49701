"""The chunked cross-entropy against torch's own on full logits, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from molegrad import MoleGradConfig, MoleLinear, convert
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.model.loss import linear_cross_entropy, softcap


def make(tokens=37, width=12, vocab=29, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype)
    targets = torch.randint(-1, vocab, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def full(hidden, weight, targets, cap, reduction):
    logits = softcap(hidden @ weight.t(), cap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize(
    ("reduction", "cap", "chunk"),
    [
        ("mean", 15.0, 0), ("mean", 0.0, 10), ("mean", 2.0, 1000), ("sum", 2.0, 1),
        ("sum", 200.0, 10), ("none", 15.0, 37), ("none", 0.0, 1), ("none", 200.0, 0),
        ("none", 2.0, 10),
    ],
)  # fmt: skip
def test_equals_full_logits(reduction, cap, chunk):
    hidden, weight, targets = make()
    ours = linear_cross_entropy(hidden, weight, targets, cap, chunk, reduction)
    theirs = full(hidden, weight, targets, cap, reduction)
    torch.testing.assert_close(ours, theirs)
    seed = torch.linspace(0.5, 2.0, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
    ours_grads = torch.autograd.grad(ours, (hidden, weight), seed)
    theirs_grads = torch.autograd.grad(theirs, (hidden, weight), seed)
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_targets_ignored_gives_zero_loss_and_zero_gradients(reduction):
    hidden, weight, targets = make()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -1), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_no_tokens():
    hidden, weight, targets = make(tokens=0)
    assert linear_cross_entropy(hidden, weight, targets).item() == 0.0


@pytest.mark.parametrize("magnitude", [1e-20, 1e4])
def test_extreme_logits_stay_finite(magnitude):
    hidden, weight, targets = make(dtype=torch.float32)
    for cap in (15.0, 0.0):
        big = (hidden * magnitude).detach().requires_grad_()
        loss = linear_cross_entropy(big, weight, targets, cap)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(big.grad).all()
        expected = full(big, weight, targets, cap, "mean")
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_under_autocast_is_close_to_float64():
    hidden, weight, targets = make(tokens=256, width=64)
    exact = full(hidden, weight, targets, 15.0, "mean")
    low_h, low_w = (x.detach().float().requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(low_h, low_w, targets, 15.0, chunk=50)
    loss.backward()
    assert loss.dtype == torch.float32 and low_w.grad.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 0.02 * exact.item()
    (exact_grad,) = torch.autograd.grad(exact, (weight,))
    error = (low_w.grad - exact_grad).norm() / exact_grad.norm()
    assert error < 0.02


def test_logits_never_exist_for_more_than_a_chunk():
    """Peak of live memory during forward and backward, counted by the allocator's events."""
    tokens, vocab, chunk = 2048, 1024, 64
    hidden, weight, targets = make(tokens, 16, vocab, torch.float32)

    def step():
        linear_cross_entropy(hidden, weight, targets, chunk=chunk).backward()

    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < tokens * vocab * 4 / 4  # a quarter of what the full logits take


def test_wrong_input_is_named():
    hidden, weight, targets = make()
    with pytest.raises(ValueError, match="reduction must be one of"):
        linear_cross_entropy(hidden, weight, targets, reduction="median")
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, targets[:-1])
    with pytest.raises(ValueError, match="chunk must be a number of tokens"):
        linear_cross_entropy(hidden, weight, targets, chunk=-1)
    for cap in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"above 0, or 0 for none, got {cap}"):
            linear_cross_entropy(hidden, weight, targets, cap)


def test_a_head_that_is_more_than_its_weight():
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    hidden, weight, targets = make()
    with pytest.raises(ValueError, match=r"forward pass of its own \(Adapted\) is not supported"):
        linear_cross_entropy(hidden, Adapted(12, 29, bias=False).double(), targets)
    head = torch.nn.Linear(12, 29, bias=False).double()
    parametrized = torch.nn.utils.parametrizations.weight_norm(head)  # whose weight is all
    linear_cross_entropy(hidden, parametrized, targets).backward()
    found = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    F.cross_entropy(head(hidden), targets, ignore_index=-1).backward()
    for ours, p in zip(found, head.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)


LOW_RANK = {
    "method": "tangent",
    "rank_k": 4,
    "gradient_mode": "factors",
    "min_layer_utilization": 0.0,
}


def head_of(weight, **values):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    config = MoleGradConfig.of(**(values or LOW_RANK))
    return MoleLinear.from_linear(layer, config, "lm_head")


@pytest.mark.parametrize(
    ("reduction", "cap", "chunk"),
    [
        ("mean", 15.0, 10),
        ("mean", 0.0, 1000),
        ("sum", 15.0, 1),
        ("none", 0.0, 10),
        ("none", 15.0, 0),
    ],
)
def test_a_low_rank_head_gets_the_sketches_of_its_gradient(reduction, chunk, cap):
    hidden, weight, targets = make()
    head = head_of(weight, **LOW_RANK, probes=2)
    ours = linear_cross_entropy(hidden, head, targets, cap, chunk, reduction)
    theirs = full(hidden, weight, targets, cap, reduction)
    torch.testing.assert_close(ours, theirs)
    seed = torch.linspace(0.5, 2.0, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
    grad_h, y, w = torch.autograd.grad(ours, (hidden, head.basis_u, head.basis_v), seed)
    exact_h, gradient = torch.autograd.grad(theirs, (hidden, weight), seed)
    torch.testing.assert_close(grad_h, exact_h)
    torch.testing.assert_close(y, gradient @ head.basis_v.detach())
    torch.testing.assert_close(w, gradient.T @ head.basis_u.detach())


def test_a_low_rank_head_holds_no_gradient_of_its_weights_size():
    hidden, weight, targets = make(tokens=64, width=32, vocab=500, dtype=torch.float32)
    head, sizes = head_of(weight), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t)
    with hooks:
        linear_cross_entropy(hidden, head, targets, chunk=8).backward()
    assert head.weight.grad is None and head.basis_u.grad.shape == (500, 4)
    assert max(t.numel() for t in sizes) == hidden.numel()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**LOW_RANK, "method": "power"}, "gradient_mode='factors' and method='power'"),
        ({**LOW_RANK, "gradient_mode": "grad"}, "gradient_mode='grad'"),
        (
            {"method": "sampled", "gradient_mode": "momentum"},
            "gradient_mode='momentum' and method='sampled'",
        ),
    ],
)
def test_other_heads_are_refused(changes, message):
    hidden, weight, targets = make()
    with pytest.raises(ValueError, match=f"output head 'lm_head' has {message}"):
        linear_cross_entropy(hidden, head_of(weight, **changes), targets)
    with pytest.raises(ValueError, match="head with a bias is not supported"):
        linear_cross_entropy(hidden, torch.nn.Linear(12, 29).double(), targets)


def test_a_frozen_low_rank_head_takes_no_gradient():
    hidden, weight, targets = make()
    head = head_of(weight, **{**LOW_RANK, "method": "power"})
    head.basis_u.requires_grad_(False)
    head.basis_v.requires_grad_(False)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, 15.0), hidden)
    expected = torch.autograd.grad(full(hidden, weight, targets, 15.0, "mean"), hidden)
    torch.testing.assert_close(grad, expected[0])


def test_a_model_with_a_converted_head_trains_it_or_says_why_not():
    model = GPT(GPTConfig(depth=1, aspect_ratio=32, vocab_size=61, max_seq_len=24))
    convert(model, MoleGradConfig.of(**LOW_RANK, target_layers=("lm_head",)))
    idx = torch.randint(61, (2, 10))
    model(idx, idx).backward()
    assert model.lm_head.basis_v.grad.abs().sum() > 0
    model = GPT(GPTConfig(depth=1, aspect_ratio=32, vocab_size=61, max_seq_len=24))
    convert(model, MoleGradConfig.of(method="exact", target_layers=("lm_head",)))
    with pytest.raises(ValueError, match="or leave the head dense"):
        model(idx, idx)
