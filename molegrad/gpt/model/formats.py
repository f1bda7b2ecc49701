"""A model's weights as other libraries read them; `python -m scripts.export` writes them.

    hf            config.json and model.safetensors: a folder that
                  `transformers.AutoModelForCausalLM.from_pretrained` opens (NanoChatForCausalLM)
    nanochat      model_NNNNNN.pt and meta_NNNNNN.json, as nanochat's checkpoint folders have them
                  (its generation with RMSNorm without weights, relu², untied head, softcap 15)
    safetensors   model.safetensors under this model's names, which are those of a model of plain
                  nn.Linear layers, and model_config.json

What a format cannot hold is refused, not dropped. `dtype` is that of all weights; None leaves each
as it is. Every function returns the files that it has written.

Raises: FileExistsError where files of an earlier export are there and `overwrite` is False.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from molegrad.gpt.model.gpt import GPT

_HUGGING_FACE = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    ("attn.c_q.", "self_attn.q_proj."),
    ("attn.c_k.", "self_attn.k_proj."),
    ("attn.c_v.", "self_attn.v_proj."),
    ("attn.c_proj.", "self_attn.o_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
# transformers adds this to the mean of squares; F.rms_norm, which this model and nanochat call,
# adds the smallest number that float32 knows beside 1.
_RMS_EPS = torch.finfo(torch.float32).eps


def to_huggingface(
    model: GPT,
    folder: Path,
    bos: int | None = None,
    end: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write `model` as a NanoChatForCausalLM, all weights in one dtype (None: the head's).

    Args:
        bos, end: ids of the tokens that begin a document and end an answer; None without a
            tokenizer.
    """
    c, dtype = model.config, dtype or model.lm_head.weight.dtype
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
    tensors = {_renamed(name): tensor for name, tensor in _weights(model, dtype).items()}
    return _write(overwrite, {
        Path(folder) / "config.json": _json(config),
        Path(folder) / "model.safetensors": _safetensors(tensors),
    })  # fmt: skip


def _renamed(name: str) -> str:
    for ours, theirs in _HUGGING_FACE:
        name = name.replace(ours, theirs)
    return name


def to_nanochat(
    model: GPT,
    folder: Path,
    step: int = 0,
    about: dict | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write `model` as a checkpoint of nanochat.

    Ids are all that is shared with nanochat's tokenizer, which is a pickled file of its own:
    texts must be encoded with the run's tokenizer.

    Args:
        about: further entries of the meta file, JSON-able.
        dtype: None rounds the embedding to bfloat16, which nanochat trains it in.

    Raises:
        ValueError: the model has what nanochat does not know (another softcap or rotary base).
    """
    c = model.config
    fixed = {"softcap": (15.0, c.softcap), "rope_base": (10000.0, c.rope_base)}
    differ = [f"{name}={has}, not {must}" for name, (must, has) in fixed.items() if has != must]
    if differ:
        raise ValueError(
            f"nanochat and this model differ in {', '.join(differ)}: export it as hf or safetensors"
        )
    tensors = _weights(model, dtype)
    if dtype is None:
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.bfloat16)
    sizes = {
        "sequence_len": c.max_seq_len,
        "vocab_size": c.vocab_size,
        "n_layer": c.depth,
        "n_head": c.n_head,
        "n_kv_head": c.n_kv_head,
        "n_embd": c.width,
    }
    meta = {"step": step, **(about or {}), "model_config": sizes}
    return _write(overwrite, {
        Path(folder) / f"model_{step:06d}.pt": lambda path: torch.save(tensors, path),
        Path(folder) / f"meta_{step:06d}.json": _json(meta),
    })  # fmt: skip


def to_safetensors(
    model: GPT, folder: Path, dtype: torch.dtype | None = None, overwrite: bool = False
) -> list[Path]:
    """Write `model` under its own names."""
    return _write(overwrite, {
        Path(folder) / "model.safetensors": _safetensors(_weights(model, dtype)),
        Path(folder) / "model_config.json": _json(asdict(model.config)),
    })  # fmt: skip


def _weights(model: GPT, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies on the CPU: no two share memory, which safetensors refuses."""
    return {
        name: tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }


def _json(value: dict) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _safetensors(tensors: dict[str, Tensor]) -> Callable[[Path], object]:
    return lambda path: save_file(tensors, path, {"format": "pt"})


def _write(overwrite: bool, writers: dict[Path, Callable[[Path], object]]) -> list[Path]:
    """Each file is written under another name, then renamed: it is whole or absent."""
    there = [path for path in writers if path.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{there[0]} exists: give another --output, or --overwrite to write over it"
        )
    for path, write in writers.items():
        path.parent.mkdir(parents=True, exist_ok=True)
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
    return list(writers)
