"""Plots of a comparison as SVG: what quality costs in memory and in time, and how the gap moves
with rank, batch size and length.

    files = draw(rows, folder)   # rows from molegrad.lab.summary.summarise

One panel per setting. A colour is a method, a marker one of its ranks, joined by a line; error bars
are 95% confidence intervals over the seeds. Below zero is better than dense. The same rows give the
same bytes: no date, and identifiers from a fixed salt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from molegrad.lab.summary import MIB, held_bytes

PANELS_A_ROW = 3
Point = tuple[float, float, float | None, str]  # x, gap in percent, half its interval, what it is


def draw(rows: Sequence[dict], folder: str | Path) -> list[Path]:
    """Write the plots that the rows have data for into `folder` (made if missing); the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    good = [row for row in rows if row["status"] == "ok" and row["gap_percent"] is not None]
    size = "{depth} × {width}"
    batch, length = "{batch:,} tokens a step", "{tokens:,} tokens"
    plots = [
        _plot(
            "memory",
            "MiB of gradients, optimizer state and layer inputs (block matrices)",
            good,
            ", ".join((size, batch, length)),
            lambda row: held_bytes(row) / MIB,
        ),
        _plot(
            "time",
            "step time / dense",
            [row for row in good if row["time"]],
            ", ".join((size, batch, length)),
            lambda row: row["time"]["ratio"],
        ),
    ]
    low_rank = [row for row in good if row["rank_share"]]
    if len({row["rank_share"] for row in low_rank}) > 1:
        title = ", ".join((size, batch, length))
        plots.append(
            _plot("rank", "rank / width", low_rank, title, lambda r: r["rank_share"], log=True)
        )
    others = [row for row in good if not row["reference"]]
    if len({row["batch"] for row in good}) > 1:
        plots.append(
            _plot(
                "batch", "tokens a step", others, size, lambda r: r["batch"], log=True, ranks=True
            )
        )
    if len({row["tokens"] for row in good}) > len({row["batch"] for row in good}):
        title = ", ".join((size, batch))
        plots.append(
            _plot("length", "tokens of training", others, title, lambda r: r["tokens"], ranks=True)
        )
    elif any(len(row["curve_gaps"]) > 1 for row in others):
        plots.append(_curves(others, ", ".join((size, batch))))
    files = []
    for name, x_label, panels, log in plots:
        if panels:
            files.append(folder / f"gap_{name}.svg")
            _save(files[-1], x_label, panels, log)
    return files


Plot = tuple[str, str, dict[str, dict[str, list[Point]]], bool]


def _plot(
    name: str,
    x_label: str,
    rows: Sequence[dict],
    title: str,
    x: Callable[[dict], float],
    log: bool = False,
    ranks: bool = False,
) -> Plot:
    """name, label of x, {panel: {line: points}}, logarithmic x. ranks: each is a line of its own,
    where otherwise the ranks of a method are the points of one line."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        line = _with_rank(row) if ranks else row["family"]
        mark = "" if ranks or row["rank"] is None else f"{row['rank']:g}"
        point = (x(row), row["gap_percent"], row["gap_interval"], mark)
        panels.setdefault(title.format(**row), {}).setdefault(line, []).append(point)
    return name, x_label, panels, log


def _curves(rows: Sequence[dict], title: str) -> Plot:
    """The gap at the intermediate evaluations of one length."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        points = [(tokens, gap, None, "") for tokens, gap in row["curve_gaps"]]
        panels.setdefault(title.format(**row), {})[_with_rank(row)] = points
    return "length", "tokens trained on, learning rate still falling", panels, False


def _with_rank(row: dict) -> str:
    return row["family"] if row["rank"] is None else f"{row['family']}, k = {row['rank']:g}"


def _save(path: Path, x_label: str, panels: dict, log: bool) -> None:
    columns = min(PANELS_A_ROW, len(panels))
    height = math.ceil(len(panels) / columns)
    # Identifiers in an SVG are random without a salt; text as text keeps the file small.
    with matplotlib.rc_context({"svg.hashsalt": "molegrad", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.2 * columns + 0.6, 3.2 * height + 1.0), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(height, columns, squeeze=False).flat
        lines = dict.fromkeys(line for panel in panels.values() for line in panel)
        style = {line: _style(index) for index, line in enumerate(lines)}
        handles: dict[Hashable, object] = {}
        for (title, panel), axes in zip(panels.items(), grid, strict=False):
            axes.axhline(0.0, color="0.4", linewidth=0.8)
            for line, points in panel.items():
                x, gap, interval, marks = zip(*sorted(points), strict=True)
                bars = None if None in interval else interval
                drawn = axes.errorbar(x, gap, bars, label=line, capsize=2, **style[line])
                handles.setdefault(line, drawn)
                for at, mark in zip(zip(x, gap, strict=True), marks, strict=True):
                    axes.annotate(
                        mark, at, textcoords="offset points", xytext=(4, 4), fontsize="x-small"
                    )
            axes.set_title(title, fontsize="small")
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_formatter(lambda x, position: _short(x))
            if log:
                marked = sorted({point[0] for points in panel.values() for point in points})
                axes.set_xscale("log", base=2)
                axes.set_xticks(marked, [_short(x) for x in marked])
        for axes in list(grid):  # what the panels left
            axes.remove()
        figure.supxlabel(x_label, fontsize="medium")
        figure.supylabel("gap to dense in %", fontsize="medium")
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper center", ncols=3,
            fontsize="small",
        )  # fmt: skip
        figure.savefig(path, metadata={"Date": None})


def _short(x: float) -> str:
    """1234567 as 1.235M."""
    return f"{x:.4g}" if x < 1000 else EngFormatter(places=None, sep="")(x)


def _style(index: int) -> dict:
    return {
        "color": f"C{index % 10}",
        "marker": "osD^vPX*<>"[index // 10 % 10],
        "markersize": 4,
        "linewidth": 1.0,
    }
