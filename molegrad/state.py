"""What an exact resumption needs of a converted model beside the state_dicts of model and
optimizer, and what DistributedDataParallel should leave alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molegrad.linear import MoleLinear


def ignored_by_ddp(model: nn.Module) -> list[str]:
    """Names of the weights in mode "momentum": they require a gradient and never get one.

    DistributedDataParallel waits for the gradients of all its parameters, so name these before it
    is made: `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)`.
    Muon averages the momentum over the processes itself.
    """
    weights = {
        id(layer.weight)
        for layer in model.modules()
        if isinstance(layer, MoleLinear) and layer.config.gradient_mode == "momentum"
    }
    return [name for name, p in model.named_parameters() if id(p) in weights]


def bases_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of all converted layers: bases, counters and statistics.

    What optimizers step is in their own state_dict: the bases of mode "factors", the momentum of
    mode "momentum".
    """
    return {
        f"{name}.{key}": layer._buffers[key]
        for name, layer in model.named_modules()
        if isinstance(layer, MoleLinear)
        for key in layer.state.tensors
        if layer._buffers.get(key) is not None
    }


@torch.no_grad()
def load_bases_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore what `bases_state_dict` returned, into a model converted with the same config.

    Raises:
        RuntimeError: names or shapes differ; the message lists them.
    """
    own = bases_state_dict(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise RuntimeError(
            f"bases do not fit this model: missing {missing}, unexpected {unexpected}; convert it "
            "with the configuration the bases were saved under"
        )
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise RuntimeError(
                f"bases do not fit this model: {key} is {tuple(state[key].shape)}, expected "
                f"{tuple(tensor.shape)} (was rank_k or probes changed?)"
            )
    for key, tensor in own.items():
        tensor.copy_(state[key])
