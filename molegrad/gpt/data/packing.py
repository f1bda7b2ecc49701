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

from molegrad.gpt.data.loader import BatchLoader, best_fit
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
    waiting = enumerate(order)
    buffer: list[tuple[int, int, int]] = []  # (length, serial, index): ties leave in order
    rows, row, left = [], [], space
    while True:
        while len(buffer) < BUFFER and (following := next(waiting, None)) is not None:
            serial, index = following
            bisect.insort(buffer, (lengths[index], serial, index))
        at = best_fit(buffer, left)
        if at >= 0:
            length, _, index = buffer.pop(at)
            row.append(index)
            left -= length
            continue
        if row:
            rows.append(row)
        if not buffer:
            return rows
        row, left = [], space


class ConversationLoader(BatchLoader):
    """Endless batches of packed conversations; see `BatchLoader` for the arguments it shares.

    Args:
        rendered: from `render`.
        pad: the token that fills a row's end; its targets are -1.
        rank, world_size: this process takes every world_size-th row.

    Attributes:
        skipped: rows left out so far because every target was masked.
        rows_per_epoch: rows of the first epoch, of all processes (others may differ by a few).

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
        fingerprint = _fingerprint(rendered)
        super().__init__(batch_size, seq_len, device, rank, world_size, seed, fingerprint)
        self._rendered, self._pad, self._space = rendered, pad, seq_len + 1
        self._lengths = [len(ids) for ids, _ in rendered]
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
        self._at = self.skipped = 0
        self._rows = self._pack(0)
        self.rows_per_epoch = len(self._rows)
        if not any(map(self._learnable, self._rows[rank::world_size])):
            raise ValueError(
                f"{len(self._rows)} rows of conversations leave nothing to learn for process "
                f"{rank} of {world_size}: use more conversations or fewer processes"
            )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), both (batch_size, seq_len) int64; each row has a target that is not
        -1."""
        rows = [self._next_row() for _ in range(self.batch_size)]
        return _batch(self._rendered, rows, self._space, self._pad, self.device)

    def state_dict(self) -> dict:
        """The position, JSON-able."""
        return {**self.identity(), "epoch": self.epoch, "at": self._at, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict of a loader of the same conversations; ValueError names what
        does not agree."""
        self.check_position(state)
        self.epoch, self._at, self.skipped = state["epoch"], state["at"], state["skipped"]
        self._rows = self._pack(self.epoch)

    def _pack(self, epoch: int) -> list[list[int]]:
        order = self.permutation(len(self._rendered), epoch).tolist()
        return pack(self._lengths, order, self._space)

    def _next_row(self) -> list[int]:
        while True:
            while (at := self.rank + self._at * self.world_size) >= len(self._rows):
                self.epoch, self._at = self.epoch + 1, 0
                self._rows = self._pack(self.epoch)
            self._at += 1
            if self._learnable(self._rows[at]):
                return self._rows[at]
            self.skipped += 1

    def _learnable(self, row: list[int]) -> bool:
        """Whether a row has a target; a conversation's first token is none."""
        return any(any(self._rendered[i][1][1:]) for i in row)


def _fingerprint(rendered: Sequence[Rendered]) -> str:
    digest = hashlib.sha256()
    for ids, mask in rendered:
        digest.update(np.array([*ids, *mask, -1], np.int64).tobytes())
    return digest.hexdigest()


def _batch(
    rendered: Sequence[Rendered], rows: list[list[int]], space: int, pad: int, device
) -> tuple[Tensor, Tensor]:
    """(inputs, targets), both (len(rows), space - 1) int64; a target is -1 where it is masked."""
    tokens = np.full((len(rows), space), pad, np.int64)
    targets = np.full((len(rows), space), -1, np.int64)
    for number, row in enumerate(rows):
        at = 0
        for ids, mask in (rendered[i] for i in row):
            end = at + len(ids)
            tokens[number, at:end] = ids
            targets[number, at:end] = np.where(mask, ids, -1)
            at = end
    inputs, targets = torch.from_numpy(tokens)[:, :-1], torch.from_numpy(targets)[:, 1:]
    return inputs.contiguous().to(device), targets.contiguous().to(device)


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
        yield _batch(rendered, rows[start : start + batch_size], seq_len + 1, pad, device)
