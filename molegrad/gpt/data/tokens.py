"""Token stores: documents as arrays of ids, encoded once and memory-mapped afterwards.

A split of a corpus becomes shards, one per Part (a parquet file, a range of a large text file). A
shard is two files under data/tokens/: KEY.bin, all ids one after the other as uint16 (uint32 for a
vocabulary above 65536), and KEY.npy, the int64 offsets of the documents. KEY hashes the content and
the tokenizer, so neither can be mixed up. Shards are encoded when they are first needed, the next
one in the background meanwhile: a corpus larger than the memory, or than what has been encoded,
streams.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import filelock
import numpy as np

from molegrad.gpt import paths
from molegrad.gpt.data.corpus import Corpus
from molegrad.gpt.data.sources import Part
from molegrad.gpt.data.tokenizer import Tokenizer

_BATCH_CHARS = 4 << 20
_OPEN_SHARDS = 4
_FORMAT = 1


@dataclass(frozen=True)
class TokenShard:
    """Documents i = tokens[offsets[i]:offsets[i + 1]], each beginning with <|bos|>.

    tokens (N,) uint16 or uint32, offsets (documents + 1,) int64.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class TokenSource(Protocol):
    """What the loader reads: numbered shards of documents, the id of <|bos|>, an identity."""

    bos: int
    fingerprint: str

    @property
    def num_shards(self) -> int:
        """Number of shards, at least 1."""

    def shard(self, index: int) -> TokenShard:
        """One shard; may take as long as encoding it does."""

    def prefetch(self, index: int) -> None:
        """A hint that this shard is needed soon."""


class ArrayTokens:
    """A TokenSource of documents in memory (lists of ids that begin with bos)."""

    def __init__(self, documents: Sequence[Sequence[int]], bos: int):
        self.bos = bos
        for index, document in enumerate(documents):
            if len(document) == 0 or document[0] != bos:
                raise ValueError(f"document {index} does not begin with bos={bos}")
        lengths = [len(document) for document in documents]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        tokens = np.zeros(int(offsets[-1]), np.uint32)
        for index, document in enumerate(documents):
            tokens[offsets[index] : offsets[index + 1]] = document
        self._shard = TokenShard(tokens, offsets)
        digest = hashlib.sha256(tokens.tobytes() + offsets.tobytes() + str(bos).encode())
        self.fingerprint = digest.hexdigest()

    @property
    def num_shards(self) -> int:
        """One."""
        return 1

    def shard(self, index: int) -> TokenShard:
        """The only shard."""
        if index != 0:
            raise IndexError(f"shard {index} of 1")
        return self._shard

    def prefetch(self, index: int) -> None:
        """Nothing to do."""


class CorpusTokens:
    """The TokenSource of a corpus' split, cached on disk.

    home takes the place of $MOLEGRAD_HOME.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        tokenizer: Tokenizer,
        home: Path | None = None,
    ):
        self._parts = corpus.parts(split)
        self._limit = corpus.limit(split)
        self._tokenizer = tokenizer
        self._folder = (paths.data_dir() if home is None else Path(home) / "data") / "tokens"
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._limit:
            # The limit runs across parts, so a limited corpus is one shard.
            self._keys = [self._key(corpus.sha256(split))]
        else:
            self._keys = [self._key(part.fingerprint()) for part in self._parts]
        self._corpus, self._split = corpus, split
        self._open: dict[int, TokenShard] = {}
        self._ahead: tuple[int, Future] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self.bos = tokenizer.bos
        self.fingerprint = hashlib.sha256("".join(self._keys).encode()).hexdigest()

    def _key(self, content: str) -> str:
        joined = f"{_FORMAT}:{content}:{self._limit}:{self._tokenizer.fingerprint}"
        return hashlib.sha256(joined.encode()).hexdigest()[:24]

    @property
    def num_shards(self) -> int:
        """Number of parts, or 1 for a corpus with max_bytes."""
        return len(self._keys)

    def shard(self, index: int) -> TokenShard:
        """Map a shard into memory, encoding it first where that has not been done."""
        if index not in self._open:
            if self._ahead and self._ahead[0] == index:
                self._ahead[1].result()
            # A few stay open: the loader's buffer reaches back over a change of shards.
            while len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[index] = self._map(index)
        return self._open[index]

    def prefetch(self, index: int) -> None:
        """Encode a shard in a background thread."""
        if index in self._open or self._files(index)[1].exists():
            return
        if self._ahead and (self._ahead[0] == index or not self._ahead[1].done()):
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="molegrad-encode")
        self._ahead = (index, self._pool.submit(self._encode, index))

    def _files(self, index: int) -> tuple[Path, Path]:
        key = self._keys[index]
        return self._folder / f"{key}.bin", self._folder / f"{key}.npy"

    def _map(self, index: int) -> TokenShard:
        tokens_file, offsets_file = self._files(index)
        if not offsets_file.exists():
            self._encode(index)
        offsets = np.load(offsets_file, mmap_mode="r")
        dtype = self._dtype()
        count = tokens_file.stat().st_size // dtype.itemsize
        if len(offsets) == 0 or offsets[-1] != count:
            raise ValueError(
                f"the token cache {tokens_file} holds {count} tokens, its offsets say "
                f"{offsets[-1] if len(offsets) else 'nothing'}; delete both files"
            )
        if count == 0:
            return TokenShard(np.zeros(0, dtype), np.zeros(1, np.int64))
        return TokenShard(np.memmap(tokens_file, dtype, "r"), offsets)

    def _dtype(self) -> np.dtype:
        return np.dtype("<u2" if self._tokenizer.vocab_size <= 1 << 16 else "<u4")

    def _texts(self, index: int):
        if self._limit:
            return self._corpus.texts(self._split)
        part: Part = self._parts[index]
        return (document.text for document in part.documents())

    def _encode(self, index: int) -> None:
        tokens_file, offsets_file = self._files(index)
        # Ranks of one machine need the same shard at the same time: the first encodes, the others
        # wait. The offsets are renamed last: where they are, the shard is whole.
        with filelock.FileLock(str(offsets_file) + ".lock"):
            if offsets_file.exists():
                return
            parts = [file.with_name(f"{file.name}.part") for file in (tokens_file, offsets_file)]
            dtype = self._dtype()
            bos = np.array([self.bos], np.uint32)
            lengths: list[np.ndarray] = []
            with open(parts[0], "wb") as out:
                batch: list[str] = []
                chars = 0

                def flush() -> None:
                    encoded = self._tokenizer.encode_arrays(batch)
                    lengths.append(np.array([len(ids) + 1 for ids in encoded], np.int64))
                    pieces = [array for ids in encoded for array in (bos, ids)]
                    out.write(np.concatenate(pieces).astype(dtype).tobytes())

                for text in self._texts(index):
                    batch.append(text)
                    chars += len(text)
                    if chars >= _BATCH_CHARS:
                        flush()
                        batch, chars = [], 0
                if batch:
                    flush()
            with open(parts[1], "wb") as out:
                np.save(out, np.concatenate([[0], *lengths]).cumsum().astype(np.int64))
            os.replace(parts[0], tokens_file)
            os.replace(parts[1], offsets_file)
