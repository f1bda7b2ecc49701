"""Curves of runs, all in one picture each, and what every plot of a report or page is made of.

`curves` draws what each training has: bits per byte, loss, step time. `molegrad.gpt.report.method_plots`
draws what converted layers log. Both give `Plot`s: `draw` writes them as PNG (`scripts.report`),
`svg` makes text of them for an HTML page (`scripts.validate`). Neither needs a display.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from molegrad.gpt.report.record import RunRecord

WINDOW = 25  # steps of the running median of the step time

# name, title, x label, y label, metric, its x
CURVES = (
    ("val_bpb_step", "Held-out text", "step", "bits per byte", "val/bpb", "step"),
    (
        "val_bpb_time",
        "Held-out text against training time",
        "seconds of training",
        "bits per byte",
        "val/bpb",
        "total_training_time",
    ),
    ("train_loss", "Training loss, smoothed", "step", "nats per token", "train/loss", "step"),
    ("step_time", "Time of a step, running median", "step", "milliseconds", "train/dt", "step"),
)


@dataclass(frozen=True)
class Plot:
    """One picture.

    figure: None where there is nothing to draw. absent: a line for each part that could not be
    drawn, with the reason.
    """

    name: str
    title: str
    figure: Figure | None
    absent: tuple[str, ...] = ()


def curves(records: Sequence[RunRecord]) -> list[Plot]:
    """Bits per byte, loss and step time of all runs."""
    return [_curve(records, *spec) for spec in CURVES]


def _curve(records, name, title, x_label, y_label, key, against) -> Plot:
    figure, (axes,) = panels(1, width=7, height=4.2)
    absent = []
    for index, record in enumerate(records):
        x, y = record.series(key, against)
        if not y:
            absent.append(f"{record.label} has no {key} against {against}: not in {name}")
            continue
        color = f"C{index % 10}"
        if key == "train/loss":
            axes.plot(*record.series("train/loss_raw"), color=color, alpha=0.2, linewidth=0.8)
        if key == "train/dt":
            y = [1e3 * value for value in running_median(y, WINDOW)]
        marker = "o" if len(y) < 30 else None
        axes.plot(x, y, color=color, label=record.label, marker=marker, markersize=3)
    if len(absent) == len(records):
        return Plot(name, title, None, tuple(absent))
    if key == "train/dt":
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.legend()
    return Plot(name, title, figure, tuple(absent))


def draw(plots: Sequence[Plot], folder: Path, prefix: str = "") -> tuple[list[Path], list[str]]:
    """Write the plots that have something to show into `folder` as PNG.

    Returns:
        the files, and a line for each part that could not be drawn for want of data.
    """
    files = []
    for plot in plots:
        if plot.figure is not None:
            path = Path(folder) / f"{prefix}{plot.name}.png"
            FigureCanvasAgg(plot.figure)
            plot.figure.savefig(path, dpi=130)
            files.append(path)
    return files, [line for plot in plots for line in plot.absent]


def svg(plot: Plot) -> str:
    """The figure as an <svg> element that stands inside a page; "" where there is none.

    The same figure gives the same text: no date, and identifiers that other plots do not have.
    """
    if plot.figure is None:
        return ""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": plot.name, "svg.fonttype": "none"}):
        plot.figure.savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)


def panels(count: int, columns: int = 3, width: float = 4.2, height: float = 3.2):
    """A figure with `count` panels of `width` x `height` inches in rows; (figure, [axes])."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.grid(alpha=0.3)
    return figure, grid[:count]


def running_median(values: Sequence[float], window: int) -> list[float]:
    """The median of the `window` values around each (fewer at the ends)."""
    half = window // 2
    result = []
    for i in range(len(values)):
        part = sorted(values[max(0, i - half) : i + half + 1])
        middle = len(part) // 2
        result.append(part[middle] if len(part) % 2 else (part[middle - 1] + part[middle]) / 2)
    return result
