"""What the project promises of a GPU, against what was measured there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from molegrad.bench.paths import FORCED
from molegrad.bench.table import table
from molegrad.config import MoleGradConfig
from molegrad.convert import plan
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.lab.methods import parse_methods
from molegrad.targets import layer_role

SHAPE = {"n": 1280, "m": 5120, "tokens": 8192, "k": 32}
DTYPE = "bfloat16"
DEPTH, RANK = 12, 32
BATCH = (1, 8192)  # sequences, tokens
STEP_SHARES = {"feed-forward layers": 0.88, "all linear layers": 0.80}  # of dense's step time
GRADIENT_BYTES = 8.0  # times fewer than dense's


@dataclass(frozen=True)
class Target:
    """A number that is wanted.

    Attributes:
        wanted: at least (`more`) or at most this. measured: None where there is no row of it.
        note: what the measured row is, or what else was measured.
    """

    name: str
    wanted: float
    measured: float | None
    spec: str  # of format()
    more: bool = True
    note: str = ""

    def row(self) -> dict:
        """As JSON and `table` take it."""
        return {
            "name": self.name,
            "wanted": self.wanted,
            "more": self.more,
            "measured": self.measured,
            "result": self.result,
            "note": self.note,
            "wanted_shown": ("≥ " if self.more else "≤ ") + format(self.wanted, self.spec),
            "measured_shown": "" if self.measured is None else format(self.measured, self.spec),
        }

    @property
    def result(self) -> str:
        if self.measured is None or math.isnan(self.measured):
            return "not measured"
        met = self.measured >= self.wanted if self.more else self.measured <= self.wanted
        return "met" if met else "not met"


def targets(grad: dict | None, step: dict | None) -> list[dict]:
    """A row for every target: name, wanted, measured (None where it is not), result, note.

    Args:
        grad, step: results of `molegrad.bench.grad.bench` and `molegrad.bench.step.bench`, or None.
            Those of another device than a GPU, or of other sizes, measure no target.
    """
    on_gpu = grad is not None and grad["config"]["device"].startswith("cuda")
    products = grad["gradients"] if on_gpu and grad["config"]["dtype"] == DTYPE else []
    bases = grad["bases"] if on_gpu else []
    of_gpu = step is not None and step["config"]["device"].startswith("cuda")
    measured = step if of_gpu and step["config"]["depth"] == DEPTH else None
    found = [*_product_targets(products), _bases_target(bases), *_step_targets(measured)]
    return [target.row() for target in found]


def shown(rows: list[dict]) -> str:
    """The rows of `targets` as Markdown."""
    columns = {
        "target": ("name", "s"), "wanted": ("wanted_shown", "s"),
        "measured": ("measured_shown", "s"), "result": ("result", "s"), "note": ("note", "s"),
    }  # fmt: skip
    return table(rows, markdown=True, columns=columns)


def _product_targets(rows: list[dict]) -> list[Target]:
    where = "{n}x{m}, T = {tokens}, k = {k}, ".format(**SHAPE) + DTYPE
    mine = [row for row in rows if all(row.get(key) == x for key, x in SHAPE.items())]

    def measured(op: str, key: str) -> tuple[float | None, str]:
        """Of the native row, and where a forced way is faster, which."""
        of_op = [row for row in mine if row.get("op") == op and row.get(key) is not None]
        native = next((row for row in of_op if row["how"] == "native"), None)
        others = [row for row in of_op if row["how"] in FORCED]
        best = max(others, key=lambda row: row[key], default=None)
        if native is None:
            unmeasured = (r for r in mine if r.get("op") == op and r.get("how") == "native")
            return None, next((row.get("note", "") for row in unmeasured), "")
        better = best is not None and best[key] > native[key]
        return native[key], f"{best['how']}: {best[key]:.2f}" if better else ""

    speed, of_floor, power = (
        measured(op, key)
        for op, key in (("sketch", "vs_dense"), ("sketch", "of_floor"), ("power", "vs_dense"))
    )
    return [
        Target(f"one-pass sketch, times as fast as dense ({where})", 2.5, speed[0], ".2f",
               note=speed[1]),
        Target("the same, share of the memory's bandwidth", 0.65, of_floor[0], ".0%",
               note=of_floor[1]),
        Target(f"power, times as fast as dense ({where})", 1.6, power[0], ".2f", note=power[1]),
    ]  # fmt: skip


def _bases_target(rows: list[dict]) -> Target:
    sizes = {"depth": DEPTH, "k": RANK, "how": "native", "op": "orthonormalize"}
    mine = [row for row in rows if all(row.get(key) == x for key, x in sizes.items())]
    measured, note = None, ""
    if mine:
        measured, note = mine[0].get("us_p50"), mine[0].get("note", "")
    name = f"bases of all layers of a d{DEPTH} made orthonormal, k = {RANK}, µs a step"
    return Target(name, 150.0, measured, ".0f", more=False, note=note)


def _step_targets(step: dict | None) -> list[Target]:
    rows = [] if step is None else step["rows"]
    rows = [row for row in rows if (row["sequences"], row["tokens"]) == BATCH and "ratio" in row]
    configs = {row["method"]: _streaming_config(row["method"]) for row in rows}
    taken = {
        method: _layers_taken(config, step["config"]["depth"], step["config"]["aspect_ratio"])
        for method, config in configs.items()
        if config is not None
    }
    where = "{}x{} tokens".format(*BATCH)
    found = []
    for layers, share in STEP_SHARES.items():
        mine = [row for row in rows if taken.get(row["method"]) == layers]
        best = min(mine, key=lambda row: row["ratio"], default=None)
        name = f"training step of a d{DEPTH}, {where}, {layers} converted, share of dense's time"
        note = "" if best is None else best["method"] + (", compiled" if best["compiled"] else "")
        measured = None if best is None else best["ratio"]
        found.append(Target(name, share, measured, ".2f", more=False, note=note))
    dense = next((row for row in rows if row["method"] == "dense"), None)
    modes = [row for row in rows if _modes_only(configs[row["method"]]) and row["gradients_mib"]]
    least = min(modes, key=lambda row: row["gradients_mib"], default=None)
    measured, note = None, ""
    if dense is not None and least is not None:
        measured, note = dense["gradients_mib"] / least["gradients_mib"], least["method"]
    name = f"gradient bytes of a d{DEPTH} that keeps modes only, times fewer than dense's"
    return [*found, Target(name, GRADIENT_BYTES, measured, ".1f", note=note)]


def _streaming_config(method: str) -> MoleGradConfig | None:
    """What MoleGrad does in a method, named as `molegrad.lab.methods` does; None for others."""
    flags = parse_methods(method)[-1].flags
    return BaseTrainConfig(**flags).streaming_config()


def _modes_only(config: MoleGradConfig | None) -> bool:
    """Whether all that arises of a converted layer's gradient are its sketches."""
    return config is not None and config.gradient_mode == "factors"


def _layers_taken(config: MoleGradConfig, depth: int, aspect_ratio: int) -> str | None:
    """Which layers of the benchmark's model are converted, a key of STEP_SHARES; None: others."""
    with torch.device("meta"):
        model = GPT(GPTConfig(depth, aspect_ratio, max_seq_len=1))
    roles: dict[bool, set[str]] = {True: set(), False: set()}
    for layer in plan(model, config).layers:
        roles[layer.reason is None].add(layer_role(layer.name))
    if roles[False] <= {"head"}:
        return "all linear layers"
    only_ffn = roles[True] == {"ffn"} and "ffn" not in roles[False]
    return "feed-forward layers" if only_ffn else None
