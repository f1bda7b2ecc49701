"""Validation: MoleGrad beside the identical dense training, and the gates that both must pass.

What: `validate(config)` trains a dense and a MoleGrad model on the same tokens with the same seed
and schedule, each with `scripts.base_train` in a process of its own; predicts their memory; lets
the saved models write; judges all of it (`molegrad.gpt.report.gates`) and writes one HTML page
(`molegrad.gpt.report.page`). The runs lie under $MOLEGRAD_HOME/runs/RUN-dense and RUN.

Why processes: a run that dies is a gate that is not met, not an end of the validation, and the peak
of resident memory belongs to a process.

How to run:

    python -m scripts.validate --steps=100 --json      # smoke; 1000: short; 5000: full
    python -m scripts.validate --steps=1000 --streaming_method=tangent --streaming_rank_k=32 \\
        --streaming_probes=4 --streaming_gradient_mode=factored --run=tangent --outer-limit=10

A second run trains only what is missing; --overwrite trains both anew.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from molegrad.gpt import paths
from molegrad.gpt import runs as stages
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.report.gates import Gate, Limits, Outcome, judge
from molegrad.gpt.report.page import write_page
from molegrad.gpt.report.record import RunRecord, command, read_runs
from molegrad.gpt.train import checkpoint, flags, setup
from molegrad.gpt.train.base import PROMPTS, model_config, sample_texts
from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, device_of, resolve
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.logger import METRICS, read_metrics
from molegrad.lab.sweep import prepare_text
from molegrad.lab.worker import terminable
from molegrad.monitor import memory_bytes
from molegrad.monitor.instruments import HEALTH_RECORDS, SHADOW_RECORDS
from molegrad.plan.simulate import simulate

DENSE, MOLEGRAD = "dense", "molegrad"
PRESET = "balanced"
LOG = "validate.log"
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
class ValidateConfig(BaseTrainConfig, Limits):
    """Train MoleGrad and the identical dense model, and hold them to the gates of the testing plan.

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
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.enable_streaming:
            raise ValueError("enable_streaming=False leaves nothing to compare with dense: drop it")
        if self.eval_every == -1 or self.eval_every < -2:
            raise ValueError(
                f"eval_every={self.eval_every}: the gates need val/bpb; give a number of steps, 0 "
                "(at the end) or -2 (ten times)"
            )
        if self.save_every < -1:
            raise ValueError(
                f"save_every={self.save_every}: the gates need the last checkpoint; give a number "
                "of steps or -1 (at the end)"
            )
        if self.vocab != "bytes" and not self.vocab.isdigit():
            raise ValueError(f"vocab={self.vocab!r} is neither a number of entries nor 'bytes'")
        for field in fields(Limits):
            if not getattr(self, field.name) >= 0:
                raise ValueError(
                    f"{field.name} must not be negative, got {getattr(self, field.name)}"
                )

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
    """The command: 0 when every gate is met, 1 when one is not, 2 when the flags are wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config = flags.parse(ValidateConfig, with_preset(argv), prog="python -m scripts.validate")
    try:
        with terminable():
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
    """
    tokenizer = config.tokenizer or prepare_text(config).name
    trainings = config.trainings(tokenizer)
    device = device_of(trainings[MOLEGRAD])
    trainings = {name: resolve(training, device) for name, training in trainings.items()}
    folders = {k: checkpoint.stage_dir(t.run, "base") for k, t in trainings.items()}
    states = {k: state(t, folders[k], config.overwrite) for k, t in trainings.items()}
    predicted, prediction_error = {}, ""
    try:
        entries = Tokenizer.load(paths.tokenizer_dir(tokenizer)).vocab_size
        predicted = {name: predict(training, entries) for name, training in trainings.items()}
    except (RuntimeError, NotImplementedError) as error:  # an optimizer that needs real tensors
        prediction_error = f"({type(error).__name__}: {error})"
    outcomes = [train(k, t, folders[k], states[k]) for k, t in trainings.items()]
    records = {name: record_of(training.run) for name, training in trainings.items()}
    samples = {o.name: samples_of(trainings[o.name], o) for o in outcomes}
    gates = judge(
        config,
        outcomes,
        records[DENSE],
        records[MOLEGRAD],
        predicted,
        samples,
        prediction_error,
    )
    path = Path(config.output).expanduser() if config.output else None
    path = path or paths.report_dir() / f"{config.run}.html"
    write_page(
        path,
        gates=gates,
        records=[record for record in records.values() if record is not None],
        predicted={trainings[name].run: parts for name, parts in predicted.items()},
        samples={trainings[name].run: texts for name, texts in samples.items()},
        command=command("validate", ValidateConfig, flags.resolved(config)),
    )
    result = result_of(config, gates, records, trainings, path)
    print(f"\n{table(gates)}\n\nwritten {path}")
    return result


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
        old = saved | {"num_iterations": saved.get("steps")}
        now["steps"] = config.num_iterations
        shown = ", ".join(f"{k} {old.get(k)!r} (now {now[k]!r})" for k in differ)
        raise ValueError(
            f"the run {config.run!r} was trained with {shown}: --overwrite trains it anew, "
            "--run=NAME makes another one"
        )
    ended = any("memory/gradients" in line for line in read_metrics(folder)[-1:])
    whole = checkpoint.read_meta(newest)["step"] == config.num_iterations
    return "done" if ended and whole else "resume"


def train(name: str, config: BaseTrainConfig, folder: Path, how: str) -> Outcome:
    """Train in a process of its own; its messages are shown and kept in RUN/validate.log.

    Raises:
        KeyboardInterrupt: after the process has saved and ended.
    """
    if how == "done":
        print(f"{config.run}: trained already (--overwrite trains it anew)")
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
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(shown)[1:], *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it once, through here
        )
        try:
            _tee(process, file)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # it ends after its step, with a checkpoint
            with contextlib.suppress(KeyboardInterrupt):
                _tee(process, file)
            raise
        finally:
            if process.poll() is None:
                process.kill()
            code = process.wait()
    if code == 130:
        raise KeyboardInterrupt(f"{config.run} was interrupted")
    error = reason(log.read_text(encoding="utf-8"), code) if code else ""
    return Outcome(name, config.num_iterations, code, error)


def _tee(process: subprocess.Popen, file) -> None:
    for line in process.stdout:
        file.write(line)
        print(line, end="", flush=True)
    process.wait()


def reason(log: str, code: int) -> str:
    """The error in a failed training's messages: its exception, else its last line."""
    if code < 0:
        killed = f"killed by {signal.Signals(-code).name}"
        return killed + (" (out of memory?)" if -code == signal.SIGKILL else "")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or lines or ["no message"])[-1]


def predict(config: BaseTrainConfig, vocab_size: int) -> dict[str, int]:
    """Bytes of every part that a training will hold, before it begins: nothing is allocated.

    weights, bases, gradients: of the tensors that conversion makes. optimizer_state: what the
    optimizers keep from step to step, momenta that backward passes add to included. activations,
    logits: at the peak of a step (`molegrad.plan.simulate`), activations being all that is none of
    the other parts. total: that peak, which is no sum of the others.
    """
    sizes = model_config(config, vocab_size)
    found = simulate(config, sizes)
    nowhere = torch.device("meta")
    with nowhere:
        model = setup.place(GPT(sizes), config, nowhere)
        setup.equip(model, config)
    held = memory_bytes(model)
    known = ("weights", "optimizer", "bases", "gradients", "logits")
    return {
        "weights": held["weights"],
        "bases": held["bases"],
        "gradients": held["gradients"],
        "optimizer_state": found.held["optimizer"],
        "activations": sum(size for part, size in found.parts.items() if part not in known),
        "logits": found.parts["logits"],
        "total": found.peak,
    }


def record_of(run: str) -> RunRecord | None:
    """What the base training of a run left behind; None where it is nothing."""
    with contextlib.suppress(FileNotFoundError):
        return next((r for r in read_runs([run]) if r.folder.name == "base"), None)
    return None


def samples_of(config: BaseTrainConfig, outcome: Outcome) -> list[tuple[str, str]]:
    """(prompt, continuation) of the saved model, greedy; [] where the run failed."""
    if outcome.code:
        return []
    opened = stages.open_stage(config.run, "base", device=config.device_type)
    texts = sample_texts(opened.model, opened.tokenizer, compute_dtype(config))
    pairs = zip(PROMPTS, texts, strict=True)
    return [
        (prompt, text[len(prompt) :] if text.startswith(prompt) else text) for prompt, text in pairs
    ]


def result_of(
    config: ValidateConfig,
    gates: Sequence[Gate],
    records: dict[str, RunRecord | None],
    trainings: dict[str, BaseTrainConfig],
    page: Path,
) -> dict:
    """The validation as one JSON-able object."""
    gap = next(gate.value for gate in gates if gate.name == "quality")
    return {
        "met": all(gate.met is not False for gate in gates),
        "steps": config.steps,
        "gap_percent": gap,
        "gates": [gate.to_dict() for gate in gates],
        "runs": {
            name: {
                "run": trainings[name].run,
                "command": command("base_train", BaseTrainConfig, flags.resolved(training)),
                **({} if records[name] is None else records[name].summary()),
            }
            for name, training in trainings.items()
        },
        "page": str(page),
        "config": flags.resolved(config),
    }


def table(gates: Sequence[Gate]) -> str:
    """The gates as aligned text."""
    rows = [["", "gate", "value", "limit", "how"], *([gate.word, *gate.cells] for gate in gates)]
    widths = [*(max(len(row[i]) for row in rows) for i in range(4)), 0]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    failed = [gate.name for gate in gates if gate.met is False]
    verdict = f"not met: {', '.join(failed)}" if failed else "every gate is met"
    return "\n".join([*lines, verdict])
