"""Trained models by name: which stages a run has, and how to open one for evaluation and chat.

A run is a folder runs/NAME with a sub folder per stage: `base` (base training), `sft` (fine-tuning)
or `base-TAG`, `sft-TAG` where --model-tag was given. A stage holds config.json, metrics.jsonl, the
tokenizer and the checkpoints, so it can be opened without anything else.

How to run: `opened = open_stage("first", "sft")`, then `opened.model`, `opened.tokenizer`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from molegrad.gpt import paths
from molegrad.gpt.data.corpus import Corpus, open_corpus
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.train import checkpoint

STAGES = ("base", "sft")


@dataclass(frozen=True)
class OpenStage:
    """A trained model with its tokenizer, and where it came from."""

    model: GPT  # in eval mode, on its device
    tokenizer: Tokenizer
    run: str
    stage: str  # "base" or "sft"
    folder: Path  # of the stage
    step: int
    config: dict  # the stage's config.json, or the checkpoint's configuration where that is gone

    @property
    def name(self) -> str:
        """RUN/STAGE step N, for people."""
        return f"{self.run}/{self.folder.name} step {self.step}"


def run_names() -> list[str]:
    """The runs that are there, by name."""
    folder = paths.home() / "runs"
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def find_run(run: str) -> Path:
    """The folder of a run; nothing is created.

    Raises:
        FileNotFoundError: there is no such run; the message lists those that are there.
        ValueError: the name can't be a folder's name.
    """
    folder = paths.home() / "runs" / paths.check_run_name(run)
    if not folder.is_dir():
        have = ", ".join(run_names()) or "none"
        raise FileNotFoundError(
            f"there is no run {run!r} under {folder.parent} (there are: {have}): give --run=NAME, "
            "or train with python -m scripts.base_train"
        )
    return folder


def stage_folders(run: str) -> list[Path]:
    """The stage folders of a run, base before sft, the untagged one first."""
    folders = find_run(run).iterdir()
    known = [p for p in folders if p.is_dir() and p.name.partition("-")[0] in STAGES]
    return sorted(known, key=lambda p: (STAGES.index(p.name.partition("-")[0]), p.name))


def find_stage(run: str, stage: str, model_tag: str = "") -> Path:
    """The folder of a stage of a run; nothing is created.

    Raises:
        FileNotFoundError: it is not there; the message says what is and how to make it.
        ValueError: stage is neither "base" nor "sft".
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    folder = find_run(run) / (stage + (f"-{model_tag}" if model_tag else ""))
    if not folder.is_dir():
        have = ", ".join(p.name for p in stage_folders(run)) or "nothing trained"
        script = "base_train" if stage == "base" else "chat_sft"
        raise FileNotFoundError(
            f"run {run!r} has no {folder.name} (it has: {have}): make it with "
            f"python -m scripts.{script} --run={run}"
        )
    return folder


def newest_stage(run: str, model_tag: str = "") -> str:
    """ "sft" where the run has a fine-tuned checkpoint, otherwise "base"."""
    folder = find_run(run) / ("sft" + (f"-{model_tag}" if model_tag else ""))
    return "sft" if folder.is_dir() and checkpoint.latest(folder) else "base"


def open_stage(
    run: str,
    stage: str,
    model_tag: str = "",
    step: int = -1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> OpenStage:
    """The model of a checkpoint (-1: the newest), its tokenizer and its record.

    The weights are converted to `dtype`, whatever they were saved in.

    Raises:
        FileNotFoundError: run, stage, step or tokenizer is missing; the message says what is there.
        ValueError: checkpoint and tokenizer do not belong together.
    """
    folder = find_stage(run, stage, model_tag)
    step_folder = checkpoint.find(folder, step)
    model, meta = checkpoint.load_model(step_folder, device)
    model.to(dtype)
    model.reset_buffers()  # the rotary tables stay float32
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{step_folder} has a vocabulary of {model.config.vocab_size}, the tokenizer beside it "
            f"({folder / 'tokenizer'}) {tokenizer.vocab_size}: the stage was written over by two "
            "runs; train again with --overwrite"
        )
    config = read_config(folder) or meta["config"]
    return OpenStage(model, tokenizer, run, stage, folder, meta["step"], config)


def read_config(folder: Path) -> dict:
    """config.json of a stage, or {} where there is none."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def training_corpus(config: dict) -> tuple[Corpus, bool]:
    """The corpus that a stage's configuration names, and whether its text is still the same.

    The embedded corpus moves with the versions of the installed packages; a local file may have
    been edited. True where config has no hash to compare with.
    """
    corpus = open_corpus(
        config.get("data", "embedded"), config.get("val_data", ""), config.get("data_max_bytes", 0)
    )
    recorded = (config.get("corpus") or {}).get("sha256")
    return corpus, recorded in (None, corpus.manifest["sha256"])


def named_corpus(config: dict) -> Corpus:
    """A corpus whose documents have names (for summaries and the words to spell): the embedded one,
    limited as the stage's configuration limits it where that names the embedded one too."""
    limit = config.get("data_max_bytes", 0) if config.get("data", "embedded") == "embedded" else 0
    return open_corpus("embedded", max_bytes=limit)
