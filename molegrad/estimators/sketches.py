"""The low-rank estimates from their sketches: the one place where these formulas stand.

With orthonormal U (m, k), V (n, k) and the sketches Y = G V (m, k), W = Gᵀ U (n, k):

- tangent: Ĝ = U Wᵀ + (I − UUᵀ) Y Vᵀ, of rank 2k, the projection of G on the tangent space of the
  rank-k matrices at (U, V) (Koch and Lubich 2007). Linear in G.
- one-sided (the block power method): Ĝ = U₁ Wᵀ with U₁ = orth(Y) and W = Gᵀ U₁, of rank k; in place
  of Y stands U₁.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sketch(NamedTuple):
    """u, y (…, m, k); v, w (…, n, k), all of one dtype; leading dimensions are batched."""

    u: Tensor
    v: Tensor
    y: Tensor
    w: Tensor
    one_sided: bool = False

    @property
    def perp(self) -> Tensor | None:
        """(I − UUᵀ) Y; None for a one-sided estimate."""
        return None if self.one_sided else self.y - self.u @ (self.u.mT @ self.y)

    def norm_sq(self) -> Tensor:
        """‖Ĝ‖²_F (…): of a tangent estimate ‖W‖² + ‖(I − UUᵀ) Y‖², of a one-sided one ‖W‖²."""
        captured = self.w.square().sum((-2, -1))
        perp = self.perp
        return captured if perp is None else captured + perp.square().sum((-2, -1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """left (…, m, j) and right (…, n, j) with Ĝ = left rightᵀ, j = 2k or k."""
        perp = self.perp
        if perp is None:
            return self.y, self.w
        return torch.cat([self.u, perp], dim=-1), torch.cat([self.w, self.v], dim=-1)

    def matrix(self) -> Tensor:
        """Ĝ (…, m, n)."""
        left, right = self.factors()
        return left @ right.mT

    def energies(self) -> Tensor:
        """C(1) … C(k) (k,), what the first j columns of both bases would have captured of ‖G‖²:
        ‖G V'‖² + ‖Gᵀ U'‖² − ‖U'ᵀ G V'‖² (one-sided: the first j columns of W). Not batched."""
        of_w = self.w.square().sum(0)
        if self.one_sided:
            return of_w.cumsum(0)
        both = (self.u.mT @ self.y).square().cumsum(0).cumsum(1).diagonal()
        return (self.y.square().sum(0) + of_w).cumsum(0) - both


def trust_factor(norm_sq: Tensor, captured_sq: Tensor, trust_max: float) -> Tensor:
    """‖G‖ / ‖Ĝ‖ within [1, trust_max], from both norms squared; 1 where the estimate is zero, and
    where trust_max is 0."""
    if trust_max <= 0:
        return torch.ones_like(captured_sq)
    ratio = torch.where(captured_sq > 0, norm_sq / captured_sq, 1.0)
    return ratio.sqrt().clamp(1.0, trust_max)
