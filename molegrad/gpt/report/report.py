"""The report of one or several runs: one table and two plots, then everything else that they left.

What: `report(config)` reads the runs' files, makes a list of sections and writes it as report.md
(plots beside it) and as report.html, which stands alone: no script, no link, no server. Nothing is
measured here, and what a run did not record is not filled in. What comes from models and data is
escaped, control characters included.

How to run:

    python -m scripts.report --runs=dense,lowrank
"""

import datetime
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown

from molegrad.gpt import paths
from molegrad.gpt.evaluate import evaluate
from molegrad.gpt.report.plots import COURSE, ESTIMATES, QUALITY, Plot, bars, curve, spectra, svg
from molegrad.gpt.report.record import (
    RunRecord,
    device_of,
    differences,
    peaks,
    read_runs,
    short,
    visible,
)
from molegrad.gpt.train import flags

MIB = 2**20
ABSENT = "not recorded"
FINDINGS = 50  # of the health checks that are shown of a run
PHASES = ("forward", "backward", "optimizer", "data", "monitor", "shadow")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #d8dee4; padding: .25rem .6rem; text-align: left;
  vertical-align: top; overflow-wrap: normal; }
svg { max-width: 42rem; height: auto; }
pre { background: #f6f8fa; padding: .7rem; font-size: .82rem; white-space: pre-wrap; }
"""
_SUMMARY = (  # title, key of RunRecord.summary, format, factor
    ("bits per byte", "bpb", "{:.4f}", 1),
    ("gap to dense", "gap", "{}", 1),
    ("ms a step", "step_ms", "{:,.1f}", 1),
    ("gradients MiB", "gradient_bytes", "{:,.2f}", 1 / MIB),
    ("optimizer MiB", "state_bytes", "{:,.2f}", 1 / MIB),
    ("saved inputs MiB", "saved_bytes", "{:,.2f}", 1 / MIB),
    ("peak MiB", "peak_bytes", "{:,.0f}", 1 / MIB),
)
_COURSE = (
    ("steps", "steps", "{:,.0f}", 1),
    ("tokens", "tokens", "{:,.0f}", 1),
    ("training loss", "train_loss", "{:.4f}", 1),
    ("held-out loss", "val_loss", "{:.4f}", 1),
    ("minutes", "seconds", "{:,.1f}", 1 / 60),
    ("ms a step, 20% to 80%", "step_ms_spread", "{}", 1),
    ("tokens/s", "tokens_per_second", "{:,.0f}", 1),
    ("MFU %", "mfu", "{:.1f}", 1),
)


@dataclass(frozen=True)
class Section:
    """A part of the report. Its parts are plots and Markdown (`table`, `code`, `escaped`); those
    that are empty or None are left out, and so is a section without any."""

    title: str
    parts: Sequence[str | Plot | None]


@dataclass(frozen=True)
class ReportConfig:
    """Write report/report.md and report.html for one or several runs, and show it."""

    runs: str = field(default="", metadata={"help": "names of runs, comma separated"})
    run: str = field(default="", metadata={"help": "the same as --runs"})
    output: str = field(
        default="", metadata={"help": "folder to write to; empty is $MOLEGRAD_HOME/report"}
    )
    show: bool = field(default=True, metadata={"help": "show the report in the terminal too"})

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("no run is named: give --runs=NAME or --runs=NAME,NAME")
        for name in self.names:
            paths.check_run_name(name)

    @property
    def names(self) -> list[str]:
        """The runs, each once, in their order."""
        words = f"{self.runs},{self.run}".split(",")
        return list(dict.fromkeys(word.strip() for word in words if word.strip()))


@flags.command("report")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    report(flags.parse(ReportConfig, argv, prog="python -m scripts.report"))
    return 0


def report(config: ReportConfig) -> Path:
    """Write the report; returns the path of report.md.

    Raises:
        FileNotFoundError: a run is not there or has no metrics.
    """
    records = read_runs(config.names)
    folder = Path(config.output).expanduser() if config.output else paths.report_dir()
    own = f"python -m scripts.report --runs={','.join(config.names)}"
    title = f"Report: {', '.join(config.names)}"
    path = write(folder / "report.md", title, sections(records, own))
    if config.show:
        Console().print(Markdown(path.read_text(encoding="utf-8")))
    print(f"written {path} and {path.with_suffix('.html')}")
    return path


def sections(records: Sequence[RunRecord], own: str) -> list[Section]:
    """The list of sections: the first table and its two plots, then the rest.

    Args:
        own: the command that makes this report.
    """
    base = [record for record in records if record.stage == "base"]
    tuned = [record for record in records if record.stage == "sft"]
    commands = [own, *(line for record in records for line in record.commands())]
    return [
        Section("Base training", results(base)),
        Section("Fine-tuning", results(tuned, "sft-")),
        Section("Gradient estimates", estimates(records)),
        Section("Time by phase", phases(records)),
        Section("Health", findings(records)),
        Section("Evaluations", evaluations(records)),
        Section("Sample texts", samples(records)),
        Section("Converted layers", conversions(records)),
        Section("Settings, machine and data", settings(records)),
        Section("Commands", [code("\n".join(dict.fromkeys(commands)))]),
    ]


def results(records: Sequence[RunRecord], prefix: str = "") -> list:
    """The table of results, quality and memory as plots; then what cannot be compared, and how the
    runs went. `prefix` is of the plots' names."""
    if not records:
        return []
    rows, peak = [record.summary() for record in records], peaks(records)
    dense = next((row for row, r in zip(rows, records, strict=True) if r.dense), {"bpb": None})
    notes = [
        "Bits per byte are of held-out text, at the end. Milliseconds are medians without the "
        "first steps; they compare runs that had the machine to themselves. Memory is measured on "
        "the tensors that exist at the end: the optimizer's includes bases and momenta. The peak "
        "is that of torch's allocator (GPU) or of the process (CPU)."
    ]
    for record, row in zip(records, rows, strict=True):
        gap = dense["bpb"] and row["bpb"] and 100 * (row["bpb"] / dense["bpb"] - 1)
        row["gap"] = "reference" if row is dense else None if gap is None else f"{gap:+.2f}%"
        speed, planned = record.speed(), row["steps_planned"]
        row["mfu"] = speed and 100 * speed[0] / peak[device_of(record)]
        if planned and row["steps"] and row["steps"] < planned:
            notes.append(f"{record.label} ended after step {row['steps']:,.0f} of {planned:,}.")
    if all(row["saved_bytes"] is None for row in rows):
        notes.append(
            "What layers keep of their inputs was not logged: scripts.memory_plan predicts it."
        )
    if len(records) > 1:
        notes.append("Each run has one seed: another one moves the results too.")
    if tops := ", ".join(f"{value / 1e12:,.2f} TFLOP/s on {name}" for name, value in peak.items()):
        notes.append(f"MFU rests on the highest peak that any of these runs found: {tops}.")
    if differ := differences(records):
        notes.append(
            "The runs differ in more than the method, so the gap is not its effect alone: "
            + "; ".join(differ)
        )
    held = {r.title: {part: size / MIB for part, size in r.memory.items()} for r in records}
    caption = (
        "What each run holds, by part. Activations come on top while a step runs: see the peak."
    )
    return [
        _numbers(records, rows, _SUMMARY),
        curve(records, QUALITY, prefix),
        bars(f"{prefix}memory", "Memory by part", caption, held, "MiB"),
        *map(escaped, notes),
        _numbers(records, rows, _COURSE),
        *(curve(records, spec, prefix) for spec in COURSE),
    ]


def _numbers(records: Sequence[RunRecord], rows: Sequence[dict], columns) -> str:
    """The columns of `RunRecord.summary` that any run has."""
    columns = [column for column in columns if any(row[column[1]] is not None for row in rows)]

    def cell(value, form: str, factor: float) -> str:
        if value is None or isinstance(value, str):
            return value or ABSENT
        return form.format(value * factor)

    lines = [
        [record.title, *(cell(row[key], form, factor) for _, key, form, factor in columns)]
        for record, row in zip(records, rows, strict=True)
    ]
    return table(["method (run)", *(title for title, *_ in columns)], lines)


def estimates(records: Sequence[RunRecord]) -> list:
    """What converted layers logged, and the comparison with true gradients."""
    logged = dict.fromkeys(key for r in records for line in r.metrics for key in line)
    names = [name for name in logged if name.startswith("streaming/")]
    known = [record for record in records if any(record.series(name)[1] for name in names)]
    rows = []
    for name in names:
        series = [record.series(name)[1] or [None] for record in known]
        ends = [number(value) for values in series for value in (values[0], values[-1])]
        rows.append([name.removeprefix("streaming/"), *ends])
    header = [f"{record.title}, {when}" for record in known for when in ("first", "last")]
    true = shadows(records)
    return [
        *(curve(records, spec) for spec in ESTIMATES),
        *map(spectra, records),
        true and "The last comparison with true gradients (shadow layers):",
        true,
        rows and "All converted layers together, at the first and at the last reading:",
        table(["metric", *header], rows),
    ]


def shadows(records: Sequence[RunRecord]) -> str:
    """The last comparison with true gradients: all layers compared, and their mean."""
    lines = [(record.title, record.shadow()) for record in records]
    keys = dict.fromkeys(key for _, found in lines for line in found for key in line)
    keys = [key for key in keys if key not in ("step", "layer", "rank") and "spectrum" not in key]
    rows = []
    for title, found in lines:
        last = [line for line in found if line["step"] == found[-1]["step"]]
        columns = [[line.get(key) for line in last] for key in keys]
        known = [[value for value in values if _is_number(value)] for values in columns]
        means = [sum(values) / len(values) if values else None for values in known]
        for layer, values in [(line["layer"], [line.get(k) for k in keys]) for line in last]:
            rows.append([title, f"{last[0]['step']:,}", short(layer), *map(number, values)])
        if last:
            rows.append([title, f"{last[0]['step']:,}", "mean", *map(number, means)])
    return table(["method (run)", "step", "layer", *keys], rows)


def phases(records: Sequence[RunRecord]) -> list:
    """Milliseconds of a step by phase, means over all steps."""
    rows = {}
    for record in records:
        series = {name: record.series(f"time/{name}_ms")[1] for name in PHASES}
        if steps := max(map(len, series.values())):
            rows[record.title] = {name: sum(values) / steps for name, values in series.items()}
    lines = [
        [name, *(f"{ms:.1f}" for ms in (*row.values(), sum(row.values())))]
        for name, row in rows.items()
    ]
    caption = "Mean over all steps. Monitor and shadow are the instruments."
    return [
        bars("phases", "Time of a step by phase", caption, rows, "milliseconds"),
        table(["method (run)", *(f"{name} ms" for name in PHASES), "sum ms"], lines),
    ]


def findings(records: Sequence[RunRecord]) -> list:
    """Findings of the health checks, in their order, the first of each run."""
    rows = []
    for record in records:
        found = record.health()
        for one in found[:FINDINGS]:
            layer, *words = (
                str(one.get(key, "")) for key in ("layer", "kind", "action", "message")
            )
            rows.append([record.label, f"{one['step']:,}", short(layer), *words])
        if len(found) > FINDINGS:
            rows.append([record.label, "later", "", "", "", f"{len(found) - FINDINGS} more"])
    watched = any(record.series("health/findings")[1] for record in records)
    return [
        watched and not rows and "The health checks found nothing.",
        table(["run", "step", "layer", "kind", "action", "message"], rows),
    ]


def evaluations(records: Sequence[RunRecord]) -> list:
    """The newest results of each run as one table; older steps are left to their files."""
    lines = []
    for record in records:
        for newest in record.evaluations[-1:]:
            tasks = {name: task for name, task in newest["tasks"].items() if name != "samples"}
            for name, task in tasks.items():
                chance = f"{100 * task['chance']:.0f}%" if "chance" in task else ""
                size = task.get("questions", task.get("tokens", ABSENT))
                note = "" if task.get("corpus_as_trained", True) else "corpus differs"
                cells = [name, evaluate.shown(name, task), chance, str(size), note]
                lines.append([record.label, f"{newest['step']:,}", *cells])
    header = ["run", "step", "task", "result (± standard error)", "chance", "size", "note"]
    return [table(header, lines)]


def samples(records: Sequence[RunRecord]) -> list:
    """Sample texts of the newest evaluation that has some."""
    parts = []
    for record in records:
        found = [e for e in record.evaluations if e["tasks"].get("samples")]
        for newest in found[-1:]:
            texts = newest["tasks"]["samples"]["texts"]
            parts.append(escaped(f"{record.title}, step {newest['step']:,}:"))
            parts.append(code("\n".join(json.dumps(text, ensure_ascii=False) for text in texts)))
    return parts


def conversions(records: Sequence[RunRecord]) -> list:
    """Which layers have estimated gradients; runs with the same plan are named together."""
    groups: dict[str, list[str]] = {}
    for record in records:
        if planned := record.conversion():
            groups.setdefault(str(planned), []).append(record.title)
    return [
        part for text, names in groups.items() for part in (escaped(", ".join(names)), code(text))
    ]


def settings(records: Sequence[RunRecord]) -> list:
    """Everything that config.json says, first that in which the runs differ."""
    flat = [_flat(record.config) for record in records]
    rows = {
        name: [one.get(name, "") for one in flat]
        for name in dict.fromkeys(sum(map(list, flat), []))
    }
    differ = [[name, *row] for name, row in rows.items() if len(set(row)) > 1]
    alike = [[name, row[0]] for name, row in rows.items() if len(set(row)) == 1]
    return [
        table(["setting", *(record.title for record in records)], differ),
        table(["setting", "all runs" if len(records) > 1 else "value"], alike),
    ]


def _flat(config: dict, prefix: str = "") -> dict[str, str]:
    """Nested settings as {"outer inner": text}; lists of more than 20 entries are left out."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name} ")
        elif not isinstance(value, list) or len(value) <= 20:
            found[prefix + name] = value if isinstance(value, str) and value else json.dumps(value)
    return found


# Writing


def write(path: Path, title: str, made: Sequence[Section], verdict: str = "") -> Path:
    """Write the sections to `path` (.md), its plots to a folder beside it, and all of it to the
    .html of the same name; the folder is made. Returns `path`.

    Args:
        verdict: a line under the title.
    """
    folder = path.parent / f"{path.stem}-plots"
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    blocks = [f"# {escaped(title)}", escaped(verdict)]
    blocks.append(f"Written {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC.")
    for section in made:
        if any(section.parts):
            blocks.append(f"## {escaped(section.title)}")
        for part in section.parts:
            if isinstance(part, Plot):
                file = f"{folder.name}/{part.name}.svg"
                images[file] = svg(part)
                (path.parent / file).write_text(images[file], encoding="utf-8")
                part = f"![{escaped(part.title)}]({file})\n\n{escaped(part.caption)}"
            blocks.append(part)
    text = "\n\n".join(block for block in blocks if block) + "\n"
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".html").write_text(page(title, text, images), encoding="utf-8")
    return path


def page(title: str, text: str, images: dict[str, str]) -> str:
    """Markdown as a page that stands alone; `images` are the plots by their file, as SVG."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.add_render_rule("image", lambda self, tokens, i, *_: images[tokens[i].attrs["src"]])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(visible(title))}</title><style>{_STYLE}</style></head><body>\n"
        f"{reader.render(text)}</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of any text, columns of numbers to the right; "" where it has no rows."""
    if not rows:
        return ""
    numeric = [
        all(re.fullmatch(r"[-+\d.,e%]*", cell) for cell in cells)
        for cells in zip(*rows, strict=True)
    ]
    lines = ["| " + " | ".join(map(escaped, line)) + " |" for line in (header, *rows)]
    lines.insert(1, "| " + " | ".join("---:" if right else "---" for right in numeric) + " |")
    return "\n".join(lines)


def code(text: str) -> str:
    """Any text as a Markdown block that shows it as it is; "" where there is none."""
    text = visible(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}" if text else ""


def escaped(text: str) -> str:
    """Any text as Markdown that shows it as it is, on one line."""
    text = html.escape(" ".join(visible(text).split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~#])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def number(value) -> str:
    """A number in four digits; "" for what is not known."""
    return f"{value:.4g}" if _is_number(value) else "" if value in (None, "nan") else str(value)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
