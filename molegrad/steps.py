"""Whether anybody steps from what layers without a weight gradient make in their backward passes.

A layer in momentum or factored mode leaves `weight.grad` at None: an optimizer that knows nothing
of its momentum or of its bases trains nothing, and says nothing. The optimizers of
`molegrad.optim` mark what they step (`STEPPED`), and a layer without that mark warns at its second
forward pass in training; at the first an optimizer may still be to come.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import nn

# Set by an optimizer of molegrad.optim on the momentum or the bases of the layers that it has.
STEPPED = "molegrad_stepped"


class Steps:
    """What the layers of a model, which share one, know of who steps from their gradients: those
    that have been through a forward pass in training (`seen`), and whether the warning was given
    (`told`). A copy of a model has optimizers of its own: it starts anew."""

    def __init__(self) -> None:
        self.seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.told = False

    def __reduce__(self):
        return Steps, ()

    def expect(self, layer: nn.Module) -> None:
        """Told of every forward pass of a MoleLinear in training; not of compiled ones."""
        recomputed = torch._C._current_graph_task_id() != -1  # within a backward pass
        mode = layer.config.gradient_mode
        if recomputed or self.told or not layer.training or mode == "dense":
            return
        stepped = layer.basis_v if layer.momentum is None else layer.momentum
        if getattr(stepped, STEPPED, False):
            return
        if layer in self.seen:
            self.told = True
            _warn(layer.name or "MoleLinear", mode)
        self.seen.add(layer)


def _warn(name: str, mode: str) -> None:
    what = {
        "momentum": "nobody steps from its momentum: its weight has no gradient, so that other "
        "optimizers leave it as it is",
        "factored": "no optimizer of molegrad.optim has its bases: others would step on the bases "
        "themselves, and the weight stays as it is",
    }[mode]
    wanted = "Muon" if mode == "momentum" else "Muon, AdamW or Adafactor"
    warnings.warn(
        f"layer {name} is in gradient_mode={mode!r}, and {what}. Give what "
        f"molegrad.optim.matrix_param_groups returns to {wanted} of molegrad.optim, or choose "
        "gradient_mode='dense' (said once for a model)",
        stacklevel=4,
    )
