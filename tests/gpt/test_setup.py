"""Optimizers: every parameter in one group, learning rates by role; placement; processes."""

import pytest
import torch

from molegrad.gpt import setup
from molegrad.gpt.train_config import BaseTrainConfig, resolve
from molegrad.optim import Muon
from tests.gpt.test_model import small


def config(**values):
    return resolve(BaseTrainConfig(**values), torch.device("cpu"))


STREAM = {
    "enable_streaming": True,
    "streaming_rank_k": 4,
    "streaming_min_layer_utilization": 0.0,
}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"optimizer": "adamw"},
        {**STREAM, "streaming_gradient_mode": "dense"},
        {**STREAM, "streaming_gradient_mode": "factored"},
        {**STREAM, "streaming_gradient_mode": "factored", "streaming_target_layers": "all"},
        {**STREAM, "optimizer": "adamw"},
    ],
)
def test_every_trainable_parameter_is_in_exactly_one_group(values):
    model, c = small(), config(**values)
    setup.equip(model, c)
    optimizers = setup.build_optimizers(model, c)
    taken = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(taken) == len(set(taken))
    assert {id(p) for p in model.parameters() if p.requires_grad} <= set(taken)
    assert {id(p) for p in model.parameters()} == set(taken)
    assert all(g["initial_lr"] == g["lr"] and g["name"] for o in optimizers for g in o.param_groups)


def test_learning_rates_by_role():
    model, c = small(), config(embedding_lr=0.3, unembedding_lr=0.01, matrix_lr=0.05)
    optimizers = setup.build_optimizers(model, c)
    rates = {g["name"]: g["lr"] for o in optimizers for g in o.param_groups}
    scale = (64 / 768) ** -0.5
    assert rates == {
        "embedding": pytest.approx(0.3 * scale),
        "head": pytest.approx(0.01 * scale),
        "matrix_dense": 0.05,
    }
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, Muon]


def test_a_rank_that_fits_no_layer_is_named():
    c = config(enable_streaming=True, streaming_rank_k=4000)
    with pytest.raises(ValueError, match="takes no layer of this model"):
        setup.equip(small(), c)


def test_placement():
    model = setup.place(small(), config(weight_dtype="bfloat16"), torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cos.dtype == torch.float32
    model = setup.place(small(), config(dtype="bfloat16"), torch.device("cpu"))
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert dtypes.pop("transformer.wte.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}


def test_processes_from_the_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert setup.Processes.from_environment() == setup.Processes(0, 0, 1)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    processes = setup.Processes.from_environment()
    assert processes == setup.Processes(3, 1, 4) and not processes.first
