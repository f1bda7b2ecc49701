"""Whether anybody steps from what layers without a weight gradient make in their backward passes.

A layer in mode "momentum" or "factors" leaves `weight.grad` at None: an optimizer that knows
nothing of its momentum or sketches trains nothing, and says nothing. The optimizers of
`molegrad.optim` mark what they step (`STEPPED`), and a layer without that mark warns at its second
forward pass in training; at the first an optimizer may still be to come.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import nn

# Set by an optimizer of molegrad.optim on the tensors of the layers that it has.
STEPPED = "molegrad_stepped"


class Steps:
    """What the layers of a model, which share one, know of who steps from their gradients; each
    warning is given once. A copy of a model has optimizers of its own and starts afresh."""

    def __init__(self) -> None:
        self.seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.warned: set[str] = set()

    def __reduce__(self):
        return Steps, ()

    def expect(self, layer: nn.Module, device_type: str) -> None:
        """Called at every forward pass in training of a MoleLinear without a weight gradient; not
        of compiled ones."""
        mode = layer.config.gradient_mode
        if mode == "momentum":
            self._expect_no_float16(device_type)
        recomputed = torch._C._current_graph_task_id() != -1  # within a backward pass
        if recomputed or "steps" in self.warned or not layer.training:
            return
        if getattr(layer.stepped, STEPPED, False):
            return
        if layer in self.seen:
            self.warned.add("steps")
            _warn(layer.name or "MoleLinear", mode)
        self.seen.add(layer)

    def _expect_no_float16(self, device_type: str) -> None:
        if "float16" in self.warned or not torch.is_autocast_enabled(device_type):
            return
        if torch.get_autocast_dtype(device_type) == torch.float16:
            self.warned.add("float16")
            warnings.warn(
                "gradient_mode='momentum' under float16 autocast: GradScaler cannot unscale what "
                "backward passes add to the momentum, and what overflows stays there. Use bfloat16 "
                "autocast, or gradient_mode='grad' or 'factors' (said once for a model)",
                stacklevel=4,
            )


def _warn(name: str, mode: str) -> None:
    what, wanted = {
        "momentum": (
            "nobody steps from its momentum: its weight has no gradient, so that other optimizers "
            "leave it as it is",
            "Muon",
        ),
        "factors": (
            "no optimizer of molegrad.optim has its bases: others would step on the bases "
            "themselves, and the weight stays as it is",
            "Muon, AdamW or Adafactor",
        ),
    }[mode]
    warnings.warn(
        f"layer {name} is in gradient_mode={mode!r}, and {what}. Give what "
        f"molegrad.optim.matrix_param_groups returns to {wanted} of molegrad.optim, or choose "
        "gradient_mode='grad' (said once for a model)",
        stacklevel=4,
    )
