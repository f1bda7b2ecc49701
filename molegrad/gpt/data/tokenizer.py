"""The byte-pair tokenizer: rustbpe trains it, tiktoken encodes with it, JSON stores it.

Text is first split by a regular expression in the manner of GPT-4 (numbers in groups of at most two
digits, which wastes fewer entries of a small vocabulary), then merged within the pieces. Special
tokens come after the mergeable ones and are never produced from text: only `special` and
`render_conversation` place them.
"""

import base64
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
import torch

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # a calculation that the assistant asks for
    "<|python_end|>",
    "<|output_start|>",  # its result, placed by the engine
    "<|output_end|>",
)
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
FILE = "tokenizer.json"
_FORMAT = "molegrad-bpe-1"
_PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


class Tokenizer:
    """A trained tokenizer. Make one with `train` or `load`.

    ranks: the mergeable tokens' bytes in the order of their ids; pattern: the split expression;
    special_tokens: names, which take the ids after the ranks in their order.
    """

    def __init__(
        self,
        ranks: Sequence[bytes],
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ):
        self._ranks = list(ranks)
        self._pattern = pattern
        self._special = {name: len(self._ranks) + i for i, name in enumerate(special_tokens)}
        missing = [name for name in SPECIAL_TOKENS if name not in self._special]
        if missing:
            raise ValueError(f"the tokenizer lacks the special tokens {missing}; train it again")
        self._encoding = tiktoken.Encoding(
            "molegrad",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self._ranks)},
            special_tokens=self._special,
        )
        self.bos = self._special["<|bos|>"]

    @classmethod
    def train(cls, text_iterator: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train on an iterator of texts; vocab_size counts the 256 bytes and the special tokens.

        With none left for merges, every byte is a token. Raises ValueError when vocab_size is less
        than that, or without any text. Too little text gives a smaller vocabulary, with a warning.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens need {least}"
            )
        seen = 0

        def counted() -> Iterator[str]:
            nonlocal seen
            for text in text_iterator:
                seen += len(text)
                yield text

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(
            counted(), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN
        )
        if not seen:
            raise ValueError("the tokenizer's training text is empty")
        pairs = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
        tokenizer = cls([token for _, token in pairs])
        if tokenizer.vocab_size < vocab_size:
            warnings.warn(
                f"{seen} characters gave a vocabulary of {tokenizer.vocab_size}, not {vocab_size}; "
                "use more text or a smaller --vocab-size",
                stacklevel=2,
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._ranks) + len(self._special)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Name -> id of the special tokens."""
        return dict(self._special)

    def special(self, name: str) -> int:
        """The id of a special token; ValueError for an unknown name."""
        try:
            return self._special[name]
        except KeyError:
            raise ValueError(
                f"special token {name!r} is unknown; there are {', '.join(self._special)}"
            ) from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens' names in it are plain text; <|bos|> is not added."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        """The ids of many texts, in parallel threads (0: one per core)."""
        threads = num_threads or os.cpu_count() or 1
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def encode_arrays(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The ids of many texts as uint32 arrays: in one thread, without lists of Python numbers,
        which is two to three times as fast as `encode_batch` on two cores."""
        encode = self._encoding.encode_to_numpy
        return [encode(text, disallowed_special=()) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special tokens give their names. ValueError for an id out of range."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is not in 0 .. {self.vocab_size - 1}")
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> torch.Tensor:
        """Number of bytes of each token, (vocab_size,) int64; 0 for special tokens.

        With it a loss in nats becomes bits per byte: sum(nats) / (ln 2 * sum(bytes)).
        """
        lengths = [len(token) for token in self._ranks] + [0] * len(self._special)
        return torch.tensor(lengths, dtype=torch.int64)

    def _state(self) -> dict:
        return {
            "format": _FORMAT,
            "pattern": self._pattern,
            "special_tokens": list(self._special),
            "mergeable_ranks": [base64.b64encode(token).decode("ascii") for token in self._ranks],
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the ids."""
        return hashlib.sha256(json.dumps(self._state(), sort_keys=True).encode()).hexdigest()

    def save(self, directory: str | Path) -> Path:
        """Write tokenizer.json into a folder (made if missing); returns the file's path."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{FILE}.{os.getpid()}.part")
        part.write_text(json.dumps(self._state(), indent=0), encoding="utf-8")
        os.replace(part, path)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read what `save` wrote; FileNotFoundError or ValueError with the remedy."""
        path = Path(directory) / FILE
        if not path.exists():
            raise FileNotFoundError(
                f"no tokenizer at {path}; train one with: python -m scripts.tok_train"
            )
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["format"] != _FORMAT:
                raise ValueError(f"format {state['format']!r}, expected {_FORMAT!r}")
            ranks = [base64.b64decode(token, validate=True) for token in state["mergeable_ranks"]]
            return cls(ranks, state["pattern"], state["special_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a tokenizer file ({type(error).__name__}: {error}); train it again "
                "with: python -m scripts.tok_train"
            ) from error

    def render_conversation(
        self, conversation: dict, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation; mask is 1 on the tokens that the assistant must produce.

        conversation: {"messages": [{"role", "content"}, ...]}, user and assistant in turn, a system
        message at most first (it joins the first user message). An assistant's content may be a
        list of {"type": "text"|"python"|"python_output", "text": str}. max_tokens cuts the end off.
        Raises ValueError for anything else.
        """
        ids, mask = [self.bos], [0]

        def add(tokens: list[int], value: int) -> None:
            ids.extend(tokens)
            mask.extend([value] * len(tokens))

        for message in _checked_messages(conversation):
            role, content = message["role"], message["content"]
            add([self.special(f"<|{role}_start|>")], 0)
            if isinstance(content, str):
                add(self.encode(content), int(role == "assistant"))
            else:
                for part in content:
                    start, end, value = _PARTS[part["type"]]
                    if start:
                        add([self.special(start)], value)
                    add(self.encode(part["text"]), value)
                    if end:
                        add([self.special(end)], value)
            add([self.special(f"<|{role}_end|>")], int(role == "assistant"))
        if max_tokens is not None:
            if max_tokens < 1:
                raise ValueError(f"max_tokens={max_tokens} must be >= 1")
            ids, mask = ids[:max_tokens], mask[:max_tokens]
        return ids, mask

    def render_for_completion(self, conversation: dict) -> list[int]:
        """ids that end with <|assistant_start|>, for a conversation whose last message is a user's.

        A last assistant message is left out, so the prompt of a training example can be had too.
        """
        messages = list(conversation.get("messages") or [])
        if messages and messages[-1].get("role") == "assistant":
            messages.pop()
        ids, _ = self.render_conversation({"messages": messages})
        return [*ids, self.special("<|assistant_start|>")]


def _checked_messages(conversation: dict) -> list[dict]:
    """The messages with a system message merged; ValueError where roles or contents are wrong."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            'a conversation is {"messages": [{"role": "user", "content": "..."}, ...]} with at '
            f"least one message, got {conversation!r}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {index} must have 'role' and 'content', got {message!r}")
    if messages[0]["role"] == "system":
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise ValueError("a system message must be followed by a user message")
        joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages = [{"role": "user", "content": joined}, *messages[2:]]
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f"message {index} is from {message['role']!r}, expected {expected!r}")
        content = message["content"]
        if isinstance(content, str):
            continue
        parts = content if expected == "assistant" and isinstance(content, list) else [None]
        for part in parts:
            if (
                not isinstance(part, dict)
                or part.get("type") not in _PARTS
                or not isinstance(part.get("text"), str)
            ):
                raise ValueError(
                    f"message {index} ({expected}): content must be a string, or for the assistant "
                    f"a list of parts of type {'|'.join(_PARTS)} with 'text', got {content!r}"
                )
    return messages
