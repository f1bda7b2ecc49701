"""The report of one or several runs: what was trained, on what, how well, how fast, by which
commands.

What: `report(config)` reads the runs' config.json, metrics.jsonl and evaluations and writes
report/report.md with plots beside it, then shows it in the terminal. Nothing is measured here, and
what a run did not record is listed under "Missing", never filled in.

How to run:

    python -m scripts.report --runs=dense,molegrad
"""

import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from molegrad.gpt import paths
from molegrad.gpt.evaluate import evaluate
from molegrad.gpt.report.method_plots import method_plots, phases
from molegrad.gpt.report.method_tables import health_table, metrics_table, phase_table, shadow_table
from molegrad.gpt.report.plots import curves, draw
from molegrad.gpt.report.record import RunRecord, command, differences, read_runs
from molegrad.gpt.train import flags
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.sft import SFTConfig
from molegrad.gpt.train.tok_train import TokTrainConfig

ABSENT = "not recorded"
_EVAL = {
    "base": ("base_eval", evaluate.BaseEvalConfig),
    "sft": ("chat_eval", evaluate.ChatEvalConfig),
}
_TRAIN = {"base": ("base_train", BaseTrainConfig), "sft": ("chat_sft", SFTConfig)}
_NO_FLAGS = ("machine", "corpus", "parameters", "conversation_sources")


@dataclass(frozen=True)
class ReportConfig:
    """Write report/report.md with plots for one or several runs, and show it."""

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
    folder.mkdir(parents=True, exist_ok=True)
    base = [record for record in records if record.stage == "base"]
    tuned = [record for record in records if record.stage == "sft"]
    files, missing, unknown = [], [], []
    for stage, prefix in ((base, ""), (tuned, "sft_")):
        more, lines = draw(curves(stage), folder, prefix)
        files, missing = files + more, missing + lines
        more, lines = draw([*method_plots(stage), phases(stage)] if stage else [], folder, prefix)
        files, unknown = files + more, unknown + lines
    sections = [
        f"# Report: {', '.join(config.names)}",
        f"Written {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC by "
        f"`{command('report', ReportConfig, flags.resolved(config))}`.",
        "## Base training" if base else "",
        comparison(base, missing) if base else "",
        "## Fine-tuning" if tuned else "",
        comparison(tuned, missing) if tuned else "",
        "## Curves",
        "\n\n".join(f"![{path.stem}]({path.name})" for path in files),
        "## Gradient estimates",
        estimates(records, unknown),
        "## Health",
        _table_or(health_table(records), "No findings were recorded."),
        "## Time by phase",
        _table_or(phase_table(records), f"{ABSENT.capitalize()}."),
        "## Evaluations",
        evaluations(records, missing),
        "## Sample texts",
        samples(records, missing),
        "## Machine and software",
        machines(records, missing),
        "## Data",
        data(records, missing),
        "## Conversion",
        conversions(records, missing),
        "## Configuration",
        configurations(records),
        "## Commands",
        commands(records, missing),
        "## Missing",
        "\n".join(f"- {line}" for line in dict.fromkeys(missing)) or "Nothing.",
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    path = folder / "report.md"
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    if config.show:
        Console().print(Markdown(text))
    print(f"written {path}")
    return path


def comparison(records: list[RunRecord], missing: list[str]) -> str:
    """The table of results with the gap to the first dense run, and what is not comparable."""
    rows = [record.summary() for record in records]
    dense = next((i for i, record in enumerate(records) if record.dense), None)
    reference = rows[dense]["bpb"] if dense is not None else None
    columns = (
        ("run", None, ""),
        ("weight gradients", None, ""),
        ("steps", "steps", "{:,.0f}"),
        ("tokens", "tokens", "{:,.0f}"),
        ("val bits per byte", "bpb", "{:.4f}"),
        ("gap to dense", None, ""),
        ("ms a step", "step_ms", "{:,.1f}"),
        ("20% to 80%", "step_ms_spread", "{}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ("MFU %", "mfu", "{:.1f}"),
        ("minutes", "seconds", "{:,.1f}"),
        ("gradients MiB", "gradient_bytes", "{:,.2f}"),
        ("optimizer + bases MiB", "state_bytes", "{:,.2f}"),
        ("peak memory MiB", "peak_bytes", "{:,.0f}"),
    )
    scale = {"seconds": 1 / 60, "gradient_bytes": 2**-20, "state_bytes": 2**-20}
    scale["peak_bytes"] = 2**-20
    lines = []
    for record, row in zip(records, rows, strict=True):
        if reference is None or row["bpb"] is None:
            gap = "no dense run" if dense is None else ABSENT
        else:
            gap = f"{100 * (row['bpb'] / reference - 1):+.2f}%"
        named = {
            "run": record.label,
            "weight gradients": gradients_of(record.config),
            "gap to dense": "reference" if dense is not None and record is records[dense] else gap,
        }
        cells = []
        for title, key, form in columns:
            value = named[title] if key is None else row[key]
            if key is not None and value is not None:
                value = form.format(value * scale[key] if key in scale else value)
            if value is None:
                missing.append(f"{record.label}: {title}")
            cells.append(ABSENT if value is None else value)
        lines.append(cells)
        if row["steps_planned"] and row["steps"] and row["steps"] < row["steps_planned"]:
            missing.append(
                f"{record.label}: ended after step {row['steps']:,.0f} of {row['steps_planned']:,}"
            )
    text = markdown_table([title for title, _, _ in columns], lines)
    text += (
        "\n\nStep times and rates are medians without the first steps, with the range of the "
        "middle steps: they can be compared only between runs that had the machine to themselves. "
        "Memory is that of the weight gradients and optimizer state of all layers, and the peak "
        "that torch's allocator (GPU) or the process (CPU) reached."
    )
    if differ := differences(records):
        text += "\n\nThe runs differ in more than the method, so the gap is not its effect alone:\n"
        text += "\n".join(f"- {line}" for line in differ)
    return text


def gradients_of(config: dict) -> str:
    """How the weight gradients were made, in a few words."""
    if not config:
        return ABSENT
    if not config.get("enable_streaming", False):
        return f"dense, {config.get('optimizer', '?')}"
    names = ("rank_k", "method", "sample_share", "project_stride")
    get = {name: config.get(f"streaming_{name}", "?") for name in names}
    mode, layers = config.get("streaming_gradient_mode", "?"), config.get("streaming_target_layers")
    layers = ", ".join(layers) if isinstance(layers, list) else layers
    size = f"rank {get['rank_k']}"
    if get["method"] == "sampled":
        size = f"share {get['sample_share']}"
    elif get["method"] == "projected":
        size += f", one row of {get['project_stride']}"
    return f"{size}, {get['method']}, {mode}, {layers}, {config.get('optimizer')}"


def estimates(records: list[RunRecord], unknown: list[str]) -> str:
    """What converted layers logged, and the comparison with true gradients."""
    if all(record.dense for record in records):
        return "All weight gradients are dense."
    parts = [
        _table_or(metrics_table(records), f"Metrics of converted layers: {ABSENT}."),
        "The last comparison with true gradients (shadow layers):",
        _table_or(shadow_table(records), "None was made (--shadow-every)."),
    ]
    if unknown:
        parts.append("Not known:\n" + "\n".join(f"- {line}" for line in dict.fromkeys(unknown)))
    return "\n\n".join(parts)


def evaluations(records: list[RunRecord], missing: list[str]) -> str:
    """The newest results of each run as one table; older steps are left to their files."""
    lines = []
    for record in records:
        if not record.evaluations:
            missing.append(
                f"{record.label}: no evaluation (python -m scripts.{_EVAL[record.stage][0]})"
            )
            continue
        newest = record.evaluations[-1]
        for name, task in newest["tasks"].items():
            if name == "samples":
                continue
            size = task.get("questions", task.get("tokens"))
            chance = f"{100 * task['chance']:.0f}%" if "chance" in task else ""
            note = "" if task.get("corpus_as_trained", True) else "corpus differs from training's"
            lines.append(
                [
                    record.label,
                    f"{newest['step']:,}",
                    name,
                    evaluate.shown(name, task),
                    chance,
                    ABSENT if size is None else f"{size:,}",
                    note,
                ]
            )
    header = ["run", "step", "task", "result (± standard error)", "chance", "size", "note"]
    return markdown_table(header, lines) if lines else "None."


def samples(records: list[RunRecord], missing: list[str]) -> str:
    """Sample texts of the newest evaluation that has some."""
    parts = []
    for record in records:
        found = [e for e in record.evaluations if e["tasks"].get("samples")]
        if not found:
            missing.append(f"{record.label}: sample texts")
            continue
        texts = found[-1]["tasks"]["samples"]["texts"]
        quoted = "\n".join(f"    {json.dumps(text, ensure_ascii=False)}" for text in texts)
        parts.append(f"{record.label}, step {found[-1]['step']:,}:\n\n{quoted}")
    return "\n\n".join(parts) or "None."


def machines(records: list[RunRecord], missing: list[str]) -> str:
    """What each run ran on; runs on the same are named together."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        machine = record.config.get("machine")
        if machine is None:
            missing.append(f"{record.label}: machine and software")
        else:
            groups.setdefault(json.dumps(machine, sort_keys=True), []).append(record)
    parts = []
    for text, same in groups.items():
        rows = [[key, _text(value)] for key, value in json.loads(text).items()]
        parts.append(f"{_labels(same)}:\n\n{markdown_table(['', ''], rows)}")
    return "\n\n".join(parts) or f"{ABSENT.capitalize()}."


def data(records: list[RunRecord], missing: list[str]) -> str:
    """Corpus and tokenizer of each run with their hashes."""
    rows = []
    for record in records:
        corpus, tokenizer = record.config.get("corpus"), record.config.get("tokenizer")
        if corpus is None:
            missing.append(f"{record.label}: corpus manifest")
        if tokenizer is None:
            missing.append(f"{record.label}: tokenizer's fingerprint")
        corpus = corpus or {}
        sizes = [
            f"{split} {corpus[split]['documents']:,} documents, {corpus[split]['bytes']:,} bytes"
            for split in ("train", "val")
            if "documents" in corpus.get(split, {})
        ]
        versions = ", ".join(f"{k} {v}" for k, v in (corpus.get("packages") or {}).items())
        rows.append(
            [
                record.label,
                corpus.get("kind", ABSENT),
                corpus.get("sha256", ABSENT),
                "; ".join(sizes) or ABSENT,
                versions,
                tokenizer or ABSENT,
            ]
        )
    header = ["run", "corpus", "SHA-256 of the text", "size", "packages", "tokenizer SHA-256"]
    return markdown_table(header, rows)


def conversions(records: list[RunRecord], missing: list[str]) -> str:
    """Which layers have estimated gradients; runs with the same plan are named together."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.dense:
            groups.setdefault("dense weight gradients everywhere", []).append(record)
        elif (planned := record.conversion()) is None:
            missing.append(f"{record.label}: conversion plan (no checkpoint)")
        else:
            groups.setdefault(f"\n\n```\n{planned}\n```", []).append(record)
    parts = [f"{_labels(same)}: {text}" for text, same in groups.items()]
    return "\n\n".join(parts) or f"{ABSENT.capitalize()}."


def configurations(records: list[RunRecord]) -> str:
    """Every resolved flag, one column per run."""
    names: dict[str, None] = {}
    for record in records:
        names |= dict.fromkeys(k for k in record.config if k not in _NO_FLAGS)
    rows = [
        [name, *(_text(record.config[name]) if name in record.config else "" for record in records)]
        for name in names
    ]
    return markdown_table(["flag", *(record.label for record in records)], rows)


def commands(records: list[RunRecord], missing: list[str]) -> str:
    """The commands that give these runs again, from what they recorded."""
    lines = []
    for record in records:
        tokenizer = record.folder.parent / "tok_train.json"
        if tokenizer.exists():
            made = json.loads(tokenizer.read_text(encoding="utf-8"))["config"]
            lines.append(command("tok_train", TokTrainConfig, made))
        elif record.stage == "base":
            missing.append(f"{record.label}: the tokenizer's command (tok_train --run)")
        if record.config:
            lines.append(command(*_TRAIN[record.stage], record.config))
        else:
            missing.append(f"{record.label}: config.json")
        for result in record.evaluations[-1:]:
            if "config" in result:
                lines.append(command(*_EVAL[record.stage], result["config"]))
    return "```\n" + "\n".join(dict.fromkeys(lines)) + "\n```"


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; a bar or line end inside a cell cannot break it."""

    def line(cells) -> str:
        safe = (str(c).replace("|", "\\|").replace("\n", " ") for c in cells)
        return "| " + " | ".join(safe) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _table_or(table: tuple[list[str], list[list]], otherwise: str) -> str:
    return markdown_table(*table) if table[1] else otherwise


def _labels(records: list[RunRecord]) -> str:
    return ", ".join(record.label for record in records)


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value)
