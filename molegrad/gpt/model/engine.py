"""Generation with a key/value cache.

What: `generate(model, tokens, ...)` yields one token id after the other; `generate_batch` gives
several continuations of one prompt; `KVCache` holds what attention has seen.

Why a cache: without it every new token repeats the whole forward pass; with it a token costs one
position. Cached and uncached logits agree to rounding (tests/gpt/model/test_engine.py).

How to run:

    for token in generate(model, tokenizer.encode("The"), max_tokens=32, temperature=0.8, top_k=50):
        print(tokenizer.decode([token]), end="", flush=True)
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, for every layer; filled by the model's forward."""

    def __init__(self, config, batch_size: int, device, dtype: torch.dtype, capacity: int = 0):
        """Room for `capacity` tokens (max_seq_len by default) of `batch_size` sequences.

        Memory: 2 · depth · batch · kv_heads · capacity · head_dim numbers of `dtype`.
        """
        self.capacity = capacity or config.max_seq_len
        self.length = 0
        shape = (config.depth, 2, batch_size, config.n_kv_head, self.capacity, config.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, H, T, D) of the new tokens -> those of all tokens, (B, H, length + T, D).

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + k.size(2)
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} tokens, {k.size(2)} more do "
                "not fit: make it with a larger capacity"
            )
        keys, values = self.store[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """Called once by the model when every layer has appended its `count` tokens."""
        self.length += count

    def repeat(self, batch_size: int) -> "KVCache":
        """A copy in which the one sequence of this cache stands `batch_size` times."""
        copy = object.__new__(KVCache)
        copy.capacity, copy.length = self.capacity, self.length
        copy.store = self.store.repeat_interleave(batch_size, dim=2)
        return copy


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """logits (B, V) -> (B, 1) int64; temperature 0 takes the most likely token.

    Raises:
        ValueError: temperature < 0 or top_k < 1.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 (or None for no limit), got {top_k}")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    if top_k is not None and top_k < logits.size(-1):
        values, choices = logits.topk(top_k, dim=-1)
        picked = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
        return choices.gather(1, picked)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


@torch.inference_mode()
def generate_columns(
    model,
    tokens: Sequence[int],
    num_samples: int = 1,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
) -> Iterator[list[int]]:
    """Yields `num_samples` ids at a time, one per continuation of the prompt `tokens`.

    Ends after `max_tokens`, or when the context of max_seq_len tokens is full.

    Raises:
        ValueError: the prompt is empty or leaves no room, or a sampling setting is out of range.
    """
    limit = model.config.max_seq_len
    if not 0 < len(tokens) < limit + 1:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens: expected 1 to max_seq_len={limit}; "
            "shorten it or keep its last part"
        )
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    capacity = min(limit, len(tokens) + max_tokens)
    cache = KVCache(model.config, 1, device, _activation_dtype(model), capacity)
    idx = torch.tensor([list(tokens)], dtype=torch.int64, device=device)
    logits = _last_logits(model, idx, cache).expand(num_samples, -1)
    cache = cache.repeat(num_samples) if num_samples > 1 else cache
    for produced in range(1, max_tokens + 1):
        column = sample_token(logits, temperature, top_k, generator)
        yield column[:, 0].tolist()
        if produced == max_tokens or cache.length == cache.capacity:
            return
        logits = _last_logits(model, column, cache)


def generate(
    model,
    tokens: Sequence[int],
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yields token ids that continue `tokens`, until a stop token (not yielded) or max_tokens."""
    stop = frozenset(stop_tokens)
    for (token,) in generate_columns(model, tokens, 1, max_tokens, temperature, top_k, seed):
        if token in stop:
            return
        yield token


def generate_batch(
    model,
    tokens: Sequence[int],
    num_samples: int,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
    stop_tokens: Collection[int] = (),
) -> list[list[int]]:
    """`num_samples` continuations of one prompt (without it), each cut before its stop token."""
    stop = frozenset(stop_tokens)
    results: list[list[int]] = [[] for _ in range(num_samples)]
    done = [False] * num_samples
    columns = generate_columns(model, tokens, num_samples, max_tokens, temperature, top_k, seed)
    for column in columns:
        for i, token in enumerate(column):
            done[i] = done[i] or token in stop
            if not done[i]:
                results[i].append(token)
        if all(done):
            break
    return results


def _activation_dtype(model) -> torch.dtype:
    """The dtype keys and values will have: autocast's where it is on, else the weights'."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.lm_head.weight.dtype


def _last_logits(model, idx: Tensor, cache: KVCache) -> Tensor:
    """(B, V) logits after the last of the tokens idx (B, T), which enter the cache."""
    return model.logits(model.hidden(idx, cache)[:, -1])
