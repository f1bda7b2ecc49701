"""What a stage of a run left behind, read back for the report: configuration, metrics, results.

Everything is read from config.json, metrics.jsonl, shadow.jsonl, health.jsonl, eval_NNNNNN.json and
meta.json; what is not in them is None here, and named as missing by the report.
"""

import dataclasses
import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from molegrad import ConversionPlan, MoleGradConfig, plan
from molegrad.gpt import runs as stages
from molegrad.gpt.evaluate.evaluate import read_evaluations
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train import checkpoint
from molegrad.gpt.train.flags import PREFIX
from molegrad.gpt.train.logger import read_metrics
from molegrad.monitor.instruments import HEALTH_RECORDS, SHADOW_RECORDS
from molegrad.monitor.instruments import read_records

LEFT_OUT_STEPS = 5  # of the step time: warm-up
# Settings in which runs must agree for their results to differ by the method alone.
_COMPARED = (
    *("depth", "aspect_ratio", "head_dim", "kv_groups", "max_seq_len", "total_batch_size"),
    *("steps", "optimizer", "weight_dtype", "dtype", "seed", "tokenizer", "eval_tokens", "data"),
)
_PAST = ("resume", "resume_from_step", "overwrite")  # say how a run was started, not what it is


@dataclass(frozen=True)
class RunRecord:
    """One stage of a run."""

    label: str  # the run's name, with the stage where it is not "base"
    stage: str
    folder: Path
    config: dict
    metrics: list[dict]
    evaluations: list[dict]

    @property
    def dense(self) -> bool:
        """Whether the weight gradients were dense."""
        return not self.config.get("enable_streaming", False)

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(x, y) of the records that hold both as finite numbers."""
        points = [
            (record[against], record[key])
            for record in self.metrics
            if _finite(record.get(key)) and _finite(record.get(against))
        ]
        return [x for x, _ in points], [y for _, y in points]

    def layers(self, key: str, prefix: str = "layer") -> dict[str, tuple[list, list]]:
        """{layer: (steps, values)} of a metric that was logged as PREFIX/LAYER/KEY."""
        names: dict[str, None] = {}
        for record in self.metrics:
            for name in record:
                first, *rest = name.split("/")
                if first == prefix and len(rest) > 1 and rest[-1] == key:
                    names["/".join(rest[:-1])] = None
        found = {name: self.series(f"{prefix}/{name}/{key}") for name in names}
        return {name: points for name, points in found.items() if points[1]}

    def shadow(self) -> list[dict]:
        """The lines of shadow.jsonl: comparisons of estimates with true gradients."""
        return [] if self.folder is None else read_records(self.folder / SHADOW_RECORDS)

    def health(self) -> list[dict]:
        """The lines of health.jsonl: what was found amiss."""
        return [] if self.folder is None else read_records(self.folder / HEALTH_RECORDS)

    def last(self, key: str) -> float | None:
        """The newest value of a metric, or None."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def settled(self, key: str) -> tuple[float, float, float] | None:
        """The 20%, 50% and 80% points after the first steps; None where there are no later ones."""
        steps, values = self.series(key)
        late = [v for s, v in zip(steps, values, strict=True) if s > LEFT_OUT_STEPS]
        if len(late) < 2:
            return (late[0],) * 3 if late else None
        deciles = statistics.quantiles(late, n=10, method="inclusive")
        return deciles[1], deciles[4], deciles[7]

    def summary(self) -> dict:
        """The numbers of a row of the report's table; None where they were not logged."""
        state = [self.last(f"memory/{name}") for name in ("optimizer_state", "bases")]
        seconds, rate, mfu = map(self.settled, ("train/dt", "train/tok_per_sec", "train/mfu"))
        return {
            "steps": self.last("step"),
            "steps_planned": self.config.get("steps"),
            "tokens": self.last("train/tokens"),
            "bpb": self.last("val/bpb"),
            "val_loss": self.last("val/loss"),
            "train_loss": self.last("train/loss"),
            "step_ms": seconds and 1e3 * seconds[1],
            "step_ms_spread": seconds and f"{1e3 * seconds[0]:,.1f} to {1e3 * seconds[2]:,.1f}",
            "tokens_per_second": rate and rate[1],
            "mfu": mfu and mfu[1],
            "seconds": self.last("total_training_time"),
            "gradient_bytes": self.last("memory/gradients"),
            "state_bytes": None if None in state else sum(state),
            "peak_bytes": self.last("train/peak_memory_bytes"),
        }

    def conversion(self) -> ConversionPlan | None:
        """Which layers were converted, planned again on a model without weights; None where the
        run was dense or has no checkpoint."""
        newest = checkpoint.latest(self.folder)
        if self.dense or newest is None:
            return None
        with torch.device("meta"):
            model = GPT(GPTConfig(**checkpoint.read_meta(newest)["model_config"]))
        names = [f.name for f in dataclasses.fields(MoleGradConfig)]
        values = {n: self.config[PREFIX + n] for n in names if PREFIX + n in self.config}
        return plan(model, MoleGradConfig(**values))


def read_runs(names: list[str]) -> list[RunRecord]:
    """Every stage of the named runs that has metrics, in the order of the names.

    Raises:
        FileNotFoundError: a run is not there, or nothing of it was trained.
    """
    found = []
    for name in names:
        records = [_read(name, folder) for folder in stages.stage_folders(name)]
        records = [record for record in records if record.metrics]
        if not records:
            raise FileNotFoundError(
                f"run {name!r} has no metrics: train it with python -m scripts.base_train "
                f"--run={name}"
            )
        found += records
    return found


def _read(name: str, folder: Path) -> RunRecord:
    label = name if folder.name == "base" else f"{name}/{folder.name}"
    return RunRecord(
        label,
        folder.name.partition("-")[0],
        folder,
        stages.read_config(folder),
        read_metrics(folder),
        read_evaluations(folder),
    )


def differences(records: list[RunRecord]) -> list[str]:
    """What keeps runs from being compared: one line for each setting in which they differ."""
    lines = []
    for key in _COMPARED:
        lines += _difference(key, {r.label: r.config.get(key) for r in records})
    corpora = {r.label: (r.config.get("corpus") or {}).get("sha256") for r in records}
    lines += _difference("corpus", corpora)
    devices = {r.label: (r.config.get("machine") or {}).get("device") for r in records}
    return lines + _difference("machine", devices)


def _difference(name: str, values: dict) -> list[str]:
    if len({repr(value) for value in values.values()}) <= 1:
        return []

    def short(value) -> str:
        text = str(value)
        return f"{text[:12]}..." if len(text) == 64 else text

    return [f"{name}: " + ", ".join(f"{label} {short(v)}" for label, v in values.items())]


def command(script: str, config_class, values: dict) -> str:
    """The command line that gives this resolved configuration: every flag that is not the default.

    Flags are spelt as the documentation does: --enable_streaming and --streaming_* with
    underscores, the others with dashes.
    """
    words = ["python", "-m", f"scripts.{script}"]
    for field in dataclasses.fields(config_class):
        value = values.get(field.name)
        value = tuple(value) if isinstance(value, list) else value  # JSON knows no tuples
        if field.name in _PAST or value is None or value == field.default:
            continue
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        underscores = field.name.startswith(PREFIX) or field.name == "enable_streaming"
        name = field.name if underscores else field.name.replace("_", "-")
        words.append(f"--{name}={value}")
    return shlex.join(words)


def _finite(value) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
