"""Optimizers for weight gradients, as a matrix, in the momentum or as factors.

| parameters | group | optimizer |
|---|---|---|
| matrices, gradient_mode "factors" | `matrix_param_groups`, "factors" | Muon, AdamW, Adafactor |
| matrices, gradient_mode "momentum" | "momentum" | Muon |
| matrices, gradient_mode "grad" and nn.Linear | "grad" | the same, or torch's |
| embeddings, output head, norms, biases | `other_params` | torch.optim.AdamW |

All are classes of `molegrad.optim.factored.FactoredOptimizer`; a new one says what its step does
with the estimate of a bucket of layers (`molegrad.optim.bucket`).
"""

from molegrad.optim.adafactor import Adafactor
from molegrad.optim.adamw import AdamW
from molegrad.optim.factored import FactoredOptimizer
from molegrad.optim.groups import matrix_param_groups, other_params
from molegrad.optim.muon import Muon, newton_schulz

__all__ = [
    "Adafactor",
    "AdamW",
    "FactoredOptimizer",
    "Muon",
    "matrix_param_groups",
    "newton_schulz",
    "other_params",
]
