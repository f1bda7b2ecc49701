"""The chunked cross-entropy against torch's own on full logits, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from molegrad.gpt.loss import default_chunk, linear_cross_entropy, softcap


def make(tokens=37, width=12, vocab=29, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype)
    targets = torch.randint(-1, vocab, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def full(hidden, weight, targets, cap, reduction):
    logits = softcap(hidden @ weight.t(), cap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize("cap", [15.0, 2.0, 200.0, 0.0])
@pytest.mark.parametrize("chunk", [0, 1, 10, 37, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_full_logits(cap, chunk, reduction):
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


def test_the_default_chunk_follows_vocabulary_and_device():
    assert default_chunk(4096, "cpu") == 256 and default_chunk(32768, "cpu") == 64
    assert default_chunk(32768, "cuda") == 2048


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
        loss = linear_cross_entropy(low_h, low_w, targets, chunk=50)
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
