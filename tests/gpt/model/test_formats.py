"""Weights in other libraries' formats: the same numbers, under their names."""

import json

import pytest
import torch
from safetensors.torch import load_file

from molegrad.gpt.model.formats import to_huggingface, to_nanochat, to_safetensors
from molegrad.gpt.model.gpt import GPT, GPTConfig
from tests.gpt.model.test_gpt import small, stirred, tokens

MODELS = {
    "plain": {},
    "grouped": {"kv_groups": 2},
    "rounded-width": {"depth": 3, "aspect_ratio": 27},
    "no-softcap": {"softcap": 0.0, "rope_base": 500.0},
}


def model_of(name, std=0.3):
    return stirred(small(**MODELS[name]), std).eval()


def logits(model):
    with torch.no_grad():
        out = model(tokens()[0])
    return getattr(out, "logits", out)


def test_plain_safetensors_make_the_model_again(tmp_path):
    model = model_of("grouped")
    weights, config = to_safetensors(model, tmp_path)
    again = GPT(GPTConfig(**json.loads(config.read_text())))
    again.load_state_dict(load_file(weights))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(FileExistsError, match="another --output, or --overwrite"):
        to_safetensors(model, tmp_path)
    to_safetensors(model, tmp_path, torch.bfloat16, overwrite=True)
    assert {t.dtype for t in load_file(weights).values()} == {torch.bfloat16}


def test_hugging_face_names_and_sizes(tmp_path):
    model = model_of("grouped")
    config, weights = (p for p in to_huggingface(model, tmp_path, bos=52, end=56))
    config, theirs = json.loads(config.read_text()), load_file(weights)
    assert len(theirs) == len(model.state_dict()) == 14
    block = model.transformer["h"][1]
    for name, weight in {
        "model.embed_tokens": model.transformer["wte"],
        "model.layers.1.self_attn.k_proj": block.attn.c_k,
        "model.layers.1.self_attn.o_proj": block.attn.c_proj,
        "model.layers.1.mlp.fc1": block.mlp.c_fc,
        "model.layers.1.mlp.fc2": block.mlp.c_proj,
        "lm_head": model.lm_head,
    }.items():
        assert torch.equal(theirs[f"{name}.weight"], weight.weight), name
    assert (config["hidden_size"], config["num_key_value_heads"], config["dtype"]) == (
        64, 2, "float32",
    )  # fmt: skip
    assert (config["bos_token_id"], config["eos_token_id"]) == (52, [56, 52])


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_same_logits(name, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = model_of(name)
    to_huggingface(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.dtype == torch.float32
    expected = logits(model)
    assert expected.std() > 1, "the logits must depend on what is compared"
    torch.testing.assert_close(logits(theirs.eval()), expected, rtol=1e-4, atol=1e-4)


def test_the_nanochat_layout(tmp_path):
    model = model_of("grouped")
    written = to_nanochat(model, tmp_path, 1200, {"val_bpb": 0.9})
    assert [p.name for p in written] == ["model_001200.pt", "meta_001200.json"]
    meta = json.loads(written[1].read_text())
    assert meta["val_bpb"] == 0.9 and meta["model_config"] == {
        "sequence_len": 24, "vocab_size": 61, "n_layer": 2, "n_head": 4, "n_kv_head": 2,
        "n_embd": 64,
    }  # fmt: skip
    tensors = torch.load(written[0], weights_only=True)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    assert dtypes.pop("transformer.wte.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    for name, weight in model.state_dict().items():
        assert torch.equal(tensors[name], weight.to(tensors[name].dtype)), name
    with pytest.raises(ValueError, match=r"softcap=0.0, not 15.0, rope_base=500.0"):
        to_nanochat(model_of("no-softcap"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
