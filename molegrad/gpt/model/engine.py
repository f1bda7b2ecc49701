"""Generation with a key/value cache.

What: `generate(model, tokens, ...)` yields one token id after the other; `answer` is the text of a
fine-tuned model's; `KVCache` holds what attention has seen.

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
def generate(
    model,
    tokens: Sequence[int],
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yields token ids that continue `tokens`.

    Ends before a stop token, after `max_tokens`, or when the context of max_seq_len tokens is full.

    Raises:
        ValueError: the prompt is empty or leaves no room, or a sampling setting is out of range.
    """
    limit = model.config.max_seq_len
    if not 0 < len(tokens) <= limit:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens: expected 1 to max_seq_len={limit}; "
            "shorten it or keep its last part"
        )
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    capacity = min(limit, len(tokens) + max_tokens)
    cache = KVCache(model.config, 1, device, _activation_dtype(model), capacity)
    idx = torch.tensor([list(tokens)], dtype=torch.int64, device=device)
    for _ in range(max_tokens):
        logits = model.logits(model.hidden(idx, cache)[:, -1])
        idx = sample_token(logits, temperature, top_k, generator)
        token = idx.item()
        if token in stop_tokens:
            return
        yield token
        if cache.length == cache.capacity:
            return


def answer(model, tokenizer, question: str, max_tokens: int = 48) -> str:
    """The most likely answer of a fine-tuned model to one question, as text.

    tokenizer: the model's, a `molegrad.gpt.data.tokenizer.Tokenizer`.

    Raises:
        ValueError: the question does not fit the model's context.
    """
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.render_for_completion({"messages": messages})
    stop = tokenizer.special_tokens.values()
    ids = generate(model, prompt, max_tokens, temperature=0.0, stop_tokens=stop)
    return tokenizer.decode(ids)


def _activation_dtype(model) -> torch.dtype:
    """The dtype keys and values will have: autocast's where it is on, else the weights'."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.lm_head.weight.dtype
