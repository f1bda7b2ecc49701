"""Metrics of converted layers.

Reading them makes the host wait for the device, so read them at the logging interval only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from molegrad.autograd import STATS
from molegrad.linear import MoleLinear

METRICS = (
    "energy_capture",
    "trust_factor",
    "condition_number",
    "subspace_drift",
    "sampled_share",
    "sampling_noise",
    "memory_saved_mb",
)
MB = 2**20


def layer_metrics(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> dict[str, dict[str, float]]:
    """{layer name: {metric: value}} of every MoleLinear in `model`; nan where nothing is known yet.

    - energy_capture: ‖Ĝ‖ / ‖G‖ in [0, 1], by the Hutch++ estimate of ‖G‖ (needs probes >= 1)
    - trust_factor: what the estimate was scaled by
    - condition_number: of the kept modes, estimated from their triangular factor
    - subspace_drift: 1 − ‖VᵀV'‖²_F / k between one step and the next
    - sampled_share: of the products that the gradient is a sum of, in the last backward pass
    - sampling_noise: the variance that sampling adds, relative to the gradient's own from its
      tokens (see `molegrad.ops.sampled_grad_`)
    - memory_saved_mb: dense gradient minus what the layer's gradients take, in MiB; measured after
      the backward pass, 0 in dense mode, whose estimate is a matrix of the weight's size

    Args:
        optimizers: those that hold the statistics of layers in factored mode.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoleLinear)}
    rows = [_stats(layer, optimizers) for layer in layers.values()]
    if not rows:
        return {}
    table = torch.stack([row.to(rows[0].device) for row in rows]).tolist()  # the one transfer
    return {
        name: _named(dict(zip(STATS, values, strict=True)), layer)
        for (name, layer), values in zip(layers.items(), table, strict=True)
    }


def _stats(layer: MoleLinear, optimizers: Iterable[torch.optim.Optimizer]) -> torch.Tensor:
    stats = layer.stats
    for optimizer in optimizers:
        state = optimizer.state.get(layer.basis_v, {})
        if "stats" in state:
            known = state["stats"]
            # Where the optimizer cannot know the norm, the layer itself has measured it.
            stats = torch.where(known.isnan(), stats.to(known.device), known)
    return stats


def _named(stats: dict[str, float], layer: MoleLinear) -> dict[str, float]:
    captured, total = stats["captured_norm_sq"], stats["gradient_norm_sq"]
    known = layer.config.probes > 0 and total > 0
    return {
        "energy_capture": min(1.0, math.sqrt(captured / total)) if known else math.nan,
        "trust_factor": stats["trust_factor"],
        "condition_number": stats["condition_number"],
        "subspace_drift": stats["subspace_drift"],
        "sampled_share": stats["sampled_share"],
        "sampling_noise": stats["sampling_noise"],
        "memory_saved_mb": (_dense_bytes(layer) - _gradient_bytes(layer)) / MB,
    }


def _dense_bytes(layer: MoleLinear) -> int:
    return layer.weight.numel() * layer.weight.element_size()


def _gradient_bytes(layer: MoleLinear) -> int:
    """Bytes of the layer's gradients; of those it will have where there are none just now."""
    if layer.config.gradient_mode == "dense":
        return _dense_bytes(layer)
    return sum(
        tensor.numel() * tensor.element_size()
        for basis in (layer.basis_u, layer.basis_v)
        for tensor in (basis.grad if basis.grad is not None else basis,)
    )


def aggregate(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over layers (of finite values), `memory_saved_mb` summed; nan where none is finite."""
    result = {}
    for key in METRICS:
        values = [m[key] for m in metrics.values() if math.isfinite(m[key])]
        result[key] = math.fsum(values)
        if key != "memory_saved_mb":
            result[key] = result[key] / len(values) if values else math.nan
    return result
