"""From records to rows, tables and a plot: gaps to dense with their confidence, memory, time.

The gap of a method is paired: seed by seed, as both runs of a seed start from the same weights and
read the same data, so that what is common to a seed cancels. Its interval is Student's t on the
seeds' gaps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

MIB = 2**20
# 97.5% points of Student's t with 1, 2, ... degrees of freedom (any table); beyond them the last.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SETTING = ("depth", "width", "batch", "steps")  # what the rows of one table share
COLUMNS = (
    "method", "learning rate", "bits per byte", "gap to dense", "gap at equal time",
    "step / dense", "ms a step", "dW FLOPs / dense", "gradients MiB", "optimizer MiB",
    "layer inputs MiB", "dense / their sum", "peak MiB", "seeds",
)  # fmt: skip


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95% interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


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


def gap(runs: Sequence[dict], reference: Sequence[dict]) -> dict:
    """Mean paired gap in percent of the reference's bits per byte, and its interval. Records that
    failed, and seeds that one of the two lacks, are left out."""
    dense = {r["config"]["seed"]: r["bpb"] for r in reference if r["status"] == "ok"}
    good = [r for r in runs if r["status"] == "ok" and r["config"]["seed"] in dense]
    gaps = [100 * (run["bpb"] / dense[run["config"]["seed"]] - 1) for run in good]
    mean = statistics.fmean(gaps) if gaps else None
    return {"gap_percent": mean, "gap_interval": interval(gaps), "gaps": gaps}


def row(runs: list[dict], dense: Sequence[dict], time: dict | None, longer: Sequence[dict]) -> dict:
    """What the runs of a method's seeds say.

    Args:
        runs: records of all seeds, the first of them not failed. dense: those of the reference.
        time: the method's timing. longer: records of the seeds trained as long as dense takes.
    """
    good = [run for run in runs if run["status"] == "ok"]
    bpbs = [run["bpb"] for run in good]
    costs = good[0]["flops"]
    return {
        "seeds": len(good),
        "failed_seeds": len(runs) - len(good),
        "bpb": statistics.fmean(bpbs),
        "bpb_spread": max(bpbs) - min(bpbs),
        "train_loss": statistics.fmean(run["train_loss"] for run in good),
        **gap(runs, dense),
        "time": time,
        "equal_time": gap(longer, dense) if longer else None,
        "memory": good[0]["memory"],
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in good),
        "gradient_flops_ratio": costs["weight_gradient"] / costs["weight_gradient_dense"],
        "flops_ratio": costs["actual"] / costs["dense"],
        "streaming": good[0]["streaming"],
    }


def table(rows: Sequence[dict]) -> str:
    """One Markdown table per setting. Bytes are those of the block matrices' layers; the peak is
    the process's (on CUDA the allocator's)."""
    parts = []
    for _, group in groupby(rows, key=lambda row: [row[name] for name in SETTING]):
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


def held_bytes(row: dict) -> int:
    """Gradients, optimizer state and saved inputs of the block matrices' layers together."""
    return sum(row["memory"].values())


def _line(row: dict, dense: dict) -> str:
    edge = " (edge)" if row["lr_at_edge_of_sweep"] else ""
    name = [row["method"].replace("|", "\\|"), f"{row['lr']:g}{edge}"]
    if row["status"] != "ok":
        reason = row["reason"].replace("|", "\\|")
        return "| " + " | ".join([*name, f"failed: {reason}", *[""] * (len(COLUMNS) - 3)]) + " |"
    time = row["time"]
    share = held_bytes(dense) / held_bytes(row) if dense["status"] == "ok" else None
    failed = f", {row['failed_seeds']} failed" if row["failed_seeds"] else ""
    cells = [
        *name,
        f"{row['bpb']:.4f}",
        "" if row["reference"] else _percent(row),
        _percent(row["equal_time"]),
        f"{time['ratio']:.2f} ({time['ratio_low']:.2f}–{time['ratio_high']:.2f})" if time else "",
        f"{time['ms']:.1f}" if time else "",
        f"{row['gradient_flops_ratio']:.3f}",
        *(f"{row['memory'][what] / MIB:.2f}" for what in ("gradients", "state", "saved")),
        f"{share:.2f}x" if share else "",
        f"{row['peak_memory_bytes'] / MIB:,.0f}",
        f"{row['seeds']}{failed}",
    ]
    return "| " + " | ".join(cells) + " |"


def _percent(gaps: dict | None) -> str:
    if not gaps or gaps["gap_percent"] is None:
        return ""
    half = gaps["gap_interval"]
    return f"{gaps['gap_percent']:+.2f}%" + (f" ± {half:.2f}" if half is not None else "")


def draw(rows: Sequence[dict], path: Path) -> None:
    """The gap to dense against the bytes held, one panel per setting, as an SVG. Error bars are 95%
    intervals over the seeds. The same rows give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    good = [row for row in rows if row["status"] == "ok" and row["gap_percent"] is not None]
    panels = [list(group) for _, group in groupby(good, key=lambda r: [r[n] for n in SETTING])]
    # Identifiers in an SVG are random without a salt; text as text keeps the file small.
    with matplotlib.rc_context({"svg.hashsalt": "molegrad", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5 * max(1, len(panels)), 4.2), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for panel, ax in zip(panels, axes, strict=False):
            ax.axhline(0.0, color="0.4", linewidth=0.8)
            for row in panel:
                x, y, half = held_bytes(row) / MIB, row["gap_percent"], row["gap_interval"]
                ax.errorbar([x], [y], None if half is None else [half], fmt="o", capsize=2)
                ax.annotate(row["method"], (x, y), (4, 4), textcoords="offset points", fontsize=7)
            ax.set_title("{depth} × {width}, {batch:,} × {steps:,} tokens".format(**panel[0]))
            ax.set_xlabel("MiB of gradients, optimizer state and layer inputs")
            ax.set_ylabel("gap to dense in %")
            ax.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
