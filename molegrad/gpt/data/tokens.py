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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from molegrad.gpt import paths
from molegrad.gpt.data.corpus import Corpus
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


class CorpusTokens:
    """The shards of a corpus' split, cached on disk.

    Attributes:
        bos: the id of <|bos|>.
        fingerprint: SHA-256 of what determines the tokens.
        num_shards: number of parts, or 1 for a corpus with max_bytes.
    """

    def __init__(self, corpus: Corpus, split: str, tokenizer: Tokenizer):
        self._corpus, self._split, self._tokenizer = corpus, split, tokenizer
        self._folder = paths.data_dir() / "tokens"
        self._folder.mkdir(exist_ok=True)
        limit = corpus.limit(split)
        # The limit runs across parts, so a limited corpus is one shard.
        contents = (
            [corpus.sha256(split)]
            if limit
            else [part.fingerprint() for part in corpus.parts(split)]
        )
        joined = [f"{_FORMAT}:{content}:{limit}:{tokenizer.fingerprint}" for content in contents]
        self._keys = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in joined]
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._open: dict[int, TokenShard] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="molegrad-encode")
        self._ahead: tuple[int, Future] | None = None
        self.bos = tokenizer.bos
        self.fingerprint = hashlib.sha256("".join(self._keys).encode()).hexdigest()
        self.num_shards = len(self._keys)

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
        """Encode a shard in a background thread: a hint that it is needed soon."""
        if index in self._open or self._files(index)[1].exists():
            return
        if self._ahead is None or (self._ahead[0] != index and self._ahead[1].done()):
            self._ahead = (index, self._pool.submit(self._encode, index))

    def _files(self, index: int) -> tuple[Path, Path]:
        key = self._keys[index]
        return self._folder / f"{key}.bin", self._folder / f"{key}.npy"

    def _map(self, index: int) -> TokenShard:
        tokens_file, offsets_file = self._files(index)
        if not offsets_file.exists():
            self._encode(index)
        offsets = np.load(offsets_file, mmap_mode="r")
        count = tokens_file.stat().st_size // self._dtype.itemsize
        if offsets[-1] != count:
            raise ValueError(
                f"the token cache {tokens_file} holds {count} tokens, its offsets say "
                f"{offsets[-1]}; delete both files"
            )
        tokens = np.memmap(tokens_file, self._dtype, "r") if count else np.zeros(0, self._dtype)
        return TokenShard(tokens, offsets)

    def _batches(self, index: int) -> Iterator[list[str]]:
        """The texts of a shard, _BATCH_CHARS characters or somewhat more at a time."""
        documents = self._corpus.documents(self._split)
        if not self._corpus.limit(self._split):
            documents = self._corpus.parts(self._split)[index].documents()
        batch: list[str] = []
        chars = 0
        for text in (document.text for document in documents):
            batch.append(text)
            chars += len(text)
            if chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def _encode(self, index: int) -> None:
        files = self._files(index)
        # Ranks of one machine need the same shard at the same time: the first encodes, the others
        # wait. The offsets are renamed last: where they are, the shard is whole.
        with filelock.FileLock(f"{files[1]}.lock"):
            if files[1].exists():
                return
            parts = [file.with_name(f"{file.name}.part") for file in files]
            bos = np.array([self.bos], np.uint32)
            lengths = [0]
            with open(parts[0], "wb") as out:
                for batch in self._batches(index):
                    encoded = self._tokenizer.encode_arrays(batch)
                    lengths += [len(ids) + 1 for ids in encoded]
                    pieces = [array for ids in encoded for array in (bos, ids)]
                    out.write(np.concatenate(pieces).astype(self._dtype).tobytes())
            with open(parts[1], "wb") as out:
                np.save(out, np.cumsum(lengths, dtype=np.int64))
            for part, file in zip(parts, files, strict=True):
                os.replace(part, file)
