"""Optimizers for factored and dense gradients.

| parameters | group | optimizer |
|---|---|---|
| matrices of converted layers, factored mode | `matrix_param_groups` kind "factored" | `Muon` |
| matrices of converted layers, dense mode, and of plain nn.Linear | kind "dense" | `Muon` |
| embeddings, output head, norms, biases | `other_params` | torch.optim.AdamW |
"""

from molegrad.optim.groups import matrix_param_groups, other_params
from molegrad.optim.muon import Muon
from molegrad.optim.newton_schulz import newton_schulz

__all__ = ["Muon", "matrix_param_groups", "newton_schulz", "other_params"]
