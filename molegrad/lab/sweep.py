"""The sweep: its axes, the cells that they span, and which runs are still to be made.

A cell is one method at one model size, batch size and length. Its learning rate is chosen by the
same rule for every method, the dense reference included: every rate is trained with seed 0; while
the best is the smallest or the largest, one more rate is added beyond it, a factor of two away, at
most twice; the best rate is then trained with the other seeds.

`next_runs` is a pure function of what is known. Asked again after every run that ends, it needs no
memory of its own, so an interrupted sweep goes on where it was, and any number may run at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from molegrad.gpt import paths
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.tokenizer import FILE, SPECIAL_TOKENS, Tokenizer
from molegrad.gpt.model.gpt import GPTConfig
from molegrad.gpt.train import flags
from molegrad.gpt.train.config import BaseTrainConfig, device_of, resolve
from molegrad.gpt.train.flags import PREFIX, flag
from molegrad.gpt.train.tok_train import TokTrainConfig, tok_train
from molegrad.lab.methods import Method, learning_rates, parse_methods, split
from molegrad.lab.store import Run

EXTENSIONS = 2  # rates added beyond the given ones at most
FACTOR = 2.0  # between an added rate and its neighbour


@dataclass(frozen=True)
class LabConfig:
    """Compare training methods: quality, memory and time against tuned dense Muon.

    Raises:
        ValueError: an axis that is empty or has values of the wrong kind.
    """

    methods: str = flag(
        "dense-power,dense-tangent,factored-power,factored-tangent",
        "methods, comma separated, overrides behind colons (see molegrad.lab.methods); 'dense' is "
        "always there",
    )
    ranks: str = flag("", "ranks of low-rank methods; empty is the configuration's default")
    matrix_lrs: str = flag("0.01,0.02,0.04", "learning rates to choose from")
    extend_lrs: bool = flag(True, "add rates while the best is the smallest or largest, twice")
    seeds: int = flag(2, "number of seeds: 0, 1, ...")
    sizes: str = flag("3x192", "model sizes, depth x width, comma separated")
    batch_sizes: str = flag("", "tokens per step, comma separated; empty is one micro-batch")
    num_iterations: str = flag("300", "steps of a run; several lengths comma separated")
    train_tokens: str = flag("", "tokens of a run in place of steps, the same for every batch size")
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

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "evals", "max_seq_len", "device_batch_size", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ValueError(f"threads must not be negative, got {self.threads}")
        if self.vocab and self.vocab != "bytes" and not self.vocab.isdigit():
            raise ValueError(f"vocab={self.vocab!r} is neither a number of entries nor 'bytes'")
        self.size_list, self.batch_list, self.rates, self.method_list()  # noqa: B018 (they check)
        for batch in self.batch_list:
            self.lengths(batch)

    @property
    def rates(self) -> tuple[float, ...]:
        return learning_rates(self.matrix_lrs, "--matrix-lrs")

    def method_list(self) -> list[Method]:
        return parse_methods(self.methods, self.ranks, self.common)

    @property
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
        if not sizes:
            raise ValueError("sizes is empty: give at least one, such as 4x128")
        return sizes

    @property
    def batch_list(self) -> list[int]:
        """Tokens per step of every batch size."""
        micro = self.device_batch_size * self.max_seq_len
        batches = [_count("batch_sizes", part) for part in split(self.batch_sizes, ",")] or [micro]
        for batch in batches:
            unit = self.max_seq_len if batch < micro else micro
            if batch % unit:
                what = "one sequence" if batch < micro else "one micro-batch"
                raise ValueError(
                    f"batch_sizes: {batch} tokens are no multiple of {what} of {unit} tokens: take "
                    f"{max(1, batch // unit) * unit} or change device_batch_size"
                )
        return batches

    def lengths(self, batch: int) -> list[int]:
        """Steps of every length at a batch size in tokens."""
        if self.train_tokens:
            tokens = [_count("train_tokens", part) for part in split(self.train_tokens, ",")]
            if min(tokens) < batch:
                raise ValueError(f"train_tokens={min(tokens)} are less than a batch of {batch}")
            return [round(count / batch) for count in tokens]
        steps = [_count("num_iterations", part) for part in split(self.num_iterations, ",")]
        if not steps:
            raise ValueError("num_iterations is empty: give a number of steps")
        return steps


def _count(name: str, text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ValueError(f"{name}: {text!r} is no positive integer")
    return int(text)


@dataclass(frozen=True)
class Cell:
    """One method at one size, batch size and length: a row of a table."""

    method: Method
    depth: int
    width: int
    batch: int  # tokens per step
    steps: int
    reference: bool  # dense, which the others are compared with

    @property
    def setting(self) -> tuple[int, int, int, int]:
        """What the cells of one table share."""
        return self.depth, self.width, self.batch, self.steps


@dataclass(frozen=True)
class Text:
    """What all runs read: SHA-256 of the corpus, the tokenizer's name and SHA-256."""

    corpus: str
    name: str
    tokenizer: str


def prepare_text(config: LabConfig) -> Text:
    """Open the corpus; train the tokenizer that --vocab names where it does not exist yet."""
    corpus = open_corpus(config.data).manifest["sha256"]
    name = ""
    if config.vocab:
        entries = 256 + len(SPECIAL_TOKENS) if config.vocab == "bytes" else int(config.vocab)
        name = "bytes" if config.vocab == "bytes" else f"bpe-{entries}-{corpus[:8]}"
        if not (paths.tokenizer_dir(name) / FILE).exists():
            tok_train(TokTrainConfig(vocab_size=entries, data=config.data, tokenizer=name))
    return Text(corpus, name, Tokenizer.load(paths.tokenizer_dir(name)).fingerprint)


def cells(config: LabConfig) -> list[Cell]:
    """All cells, those of one table together, dense first."""
    return [
        Cell(method, depth, width, batch, steps, index == 0)
        for depth, width in config.size_list
        for batch in config.batch_list
        for steps in config.lengths(batch)
        for index, method in enumerate(config.method_list())
    ]


def make_run(
    config: LabConfig, text: Text, cell: Cell, lr: float, seed: int, steps: int = 0
) -> Run:
    """One run of a cell; `steps` in place of the cell's own.

    Raises:
        ValueError: the flags do not go together.
    """
    steps = steps or cell.steps
    rows = min(config.device_batch_size, cell.batch // config.max_seq_len)
    values = {
        "depth": cell.depth,
        "aspect_ratio": cell.width // cell.depth,
        "max_seq_len": config.max_seq_len,
        "device_batch_size": rows,
        "total_batch_size": cell.batch,
        "num_iterations": steps,
        "matrix_lr": lr,
        "seed": seed,
        PREFIX + "seed": seed,
        "data": config.data,
        "tokenizer": text.name,
        "device_type": config.device_type,
        "threads": config.threads,
        "eval_every": -(-steps // config.evals),
        "eval_tokens": config.eval_tokens,
        "monitor_every": -(-steps // config.evals),
        "layer_metrics": False,
        "shadow_every": 0,
        "sample_every": -1,
        "save_every": -2,
        "dashboards": "none",
        "overwrite": True,
        **cell.method.flags,
    }
    settings = BaseTrainConfig(**values)
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
    rising order. best: the record chosen, once nothing is missing. edge: it is the first or last.
    """

    missing: list[Run]
    sweep: list[tuple[float, dict]]
    best: dict | None = None
    lr: float = math.nan
    edge: bool = False


def order(record: dict) -> float:
    """What a lower value of is better; a run that failed ranks last."""
    return record["bpb"] if record["status"] == "ok" else math.inf


def search(config: LabConfig, text: Text, cell: Cell, known: Mapping[str, dict]) -> Search:
    """How far the choice of the cell's learning rate is, by what is known (key -> record)."""
    rates = list(cell.method.rates or config.rates)
    for added in range(EXTENSIONS + 1):
        runs = {lr: make_run(config, text, cell, lr, 0) for lr in rates}
        missing = [run for run in runs.values() if run.key not in known]
        done = [(lr, known[run.key]) for lr, run in runs.items() if run.key in known]
        if missing:
            return Search(missing, done)
        lr, best = min(done, key=lambda pair: (order(pair[1]), pair[0]))
        edge = len(rates) > 1 and lr in (rates[0], rates[-1])
        if not (edge and config.extend_lrs) or added == EXTENSIONS:
            break
        rates = [lr / FACTOR, *rates] if lr == rates[0] else [*rates, lr * FACTOR]
    return Search([], done, best, lr, edge)


def seed_runs(config: LabConfig, text: Text, cell: Cell, lr: float, steps: int = 0) -> list[Run]:
    """The runs of all seeds at one learning rate."""
    return [make_run(config, text, cell, lr, seed, steps) for seed in range(config.seeds)]


def next_runs(config: LabConfig, text: Text, known: Mapping[str, dict]) -> list[Run]:
    """The runs that can be made now; [] when the sweep is complete. Equal runs come once."""
    runs: dict[str, Run] = {}
    for cell in cells(config):
        found = search(config, text, cell, known)
        wanted = found.missing
        if found.best is not None and found.best["status"] == "ok":
            wanted = seed_runs(config, text, cell, found.lr)
        runs |= {run.key: run for run in wanted if run.key not in known}
    return list(runs.values())


def describe(config: LabConfig) -> str:
    """The resolved flags, for the top of a log."""
    return flags.show(config)
