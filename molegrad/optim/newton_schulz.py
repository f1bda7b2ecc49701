"""Newton–Schulz iteration for the polar factor of dense matrices, as Muon uses it.

The quintic of Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024): five
steps bring every singular value into about [0.7, 1.2], which is close enough to the polar factor
for an update.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def working_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate polar factor of g (…, m, n), in `dtype` (default `working_dtype`).

    Zero matrices stay zero. Returns the dtype it computed in.
    """
    if dtype is None:
        dtype = working_dtype(g.device)
    a, b, c = COEFFICIENTS
    x = g.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if gram.dim() == 3 else (
            torch.addmm(gram, gram, gram, beta=b, alpha=c)
        )  # fmt: skip
        x = torch.baddbmm(x, poly, x, beta=a) if x.dim() == 3 else torch.addmm(x, poly, x, beta=a)
    return x if wide else x.mT
