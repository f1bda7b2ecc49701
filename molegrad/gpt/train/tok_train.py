"""Train the tokenizer on a corpus, measure its compression on held-out text, save it.

python -m scripts.tok_train --vocab-size=4096
python -m scripts.tok_train --data=climbmix:8 --vocab-size=32768 --max-chars=2000000000
python -m scripts.tok_train --vocab-size=265 --tokenizer=bytes   # one token a byte, no merges
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from molegrad.gpt import paths
from molegrad.gpt.data.corpus import Corpus, open_corpus
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.train import flags
from molegrad.gpt.train.flags import flag

_HELD_OUT_BYTES = 4_000_000


@dataclass(frozen=True)
class TokTrainConfig:
    """Train a tokenizer on a corpus and save it under $MOLEGRAD_HOME."""

    run: str = flag("", "also record the result in this run's folder")
    data: str = flag(
        "embedded", "embedded, climbmix:N, fineweb-edu:N, or a path (see molegrad.gpt.data.corpus)"
    )
    val_data: str = flag("", "held-out files for a local --data path")
    tokenizer: str = flag("", "name to save it under; empty is the default tokenizer")
    vocab_size: int = flag(4096, "entries, 256 bytes and 9 special tokens included")
    max_chars: int = flag(2_000_000_000, "characters of training text to learn from")
    doc_cap: int = flag(10_000, "characters taken of each document at most")
    max_bytes: int = flag(0, "limit of the corpus itself in bytes, 0 for none")
    if_needed: bool = flag(False, "do nothing where it has been made with these flags and data")

    def __post_init__(self):
        for name in ("max_chars", "doc_cap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.max_bytes < 0:
            raise ValueError(f"max_bytes={self.max_bytes} must be >= 0")
        if self.run:
            paths.check_run_name(self.run)
        if self.tokenizer:
            paths.check_run_name(self.tokenizer)


@flags.command("tok_train")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    tok_train(flags.parse(TokTrainConfig, argv, prog="python -m scripts.tok_train"))
    return 0


def limited_texts(corpus: Corpus, max_chars: int, doc_cap: int) -> Iterator[str]:
    """Training texts, each cut to doc_cap characters, until max_chars characters."""
    for text in corpus.texts("train"):
        text = text[: min(doc_cap, max_chars)]
        max_chars -= len(text)
        yield text
        if max_chars <= 0:
            return


def compression(tokenizer: Tokenizer, corpus: Corpus, max_bytes: int = _HELD_OUT_BYTES) -> dict:
    """Bytes per token on held-out text, the numbers it comes from, and whether text survives."""
    size = tokens = 0
    exact = True
    start = time.perf_counter()
    for text in corpus.texts("val"):
        ids = tokenizer.encode(text)
        exact = exact and tokenizer.decode(ids) == text
        size += len(text.encode())
        tokens += len(ids)
        if size >= max_bytes:
            break
    if not tokens:
        raise ValueError("the validation split holds no text to measure compression on")
    return {
        "held_out_bytes": size,
        "held_out_tokens": tokens,
        "bytes_per_token": size / tokens,
        "round_trip_exact": exact,
        "megabytes_per_second": size / 1e6 / (time.perf_counter() - start),
    }


def _made_before(path: Path, config: TokTrainConfig, corpus: Corpus) -> dict | None:
    """The manifest of a tokenizer that was made with the same flags and text, or None."""
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    before = {**asdict(config), **manifest["config"], "if_needed": config.if_needed}
    same_text = manifest["corpus"]["sha256"] == corpus.manifest["sha256"]
    return manifest if before == asdict(config) and same_text else None


def tok_train(config: TokTrainConfig) -> dict:
    """Do it; prints the result and returns the manifest that is saved beside the tokenizer."""
    start = time.perf_counter()
    corpus = open_corpus(config.data, config.val_data, config.max_bytes)
    folder = paths.tokenizer_dir(config.tokenizer)
    if config.if_needed and (made := _made_before(folder / "manifest.json", config, corpus)):
        print(f"{folder} is done with these flags and data")
        return made
    opened = time.perf_counter()
    texts = limited_texts(corpus, config.max_chars, config.doc_cap)
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    trained = time.perf_counter()
    measured = compression(tokenizer, corpus)
    if not measured["round_trip_exact"]:
        raise RuntimeError("the tokenizer does not give held-out text back; it was not saved")
    path = tokenizer.save(folder)
    manifest = {
        "config": asdict(config),
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "corpus": corpus.manifest,
        "corpus_seconds": opened - start,
        "train_seconds": trained - opened,
        **measured,
    }
    text = json.dumps(manifest, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    if config.run:
        (paths.run_dir(config.run) / "tok_train.json").write_text(text, encoding="utf-8")
    print(f"corpus      {corpus.manifest['kind']}, SHA-256 {corpus.manifest['sha256'][:16]}")
    print(f"vocabulary  {tokenizer.vocab_size} entries, trained in {trained - opened:.1f} s")
    print(
        f"held out    {measured['bytes_per_token']:.3f} bytes per token on "
        f"{measured['held_out_bytes']} bytes"
    )
    print(f"saved       {path}")
    return manifest
