"""A layer's gradient from chunks of its tokens is the one that its own backward pass makes."""

import copy
import math

import pytest
import torch
from torch import nn

from molegrad import MoleGradConfig, MoleLinear
from molegrad.chunked import LayerGradient, parameters_of, require_chunkable

T, N, M = 37, 24, 40
CONFIGS = {
    "plain": None,
    "tangent": {"method": "tangent", "rank_k": 4},
    "tangent, probes": {"method": "tangent", "rank_k": 4, "probes": 3, "trust_scaling": True},
    "factors": {"method": "tangent", "gradient_mode": "factors", "rank_k": 4, "probes": 2},
    "factors, fp8": {
        "method": "tangent",
        "gradient_mode": "factors",
        "rank_k": 4,
        "products": "fp8",
    },
    "tangent, fp8": {"method": "tangent", "rank_k": 4, "products": "fp8"},
    "sampled": {"method": "exact"},
    "momentum": {"method": "exact", "gradient_mode": "momentum"},
    "momentum, bfloat16": {
        "method": "exact",
        "gradient_mode": "momentum",
        "momentum_dtype": "bfloat16",
    },
    "momentum, int8": {
        "method": "exact",
        "gradient_mode": "momentum",
        "momentum_dtype": "int8",
    },
}


def make(name: str, bias: bool = True) -> nn.Linear:
    torch.manual_seed(2)
    linear = nn.Linear(N, M, bias=bias)
    values = CONFIGS[name]
    return linear if values is None else MoleLinear.from_linear(linear, MoleGradConfig.of(**values))


def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(T, N, generator=generator), torch.randn(T, M, generator=generator)


def gathered(layer: nn.Linear, chunk: int):
    a, b = data()
    gradient = LayerGradient(layer)
    for a_t, b_t in zip(a.split(chunk), b.split(chunk), strict=True):
        gradient.add(a_t, b_t)
    return gradient.finish()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [T, 8, 1])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_gradient_and_all_that_it_moves_are_those_of_the_whole(name, chunk, bias):
    layer = make(name, bias)
    whole = copy.deepcopy(layer)
    a, b = data()
    whole(a).backward(b)
    found = gathered(layer, chunk)
    for ours, parameter in zip(found, parameters_of(whole), strict=True):
        assert (ours is None) == (parameter.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)
    if isinstance(layer, MoleLinear):
        for ours, theirs in zip(
            *(e.config.estimator.bases(e.state) for e in (layer, whole)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    if name == "momentum":
        torch.testing.assert_close(layer.momentum.data, whole.momentum.data, rtol=1e-4, atol=1e-4)
        assert layer.momentum.abs().sum() > 0
    if name == "momentum, bfloat16":
        ours, theirs = layer.momentum.data.float(), whole.momentum.data.float()
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
    if name == "momentum, int8":
        ours, theirs = (x.momentum.float() * x.momentum_scale for x in (layer, whole))
        assert (ours - theirs).abs().max() <= theirs.abs().max() / 100
    if name.startswith("tangent"):
        torch.testing.assert_close(layer.stats, whole.stats, rtol=1e-3, atol=1e-3, equal_nan=True)
        assert int(layer.counter) == 1


def test_a_narrow_momentum_is_rounded_once_and_not_by_each_chunk():
    """A chunk's share of the gradient is below what bfloat16 can add to so large a momentum."""
    layer = make("momentum, bfloat16", bias=False)
    layer.momentum.data.fill_(64.0)
    gradient = LayerGradient(layer)
    for _ in range(16):
        gradient.add(torch.full((1, N), 0.25), torch.full((1, M), 0.25))
    gradient.finish()
    assert torch.equal(layer.momentum.data, torch.full((M, N), 65.0, dtype=torch.bfloat16))


def test_samples_of_chunks_are_unbiased_and_their_statistics_are_means():
    values = {"method": "sampled", "sampling_fraction": 0.3, "sampling_block": 2}
    layer = MoleLinear.from_linear(make("plain", bias=False), MoleGradConfig.of(**values))
    a, b = data()
    truth, draws = b.mT @ a, 300
    estimates = torch.stack([gathered(layer, 10)[0] for _ in range(draws)])
    error = (estimates.mean(0) - truth).norm() / truth.norm()
    spread = (estimates - truth).square().sum((1, 2)).mean().sqrt() / truth.norm()
    assert spread > 0.3  # it does sample
    assert error < 2 * spread / math.sqrt(draws)
    share, noise = layer.stats[-2:].tolist()
    assert 0.2 < share < 0.4 and noise > 0
    assert int(layer.counter) == 4 * draws  # another sample for each chunk


def test_a_frozen_weight_gets_nothing_and_its_bias_does():
    layer = make("factors")
    layer.basis_u.requires_grad_(False)
    layer.basis_v.requires_grad_(False)
    *own, bias = gathered(layer, 10)
    assert own == [None, None, None]
    torch.testing.assert_close(bias, data()[1].sum(0))


def test_no_chunk_at_all_gives_no_gradient():
    for name in CONFIGS:
        layer = make(name, bias=False)
        assert set(LayerGradient(layer).finish()) == {None}


def test_methods_that_need_their_whole_input_are_refused():
    layer = MoleLinear(
        N, M, config=MoleGradConfig.of(method="power", rank_k=4), name="h.0.mlp.c_fc"
    )
    with pytest.raises(
        ValueError, match="h.0.mlp.c_fc cannot run in chunks.*method='power'.*method='tangent'"
    ):
        require_chunkable(layer, "in_chunks")
    with pytest.raises(ValueError, match="linear layers, got Tanh"):
        require_chunkable(nn.Tanh(), "in_chunks")
    layer.weight.requires_grad_(False)
    require_chunkable(layer, "in_chunks")  # a frozen layer has no gradient to gather


def test_a_flag_that_asks_is_named_as_the_way_out():
    """Where the layers are a whole model's, `leave the layer out` is not all that one can do."""
    layer = MoleLinear(N, M, config=MoleGradConfig.of(method="power", rank_k=4))
    with pytest.raises(ValueError, match="leave the layer out, or give --sequence_chunk=0$"):
        require_chunkable(layer, "--sequence_chunk")
    with pytest.raises(ValueError, match="leave the layer out$"):
        require_chunkable(layer, "in_chunks")
