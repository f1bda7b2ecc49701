"""Peak memory of training steps against the length of the sequence, measured and predicted.

    python -m scripts.bench_memory --device=cpu --json
    python -m scripts.bench_memory --device=cuda --cap-gib=32 --json

Every variant trains at every length, alone, and its peak is measured over all of it, from the
making of the model to the end of the second step (`molegrad.monitor.peak`); beside it stands what
`molegrad.gpt.memory_sim` predicts.

Slopes are those of the peaks of a forward and a backward pass, which are measured apart (an
optimizer's step, whose work does not depend on the sequence, would hide them where it needs more):
least squares over the lengths, in bytes per token of one sequence. "Without stream, K, V" leaves
out what the simulation of the same variant and length labels, at its own peak of the two passes, as
residual stream (the stream's values between and within blocks, the embedding's and the last norm's
of that shape) and as keys and values (what attention is called with).

Step times are taken at one length, step by step in turn with dense's, and those of chunks also in
turn with the same variant without them.

What does not fit the device is a row that says so. With `--cap-gib` on a GPU the process may take
that much and no more: then it is tried which variants train with 65,536 tokens, and how deep a
model trains at 8192, from the depth on that the plan predicts, downwards.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from molegrad import build_info
from molegrad.bench.memory_report import (
    CHUNKS,
    DENSE,
    DEPTH,
    LONG,
    PLAIN,
    TOKENS,
    memory_targets,
    shown,
)
from molegrad.bench.step import StepBenchConfig, Training, settings
from molegrad.gpt import flags
from molegrad.gpt.flags import flag
from molegrad.gpt.hardware import device_name, keep_freed_memory
from molegrad.gpt.memory_plan import largest_depth, simulated
from molegrad.gpt.memory_sim import PER_TOKEN
from molegrad.gpt.train_config import BaseTrainConfig
from molegrad.lab.methods import METHODS, Method
from molegrad.lab.timing import median_interval
from molegrad.monitor.peak import peak_bytes

GIB = 2**30
WARM_UP = 2


@dataclass(frozen=True)
class MemoryBenchConfig:
    """Measure peak memory against sequence length.

    Raises:
        ValueError: a size or length that cannot be measured; the message names it.
    """

    device: str = flag("cpu", "cpu or cuda")
    depth: int = flag(0, "transformer blocks; 0 takes 12 on CUDA, 4 elsewhere")
    aspect_ratio: int = flag(64, "width per block")
    vocab: int = flag(0, "entries of the vocabulary; 0 takes 32768 on CUDA, 2048 elsewhere")
    lengths: str = flag(
        "", "tokens of the one sequence, comma separated; empty takes 2048 to 65536 on CUDA, 256 "
        "to 1024 elsewhere",
    )  # fmt: skip
    variants: str = flag("", "variants to measure, comma separated; empty takes all")
    sequence_chunk: int = flag(0, "tokens in a chunk; 0 takes 4096 on CUDA, 128 elsewhere")
    dtype: str = flag("auto", "of the matrix products: auto, bfloat16 or float32")
    time_at: int = flag(
        0, "length at which steps are timed; 0 takes 8192 on CUDA, 512 elsewhere; -1 times none"
    )
    steps: int = flag(8, "steps of every variant that are timed")
    cap_gib: float = flag(0.0, "GiB that the process may take of a GPU; 0 is no limit")
    threads: int = flag(0, "CPU threads; 0 leaves torch's own number")
    seed: int = flag(0, "of weights and tokens")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: bool = flag(False, "print the tables as Markdown")

    def __post_init__(self) -> None:
        gpu = self.device.startswith("cuda")
        defaults = {
            "depth": DEPTH if gpu else 4,
            "vocab": 32768 if gpu else 2048,
            "lengths": "2048,8192,16384,32768,65536" if gpu else "256,512,1024",
            "sequence_chunk": 4096 if gpu else 128,
            "time_at": TOKENS if gpu else 512,
            "variants": ",".join(variants_of(1)),
        }
        for name, value in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if self.cap_gib and not gpu:
            raise ValueError(f"cap_gib={self.cap_gib} limits a GPU's memory, got device=cpu")
        for name in ("depth", "aspect_ratio", "vocab", "steps", "sequence_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.length_list) < 2 or min(self.length_list) < 1:
            raise ValueError(f"lengths={self.lengths} needs two lengths or more, for a slope")
        unknown = [name for name in self.variant_list if name not in variants_of(1)]
        if unknown:
            known = ", ".join(variants_of(1))
            raise ValueError(f"variants={', '.join(unknown)} is not among {known}")

    @property
    def length_list(self) -> list[int]:
        try:
            return sorted({int(part) for part in self.lengths.split(",")})
        except ValueError:
            raise ValueError(f"lengths={self.lengths} should look like 2048,8192") from None

    @property
    def variant_list(self) -> list[str]:
        """Dense first, to compare with."""
        named = [part.strip() for part in self.variants.split(",")]
        return [DENSE, *(name for name in named if name != DENSE)]

    @property
    def methods(self) -> dict[str, Method]:
        """The variants to measure."""
        every = variants_of(self.sequence_chunk)
        return {name: Method(name, every[name]) for name in self.variant_list}

    def step_config(self, depth: int = 0) -> StepBenchConfig:
        """The sizes, as `molegrad.bench.step` takes them."""
        return StepBenchConfig(
            device=self.device,
            depth=depth or self.depth,
            aspect_ratio=self.aspect_ratio,
            vocab=self.vocab,
            dtype=self.dtype,
            seed=self.seed,
        )


def variants_of(chunk: int) -> dict[str, dict]:
    """Name -> flags of base training."""
    block = {"recompute": "block"}
    chunks = {"sequence_chunk": chunk, "sequence_parts": "all"}
    balanced = METHODS["balanced"]
    return {
        DENSE: {},
        "dense + recompute": block,
        PLAIN: balanced,
        CHUNKS: {**balanced, **chunks},
        "MoleGrad + recompute": {**balanced, **block},
        f"{CHUNKS} + recompute": {**balanced, **chunks, **block},
        f"{CHUNKS} + recompute + offload": {**balanced, **chunks, **block, "offload": True},
    }


def bench(config: MemoryBenchConfig) -> dict:
    """Every measurement of a configuration, and on what machine.

    Raises:
        ValueError: a device that is not there.
    """
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device; use --device=cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        with _limited(config, device):
            rows = [
                _peak_row(config, name, tokens)
                for name in config.methods
                for tokens in config.length_list
            ]
            slopes = _slopes(config, rows)
            times = _times(config) if config.time_at > 0 else []
            capped = _capped(config) if config.cap_gib else []
    finally:
        torch.set_num_threads(threads)
    result = {
        "peaks": rows,
        "slopes": slopes,
        "times": times,
        "capped": capped,
        "device": device_name(device),
        "config": flags.resolved(config),
        "build_info": build_info(),
    }
    return {**result, "targets": memory_targets(result)}


@contextlib.contextmanager
def _limited(config: MemoryBenchConfig, device: torch.device) -> Iterator[None]:
    """Inside, the process may take cap_gib of a GPU's memory."""
    if not config.cap_gib:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if config.cap_gib * GIB > total:
        raise ValueError(f"cap_gib={config.cap_gib}, but the GPU has {total / GIB:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(config.cap_gib * GIB / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _training(config: MemoryBenchConfig, name: str, tokens: int, depth: int = 0) -> Training:
    """A variant's model and optimizers, for one sequence of that length."""
    return Training(config.step_config(depth), config.methods[name], (1, tokens), False)


def _settings(config: MemoryBenchConfig, name: str, tokens: int) -> BaseTrainConfig:
    return settings(config.step_config(), config.methods[name], (1, tokens))


def measured_peaks(
    config: MemoryBenchConfig, name: str, tokens: int, depth: int = 0
) -> tuple[int, int] | None:
    """Bytes at the peak of two training steps, and at that of the next step's forward and backward
    pass, without what the process holds besides; None where they do not fit the GPU."""
    made: list[Training] = []
    others = peak_bytes(lambda: None, config.device)

    def train() -> None:
        made.append(_training(config, name, tokens, depth))
        for _ in range(2):
            made[0].step()

    found = None
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        whole = peak_bytes(train, config.device)
        passes = peak_bytes(lambda: made[0].loss().backward(), config.device)
        found = whole - others, passes - others
    made.clear()
    _clean()  # now, as the error held on to what was there
    return found


def _peak_row(config: MemoryBenchConfig, name: str, tokens: int) -> dict:
    found = simulated(_settings(config, name, tokens), config.vocab)
    own = found.phases[found.passes]
    row = {
        "variant": name,
        "tokens": tokens,
        "measured": None,
        "predicted": found.peak,
        "phase": found.phase,
        "parts": found.parts,
        "measured_passes": None,
        "predicted_passes": found.of(found.passes),
        "own_passes": sum(own[part] for part in PER_TOKEN),
        "host": found.host,
    }
    measured = measured_peaks(config, name, tokens)
    if measured is None:
        return {**row, "note": "out of memory"}
    row["measured"], row["measured_passes"] = measured
    return {**row, "measured_to_predicted": row["measured"] / row["predicted"]}


def _slopes(config: MemoryBenchConfig, rows: list[dict]) -> list[dict]:
    """For every variant the slopes of its passes' peaks, and the shares of dense's."""
    found = []
    for name in config.methods:
        mine = [row for row in rows if row["variant"] == name]
        fitting = [row for row in mine if row["measured"] is not None]
        tokens = [row["tokens"] for row in fitting]
        measured = slope(tokens, [row["measured_passes"] for row in fitting])
        own = slope(tokens, [row["own_passes"] for row in fitting])
        predicted = slope(config.length_list, [row["predicted_passes"] for row in mine])
        rest = None if measured is None else measured - own
        found.append(
            {"variant": name, "lengths": tokens, "measured": measured, "predicted": predicted,
             "own": own, "rest": rest}
        )  # fmt: skip
    dense = found[0]
    for row in found:
        for key in ("measured", "rest"):
            known = row[key] is not None and dense[key]
            row[f"{key}_to_dense"] = row[key] / dense[key] if known else None
    return found


def slope(x: list[int], y: list[int]) -> float | None:
    """Of the least-squares line through the points; None where there are fewer than two."""
    if len(x) < 2:
        return None
    return statistics.linear_regression(x, y).slope


def _times(config: MemoryBenchConfig) -> list[dict]:
    """Milliseconds a step at one length, and ratios of steps that were made in turn."""
    pairs = [(name, DENSE) for name in config.methods if name != DENSE]
    if CHUNKS in config.methods and PLAIN in config.methods:
        pairs.append((CHUNKS, PLAIN))
    rows = []
    for name, reference in pairs:
        row = {"variant": name, "reference": reference, "tokens": config.time_at}
        try:
            row |= _in_turn(config, name, reference)
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory: the two do not fit the device together"
        rows.append(row)
        _clean()
    return rows


def _in_turn(config: MemoryBenchConfig, name: str, reference: str) -> dict:
    own, other = (_training(config, each, config.time_at) for each in (name, reference))
    seconds = []
    for number in range(WARM_UP + config.steps):
        order = (own, other) if number % 2 else (other, own)
        taken = {training: training.step() for training in order}
        seconds.append((taken[own], taken[other]))
    seconds = seconds[WARM_UP:]
    ratios = [mine / its for mine, its in seconds]
    low, high = median_interval(ratios)
    return {
        "ms": 1e3 * statistics.median(mine for mine, _ in seconds),
        "reference_ms": 1e3 * statistics.median(its for _, its in seconds),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def _capped(config: MemoryBenchConfig) -> list[dict]:
    """Under the cap: which variants train with long sequences, and how deep a model trains."""
    rows = []
    for name in config.methods:
        peaks = measured_peaks(config, name, LONG)
        rows.append({"what": f"{LONG} tokens", "variant": name, "depth": config.depth,
                     "tokens": LONG, "measured": peaks and peaks[0],
                     "trains": peaks is not None})  # fmt: skip
    for name in dict.fromkeys((DENSE, list(config.methods)[-1])):
        rows.append(_deepest(config, name))
    return rows


def _deepest(config: MemoryBenchConfig, name: str) -> dict:
    """The deepest model that trains at 8192 tokens: tried from what the plan predicts on."""
    planned = largest_depth(
        _settings(config, name, TOKENS), int(config.cap_gib * GIB), config.vocab
    )
    depth = predicted = planned[0] if planned else 0
    peaks = None
    while depth and (peaks := measured_peaks(config, name, TOKENS, depth)) is None:
        depth -= 1
    row = {"what": "deepest model", "variant": name, "depth": depth, "tokens": TOKENS}
    found = {"predicted_depth": predicted, "measured": peaks and peaks[0], "trains": depth > 0}
    return {**row, **found}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(MemoryBenchConfig, argv, prog="python -m scripts.bench_memory")
    try:
        result = bench(config)
    except ValueError as error:
        print(f"bench_memory: {error}")
        return 2
    sizes = f"depth {config.depth}, width {config.depth * config.aspect_ratio}"
    versions = f"torch {result['build_info']['torch']}"
    print(f"{result['device']}, {versions}, {sizes}, vocabulary {config.vocab}, one sequence\n")
    print(shown(result, config.markdown))
    if config.json:
        print(json.dumps(result))
    return 0
