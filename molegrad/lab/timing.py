"""Step times, measured alone: one process after the other, with all threads, in rounds.

Times taken while several runs share the processor say nothing, and a machine that is slower for a
minute slows whatever runs then. So every method trains a few steps in each of several rounds, in an
order that rotates, dense among them, and a method's ratio to dense is the median of the rounds' own
ratios. The spread is their range.

A ratio is stored with the record's key (method and dense, model, batch, device), so that a later
comparison measures only what is new; lengths, seeds and learning rates share it.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby

import torch

from molegrad.gpt.hardware import device_name
from molegrad.lab import store
from molegrad.lab.store import Run
from molegrad.lab.sweep import LabConfig, Text, cells, make_run, search, seed_runs
from molegrad.lab.worker import Workers

ROUNDS = 3
WARM_UP = 5  # steps at the start of every process that do not count


def timed_runs(config: LabConfig, text: Text, known: Mapping[str, dict]) -> list[list[Run]]:
    """The best run of every cell, those of one size and batch size together, dense first."""
    groups = []
    for _, group in groupby(cells(config), key=lambda cell: cell.setting[:3]):
        runs: dict[str, Run] = {}
        for cell in group:
            found = search(config, text, cell, known)
            if found.best is not None and found.best["status"] == "ok":
                run = make_run(config, text, cell, found.lr, 0)
                runs.setdefault(run.time_key, run)
            elif not runs:
                break  # without the reference there is no ratio
        groups.append(list(runs.values()))
    return groups


def measure_times(
    config: LabConfig,
    text: Text,
    known: Mapping[str, dict],
    steps: int,
    say: Callable[[str], None],
    again: bool = False,
    perform: Callable[[Run], object] | None = None,
) -> dict[str, dict]:
    """time_key -> timing of every method of a finished sweep: from the store, or measured now.

    Args:
        steps: of each method over all rounds, warm-up not counted.
        again: measure what is in the store once more.
        perform: run -> seconds of its steps; by default in a process of its own.
    """
    workers = Workers()
    try:
        time = perform or (lambda run: workers(run, "time"))
        return _measure(config, text, known, steps, say, again, time)
    except BaseException:
        workers.stop()
        raise


def _measure(config, text, known, steps, say, again, perform) -> dict[str, dict]:
    stored, times = {} if again else store.read_times(), {}
    for runs in timed_runs(config, text, known):
        if not runs:
            continue
        dense = runs[0]
        keys = {run.time_key: _key(run, dense) for run in runs}
        new = [run for run in runs[1:] if keys[run.time_key] not in stored]
        if new or keys[dense.time_key] not in stored:
            for record in _rounds([dense, *new], steps, say, perform):
                record["key"] = keys[record["time_key"]]
                store.append(store.TIMES, record)
                stored[record["key"]] = record
        times |= {t: stored[key] for t, key in keys.items() if key in stored}
    return times


def _key(run: Run, dense: Run) -> str:
    device = device_name(torch.device(run.config.device_type))
    return hashlib.sha256(f"{run.time_key}:{dense.time_key}:{device}".encode()).hexdigest()[:16]


def _rounds(runs: list[Run], steps: int, say, perform) -> list[dict]:
    """A record of every run that could be timed; runs[0] is the reference."""
    each = WARM_UP + -(-steps // ROUNDS)
    seconds: dict[str, list[float]] = {run.time_key: [] for run in runs}
    reasons: dict[str, str] = {}
    for number in range(ROUNDS):
        turn = number % len(runs)
        for run in [*runs[turn:], *runs[:turn]]:
            short = replace(
                run.config,
                run=f"time-{run.time_key}",
                num_iterations=each,
                eval_every=-1,
                monitor_every=0,
                threads=0,
            )
            result = perform(replace(run, config=short))
            if isinstance(result, dict):
                reasons[run.time_key] = result["reason"]
            else:
                seconds[run.time_key].append(statistics.median(result[WARM_UP:]))
                shown = f"{1e3 * seconds[run.time_key][-1]:.1f} ms a step"
                say(f"round {number + 1} of {ROUNDS}: {run.title}: {shown}")
    for run in runs:
        if run.time_key in reasons:
            say(f"{run.title} could not be timed: {reasons[run.time_key]}")
    if runs[0].time_key in reasons:
        return []
    reference = seconds[runs[0].time_key]
    records = []
    for run in (run for run in runs if run.time_key not in reasons):
        own = seconds[run.time_key]
        ratios = [mine / dense for mine, dense in zip(own, reference, strict=True)]
        records.append(
            {
                "time_key": run.time_key,
                "method": run.label,
                "ms": 1e3 * statistics.median(own),
                "ms_low": 1e3 * min(own),
                "ms_high": 1e3 * max(own),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "rounds": ROUNDS,
                "steps": each - WARM_UP,
                "device": device_name(torch.device(run.config.device_type)),
            }
        )
    return records


def equal_time_runs(
    config: LabConfig, text: Text, known: Mapping[str, dict], times: Mapping[str, dict]
) -> dict[str, list[Run]]:
    """Key of a cell's best run -> its runs of all seeds with as many steps as fit into the time
    that dense takes for the cell's own; dense is left out, and what has no timing."""
    result = {}
    for cell in cells(config):
        if cell.reference:
            continue
        found = search(config, text, cell, known)
        if found.best is None or found.best["status"] != "ok":
            continue
        best = make_run(config, text, cell, found.lr, 0)
        if best.time_key in times:
            steps = max(1, round(cell.steps / times[best.time_key]["ratio"]))
            result[best.key] = seed_runs(config, text, cell, found.lr, steps)
    return result
