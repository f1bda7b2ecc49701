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
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from molegrad.gpt import paths
from molegrad.gpt import runs as stages
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.tokenizer import FILE, SPECIAL_TOKENS
from molegrad.gpt.report.criteria import DENSE, MOLEGRAD, Limits, judge
from molegrad.gpt.report.record import RunRecord, command, read_runs
from molegrad.gpt.report.report import Section, code, sections, table, write
from molegrad.gpt.train import checkpoint, flags, setup
from molegrad.gpt.train.base import PROMPTS, sample_texts
from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, device_of, resolve
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.guard import StopSignals
from molegrad.gpt.train.logger import METRICS, read_metrics
from molegrad.gpt.train.tok_train import TokTrainConfig, tok_train
from molegrad.monitor import saved_bytes
from molegrad.monitor.instruments import HEALTH_RECORDS, SHADOW_RECORDS

PRESET = "balanced"
LOG = "validate.log"  # in a run's folder: what its training wrote to stderr
# What the validation says itself, so that both runs are of one length, whole and comparable.
_OWN = {
    "num_iterations": "--steps",
    "max_train_tokens": "--steps",
    "resume": "nothing: an interrupted validation goes on by itself",
    "resume_from_step": "nothing: an interrupted validation goes on by itself",
    "model_tag": "--run",
}
# Flags that say how a run is watched and kept, not what it is; config.json has another tokenizer.
_WATCHING = ("dashboards", "keep_last", "save_every", "overwrite", "tokenizer", *_OWN)


@dataclass(frozen=True)
class ValidateConfig(BaseTrainConfig, Limits):
    """Train MoleGrad and the identical dense model, and judge both by the testing plan's criteria.

    Every flag of base_train is one here. Where no --streaming flag is given, the preset "balanced"
    is taken.

    Raises:
        ValueError: a flag that the validation sets itself, or one out of range.
    """

    steps: int = flag(100, "steps of each run: 100 is the smoke run, 1000 short, 5000 full")
    output: str = flag("", "the page to write; empty is $MOLEGRAD_HOME/report/RUN.html")
    json: bool = flag(False, "print one JSON object as the last line")
    vocab: str = flag("4096", "entries of a tokenizer, or 'bytes'; trained where it is missing")

    run: str = flag("validate", "name of the MoleGrad run; the dense one is NAME-dense")
    depth: int = flag(4, "number of transformer blocks; the width is aspect_ratio * depth")
    max_seq_len: int = flag(256, "tokens per sequence")
    device_batch_size: int = flag(8, "sequences per micro-batch")
    eval_every: int = flag(-2, "steps between evaluations; -2: ten in all; 0: at the end only")
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
        at_end = "give a number of steps, or 0 (at the end)"
        checks = [
            ("steps", self.steps >= 1, "give at least 1"),
            ("enable_streaming", self.enable_streaming, "that leaves nothing to compare: drop it"),
            ("eval_every", self.eval_every in (-2, 0) or self.eval_every > 0,
             f"the criteria need val/bpb; {at_end}"),
            ("save_every", self.save_every >= -1, f"the samples need a checkpoint; {at_end}"),
            ("vocab", self.vocab == "bytes" or self.vocab.isdigit(), "give a number, or 'bytes'"),
            *((f.name, getattr(self, f.name) >= 0, "give 0 or more") for f in fields(Limits)),
        ]  # fmt: skip
        for name, good, remedy in checks:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}: {remedy}")

    def trainings(self, tokenizer: str) -> dict[str, BaseTrainConfig]:
        """{"dense" and "molegrad": the flags of its base training}, alike but for the method."""
        values = {f.name: getattr(self, f.name) for f in fields(BaseTrainConfig)}
        values |= {"num_iterations": self.steps, "tokenizer": tokenizer, "overwrite": False}
        if self.eval_every == -2:
            values["eval_every"] = -(-self.steps // 10)
        molegrad = BaseTrainConfig(**values)
        dense = replace(molegrad, run=f"{self.run}-dense", streaming=None, head_rank=0)
        return {DENSE: dense, MOLEGRAD: molegrad}


@flags.command("validate")
def main(argv: list[str] | None = None) -> int:
    """The command: 0 when every criterion is met, 1 when one is not, 2 when the flags are wrong,
    130 after a signal."""
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
    """The command line with MoleGrad on: the preset "balanced" where it has no streaming flag."""
    names = [word.lstrip("-").replace("-", "_") for word in argv if word.startswith("--")]
    own = [n for n in names if n.startswith((flags.PREFIX, "enable_streaming", "no_enable_str"))]
    if not own:
        return [*argv, f"--streaming_preset={PRESET}"]
    if any("enable_streaming" in n or n.startswith("streaming_preset") for n in own):
        return argv
    return [*argv, "--enable_streaming=True"]


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
    states = {name: state(t, config.overwrite) for name, t in trainings.items()}
    errors = {name: train(t, states[name]) for name, t in trainings.items()}
    records = {name: record_of(training) for name, training in trainings.items()}
    samples = {name: [] if errors[name] else samples_of(t) for name, t in trainings.items()}
    found = judge(config, config.steps, errors, *records.values(), samples)
    failed = [one.name for one in found if one.met is False]
    verdict = f"Not met: {', '.join(failed)}." if failed else "Every criterion is met."
    path = Path(config.output or paths.report_dir() / f"{config.run}.html").expanduser()
    own = command("validate", ValidateConfig, flags.resolved(config))
    first, *rest = sections([record for record in records.values() if record.metrics], own)
    seed = (
        f"One run of each with seed {config.seed}, of {config.steps:,} steps. Another seed moves "
        "both results, in a short run by more than a small gap."
    )
    judged = table(["", "criterion", "value", "limit", "how"], [one.cells for one in found])
    texts = [code("\n".join(map("".join, pairs))) for pairs in samples.values()]
    written = Section("Sample texts: dense, then MoleGrad", texts)
    title = f"Validation: {config.run} beside dense training"
    made = [first, Section("Criteria", [judged, seed]), written, *rest]
    write(path.with_suffix(".md"), title, made, verdict)
    print("\n".join(["", *("  ".join(one.cells) for one in found), verdict, f"written {path}"]))
    runs = {
        name: {
            "run": training.run,
            "command": command("base_train", BaseTrainConfig, flags.resolved(training)),
            **records[name].summary(),
        }
        for name, training in trainings.items()
    }
    return {
        "met": not failed,
        "steps": config.steps,
        "gap_percent": next(one.value for one in found if one.name == "quality"),
        "gates": [one.to_dict() for one in found],
        "runs": runs,
        "page": str(path),
        "config": flags.resolved(config),
    }


def prepare_tokenizer(config: ValidateConfig) -> str:
    """The name of the tokenizer that --vocab asks for; it is trained where it does not exist."""
    entries = 256 + len(SPECIAL_TOKENS) if config.vocab == "bytes" else int(config.vocab)
    corpus = open_corpus(config.data).manifest["sha256"]
    name = "bytes" if config.vocab == "bytes" else f"bpe-{entries}-{corpus[:8]}"
    if not (paths.tokenizer_dir(name) / FILE).exists():
        tok_train(TokTrainConfig(vocab_size=entries, data=config.data, tokenizer=name))
    return name


def state(config: BaseTrainConfig, overwrite: bool = False) -> str:
    """What is to be done for a run: "done" (nothing), "resume", "new" or "overwrite".

    Raises:
        ValueError: a run of this name was trained with other flags.
    """
    folder = checkpoint.stage_dir(config.run, "base")
    newest = checkpoint.latest(folder)
    if newest is None or overwrite:
        return "overwrite" if newest else "new"
    saved, now = stages.read_config(folder), flags.resolved(config)
    now = json.loads(json.dumps(now, default=str)) | {"steps": config.num_iterations}
    differ = [k for k in now if k not in _WATCHING and k in saved and saved[k] != now[k]]
    if differ:
        shown = ", ".join(f"{k} {saved[k]!r} (now {now[k]!r})" for k in differ)
        raise ValueError(
            f"the run {config.run!r} was trained with {shown}: --overwrite trains it again, "
            "--run=NAME makes another one"
        )
    ended = any("memory/gradients" in line for line in read_metrics(folder)[-1:])
    whole = checkpoint.read_meta(newest)["step"] == config.num_iterations
    return "done" if ended and whole else "resume"


def train(config: BaseTrainConfig, how: str) -> str:
    """Train in a process of its own, as `state` says; returns why it failed, "" where it did not.

    Raises:
        KeyboardInterrupt: after a signal, once the process has saved and ended.
    """
    if how == "done":
        print(f"{config.run}: trained already (--overwrite trains it again)")
        return ""
    folder = checkpoint.stage_dir(config.run, "base")
    shown = command("base_train", BaseTrainConfig, flags.resolved(config))
    words = [*shlex.split(shown), *([] if how == "new" else [f"--{how}=True"])]
    print(f"\n== {config.run}: {shlex.join(words)}", flush=True)
    if how != "resume":  # what an earlier run logged must not pass for this one's
        for record in (METRICS, SHADOW_RECORDS, HEALTH_RECORDS):
            (folder / record).unlink(missing_ok=True)
    threads = {"OMP_NUM_THREADS": str(config.threads)} if config.threads else {}
    log = folder.parent / LOG
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words[1:]],
            stderr=file,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **threads},
            start_new_session=True,  # a signal reaches it once, through here
        )
        # It ends after its step, with a checkpoint.
        with StopSignals(lambda message: process.send_signal(signal.SIGINT)) as signals:
            status = process.wait()
    if status == 130 or signals.stop:
        raise KeyboardInterrupt(f"{config.run} was interrupted")
    return reason(log.read_text(encoding="utf-8", errors="replace"), status) if status else ""


def reason(log: str, status: int) -> str:
    """Why a training failed: its exit status, and the exception in its messages or the last one."""
    errors = re.findall(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit)\b.*", log, re.MULTILINE)
    killed = f", {signal.Signals(-status).name}" if status < 0 else ""
    return f"exit status {status}{killed}: {(errors or log.split(chr(10)))[-1].strip()}"


def record_of(config: BaseTrainConfig) -> RunRecord:
    """What a base training left behind, an empty record where that is nothing; with the bytes that
    the linear layers of its blocks keep of one micro-batch, measured here (memory/saved_inputs)."""
    record = RunRecord(config.run, "base", None, {}, [], [])
    with contextlib.suppress(FileNotFoundError):
        record = next((r for r in read_runs([config.run]) if r.folder.name == "base"), record)
    model = record.model(config.device_type)
    if model is None:
        return record
    with contextlib.suppress(RuntimeError):  # a device without room for another model
        setup.equip(setup.place(model, config, device_of(config)), config)
        layers = [m for m in model.transformer["h"].modules() if isinstance(m, nn.Linear)]
        tokens = torch.zeros(config.device_batch_size, config.max_seq_len, dtype=torch.int64)
        tokens, dtype = tokens.to(model.device), compute_dtype(config)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            kept = saved_bytes(layers, lambda: model(tokens, tokens))
        line = {"step": record.last("step"), "memory/saved_inputs": kept}
        return replace(record, metrics=[*record.metrics, line])
    return record


def samples_of(config: BaseTrainConfig) -> list[tuple[str, str]]:
    """(prompt, continuation) of the saved model, greedy."""
    opened = stages.open_stage(config.run, "base", device=config.device_type)
    texts = sample_texts(opened.model, opened.tokenizer, compute_dtype(config))
    return [(p, text.removeprefix(p)) for p, text in zip(PROMPTS, texts, strict=True)]


# The criteria
