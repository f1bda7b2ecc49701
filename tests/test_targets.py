"""What the names of layers say."""

import pytest

from molegrad.targets import layer_role, matches

ROLES = {
    # nanochat and GPT-2
    "transformer.h.0.mlp.c_fc": "ffn",
    "transformer.h.11.mlp.c_proj": "ffn",
    "transformer.h.0.attn.c_q": "attention",
    "transformer.h.0.attn.c_proj": "attention",
    "h.0.attn.c_attn": "attention",
    "lm_head": "head",
    # Llama, Mistral, Qwen, Gemma
    "model.layers.0.mlp.gate_proj": "ffn",
    "model.layers.0.mlp.up_proj": "ffn",
    "model.layers.0.mlp.down_proj": "ffn",
    "model.layers.0.self_attn.q_proj": "attention",
    "model.layers.0.self_attn.o_proj": "attention",
    "model.layers.3.mlp.experts.5.w1": "ffn",
    "model.layers.3.block_sparse_moe.experts.0.w2": "ffn",
    # Phi, GPT-NeoX, Falcon, OPT, BLOOM
    "model.layers.0.mlp.fc1": "ffn",
    "model.layers.0.mlp.gate_up_proj": "ffn",
    "gpt_neox.layers.0.mlp.dense_h_to_4h": "ffn",
    "gpt_neox.layers.0.attention.query_key_value": "attention",
    "gpt_neox.layers.0.attention.dense": "attention",
    "transformer.h.0.self_attention.dense": "attention",
    "model.decoder.layers.0.fc2": "ffn",
    "model.decoder.layers.0.self_attn.out_proj": "attention",
    "embed_out": "head",
    # BERT, T5, DistilBERT, ViT, original Llama
    "bert.encoder.layer.0.attention.self.query": "attention",
    "bert.encoder.layer.0.attention.output.dense": "attention",
    "bert.encoder.layer.0.intermediate.dense": "ffn",
    "bert.encoder.layer.0.output.dense": "ffn",
    "encoder.block.0.layer.1.DenseReluDense.wi_0": "ffn",
    "encoder.block.0.layer.1.DenseReluDense.wo": "ffn",
    "encoder.block.0.layer.0.SelfAttention.k": "attention",
    "transformer.layer.0.ffn.lin1": "ffn",
    "layers.0.feed_forward.w3": "ffn",
    "layers.0.attention.wq": "attention",
    "classifier": "head",
    "model.embed_proj": "other",
}  # fmt: skip


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_layers_are_found_where_models_put_them(name, role):
    assert layer_role(name) == role


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("h.0.mlp.c_proj", True),
        ("c_proj", True),
        ("mlp.c_proj", True),
        ("proj", False),
        ("mlp", True),  # a parent
        ("h.0", False),
        (r"h\.\d\.mlp\..*", True),
        (r"h\.\d", False),  # a regular expression is for the whole name
        ("", False),
    ],
)
def test_patterns(pattern, matched):
    assert matches(pattern, "h.0.mlp.c_proj") is matched
