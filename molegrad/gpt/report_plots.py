"""The report's plots: curves of all runs in one picture each, written as PNG without a display."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from molegrad.gpt.run_record import RunRecord

WINDOW = 25  # steps of the running median of the step time

# file, title, x label, y label, metric, its x
PLOTS = (
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


def draw(records: Sequence[RunRecord], folder: Path, prefix: str = "") -> tuple[list[Path], list]:
    """Write the plots into `folder`.

    Returns:
        the files, and a line for each curve that could not be drawn for want of data.
    """
    files, missing = [], []
    for name, title, x_label, y_label, key, against in PLOTS:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        drawn = 0
        for index, record in enumerate(records):
            x, y = record.series(key, against)
            if not y:
                missing.append(f"{record.label} has no {key} against {against}: not in {name}.png")
                continue
            color = f"C{index % 10}"
            if key == "train/loss":
                axes.plot(*record.series("train/loss_raw"), color=color, alpha=0.2, linewidth=0.8)
            if key == "train/dt":
                y = [1e3 * value for value in running_median(y, WINDOW)]
            marker = "o" if len(y) < 30 else None
            axes.plot(x, y, color=color, label=record.label, marker=marker, markersize=3)
            drawn += 1
        if not drawn:
            continue
        if key == "train/dt":
            axes.set_ylim(0, None)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend()
        path = Path(folder) / f"{prefix}{name}.png"
        figure.savefig(path, dpi=130)
        files.append(path)
    return files, missing


def running_median(values: Sequence[float], window: int) -> list[float]:
    """The median of the `window` values around each (fewer at the ends)."""
    half = window // 2
    result = []
    for i in range(len(values)):
        part = sorted(values[max(0, i - half) : i + half + 1])
        middle = len(part) // 2
        result.append(part[middle] if len(part) % 2 else (part[middle - 1] + part[middle]) / 2)
    return result
