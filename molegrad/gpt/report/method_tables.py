"""Tables of what converted layers log, for the Markdown report and the HTML page alike.

Each function gives (header, rows) of text; no rows where nothing of the kind was recorded.
"""

import math
from collections import Counter
from collections.abc import Sequence

from molegrad.gpt.report.method_plots import PHASES, short
from molegrad.gpt.report.record import RunRecord

Table = tuple[list[str], list[list[str]]]
_SHADOW = (
    ("energy_capture", "energy captured"),
    ("best_energy", "best at this rank"),
    ("cosine", "cosine"),
    ("norm_ratio", "norm ratio"),
    ("relative_error", "relative error"),
    ("energy_estimate_error", "error of the free energy"),
    ("norm_estimate_error", "error of the free norm"),
    ("effective_rank", "effective rank of G"),
)


def metrics_table(records: Sequence[RunRecord]) -> Table:
    """Every streaming/METRIC of each run, at its first and at its last reading."""
    converted = [record for record in records if not record.dense]
    names = dict.fromkeys(
        key
        for record in converted
        for line in record.metrics
        for key in line
        if key.startswith("streaming/")
    )
    rows = []
    for name in names:
        cells = []
        for record in converted:
            values = record.series(name)[1]
            cells += [number(values[0]), number(values[-1])] if values else ["", ""]
        rows.append([name.removeprefix("streaming/"), *cells])
    titles = [f"{record.label}, {when}" for record in converted for when in ("first", "last")]
    return ["all layers", *titles], rows


def shadow_table(records: Sequence[RunRecord]) -> Table:
    """The last comparison with true gradients: all layers compared, and their mean."""
    rows = []
    for record in records:
        lines = record.shadow()
        if not lines:
            continue
        step = max(line["step"] for line in lines)
        last = [line for line in lines if line["step"] == step]
        for line in last:
            values = [number(line.get(key)) for key, _ in _SHADOW]
            rows.append([record.label, f"{step:,}", short(line["layer"]), *values])
        means = [_mean([line.get(key) for line in last]) for key, _ in _SHADOW]
        rows.append([record.label, f"{step:,}", "mean", *map(number, means)])
    return ["run", "step", "layer", *(title for _, title in _SHADOW)], rows


def health_table(records: Sequence[RunRecord], limit: int = 100) -> Table:
    """Findings of the health checks, in their order, the first `limit` of each run."""
    rows = []
    for record in records:
        findings = record.health()
        for found in findings[:limit]:
            words = [found.get(key, "") for key in ("layer", "kind", "action", "message")]
            words[0] = short(str(words[0]))
            rows.append([record.label, f"{found['step']:,}", *map(str, words)])
        if len(findings) > limit:
            more = Counter(str(found.get("kind", "")) for found in findings[limit:])
            kinds = ", ".join(f"{count} {kind}" for kind, count in more.items())
            rows.append(
                [record.label, "later", "", "", "", f"{len(findings) - limit} more: {kinds}"]
            )
    return ["run", "step", "layer", "kind", "action", "message"], rows


def phase_table(records: Sequence[RunRecord]) -> Table:
    """Milliseconds a step by phase, mean over the run."""
    rows = []
    for record in records:
        means = [_mean(record.series(f"time/{name}_ms")[1]) for name in PHASES]
        known = [mean for mean in means if mean is not None]
        if known:
            cells = ["" if mean is None else f"{mean:.1f}" for mean in means]
            rows.append([record.label, *cells, f"{math.fsum(known):.1f}"])
    return ["run", *(f"{name} ms" for name in PHASES), "sum ms"], rows


def number(value) -> str:
    """A number in four digits; "" for what is not known."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None or value == "nan" else str(value)
    return f"{value:.4g}"


def _mean(values: Sequence) -> float | None:
    known = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    return math.fsum(known) / len(known) if known else None
