"""An estimator of one's own, written here alone, does all that the others do."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tests.test_distributed as distributed
from molegrad import (
    Estimator,
    MoleGradConfig,
    bases_state_dict,
    convert,
    in_chunks,
    load_bases_state_dict,
    plan,
    revert,
)
from molegrad.monitor import layer_metrics
from molegrad.ops.linear import linear_op
from molegrad.optim import Muon, matrix_param_groups
from molegrad.options import option
from tests.models import MLP, TinyGPT


class RowSum:
    """Keeps the rows of G = BᵀA with an even index, and counts its tokens."""

    def __init__(self, weight, tokens, factor) -> None:
        self.sum, self.tokens, self.factor = torch.zeros_like(weight), tokens, factor

    def add(self, a, b, a_scale=None) -> None:
        a = a if a_scale is None else a.to(b.dtype) * a_scale[:, None].to(b.dtype)
        self.sum[::2] += self.factor * (b[:, ::2].mT @ a).to(self.sum.dtype)
        self.tokens += a.shape[0]

    def finish(self):
        return (self.sum,)


linear_op(
    "linear_even_rows", "Tensor tokens, float factor", lambda name, weight, *own: None, RowSum
)


@dataclass(frozen=True)
class EvenRows(Estimator):
    METHODS = {"even_rows": {}}
    MODES = ("grad",)
    STATS = ("tokens_seen",)
    OP, ACCUMULATOR = "linear_even_rows", RowSum

    factor: float = option(1.0, "factor on the rows")

    def refusal(self, m, n, name=""):
        return "has an odd number of rows" if m % 2 else None

    def new_tensors(self, weight, mode, name):
        return {"tokens": torch.zeros(1)}

    def reset(self, state, draw=0):
        state.tensors["tokens"].zero_()

    def arguments(self, state):
        return state.tensors["tokens"], self.factor

    def stats(self, state):
        return state.tensors["tokens"]


CONFIG = MoleGradConfig.of(method="even_rows", factor=2.0, target_layers="all")


def test_it_trains_is_logged_and_comes_back():
    torch.manual_seed(0)
    model, truth = TinyGPT(depth=1), TinyGPT(depth=1)
    truth.load_state_dict(model.state_dict())
    assert "taken, even_rows" in str(plan(model, CONFIG))
    convert(model, CONFIG)
    idx = torch.randint(50, (2, 9))
    for one in (model, truth):
        one(idx).square().mean().backward()
    grad, full = (one.h[0].mlp.c_fc.weight.grad for one in (model, truth))
    torch.testing.assert_close(grad[::2], 2 * full[::2])
    assert not grad[1::2].any()
    optimizer = Muon(matrix_param_groups(model.h), lr=0.1)
    before = model.h[0].mlp.c_fc.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.h[0].mlp.c_fc.weight)
    metrics = layer_metrics(model, [optimizer])["h.0.mlp.c_fc"]
    assert metrics["tokens_seen"] == 18 and "layer_memory_usage" in metrics
    assert type(revert(model).h[0].mlp.c_fc) is nn.Linear


def test_it_is_saved_and_resumed():
    config = MoleGradConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict())))
    assert config == CONFIG and config.method == "even_rows"
    models = [convert(MLP(8, 16), config, target_layers=[".*"]) for _ in range(2)]
    models[0](torch.randn(5, 8)).sum().backward()
    load_bases_state_dict(models[1], bases_state_dict(models[0]))
    assert models[1].c_fc.metrics() == {"tokens_seen": 5.0}


@pytest.mark.parametrize("saved_inputs", ["full", "fp8"])
def test_it_runs_in_chunks_and_compiled(saved_inputs):
    torch.manual_seed(0)
    config = CONFIG.changed(saved_inputs=saved_inputs, target_layers=[".*"])
    mlp = convert(MLP(8, 16), config)
    x = torch.randn(2, 7, 8)
    mlp(x).square().sum().backward()
    expected = mlp.c_proj.weight.grad.clone()
    found = []
    for call in (
        lambda x: in_chunks(lambda x, fc: fc(x).relu(), (x,), (mlp.c_fc,), 4, last=mlp.c_proj),
        torch.compile(mlp, fullgraph=True, backend="aot_eager"),
    ):
        mlp.zero_grad()
        call(x).square().sum().backward()
        found.append(mlp.c_proj.weight.grad)
    for grad in found:  # in chunks nothing is saved, and so nothing rounded
        assert (grad - expected).norm() < (0.1 if saved_inputs == "fp8" else 1e-5) * expected.norm()


def test_two_processes_give_the_update_of_one():
    results = distributed.run_two_processes(CONFIG)
    model, optimizers = distributed.build(CONFIG)
    expected = distributed.train(model, model, optimizers, distributed.batches())
    for ours, truth in zip(results[0], expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-8)
