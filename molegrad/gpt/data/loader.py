"""The data loader: documents in a seeded order, packed into rows that each begin with <|bos|>.

A row holds seq_len + 1 tokens. Documents longer than a row are cut into pieces of a row, each again
begun with <|bos|>, so nothing of them is lost. Rows are filled by best fit from a small buffer of
pieces: the longest piece that fits the space left; where none fits, the shortest is cropped to fill
the row exactly and its rest is dropped (a few per cent). There is no padding.

The order of an epoch is a permutation drawn from (seed, epoch): of the shards, and of the documents
within a shard. Rank r of w takes every w-th document. `state_dict` holds the whole position, the
buffer included, as plain numbers; a loader that loads it continues with exactly the same batches.
"""

import bisect
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from molegrad.gpt.data.tokens import CorpusTokens

BUFFER = 512  # pieces to choose from: more lose less to cropping


class BatchLoader:
    """What loaders of batches share: sizes, this process' part, and whose a position is.

    Args:
        batch_size, seq_len: rows of a batch, tokens of a row.
        device: where the batches go.
        rank, world_size: this process, and how many share the data.
        seed: of the order.
        fingerprint: identifies the data.

    Attributes:
        epoch: passes over the data completed.
        masks_targets: whether some targets of a batch are -1.

    Raises:
        ValueError: a value is out of range.
    """

    masks_targets = False

    def __init__(
        self,
        batch_size: int,
        seq_len: int,
        device: torch.device | str,
        rank: int,
        world_size: int,
        seed: int,
        fingerprint: str,
    ):
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"batch_size={batch_size} and seq_len={seq_len} must be >= 1")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"rank={rank} must lie in 0 .. world_size - 1, world_size={world_size}"
            )
        if seed < 0:
            raise ValueError(f"seed={seed} must be >= 0")
        self.batch_size, self.seq_len, self.device = batch_size, seq_len, torch.device(device)
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.fingerprint = fingerprint
        self.epoch = 0

    def permutation(self, count: int, *key: int) -> np.ndarray:
        """The order of `count` things, drawn from the seed and `key`."""
        return np.random.Generator(np.random.PCG64([self.seed, *key])).permutation(count)

    def identity(self) -> dict:
        """What a saved position must agree in; the batch size may differ."""
        names = ("fingerprint", "seq_len", "rank", "world_size", "seed")
        return {name: getattr(self, name) for name in names}

    def check_position(self, state: dict) -> None:
        """ValueError naming what a position of another loader does not agree in."""
        for name, value in self.identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved loader position has {name}={state.get(name)!r}, this loader "
                    f"{value!r}; resume with the same data, tokenizer, --max-seq-len, number of "
                    "processes and seed"
                )


class PackedLoader(BatchLoader):
    """Endless batches of packed documents; see `BatchLoader` for the arguments.

    Raises ValueError for a source with less than one batch per rank, too.
    """

    def __init__(
        self,
        source: CorpusTokens,
        batch_size: int,
        seq_len: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ):
        super().__init__(batch_size, seq_len, device, rank, world_size, seed, source.fingerprint)
        self._source, self._row = source, seq_len + 1
        self._shard_at = 0  # position in the epoch's order of shards
        self._document_at = 0  # position in this rank's order of the shard's documents
        self._serial = 0  # pieces buffered so far: equal lengths leave the buffer in this order
        # Sorted (length, serial, shard, document, first token of the piece).
        self._buffer: list[tuple[int, int, int, int, int]] = []
        self._order: tuple[tuple[int, int], int, np.ndarray] | None = None
        self._barren = 0  # passes since the last piece
        self._check_size()

    def _check_size(self) -> None:
        need = self.world_size * self.batch_size * self._row
        have = 0
        # In the order of the first epoch, so that no shard is encoded for the check alone.
        for shard in self.permutation(self._source.num_shards, 0):
            have += int(self._source.shard(int(shard)).offsets[-1])
            if have >= need:
                return
        raise ValueError(
            f"the token source holds {have} tokens, one batch needs {need} (world_size "
            f"{self.world_size} x batch_size {self.batch_size} x (seq_len {self.seq_len} + 1)); "
            "use more text or smaller batches"
        )

    def _current_order(self) -> tuple[int, np.ndarray]:
        """(shard, this rank's documents of it in order) at the present position."""
        key = (self.epoch, self._shard_at)
        if self._order is None or self._order[0] != key:
            shards = self.permutation(self._source.num_shards, self.epoch)
            shard = int(shards[self._shard_at])
            order = self.permutation(len(self._source.shard(shard)), self.epoch, shard + 1)
            self._order = (key, shard, order[self.rank :: self.world_size])
            if self._shard_at + 1 < len(shards):
                self._source.prefetch(int(shards[self._shard_at + 1]))
        return self._order[1:]

    def _read_document(self) -> None:
        """Put the pieces of the next document into the buffer."""
        shard, order = self._current_order()
        while self._document_at >= len(order):
            self._document_at = 0
            self._shard_at += 1
            if self._shard_at == self._source.num_shards:
                self._shard_at = 0
                self.epoch += 1
                self._barren += 1
                if self._barren > 2:  # a whole pass without a piece
                    raise ValueError(
                        f"rank {self.rank} of {self.world_size} finds no document with at least "
                        "two tokens; use more documents or fewer ranks"
                    )
            shard, order = self._current_order()
        document = int(order[self._document_at])
        self._document_at += 1
        offsets = self._source.shard(shard).offsets
        length = int(offsets[document + 1] - offsets[document])
        # Piece 0 has its own <|bos|>; each later piece gets one in front, hence row - 1 tokens.
        start = 0
        while start < length:
            piece = min(self._row, length - start + (start > 0))
            if piece >= 2:
                bisect.insort(self._buffer, (piece, self._serial, shard, document, start))
                self._serial += 1
                self._barren = 0
            start += piece - (start > 0)

    def _refill(self) -> None:
        # A buffer as large as a small corpus would run epochs ahead of what has been trained on.
        documents = len(self._current_order()[1]) * self._source.num_shards
        target = max(1, min(BUFFER, documents // 4))
        while len(self._buffer) < target:
            self._read_document()

    def _fill_row(self, row: np.ndarray) -> None:
        """Pack one row, (seq_len + 1,) int64, in place."""
        at = 0
        while at < self._row:
            self._refill()
            left = self._row - at
            index = max(0, best_fit(self._buffer, left))
            length, _, shard, document, start = self._buffer.pop(index)
            end = at + min(length, left)
            tokens = self._source.shard(shard).document(document)
            if start:
                row[at] = self._source.bos
                at += 1
            row[at:end] = tokens[start : start + end - at]
            at = end

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), both (batch_size, seq_len) int64 on the device; targets are inputs
        moved on by one."""
        rows = np.empty((self.batch_size, self._row), np.int64)
        for row in rows:
            self._fill_row(row)
        batch = torch.from_numpy(rows)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def state_dict(self) -> dict:
        """The position as JSON-able numbers; a few tens of kilobytes."""
        return {
            **self.identity(),
            "epoch": self.epoch,
            "shard_at": self._shard_at,
            "document_at": self._document_at,
            "serial": self._serial,
            "buffer": [list(piece) for piece in self._buffer],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict of a loader of the same data and split; the batch size may
        differ. ValueError names what does not agree."""
        self.check_position(state)
        self.epoch, self._shard_at = state["epoch"], state["shard_at"]
        self._document_at, self._serial = state["document_at"], state["serial"]
        self._buffer = [tuple(piece) for piece in state["buffer"]]
        self._order = None


def best_fit(buffer: list[tuple], space: int) -> int:
    """Where in a sorted buffer of (length, serial, ...) the longest that fits stands, of equal ones
    the first; -1 where none fits."""
    index = bisect.bisect_left(buffer, (space + 1,)) - 1
    return index if index < 0 else bisect.bisect_left(buffer, (buffer[index][0],))


def validation_batches(
    source: CorpusTokens,
    batch_size: int,
    seq_len: int,
    num_batches: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first num_batches batches in a fixed order (seed 0), the same at every call.

    A source with fewer tokens is gone through again, so that every rank yields as many batches.
    """
    loader = PackedLoader(source, batch_size, seq_len, device, rank, world_size)
    return (loader.next_batch() for _ in range(num_batches))
