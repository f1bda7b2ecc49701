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
    "<|python_start|>",  # these four are nanochat's, for tools: nothing places them here
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
FILE = "tokenizer.json"
_FORMAT = "molegrad-bpe-1"


class Tokenizer:
    """A trained tokenizer. Make one with `train` or `load`.

    ranks: the mergeable tokens' bytes in the order of their ids.
    """

    def __init__(self, ranks: Sequence[bytes]):
        self._ranks = list(ranks)
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "molegrad",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self._ranks)},
            special_tokens=self.special_tokens,
        )
        self.bos = self.special_tokens["<|bos|>"]
        self.vocab_size = len(self._ranks) + len(SPECIAL_TOKENS)

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
        size = vocab_size - len(SPECIAL_TOKENS)
        trainer.train_from_iterator(counted(), size, pattern=SPLIT_PATTERN)
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

    def special(self, name: str) -> int:
        """The id of a special token; ValueError for an unknown name."""
        if name not in self.special_tokens:
            known = ", ".join(self.special_tokens)
            raise ValueError(f"special token {name!r} is unknown; there are {known}")
        return self.special_tokens[name]

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens' names in it are plain text; <|bos|> is not added."""
        return self._encoding.encode_ordinary(text)

    def encode_arrays(self, texts: Iterable[str]) -> list[np.ndarray]:
        """The ids of many texts as uint32 arrays: in one thread, without lists of Python numbers,
        which is two to three times as fast as tiktoken's batches on two cores."""
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
        return torch.tensor([*map(len, self._ranks), *[0] * len(SPECIAL_TOKENS)])

    def _state(self) -> dict:
        return {
            "format": _FORMAT,
            "pattern": SPLIT_PATTERN,
            "special_tokens": list(SPECIAL_TOKENS),
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
            ranks = [base64.b64decode(token, validate=True) for token in state["mergeable_ranks"]]
            tokenizer = cls(ranks)
            differ = [name for name, ours in tokenizer._state().items() if state[name] != ours]
            if differ:
                raise ValueError(f"another {', '.join(differ)} than this version's")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a tokenizer file ({type(error).__name__}: {error}); train it again "
                "with: python -m scripts.tok_train"
            ) from error
        return tokenizer

    def render_conversation(
        self, conversation: dict, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation; mask is 1 on the tokens that the assistant must produce.

        conversation: {"messages": [{"role": str, "content": str}, ...]}, user and assistant in
        turn, a system message at most first (it joins the first user message). max_tokens cuts the
        end off. Raises ValueError for roles out of turn.
        """
        messages = list(conversation["messages"])
        if len(messages) > 1 and messages[0]["role"] == "system":
            joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages[:2] = [{**messages[1], "content": joined}]
        ids, mask = [self.bos], [0]
        for index, message in enumerate(messages):
            role, expected = message["role"], ("user", "assistant")[index % 2]
            if role != expected:
                raise ValueError(f"message {index} is from {role!r}, expected {expected!r}")
            produced = [*self.encode(message["content"]), self.special(f"<|{role}_end|>")]
            ids += [self.special(f"<|{role}_start|>"), *produced]
            mask += [0, *[index % 2] * len(produced)]
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """ids that end with <|assistant_start|>, for a conversation whose last message is a user's.

        A last assistant message is left out, so the prompt of a training example can be had too.
        """
        messages = list(conversation["messages"])
        if messages[-1]["role"] == "assistant":
            messages.pop()
        ids, _ = self.render_conversation({"messages": messages})
        return [*ids, self.special("<|assistant_start|>")]
