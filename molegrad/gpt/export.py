"""The model of a run for other libraries: Hugging Face, nanochat, plain safetensors.

`molegrad.gpt.model.formats` says what each format holds. The Hugging Face folder has the tokenizer
too, as `transformers.AutoTokenizer` reads it.

How to run:

    python -m scripts.export --run=first --format=hf --output=first-hf
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from molegrad.gpt import runs
from molegrad.gpt.data.huggingface import END, save_huggingface
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model.formats import to_huggingface, to_nanochat, to_safetensors
from molegrad.gpt.train import checkpoint, flags
from molegrad.gpt.train.flags import flag


@dataclass(frozen=True)
class ExportConfig:
    """Write the model of a run for other libraries."""

    run: str = flag("dummy", "name of the run")
    stage: Literal["auto", "base", "sft"] = flag(
        "auto", "stage of the run; auto takes sft where there is one"
    )
    model_tag: str = flag("", "suffix of the stage's folder, as in training")
    step: int = flag(-1, "checkpoint to export; -1 is the newest")
    format: Literal["hf", "nanochat", "safetensors"] = flag(
        "hf", "hf opens with transformers, nanochat with nanochat, safetensors holds plain weights"
    )
    output: str = flag("", "folder to write into; made if missing")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto",
        "dtype of the weights; auto is what they were trained in, for nanochat with its bfloat16 "
        "embedding",
    )
    overwrite: bool = flag(False, "write over files of an earlier export")

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty: give the folder to write into, as --output=DIR")


@flags.command("export")
def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 2 after a message that says what does not fit."""
    written = export(flags.parse(ExportConfig, argv, prog="python -m scripts.export"))
    print("\n".join(f"wrote {path}" for path in written))
    return 0


def export(config: ExportConfig) -> list[Path]:
    """Write the model that `config` names; the files written.

    Raises:
        FileNotFoundError: run, stage, step or tokenizer is missing; the message says what is there.
        FileExistsError: the folder has files of an earlier export.
        ValueError: the format cannot hold this model.
    """
    stage = config.stage
    if stage == "auto":
        stage = runs.newest_stage(config.run, config.model_tag)
    folder = runs.find_stage(config.run, stage, config.model_tag)
    model, meta = checkpoint.load_model(checkpoint.find(folder, config.step))
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    output = Path(config.output)
    if config.format == "safetensors":
        return to_safetensors(model, output, dtype, config.overwrite)
    if config.format == "nanochat":
        last = meta["extra"].get("progress", {}).get("last", {})
        about = {"val_bpb": last.get("val/bpb"), "user_config": meta["config"]}
        return to_nanochat(model, output, meta["step"], about, dtype, config.overwrite)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    ids = tokenizer.bos, tokenizer.special(END)
    written = to_huggingface(model, output, *ids, dtype, config.overwrite)
    return written + save_huggingface(tokenizer, output, model.config.max_seq_len)
