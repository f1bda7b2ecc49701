"""Layers, gradients and small training runs for the tests of all optimizers."""

from __future__ import annotations

import torch

from molegrad import MoleGradConfig, MoleLinear, convert
from molegrad.optim import Adafactor, AdamW, Muon, matrix_param_groups, other_params
from tests.models import TinyGPT
from tests.samples import orthonormal, tokens

F64 = torch.float64
ALL = {"muon": Muon, "adamw": AdamW, "adafactor": Adafactor}
# Learning rates at which the tiny models below train.
RATES = {"muon": 0.02, "adamw": 0.01, "adafactor": 0.05}


def config(mode="factors", method="tangent", **fields) -> MoleGradConfig:
    options = {"rank_k": 4, "target_layers": "all", "gradient_mode": mode, **fields}
    return MoleGradConfig.of(method, **options)


def factored_layer(dtype=F64, n=24, m=40, k=4, **fields) -> MoleLinear:
    """An (m, n) layer of rank k, also of ranks that no configuration allows."""
    layer = MoleLinear(n, m, bias=False, dtype=dtype, config=config(rank_k=2, **fields))
    probes = layer.config.estimator.probes
    for seed, basis in enumerate((layer.basis_u, layer.basis_v)):
        wide = orthonormal(basis.shape[0], k, seed, dtype)
        basis.data = torch.cat([wide, basis.detach()[:, basis.shape[1] - probes :]], dim=1)
    return layer


def backward(layer: MoleLinear, seed: int = 0, t: int = 100, rank: int = 7) -> torch.Tensor:
    """A fresh backward pass of random tokens; G."""
    dtype = layer.weight.dtype
    a, b = tokens(t, layer.in_features, layer.out_features, dtype, rank=rank, seed=seed)
    layer.zero_grad()
    layer(a).backward(b)
    return b.mT @ a


def estimate(layer: MoleLinear) -> torch.Tensor:
    """Ĝ (m, n) of a factored layer from its sketches, trust factor aside."""
    k = layer.rank
    u, v = layer.basis_u.detach()[:, :k], layer.basis_v.detach()[:, :k]
    y, w = layer.basis_u.grad[:, :k], layer.basis_v.grad[:, :k]
    if layer.config.estimator.one_sided:
        return y @ w.mT  # its y is U itself
    return u @ w.mT + (y - u @ (u.mT @ y)) @ v.mT


def make(name: str, mode: str = "factors", method: str = "tangent", seed: int = 0, **fields):
    """A tiny GPT, the optimizer of its matrices and that of the rest."""
    torch.manual_seed(seed)
    model = convert(TinyGPT(depth=1), config(mode, method, **{"probes": 2, **fields}))
    groups = matrix_param_groups(model.h)
    matrices = ALL[name](groups, lr=RATES[name])
    return model, (matrices, torch.optim.AdamW(other_params(model, groups), lr=1e-3))


def train(model, optimizers, steps: int, start: int = 0) -> list[float]:
    """Losses of `steps` steps on three batches in turn."""
    losses = []
    for i in range(start, start + steps):
        idx = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(i % 3))
        logits = model(idx[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses
