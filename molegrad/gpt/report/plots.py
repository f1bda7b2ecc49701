"""The plots of a report, as SVG: curves of all runs, spectra of gradients, bars by part.

Which plots there are depends on what the runs logged: a metric that no run has gives none. Figures
are 6.4 inches wide with text of 8 to 10 points, readable at 480 pixels. No display is needed.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from molegrad.gpt.report.record import RunRecord, short, visible

WIDTH = 6.4  # inches
POINTS = 300  # of a curve; longer ones are means of stretches
SPECTRA_LAYERS = 4
_SMALL = 8  # points
_RC = {"svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}


@dataclass(frozen=True)
class Curve:
    """What to draw of every run: a metric against steps, tokens or seconds.

    Args:
        caption: what one sees. key, against: as `RunRecord.series` takes them.
        labels: of the axes. scale: what the values are multiplied by. log: a logarithmic y axis,
            where all values are positive.
        truth: {a metric of shadow layers: (what it is, marker)}, drawn beside it.
    """

    name: str
    title: str
    caption: str
    key: str
    labels: tuple[str, str]
    against: str = "step"
    scale: float = 1.0
    log: bool = False
    truth: Mapping[str, tuple[str, str]] | None = None


def _of_layers(name: str, title: str, label: str, log: bool, caption: str, **truth) -> Curve:
    """A metric of converted layers: its mean, with the range over the layers."""
    return Curve(name, title, caption, f"streaming/{name}", ("step", label), log=log, truth=truth)


QUALITY = Curve(
    "bpb-tokens", "Quality", "Bits per byte of held-out text against tokens trained on: the lower "
    "line has learned more from the same text.", "val/bpb", ("tokens", "bits per byte"), "tokens",
)  # fmt: skip
COURSE = (
    Curve("loss", "Training loss", "Loss of the training batches, a running average.",
          "train/loss", ("step", "nats per token")),
    Curve("val-loss", "Held-out loss", "Loss on held-out conversations.",
          "val/loss", ("step", "nats per token")),
    Curve("bpb-time", "Quality against time", "Bits per byte against seconds of training, without "
          "evaluations and checkpoints.", "val/bpb", ("seconds of training", "bits per byte"),
          "total_training_time"),
    Curve("step-time", "Time of a step", "Every step from the first, which is the longest where "
          "something is compiled.", "train/dt", ("step", "milliseconds"), scale=1e3, log=True),
)  # fmt: skip
ESTIMATES = (
    _of_layers("energy_capture", "Energy capture", "‖Ĝ‖ / ‖G‖", False,
               "The share of the gradient's norm that the estimate holds; 1 is all of it.",
               energy_capture=("true", "o"), best_energy=("best at this rank", "x")),
    _of_layers("subspace_drift", "Subspace drift", "1 − ‖VᵀV'‖² / k a step", True,
               "How far a basis turns from one step to the next; 0 is not at all."),
    _of_layers("subspace_quality", "Subspace quality", "mean cosine", False,
               "Cosines of the angles between a basis before and after a step; 1 is the same."),
    _of_layers("condition_number", "Condition number of the kept modes", "condition number", True,
               "The largest kept singular value over the smallest."),
    _of_layers("effective_rank", "Effective rank of the estimate", "modes", False,
               "How many singular values of the estimate count: the exponential of their entropy."),
    _of_layers("orthogonality_error", "Orthogonality error of the bases", "‖VᵀV − I‖", True,
               "The largest entry of VᵀV − I; rounding alone gives about 1e-6 in float32."),
    _of_layers("sampling_noise", "Noise that sampling adds", "relative variance", True,
               "Variance that sampling adds over the gradient's own from its tokens: below 1, the "
               "batch is noisier than the sampling."),
)  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One picture. name: of its file. caption: what one sees."""

    name: str
    title: str
    caption: str
    figure: Figure


def svg(plot: Plot) -> str:
    """The figure as an <svg> element that is as wide as its place.

    The same figure gives the same text: no date, and identifiers that other plots do not have.
    """
    text = io.StringIO()
    with matplotlib.rc_context({**_RC, "svg.hashsalt": plot.name}):
        plot.figure.savefig(text, format="svg", metadata={"Date": None})
    element = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    opening, rest = element[element.index("<svg") :].split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} width="100%">{rest}'


def curve(records: Sequence[RunRecord], spec: Curve, prefix: str = "") -> Plot | None:
    """A metric of all runs: a line a run, with the range over layers and what shadow layers know
    of the truth where such was logged; None where no run has it. `prefix` is of the plot's name."""
    figure, axes = _axes(spec.title)
    metric = spec.key.removeprefix("streaming/")
    for i, record in enumerate(records):
        color = f"C{i % 10}"
        layers = record.layers(metric) if spec.truth is not None else {}
        x, y = thinned(*record.series(spec.key, spec.against))
        if y:
            dots = {"marker": "o", "markersize": 3} if len(x) < 30 else {}
            y = [spec.scale * value for value in y]
            axes.plot(x, y, color=color, label=record.title, linewidth=1.3, **dots)
        if len(layers) > 1:
            steps = sorted({step for x, _ in layers.values() for step in x})
            at = [[v for x, y in layers.values() for s, v in zip(x, y, strict=True) if s == step]
                  for step in steps]  # fmt: skip
            label = f"{record.title}, least to largest layer"
            low, high = list(map(min, at)), list(map(max, at))
            axes.fill_between(steps, low, high, color=color, alpha=0.2, label=label)
        for truth, (what, mark) in (spec.truth or {}).items():
            x, y = record.series(f"shadow/{truth}")
            if y:
                label = f"{record.title}, {what}, shadow layers"
                axes.plot(x, y, mark, color=color, markersize=4, alpha=0.7, label=label)
    if not axes.has_data():
        return None
    log = spec.log and all(min(line.get_ydata()) > 0 for line in axes.lines)
    axes.set(xlabel=spec.labels[0], ylabel=spec.labels[1], yscale="log" if log else "linear")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend(fontsize=_SMALL)
    return Plot(prefix + spec.name, spec.title, spec.caption, figure)


def spectra(record: RunRecord) -> Plot | None:
    """Singular values of the true gradient and of the estimate at a run's last comparison, of some
    layers; None where none was made."""
    lines = [line for line in record.shadow() if line.get("spectrum")]
    lines = [line for line in lines if line["step"] == lines[-1]["step"]]
    if not lines:
        return None
    title = f"Singular values, {record.title}, step {lines[0]['step']:,}"
    figure, axes = _axes(title)
    for i, line in enumerate(lines[:: -(-len(lines) // SPECTRA_LAYERS)]):
        layer = visible(short(line["layer"])).replace("$", r"\$")  # no mathematics
        for key, style, what in (
            ("spectrum", "-", "true"),
            ("estimate_spectrum", "--", "estimate"),
        ):
            values = [v for v in line.get(key) or () if isinstance(v, (int, float)) and v > 0]
            axes.plot(
                range(1, len(values) + 1), values, style,
                color=colormaps["viridis"](i * 0.9 / SPECTRA_LAYERS), label=f"{layer}, {what}",
            )  # fmt: skip
    axes.set(yscale="log", xlabel="mode", ylabel="singular value")
    axes.legend(fontsize=_SMALL)
    caption = (
        "Solid: the true gradient. Dashed: its estimate, which has no more modes than its rank."
    )
    return Plot(f"spectra-{record.label.replace('/', '-')}", title, caption, figure)


def bars(
    name: str, title: str, caption: str, rows: Mapping[str, Mapping[str, float]], unit: str
) -> Plot | None:
    """Stacked bars {run: {part: size}}, with the sum at their ends; None where there is nothing.
    Parts below a thousandth of the longest bar are in the sum alone."""
    if not any(size for parts in rows.values() for size in parts.values()):
        return None
    sums = {run: sum(parts.values()) for run, parts in rows.items()}
    least = max(sums.values()) / 1000
    shown = dict.fromkeys(p for parts in rows.values() for p, size in parts.items() if size > least)
    figure, axes = _axes(title, 1.4 + 0.4 * len(rows))
    start = dict.fromkeys(rows, 0.0)
    for part in shown:
        sizes = [parts.get(part, 0.0) for parts in rows.values()]
        axes.barh(list(rows), sizes, left=list(start.values()), label=part.replace("_", " "))
        start = {run: start[run] + size for run, size in zip(rows, sizes, strict=True)}
    for i, total in enumerate(sums.values()):
        axes.annotate(f" {total:,.1f}", (total, i), va="center")
    axes.set(xlabel=unit, xlim=(0, 1.15 * max(sums.values())))
    axes.invert_yaxis()
    figure.legend(fontsize=_SMALL, loc="outside lower center", ncols=3)
    return Plot(name, title, caption, figure)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points of a curve, or the means of `POINTS` equal stretches of them where it has more."""
    if len(x) <= POINTS:
        return list(x), list(y)
    cuts = [round(i * len(x) / POINTS) for i in range(POINTS + 1)]
    parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    return [sum(x[p]) / len(x[p]) for p in parts], [sum(y[p]) / len(y[p]) for p in parts]


def _axes(title: str, height: float = 3.6):
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes
