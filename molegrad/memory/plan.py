"""What a training run will hold in memory, part by part, and whether a card has room for it.

    python -m scripts.memory_plan --depth=12 --max-seq-len=8192 --device-batch-size=1 --card=32

It takes every flag of base training and simulates a step (`molegrad.memory.simulate`) of the same
run without MoleGrad and levers, of the run that the flags describe, and, where they set no lever
against activation memory, of that run with one after the other. For each it says the peak by part.
Nothing of the model's size is allocated.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace

import torch

from molegrad import MoleGradConfig
from molegrad.gpt.model.activations import Activations
from molegrad.gpt.train import flags
from molegrad.gpt.train.base import model_config
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.gpt.train.flags import flag
from molegrad.memory.simulate import PARTS, PHASES, simulate
from molegrad.memory.table import table

GIB, MIB = 2**30, 2**20
# Memory of cards in GiB, from the makers' data sheets; the first name that occurs counts.
CARDS = {
    "RTX 5090": 32, "RTX 5080": 16, "RTX 4090": 24, "RTX 4080": 16, "RTX 3090": 24,
    "RTX 6000 Ada": 48, "L40S": 48, "A100 40GB": 40, "A100": 80, "H200": 141, "H100": 80,
    "B200": 180,
}  # fmt: skip
LEVERS = tuple(f.name for f in fields(Activations))
RESERVE_GIB = 1.5  # of a card that a plan leaves alone
PRESET = "balanced"  # of the plan for a run that has neither MoleGrad nor levers
_LARGEST_CARD = 512  # GiB; larger numbers are names, such as 5090


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
    markdown: bool = flag(False, "print the table as Markdown")
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


def variants(config: PlanConfig) -> dict[str, PlanConfig]:
    """The columns of a plan: name -> resolved configuration.

    Dense, the configuration given, and the levers, each added to those before it; where the
    configuration has levers, these alone. One that has neither MoleGrad nor levers is shown with
    the preset balanced.
    """
    off = {f.name: f.default for f in fields(Activations)}
    given = {name: getattr(config, name) for name in LEVERS}
    dense = replace(config, streaming=None, head_rank=0, **off)
    columns = {"dense": dense}
    if config.enable_streaming:
        streaming = config.streaming
        name, base = f"{streaming.method}, {streaming.gradient_mode}", replace(config, **off)
    elif given == off and config.optimizer == "muon" and not config.grad_clip:
        name, base = PRESET, replace(dense, streaming=MoleGradConfig.preset(PRESET))
    else:
        name, base = "dense", dense
    if config.head_rank:
        name, base = f"{name} + head_rank", replace(base, head_rank=config.head_rank)
    columns[name] = base
    if given != off:
        columns[f"{name} + levers given"] = replace(base, **given)
    else:
        levers: dict = {}
        for lever, values in _levers(base).items():
            levers |= values
            name += f" + {lever}"
            columns[name] = replace(base, **levers)
    device = torch.device(config.device_type or "cuda")
    return {name: resolve(entry, device) for name, entry in columns.items()}


def _levers(config: PlanConfig) -> dict[str, dict]:
    """The levers that a configuration can take."""
    streaming, levers = config.streaming, {}
    if streaming is None or streaming.estimator.one_pass:
        levers["chunks"] = {"sequence_chunk": 4096, "sequence_parts": "all"}
    levers["recompute"] = {"recompute": "block"}
    if not config.compile:
        levers["offload"] = {"offload": True}
    return levers


def plan(config: PlanConfig) -> dict:
    """Of every column of `variants` the peak and its parts in bytes, and whether it fits."""
    rows = []
    for name, variant in variants(config).items():
        found = simulate(variant, model_config(variant, config.vocab_size))
        rows.append(
            {
                "variant": name,
                "peak": found.peak,
                "phase": found.phase,
                "parts": found.parts,
                "phases": {phase: found.of(phase) for phase in PHASES},
                "held": found.held,
                "host": found.host,
                "fits": found.peak <= config.budget,
                "levers": {lever: getattr(variant, lever) for lever in LEVERS},
            }
        )
    return {
        "rows": rows,
        "card_bytes": card_bytes(config.card),
        "budget_bytes": config.budget,
        "config": flags.resolved(config),
    }


def shown(result: dict, markdown: bool = False) -> str:
    """What `plan` gave as text: a line for each part, a column for each variant."""
    rows = result["rows"]
    columns = {"MiB at the peak": ("part", "s")}
    columns |= {row["variant"]: (row["variant"], "s") for row in rows}
    lines = [
        {"part": part, **{row["variant"]: f"{row['parts'][part] / MIB:,.1f}" for row in rows}}
        for part in PARTS
        if any(row["parts"][part] for row in rows)
    ]
    for name, value in {
        "peak": lambda row: f"{row['peak'] / MIB:,.0f}",
        "of dense": lambda row: f"{row['peak'] / rows[0]['peak']:.2f}",
        "in the phase": lambda row: row["phase"],
        "pinned host memory": lambda row: f"{row['host'] / MIB:,.0f}",
        "fits": lambda row: "yes" if row["fits"] else "no",
    }.items():
        lines.append({"part": name, **{row["variant"]: value(row) for row in rows}})
    return table(lines, columns, markdown)


@flags.command("memory_plan")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(PlanConfig, argv, prog="python -m scripts.memory_plan")
    result = plan(config)
    first = variants(config)["dense"]
    print(
        f"depth {first.depth}, {first.device_batch_size} x {first.max_seq_len} tokens a "
        f"micro-batch, vocabulary {config.vocab_size}, {first.dtype}, {first.device_type}, eager\n"
        f"card: {result['card_bytes'] / GIB:g} GiB, of which {config.reserve_gib:g} in reserve: "
        f"{config.budget / MIB:,.0f} MiB to use\n"
    )
    print(shown(result, config.markdown))
    if config.json:
        print(json.dumps(result))
    return 0
