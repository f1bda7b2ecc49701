"""Inputs and output gradients of chosen layers, from a pass that leaves no trace on training.

What: `output_gradients` runs a loss forward and backward and gives A (…, n) and B (…, m) of every
call of the layers that it is told.

How: for the time of the pass every parameter of the model is replaced by a detached view of itself
(`torch.func.functional_call`) and every buffer that is not a MoleLinear's by a copy. A MoleLinear
whose parameters take no gradient is a plain `F.linear`: no basis, counter, momentum or statistic
moves and nothing is saved for a weight gradient; no `.grad` arises, no hook of a parameter fires.
The graph begins at the first chosen layer. Random states are put back, and as the model is
afterwards what it was before, to the object, compiled graphs of it stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from molegrad.linear import MoleLinear


class Call(NamedTuple):
    """One call of a layer."""

    name: str
    a: Tensor  # (…, n), its input, detached
    version: int  # of the input at the call
    dtype: torch.dtype  # of the product; under autocast not the input's
    edge: GradientEdge  # where the gradient of its output arrives


def output_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], loss: Callable[[], Tensor]
) -> list[tuple[Call, Tensor | None]]:
    """Every call of the layers with B (…, m), the gradient of its output; None where the loss does
    not depend on it.

    Args:
        model: the bare model. If it is compiled all the same, it runs as if it were not.
        layers: those to watch, by name; modules of `model` with one input and one output.
        loss: runs the model and returns a scalar.

    Raises:
        RuntimeError: the loss depends on none of the layers, or one's input was changed in place.
    """
    taps = _Taps(layers)
    replaced = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        if not isinstance(module, MoleLinear):  # nothing here changes those of a MoleLinear
            for name, buffer in module.named_buffers(recurse=False):
                replaced[".".join(filter(None, ("model", path, name)))] = buffer.clone()
    # With the hooks a compiled model would be compiled anew.
    with taps, _same_random_numbers(model), torch.compiler.set_stance("force_eager"):
        gradients = torch.func.functional_call(_Pass(model, loss, taps), replaced, ())
    for call in taps.calls:
        if call.a._version != call.version:
            raise RuntimeError(
                f"layer {call.name}: its input is changed in place after the call, so that no "
                "gradient can be computed from it"
            )
    return list(zip(taps.calls, gradients, strict=True))


class _Taps:
    """Forward hooks on the layers, within a `with` block."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers, self.calls, self.recording = layers, [], True
        self._handles: list = []

    def __enter__(self) -> None:
        for name, layer in self.layers.items():
            # First of all hooks: those of others may replace the output.
            hook = partial(self._hook, name)
            handle = layer.register_forward_hook(hook, prepend=True, with_kwargs=True)
            self._handles.append(handle)

    def __exit__(self, *exc) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str, layer: nn.Module, args, kwargs, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            output.requires_grad_()
        output = output.clone()  # whoever changes it in place leaves its edge where it is
        if self.recording:  # checkpointed layers run again during the backward pass
            a = args[0] if args else kwargs["input"]
            edge = get_gradient_edge(output)
            self.calls.append(Call(name, a.detach(), a._version, output.dtype, edge))
        return output


class _Pass(nn.Module):
    """What `functional_call` runs: forward and backward pass, as checkpointed parts of a model run
    again in the latter and must find the same detached parameters."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], taps: _Taps) -> None:
        super().__init__()
        self.model, self.loss, self.taps = model, loss, taps

    def forward(self) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            value = self.loss()
            self.taps.recording = False
            if not self.taps.calls or not value.requires_grad:
                raise RuntimeError(
                    "the loss depends on none of the shadow layers "
                    f"({', '.join(self.taps.layers)}): give a function that runs the very model "
                    "they are in, outside torch.no_grad() and reentrant checkpoints"
                )
            edges = [call.edge for call in self.taps.calls]
            return torch.autograd.grad(value, edges, allow_unused=True)


def _same_random_numbers(model: nn.Module):
    """The random states of the CPU and of the model's devices are put back at the end."""
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    return torch.random.fork_rng([device.index for device in devices], device_type=kind)
