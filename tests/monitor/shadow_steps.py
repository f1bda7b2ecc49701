"""Small converted models, and training steps that a shadow may watch."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from molegrad import MoleGradConfig, convert, revert
from molegrad.optim import Muon, matrix_param_groups, other_params
from tests.models import TinyGPT

F64 = torch.float64
LAYER = "h.0.mlp.c_fc"  # 32 -> 64
LOW_RANK = [
    {"gradient_mode": mode, "method": method, "rank_k": 4, "probes": probes}
    for mode in ("grad", "factors")
    for method in ("tangent", "power")
    for probes in (0, 6)
]
_SAMPLED = {"gradient_mode": "momentum", "method": "sampled", "sampling_fraction": 0.3}
SAMPLED = [
    {**_SAMPLED, "gradient_mode": "grad"},
    _SAMPLED,
    {**_SAMPLED, "momentum_dtype": "bfloat16"},
    {**_SAMPLED, "momentum_dtype": "int8"},
    {**_SAMPLED, "saved_inputs": "fp8"},
]
EVERY = LOW_RANK + SAMPLED


def label(fields) -> str:
    return "-".join(str(value) for value in fields.values())


def build(fields, depth=1, dtype=F64):
    torch.manual_seed(0)
    model = TinyGPT(depth=depth).to(dtype)
    convert(model, MoleGradConfig.of(target_layers="all", **fields))
    groups = matrix_param_groups(model.h)
    return model, [Muon(groups), torch.optim.AdamW(other_params(model, groups), lr=1e-3)]


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(50, (6, 17), generator=torch.Generator().manual_seed(seed))


def loss_of(model, idx, parts=1) -> torch.Tensor:
    logits = model(idx[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()) / parts


def step(model, optimizers, batches, shadow=None, called=None):
    """One step; with a shadow what `read` gives, as of before the optimizers' steps."""
    if shadow:
        shadow.begin()
    for idx in batches:
        if shadow:
            shadow.observe(lambda idx=idx: loss_of(model, idx, len(batches)))
        loss_of(model if called is None else called, idx, len(batches)).backward()
    if shadow:
        shadow.compare()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return shadow.read() if shadow else None


def true_gradients(model, batches) -> dict[str, torch.Tensor]:
    """Of nn.Linear with the same weights, by torch's own backward pass."""
    plain = revert(copy.deepcopy(model))
    for idx in batches:
        loss_of(plain, idx, len(batches)).backward()
    return {n: m.weight.grad for n, m in plain.named_modules() if isinstance(m, nn.Linear)}


def accumulates(fields) -> bool:
    return (fields["gradient_mode"], fields.get("method")) != ("factors", "power")
