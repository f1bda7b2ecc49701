"""What a stage of a run left behind, read back: configuration, metrics, evaluations, commands.

Everything is read from config.json, metrics.jsonl, shadow.jsonl, health.jsonl, eval_NNNNNN.json and
meta.json. What is not in them is None here, and the report names it as not recorded.
"""

import json
import math
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from molegrad.convert import ConversionPlan, plan
from molegrad.gpt import paths
from molegrad.gpt import runs as stages
from molegrad.gpt.data.tokenizer import FILE, Tokenizer
from molegrad.gpt.evaluate import evaluate
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train import checkpoint, flags
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import PREFIX
from molegrad.gpt.train.logger import read_metrics
from molegrad.gpt.train.sft import SFTConfig
from molegrad.gpt.train.tok_train import TokTrainConfig
from molegrad.monitor.instruments import HEALTH_RECORDS, SHADOW_RECORDS, read_records

LEFT_OUT_STEPS = 5  # of the step time: warm-up
# Settings in which runs must agree for their results to differ by the method alone.
_COMPARED = (
    *("depth", "aspect_ratio", "head_dim", "kv_groups", "max_seq_len", "total_batch_size"),
    *("steps", "optimizer", "weight_dtype", "dtype", "seed", "tokenizer", "eval_tokens", "data"),
)
_PAST = ("resume", "resume_from_step", "overwrite")  # how a run was started, not what it is
_SCRIPTS = {  # of a stage: training and evaluation
    "base": (("base_train", BaseTrainConfig), ("base_eval", evaluate.BaseEvalConfig)),
    "sft": (("chat_sft", SFTConfig), ("chat_eval", evaluate.ChatEvalConfig)),
}


@dataclass(frozen=True)
class RunRecord:
    """One stage of a run. folder: None where there is none, and so no shadow and health records."""

    label: str  # the run's name, with the stage where it is not "base"
    stage: str
    folder: Path | None
    config: dict
    metrics: list[dict]
    evaluations: list[dict]

    @property
    def dense(self) -> bool:
        """Whether all weight gradients were the exact ones of dense layers."""
        return not self.config.get("enable_streaming", False)

    @property
    def title(self) -> str:
        """The method and, in brackets, the run's name."""
        return f"{self.method} ({self.label})"

    @property
    def method(self) -> str:
        """How the weight gradients were made, in a few words of the configuration."""
        if not self.config:
            return "unknown"
        if self.dense:
            return "dense"
        method, rank, mode = (
            self.config.get(PREFIX + key) for key in ("method", "rank_k", "gradient_mode")
        )
        return ", ".join(str(word) for word in (method, rank and f"rank {rank}", mode) if word)

    @property
    def memory(self) -> dict[str, int]:
        """{part: bytes} of every memory/PART that was logged, the newest of each."""
        names = dict.fromkeys(k for line in self.metrics for k in line if k.startswith("memory/"))
        known = {name.removeprefix("memory/"): self.last(name) for name in names}
        return {part: int(value) for part, value in known.items() if value is not None}

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(x, y) of the records that hold both as finite numbers. `against` may be "tokens": the
        step times the tokens of one."""
        scale, x_key = 1, against
        if against == "tokens":
            scale, x_key = self.config.get("total_batch_size", math.nan), "step"
        pairs = [(line.get(x_key), line.get(key)) for line in self.metrics]
        points = [(scale * x, y) for x, y in pairs if _finite(x) and _finite(y)]
        return [x for x, _ in points if _finite(x)], [y for x, y in points if _finite(x)]

    def layers(self, key: str, prefix: str = "layer") -> dict[str, tuple[list, list]]:
        """{layer: (steps, values)} of a metric that was logged as PREFIX/LAYER/KEY."""
        start, end = f"{prefix}/", f"/{key}"
        found = {}
        for name in dict.fromkeys(name for line in self.metrics for name in line):
            layer = name.removeprefix(start).removesuffix(end)
            if name == f"{start}{layer}{end}":
                found[layer] = self.series(name)
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

    def speed(self) -> tuple[float, float] | None:
        """FLOP/s that the run did, and the peak FLOP/s of its devices that its own MFU rests on."""
        flops, tokens = self.last("total_training_flops"), self.last("train/tokens")
        rate, mfu = self.settled("train/tok_per_sec"), self.settled("train/mfu")
        if not (flops and tokens and rate and mfu and mfu[1] > 0):
            return None
        done = flops / tokens * rate[1]
        return done, 100 * done / mfu[1]

    def summary(self) -> dict:
        """The numbers of a row of the report's first table; None where they were not logged."""
        held = self.memory
        state = [held.get(name) for name in ("optimizer_state", "bases")]
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
            "gradient_bytes": held.get("gradients"),
            "state_bytes": None if None in state else sum(state),
            "saved_bytes": held.get("saved_inputs"),
            "peak_bytes": self.last("train/peak_memory_bytes"),
        }

    def model(self, device: str = "meta") -> GPT | None:
        """A model of the run's sizes with the weights of a new one (on the meta device: with none);
        None where there is no checkpoint."""
        newest = None if self.folder is None else checkpoint.latest(self.folder)
        if newest is None:
            return None
        with torch.device(device):
            return GPT(GPTConfig(**checkpoint.read_meta(newest)["model_config"]))

    def conversion(self) -> ConversionPlan | None:
        """Which layers were converted, planned again; None where the run was dense or has no
        checkpoint."""
        model = None if self.dense else self.model()
        if model is None:
            return None
        known = {entry.name for entry in flags.fields_as_flags(BaseTrainConfig)}
        values = {name: value for name, value in self.config.items() if name in known}
        return plan(model, flags.make(BaseTrainConfig, **values).streaming)

    def commands(self) -> list[str]:
        """The commands that give this stage again: tokenizer, training, newest evaluation."""
        lines, config, (train, evaluation) = [], dict(self.config), _SCRIPTS[self.stage]
        made = None if self.folder is None else self.folder.parent / "tok_train.json"
        if self.stage == "base" and made is not None and made.exists():
            words = json.loads(made.read_text(encoding="utf-8"))["config"]
            lines.append(command("tok_train", TokTrainConfig, words))
        if "tokenizer" in config:  # its fingerprint; a command takes a name
            config["tokenizer"] = tokenizer_name(config["tokenizer"])
            if config["tokenizer"] is None and self.folder is not None:
                config["tokenizer"] = self.label.partition("/")[0]
                copied = paths.home() / "tokenizers" / config["tokenizer"]
                lines.append(shlex.join(["cp", "-r", f"{self.folder}/tokenizer", f"{copied}"]))
        if config:
            lines.append(command(*train, config))
        newest = self.evaluations[-1:]
        return lines + [command(*evaluation, one["config"]) for one in newest if "config" in one]


def read_runs(names: Sequence[str]) -> list[RunRecord]:
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
    config, evaluations = stages.read_config(folder), evaluate.read_evaluations(folder)
    stage = folder.name.partition("-")[0]
    return RunRecord(label, stage, folder, config, read_metrics(folder), evaluations)


def peaks(records: Sequence[RunRecord]) -> dict[str, float]:
    """{device: FLOP/s}: the highest peak that any of the runs on a device was measured against."""
    found: dict[str, float] = {}
    for record in records:
        if speed := record.speed():
            found[device_of(record)] = max(speed[1], found.get(device_of(record), 0.0))
    return found


def device_of(record: RunRecord) -> str:
    """What the run ran on; "" where it was not recorded."""
    return str((record.config.get("machine") or {}).get("device") or "")


def differences(records: Sequence[RunRecord]) -> list[str]:
    """What keeps runs from being compared: one line for each setting in which they differ."""
    lines = []
    for key in (*_COMPARED, "corpus sha256", "machine device"):
        name, _, inner = key.partition(" ")
        values = [record.config.get(name) for record in records]
        values = [(value or {}).get(inner) if inner else value for value in values]
        if len(set(map(repr, values))) > 1:
            texts = [f"{v[:12]}..." if isinstance(v, str) and len(v) == 64 else v for v in values]
            pairs = zip(records, texts, strict=True)
            lines.append(f"{key}: " + ", ".join(f"{record.label} {v}" for record, v in pairs))
    return lines


def command(script: str, config_class, values: dict) -> str:
    """The command line that gives this resolved configuration: every flag that is not the default.

    Flags are spelt as the documentation does: --enable_streaming and --streaming_* with
    underscores, the others with dashes. A run of several processes gets torchrun.
    """
    words = []
    for field in flags.fields_as_flags(config_class):
        value = values.get(field.name)
        value = tuple(value) if isinstance(value, list) else value  # JSON knows no tuples
        if field.name in _PAST or value is None or value == field.default:
            continue
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        underscores = field.name.startswith(PREFIX) or field.name == "enable_streaming"
        name = field.name if underscores else field.name.replace("_", "-")
        words.append(f"--{name}={value}")
    processes = (values.get("machine") or {}).get("processes", 1)
    start = ["python", "-m", f"scripts.{script}"]
    if processes > 1:
        start = ["torchrun", f"--nproc-per-node={processes}", *start[1:], "--"]
    return shlex.join([*start, *words])


def tokenizer_name(fingerprint: str) -> str | None:
    """The name that --tokenizer takes for the tokenizer of this fingerprint ("" is the default
    one); None where none of those under $MOLEGRAD_HOME has it."""
    home = paths.home()
    folders = [home / "tokenizer", *sorted((home / "tokenizers").glob("*"))]
    for folder in folders:
        if (folder / FILE).exists() and Tokenizer.load(folder).fingerprint == fingerprint:
            return "" if folder == home / "tokenizer" else folder.name
    return None


def short(layer: str) -> str:
    """A layer's name without what all of them begin with."""
    return layer.removeprefix("transformer.")


def visible(text: str) -> str:
    """Text whose control characters, which a terminal or a browser would obey, are escapes."""
    controls = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    return re.sub(controls, lambda match: match[0].encode("unicode_escape").decode(), text)


def _finite(value) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
