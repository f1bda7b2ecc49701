"""Predictions that `molegrad.bench.memory` sets measured peaks against, simulated or from a file.

    python -m scripts.bench_memory --device=cuda --cap-gib=32 --predict-only --predictions=FILE
    python -m scripts.bench_memory --device=cuda --cap-gib=32 --predictions=FILE --json

The first command needs no GPU: it simulates every size and how deep a model the cap holds, which
takes minutes, and writes them. The second takes them from there. The file says what it was
simulated for; another configuration than that, or a size that it lacks, is an error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from molegrad import build_info
from molegrad.bench.memory_config import MemoryBenchConfig
from molegrad.bench.memory_report import TOKENS
from molegrad.memory.plan import GIB, RESERVE_GIB, largest_depth, simulated
from molegrad.memory.simulate import PER_TOKEN

AGAIN = "write it anew with --predict-only and these flags"
# What a row of peaks has of a prediction.
NOT_PREDICTED = dict.fromkeys(
    ("predicted", "phase", "parts", "predicted_passes", "own_passes", "host")
)


class Predictions:
    """Of one configuration; simulated when they are asked for, or all read from its file.

    Raises:
        ValueError: the file is missing, no file of predictions, of another configuration, or lacks
            a size.
    """

    def __init__(self, config: MemoryBenchConfig) -> None:
        self.config = config
        reads = config.predictions and not config.predict_only
        self._file = _read(config) if reads else None

    def peak(self, name: str, tokens: int) -> dict:
        """What a row of peaks says of a variant at a length, in bytes."""
        if self._file is not None:
            return _of(self._file, name, tokens)
        found = simulated(self.config.settings(name, tokens), self.config.vocab)
        own = found.phases[found.passes]
        return {
            "predicted": found.peak,
            "phase": found.phase,
            "parts": found.parts,
            "predicted_passes": found.of(found.passes),
            "own_passes": sum(own[part] for part in PER_TOKEN),
            "host": found.host,
        }

    def depth(self, name: str) -> int:
        """The deepest model of a variant that the cap holds at 8192 tokens, the plan's reserve for
        the libraries and the allocator's gaps left alone; 0 where it holds none."""
        if self._file is not None:
            return self._file["deepest"][name]
        budget = int((self.config.cap_gib - RESERVE_GIB) * GIB)
        found = largest_depth(self.config.settings(name, TOKENS), budget, self.config.vocab)
        return found[0] if found else 0

    @property
    def source(self) -> dict | None:
        """The file, and the torch whose operations were simulated; None where there is no file."""
        if self._file is None:
            return None
        return {"file": self.config.predictions, "torch": self._file["torch"]}


def predict(config: MemoryBenchConfig) -> dict:
    """What a file of predictions holds: every variant at every length, and the deepest models."""
    ask = Predictions(config)
    rows = [
        {"variant": name, "tokens": tokens, **ask.peak(name, tokens)}
        for name in config.methods
        for tokens in config.length_list
    ]
    deepest = {name: ask.depth(name) for name in config.capped_variants if config.cap_gib}
    return {**_identity(config), "torch": torch.__version__, "rows": rows, "deepest": deepest}


def write(path: str | Path, predictions: dict) -> None:
    """Write what `predict` gave; a file that is there is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(predictions, indent=1) + "\n")
    os.replace(part, path)


def _identity(config: MemoryBenchConfig) -> dict:
    """All that predictions depend on beside the variant and the length."""
    gpu = config.device.startswith("cuda")
    return {
        "sizes": {
            "device": config.device.partition(":")[0],
            "depth": config.depth,
            "aspect_ratio": config.aspect_ratio,
            "vocab": config.vocab,
            "sequence_chunk": config.sequence_chunk,
            "dtype": config.settings(config.variant_list[0], config.length_list[0]).dtype,
            "native": None if gpu else build_info()["native"],
        },
        "cap": {"cap_gib": config.cap_gib, "reserve_gib": RESERVE_GIB, "tokens": TOKENS},
        "flags": {name: dict(method.flags) for name, method in config.methods.items()},
    }


def _read(config: MemoryBenchConfig) -> dict:
    path = Path(config.predictions)
    try:
        file = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"predictions={path}: {error.strerror}; {AGAIN}") from None
    except ValueError:
        raise ValueError(f"predictions={path} is no JSON; {AGAIN}") from None
    wanted = json.loads(json.dumps(_identity(config)))  # tuples as the file has them
    keys = {*wanted, "torch", "rows", "deepest"}
    if not isinstance(file, dict) or not keys <= file.keys():
        raise ValueError(f"predictions={path} is no file of predictions; {AGAIN}")
    pairs = [("sizes", wanted["sizes"])]
    if config.cap_gib:
        pairs.append(("cap", wanted["cap"]))
    differ = [
        f"{name}={file[part].get(name)} (now {value})"
        for part, values in pairs
        for name, value in values.items()
        if file[part].get(name) != value
    ]
    for name, flags in wanted["flags"].items():
        if name in file["flags"] and file["flags"][name] != flags:
            differ.append(f"{name!r} with {file['flags'][name]} (now {flags})")
    if differ:
        raise ValueError(f"predictions={path} was written for {', '.join(differ)}: {AGAIN}")
    there = {(row["variant"], row["tokens"]) for row in file["rows"]}
    asked = [(name, tokens) for name in config.methods for tokens in config.length_list]
    missing = [f"{name} at {n} tokens" for name, n in asked if (name, n) not in there]
    if config.cap_gib:
        names = (name for name in config.capped_variants if name not in file["deepest"])
        missing += [f"{name}'s deepest model" for name in names]
    if missing:
        raise ValueError(f"predictions={path} has no {', '.join(missing)}: {AGAIN}")
    return file


def _of(file: dict, name: str, tokens: int) -> dict:
    row = next(r for r in file["rows"] if (r["variant"], r["tokens"]) == (name, tokens))
    return {key: row[key] for key in NOT_PREDICTED}
