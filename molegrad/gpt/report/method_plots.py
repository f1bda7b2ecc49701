"""Plots of what converted layers log: their metrics, spectra of true and estimated gradients, the
time of a step by phase, and memory.

    plots = method_plots(records)                  # of all runs that have converted layers
    plots = [phases(records), memory(measured, predicted)]

A metric that a run did not log is named in `Plot.absent` with the reason, such as that the sampled
method has no subspace. Nothing is filled in.
"""

from collections.abc import Mapping, Sequence

from matplotlib import colormaps

from molegrad.gpt.report.plots import Plot, panels
from molegrad.gpt.report.record import RunRecord

MIB = 2**20
BINS = 60  # of the stacked phase times
SPECTRA_LAYERS, SPECTRA_STEPS = 6, 4
NAMED_LAYERS = 8  # more layers than that are told by colour, not by name
PHASES = ("forward", "backward", "optimizer", "data", "monitor", "shadow")

# metric, title, y label, logarithmic
METRIC_PLOTS = (
    ("energy_capture", "Energy capture", "‖Ĝ‖ / ‖G‖", False),
    ("subspace_drift", "Subspace drift", "1 − ‖VᵀV'‖² / k a step", False),
    ("subspace_quality", "Subspace quality", "cosines of principal angles a step", False),
    ("condition_number", "Condition number of the kept modes", "condition number", True),
    ("effective_rank", "Effective rank of the estimate", "modes", False),
    ("orthogonality_error", "Orthogonality error of the bases", "‖VᵀV − I‖", True),
    ("sampling_noise", "Noise that sampling adds", "relative to the gradient's own", False),
)
# What shadow layers know of the truth, drawn beside the metric: key, what it is, marker
_TRUTH = {
    "energy_capture": (
        ("energy_capture", "true, of the shadow layers", "o"),
        ("best_energy", "best possible at this rank", "x"),
    )
}
_OF_A_SUBSPACE = (
    *("energy_capture", "subspace_drift", "subspace_quality", "condition_number"),
    *("effective_rank", "orthogonality_error"),
)


def method_plots(records: Sequence[RunRecord]) -> list[Plot]:
    """Every metric of METRIC_PLOTS and the spectra, of the runs that have converted layers."""
    if all(record.dense for record in records):
        return []
    return [*(metric(records, *spec) for spec in METRIC_PLOTS), spectra(records)]


def metric(
    records: Sequence[RunRecord], key: str, title: str, y_label: str, log: bool = False
) -> Plot:
    """Means over the layers of each run, with what shadow layers know beside them; then a panel a
    run with a line a layer. Dense runs have none, but keep their colour to themselves."""
    known, absent = [], []
    for index, record in enumerate(records):
        if record.dense:
            continue
        if _has(record, key):
            known.append((index, record))
        else:
            absent.append(f"{record.label}: no {key}: {why_absent(record, key)}")
    if not known:
        return Plot(key, title, None, tuple(absent))
    layered = [pair for pair in known if record_layers(pair[1], key)]
    figure, (means, *each) = panels(1 + len(layered), width=5.2, height=3.6)
    for index, record in known:
        color = f"C{index % 10}"
        x, y = record.series(f"streaming/{key}")
        if y:
            means.plot(x, y, color=color, label=f"{record.label}, mean of layers", **_dots(x))
        for name, what, mark in _TRUTH.get(key, ()):
            x, y = record.series(f"shadow/{name}")
            if y:
                label = f"{record.label}, {what}"
                means.plot(x, y, mark, color=color, alpha=0.7, markersize=4, label=label)
    means.set(title=title, xlabel="step", ylabel=y_label)
    means.legend(fontsize="small")
    for (_, record), axes in zip(layered, each, strict=True):
        _layers(axes, record, key)
    if log:
        for axes in (means, *each):
            axes.set_yscale("log")
    return Plot(key, title, figure, tuple(absent))


def _layers(axes, record: RunRecord, key: str) -> None:
    """A line a layer, from dark (first) to light (last)."""
    layers = record_layers(record, key)
    for index, (name, (x, y)) in enumerate(layers.items()):
        color = colormaps["viridis"](index / max(1, len(layers) - 1) * 0.9)
        axes.plot(x, y, color=color, linewidth=1, label=short(name), **_dots(x))
        for truth, _, mark in _TRUTH.get(key, ())[:1]:
            x, y = record.series(f"shadow/{name}/{truth}")
            axes.plot(x, y, mark, color=color, markersize=4, markerfacecolor="none")
    axes.set(title=f"{record.label}, each layer", xlabel="step")
    if len(layers) <= NAMED_LAYERS:
        axes.legend(fontsize="x-small")


def record_layers(record: RunRecord, key: str) -> dict[str, tuple[list, list]]:
    """{layer: (steps, values)} of a metric: the free one, or the true one of a shadow layer where
    there is no other."""
    layers = record.layers(key)
    for truth, *_ in _TRUTH.get(key, ())[:1]:
        for name, points in record.layers(truth, "shadow").items():
            layers.setdefault(name, points)
    return layers


def _has(record: RunRecord, key: str) -> bool:
    keys = [f"streaming/{key}", *(f"shadow/{name}" for name, *_ in _TRUTH.get(key, ()))]
    return bool(record_layers(record, key)) or any(record.series(name)[1] for name in keys)


def why_absent(record: RunRecord, key: str) -> str:
    """Why a run has no such metric, as far as its configuration tells."""
    config = record.config
    method = config.get("streaming_method")
    sampled = method == "sampled"
    if key == "energy_capture" and sampled:
        return "method 'sampled' has no subspace, and nothing was compared (--shadow-every)"
    if key in _OF_A_SUBSPACE and sampled:
        return "method 'sampled' has no subspace"
    if key == "sampling_noise" and method not in ("exact", "sampled"):
        return f"only sampled methods add such noise"
    if key == "energy_capture" and config.get("streaming_probes") == 0:
        return "its estimate needs --streaming_probes=1 or more, its true value --shadow-every"
    return "not logged (--monitor-every)"


def spectra(records: Sequence[RunRecord]) -> Plot:
    """Singular values of the true gradient G and of the estimate Ĝ, by layer and step."""
    title = "Singular values of G (line) and of the estimate (dashed)"
    found, absent = [], []
    converted = [record for record in records if not record.dense]
    for record in converted:
        lines = [line for line in record.shadow() if line.get("spectrum")]
        names = list(dict.fromkeys(line["layer"] for line in lines))
        if not names:
            absent.append(f"{record.label}: no spectra: no shadow comparison (--shadow-every)")
        for name in _spread(names, SPECTRA_LAYERS):
            mine = [line for line in lines if line["layer"] == name]
            found.append((record, name, _spread(mine, SPECTRA_STEPS)))
    if not found:
        return Plot("spectra", title, None, tuple(absent))
    figure, grid = panels(len(found))
    for (record, name, lines), axes in zip(found, grid, strict=True):
        for index, line in enumerate(lines):
            color = colormaps["viridis"](index / max(1, len(lines) - 1) * 0.9)
            label = f"step {line['step']:,}"
            _spectrum(axes, line["spectrum"], color=color, label=label)
            _spectrum(axes, line.get("estimate_spectrum"), color=color, linestyle="--")
        run = f"{record.label}: " if len(converted) > 1 else ""
        axes.set_title(f"{run}{short(name)}", fontsize="small")
        axes.set(yscale="log", xlabel="mode", ylabel="singular value")
        axes.legend(fontsize="x-small")
    return Plot("spectra", title, figure, tuple(absent))


def _spectrum(axes, values, **style) -> None:
    """Values that are not positive have no place on a logarithmic axis."""
    points = [
        (i, v) for i, v in enumerate(values or (), 1) if isinstance(v, (int, float)) and v > 0
    ]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1, **style, **_dots(points))


def phases(records: Sequence[RunRecord]) -> Plot:
    """Milliseconds of a step by phase, stacked, averaged over stretches of the run."""
    title = "Time of a step by phase"
    known, absent = [], []
    for record in records:
        series = {name: record.series(f"time/{name}_ms") for name in PHASES}
        series = {name: points for name, points in series.items() if points[1]}
        if series:
            known.append((record, series))
        else:
            absent.append(f"{record.label}: no times by phase were logged")
    if not known:
        return Plot("phases", title, None, tuple(absent))
    figure, grid = panels(len(known), width=6.0, height=3.6)
    top = 0.0
    for (record, series), axes in zip(known, grid, strict=True):
        last = max(x[-1] for x, _ in series.values())
        middles = [(i + 0.5) * last / _bins(series) for i in range(_bins(series))]
        stack = [_binned(*series.get(name, ([], [])), last, len(middles)) for name in PHASES]
        axes.stackplot(middles, stack, labels=PHASES, colors=[f"C{i}" for i in range(len(PHASES))])
        axes.set(title=record.label, xlabel="step", ylabel="milliseconds a step")
        top = max(top, *(sum(parts) for parts in zip(*stack, strict=True)))
    for axes in grid:
        axes.set_ylim(0, 1.05 * top)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    return Plot("phases", title, figure, tuple(absent))


def _bins(series: Mapping[str, tuple[list, list]]) -> int:
    return max(1, min(BINS, max(len(x) for x, _ in series.values()) // 2))


def _binned(x: Sequence[float], y: Sequence[float], last: float, count: int) -> list[float]:
    """Means of y over `count` equal stretches of (0, last]; 0 where a stretch has no value."""
    sums, sizes = [0.0] * count, [0] * count
    for at, value in zip(x, y, strict=True):
        index = min(count - 1, int((at - 1) * count / last))
        sums[index] += value
        sizes[index] += 1
    return [total / size if size else 0.0 for total, size in zip(sums, sizes, strict=True)]


def memory(measured: Mapping[str, Mapping], predicted: Mapping[str, Mapping]) -> Plot:
    """Bytes by part, predicted beside measured.

    Args:
        measured, predicted: {run: {part: bytes}}; a part that is not known may be left out.
    """
    title = "Memory by part: predicted (light) and measured"
    runs = list(dict.fromkeys([*measured, *predicted]))
    known_parts = [part for kind in (predicted, measured) for run in kind.values() for part in run]
    parts = [part for part in dict.fromkeys(known_parts) if part != "total"]
    absent = [f"{run}: memory was not measured" for run in runs if not measured.get(run)]
    if not parts:
        return Plot("memory", title, None, tuple(absent))
    figure, (axes,) = panels(1, width=9, height=4)
    width = 0.8 / (2 * len(runs))
    for index, run in enumerate(runs):
        for offset, (kind, values) in enumerate((("predicted", predicted), ("measured", measured))):
            known = [(i, values.get(run, {}).get(part)) for i, part in enumerate(parts)]
            known = [(i, value / MIB) for i, value in known if value is not None]
            if not known:
                continue
            shift = (2 * index + offset + 0.5) * width - 0.4
            x, y = [i + shift for i, _ in known], [value for _, value in known]
            style = {"alpha": 0.4} if kind == "predicted" else {}
            axes.bar(x, y, width, color=f"C{index % 10}", label=f"{run}, {kind}", **style)
            for at, value in zip(x, y, strict=True):
                place = {"ha": "center", "va": "bottom", "rotation": 90}
                axes.annotate(f" {value:.3g}", (at, value), fontsize="x-small", **place)
    axes.set_xticks(range(len(parts)), [part.replace("_", " ") for part in parts])
    axes.set(title=title, ylabel="MiB")
    axes.margins(y=0.15)
    axes.legend(fontsize="small")
    return Plot("memory", title, figure, tuple(absent))


def short(name: str) -> str:
    """A layer's name without what all of them begin with."""
    return name.removeprefix("transformer.")


def _spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _dots(x: Sequence) -> dict:
    return {"marker": "o", "markersize": 3} if len(x) < 30 else {}
