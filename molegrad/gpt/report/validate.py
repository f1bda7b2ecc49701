"""Validation: MoleGrad beside the identical dense training, and the criteria that both must meet.

What: `validate(config)` trains a dense and a MoleGrad model on the same tokens with the same seed
and schedule, each with `scripts.base_train` in a process of its own; lets the saved models write;
judges what both recorded (`judge`) and writes the report of both runs with the criteria on top. The
runs lie under $MOLEGRAD_HOME/runs/RUN-dense and RUN.

Why processes: a run that dies is a criterion that is not met, not an end of the validation, and the
peak of resident memory belongs to a process.

How to run:

    python -m scripts.validate --steps=100 --json      # smoke; 1000: short; 5000: full
    python -m scripts.validate --steps=1000 --streaming_preset=lowrank --run=lowrank

A second run trains only what is missing; --overwrite trains both again.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from molegrad.gpt import paths
from molegrad.gpt import runs as stages
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.tokenizer import FILE, SPECIAL_TOKENS
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.report.record import RunRecord, command, differences, read_runs
from molegrad.gpt.report.report import Section, code, number, sections, table, write
from molegrad.gpt.train import checkpoint, flags, setup
from molegrad.gpt.train.base import PROMPTS, sample_texts
from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, device_of, resolve
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.logger import METRICS, read_metrics
from molegrad.gpt.train.signals import StopSignals
from molegrad.gpt.train.tok_train import TokTrainConfig, tok_train
from molegrad.monitor import saved_bytes
from molegrad.monitor.instruments import HEALTH_RECORDS, SHADOW_RECORDS

DENSE, MOLEGRAD = "dense", "molegrad"
PRESET = "balanced"
LOG = "validate.log"
ALARMS = ("nan", "exploding")  # kinds of health findings that no validation may have
# What the validation says itself, so that both runs are of one length, whole and comparable.
_OWN = {
    "num_iterations": "--steps",
    "max_train_tokens": "--steps",
    "resume": "nothing: an interrupted validation goes on by itself",
    "resume_from_step": "nothing: an interrupted validation goes on by itself",
    "model_tag": "--run",
}
# Flags that say how a run is watched and kept, not what it is.
_WATCHING = ("dashboards", "keep_last", "save_every", "overwrite", *_OWN)


@dataclass(frozen=True)
class Limits:
    """What the criteria are held to."""

    limit: float = flag(1.0, "percent of bits per byte that MoleGrad may lie above dense")
    outer_limit: float = flag(5.0, "the outer limit of the same, a criterion of its own")
    loss_margin: float = flag(
        5.0, "percent that the mean loss of the run's last tenth must be below the first tenth's"
    )
    rise_limit: float = flag(
        10.0, "percent that the mean loss of the run's last tenth may be above the lowest tenth's"
    )
    memory_factor: float = flag(
        4.0, "times that the gradients of the converted layers must take less memory than dense"
    )
    time_limit: float = flag(20.0, "percent that a step may take longer than dense, by medians")
    condition_limit: float = flag(1e6, "largest condition number of the kept modes (a median)")
    energy_floor: float = flag(
        0.5, "share of its first quarter's energy capture that a layer must keep in the last"
    )


@dataclass(frozen=True)
class Criterion:
    """One condition. met: None where it does not apply. how: how value and limit come about."""

    name: str
    met: bool | None
    value: float | None
    limit: float | None
    how: str

    @property
    def cells(self) -> list[str]:
        """How it stands, name, value, limit and how, as text."""
        word = {True: "met", False: "not met", None: "does not apply"}[self.met]
        return [word, self.name, number(self.value), number(self.limit), self.how]

    def to_dict(self) -> dict:
        """As JSON-able values; a number that is not finite as text."""
        odd = {"value": self.value, "limit": self.limit}
        odd = {k: str(v) for k, v in odd.items() if v is not None and not math.isfinite(v)}
        return {**dataclasses.asdict(self), **odd}


@dataclass(frozen=True)
class Outcome:
    """How a training ended: steps asked for, exit code, and the error's gist where it failed."""

    name: str  # "dense" or "molegrad"
    steps: int
    code: int
    error: str = ""
    skipped: bool = False  # it was there already


@dataclass(frozen=True)
class ValidateConfig(BaseTrainConfig, Limits):
    """Train MoleGrad and the identical dense model, and judge both by the criteria of the testing
    plan.

    Every flag of base_train is one here. Where no --streaming flag is given, the preset "balanced"
    is taken.

    Raises:
        ValueError: a flag that the validation sets itself, or one out of range.
    """

    steps: int = flag(100, "steps of each run: 100 is the smoke run, 1000 short, 5000 full")
    output: str = flag("", "the page to write; empty is $MOLEGRAD_HOME/report/RUN.html")
    json: bool = flag(False, "print one JSON object as the last line")
    vocab: str = flag(
        "4096",
        "entries of the tokenizer, or 'bytes'; trained where it is missing (see --tokenizer)",
    )

    run: str = flag("validate", "name of the MoleGrad run; the dense one is NAME-dense")
    enable_streaming: bool = flag(True, "MoleGrad in the run that is not dense; cannot be off")
    depth: int = flag(4, "number of transformer blocks; the width is aspect_ratio * depth")
    max_seq_len: int = flag(256, "tokens per sequence")
    device_batch_size: int = flag(8, "sequences per micro-batch")
    eval_every: int = flag(
        -2, "steps between evaluations of val/bpb; -2 takes a tenth of the run; 0: at the end only"
    )
    shadow_every: int = flag(25, "steps between comparisons with the true gradients; 0 is off")
    save_every: int = flag(500, "steps between checkpoints; -1 or 0: at the end only")
    keep_last: int = flag(1, "checkpoints to keep; 0 keeps all")
    sample_every: int = flag(0, "steps between samples; 0: at the end only; -1: no")

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, remedy in _OWN.items():
            if getattr(self, name) != defaults[name]:
                word = name.replace("_", "-")
                raise ValueError(f"--{word} is set by the validation: give {remedy} in its place")
        super().__post_init__()
        paths.check_run_name(f"{self.run}-dense")
        wrong = {
            f"steps must be at least 1, got {self.steps}": self.steps < 1,
            "enable_streaming=False leaves nothing to compare with dense: drop it":
                not self.enable_streaming,
            f"eval_every={self.eval_every}: the criteria need val/bpb; give a number of steps, 0 "
            "(at the end) or -2 (ten times)": self.eval_every == -1 or self.eval_every < -2,
            f"save_every={self.save_every}: the criteria need the last checkpoint; give a number "
            "of steps or -1 (at the end)": self.save_every < -1,
            f"vocab={self.vocab!r} is neither a number of entries nor 'bytes'":
                self.vocab != "bytes" and not self.vocab.isdigit(),
        }  # fmt: skip
        for field in fields(Limits):
            value = getattr(self, field.name)
            wrong[f"{field.name} must not be negative, got {value}"] = not value >= 0
        for message, found in wrong.items():
            if found:
                raise ValueError(message)

    def trainings(self, tokenizer: str) -> dict[str, BaseTrainConfig]:
        """{"dense" and "molegrad": the flags of its base training}, alike but for the method."""
        values = {f.name: getattr(self, f.name) for f in fields(BaseTrainConfig)}
        values |= {"num_iterations": self.steps, "tokenizer": tokenizer, "overwrite": False}
        if self.eval_every == -2:
            values["eval_every"] = -(-self.steps // 10)
        molegrad = BaseTrainConfig(**values)
        off = {
            f.name: f.default
            for f in fields(BaseTrainConfig)
            if _is_streaming(f.name) or f.name == "head_rank"
        }
        return {DENSE: replace(molegrad, run=f"{self.run}-dense", **off), MOLEGRAD: molegrad}


@flags.command("validate")
def main(argv: list[str] | None = None) -> int:
    """The command: 0 when every criterion is met, 1 when one is not, 2 when the flags are wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config = flags.parse(ValidateConfig, with_preset(argv), prog="python -m scripts.validate")
    try:
        result = validate(config)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on")
        return 130
    if config.json:
        print(json.dumps(result, default=str))
    return 0 if result["met"] else 1


def with_preset(argv: list[str]) -> list[str]:
    """The command line with --streaming_preset=balanced where it has no streaming flag."""
    names = [word.lstrip("-").replace("-", "_") for word in argv if word.startswith("--")]
    if any(_is_streaming(name.removeprefix("no_")) for name in names):
        return argv
    return [*argv, f"--streaming_preset={PRESET}"]


def _is_streaming(name: str) -> bool:
    return name.startswith((flags.PREFIX, "enable_streaming"))


def validate(config: ValidateConfig) -> dict:
    """Train what is missing, judge, write the page; what --json prints, JSON-able.

    Raises:
        ValueError, FileNotFoundError: the flags do not go together, or a run of this name was made
            with others.
        KeyboardInterrupt: after a signal, once the training has saved and ended.
    """
    trainings = config.trainings(config.tokenizer or prepare_tokenizer(config))
    device = device_of(trainings[MOLEGRAD])
    trainings = {name: resolve(training, device) for name, training in trainings.items()}
    folders = {k: checkpoint.stage_dir(t.run, "base") for k, t in trainings.items()}
    states = {k: state(t, folders[k], config.overwrite) for k, t in trainings.items()}
    outcomes = [train(k, t, folders[k], states[k]) for k, t in trainings.items()]
    records = {k: record_of(training) for k, training in trainings.items()}
    samples = {o.name: samples_of(trainings[o.name], o) for o in outcomes}
    found = judge(config, outcomes, records[DENSE], records[MOLEGRAD], samples)
    failed = [criterion.name for criterion in found if criterion.met is False]
    verdict = f"Not met: {', '.join(failed)}." if failed else "Every criterion is met."
    path = Path(config.output).expanduser() if config.output else None
    path = path or paths.report_dir() / f"{config.run}.html"
    known = [record for record in records.values() if record is not None]
    own = command("validate", ValidateConfig, flags.resolved(config))
    first, *rest = sections(known, own)
    texts = {name: code("\n".join(a + b for a, b in pairs)) for name, pairs in samples.items()}
    made = [
        first,
        Section("Criteria", criteria(found, config)),
        Section("Sample texts, greedy", [part for item in texts.items() for part in item]),
        *rest,
    ]
    title = f"Validation: {config.run} beside dense training"
    write(path.with_suffix(".md"), title, made, verdict)
    print("\n".join(["", *("  ".join(one.cells) for one in found), verdict, f"written {path}"]))
    quality = next(criterion for criterion in found if criterion.name == "quality")
    return {
        "met": not failed,
        "steps": config.steps,
        "gap_percent": quality.value,
        "gates": [criterion.to_dict() for criterion in found],
        "runs": {
            name: {
                "run": training.run,
                "command": command("base_train", BaseTrainConfig, flags.resolved(training)),
                **({} if records[name] is None else records[name].summary()),
            }
            for name, training in trainings.items()
        },
        "page": str(path),
        "config": flags.resolved(config),
    }


def criteria(found: Sequence[Criterion], config: ValidateConfig) -> list[str]:
    """The criteria as a part of the report, and how much they say."""
    seed = (
        f"One run of each with seed {config.seed}, of {config.steps:,} steps. Another seed moves "
        "both results, in a short run by more than a small gap."
    )
    header = ["", "criterion", "value", "limit", "how"]
    return [table(header, [one.cells for one in found]), seed]


def prepare_tokenizer(config: ValidateConfig) -> str:
    """The name of the tokenizer that --vocab asks for; it is trained where it does not exist."""
    entries = 256 + len(SPECIAL_TOKENS) if config.vocab == "bytes" else int(config.vocab)
    corpus = open_corpus(config.data).manifest["sha256"]
    name = "bytes" if config.vocab == "bytes" else f"bpe-{entries}-{corpus[:8]}"
    if not (paths.tokenizer_dir(name) / FILE).exists():
        tok_train(TokTrainConfig(vocab_size=entries, data=config.data, tokenizer=name))
    return name


def state(config: BaseTrainConfig, folder: Path, overwrite: bool = False) -> str:
    """What is to be done for a run: "done" (nothing), "resume", "new" or "overwrite".

    Raises:
        ValueError: a run of this name was trained with other flags.
    """
    newest = checkpoint.latest(folder)
    if newest is None:
        return "new"
    if overwrite:
        return "overwrite"
    saved, now = stages.read_config(folder), flags.resolved(config)
    now = json.loads(json.dumps(now, default=str))  # as config.json has it
    skipped = (*_WATCHING, "tokenizer")
    differ = [k for k in now if k not in skipped and k in saved and saved[k] != now[k]]
    if saved.get("steps") != config.num_iterations:
        differ.append("steps")
    if differ:
        now["steps"] = config.num_iterations
        shown = ", ".join(f"{k} {saved.get(k)!r} (now {now[k]!r})" for k in differ)
        raise ValueError(
            f"the run {config.run!r} was trained with {shown}: --overwrite trains it again, "
            "--run=NAME makes another one"
        )
    ended = any("memory/gradients" in line for line in read_metrics(folder)[-1:])
    whole = checkpoint.read_meta(newest)["step"] == config.num_iterations
    return "done" if ended and whole else "resume"


def train(name: str, config: BaseTrainConfig, folder: Path, how: str) -> Outcome:
    """Train in a process of its own; its messages are shown and kept in RUN/validate.log.

    Raises:
        KeyboardInterrupt: after a signal, once the process has saved and ended.
    """
    if how == "done":
        print(f"{config.run}: trained already (--overwrite trains it again)")
        return Outcome(name, config.num_iterations, 0, skipped=True)
    shown = command("base_train", BaseTrainConfig, flags.resolved(config))
    words = {"resume": ["--resume=True"], "overwrite": ["--overwrite=True"], "new": []}[how]
    print(f"\n== {config.run}: {' '.join([shown, *words])}", flush=True)
    if how != "resume":  # what an earlier run logged must not pass for this one's
        for record in (METRICS, SHADOW_RECORDS, HEALTH_RECORDS):
            (folder / record).unlink(missing_ok=True)
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if config.threads:
        environment["OMP_NUM_THREADS"] = str(config.threads)
    log = folder.parent / LOG
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, *shlex.split(shown)[1:], *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # a signal reaches it once, through here
        ) as process,
    ):

        def passed_on(message: str) -> None:
            print(message, flush=True)
            process.send_signal(signal.SIGINT)  # it ends after its step, with a checkpoint

        with StopSignals(passed_on) as signals:
            try:
                for line in process.stdout:
                    file.write(line)
                    print(line, end="", flush=True)
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
    if code == 130 or signals.stop:
        raise KeyboardInterrupt(f"{config.run} was interrupted")
    error = reason(log.read_text(encoding="utf-8"), code) if code else ""
    return Outcome(name, config.num_iterations, code, error)


def reason(log: str, code: int) -> str:
    """The error in a failed training's messages: its exception, else its last line."""
    if code < 0:
        killed = f"killed by {signal.Signals(-code).name}"
        return killed + (" (out of memory?)" if -code == signal.SIGKILL else "")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or lines or ["no message"])[-1]


def record_of(config: BaseTrainConfig) -> RunRecord | None:
    """What a base training left behind, with the bytes that the linear layers of its blocks keep of
    one micro-batch, measured here (`memory/saved_inputs`); None where it left nothing."""
    try:
        record = next(r for r in read_runs([config.run]) if r.folder.name == "base")
    except (FileNotFoundError, StopIteration):
        return None
    with contextlib.suppress(
        RuntimeError, StopIteration
    ):  # such as too little memory beside others
        sizes = record.blank_model().config
        model = setup.place(GPT(sizes), config, device_of(config))
        setup.equip(model, config)
        layers = [m for m in model.transformer["h"].modules() if isinstance(m, nn.Linear)]
        tokens = torch.zeros(config.device_batch_size, config.max_seq_len, dtype=torch.int64)
        tokens, dtype = tokens.to(model.device), compute_dtype(config)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            kept = saved_bytes(layers, lambda: model(tokens, tokens))
        line = {"step": record.last("step") or 0, "memory/saved_inputs": kept}
        return replace(record, metrics=[*record.metrics, line])
    return record


def samples_of(config: BaseTrainConfig, outcome: Outcome) -> list[tuple[str, str]]:
    """(prompt, continuation) of the saved model, greedy; [] where the run failed."""
    if outcome.code:
        return []
    opened = stages.open_stage(config.run, "base", device=config.device_type)
    texts = sample_texts(opened.model, opened.tokenizer, compute_dtype(config))
    return [(p, text.removeprefix(p)) for p, text in zip(PROMPTS, texts, strict=True)]


# The criteria


def judge(
    limits: Limits,
    outcomes: Sequence[Outcome],
    dense: RunRecord | None,
    molegrad: RunRecord | None,
    samples: dict[str, Sequence[tuple[str, str]]],
) -> list[Criterion]:
    """All criteria; what is not recorded is not met.

    Args:
        outcomes: of the dense and of the MoleGrad run.
        dense, molegrad: their records; None where a run left nothing behind.
        samples: {"dense" and "molegrad": [(prompt, continuation)]}.
    """
    records = {
        DENSE: dense or RunRecord(DENSE, "base", None, {}, [], []),
        MOLEGRAD: molegrad or RunRecord(MOLEGRAD, "base", None, {}, [], []),
    }
    low, both = records[MOLEGRAD], list(records.values())
    found = [ended(outcome, records[outcome.name]) for outcome in outcomes]
    differ = differences(both)
    how = "settings in which the runs differ, other than the method"
    how = "; ".join([how, *differ])
    found.append(Criterion("same_conditions", not differ, len(differ), 0, how))
    for name, record in records.items():
        found += loss(name, record, limits)
    found += [finite(both), health(low), condition(low, limits), energy(low, limits)]
    found += [*quality(*both, limits), gradient_memory(low, limits), step_time(*both, limits)]
    return found + [written(name, samples.get(name, ())) for name in records]


def ended(outcome: Outcome, record: RunRecord) -> Criterion:
    """The run came to its end."""
    steps = int(record.last("step") or 0)
    met = outcome.code == 0 and steps == outcome.steps
    how = "last step recorded, of those asked for, and exit code 0"
    if not met:
        how += f"; exit code {outcome.code}" + (f": {outcome.error}" if outcome.error else "")
    return Criterion(f"ended/{outcome.name}", met, steps, outcome.steps, how)


def loss(name: str, record: RunRecord, limits: Limits) -> list[Criterion]:
    """The smoothed loss falls over the run, and does not rise again.

    Smoothed: means of tenths of the run, of fewer and longer stretches where a tenth would have
    less than 10 losses (two halves at least).
    """
    values = record.series("train/loss_raw")[1]
    means = parts(values, max(2, min(10, len(values) // 10))) if len(values) > 1 else [math.nan]
    fall, rise = 100 * (1 - means[-1] / means[0]), 100 * (means[-1] / min(means) - 1)
    how = f"% that the mean training loss of the last of {len(means)} equal stretches is"
    falls, rises = fall >= limits.loss_margin, rise <= limits.rise_limit
    first, lowest = f"{how} below the first's; at least", f"{how} above the lowest; at most"
    return [
        Criterion(f"loss/{name}/falls", falls, fall, limits.loss_margin, first),
        Criterion(f"loss/{name}/rises", rises, rise, limits.rise_limit, lowest),
    ]


def finite(records: Sequence[RunRecord]) -> Criterion:
    """Every number that was logged is finite."""
    logged = [
        (f"{record.label} step {line.get('step')}: {key}", value)
        for record in records
        for line in record.metrics
        for key, value in line.items()
    ]
    odd = [where for where, value in logged if not math.isfinite(float(value))]
    how = f"logged numbers that are not finite, of {len(logged):,}"
    how += f"; first: {odd[0]}" if odd else ""
    return Criterion("metrics/finite", bool(logged) and not odd, len(odd), 0, how)


def health(record: RunRecord) -> Criterion:
    """No finding of a kind in ALARMS."""
    found = [one for one in record.health() if one.get("kind") in ALARMS]
    how = f"findings of the kinds {' and '.join(ALARMS)}"
    if not record.series("health/findings")[1]:
        missing = None if record.metrics else False
        return Criterion("metrics/health", missing, None, 0, f"{how}; no checks were made")
    for first in found[:1]:
        how += f"; first: step {first['step']}, {first.get('layer')}: {first.get('message')}"
    return Criterion("metrics/health", not found, len(found), 0, how)


def condition(record: RunRecord, limits: Limits) -> Criterion:
    """The kept modes stay well-conditioned."""
    medians = {n: statistics.median(v) for n, v in readings(record, "condition_number").items()}
    how = "largest over layers of the median over the run's readings"
    return _worst("condition_number", medians, max, limits.condition_limit, how, record)


def energy(record: RunRecord, limits: Limits) -> Criterion:
    """The captured energy does not collapse in any layer."""
    kept = {}
    for layer, values in readings(record, "energy_capture").items():
        quarters = parts(values, 4)
        if len(quarters) > 1:
            kept[layer] = quarters[-1] / quarters[0] if quarters[0] else math.inf
    how = "least over layers of the mean in the last quarter of the readings over that in the first"
    return _worst("energy_capture", kept, min, limits.energy_floor, how, record)


def _worst(key: str, layers: dict, worst, limit: float, how: str, record) -> Criterion:
    """A criterion of the worst layer; it does not apply where a run has no such metric."""
    if not layers:
        missing = None if record.metrics else False
        return Criterion(f"metrics/{key}", missing, None, limit, f"{how}; {key} was not logged")
    name = worst(layers, key=layers.__getitem__)
    value = layers[name]
    met = value <= limit if worst is max else value >= limit
    return Criterion(f"metrics/{key}", met, value, limit, f"{how}: {name}")


def readings(record: RunRecord, key: str) -> dict[str, list[float]]:
    """A metric's values by layer: its own, those of shadow layers, or the mean over layers."""
    layers = record.layers(key, "shadow") | record.layers(key)
    mean = record.series(f"streaming/{key}")[1]
    by_layer = {name: values for name, (_, values) in layers.items()}
    return by_layer or ({"mean over layers": mean} if mean else {})


def quality(dense: RunRecord, molegrad: RunRecord, limits: Limits) -> list[Criterion]:
    """Held-out bits per byte at the end, against dense: within the limit and the outer one."""
    ends = [record.last("val/bpb") for record in (dense, molegrad)]
    how, gap = "% that held-out bits per byte at the end lie above dense's; at most", None
    if None not in ends:
        gap = 100 * (ends[1] / ends[0] - 1)
        how += f"; molegrad {ends[1]:.4f}, dense {ends[0]:.4f}, one seed"
    pairs = (("quality", limits.limit), ("quality/outer", limits.outer_limit))
    return [
        Criterion(name, gap is not None and gap <= most, gap, most, how) for name, most in pairs
    ]


def gradient_memory(record: RunRecord, limits: Limits) -> Criterion:
    """The gradients of the converted layers take less memory than dense ones would."""
    saved = {name: values[-1] for name, (_, values) in record.layers("memory_saved_mb").items()}
    how = "times that gradients of the converted layers take less than dense ones; at least"
    model = record.blank_model() if saved else None
    if model is None:
        how, factor = f"{how}; not measured", None
    else:
        shapes = {name: model.get_submodule(name).weight for name in saved}
        size = 2 if record.config.get("weight_dtype") == "bfloat16" else 4
        full = sum(weight.numel() for weight in shapes.values()) * size / 2**20
        held = full - sum(saved.values())
        factor = full / held if held > 1e-6 * full else math.inf
        how += f"; {held:,.2f} MiB in place of {full:,.2f}"
    met = factor is not None and factor >= limits.memory_factor
    return Criterion("memory/gradients", met, factor, limits.memory_factor, how)


def step_time(dense: RunRecord, molegrad: RunRecord, limits: Limits) -> Criterion:
    """A step takes at most a little longer than a dense one."""
    times = [record.settled("train/dt") for record in (dense, molegrad)]
    more = None if None in times else 100 * (times[1][1] / times[0][1] - 1)
    how = "% that the median step takes longer than dense's; at most; the runs came one by one"
    met = more is not None and more <= limits.time_limit
    return Criterion("time", met, more, limits.time_limit, how)


def written(name: str, texts: Sequence[tuple[str, str]]) -> Criterion:
    """The saved model writes text."""
    count = sum(is_text(continuation) for _, continuation in texts)
    how = f"prompts, of {len(texts)}, that the saved model goes on with text; at least"
    return Criterion(f"samples/{name}", count >= 1, count, 1, how)


def is_text(text: str) -> bool:
    """Whether it has words: at least half of what is not white space are letters or digits, a word
    of two letters is among it, and nothing that cannot be printed."""
    seen = "".join(text.split())
    words = re.search(r"[^\W\d_]{2}", text)
    half = 2 * sum(map(str.isalnum, seen)) >= len(seen)
    return bool(words) and half and seen.isprintable() and "\ufffd" not in seen


def parts(values: Sequence[float], count: int) -> list[float]:
    """Means of `count` equal stretches of the values, or of each value where there are fewer."""
    count = min(count, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
