"""Step times, measured alone: dense and another method side by side, step after step in turn.

Times taken while several runs share the processor say nothing, and a machine that is slower for a
minute slows whatever runs then. So a method and dense train in two processes at the same time, of
which only one is at work: each waits while the other makes its step, the first of a pair going
second in the next. The ratio of a method to dense is the median of the pairs' own ratios, with an
interval that holds that median with 95% confidence whatever the ratios' distribution.

A ratio is stored with the record's key (method and dense, model, batch, device), so that a later
comparison measures only what is new; lengths, seeds and learning rates share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby

import torch

from molegrad.gpt.train.hardware import device_name
from molegrad.lab import store
from molegrad.lab.store import Run
from molegrad.lab.sweep import LabConfig, Text, cells, make_run, search, seed_runs
from molegrad.lab.worker import Pacer

WARM_UP = 5  # pairs of steps at the start that do not count


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
    start: Callable[[Run], Pacer] = Pacer,
) -> dict[str, dict]:
    """time_key -> timing of every method of a finished sweep: from the store, or measured now.

    Args:
        steps: of each method, warm-up not counted.
        again: measure what is in the store once more.
        start: run -> what makes its steps; by default a process of its own.
    """
    stored, times = {} if again else store.read_times(), {}
    for runs in timed_runs(config, text, known):
        if not runs:
            continue
        dense = runs[0]
        keys = {run.time_key: _key(run, dense) for run in runs}
        new = [run for run in runs[1:] if keys[run.time_key] not in stored]
        if new or keys[dense.time_key] not in stored:
            for record in _time(dense, new, steps, say, start):
                record["key"] = keys[record["time_key"]]
                store.append(store.TIMES, record)
                stored[record["key"]] = record
        times |= {t: stored[key] for t, key in keys.items() if key in stored}
    return times


def _key(run: Run, dense: Run) -> str:
    device = device_name(torch.device(run.config.device_type))
    return hashlib.sha256(f"{run.time_key}:{dense.time_key}:{device}".encode()).hexdigest()[:16]


def _time(dense: Run, others: list[Run], steps: int, say, start) -> list[dict]:
    """A record of every run that could be timed, dense among them."""
    records, reference = [], []
    for run in others:
        try:
            pairs = _pairs([dense, run], steps, start)
        except RuntimeError as error:
            say(f"{run.title} could not be timed: {error}")
            continue
        reference += [first for first, _ in pairs]
        records.append(_record(run, [own for _, own in pairs], [b / a for a, b in pairs]))
        shown = "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})".format(**records[-1])
        say(f"{run.title}: step time / dense {shown}")
    if not reference:  # nothing to compare with, or nothing that ran
        try:
            reference = [seconds for (seconds,) in _pairs([dense], steps, start)]
        except RuntimeError as error:
            say(f"{dense.title} could not be timed: {error}")
            return []
    return [_record(dense, reference, [1.0] * len(reference)), *records]


def _pairs(runs: list[Run], steps: int, start) -> list[tuple[float, ...]]:
    """Seconds of each run's steps, made in turn."""
    with contextlib.ExitStack() as stack:
        pacers = []
        for number, run in enumerate(runs):
            short = replace(
                run.config,
                run=f"time-{number}-{run.time_key}",
                num_iterations=WARM_UP + steps + 2,
                eval_every=-1,
                monitor_every=0,
                shadow_every=0,
                threads=0,
            )
            pacers.append(start(replace(run, config=short)))
            stack.callback(pacers[-1].close)
        pairs = []
        for number in range(WARM_UP + steps):
            order = list(range(len(runs)))
            seconds = {i: pacers[i].step() for i in (order if number % 2 else order[::-1])}
            pairs.append(tuple(seconds[i] for i in order))
        return pairs[WARM_UP:]


def _record(run: Run, seconds: list[float], ratios: list[float]) -> dict:
    low, high = median_interval(ratios)
    return {
        "time_key": run.time_key,
        "method": run.label,
        "ms": 1e3 * statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "steps": len(ratios),
        "device": device_name(torch.device(run.config.device_type)),
    }


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of the values that hold the median of their distribution between them, with at least
    this confidence where there are enough of them; else the smallest and the largest.

    The number of values below the median is binomial (n, 1/2).
    """
    ordered, n = sorted(values), len(values)
    inside, below = 0, 0.0  # values left out on each side, and the chance of so few below
    while inside < (n - 1) // 2:
        below += math.comb(n, inside) / 2**n
        if 2 * below > 1 - confidence:
            break
        inside += 1
    inside = max(0, inside - 1)
    return ordered[inside], ordered[n - 1 - inside]


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
