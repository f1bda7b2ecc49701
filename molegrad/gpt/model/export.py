"""Models out of a run and back in: Hugging Face, nanochat, plain safetensors.

    hf            config.json, model.safetensors, the tokenizer: a folder that
                  `transformers.AutoModelForCausalLM.from_pretrained` opens (NanoChatForCausalLM)
    nanochat      model_NNNNNN.pt and meta_NNNNNN.json, as nanochat's checkpoint folders have them
                  (its generation with RMSNorm without weights, relu², untied head, softcap 15)
    safetensors   model.safetensors under this model's names, which are those of a model of plain
                  nn.Linear layers, and model_config.json

Every format is read back by `load`. Nothing is unpickled: .pt files are read with
weights_only=True. What differs from this model and cannot be written is refused, not dropped.

How to run:

    python -m scripts.export --run=first --format=hf --output=first-hf
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from molegrad.gpt import runs as stages
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model.export_tokenizer import END, save_huggingface
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train import checkpoint, flags
from molegrad.gpt.train.flags import flag

CONFIG = "model_config.json"
_PARTS = {
    "transformer.wte": "model.embed_tokens",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "lm_head": "lm_head",
}
# transformers adds this to the mean of squares; F.rms_norm, which this model and nanochat call,
# adds the smallest number that float32 knows beside 1.
_RMS_EPS = torch.finfo(torch.float32).eps
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        stage = stages.newest_stage(config.run, config.model_tag)
    folder = stages.find_stage(config.run, stage, config.model_tag)
    model, meta = checkpoint.load_model(checkpoint.find(folder, config.step))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    dtype = _DTYPES.get(config.dtype)
    output = Path(config.output)
    if config.format == "hf":
        written = to_huggingface(model, output, tokenizer, dtype, config.overwrite)
    elif config.format == "nanochat":
        last = meta["extra"].get("progress", {}).get("last", {})
        about = {"val_bpb": last.get("val/bpb"), "user_config": meta["config"]}
        written = to_nanochat(model, output, meta["step"], about, dtype, config.overwrite)
    else:
        written = to_safetensors(model, output, dtype, config.overwrite)
    return written


# Hugging Face


def to_huggingface(
    model: GPT,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write `model` as a NanoChatForCausalLM; the files written.

    Args:
        tokenizer: written too, as `transformers.AutoTokenizer` reads it (see
            `molegrad.gpt.model.export_tokenizer`); None writes the model alone, which takes ids.
        dtype: of all weights; None takes that of the head.
    """
    c, dtype = model.config, dtype or model.lm_head.weight.dtype
    bos = end = None
    if tokenizer is not None:
        bos, end = tokenizer.bos, tokenizer.special(END)
    config = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": 4 * c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "max_position_embeddings": c.max_seq_len,
        "hidden_act": "relu2",
        "rms_norm_eps": _RMS_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "final_logit_softcapping": c.softcap or None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        # A base model ends a document by beginning the next one.
        "eos_token_id": None if bos is None else [end, bos],
        "pad_token_id": bos,
        "dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {_renamed(k, _PARTS): v for k, v in _weights(model, dtype).items()}
    config_file, weights_file = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    _prepare(overwrite, config_file, weights_file)
    _put(weights_file, lambda path: save_file(tensors, path, {"format": "pt"}))
    _put(config_file, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    written = [config_file, weights_file]
    if tokenizer is not None:
        written += save_huggingface(tokenizer, Path(folder), c.max_seq_len)
    return written


def from_huggingface(folder: Path, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a local folder with a NanoChatForCausalLM, in eval mode on the CPU.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: it is another architecture, or has an option that this model lacks.
    """
    folder = Path(folder)
    c = _read_json(folder / "config.json")
    if c.get("model_type") != "nanochat":
        raise ValueError(
            f"{folder / 'config.json'} has model_type={c.get('model_type')!r}: this model holds "
            "only weights of model_type 'nanochat'"
        )
    width, heads = c["hidden_size"], c["num_attention_heads"]
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    base = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    wanted = {
        "hidden_act": ("relu2", c.get("hidden_act", "relu2")),
        "intermediate_size": (4 * width, c["intermediate_size"]),
        "attention_bias": (False, c.get("attention_bias", False)),
        "tie_word_embeddings": (False, c.get("tie_word_embeddings", False)),
        "rope_type": ("default", rope.get("rope_type", "default")),
        "head_dim": (width // heads, c.get("head_dim", width // heads)),
    }
    _refuse(folder / "config.json", {k: v for k, v in wanted.items() if v[0] != v[1]})
    config = _sizes(
        folder,
        depth=c["num_hidden_layers"],
        width=width,
        n_head=heads,
        n_kv_head=c.get("num_key_value_heads") or heads,
        vocab_size=c["vocab_size"],
        max_seq_len=c.get("max_position_embeddings", 2048),
        softcap=c.get("final_logit_softcapping", 15.0) or 0.0,
        rope_base=base,
    )
    index = folder / "model.safetensors.index.json"
    names = set(_read_json(index)["weight_map"].values()) if index.exists() else set()
    tensors: dict[str, Tensor] = {}
    for name in sorted(names) or ["model.safetensors"]:
        tensors |= _read_safetensors(folder / name)
    back = {theirs: ours for ours, theirs in _PARTS.items()}
    return _filled(config, {_renamed(k, back): v for k, v in tensors.items()}, folder, dtype)


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    """A weight's name in the other library: the parts are exchanged, the layer's number stays."""
    for ours, theirs in (("transformer.h.", "model.layers."), ("model.layers.", "transformer.h.")):
        found = re.fullmatch(re.escape(ours) + r"(\d+)\.(.+)\.weight", name)
        if found and found.group(2) in parts:
            return f"{theirs}{found.group(1)}.{parts[found.group(2)]}.weight"
    stem = name.removesuffix(".weight")
    return f"{parts[stem]}.weight" if stem in parts else name


# nanochat


def to_nanochat(
    model: GPT,
    folder: Path,
    step: int = 0,
    about: dict | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write model_NNNNNN.pt and meta_NNNNNN.json; the files written.

    Ids are all that is shared with nanochat's tokenizer, which is a pickled file of its own:
    texts must be encoded with the run's tokenizer.

    Args:
        about: further entries of the meta file, JSON-able.
        dtype: of all weights; None rounds the embedding to bfloat16, which nanochat trains it in,
            and leaves the others.

    Raises:
        ValueError: the model has what nanochat does not know (another softcap or rotary base).
    """
    c = model.config
    fixed = {"softcap": (15.0, c.softcap), "rope_base": (10000.0, c.rope_base)}
    _refuse("nanochat", {k: v for k, v in fixed.items() if v[0] != v[1]})
    tensors = _weights(model, dtype)
    if dtype is None:
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.bfloat16)
    meta = {
        "step": step,
        **(about or {}),
        "model_config": {
            "sequence_len": c.max_seq_len,
            "vocab_size": c.vocab_size,
            "n_layer": c.depth,
            "n_head": c.n_head,
            "n_kv_head": c.n_kv_head,
            "n_embd": c.width,
        },
    }
    model_file = Path(folder) / f"model_{step:06d}.pt"
    meta_file = Path(folder) / f"meta_{step:06d}.json"
    _prepare(overwrite, model_file, meta_file)
    _put(model_file, lambda path: torch.save(tensors, path))
    _put(meta_file, lambda path: path.write_text(json.dumps(meta, indent=2) + "\n"))
    return [model_file, meta_file]


def from_nanochat(folder: Path, step: int = -1, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a nanochat checkpoint folder, in eval mode on the CPU; step -1 is the newest.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is of another generation of nanochat, whose model differs.
    """
    folder = Path(folder)
    steps = {int(p.stem.removeprefix("model_")): p for p in folder.glob("model_[0-9]*.pt")}
    if not steps or step not in (-1, *steps):
        have = f"steps {', '.join(map(str, sorted(steps)))}" if steps else "no model_NNNNNN.pt"
        raise FileNotFoundError(f"{folder} has {have}: name a folder of nanochat's checkpoints")
    path = steps[max(steps) if step < 0 else step]
    c = _read_json(path.with_name(path.name.replace("model_", "meta_")).with_suffix(".json"))
    c = c["model_config"]
    config = _sizes(
        path,
        depth=c["n_layer"],
        width=c["n_embd"],
        n_head=c["n_head"],
        n_kv_head=c["n_kv_head"],
        vocab_size=c["vocab_size"],
        max_seq_len=c["sequence_len"],
    )
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {k.removeprefix("_orig_mod."): v for k, v in tensors.items()}
    return _filled(config, tensors, path, dtype)


# Plain safetensors


def to_safetensors(
    model: GPT, folder: Path, dtype: torch.dtype | None = None, overwrite: bool = False
) -> list[Path]:
    """Write model.safetensors and model_config.json; the files written. dtype None leaves each
    weight as it is."""
    weights_file, config_file = Path(folder) / "model.safetensors", Path(folder) / CONFIG
    _prepare(overwrite, weights_file, config_file)
    tensors = _weights(model, dtype)
    _put(weights_file, lambda path: save_file(tensors, path, {"format": "pt"}))
    text = json.dumps(asdict(model.config), indent=2) + "\n"
    _put(config_file, lambda path: path.write_text(text))
    return [weights_file, config_file]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a folder in any of the three formats, told by its files; newest step.

    Raises:
        FileNotFoundError: it is none of them.
        ValueError: see `from_huggingface` and `from_nanochat`.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        config = GPTConfig(**_read_json(folder / CONFIG))
        return _filled(config, _read_safetensors(folder / "model.safetensors"), folder, dtype)
    if (folder / "config.json").exists():
        return from_huggingface(folder, dtype)
    return from_nanochat(folder, dtype=dtype)


# What they share


def _weights(model: GPT, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies on the CPU: no two share memory, which safetensors refuses."""
    return {
        name: tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }


def _sizes(path: Path, *, depth: int, width: int, n_head: int, n_kv_head: int, **rest) -> GPTConfig:
    """The configuration of a model whose width is given, not made from its depth."""
    if width % n_head or n_head % n_kv_head:
        raise ValueError(
            f"{path} has width {width}, {n_head} heads and {n_kv_head} key/value heads: each must "
            "be a multiple of the next"
        )
    sizes = {"head_dim": width // n_head, "kv_groups": n_head // n_kv_head, **rest}
    config = GPTConfig(depth=depth, aspect_ratio=max(1, width // depth), **sizes)
    if config.width != width:
        raise ValueError(
            f"{path} has width {width} at depth {depth}, which aspect_ratio * depth, rounded up to "
            f"heads of {width // n_head}, does not reach: this model cannot hold it"
        )
    return config


def _filled(config: GPTConfig, tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> GPT:
    """A model of these weights in eval mode; ValueError names those that do not fit."""
    with torch.device("meta"):
        model = GPT(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differ = sorted(set(wanted.items()) ^ set(given.items()))
    if differ:
        shown = ", ".join(f"{name} {shape}" for name, shape in differ[:4])
        raise ValueError(
            f"{path} is not of this architecture (RMSNorm without weights, no further matrices): "
            f"{len(differ)} weights are in one of both only, such as {shown}"
        )
    model.to_empty(device="cpu")
    model.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, assign=True)
    model.reset_buffers()
    for p in model.parameters():
        p.requires_grad_(True)
    return model.eval()


def _refuse(where, differ: dict[str, tuple]) -> None:
    """ValueError for options (name: (what must be, what is))."""
    if differ:
        listed = ", ".join(f"{name}={has!r}, not {must!r}" for name, (must, has) in differ.items())
        raise ValueError(f"{where} and this model differ in {listed}: such a model can't be taken")


def _prepare(overwrite: bool, *paths: Path) -> None:
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{there[0]} exists: give another --output, or --overwrite to write over it"
        )
    paths[0].parent.mkdir(parents=True, exist_ok=True)


def _put(path: Path, write) -> None:
    """`write` to another name, then rename: a file is whole or absent."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors leaves files that only their owner may read
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: name a folder that holds a whole model")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: name a folder that holds a whole model")
    return load_file(path)
