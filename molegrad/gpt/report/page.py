"""The page of a validation: one HTML file with everything in it, for any browser, without a server.

What: `write_page(path, ...)` puts the gates, the plots as inline SVG, the tables, sample texts,
configuration and commands into one file. It links to nothing and runs no script. What was not
recorded is said in the place where it would be.

Why: a page can be kept beside a run, mailed, and opened years later.
"""

import datetime
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from molegrad.gpt.report import record as run_record
from molegrad.gpt.report.gates import PARTS, Gate
from molegrad.gpt.report.method_plots import memory, method_plots, phases
from molegrad.gpt.report.method_tables import health_table, metrics_table, phase_table, shadow_table
from molegrad.gpt.report.plots import Plot, curves, svg
from molegrad.gpt.report.record import RunRecord
from molegrad.gpt.train.config import BaseTrainConfig

MIB = 2**20
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 76rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid
  #d0d7de; padding-bottom: .2rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
nav a { margin-right: 1rem; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #d8dee4; padding: .25rem .6rem; text-align: left;
  vertical-align: top; }
th { background: #f6f8fa; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.met { color: #116329; } .not-met { color: #a40e26; font-weight: 700; }
td.met, td.not-met, td.does-not-apply { white-space: nowrap; }
.does-not-apply, .absent { color: #59636e; }
.verdict { font-size: 1.1rem; padding: .6rem 1rem; border-left: .35rem solid; background: #f6f8fa; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 30rem; max-width: 42rem; }
figure.wide { flex-basis: 100%; max-width: none; }
svg { width: 100%; height: auto; }
pre { background: #f6f8fa; padding: .7rem; overflow-x: auto; font-size: .82rem; white-space:
  pre-wrap; }
mark { background: #fff1c9; }
"""


def write_page(
    path: Path,
    *,
    gates: Sequence[Gate],
    records: Sequence[RunRecord],
    predicted: Mapping[str, Mapping[str, int]],
    samples: Mapping[str, Sequence[tuple[str, str]]],
    command: str,
) -> Path:
    """Write the page; its folder is made.

    Args:
        records: of the runs that left something behind, dense first.
        predicted: {run: {part: bytes}}. samples: {run: [(prompt, continuation)]}.
        command: of the validation.
    """
    measured = {
        record.label: {
            part: value for part in PARTS if (value := record.last(f"memory/{part}")) is not None
        }
        for record in records
    }
    title = "Validation: " + (" and ".join(r.label for r in records) or "no run left a record")
    sections = {
        "Gates": gates_section(gates),
        "Quality": plots_section([plot for plot in curves(records) if plot.name != "step_time"]),
        "Gradient estimates": estimates_section(records),
        "Memory": plots_section([memory(measured, predicted)])
        + table_or(memory_table(records, measured, predicted), "Nothing was measured."),
        "Time": plots_section(
            [*(p for p in curves(records) if p.name == "step_time"), phases(records)]
        )
        + table_or(phase_table(records), "No times by phase were logged."),
        "Health": table_or(health_table(records), "No findings were recorded."),
        "Sample texts": samples_section(samples),
        "Configuration": configuration(records),
        "Commands": preformatted("\n".join([command, *commands(records)])),
    }
    now = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
    links = "".join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name in sections)
    body = "\n".join(
        f'<section id="{_anchor(name)}"><h2>{html.escape(name)}</h2>\n{content}</section>'
        for name, content in sections.items()
    )
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>Written {now}.</p>\n{verdict(gates)}\n"
        f"<nav>{links}</nav>\n{body}\n</body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def verdict(gates: Sequence[Gate]) -> str:
    """One line that says how it stands."""
    failed = [gate.name for gate in gates if gate.met is False]
    words = f"Not met: {', '.join(failed)}." if failed else "Every gate is met."
    return f'<p class="verdict {"not-met" if failed else "met"}">{html.escape(words)}</p>'


def gates_section(gates: Sequence[Gate]) -> str:
    """The table of gates."""
    rows = []
    for gate in gates:
        cells = [f'<td class="{gate.word.replace(" ", "-")}">{gate.word}</td>']
        cells += [_cell(text) for text in gate.cells]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("", "gate", "value", "limit", "how"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def plots_section(plots: Sequence[Plot]) -> str:
    """The plots side by side where there is room; under each what it could not show."""
    figures = []
    for plot in plots:
        lines = [f'<p class="absent">{html.escape(line)}</p>' for line in plot.absent]
        wide = plot.figure is not None and plot.figure.get_size_inches()[0] > 8
        if plot.figure is None:
            lines.insert(0, f"<h3>{html.escape(plot.title)}</h3>")
        figures.append(
            f'<figure id="plot-{_anchor(plot.name)}"{" class=wide" if wide else ""}>'
            f"{svg(plot)}{''.join(lines)}</figure>"
        )
    return f'<div class="plots">{"".join(figures)}</div>'


def estimates_section(records: Sequence[RunRecord]) -> str:
    """Plots and tables of the converted layers."""
    plots = method_plots(records)
    if not plots:
        return '<p class="absent">No run with converted layers left a record.</p>'
    return "".join(
        [
            plots_section([plot for plot in plots if plot.figure is not None]),
            "<h3>The last comparison with true gradients</h3>",
            table_or(shadow_table(records), "None was made (--shadow-every)."),
            "<h3>All layers together, first and last reading</h3>",
            table_or(metrics_table(records), "None were logged (--monitor-every)."),
            "<h3>Not known</h3>",
            "".join(
                f'<p class="absent">{html.escape(plot.title)}: {html.escape(line)}</p>'
                for plot in plots
                for line in plot.absent
            )
            or "<p>Nothing.</p>",
        ]
    )


def memory_table(
    records: Sequence[RunRecord],
    measured: Mapping[str, Mapping],
    predicted: Mapping[str, Mapping[str, int]],
) -> tuple[list[str], list[list[str]]]:
    """MiB by part, predicted and measured, with the peak of the process or the GPU."""
    runs = list(dict.fromkeys([*predicted, *measured]))
    parts = list(dict.fromkeys(part for run in runs for part in predicted.get(run, PARTS)))
    rows = []
    for part in parts:
        cells = []
        for run in runs:
            for values in (predicted, measured):
                value = values.get(run, {}).get(part)
                cells.append("" if value is None else f"{value / MIB:,.2f}")
        rows.append([part.replace("_", " "), *cells])
    peaks = {record.label: record.last("train/peak_memory_bytes") for record in records}
    row = ["peak of the GPU's allocator, or of the process"]
    for run in runs:
        peak = peaks.get(run)
        row += ["", "" if peak is None else f"{peak / MIB:,.2f}"]
    titles = [f"{run}, {kind}" for run in runs for kind in ("predicted", "measured")]
    return ["MiB", *titles], [*rows, row] if runs else []


def samples_section(samples: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """What each model went on to write; the prompt is marked."""
    parts = []
    for run, texts in samples.items():
        parts.append(f"<h3>{html.escape(run)}</h3>")
        lines = [
            f"<mark>{html.escape(prompt)}</mark>{html.escape(continuation)}"
            for prompt, continuation in texts
        ]
        parts.append(
            "".join(f"<pre>{line}</pre>" for line in lines)
            or '<p class="absent">No model to write any.</p>'
        )
    return "".join(parts)


def configuration(records: Sequence[RunRecord]) -> str:
    """Flags, machine and data of every run; first those in which the runs differ."""
    if not records:
        return '<p class="absent">No run left a record.</p>'
    names = dict.fromkeys(name for record in records for name in record.config)
    rows = [
        [name, *(json.dumps(r.config[name]) if name in r.config else "" for r in records)]
        for name in names
    ]
    header = ["", *(record.label for record in records)]
    differ = [row for row in rows if len(set(row[1:])) > 1]
    return (
        "<h3>In which the runs differ</h3>"
        + table_or((header, differ), "In nothing.")
        + "<details><summary>Everything that was recorded</summary>"
        + table_or((header, rows), "Nothing.")
        + "</details>"
    )


def commands(records: Sequence[RunRecord]) -> list[str]:
    """The command of each training."""
    return [
        run_record.command("base_train", BaseTrainConfig, record.config)
        for record in records
        if record.config
    ]


def table_or(table: tuple[Sequence[str], Sequence[Sequence[str]]], otherwise: str) -> str:
    """An HTML table, or a line where it has no rows."""
    header, rows = table
    if not rows:
        return f'<p class="absent">{html.escape(otherwise)}</p>'
    lines = ["".join(f"<th>{html.escape(str(title))}</th>" for title in header)]
    lines += ["".join(map(_cell, row)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def preformatted(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{html.escape(text)}</pre>"


def _cell(text: str) -> str:
    try:
        float(text.replace(",", ""))
        kind = ' class="number"'
    except ValueError:
        kind = ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-").replace("_", "-")
