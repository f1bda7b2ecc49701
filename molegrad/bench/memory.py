"""Peak memory of training steps against the length of the sequence, measured and predicted.

    python -m scripts.bench_memory --device=cpu --json
    python -m scripts.bench_memory --device=cuda --cap-gib=32 --json

Every method, named as for bench_step, trains at every length, alone, with one sequence, and its
peak is measured over all of it, from the making of the model to the end of the second step
(`molegrad.monitor.memory`); beside it stands what `molegrad.memory.simulate` predicts.

Slopes are those of the peaks of a forward and a backward pass, which are measured apart (an
optimizer's step, whose work does not depend on the sequence, would hide them where it needs more):
least squares over the lengths, in bytes per token of one sequence. "Without stream, K, V" leaves
out what the simulation of the same method and length labels, at its own peak of the two passes, as
residual stream (the stream's values between and within blocks, the embedding's and the last norm's
of that shape) and as keys and values (what attention is called with).

What does not fit the device, or fails, is a row that says so, and Ctrl-C ends with what has been
measured. With `--cap-gib` on a GPU the process may take that much and no more. The cap counts what
the allocator has reserved, gaps included; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps
these small. On a GPU cuDNN's attention is left out, as predictions are of FlashAttention-2; the
result says which kernel ran. The libraries' workspaces are there before the first row is measured,
and in none.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from molegrad import build_info
from molegrad.bench.step import (
    StepBenchConfig,
    Training,
    alone,
    attention_taken,
    prepared,
    settings,
    tried,
)
from molegrad.bench.timing import exit_status, no_room, until_interrupted
from molegrad.gpt.train import flags
from molegrad.gpt.train.base import model_config
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.hardware import device_name
from molegrad.lab.methods import Method, parse_methods
from molegrad.memory.plan import GIB
from molegrad.memory.simulate import PER_TOKEN, simulate
from molegrad.memory.table import table
from molegrad.monitor.memory import peak_bytes

MIB = 2**20
CHUNKS = "balanced:sequence_chunk={}:sequence_parts=all"
# What a row has where its peak was not predicted.
NOT_PREDICTED = dict.fromkeys(("predicted", "phase", "predicted_passes", "own_passes", "host"))


@dataclass(frozen=True)
class MemoryBenchConfig:
    """Measure peak memory against sequence length.

    Raises:
        ValueError: a size, length or method that cannot be measured; the message names it.
    """

    device: str = flag("cpu", "cpu or cuda")
    depth: int = flag(0, "transformer blocks; 0 takes 12 on CUDA, 4 elsewhere")
    aspect_ratio: int = flag(64, "width per block")
    vocab: int = flag(0, "entries of the vocabulary; 0 takes 32768 on CUDA, 2048 elsewhere")
    lengths: str = flag(
        "", "tokens of the one sequence, comma separated; empty takes 2048 to 65536 on CUDA, 256 "
        "to 1024 elsewhere",
    )  # fmt: skip
    methods: str = flag(
        "",
        "methods, as scripts.bench_step takes them; empty takes dense and balanced, with chunks, "
        "recompute and offload one after the other",
    )  # fmt: skip
    dtype: str = flag("auto", "of the matrix products: auto, bfloat16 or float32")
    cap_gib: float = flag(0.0, "GiB that the process may take of a GPU; 0 is no limit")
    threads: int = flag(0, "CPU threads; 0 leaves torch's own number")
    seed: int = flag(0, "of weights and tokens")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: bool = flag(False, "print the tables as Markdown")

    def __post_init__(self) -> None:
        gpu = self.device.startswith("cuda")
        chunks = CHUNKS.format(4096 if gpu else 128)
        levers = ("", ":recompute=block", ":recompute=block:offload=True")
        defaults = {
            "depth": 12 if gpu else 4,
            "vocab": 32768 if gpu else 2048,
            "lengths": "2048,8192,16384,32768,65536" if gpu else "256,512,1024",
            "methods": ",".join(
                ["dense:recompute=block", "balanced", *(chunks + lever for lever in levers)]
            ),
        }
        for name, value in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if self.cap_gib and not gpu:
            raise ValueError(f"cap_gib={self.cap_gib} limits a GPU's memory, got device=cpu")
        if len(self.length_list) < 2 or min(self.length_list) < 1:
            raise ValueError(f"lengths={self.lengths} needs two lengths or more, for a slope")
        self.step_config()

    @property
    def length_list(self) -> list[int]:
        try:
            return sorted({int(part) for part in self.lengths.split(",")})
        except ValueError:
            raise ValueError(f"lengths={self.lengths} should look like 2048,8192") from None

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


def bench(config: MemoryBenchConfig) -> dict:
    """Every measurement of a configuration, and on what machine; after Ctrl-C what there is, with
    "interrupted".

    Raises:
        ValueError: an unknown method, or a device that is not there.
    """
    methods = parse_methods(config.methods)
    rows: list[dict] = []
    result = {"peaks": rows}
    with prepared(config) as device, _limited(config, device):
        result |= {
            "device": device_name(device),
            "attention": attention_taken(config.step_config()),
            "config": flags.resolved(config),
            "build_info": build_info(),
        }
        with until_interrupted(result):
            if device.type == "cuda":  # what libraries allocate at their first call, for good
                for method in (methods[0], methods[-1]):
                    alone(measured_peaks, config, method, config.length_list[0], 1)
            for method in methods:
                for tokens in config.length_list:
                    rows.append(_peak_row(config, method, tokens))
    result["slopes"] = _slopes(rows)
    return result


@contextlib.contextmanager
def _limited(config: MemoryBenchConfig, device: torch.device) -> Iterator[None]:
    """Inside, attention is not cuDNN's, and the process may take cap_gib of a GPU's memory."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    index = None
    if config.cap_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        if config.cap_gib * GIB > total:
            raise ValueError(f"cap_gib={config.cap_gib}, but the GPU has {total / GIB:.1f} GiB")
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(config.cap_gib * GIB / total, index)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        if index is not None:
            with contextlib.suppress(RuntimeError):  # of a device that an error inside has broken
                torch.cuda.set_per_process_memory_fraction(1.0, index)


def measured_peaks(
    config: MemoryBenchConfig, method: Method, tokens: int, depth: int = 0
) -> tuple[int, int] | None:
    """Bytes at the peak of two training steps, and at that of the next step's forward and backward
    pass, without what the process holds besides; None where they do not fit the GPU."""
    made: list[Training] = []
    others = peak_bytes(lambda: None, config.device)

    def train() -> None:
        made.append(Training(config.step_config(depth), method, (1, tokens), False))
        for _ in range(2):
            made[0].step()

    try:
        whole = peak_bytes(train, config.device)
        passes = peak_bytes(lambda: made[0].loss().backward(), config.device)
        return whole - others, passes - others
    except RuntimeError as error:
        if no_room(error):
            return None
        raise


def predicted_peaks(config: MemoryBenchConfig, method: Method, tokens: int) -> dict:
    """What a row says of a simulation, in bytes."""
    run = settings(config.step_config(), method, (1, tokens))
    found = simulate(run, model_config(run, config.vocab))
    own = found.phases[found.passes]
    return {
        "predicted": found.peak,
        "phase": found.phase,
        "predicted_passes": found.of(found.passes),
        "own_passes": sum(own[part] for part in PER_TOKEN),
        "host": found.host,
    }


def _peak_row(config: MemoryBenchConfig, method: Method, tokens: int) -> dict:
    row = {"method": method.label, "tokens": tokens, "measured": None, "measured_passes": None}
    known, not_predicted = tried(predicted_peaks, config, method, tokens)
    row |= known or NOT_PREDICTED
    measured, not_measured = alone(measured_peaks, config, method, tokens)
    if measured is None:
        return {**row, "note": "out of memory", **not_predicted, **not_measured}
    row["measured"], row["measured_passes"] = measured
    if known is None:
        return {**row, **not_predicted}
    return {**row, "measured_to_predicted": row["measured"] / row["predicted"]}


def _slopes(rows: list[dict]) -> list[dict]:
    """For every method the slopes of its passes' peaks, and the shares of dense's."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name and row["predicted"] is not None]
        fitting = [row for row in mine if row["measured"] is not None]
        measured, own = _slope(fitting, "measured_passes"), _slope(fitting, "own_passes")
        found.append(
            {
                "method": name,
                "measured": measured,
                "predicted": _slope(mine, "predicted_passes"),
                "rest": None if measured is None else measured - own,
            }
        )
    for row in found:
        for key in ("measured", "rest"):
            known = row[key] is not None and found[0][key]
            row[f"{key}_to_dense"] = row[key] / found[0][key] if known else None
    return found


def _slope(rows: list[dict], key: str) -> float | None:
    """Of the least-squares line over the tokens; None where there are fewer than two."""
    if len(rows) < 2:
        return None
    return statistics.linear_regression(
        [row["tokens"] for row in rows], [row[key] for row in rows]
    ).slope


_PEAKS = {  # heading: (key, format)
    "method": ("method", "s"), "tokens": ("tokens", "d"), "peak MiB": ("measured_mib", ",.1f"),
    "predicted": ("predicted_mib", ",.1f"),
    "measured / predicted": ("measured_to_predicted", ".3f"), "/ dense": ("to_dense", ".2f"),
    "phase": ("phase", "s"), "passes MiB": ("measured_passes_mib", ",.1f"),
    "stream, K, V": ("own_passes_mib", ",.1f"), "host MiB": ("host_mib", ",.0f"),
    "note": ("note", "s"),
}  # fmt: skip
_SLOPES = {
    "method": ("method", "s"), "bytes per token": ("measured", ",.0f"),
    "predicted": ("predicted", ",.0f"), "/ dense": ("measured_to_dense", ".3f"),
    "without stream, K, V": ("rest", ",.0f"), "its / dense": ("rest_to_dense", ".3f"),
}  # fmt: skip


def shown(result: dict, markdown: bool = False) -> str:
    """The tables of `bench` as text."""
    dense = {r["tokens"]: r["measured"] for r in result["peaks"] if r["method"] == "dense"}
    peaks = []
    for row in result["peaks"]:
        both = row["measured"] is not None and dense.get(row["tokens"])
        keys = ("measured", "predicted", "measured_passes", "own_passes", "host")
        mib = {f"{key}_mib": row[key] / MIB for key in keys if row[key]}
        peaks.append(row | mib | ({"to_dense": row["measured"] / both} if both else {}))
    return f"{table(peaks, _PEAKS, markdown)}\n\n{table(result['slopes'], _SLOPES, markdown)}"


@flags.command("bench_memory")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(MemoryBenchConfig, argv, prog="python -m scripts.bench_memory")
    try:
        result = bench(config)
    except ValueError as error:
        print(f"bench_memory: {error}")
        return 2
    sizes = f"depth {config.depth}, width {config.depth * config.aspect_ratio}"
    versions = f"torch {result['build_info']['torch']}, attention {result['attention']}"
    print(f"{result['device']}, {versions}, {sizes}, vocabulary {config.vocab}, one sequence\n")
    print(shown(result, config.markdown))
    if result.get("interrupted"):
        print("\ninterrupted: what was measured before")
    if config.json:
        print(json.dumps(result), flush=True)
    return exit_status(result, failed=any(row.get("failed") for row in result["peaks"]))
