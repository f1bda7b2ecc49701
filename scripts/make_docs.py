"""Write docs/flags.md and docs/ops.md from the code: python -m scripts.make_docs [--check]"""

import dataclasses
import importlib
import inspect
import sys
import typing
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = {
    "tok_train": ("molegrad.gpt.train.tok_train", "TokTrainConfig"),
    "base_train": ("molegrad.gpt.train.config", "BaseTrainConfig"),
    "chat_sft": ("molegrad.gpt.train.sft", "SFTConfig"),
    "base_eval": ("molegrad.gpt.evaluate.evaluate", "BaseEvalConfig"),
    "chat_eval": ("molegrad.gpt.evaluate.evaluate", "ChatEvalConfig"),
    "chat_cli": ("molegrad.gpt.chat.terminal", "ChatConfig"),
    "report": ("molegrad.gpt.report.report", "ReportConfig"),
    "validate": ("molegrad.gpt.report.validate", "ValidateConfig"),
    "export": ("molegrad.gpt.export", "ExportConfig"),
    "budget": ("molegrad.gpt.train.budget", "BudgetConfig"),
    "memory_plan": ("molegrad.memory.plan", "PlanConfig"),
    "bench_grad": ("molegrad.bench.grad", "GradBenchConfig"),
    "bench_step": ("molegrad.bench.step", "StepBenchConfig"),
    "bench_memory": ("molegrad.bench.memory", "MemoryBenchConfig"),
    "compare": ("molegrad.lab.sweep", "CompareConfig"),
}
HEAD = "<!-- Written by python -m scripts.make_docs; change the code, not this page. -->\n"
FLAGS = """# Flags

Every command is `python -m scripts.NAME`; `--a-b` and `--a_b` are one flag, and a boolean is
`--flag`, `--flag=True`, `--flag=False` or `--no-flag`. Flags that several commands share stand
first, in groups.
"""
OPS = """# Ops

`torch.ops.molegrad.NAME`, and the same function with documentation in `molegrad.ops`. Every op
exists with and without the native extension. T tokens, n in_features, m out_features, A (T, n) a
layer's input, B (T, m) the gradient of its output, G = BᵀA (m, n) the weight gradient, k the rank,
U (m, k) and V (n, k) the bases, Y = G V (m, k), W = Gᵀ U (n, k).
"""


def flags_page() -> str:
    """The flags of every command: name, default and help; a table for each group and command."""
    from molegrad.gpt.train.flags import fields_as_flags

    kinds = {c: getattr(importlib.import_module(m), k) for c, (m, k) in COMMANDS.items()}
    tables, users = {}, {}
    for command, kind in kinds.items():
        known = {entry.name: entry for entry in fields_as_flags(kind)}
        for field in dataclasses.fields(kind):
            if field.metadata.get("hidden"):
                continue
            group = field.metadata.get("group")
            owner = next(c for c in kind.__mro__ if field.name in inspect.get_annotations(c))
            title = f"Group `{field.name}`" if group else f"Group `{owner.__name__}`"
            title = f"`scripts.{command}`" if owner is kind and not group else title
            entries = group.flags() if group else [known[field.name]]
            tables.setdefault(title, {}).update({entry.name: _row(entry) for entry in entries})
            users.setdefault(title, {})[command] = None
    groups = [title for title in tables if title.startswith("Group")]
    parts = [HEAD + FLAGS]
    for title in groups:
        parts.append(_section(title, f"Of {_listed(users[title])}.", tables[title]))
    for command, kind in kinds.items():
        title = f"`scripts.{command}`"
        words = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        shared = [g.removeprefix("Group ") for g in groups if command in users[g]]
        words += f"\n\nGroups: {', '.join(shared)}." if shared else ""
        parts.append(_section(title, words, tables.get(title, {})))
    return "\n".join(parts)


def ops_page() -> str:
    """Every op: its schema and the documentation of its function in molegrad.ops."""
    from molegrad import ops

    parts = [HEAD + OPS]
    for name, entry in sorted(ops.OPS.items()):
        function = getattr(ops, name, None)
        text = inspect.getdoc(function) if function else _LAYER
        parts.append(f"## `{name}`\n\n```\n{name}{entry.schema}\n```\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


_LAYER = "MoleLinear's product x Wᵀ + b; the backward pass estimates the weight gradient."


def _row(entry) -> str:
    default = "" if entry.default in ("", None) else f"`{entry.default}`"
    choices = typing.get_args(entry.hint) if typing.get_origin(entry.hint) is typing.Literal else ()
    text = entry.help + (f" ({', '.join(map(str, choices))})" if choices else "")
    return f"| `--{entry.name}` | {default} | {text} |".replace("||", r"\|\|")


def _section(title: str, words: str, rows: dict) -> str:
    table = ["| flag | default | meaning |", "|---|---|---|", *rows.values(), ""] if rows else []
    return "\n".join([f"## {title}\n", words + "\n", *table])


def _listed(commands) -> str:
    return ", ".join(f"`{command}`" for command in commands)


def main(argv: list[str] | None = None) -> int:
    """Write the pages; with --check name those that differ and return 1 where there are any."""
    check, wrong = "--check" in (sys.argv[1:] if argv is None else argv), []
    for name, text in (("flags.md", flags_page()), ("ops.md", ops_page())):
        path = DOCS / name
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            wrong.append(f"docs/{name} is not what the code says: run python -m scripts.make_docs")
        elif not check:
            path.write_text(text, encoding="utf-8")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
