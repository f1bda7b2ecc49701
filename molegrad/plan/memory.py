"""What a training run will hold in memory, part by part, and what fits a card.

    python -m scripts.memory_plan --depth=12 --max-seq-len=8192 --device-batch-size=1 --card=32

It takes every flag of base training and simulates a step of exactly that run
(`molegrad.plan.simulate`), of the same run without MoleGrad and levers, and of the steps between
them. For each it says the peak by part, the longest sequence and the largest depth that the card
holds, all other flags the same. Nothing of the model's size is allocated.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from molegrad.bench.table import table
from molegrad.config import PRESETS
from molegrad.gpt.model.activations import Activations
from molegrad.gpt.train import flags
from molegrad.gpt.train.base import model_config
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.gpt.train.flags import PREFIX, flag
from molegrad.plan.simulate import PARTS, PHASES, Simulation, simulate

GIB, MIB = 2**30, 2**20
Say = Callable[[str], None]
# Memory of cards in GiB, from the makers' data sheets; the first name that occurs counts.
CARDS = {
    "RTX 5090": 32, "RTX 5080": 16, "RTX 4090": 24, "RTX 4080": 16, "RTX 3090": 24,
    "RTX 6000 Ada": 48, "L40S": 48, "A100 40GB": 40, "A100": 80, "H200": 141, "H100": 80,
    "B200": 180,
}  # fmt: skip
LEVERS = tuple(f.name for f in fields(Activations))
STREAMED = {"sequence_chunk": 4096, "sequence_parts": "all"}
NEEDS_WHOLE_INPUT = ("power", "projected")  # methods that cannot run in chunks (molegrad.chunked)
RESERVE_GIB = 1.5  # of a card that a plan leaves alone
_STEP = 128  # tokens: sequences are found to that
_LONGEST, _DEEPEST = 2**22, 512
_LARGEST_CARD = 512  # GiB; larger numbers are names, such as 5090


def _silent(_) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class PlanConfig(BaseTrainConfig):
    """Predict the peak memory of a training run from its flags.

    Raises:
        ValueError: an unknown card, or a size out of range.
    """

    card: str = flag("RTX 5090", f"the card's memory in GiB, or one of {', '.join(CARDS)}")
    reserve_gib: float = flag(
        RESERVE_GIB,
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
    """Bytes of a card given as a number of GiB ("32", "32GB"), alone or within a name, or by its
    name.

    Raises:
        ValueError: neither, or a number that no card has.
    """
    text = card.strip().lower()
    size = re.fullmatch(r"\d+(?:\.\d+)?", text) or re.search(r"(?<![\w.])([\d.]+)\s*gi?b\b", text)
    if size:
        gib = float(size[size.lastindex or 0])
        if 0 < gib <= _LARGEST_CARD:
            return int(gib * GIB)
        meant = [name for name in CARDS if size[0] in name]
        hint = f", or its name, {' or '.join(map(repr, meant))}" if meant else ""
        raise ValueError(
            f"card={card!r} would have {gib:,g} GiB, and 0 to {_LARGEST_CARD} are wanted: give the "
            f"card's memory{hint}"
        )
    if re.search(r"laptop|mobile|max-?q", text):
        raise ValueError(
            f"card={card!r}: laptops' cards have other sizes than their namesakes: give GiB"
        )
    for name, gib in CARDS.items():
        if _squeezed(name) in _squeezed(text):
            return gib * GIB
    known = ", ".join(CARDS)
    raise ValueError(f"card={card!r} is neither a number of GiB nor known: choose among {known}")


def _squeezed(name: str) -> str:
    """A card's name however it is spelt."""
    return re.sub(r"[\s_-]", "", name.lower())


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
    dense = replace(config.dense(), head_rank=0, **off)
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
        for lever, values in _levers(base):
            levers |= values
            name += f" + {lever}"
            named.append((name, replace(base, **levers)))
    device = torch.device(config.device_type or "cuda")
    return [Variant(name, resolve(entry, device)) for name, entry in named]


def _levers(config: PlanConfig) -> list[tuple[str, dict]]:
    """The levers that a configuration can take, each added to those before it."""
    streaming = config.streaming_config()
    whole = streaming is not None and streaming.method in NEEDS_WHOLE_INPUT
    return [
        *([] if whole else [("chunks", STREAMED)]),
        ("recompute", {"recompute": "block"}),
        *([] if config.compile else [("offload", {"offload": True})]),
    ]


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
    config: BaseTrainConfig, budget: int, vocab_size: int, say: Say = _silent
) -> tuple[int, int] | None:
    """The longest sequence, in steps of 128 tokens, whose peak is within `budget` bytes, and that
    peak, simulated; None where not even 128 tokens fit. What is left of the budget is under 1%.
    `say` is told what was tried."""

    def peak(steps: int) -> int:
        tokens = steps * _STEP
        found = simulated(sequences_of(config, tokens), vocab_size).peak
        say(f"{tokens:,} tokens: {found / MIB:,.0f} MiB")
        return found

    start = max(1, config.max_seq_len // _STEP)
    found = _largest(peak, budget, start, _LONGEST // _STEP, enough=0.99)
    return None if found is None else (found[0] * _STEP, found[1])


def largest_depth(
    config: BaseTrainConfig, budget: int, vocab_size: int, say: Say = _silent
) -> tuple[int, int] | None:
    """The largest depth (with the width that belongs to it) whose peak is within `budget` bytes,
    and that peak, simulated; None where no depth fits. `say` is told what was tried."""

    def peak(depth: int) -> int:
        found = simulated(replace(config, depth=depth), vocab_size).peak
        say(f"depth {depth}: {found / MIB:,.0f} MiB")
        return found

    def rough(depth: int) -> int:
        found = _by_blocks(replace(config, depth=depth), vocab_size)
        say(f"depth {depth}: about {found / MIB:,.0f} MiB")
        return found

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


def plan(config: PlanConfig, say: Say = _silent, first: Callable[[dict], None] = _silent) -> dict:
    """Every variant's peak and parts in bytes, and what fits the card.

    Args:
        say: is told what is simulated, a line each. first: is given the result before the search
            for what fits, which takes most of the time.
    """
    rows, columns = [], variants(config)
    searched = {"none": [], "all": columns, "ends": [columns[0], columns[-1]]}[config.search]
    for variant in columns:
        found = simulated(variant.config, config.vocab_size)
        say(f"{variant.name}: {found.peak / MIB:,.0f} MiB")
        rows.append(
            {
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
        )
    result = {
        "rows": rows,
        "card_bytes": card_bytes(config.card),
        "budget_bytes": config.budget,
        "config": flags.resolved(config),
    }
    first(result)
    for variant, row in zip(columns, rows, strict=True):
        if variant not in searched:
            continue
        limits = (variant.config, config.budget, config.vocab_size)
        tell = lambda line, name=variant.name: say(f"{name}, {line}")  # noqa: E731
        row["longest_sequence"] = _found(longest_sequence(*limits, tell))
        row["largest_depth"] = _found(largest_depth(*limits, tell))
    return result


def _found(answer: tuple[int, int] | None) -> dict | None:
    return None if answer is None else {"value": answer[0], "peak": answer[1]}


def shown(result: dict, markdown: bool = False) -> str:
    """The peaks of `plan` as text: a line for each part, a column for each variant."""
    rows = result["rows"]
    columns = {"MiB at the peak": ("part", "s")}
    columns |= {row["variant"]: (row["variant"], "s") for row in rows}

    def line(name: str, value: Callable[[dict], str]) -> dict:
        return {"part": name, **{row["variant"]: value(row) for row in rows}}

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
    return table(lines, markdown, columns)


def shown_limits(result: dict, markdown: bool = False) -> str:
    """What `plan` has found to fit the card as text; empty where it has not searched."""
    rows = [row for row in result["rows"] if "longest_sequence" in row]
    columns = {"what fits": ("limit", "s")}
    columns |= {row["variant"]: (row["variant"], "s") for row in rows}
    lines = [
        {"limit": name, **{row["variant"]: _number(row[key]) for row in rows}}
        for name, key in (("longest sequence", "longest_sequence"), ("depth", "largest_depth"))
    ]
    return table(lines, markdown, columns) if rows else ""


def _number(answer: dict | None) -> str:
    return "none" if answer is None else f"{answer['value']:,}"


@flags.command("memory_plan")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(PlanConfig, argv, prog="python -m scripts.memory_plan")

    def peaks(result: dict) -> None:
        first = variants(config)[0].config
        print(
            f"depth {first.depth}, {first.device_batch_size} x {first.max_seq_len} tokens a "
            f"micro-batch, vocabulary {config.vocab_size}, {first.dtype}, {first.device_type}, "
            f"eager\ncard: {result['card_bytes'] / GIB:g} GiB, of which {config.reserve_gib:g} in "
            f"reserve: {config.budget / MIB:,.0f} MiB to use\n"
        )
        print(shown(result, config.markdown), flush=True)

    result = plan(config, lambda line: print(f"  {line}", file=sys.stderr, flush=True), peaks)
    limits = shown_limits(result, config.markdown)
    if limits:
        print(f"\n{limits}")
    if config.json:
        print(json.dumps(result))
    return 0
