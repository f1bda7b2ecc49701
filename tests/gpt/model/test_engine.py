"""Generation: the cache changes nothing, seeds repeat, sampling follows its settings."""

import pytest
import torch

from molegrad.gpt.model.engine import KVCache, generate, sample_token
from tests.gpt.model.test_gpt import small, stirred

PROMPT = [5, 3, 60, 2]


@pytest.mark.parametrize("kv_groups", [1, 2])
def test_cached_logits_equal_uncached(kv_groups):
    model = stirred(small(kv_groups=kv_groups), std=0.3).double()
    idx = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(idx)
        cache = KVCache(model.config, 2, "cpu", torch.float64)
        parts = [model(idx[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 13), (13, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert cache.length == 20


def test_greedy_generation_equals_repeated_full_forward():
    model = stirred(small(), std=0.3)
    expected = list(PROMPT)
    for _ in range(10):
        expected.append(model(torch.tensor([expected]))[0, -1].argmax().item())
    assert list(generate(model, PROMPT, max_tokens=10, temperature=0)) == expected[4:]


def test_generation_under_autocast_keeps_a_bfloat16_cache(monkeypatch):
    model = stirred(small(), std=0.3)
    made = []
    original = KVCache.__init__

    def note(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self.store.dtype)

    monkeypatch.setattr(KVCache, "__init__", note)
    with torch.autocast("cpu", torch.bfloat16):
        result = list(generate(model, PROMPT, max_tokens=10))
    assert len(result) == 10 and made == [torch.bfloat16]


def test_a_seed_repeats_and_seeds_differ():
    model = stirred(small())
    first, again, other = (
        list(generate(model, PROMPT, max_tokens=15, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again and first != other and len(first) == 15


def test_generation_stops_at_a_stop_token_and_at_the_end_of_the_context():
    model = stirred(small(), std=0.3)
    whole = list(generate(model, PROMPT, max_tokens=10, temperature=0))
    stop = whole[5]
    assert (
        list(generate(model, PROMPT, 10, temperature=0, stop_tokens=[stop]))
        == whole[: whole.index(stop)]
    )
    assert len(list(generate(model, PROMPT, max_tokens=100))) == 24 - len(PROMPT) + 1


def test_frequencies_follow_softmax_and_top_k():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    many = logits.expand(20000, -1)
    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2)):
        drawn = sample_token(many, temperature, top_k, generator)
        kept = logits / temperature
        if top_k:
            kept = kept.masked_fill(kept < kept.topk(top_k).values[:, -1:], -torch.inf)
        frequency = torch.bincount(drawn.flatten(), minlength=4) / 20000
        torch.testing.assert_close(frequency, kept.softmax(-1)[0], atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "options", "phrase"),
    [
        ([], {}, "prompt has 0 tokens"),
        ([1] * 25, {}, "prompt has 25 tokens: expected 1 to max_seq_len=24"),
        (PROMPT, {"temperature": -1}, "temperature must be 0"),
        (PROMPT, {"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_wrong_settings_are_named(tokens, options, phrase):
    with pytest.raises(ValueError, match=phrase):
        list(generate(small(), tokens, **options))


def test_a_full_cache_is_named():
    model = small()
    cache = KVCache(model.config, 1, "cpu", torch.float32, capacity=4)
    with pytest.raises(ValueError, match="larger capacity"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)
