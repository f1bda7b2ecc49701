"""What a training run will hold in memory, part by part, and what fits a card.

    python -m scripts.memory_plan --depth=12 --max-seq-len=8192 --device-batch-size=1 --card=32

It takes every flag of base training and simulates a step of exactly that run
(`molegrad.gpt.memory_sim`), of the same run without MoleGrad and levers, and of the steps between
them. For each it says the peak by part, the longest sequence and the largest depth that the card
holds, all other flags the same. Nothing of the model's size is allocated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from molegrad.bench.table import table
from molegrad.config import PRESETS
from molegrad.gpt import flags
from molegrad.gpt.activations import Activations
from molegrad.gpt.flags import PREFIX, flag
from molegrad.gpt.memory_sim import PARTS, PHASES, Simulation, simulate
from molegrad.gpt.train import model_config
from molegrad.gpt.train_config import BaseTrainConfig, resolve

GIB, MIB = 2**30, 2**20
# Memory of cards in GiB, from the makers' data sheets; the first name that occurs counts.
CARDS = {
    "RTX 5090": 32, "RTX 5080": 16, "RTX 4090": 24, "RTX 4080": 16, "RTX 3090": 24,
    "RTX 6000 Ada": 48, "L40S": 48, "A100 40GB": 40, "A100": 80, "H200": 141, "H100": 80,
    "B200": 180,
}  # fmt: skip
LEVERS = tuple(f.name for f in fields(Activations))
STREAMED = {"sequence_chunk": 4096, "sequence_parts": "all"}
_STEP = 128  # tokens: sequences are found to that
_LONGEST, _DEEPEST = 2**22, 512


@dataclass(frozen=True)
class PlanConfig(BaseTrainConfig):
    """Predict the peak memory of a training run from its flags.

    Raises:
        ValueError: an unknown card, or a size out of range.
    """

    card: str = flag("RTX 5090", f"the card's memory in GiB, or one of {', '.join(CARDS)}")
    reserve_gib: float = flag(
        1.5,
        "GiB of the card to leave alone: the driver's context, workspaces of the libraries, and "
        "what the allocator's blocks leave between them",
    )
    vocab_size: int = flag(32768, "entries of the tokenizer")
    search: Literal["ends", "all", "none"] = flag(
        "ends",
        "find the longest sequence and the largest depth that fit: for the first and the last "
        "column, for all of them or for none",
    )
    markdown: bool = flag(False, "print the tables as Markdown")
    json: bool = flag(False, "print one JSON object as the last line")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}")
        if not 0 <= self.reserve_gib < card_bytes(self.card) / GIB:
            raise ValueError(
                f"reserve_gib={self.reserve_gib} must lie between 0 and the "
                f"{card_bytes(self.card) / GIB:g} GiB of card={self.card}"
            )

    @property
    def budget(self) -> int:
        """Bytes that a run may take."""
        return int(card_bytes(self.card) - self.reserve_gib * GIB)


def card_bytes(card: str) -> int:
    """Bytes of a card given as a number of GiB ("32", "32GB") or by its name.

    Raises:
        ValueError: neither.
    """
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b)?", card.strip().lower())
    if number and float(number[1]) > 0:
        return int(float(number[1]) * GIB)
    for name, gib in CARDS.items():
        if name.lower() in card.lower():
            return gib * GIB
    known = ", ".join(CARDS)
    raise ValueError(f"card={card!r} is neither a number of GiB nor known: choose among {known}")


@dataclass(frozen=True)
class Variant:
    """One column of the plan: a name, and the resolved configuration that it stands for."""

    name: str
    config: PlanConfig


def variants(config: PlanConfig) -> list[Variant]:
    """Dense, and from there to the configuration given; where that has neither MoleGrad nor levers,
    to the preset balanced with all of them."""
    off = {f.name: f.default for f in fields(Activations)}
    given = {name: getattr(config, name) for name in LEVERS}
    dense = replace(config, enable_streaming=False, head_rank=0, **off)
    named = [("dense", dense), ("dense + recompute", replace(dense, recompute="block"))]
    if config.enable_streaming:
        name, base = _method_name(config), replace(config, **off)
    elif config.optimizer == "muon" and not config.grad_clip:
        preset = {PREFIX + key: value for key, value in PRESETS["balanced"].items()}
        name, base = "balanced", replace(dense, enable_streaming=True, **preset)
    else:  # the preset needs Muon
        name, base = "dense", dense
    if config.head_rank:
        name, base = f"{name} + head_rank", replace(base, head_rank=config.head_rank)
    if base is not dense:
        named.append((name, base))
    if given != off:
        named.append((f"{name} + levers given", replace(base, **given)))
    else:
        levers: dict = {}
        for lever, values in (
            ("chunks", STREAMED),
            ("recompute", {"recompute": "block"}),
            ("offload", {"offload": True}),
        ):
            levers |= values
            name += f" + {lever}"
            named.append((name, replace(base, **levers)))
    device = torch.device(config.device_type or "cuda")
    return [Variant(name, resolve(entry, device)) for name, entry in named]


def _method_name(config: PlanConfig) -> str:
    """The preset that the streaming flags are, or else their mode and method."""
    streaming = config.streaming_config()
    for name, values in PRESETS.items():
        if all(getattr(streaming, key) == value for key, value in values.items()):
            return name
    return f"{streaming.gradient_mode}-{streaming.method}"


def sequences_of(config: BaseTrainConfig, tokens: int) -> BaseTrainConfig:
    """The configuration with sequences of that length, accumulated if they were before."""
    micro = config.device_batch_size * config.max_seq_len
    several = 2 if config.total_batch_size > micro else 1
    total = several * config.device_batch_size * tokens
    return replace(config, max_seq_len=tokens, total_batch_size=total)


def simulated(config: BaseTrainConfig, vocab_size: int) -> Simulation:
    """A step of the run that the flags describe."""
    return simulate(config, model_config(config, vocab_size))


def longest_sequence(
    config: BaseTrainConfig, budget: int, vocab_size: int
) -> tuple[int, int] | None:
    """The longest sequence, in steps of 128 tokens, whose peak is within `budget` bytes, and that
    peak, simulated; None where not even 128 tokens fit. What is left of the budget is under 1%."""

    def peak(steps: int) -> int:
        return simulated(sequences_of(config, steps * _STEP), vocab_size).peak

    start = max(1, config.max_seq_len // _STEP)
    found = _largest(peak, budget, start, _LONGEST // _STEP, enough=0.99)
    return None if found is None else (found[0] * _STEP, found[1])


def largest_depth(config: BaseTrainConfig, budget: int, vocab_size: int) -> tuple[int, int] | None:
    """The largest depth (with the width that belongs to it) whose peak is within `budget` bytes,
    and that peak, simulated; None where no depth fits."""

    def peak(depth: int) -> int:
        return simulated(replace(config, depth=depth), vocab_size).peak

    def rough(depth: int) -> int:
        return _by_blocks(replace(config, depth=depth), vocab_size)

    near = _largest(rough, budget, config.depth, _DEEPEST)
    depth = 1 if near is None else near[0]
    known: dict[int, int] = {}
    while depth and (known.setdefault(depth, peak(depth))) > budget:
        depth -= 1
    while depth and depth + 1 not in known and depth < _DEEPEST:
        known[depth + 1] = peak(depth + 1)
        depth += known[depth + 1] <= budget
    return (depth, known[depth]) if depth else None


def _by_blocks(config: BaseTrainConfig, vocab_size: int) -> int:
    """The peak of a deep model from two of few blocks of its width: what blocks hold adds up."""
    few, more = 2, 4
    if config.depth <= more:
        return simulated(config, vocab_size).peak
    sizes = model_config(config, vocab_size)  # whose width is a multiple of 32
    a, b = (
        simulate(config, replace(sizes, depth=n, aspect_ratio=sizes.width // n))
        for n in (few, more)
    )
    share = (config.depth - few) / (more - few)
    return int(max(a.of(p) + (b.of(p) - a.of(p)) * share for p in PHASES))


def _largest(
    peak: Callable[[int], int], budget: int, start: int, most: int, enough: float = 1.0
) -> tuple[int, int] | None:
    """The largest whole number from 1 to `most` with peak(number) <= budget, and its peak, or one
    whose peak is `enough` of the budget; None where there is none. `peak` rises."""
    fitting: list[tuple[int, int]] = []
    over: tuple[int, int] | None = None
    guess = min(start, most)
    while True:
        value = peak(guess)
        if value > budget:
            over = (guess, value)
        else:
            fitting.append((guess, value))
        low, high = fitting[-1][0] if fitting else 0, over[0] if over else most + 1
        if high - low <= 1 or (fitting and fitting[-1][1] >= enough * budget):
            return fitting[-1] if fitting else None
        if not fitting:
            guess = high // 2
            continue
        # Peaks bend upwards: beyond two points the line through them errs on the high side, and
        # between two on the low side.
        points = [*fitting[-1:], over] if over else fitting[-2:]
        if len(points) < 2:
            guess = 2 * low
        else:
            (x, y), (x2, y2) = points
            guess = int(x + (budget - y) * (x2 - x) / max(1, y2 - y))
            guess = min(guess, 16 * low)
        guess = min(max(guess, low + 1), high - 1)


def plan(config: PlanConfig) -> dict:
    """Every variant's peak and parts in bytes, and what fits the card."""
    rows, columns = [], variants(config)
    searched = {"none": [], "all": columns, "ends": [columns[0], columns[-1]]}[config.search]
    limits = (config.budget, config.vocab_size)
    for variant in columns:
        found = simulated(variant.config, config.vocab_size)
        row = {
            "variant": variant.name,
            "peak": found.peak,
            "phase": found.phase,
            "parts": found.parts,
            "phases": {phase: found.of(phase) for phase in PHASES},
            "held": found.held,
            "host": found.host,
            "fits": found.peak <= config.budget,
            "levers": {name: getattr(variant.config, name) for name in LEVERS},
        }
        if variant in searched:
            row["longest_sequence"] = _found(longest_sequence(variant.config, *limits))
            row["largest_depth"] = _found(largest_depth(variant.config, *limits))
        rows.append(row)
    return {
        "rows": rows,
        "card_bytes": card_bytes(config.card),
        "budget_bytes": config.budget,
        "config": flags.resolved(config),
    }


def _found(answer: tuple[int, int] | None) -> dict | None:
    return None if answer is None else {"value": answer[0], "peak": answer[1]}


def shown(result: dict, markdown: bool = False) -> str:
    """The result of `plan` as text: a line for each part, a column for each variant."""
    rows = result["rows"]
    columns = {"MiB at the peak": ("part", "s")}
    columns |= {row["variant"]: (row["variant"], "s") for row in rows}

    def line(name: str, value: Callable[[dict], str]) -> dict:
        return {"part": name, **{row["variant"]: value(row) for row in rows}}

    def answer(key: str) -> Callable[[dict], str]:
        def text(row: dict) -> str:
            if key not in row:
                return ""
            if row[key] is None:
                return "none"
            return f"{row[key]['value']:,}"

        return text

    lines = [
        line(part, lambda row, part=part: f"{row['parts'][part] / MIB:,.1f}")
        for part in PARTS
        if any(row["parts"][part] for row in rows)
    ]
    lines.append(line("peak", lambda row: f"{row['peak'] / MIB:,.0f}"))
    lines.append(line("of dense", lambda row: f"{row['peak'] / rows[0]['peak']:.2f}"))
    lines.append(line("in the phase", lambda row: row["phase"]))
    if any(row["host"] for row in rows):
        lines.append(line("pinned host memory", lambda row: f"{row['host'] / MIB:,.0f}"))
    lines.append(line("fits", lambda row: "yes" if row["fits"] else "no"))
    if "longest_sequence" in rows[0]:
        lines.append(line("longest sequence", answer("longest_sequence")))
        lines.append(line("largest depth", answer("largest_depth")))
    return table(lines, markdown, columns)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(PlanConfig, argv, prog="python -m scripts.memory_plan")
    result = plan(config)
    first = variants(config)[0].config
    print(
        f"depth {first.depth}, {first.device_batch_size} x {first.max_seq_len} tokens a "
        f"micro-batch, vocabulary {config.vocab_size}, {first.dtype}, {first.device_type}, eager"
    )
    print(
        f"card: {result['card_bytes'] / GIB:g} GiB, of which {config.reserve_gib:g} in reserve: "
        f"{config.budget / MIB:,.0f} MiB to use\n"
    )
    print(shown(result, config.markdown))
    if config.json:
        print(json.dumps(result))
    return 0
