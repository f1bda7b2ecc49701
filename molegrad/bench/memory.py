"""Peak memory of training steps against the length of the sequence, measured and predicted.

    python -m scripts.bench_memory --device=cpu --json
    python -m scripts.bench_memory --device=cuda --cap-gib=32 --json

Every variant trains at every length, alone, and its peak is measured over all of it, from the
making of the model to the end of the second step (`molegrad.monitor.memory`); beside it stands what
`molegrad.plan.simulate` predicts.

Slopes are those of the peaks of a forward and a backward pass, which are measured apart (an
optimizer's step, whose work does not depend on the sequence, would hide them where it needs more):
least squares over the lengths, in bytes per token of one sequence. "Without stream, K, V" leaves
out what the simulation of the same variant and length labels, at its own peak of the two passes, as
residual stream (the stream's values between and within blocks, the embedding's and the last norm's
of that shape) and as keys and values (what attention is called with).

Step times are taken at one length, step by step in turn with dense's, and those of chunks also in
turn with the same variant without them.

What does not fit the device, or fails, is a row that says so, and Ctrl-C ends with what has been
measured. With `--cap-gib` on a GPU the process may take that much and no more: then it is tried
which variants train with 65,536 tokens, and whether a model as deep as the plan predicts trains at
8192, or else one with a block less. The cap counts what the allocator has reserved, gaps included;
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps these small.

On a GPU attention is FlashAttention-2, which predictions are of, even where torch would choose
cuDNN's kernel, as training does there; `--attention=auto` measures that. The result says what ran.
The libraries' workspaces are there before the first row is measured, and in none.

Predictions take minutes and no GPU: see `molegrad.bench.memory_predictions` for how to make them
beforehand.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator

import torch

from molegrad import build_info
from molegrad.bench import memory_predictions
from molegrad.bench.memory_config import MemoryBenchConfig
from molegrad.bench.memory_predictions import NOT_PREDICTED, Predictions
from molegrad.bench.memory_report import (
    CHUNKS,
    DENSE,
    LONG,
    PLAIN,
    TOKENS,
    memory_targets,
    predicted,
    shown,
)
from molegrad.bench.partial import exit_status, no_room, until_interrupted
from molegrad.bench.step import Training, alone, attention_taken, prepared, tried
from molegrad.gpt.train import flags
from molegrad.gpt.train.hardware import device_name
from molegrad.lab.timing import median_interval
from molegrad.monitor.memory import peak_bytes
from molegrad.plan.memory import GIB

WARM_UP = 2
ATTEMPTS = 2  # at the deepest model


def bench(config: MemoryBenchConfig) -> dict:
    """Every measurement of a configuration, and on what machine; after Ctrl-C what there is, with
    "interrupted".

    Raises:
        ValueError: a device that is not there, a kernel of attention that cannot be had, or a file
            of predictions that is not of this configuration.
    """
    rows, times, capped = [], [], []
    result = {"peaks": rows, "slopes": [], "times": times, "capped": capped}
    with prepared(config) as device:
        predictions = Predictions(config)
        with _attention(config) as attention, _limited(config, device):
            result |= {
                "device": device_name(device),
                "attention": attention,
                "predictions": predictions.source,
                "config": flags.resolved(config),
                "build_info": build_info(),
            }
            with until_interrupted(result):
                if device.type == "cuda":
                    _make_workspaces(config)
                for name in config.methods:
                    for tokens in config.length_list:
                        rows.append(_peak_row(config, name, tokens, predictions))
                if config.time_at > 0:
                    _times(config, times)
                if config.cap_gib:
                    _capped(config, rows, predictions, capped)
    result["slopes"] = _slopes(config, rows)
    return {**result, "targets": memory_targets(result)}


@contextlib.contextmanager
def _attention(config: MemoryBenchConfig) -> Iterator[str]:
    """Inside, attention takes the kernel that is asked for; gives its name."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and config.attention == "auto")
    try:
        taken = attention_taken(config.step_config())
        if config.attention == "flash" and taken != "flash_attention":
            raise ValueError(
                f"attention=flash is not to be had here, with dtype={config.dtype}: torch takes "
                f"{taken}; use --attention=auto"
            )
        yield taken
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def _limited(config: MemoryBenchConfig, device: torch.device) -> Iterator[None]:
    """Inside, the process may take cap_gib of a GPU's memory."""
    if not config.cap_gib:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if config.cap_gib * GIB > total:
        raise ValueError(f"cap_gib={config.cap_gib}, but the GPU has {total / GIB:.1f} GiB")
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(config.cap_gib * GIB / total, index)
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # of a device that an error inside has broken
            torch.cuda.set_per_process_memory_fraction(1.0, index)


def _training(config: MemoryBenchConfig, name: str, tokens: int, depth: int = 0) -> Training:
    """A variant's model and optimizers, for one sequence of that length."""
    return Training(config.step_config(depth), config.methods[name], (1, tokens), False)


def _make_workspaces(config: MemoryBenchConfig) -> None:
    """Small trainings, thrown away: what libraries allocate at their first call, for good, is there
    before anything is measured."""
    for name in config.capped_variants:
        alone(measured_peaks, config, name, config.length_list[0], 1)


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

    try:
        whole = peak_bytes(train, config.device)
        passes = peak_bytes(lambda: made[0].loss().backward(), config.device)
        return whole - others, passes - others
    except RuntimeError as error:
        if no_room(error):
            return None
        raise


def _peak_row(config: MemoryBenchConfig, name: str, tokens: int, predictions: Predictions) -> dict:
    row = {"variant": name, "tokens": tokens, "measured": None, "measured_passes": None}
    known, not_predicted = tried(predictions.peak, name, tokens)
    row |= known or NOT_PREDICTED
    measured, not_measured = alone(measured_peaks, config, name, tokens)
    if measured is None:
        return {**row, "note": "out of memory", **not_predicted, **not_measured}
    row["measured"], row["measured_passes"] = measured
    if known is None:
        return {**row, **not_predicted}
    return {**row, "measured_to_predicted": row["measured"] / row["predicted"]}


def _slopes(config: MemoryBenchConfig, rows: list[dict]) -> list[dict]:
    """For every variant the slopes of its passes' peaks, and the shares of dense's."""
    found = []
    for name in config.methods:
        mine = [row for row in rows if row["variant"] == name and row["predicted"] is not None]
        fitting = [row for row in mine if row["measured"] is not None]
        tokens = [row["tokens"] for row in fitting]
        measured = slope(tokens, [row["measured_passes"] for row in fitting])
        own = slope(tokens, [row["own_passes"] for row in fitting])
        predicted = slope(
            [row["tokens"] for row in mine], [row["predicted_passes"] for row in mine]
        )
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


def _times(config: MemoryBenchConfig, rows: list[dict]) -> None:
    """Add milliseconds a step at one length, and ratios of steps that were made in turn, to
    `rows`."""
    pairs = [(name, DENSE) for name in config.methods if name != DENSE]
    if CHUNKS in config.methods and PLAIN in config.methods:
        pairs.append((CHUNKS, PLAIN))
    for name, reference in pairs:
        found, why = alone(_in_turn, config, name, reference)
        if why and not why.get("failed"):
            why = {"note": "out of memory: the two do not fit the device together"}
        row = {"variant": name, "reference": reference, "tokens": config.time_at}
        rows.append({**row, **(found or why)})


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


def _capped(
    config: MemoryBenchConfig, peaks: list[dict], predictions: Predictions, rows: list[dict]
) -> None:
    """Under the cap: which variants train with long sequences, and how deep a model trains; added
    to `rows`.

    Args:
        peaks: rows that were measured under the same cap.
    """
    known = {row["variant"]: row for row in peaks if row["tokens"] == LONG}
    for name in config.methods:
        row = {"what": f"{LONG} tokens", "variant": name, "depth": config.depth, "tokens": LONG}
        if name in known:
            measured = known[name]["measured"]
            why = {k: known[name][k] for k in ("note", "failed") if k in known[name]}
        else:
            found, why = alone(measured_peaks, config, name, LONG)
            measured = found and found[0]
        rows.append({**row, **_trains(measured, why)})
    for name in config.capped_variants:
        rows.append(_deepest(config, name, predictions))


def _trains(measured: int | None, why: dict) -> dict:
    """Whether it does is not known where something else than memory was wanting."""
    trains = None if measured is None and why.get("failed") else measured is not None
    return {"measured": measured, "trains": trains, **why}


def _deepest(config: MemoryBenchConfig, name: str, predictions: Predictions) -> dict:
    """Whether a model as deep as is predicted trains at 8192 tokens, or one with a block less."""
    row = {"what": "deepest model", "variant": name, "tokens": TOKENS, "depth": 0}
    planned, why = tried(predictions.depth, name)
    row["predicted_depth"] = planned
    measured, row["tried"] = None, []
    for depth in range(planned or 0, max(0, (planned or 0) - ATTEMPTS), -1):
        row["tried"].append(depth)
        found, why = alone(measured_peaks, config, name, TOKENS, depth)
        if found is not None:
            row["depth"], measured = depth, found[0]
        if found is not None or why.get("failed"):
            break
    return {**row, **_trains(measured, why)}


@flags.command("bench_memory")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(MemoryBenchConfig, argv, prog="python -m scripts.bench_memory")
    sizes = f"depth {config.depth}, width {config.depth * config.aspect_ratio}"
    sizes += f", vocabulary {config.vocab}, one sequence"
    try:
        if config.predict_only:
            return _predict(config, sizes)
        result = bench(config)
    except ValueError as error:
        print(f"bench_memory: {error}")
        return 2
    versions = f"torch {result['build_info']['torch']}, attention {result['attention']}"
    print(f"{result['device']}, {versions}, {sizes}\n")
    if result["predictions"]:
        print("predictions: {file}, simulated with torch {torch}\n".format(**result["predictions"]))
    print(shown(result, config.markdown))
    if result.get("interrupted"):
        print("\ninterrupted: what was measured before")
    if config.json:
        print(json.dumps(result), flush=True)
    tables = (result["peaks"], result["times"], result["capped"])
    return exit_status(result, failed=any(row.get("failed") for rows in tables for row in rows))


def _predict(config: MemoryBenchConfig, sizes: str) -> int:
    """Write the file of predictions."""
    result: dict = {}
    with until_interrupted(result):
        result |= memory_predictions.predict(config)
    if result.get("interrupted"):
        print("interrupted: nothing is written")
        return exit_status(result)
    memory_predictions.write(config.predictions, result)
    print(f"{config.device}, {sizes}; written: {config.predictions}\n")
    print(predicted(result, config.markdown))
    if config.json:
        print(json.dumps(result), flush=True)
    return 0
