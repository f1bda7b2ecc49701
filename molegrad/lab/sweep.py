"""python -m scripts.compare: methods of training compared at equal tokens and at equal time.

    python -m scripts.compare --methods=lowrank:rank=8,lowrank:rank=16 --seeds=3 --jobs=2
    python -m scripts.compare "--methods=adamw:matrix_lrs=0.001|0.002|0.004,balanced" \\
        --sizes=4x128,6x384 --batch-sizes=2048,8192 --list
    python -m scripts.compare --vocab=bytes --plots=plots --json

A cell is one method at one model size, batch size and length. Its learning rate is chosen by the
same rule for every method, the dense reference included: every rate is trained with seed 0; while
the best is the smallest or the largest, one more rate is added beyond it, a factor of two away, at
most twice; the best rate is then trained with the other seeds.

`next_runs` is a pure function of what is known. Asked again after every run that ends, it needs no
memory of its own, so an interrupted or extended comparison trains only what is missing.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from molegrad import build_info
from molegrad.gpt import paths
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.tokenizer import FILE, SPECIAL_TOKENS, Tokenizer
from molegrad.gpt.model.gpt import GPTConfig
from molegrad.gpt.train import flags
from molegrad.gpt.train.config import BaseTrainConfig, device_of, resolve
from molegrad.gpt.train.flags import PREFIX, flag
from molegrad.gpt.train.hardware import device_name
from molegrad.gpt.train.tok_train import TokTrainConfig, tok_train
from molegrad.lab import store, table
from molegrad.lab.methods import Method, learning_rates, parse_methods, split
from molegrad.lab.run import Process, time_in_turn, work_off
from molegrad.lab.store import Run

EXTENSIONS = 2  # rates added beyond the given ones at most
FACTOR = 2.0  # between an added rate and its neighbour


@dataclass(frozen=True)
class CompareConfig:
    """Compare training methods: quality, memory and time against tuned dense Muon.

    Raises:
        ValueError: an axis that is empty or has values of the wrong kind.
    """

    methods: str = flag(
        "lowrank,lowrank-grad,tangent,balanced",
        "methods, comma separated, changes behind colons (see molegrad.lab.methods); 'dense' is "
        "always there",
    )
    matrix_lrs: str = flag("0.01,0.02,0.04", "learning rates to choose from")
    extend_lrs: bool = flag(True, "add rates while the best is the smallest or largest, twice")
    seeds: int = flag(2, "number of seeds: 0, 1, ...")
    sizes: str = flag("3x192", "model sizes, depth x width, comma separated")
    batch_sizes: str = flag("", "tokens per step, comma separated; empty is one micro-batch")
    num_iterations: str = flag("300", "steps of a run; several lengths comma separated")
    common: str = flag("", "flags of base_train for all methods, as NAME=VALUE:NAME=VALUE")
    max_seq_len: int = flag(256, "tokens per sequence")
    device_batch_size: int = flag(8, "sequences per micro-batch; larger batches accumulate")
    data: str = flag("embedded", "corpus, as base_train takes it")
    vocab: str = flag("", "vocabulary: a number of entries, or 'bytes'; empty: tok_train's default")
    eval_tokens: int = flag(131072, "tokens of the held-out evaluation")
    evals: int = flag(4, "evaluations of a run, evenly spaced; the last one is at its end")
    device_type: str = flag("", "cuda, cpu or mps; empty takes the best there is")
    jobs: int = flag(1, "runs at the same time, each in a process of its own")
    threads: int = flag(0, "CPU threads of each run; 0 leaves torch's choice")
    time_steps: int = flag(
        30, "steps to time each method with after the sweep, in turn with dense; 0 is off"
    )
    equal_time: bool = flag(False, "train every method as long as dense takes, too")
    list: bool = flag(False, "print the runs that can be made now, no more")
    json: bool = flag(False, "print one JSON object as the last line")
    plots: str = flag("", "draw gap_memory.svg, the gap against the bytes held, in this folder")

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "evals", "max_seq_len", "device_batch_size", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("threads", "time_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.vocab and self.vocab != "bytes" and not self.vocab.isdigit():
            raise ValueError(f"vocab={self.vocab!r} is neither a number of entries nor 'bytes'")
        if self.equal_time and not self.time_steps:
            raise ValueError("equal_time needs step times: time_steps must be at least 1")
        self.rates, cells(self)  # noqa: B018 (they check)

    @property
    def rates(self) -> tuple[float, ...]:
        return learning_rates(self.matrix_lrs, "--matrix-lrs")

    def size_list(self) -> list[tuple[int, int]]:
        """(depth, width) of every model."""
        sizes = []
        for part in split(self.sizes, ","):
            numbers = part.lower().split("x")
            if len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
                raise ValueError(f"sizes={self.sizes!r}: {part!r} should look like 4x128")
            depth, width = map(int, numbers)
            if width % depth:
                raise ValueError(f"sizes: the width of {part} is no multiple of its depth")
            sizes.append((depth, width))
        return sizes

    def batch_list(self) -> list[int]:
        """Tokens per step of every batch size."""
        micro = self.device_batch_size * self.max_seq_len
        batches = self.counts("batch_sizes") if self.batch_sizes else [micro]
        for batch in batches:
            unit = self.max_seq_len if batch < micro else micro
            if batch % unit:
                what = "one sequence" if batch < micro else "one micro-batch"
                raise ValueError(
                    f"batch_sizes: {batch} tokens are no multiple of {what} of {unit} tokens: take "
                    f"{max(1, batch // unit) * unit} or change device_batch_size"
                )
        return batches

    def counts(self, name: str) -> list[int]:
        """The comma separated numbers of a flag."""
        parts = split(getattr(self, name), ",")
        if not parts or not all(part.isdigit() and int(part) for part in parts):
            raise ValueError(f"{name}={getattr(self, name)!r} should be positive integers")
        return [int(part) for part in parts]


@dataclass(frozen=True)
class Cell:
    """One method at one size, batch size and length: a row of a table."""

    method: Method
    depth: int
    width: int
    batch: int  # tokens per step
    steps: int
    reference: bool  # dense, which the others are compared with


@dataclass(frozen=True)
class Text:
    """What all runs read: SHA-256 of the corpus, the tokenizer's name and SHA-256."""

    corpus: str
    name: str
    tokenizer: str


def prepare_text(config: CompareConfig) -> Text:
    """Open the corpus; train the tokenizer that --vocab names where it does not exist yet."""
    corpus = open_corpus(config.data).manifest["sha256"]
    name = ""
    if config.vocab:
        entries = 256 + len(SPECIAL_TOKENS) if config.vocab == "bytes" else int(config.vocab)
        name = "bytes" if config.vocab == "bytes" else f"bpe-{entries}-{corpus[:8]}"
        if not (paths.tokenizer_dir(name) / FILE).exists():
            tok_train(TokTrainConfig(vocab_size=entries, data=config.data, tokenizer=name))
    return Text(corpus, name, Tokenizer.load(paths.tokenizer_dir(name)).fingerprint)


def cells(config: CompareConfig) -> list[Cell]:
    """All cells, those of one table together, dense first."""
    methods = parse_methods(config.methods, config.common)
    return [
        Cell(method, depth, width, batch, steps, index == 0)
        for depth, width in config.size_list()
        for batch in config.batch_list()
        for steps in config.counts("num_iterations")
        for index, method in enumerate(methods)
    ]


def make_run(config: CompareConfig, text: Text, cell: Cell, lr: float, seed: int) -> Run:
    """One run of a cell.

    Raises:
        ValueError: the flags do not go together.
    """
    every = -(-cell.steps // config.evals)
    values = {
        "depth": cell.depth,
        "aspect_ratio": cell.width // cell.depth,
        "max_seq_len": config.max_seq_len,
        "device_batch_size": min(config.device_batch_size, cell.batch // config.max_seq_len),
        "total_batch_size": cell.batch,
        "num_iterations": cell.steps,
        "matrix_lr": lr,
        "seed": seed,
        PREFIX + "seed": seed,
        "data": config.data,
        "tokenizer": text.name,
        "device_type": config.device_type,
        "threads": config.threads,
        "eval_every": every,
        "eval_tokens": config.eval_tokens,
        "monitor_every": every,
        "layer_metrics": False,
        "shadow_every": 0,
        "sample_every": -1,
        "save_every": -2,
        "dashboards": "none",
        "overwrite": True,
        **cell.method.flags,
    }
    settings = flags.make(BaseTrainConfig, **values)
    sizes = GPTConfig(cell.depth, cell.width // cell.depth, settings.head_dim, settings.kv_groups)
    if sizes.width != cell.width:
        raise ValueError(
            f"sizes: width {cell.width} is no multiple of the heads' {sizes.head_dim} numbers; "
            f"take {sizes.width}"
        )
    settings = resolve(settings, device_of(settings))
    run = Run(cell.method.label, settings, text.corpus, text.tokenizer, cell.method.peer)
    return replace(run, config=replace(settings, run=f"compare-{run.key}"))


@dataclass(frozen=True)
class Search:
    """The choice of a cell's learning rate so far.

    missing: runs to be made before it can go on. sweep: (rate, record) of all rates so far, in
    rising order. lr: the rate chosen, once nothing is missing; best: its record, None where every
    rate failed. edge: it is the first or last.
    """

    missing: list[Run]
    sweep: list[tuple[float, dict]]
    lr: float = math.nan
    best: dict | None = None
    edge: bool = False


def _order(record: dict) -> float:
    """What a lower value of is better; a run that failed ranks last."""
    return record["bpb"] if record["status"] == "ok" else math.inf


def search(config: CompareConfig, text: Text, cell: Cell, known: Mapping[str, dict]) -> Search:
    """How far the choice of the cell's learning rate is, by what is known (key -> record)."""
    rates = list(cell.method.rates or config.rates)
    for added in range(EXTENSIONS + 1):
        runs = {lr: make_run(config, text, cell, lr, 0) for lr in rates}
        done = [(lr, known[run.key]) for lr, run in runs.items() if run.key in known]
        if len(done) < len(runs):
            return Search([run for run in runs.values() if run.key not in known], done)
        lr, best = min(done, key=lambda pair: (_order(pair[1]), pair[0]))
        edge = len(rates) > 1 and lr in (rates[0], rates[-1])
        if not (edge and config.extend_lrs) or added == EXTENSIONS:
            break
        rates = [lr / FACTOR, *rates] if lr == rates[0] else [*rates, lr * FACTOR]
    return Search([], done, lr, best if best["status"] == "ok" else None, edge)


def seed_runs(config: CompareConfig, text: Text, cell: Cell, lr: float) -> list[Run]:
    """The runs of all seeds at one learning rate."""
    return [make_run(config, text, cell, lr, seed) for seed in range(config.seeds)]


def next_runs(config: CompareConfig, text: Text, known: Mapping[str, dict]) -> list[Run]:
    """The runs that can be made now; [] when the sweep is complete. Equal runs come once."""
    runs: dict[str, Run] = {}
    for cell in cells(config):
        found = search(config, text, cell, known)
        wanted = seed_runs(config, text, cell, found.lr) if found.best else found.missing
        runs |= {run.key: run for run in wanted if run.key not in known}
    return list(runs.values())


def train_all(config, known: dict[str, dict], wanted, say, start=Process) -> None:
    """Make every run that `wanted` names, until it names none, and add it to `known`."""

    def finished(run: Run, record: dict) -> None:
        known[run.key] = {**run.to_dict(), "key": run.key, **record}
        result = record.get("reason", "") + (f" ({record['log']})" if "log" in record else "")
        if record["status"] == "ok":
            result = f"{record['bpb']:.4f} bits per byte in {record['seconds']:.0f} s"
        say(f"{title(run)}: {record['status']}, {result}; {len(wanted())} or more to go")

    work_off(wanted, finished, config.jobs, start)


def title(run: Run) -> str:
    """The run, for people."""
    c = run.config
    return (
        f"{run.label}, {c.depth}x{c.depth * c.aspect_ratio}, {c.total_batch_size:,} tokens a step, "
        f"{c.num_iterations:,} steps, lr {c.matrix_lr:g}, seed {c.seed}"
    )


def measure_times(config, text, known, say, start=Process) -> dict[str, dict]:
    """time_key -> timing of the methods of a finished sweep, dense against itself among them: from
    the store, or measured now. Lengths, seeds and learning rates share a timing."""
    stored, times = store.read(store.TIMES), {}
    dense = None
    for cell in cells(config):
        found = search(config, text, cell, known)
        run = make_run(config, text, cell, found.lr, 0) if found.best else None
        dense = run if cell.reference else dense
        if run is None or dense is None or run.time_key in times:
            continue
        device = device_name(torch.device(run.config.device_type))
        key = store.hash_of([run.time_key, dense.time_key, device])
        if key not in stored:
            try:
                timing = time_in_turn(run, dense, config.time_steps, start)
            except RuntimeError as error:
                say(f"{run.label} could not be timed: {error}")
                continue
            stored[key] = {"format": store.FORMAT, "key": key, "device": device, **timing}
            store.append(store.TIMES, stored[key])
            shown = "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})".format(**timing)
            say(f"{run.label}: step time / dense {shown}")
        times[run.time_key] = stored[key]
    return times


def compare(
    config: CompareConfig,
    text: Text,
    known: dict[str, dict],
    say: Callable[[str], None],
    start: Callable = Process,
) -> list[dict]:
    """Sweep, time, train at equal time where that is asked for; the rows of the tables.

    Args:
        known: key -> record of what has been trained; grows.
        start: as `Process`: what trains a run.
    """
    train_all(config, known, lambda: next_runs(config, text, known), say, start)
    times = measure_times(config, text, known, say, start) if config.time_steps else {}
    found = [(cell, search(config, text, cell, known)) for cell in cells(config)]
    longer: dict[int, list[Run]] = {}
    for index, (cell, choice) in enumerate(found):
        if config.equal_time and choice.best and not cell.reference:
            run = make_run(config, text, cell, choice.lr, 0)
            if time := times.get(run.time_key):
                steps = max(1, round(cell.steps / time["ratio"]))
                longer[index] = seed_runs(config, text, replace(cell, steps=steps), choice.lr)
    wanted = {run.key: run for runs in longer.values() for run in runs}
    train_all(config, known, lambda: [r for k, r in wanted.items() if k not in known], say, start)
    rows, dense = [], []
    for index, (cell, choice) in enumerate(found):
        runs = seed_runs(config, text, cell, choice.lr) if choice.best else []
        records = [known[run.key] for run in runs if run.key in known]
        dense = records if cell.reference else dense
        row = {
            "method": cell.method.label,
            "reference": cell.reference,
            **{name: getattr(cell, name) for name in table.SETTING},
            "tokens": cell.batch * cell.steps,
            "lr": choice.lr,
            "lr_at_edge_of_sweep": choice.edge,
            "sweep": {f"{lr:g}": r.get("bpb") for lr, r in choice.sweep},
            "status": "ok" if records else "failed",
        }
        if records:
            more = [known[run.key] for run in longer.get(index, ()) if run.key in known]
            row |= table.row(records, dense, times.get(runs[0].time_key), more)
        else:
            row["reason"] = choice.sweep[0][1]["reason"]
        rows.append(row)
    return rows


@flags.command("compare")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(CompareConfig, argv, prog="python -m scripts.compare")
    text = prepare_text(config)
    known = store.read(store.RUNS)
    if config.list:
        runs = next_runs(config, text, known)
        print("\n".join([f"{len(runs)} runs can be made now:", *map(title, runs)]))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no process is left behind
    try:
        rows = compare(config, text, known, lambda words: print(words, flush=True))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is missing")
        return 130
    print(f"\n{table.table(rows)}")
    if config.plots:
        Path(config.plots).mkdir(parents=True, exist_ok=True)
        table.draw(rows, Path(config.plots) / "gap_memory.svg")
    if config.json:
        print(json.dumps({"config": flags.resolved(config), "build": build_info(), "rows": rows}))
    return 0
