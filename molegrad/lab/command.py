"""python -m scripts.compare: methods of training compared at equal tokens and at equal time.

    python -m scripts.compare --methods=factored-tangent --ranks=8,32 --seeds=3 --jobs=2 --threads=1
    python -m scripts.compare "--methods=adamw:matrix_lrs=0.001|0.002|0.004,factored-tangent" \\
        --sizes=4x128,6x384 --batch-sizes=2048,8192 --train-tokens=2000000 --list
    python -m scripts.compare --vocab=bytes --plots=plots --markdown=table.md --json

What: trains every method at every rank, size, batch size, length, learning rate and seed that the
flags name, dense Muon among them and tuned by the same rule (`molegrad.lab.sweep`), and prints one
table per setting. What has been trained is kept in $MOLEGRAD_HOME/report/compare.jsonl, so an
interrupted or extended comparison trains only what is missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from molegrad import build_info
from molegrad.gpt.train import flags
from molegrad.gpt.train.flags import flag
from molegrad.lab import plots, store, summary
from molegrad.lab.store import Run
from molegrad.lab.sweep import (
    LabConfig,
    Text,
    cells,
    make_run,
    next_runs,
    prepare_text,
    search,
    seed_runs,
)
from molegrad.lab.timing import equal_time_runs, measure_times
from molegrad.lab.worker import Pacer, build_peer, terminable, work_off


@dataclass(frozen=True)
class CompareConfig(LabConfig):
    """Compare training methods: quality, memory and time against tuned dense Muon."""

    time_steps: int = flag(
        30, "steps to time each method with after the sweep, in turn with dense; 0 is off"
    )
    time_again: bool = flag(False, "measure step times that are in the store once more")
    equal_time: bool = flag(False, "train every method as long as dense takes, too")
    list: bool = flag(False, "print the runs that would be made and how many are known, no more")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: str = flag("", "also write the tables to this file")
    plots: str = flag("", "draw plots of the gap into this folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_steps < 0:
            raise ValueError(f"time_steps must not be negative, got {self.time_steps}")
        if self.equal_time and not self.time_steps:
            raise ValueError("equal_time needs step times: time_steps must be at least 1")


def train_all(
    config: LabConfig,
    known: dict[str, dict],
    wanted: Callable[[], list[Run]],
    say: Callable[[str], None],
    perform: Callable[[Run], dict] | None = None,
) -> None:
    """Make every run that `wanted` names, until it names none, and add it to `known`."""

    def finished(run: Run, record: dict) -> None:
        known[run.key] = {**run.to_dict(), "key": run.key, **record}
        c = run.config
        where = f"{run.title}, {c.depth}x{c.depth * c.aspect_ratio}, {c.total_batch_size:,} tokens"
        where += f", {c.num_iterations} steps, lr {c.matrix_lr:g}, seed {c.seed}"
        if record["status"] == "ok":
            result = f"{record['bpb']:.4f} bits per byte in {record['seconds']:.0f} s"
        else:
            log = f" ({record['log']})" if "log" in record else ""
            result = f"failed: {record['reason']}{log}"
        say(f"{where}: {result}; {len(wanted())} or more to go")

    work_off(wanted, finished, config.jobs, perform)


def compare(
    config: CompareConfig,
    text: Text,
    known: dict[str, dict],
    say: Callable[[str], None],
    perform: Callable[[Run], dict] | None = None,
    start: Callable[[Run], Pacer] = Pacer,
) -> list[dict]:
    """Sweep, time, train at equal time where that is asked for; the rows of the tables.

    Args:
        known: key -> record of what has been trained; grows.
        perform, start: in place of processes, see `train_all` and `measure_times`.
    """
    train_all(config, known, lambda: next_runs(config, text, known), say, perform)
    times, longer = {}, {}
    if config.time_steps:
        times = measure_times(config, text, known, config.time_steps, say, config.time_again, start)
    if config.equal_time:
        longer = equal_time_runs(config, text, known, times)
        runs = {run.key: run for cell in longer.values() for run in cell}
        train_all(
            config, known, lambda: [r for k, r in runs.items() if k not in known], say, perform
        )
    return summary.summarise(config, text, known, times, longer)


def check(config: LabConfig, text: Text) -> None:
    """Find contradictions before anything is trained.

    Raises:
        ValueError, TypeError, ImportError: flags, a rank or a peer's options do not go together.
    """
    next_runs(config, text, {})
    for cell in cells(config):
        if cell.method.peer is not None:
            run = make_run(config, text, cell, 1.0, 0)
            matrix = torch.nn.Parameter(torch.zeros(cell.width, cell.width))
            build_peer(cell.method.peer, [matrix], run.config)


def listing(config: LabConfig, text: Text, known: dict[str, dict]) -> str:
    """The state of every cell, and the runs to be made as far as that is known now."""
    lines, stored, ahead = [], 0, 0
    for cell in cells(config):
        found = search(config, text, cell, known)
        rates = [f"{run.config.matrix_lr:g}" for run in found.missing]
        stored += len(found.sweep)
        if found.missing:
            ahead += len(found.missing) + config.seeds - 1
            state = f"learning rates to train: {', '.join(rates)}; then {config.seeds - 1} seeds"
        elif found.best["status"] != "ok":
            state = f"failed at every learning rate: {found.best['reason']}"
        else:
            one = [run for run in seed_runs(config, text, cell, found.lr) if run.key in known]
            stored += len(one) - 1
            ahead += config.seeds - len(one)
            state = f"best learning rate {found.lr:g}, {len(one)} of {config.seeds} seeds"
        rank = "" if cell.method.rank is None else f", rank {cell.method.rank:g}"
        lines.append(
            f"{cell.method.label}{rank}, {cell.depth}x{cell.width}, {cell.batch:,} tokens a step, "
            f"{cell.steps:,} steps: {state}"
        )
    runs = [
        f"  {run.key}  {run.title}, {run.config.depth}x{run.config.depth * run.config.aspect_ratio}"
        f", lr {run.config.matrix_lr:g}, seed {run.config.seed}"
        for run in next_runs(config, text, known)
    ]
    lines.append(f"{stored} runs are in the store; {ahead} or more are to be made, at first:")
    lines += runs
    return "\n".join(lines)


@flags.command("compare")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(CompareConfig, argv, prog="python -m scripts.compare")

    def say(words: str) -> None:
        print(words, flush=True)

    try:
        text = prepare_text(config)
        check(config, text)
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    known = store.read_runs()
    if config.list:
        print(listing(config, text, known))
        return 0
    try:
        with terminable():
            rows = compare(config, text, known, say)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on with what is missing")
        return 130
    tables = summary.table(rows)
    print(f"\n{tables}")
    if config.markdown:
        Path(config.markdown).write_text(tables + "\n", encoding="utf-8")
    if config.plots:
        for file in plots.draw(rows, config.plots):
            print(f"drawn {file}")
    if config.json:
        print(json.dumps({"config": flags.resolved(config), "build": build_info(), "rows": rows}))
    return 0
