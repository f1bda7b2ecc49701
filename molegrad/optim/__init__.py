"""Optimizers for factored and dense gradients.

| parameters | group | optimizer |
|---|---|---|
| matrices, factored mode | `matrix_param_groups`, "factored" | Muon, AdamW, Adafactor |
| matrices, momentum mode | "momentum" | Muon |
| matrices, dense mode and nn.Linear | "dense" | the same, or torch's |
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
