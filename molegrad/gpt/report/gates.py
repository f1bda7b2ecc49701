"""The gates of a validation: what two finished runs must show, and by how much they do.

    gates = judge(config, dense, molegrad, predicted, samples)

Each `Gate` has a value, the limit that it is held to, and how both come about. Gates are pure
functions of what the runs recorded. A gate that has no meaning for a method (the condition number
where there is no subspace) is neither met nor failed: `met` is None.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from molegrad.gpt.report.method_plots import record_layers, why_absent
from molegrad.gpt.report.record import RunRecord, differences
from molegrad.gpt.train.flags import flag

PARTS = ("weights", "bases", "gradients", "optimizer_state")
MIB = 2**20
ALARMS = ("nan", "exploding")  # kinds of health findings that no validation may have


@dataclass(frozen=True)
class Gate:
    """One condition. met: None where it does not apply."""

    name: str
    met: bool | None
    value: float | str | None
    limit: float | str | None
    how: str

    @property
    def word(self) -> str:
        """How it stands, for people."""
        return {True: "met", False: "not met", None: "does not apply"}[self.met]

    @property
    def cells(self) -> list[str]:
        """Name, value, limit and how, as text."""
        shown = [
            "" if x is None else f"{x:,.4g}" if isinstance(x, (int, float)) else str(x)
            for x in (self.value, self.limit)
        ]
        return [self.name, *shown, self.how]

    def to_dict(self) -> dict:
        """The gate as JSON-able values; a number that is not finite as text."""
        odd = {"value": self.value, "limit": self.limit}
        odd = {k: str(v) for k, v in odd.items() if isinstance(v, float) and not math.isfinite(v)}
        return {**asdict(self), **odd}


@dataclass(frozen=True)
class Limits:
    """What the gates are held to; the flags of `molegrad.gpt.report.validate.ValidateConfig`."""

    limit: float = flag(1.0, "percent of bits per byte that MoleGrad may lie above dense")
    outer_limit: float = flag(5.0, "the outer limit of the same, a gate of its own")
    loss_margin: float = flag(
        5.0, "percent that the mean loss of the run's last tenth must be below the first tenth's"
    )
    rise_limit: float = flag(
        10.0, "percent that the mean loss of the run's last tenth may be above the lowest tenth's"
    )
    memory_tolerance: float = flag(1.0, "percent between measured and predicted bytes of a part")
    peak_tolerance: float = flag(
        25.0,
        "percent that the peak on CUDA may exceed the predicted one of an eager step: evaluations, "
        "samples and instruments come on top",
    )
    condition_limit: float = flag(1e6, "largest condition number of the kept modes (a median)")
    energy_floor: float = flag(
        0.5, "share of its first quarter's energy capture that a layer must keep in the last"
    )


@dataclass(frozen=True)
class Outcome:
    """How a training ended: steps asked for, exit code, and the error's gist where it failed."""

    name: str  # "dense" or "molegrad"
    steps: int
    code: int
    error: str = ""
    skipped: bool = False  # it was there already


def judge(
    limits: Limits,
    outcomes: Sequence[Outcome],
    dense: RunRecord | None,
    molegrad: RunRecord | None,
    predicted: Mapping[str, Mapping[str, int]],
    samples: Mapping[str, Sequence[tuple[str, str]]],
    prediction_error: str = "",
) -> list[Gate]:
    """All gates, in the order of the testing plan.

    Args:
        outcomes: of the dense and of the MoleGrad run.
        dense, molegrad: their records; None where a run left nothing behind.
        predicted: {"dense" and "molegrad": {part: bytes}}, with "total" for the peak on CUDA.
        samples: {"dense" and "molegrad": [(prompt, continuation)]}.
        prediction_error: why there is no prediction.
    """
    records = {"dense": dense, "molegrad": molegrad}
    there = [record for record in records.values() if record is not None]
    gates = [ended(outcome, records[outcome.name]) for outcome in outcomes]
    gates.append(same_conditions(there))
    for name, record in records.items():
        gates += memory(name, record, predicted.get(name), limits, prediction_error)
    for name, record in records.items():
        gates += loss(name, record, limits)
    gates.append(finite(there))
    gates += method_gates(molegrad, limits)
    gates += quality(dense, molegrad, limits)
    gates += [sampled(name, samples.get(name, ())) for name in records]
    return gates


def ended(outcome: Outcome, record: RunRecord | None) -> Gate:
    """The run came to its end."""
    steps = int(record.last("step") or 0) if record else 0
    met = outcome.code == 0 and steps == outcome.steps
    how = "last step recorded, of those asked for, and exit code 0"
    if not met:
        how += f"; exit code {outcome.code}" + (f": {outcome.error}" if outcome.error else "")
    return Gate(f"ended/{outcome.name}", met, steps, outcome.steps, how)


def same_conditions(records: Sequence[RunRecord]) -> Gate:
    """Both runs have the same model, tokens, seed, schedule and machine."""
    how = "settings in which the runs differ, other than the method; corpus and tokenizer by hash"
    if len(records) < 2:
        return Gate("same_conditions", False, None, 0, f"{how}; there are no two runs to compare")
    found = differences(list(records))
    return Gate("same_conditions", not found, len(found), 0, "; ".join([how, *found]))


def memory(
    name: str,
    record: RunRecord | None,
    predicted: Mapping[str, int] | None,
    limits: Limits,
    prediction_error: str = "",
) -> list[Gate]:
    """Bytes by part as predicted; on CUDA the allocator's peak too."""
    gates = []
    how = "MiB measured at the end on the tensors that exist; limit: predicted before from shapes"
    for part in PARTS:
        measured = record.last(f"memory/{part}") if record else None
        wanted = (predicted or {}).get(part)
        gate = f"memory/{name}/{part}"
        if measured is None or wanted is None:
            missing = "not measured" if measured is None else f"no prediction {prediction_error}"
            gates.append(Gate(gate, False, None, None, f"{how}; {missing}"))
            continue
        met = abs(measured - wanted) <= limits.memory_tolerance / 100 * wanted
        tolerance = f", ± {limits.memory_tolerance:g}%"
        gates.append(Gate(gate, met, measured / MIB, wanted / MIB, how + tolerance))
    device = str((record.config if record else {}).get("device_type", ""))
    peak = record.last("train/peak_memory_bytes") if record else None
    if device.startswith("cuda") and peak is not None and predicted:
        top = predicted["total"] * (1 + limits.peak_tolerance / 100)
        gates.append(
            Gate(
                f"memory/{name}/peak",
                peak <= top,
                peak / MIB,
                top / MIB,
                "MiB, largest allocation of the run; limit: predicted peak of a step + "
                f"{limits.peak_tolerance:g}%",
            )
        )
    return gates


def loss(name: str, record: RunRecord | None, limits: Limits) -> list[Gate]:
    """The smoothed loss falls over the run, and does not rise again.

    Smoothed: means of tenths of the run, of fewer and longer stretches where a tenth would have
    less than 10 losses (two halves at least).
    """
    falls, rises = f"loss/{name}/falls", f"loss/{name}/rises"
    values = record.series("train/loss_raw")[1] if record else []
    count = max(2, min(10, len(values) // 10))
    how = f"mean training loss of the last of {count} equal stretches"
    if len(values) < 2:
        none = f"{how}; fewer than two losses were logged"
        return [Gate(gate, False, None, None, none) for gate in (falls, rises)]
    means = parts(values, count)
    fall = 100 * (1 - means[-1] / means[0])
    rise = 100 * (means[-1] / min(means) - 1)
    return [
        Gate(
            falls,
            fall >= limits.loss_margin,
            fall,
            limits.loss_margin,
            f"% that the {how} is below that of the first; limit: least",
        ),
        Gate(
            rises,
            rise <= limits.rise_limit,
            rise,
            limits.rise_limit,
            f"% that the {how} is above the lowest; limit: most",
        ),
    ]


def finite(records: Sequence[RunRecord]) -> Gate:
    """Every number that was logged is finite."""
    odd = [
        f"{record.label} step {line.get('step')}: {key}"
        for record in records
        for line in record.metrics
        for key, value in line.items()
        if value in ("nan", "inf", "-inf")
        or (isinstance(value, float) and not math.isfinite(value))
    ]
    total = sum(len(line) for record in records for line in record.metrics)
    how = f"logged numbers that are not finite, of {total:,}"
    if odd:
        how += f"; first: {odd[0]}"
    return Gate("metrics/finite", not odd and total > 0, len(odd), 0, how)


def method_gates(record: RunRecord | None, limits: Limits) -> list[Gate]:
    """Health, condition number and captured energy of the converted layers."""
    names = ("metrics/health", "metrics/condition_number", "metrics/energy_capture")
    if record is None:
        return [Gate(name, False, None, None, "the run left no record") for name in names]
    return [health(record), condition(record, limits), energy(record, limits)]


def health(record: RunRecord) -> Gate:
    """No finding of a kind in ALARMS."""
    how = f"findings of the kinds {' and '.join(ALARMS)} in health.jsonl"
    if not record.series("health/findings")[1]:
        return Gate(
            "metrics/health", None, None, 0, f"{how}; no health checks were made (--health)"
        )
    findings = [found for found in record.health() if found.get("kind") in ALARMS]
    if findings:
        first = findings[0]
        how += f"; first: step {first['step']}, {first.get('layer')}: {first.get('message')}"
    return Gate("metrics/health", not findings, len(findings), 0, how)


def condition(record: RunRecord, limits: Limits) -> Gate:
    """The kept modes stay well-conditioned."""
    name, key = "metrics/condition_number", "condition_number"
    how = "largest over layers of the median over the run's readings"
    layers = _layers(record, key)
    if not layers:
        return Gate(name, None, None, limits.condition_limit, f"{how}; {why_absent(record, key)}")
    medians = {layer: statistics.median(values) for layer, values in layers.items()}
    worst = max(medians, key=medians.__getitem__)
    met = medians[worst] <= limits.condition_limit
    return Gate(name, met, medians[worst], limits.condition_limit, f"{how}: {worst}")


def energy(record: RunRecord, limits: Limits) -> Gate:
    """The captured energy does not collapse in any layer."""
    name, key = "metrics/energy_capture", "energy_capture"
    how = "least over layers of the mean in the last quarter of the readings over that in the first"
    layers = {layer: values for layer, values in _layers(record, key).items() if len(values) > 1}
    if not layers:
        return Gate(name, None, None, limits.energy_floor, f"{how}; {why_absent(record, key)}")
    kept = {}
    for layer, values in layers.items():
        quarters = parts(values, 4)
        kept[layer] = quarters[-1] / quarters[0] if quarters[0] else math.inf
    worst = min(kept, key=kept.__getitem__)
    how += f": {worst}; energy by {_source(record, key)}"
    return Gate(name, kept[worst] >= limits.energy_floor, kept[worst], limits.energy_floor, how)


def _layers(record: RunRecord, key: str) -> dict[str, list[float]]:
    """A metric's readings by layer, or of the mean where the layers were not logged."""
    layers = {name: values for name, (_, values) in record_layers(record, key).items()}
    mean = record.series(f"streaming/{key}")[1]
    return layers or ({"mean over layers": mean} if mean else {})


def _source(record: RunRecord, key: str) -> str:
    if record.layers(key) or record.series(f"streaming/{key}")[1]:
        return "the free estimate"
    return "shadow layers"


def quality(dense: RunRecord | None, molegrad: RunRecord | None, limits: Limits) -> list[Gate]:
    """Held-out bits per byte at the end, against dense: within the limit and the outer one."""
    ends = [record.last("val/bpb") if record else None for record in (dense, molegrad)]
    how = "% that held-out bits per byte at the end lie above dense's; limit: most"
    gates = []
    for name, most in (("quality", limits.limit), ("quality/outer", limits.outer_limit)):
        if None in ends:
            gates.append(Gate(name, False, None, most, f"{how}; not measured in both runs"))
        else:
            gap = 100 * (ends[1] / ends[0] - 1)
            values = f"; molegrad {ends[1]:.4f}, dense {ends[0]:.4f}, one seed"
            gates.append(Gate(name, gap <= most, gap, most, how + values))
    return gates


def sampled(name: str, texts: Sequence[tuple[str, str]]) -> Gate:
    """The saved model writes text."""
    written = sum(bool(continuation.strip()) for _, continuation in texts)
    how = f"prompts, of {len(texts)}, that the saved model goes on with some text; limit: least"
    return Gate(f"samples/{name}", written >= 1, written, 1, how)


def parts(values: Sequence[float], count: int) -> list[float]:
    """Means of `count` equal stretches of the values, or of each value where there are fewer."""
    count = min(count, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
