"""Batches for fine-tuning: conversations packed into rows, with the user's tokens masked.

What: `ConversationLoader` packs rendered conversations whole into rows of seq_len + 1 tokens by
best fit and fills a row's end with <|bos|>. A target is -1, and so not learnt, where the token is
not the assistant's: what the user says, special tokens that frame it, padding.

Why rows without any target are skipped: nothing is learnt from them, and the mean loss of a batch
of them is a division by zero. With short contexts they occur (a question longer than the row), so
they are counted and never trained on. Skipping rows, not batches, leaves the order of the rows the
same for every batch size.

The order of an epoch is a permutation drawn from (seed, epoch); `state_dict` holds the position, so
that a resumed run sees exactly the batches that an uninterrupted one does.
"""

import bisect
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from molegrad.gpt.data.tokenizer import Tokenizer

BUFFER = 256  # conversations to choose from when a row is filled
Rendered = tuple[list[int], list[int]]  # ids and mask, see Tokenizer.render_conversation


def render(conversations: Iterable[dict], tokenizer: Tokenizer, seq_len: int) -> list[Rendered]:
    """(ids, mask) of each conversation, cut to the seq_len + 1 tokens of a row."""
    return [tokenizer.render_conversation(c, max_tokens=seq_len + 1) for c in conversations]


def pack(lengths: Sequence[int], order: Iterable[int], space: int) -> list[list[int]]:
    """Rows of indices whose `lengths` sum to at most `space` each, every index once.

    Best fit from a buffer: the longest that fits the space left, until none does.
    """
    order = iter(order)
    buffer: list[tuple[int, int, int]] = []  # (length, serial, index): ties leave in order
    rows, row, left, serial = [], [], space, 0
    while True:
        while len(buffer) < BUFFER and (index := next(order, None)) is not None:
            bisect.insort(buffer, (lengths[index], serial, index))
            serial += 1
        if not buffer:
            break
        at = bisect.bisect_left(buffer, (left + 1,)) - 1
        if at < 0:
            rows.append(row)
            row, left = [], space
            continue
        length, _, index = buffer.pop(bisect.bisect_left(buffer, (buffer[at][0],)))
        row.append(index)
        left -= length
    return [*rows, row] if row else rows


class ConversationLoader:
    """Endless batches of packed conversations.

    Args:
        rendered: from `render`.
        pad: the token that fills a row's end; its targets are -1.
        rank, world_size: this process takes every world_size-th row.

    Attributes:
        epoch: passes completed.
        skipped: rows left out so far because every target was masked.
        masks_targets: True; some targets of a batch are -1.
        rows_per_epoch: rows of the first epoch, of all processes (others may differ by a few).
        fingerprint: SHA-256 of the conversations.

    Raises:
        ValueError: there is no target at all, a conversation is longer than a row, or there are
            fewer rows than processes.
    """

    masks_targets = True

    def __init__(
        self,
        rendered: Sequence[Rendered],
        batch_size: int,
        seq_len: int,
        pad: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ):
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"batch_size={batch_size} and seq_len={seq_len} must be >= 1")
        self._rendered, self._pad = rendered, pad
        self._lengths = [len(ids) for ids, _ in rendered]
        self.batch_size, self.seq_len, self._space = batch_size, seq_len, seq_len + 1
        self.device, self.seed = torch.device(device), seed
        self._rank, self._world_size = rank, world_size
        if rendered and max(self._lengths) > self._space:
            raise ValueError(
                f"a conversation has {max(self._lengths)} tokens, a row {self._space}: "
                "render with the same seq_len"
            )
        if not any(any(mask[1:]) for _, mask in rendered):
            raise ValueError(
                f"none of the {len(rendered)} conversations has a token to learn within "
                f"{self._space} tokens: use a longer --max-seq-len or other conversations"
            )
        self.epoch, self._at, self.skipped = 0, 0, 0
        self._rows = self._pack(0)
        self.rows_per_epoch = len(self._rows)
        self.fingerprint = _fingerprint(rendered)
        mine = self._rows[rank::world_size]
        if not any(map(self._learnable, mine)):
            raise ValueError(
                f"{len(self._rows)} rows of conversations leave nothing to learn for process "
                f"{rank} of {world_size}: use more conversations or fewer processes"
            )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), both (batch_size, seq_len) int64; each row has a target that is not
        -1."""
        rows = [self._row(self._next_row()) for _ in range(self.batch_size)]
        batch = torch.from_numpy(np.stack(rows))  # (B, 2, space)
        inputs, targets = batch[:, 0, :-1], batch[:, 1, 1:]
        return inputs.contiguous().to(self.device), targets.contiguous().to(self.device)

    def state_dict(self) -> dict:
        """The position, JSON-able."""
        return {**self._identity(), "epoch": self.epoch, "at": self._at, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict of a loader of the same conversations; ValueError names what
        does not agree."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved position has {name}={state.get(name)!r}, this loader {value!r}: "
                    "resume with the same conversations, tokenizer, --max-seq-len, processes and "
                    "seed"
                )
        self.epoch, self._at = int(state["epoch"]), int(state["at"])
        self.skipped = int(state["skipped"])
        self._rows = self._pack(self.epoch)

    def _identity(self) -> dict:
        return {
            "fingerprint": self.fingerprint,
            "seq_len": self.seq_len,
            "rank": self._rank,
            "world_size": self._world_size,
            "seed": self.seed,
        }

    def _pack(self, epoch: int) -> list[list[int]]:
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = (int(i) for i in rng.permutation(len(self._rendered)))
        return pack(self._lengths, order, self._space)

    def _next_row(self) -> list[int]:
        while True:
            mine = range(self._rank, len(self._rows), self._world_size)
            while self._at >= len(mine):  # an epoch may leave a process without a row
                self.epoch, self._at = self.epoch + 1, 0
                self._rows = self._pack(self.epoch)
                mine = range(self._rank, len(self._rows), self._world_size)
            row = self._rows[mine[self._at]]
            self._at += 1
            if self._learnable(row):
                return row
            self.skipped += 1

    def _learnable(self, row: list[int]) -> bool:
        """Whether a row has a target; a conversation's first token is none."""
        return any(any(self._rendered[i][1][1:]) for i in row)

    def _row(self, indices: list[int]) -> np.ndarray:
        return fill_row([self._rendered[i] for i in indices], self._space, self._pad)


def _fingerprint(rendered: Sequence[Rendered]) -> str:
    digest = hashlib.sha256()
    for ids, mask in rendered:
        digest.update(np.array([*ids, *mask, -1], np.int64).tobytes())
    return digest.hexdigest()


def fill_row(rendered: Iterable[Rendered], space: int, pad: int) -> np.ndarray:
    """(2, space) int64: tokens, and the same with -1 where they are no target."""
    row = np.full((2, space), pad, np.int64)
    row[1] = -1
    at = 0
    for ids, mask in rendered:
        end = at + len(ids)
        row[0, at:end] = ids
        row[1, at:end] = np.where(mask, ids, -1)
        at = end
    return row


def held_out_batches(
    rendered: Sequence[Rendered],
    batch_size: int,
    seq_len: int,
    pad: int,
    max_tokens: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `rendered` in its order, at most about `max_tokens` tokens over all processes;
    (inputs, targets) as from the loader. A process may get none."""
    rows = pack([len(ids) for ids, _ in rendered], range(len(rendered)), seq_len + 1)
    rows = rows[: max(1, max_tokens // seq_len)][rank::world_size]
    for start in range(0, len(rows), batch_size):
        part = [
            fill_row((rendered[i] for i in row), seq_len + 1, pad)
            for row in rows[start : start + batch_size]
        ]
        batch = torch.from_numpy(np.stack(part)).to(device)
        yield batch[:, 0, :-1].contiguous(), batch[:, 1, 1:].contiguous()
