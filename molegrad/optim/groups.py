"""Which parameter goes to which optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from molegrad.linear import MoleLinear


def matrix_param_groups(*modules: nn.Module, exclude: Iterable[nn.Module] = ()) -> list[dict]:
    """Parameter groups with the weight of every linear layer inside `modules`.

    For any optimizer of `molegrad.optim`; those of kind "grad" are for torch's too.

    Args:
        modules: usually the transformer blocks; embeddings and the output head are no matrices in
            this sense and must not be among them.
        exclude: linear layers to leave out (they then belong to `other_params`).

    Returns:
        one group of kind "grad" (weights whose gradient is in weight.grad, plain layers among
        them); those of kind "momentum", whose params are weight, momentum and, where "quantized",
        its scale of each layer in turn; and groups of kind "factors", whose params are weight,
        basis_u, basis_v of each layer in turn and whose options are the estimator's; layers of
        different ranks share a group.
    """
    excluded = {id(m) for root in exclude for m in root.modules()}
    grad: list[nn.Parameter] = []
    momentum: dict[bool, list[nn.Parameter]] = defaultdict(list)  # by whether it is quantized
    factors: dict[tuple, dict[str, Any]] = {}  # by options
    seen: set[int] = set()
    for layer in (m for root in modules for m in root.modules() if isinstance(m, nn.Linear)):
        if id(layer) in excluded or id(layer.weight) in seen:
            continue
        seen.add(id(layer.weight))
        converted = isinstance(layer, MoleLinear)
        if not (layer.trains if converted else layer.weight.requires_grad):
            continue
        mode = layer.config.gradient_mode if converted else "grad"
        if mode == "grad":
            grad.append(layer.weight)
        elif mode == "momentum":
            held = [layer.state.tensors.get(key) for key in ("momentum", "momentum_scale")]
            momentum[held[1] is not None] += [layer.weight, *(p for p in held if p is not None)]
        else:
            options = layer.config.estimator.optimizer_options(layer.config.seed)
            key = tuple(options.items())
            group = factors.setdefault(key, {"kind": "factors", "params": [], **options})
            group["params"] += [layer.weight, *layer.sketches]
    groups = list(factors.values())
    for quantized, params in momentum.items():
        groups.insert(0, {"kind": "momentum", "quantized": quantized, "params": params})
    if grad:
        groups.insert(0, {"kind": "grad", "params": grad})
    return groups


def other_params(model: nn.Module, groups: Iterable[dict]) -> list[nn.Parameter]:
    """The trainable parameters of `model` that are in none of `groups`."""
    taken = {id(p) for group in groups for p in group["params"]}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
