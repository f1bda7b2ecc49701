"""From records to rows and tables: gaps to dense with their confidence, memory, arithmetic, time.

The gap of a method is paired: seed by seed, as both runs of a seed start from the same weights and
read the same data, so that what is common to a seed cancels. Its interval is Student's t on the
seeds' gaps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby

from molegrad.config import MoleGradConfig
from molegrad.lab.store import Run
from molegrad.lab.sweep import Cell, LabConfig, Search, Text, cells, search, seed_runs

MIB = 2**20


def student_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t) of Student's t with a whole number of degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cos_sq, odd = math.cos(angle) ** 2, freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for j in range(2 + odd, freedom - 1, 2):
        term *= cos_sq * (j - 1) / j
        total += term
    if odd:
        inside = angle + (math.sin(angle) * total if freedom > 1 else 0.0)
        return 0.5 + inside / math.pi
    return 0.5 + math.sin(angle) * total / 2


def student_quantile(p: float, freedom: int) -> float:
    """The t with P(T ≤ t) = p, for 0.5 ≤ p < 1."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < p else (low, middle)
    return high


def interval(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half the width of the confidence interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = student_quantile(0.5 + confidence / 2, len(values) - 1)
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def gap(runs: Sequence[dict], reference: Sequence[dict]) -> dict:
    """Mean paired gap in percent of the reference's bits per byte, and its interval."""
    gaps = [100 * (run["bpb"] / dense["bpb"] - 1) for run, dense in _pairs(runs, reference)]
    return {
        "gap_percent": statistics.fmean(gaps) if gaps else None,
        "gap_interval": interval(gaps),
        "gaps": gaps,
    }


def _pairs(runs: Sequence[dict], reference: Sequence[dict]) -> list[tuple[dict, dict]]:
    """The runs that did not fail with the reference's run of the same seed."""
    by_seed = {r["config"]["seed"]: r for r in reference if r["status"] == "ok"}
    good = [r for r in runs if r["status"] == "ok" and r["config"]["seed"] in by_seed]
    return [(r, by_seed[r["config"]["seed"]]) for r in good]


def summarise(
    config: LabConfig,
    text: Text,
    known: Mapping[str, dict],
    times: Mapping[str, dict] | None = None,
    longer: Mapping[str, Sequence[Run]] | None = None,
) -> list[dict]:
    """One row per cell whose learning rate is chosen, those of one setting together, dense first.

    Args:
        known: key -> record. times: from `molegrad.lab.timing.measure_times`.
        longer: from `molegrad.lab.timing.equal_time_runs`.
    """
    rows = []
    dense_runs: list[dict] = []
    for cell in cells(config):
        if cell.reference:
            dense_runs = []
        found = search(config, text, cell, known)
        if found.best is None:
            continue
        if found.best["status"] != "ok":
            rows.append(_row(cell, found, [found.best]))
            continue
        seeds = seed_runs(config, text, cell, found.lr)
        runs = [known[run.key] for run in seeds if run.key in known]
        row = _row(cell, found, runs)
        dense_runs = runs if cell.reference else dense_runs
        row |= gap(runs, dense_runs)
        row["curve_gaps"] = _curve_gaps(runs, dense_runs)
        row["time"] = (times or {}).get(seeds[0].time_key)
        if extra := (longer or {}).get(seeds[0].key):
            equal = gap([known[run.key] for run in extra if run.key in known], dense_runs)
            row["equal_time"] = {"steps": extra[0].config.num_iterations, **equal}
        rows.append(row)
    return rows


def _row(cell: Cell, found: Search, runs: list[dict]) -> dict:
    row = {
        "method": cell.method.label,
        "family": cell.method.family,
        "reference": cell.reference,
        "rank": cell.method.rank,
        "rank_share": rank_share(cell),
        "depth": cell.depth,
        "width": cell.width,
        "batch": cell.batch,
        "steps": cell.steps,
        "tokens": cell.batch * cell.steps,
        "lr": found.lr,
        "lr_at_edge_of_sweep": found.edge,
        "sweep": {f"{lr:g}": r.get("bpb") for lr, r in found.sweep},
        "status": found.best["status"],
    }
    if found.best["status"] != "ok":
        return {**row, "reason": found.best["reason"]}
    good = [run for run in runs if run["status"] == "ok"]
    bpbs = [run["bpb"] for run in good]
    costs = good[0]["flops"]
    return {
        **row,
        "seeds": len(good),
        "failed_seeds": len(runs) - len(good),
        "bpb": statistics.fmean(bpbs),
        "bpb_spread": max(bpbs) - min(bpbs),
        "train_loss": statistics.fmean(run["train_loss"] for run in good),
        "memory": good[0]["memory"],
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in good),
        "gradient_flops_ratio": costs["weight_gradient"] / costs["weight_gradient_dense"],
        "flops_ratio": costs["actual"] / costs["dense"],
        "streaming": good[0]["streaming"],
    }


def rank_share(cell: Cell) -> float | None:
    """k as a share of the width, None for dense methods."""
    rank = cell.method.rank
    if rank is None:
        return None
    return MoleGradConfig(rank_k=rank).rank_of(cell.width, cell.width) / cell.width


def _curve_gaps(runs: list[dict], dense: list[dict]) -> list[list[float]]:
    """[tokens, mean paired gap in percent] at every evaluation that all runs share."""
    points: dict[int, list[float]] = {}
    pairs = _pairs(runs, dense)
    for run, reference in pairs:
        at = dict(map(tuple, reference["curve"]))
        for step, bpb in run["curve"]:
            if step in at:
                points.setdefault(step, []).append(100 * (bpb / at[step] - 1))
    batch = runs[0]["config"]["total_batch_size"]
    return [
        [step * batch, statistics.fmean(values)]
        for step, values in sorted(points.items())
        if len(values) == len(pairs)
    ]


COLUMNS = (
    "method", "k", "learning rate", "bits per byte", "gap to dense", "gap at equal time",
    "step / dense", "ms a step", "dW FLOPs / dense", "gradients MiB", "optimizer MiB",
    "layer inputs MiB", "dense / their sum", "peak MiB", "seeds",
)  # fmt: skip


def table(rows: Sequence[dict]) -> str:
    """One Markdown table per setting. Bytes are those of the block matrices' layers; the peak is
    the process's (on CUDA the allocator's)."""
    parts = []
    for _, group in groupby(rows, key=_setting):
        listed = list(group)
        first = listed[0]
        parts += [
            f"### {first['depth']} blocks of width {first['width']}, {first['batch']:,} tokens a "
            f"step, {first['steps']:,} steps\n",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *(_line(row, first) for row in listed),
            "",
        ]
    return "\n".join(parts).rstrip()


def _setting(row: dict) -> tuple:
    return row["depth"], row["width"], row["batch"], row["steps"]


def held_bytes(row: dict) -> int:
    """Gradients, optimizer state and saved inputs of the block matrices' layers together."""
    return sum(row["memory"]["matrix"].values())


def _line(row: dict, dense: dict) -> str:
    name = [row["method"].replace("|", "\\|"), "" if row["rank"] is None else f"{row['rank']:g}"]
    edge = " (edge)" if row["lr_at_edge_of_sweep"] else ""
    name.append(f"{row['lr']:g}{edge}")
    if row["status"] != "ok":
        reason = row["reason"].replace("|", "\\|")
        cells = [*name, f"failed: {reason}"]
        return "| " + " | ".join(cells + [""] * (len(COLUMNS) - len(cells))) + " |"
    time = row["time"]
    share = held_bytes(dense) / held_bytes(row) if dense["status"] == "ok" else None
    failed = f", {row['failed_seeds']} failed" if row["failed_seeds"] else ""
    cells = [
        *name,
        f"{row['bpb']:.4f}",
        "" if row["reference"] else _percent(row),
        _percent(row.get("equal_time")),
        f"{time['ratio']:.2f} ({time['ratio_low']:.2f}–{time['ratio_high']:.2f})" if time else "",
        f"{time['ms']:.1f}" if time else "",
        f"{row['gradient_flops_ratio']:.3f}",
        *(f"{row['memory']['matrix'][what] / MIB:.2f}" for what in ("gradients", "state", "saved")),
        f"{share:.2f}x" if share else "",
        f"{row['peak_memory_bytes'] / MIB:,.0f}",
        f"{row['seeds']}{failed}",
    ]
    return "| " + " | ".join(cells) + " |"


def _percent(gaps: dict | None) -> str:
    if not gaps or gaps.get("gap_percent") is None:
        return ""
    interval = gaps["gap_interval"]
    return f"{gaps['gap_percent']:+.2f}%" + (f" ± {interval:.2f}" if interval is not None else "")
