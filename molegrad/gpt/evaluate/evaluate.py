"""Evaluation of a checkpoint: how well it predicts, knows names, calculates, spells, writes.

What: `evaluate(config)` opens a stage of a run, runs the tasks asked for, prints a table and writes
STAGE/eval_NNNNNN.json (N the step). Tasks already in that file stay, so they can be run one by one.

    bpb          bits per byte on the held-out text of the corpus the model was trained on
    four_way     molegrad.gpt.evaluate.tasks
    arithmetic   molegrad.gpt.evaluate.tasks, fine-tuned models only
    spelling     molegrad.gpt.evaluate.tasks, fine-tuned models only
    samples      texts from fixed prompts, most likely token first

How to run:

    python -m scripts.base_eval --run=first
    python -m scripts.chat_eval --run=first --tasks=arithmetic,spelling --max-questions=200
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from rich.console import Console
from rich.table import Table

from molegrad.gpt import runs
from molegrad.gpt.data.conversations import summary_pairs
from molegrad.gpt.data.loader import validation_batches
from molegrad.gpt.data.tokens import CorpusTokens
from molegrad.gpt.evaluate import tasks
from molegrad.gpt.model.bpb import bits_per_byte
from molegrad.gpt.model.engine import answer
from molegrad.gpt.train import base as train
from molegrad.gpt.train import checkpoint, flags
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.hardware import device_name, pick_device
from molegrad.gpt.train.sft import QUESTIONS

TASKS = {
    "base": ("bpb", "four_way", "samples"),
    "sft": ("bpb", "four_way", "arithmetic", "spelling", "samples"),
}


@dataclass(frozen=True)
class EvalConfig:
    """What both evaluations share; the two below name the stage, which decides the tasks."""

    stage: ClassVar[str]  # "base" or "sft"

    run: str = flag("dummy", "name of the run")
    model_tag: str = flag("", "suffix of the stage's folder, as in training")
    step: int = flag(-1, "checkpoint to evaluate; -1 is the newest")
    tasks: str = flag("all", "comma separated names, or all that the model has")
    device_type: str = flag("", "cuda, cpu or mps; empty takes the best there is")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "dtype of the matrix products; auto is bfloat16 on CUDA, else float32"
    )
    threads: int = flag(0, "CPU threads of torch; 0 leaves torch's choice")
    batch_size: int = flag(0, "sequences at a time; 0 takes what training did")
    eval_tokens: int = flag(0, "tokens for bpb; 0 takes what training did")
    max_questions: int = flag(500, "questions per task")
    seed: int = flag(0, "seed of the questions")
    if_needed: bool = flag(False, "do nothing where these weights have been evaluated like this")

    def __post_init__(self) -> None:
        for name in ("threads", "batch_size", "eval_tokens", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_questions < 1:
            raise ValueError(f"max_questions must be at least 1, got {self.max_questions}")
        chosen(self)


@dataclass(frozen=True)
class BaseEvalConfig(EvalConfig):
    """Evaluate a run's base model: bpb, four_way, samples.

    The result is printed and written to runs/RUN/base/eval_NNNNNN.json.
    """

    stage = "base"


@dataclass(frozen=True)
class ChatEvalConfig(EvalConfig):
    """Evaluate a run's fine-tuned model: bpb, four_way, arithmetic, spelling, samples.

    The result is printed and written to runs/RUN/sft/eval_NNNNNN.json.
    """

    stage = "sft"


def chosen(config: EvalConfig) -> list[str]:
    """The tasks that the flag names, in their order; ValueError for an unknown one."""
    known = TASKS[config.stage]
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    if names == ["all"]:
        return list(known)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"tasks={config.tasks!r}: a {config.stage} model has the tasks {', '.join(known)}, "
            "or all"
        )
    return [name for name in known if name in names]


@flags.command("base_eval")
def main_base(argv: list[str] | None = None) -> int:
    """python -m scripts.base_eval"""
    evaluate(flags.parse(BaseEvalConfig, argv, prog="python -m scripts.base_eval"))
    return 0


@flags.command("chat_eval")
def main_chat(argv: list[str] | None = None) -> int:
    """python -m scripts.chat_eval"""
    evaluate(flags.parse(ChatEvalConfig, argv, prog="python -m scripts.chat_eval"))
    return 0


def evaluate(config: EvalConfig) -> dict:
    """Run the tasks; returns what is written: model, machine, and per task its result.

    Raises:
        FileNotFoundError: the checkpoint is not there; the message says what is.
        ValueError: a task cannot be asked, as with a corpus that is too small.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device_type)
    opened = runs.open_stage(config.run, config.stage, config.model_tag, config.step, device)
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if low else torch.float32
    path = eval_path(opened.folder, opened.step)
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    asked = {k: v for k, v in flags.resolved(config).items() if k != "if_needed"}
    weights = checkpoint.weights_checksum(opened.folder, opened.step)
    before = (record.get("weights"), record.get("config"))
    if config.if_needed and before == (weights, asked) and {*chosen(config)} <= {*record["tasks"]}:
        print(f"{path} is done: these weights have been evaluated with these flags")
        return record
    if before[0] != weights:
        record = {}
    record |= {
        "run": opened.run,
        "stage": opened.stage,
        "step": opened.step,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "config": asked,  # of the newest call
        "weights": weights,
    }
    results = record.setdefault("tasks", {})
    for name in chosen(config):
        results.pop(name, None)
    for name in chosen(config):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=low):
            result = _run(name, opened, config, dtype)
        results[name] = {**result, "seconds": round(time.perf_counter() - begin, 3)}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(part, path)  # what is done stays done
    Console().print(table(record))
    for sample in (results.get("samples") or {}).get("texts", ()):
        print(f"sample | {sample!r}")
    print(f"written {path}")
    return record


def eval_path(folder: Path, step: int) -> Path:
    """The file of a step's results in a stage's folder."""
    return Path(folder) / f"eval_{step:06d}.json"


def read_evaluations(folder: Path) -> list[dict]:
    """All results in a stage's folder, by step."""
    found = sorted(Path(folder).glob("eval_[0-9]*.json"), key=lambda p: int(p.stem[5:]))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def table(record: dict) -> Table:
    """The results as a table for the terminal."""
    result = Table(title=f"{record['run']}/{record['stage']} step {record['step']}")
    for column in ("task", "result", "chance", "questions or tokens", "seconds"):
        result.add_column(column, justify="left" if column == "task" else "right")
    for name, task in record["tasks"].items():
        chance = f"{100 * task['chance']:.0f}%" if "chance" in task else ""
        size = task.get("questions", task.get("tokens"))
        size = "" if size is None else f"{size:,}"
        result.add_row(name, shown(name, task), chance, size, f"{task['seconds']:.1f}")
    return result


def shown(name: str, task: dict) -> str:
    """One task's result as text."""
    if name == "bpb":
        return f"{task['bpb']:.4f} bits per byte"
    if name == "samples":
        return f"{len(task['texts'])} texts"
    text = f"{100 * task['accuracy']:.1f}% ± {100 * task['standard_error']:.1f}"
    if "accuracy_total" in task:  # the other way to score
        text += f" (not per byte: {100 * task['accuracy_total']:.1f}%)"
    return text


def _run(name: str, opened: runs.OpenStage, config: EvalConfig, dtype: torch.dtype) -> dict:
    model, tokenizer = opened.model, opened.tokenizer
    fine_tuned = opened.stage == "sft"
    if name == "bpb":
        return _bpb(opened, config, dtype)
    if name == "samples":
        if fine_tuned:
            return {"texts": [f"{q} -> {answer(model, tokenizer, q)}" for q in QUESTIONS]}
        return {"texts": train.sample_texts(model, tokenizer, dtype)}
    corpus = runs.named_corpus(opened.config)
    settings = {"seed": config.seed, "corpus_sha256": corpus.manifest["sha256"]}
    if name == "four_way":
        pairs = summary_pairs(corpus, "val")
        questions = tasks.four_way_questions(pairs, config.max_questions, config.seed)
        batch = config.batch_size or 32
        return settings | tasks.run_four_way(model, tokenizer, questions, fine_tuned, batch)
    asked = tasks.held_out_exercises(name, corpus, config.max_questions, config.seed)
    return settings | tasks.run_exact_match(model, tokenizer, asked)


def _bpb(opened: runs.OpenStage, config: EvalConfig, dtype: torch.dtype) -> dict:
    """The same batches as at the end of base training, where its settings are kept."""
    trained = opened.config
    if opened.stage == "sft":  # on text, to show what fine-tuning cost: the base stage knows which
        folder = opened.folder.with_name(trained.get("base_stage", "base"))
        trained = runs.read_config(folder) or trained
    corpus, same = runs.training_corpus(trained)
    if not same:
        print("note: the corpus is not the one the model was trained on; bpb is not comparable")
    length = opened.model.config.max_seq_len
    rows = config.batch_size or trained.get("device_batch_size", 16)
    wanted = config.eval_tokens or trained.get("eval_tokens") or 65536
    count = max(1, wanted // (rows * length))
    source = CorpusTokens(corpus, "val", opened.tokenizer)
    batches = validation_batches(source, rows, length, count, opened.model.device)
    return {
        "bpb": bits_per_byte(opened.model, batches, opened.tokenizer.token_bytes(), dtype),
        "tokens": count * rows * length,
        "corpus_sha256": corpus.manifest["sha256"],
        "corpus_as_trained": same,
    }
