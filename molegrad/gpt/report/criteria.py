"""The criteria that a validation judges a pair of runs by, dense and MoleGrad."""

import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from molegrad.gpt.report.record import RunRecord, differences
from molegrad.gpt.report.report import number
from molegrad.gpt.train.flags import flag

DENSE, MOLEGRAD = "dense", "molegrad"
Samples = dict[str, list[tuple[str, str]]]  # {"dense" and "molegrad": [(prompt, continuation)]}
ALARMS = ("nan", "exploding")  # kinds of health findings that no validation may have


@dataclass(frozen=True)
class Limits:
    """What the criteria are held to."""

    limit: float = flag(1.0, "percent of bits per byte that MoleGrad may lie above dense")
    outer_limit: float = flag(5.0, "the outer limit of the same, a criterion of its own")
    loss_margin: float = flag(5.0, "percent that the loss's last tenth must lie below its first")
    rise_limit: float = flag(10.0, "percent that the loss's last tenth may lie above its lowest")
    memory_factor: float = flag(4.0, "times less memory for gradients of converted layers")
    time_limit: float = flag(20.0, "percent that the median step may take longer than dense's")
    condition_limit: float = flag(1e6, "largest condition number of the kept modes (a median)")
    energy_floor: float = flag(0.5, "share of a layer's first energy capture to keep at the end")


@dataclass(frozen=True)
class Criterion:
    """One condition. met: None where it does not apply. how: how value and limit come about."""

    name: str
    met: bool | None
    value: float | None
    limit: float
    how: str

    @property
    def cells(self) -> list[str]:
        """How it stands, name, value, limit and how, as text."""
        word = {True: "met", False: "not met", None: "does not apply"}[self.met]
        return [word, self.name, number(self.value), number(self.limit), self.how]

    def to_dict(self) -> dict:
        """As JSON-able values; a number that is not finite as text."""
        finite = self.value is None or math.isfinite(self.value)
        return {**dataclasses.asdict(self), "value": self.value if finite else str(self.value)}


def judge(
    limits: Limits,
    steps: int,
    errors: dict[str, str],
    dense: RunRecord,
    low: RunRecord,
    samples: Samples,
) -> list[Criterion]:
    """All criteria. What is not recorded is not met; what a method does not have does not apply.

    Args:
        steps: asked for. errors: {"dense" and "molegrad": why training failed, "" where it did
            not}. dense, low: what the runs left behind.
    """
    runs, found = {DENSE: dense, MOLEGRAD: low}, []

    def add(name: str, value, how: str, least=None, most=None, good=True, applies=True) -> None:
        limit = most if least is None else least
        within = value is not None and (value <= limit if least is None else value >= limit)
        how += "; limit: most" if least is None else "; limit: least"
        met = bool(good and within) if applies else None
        found.append(Criterion(name, met, value, limit, how))

    for name, record in runs.items():
        how = f"last step recorded, of those asked for; {errors[name]}".rstrip("; ")
        add(f"ended/{name}", record.last("step"), how, least=steps, good=not errors[name])
    differ = differences(list(runs.values()))
    how = "; ".join(["settings in which the runs differ, other than the method", *differ])
    add("same_conditions", len(differ), how, most=0)
    for name, record in runs.items():
        fall, rise = loss_changes(record.series("train/loss_raw")[1])
        how = "% that the mean training loss at the end of the run (last tenth) is"
        add(f"loss/{name}/falls", fall, f"{how} below the first tenth's", least=limits.loss_margin)
        add(f"loss/{name}/rises", rise, f"{how} above the lowest tenth's", most=limits.rise_limit)

    logged = [(f"{record.label} step {line.get('step')}: {key}", value)
              for record in runs.values() for line in record.metrics
              for key, value in line.items()]  # fmt: skip
    odd = [where for where, value in logged if not math.isfinite(float(value))]
    how = "; first: ".join([f"numbers that are not finite, of {len(logged):,} logged", *odd[:1]])
    add("metrics/finite", len(odd), how, most=0, good=bool(logged))
    checked, empty = bool(low.series("health/findings")[1]), not low.metrics
    alarms = [f"step {one['step']}, {one.get('layer')}: {one.get('message')}"
              for one in low.health() if one.get("kind") in ALARMS]  # fmt: skip
    how = "; first: ".join([f"findings of the kinds {' and '.join(ALARMS)}", *alarms[:1]])
    count = len(alarms) if checked else None
    add("metrics/health", count, how, most=0, applies=checked or empty)
    medians = {n: statistics.median(v) for n, v in readings(low, "condition_number").items()}
    layer, value = max(medians.items(), key=lambda item: item[1], default=("none logged", None))
    how = f"largest over layers of the median over the run's readings: {layer}"
    applies = bool(medians) or empty
    add("metrics/condition_number", value, how, most=limits.condition_limit, applies=applies)
    quarters = {n: parts(v, 4) for n, v in readings(low, "energy_capture").items() if len(v) > 1}
    kept = {n: q[-1] / q[0] if q[0] else math.inf for n, q in quarters.items()}
    layer, value = min(kept.items(), key=lambda item: item[1], default=("none logged", None))
    how = f"least over layers of the mean of the last quarter over that of the first: {layer}"
    applies = bool(kept) or empty
    add("metrics/energy_capture", value, how, least=limits.energy_floor, applies=applies)

    ends = [record.last("val/bpb") for record in runs.values()]
    gap = None if None in ends else 100 * (ends[1] / ends[0] - 1)
    how = "% that held-out bits per byte at the end lie above dense's, one seed: "
    how += f"{number(ends[1])} against {number(ends[0])}"
    add("quality", gap, how, most=limits.limit)
    add("quality/outer", gap, how, most=limits.outer_limit)
    how = "times that gradients of the converted layers take less memory than dense ones"
    add("memory/gradients", gradient_factor(low), how, least=limits.memory_factor)
    times = [record.settled("train/dt") for record in runs.values()]
    longer = None if None in times else 100 * (times[1][1] / times[0][1] - 1)
    how = "% that the median step takes longer than dense's; the runs came one by one"
    add("time", longer, how, most=limits.time_limit)
    for name, texts in samples.items():
        count = sum(is_text(continuation) for _, continuation in texts)
        how = f"prompts, of {len(texts)}, that the saved model goes on with text"
        add(f"samples/{name}", count, how, least=1)
    return found


def loss_changes(losses: Sequence[float]) -> tuple[float | None, float | None]:
    """Percent that the last tenth's mean lies below the first's and above the lowest. Tenths of
    less than 10 losses give way to fewer and longer stretches, two at least."""
    if len(losses) < 2:
        return None, None
    means = parts(losses, max(2, min(10, len(losses) // 10)))
    return 100 * (1 - means[-1] / means[0]), 100 * (means[-1] / min(means) - 1)


def readings(record: RunRecord, key: str) -> dict[str, list[float]]:
    """A metric's values by layer: its own, those of shadow layers, or the mean over layers."""
    layers = record.layers(key, "shadow") | record.layers(key)
    mean = record.series(f"streaming/{key}")[1]
    by_layer = {name: values for name, (_, values) in layers.items()}
    return by_layer or ({"mean over layers": mean} if mean else {})


def gradient_factor(record: RunRecord) -> float | None:
    """Bytes of dense gradients of the converted layers over those that are held in their place;
    inf where there are none, None where that was not logged."""
    saved = {name: values[-1] for name, (_, values) in record.layers("memory_saved_mb").items()}
    model = record.model() if saved else None
    if model is None:
        return None
    size = 2 if record.config.get("weight_dtype") == "bfloat16" else 4
    full = sum(model.get_submodule(name).weight.numel() for name in saved) * size / 2**20
    held = full - sum(saved.values())
    return full / held if held > 1e-6 * full else math.inf


def is_text(text: str) -> bool:
    """Whether it has a word of two letters, at least half of it (without white space) is letters
    and digits, and nothing in it cannot be printed."""
    seen = "".join(text.split())
    half = 2 * sum(map(str.isalnum, seen)) >= len(seen)
    word = re.search(r"[^\W\d_]{2}", text)
    return bool(word) and half and seen.isprintable() and "\ufffd" not in seen


def parts(values: Sequence[float], count: int) -> list[float]:
    """Means of `count` equal stretches of the values, or of each value where there are fewer."""
    count = min(count, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
