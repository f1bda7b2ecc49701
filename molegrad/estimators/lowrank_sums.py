"""What the backward pass of a low-rank layer does with A and B, and the op `linear_lowrank`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molegrad.estimators import bases
from molegrad.estimators.inputs import float8_works
from molegrad.estimators.sketches import Sketch, trust_factor
from molegrad.ops import checks
from molegrad.ops.float8 import dequantize_rows
from molegrad.ops.linear import linear_op
from molegrad.ops.power import hutch_norm_sq

# What a layer's `stats` tensor holds, in this order.
STATS = (
    "gradient_norm_sq",
    "captured_norm_sq",
    "trust_factor",
    "condition_number",
    "subspace_drift",
    "orth_status",
)
Operand = tuple[Tensor, Tensor | None]


def explored_directions(k: int, decay: float) -> int:
    """How many of k basis directions exploration replaces at every step: ⌈(1 − decay) k⌉ ≤ k."""
    return min(k, math.ceil((1.0 - decay) * k - 1e-9))


class LowRankSums:
    """Accumulator of a low-rank layer; arguments as in the schema of `linear_lowrank`.

    With `factors`, `finish` returns (None, Y, W), the gradients of the two bases: Y = G V (m, k)
    and W = GᵀU (n, k), which are the exact gradients of L(weight + U Vᵀ) with respect to U and V at
    a point where that product is left out; of the power method U₁ = orth(Y) in place of Y.
    Otherwise it returns (Ĝ,) and moves bases, counter and stats on, in place.
    """

    def __init__(
        self, weight, basis_u, basis_v, counter, stats, method, rank_k, power_iters, probes,
        trust_max, explored, seed, cond_max, fp8, factors,
    ) -> None:  # fmt: skip
        self.weight, self.counter, self.stats = weight, counter, stats
        self.u, self.v = basis_u.detach(), basis_v.detach()
        self.tangent, self.k, self.power_iters = method == "tangent", rank_k, power_iters
        self.trust_max, self.explored, self.seed = trust_max, explored, seed
        self.cond_max, self.fp8, self.factors = cond_max, fp8, factors
        # In mode "factors" the probes Ω are columns of the basis: [V, Ω].
        self.start, self.omega = self.v, None
        if factors:
            self.omega = self.v[:, rank_k:] if probes else None
            self.v = self.v[:, :rank_k]
        elif probes:
            self.omega = bases.rademacher(self.v.shape[0], probes, counter, seed, self.v.dtype)
            self.start = torch.cat([self.v, self.omega], dim=1)
        self.sums: tuple[Tensor, ...] | None = None

    def add(self, a: Tensor, b: Tensor, a_scale: Tensor | None = None) -> None:
        (a, a_scale), (b, b_scale) = self._operands(a, b, a_scale)
        ops = torch.ops.molegrad
        if not self.tangent:
            if self.sums is not None:
                raise RuntimeError(
                    "method='power' takes all tokens at once: choose method='tangent' for chunks"
                )
            self.sums = ops.lowrank_grad(
                a, b, self.v, self.power_iters, self.omega, self.cond_max, a_scale, b_scale
            )
        elif self.sums is None:
            self.sums = ops.sketch(a, b, self.u, self.start, a_scale, b_scale)
        else:
            ops.sketch_accumulate_(*self.sums, a, b, self.u, self.start, a_scale, b_scale)

    def _operands(self, a: Tensor, b: Tensor, a_scale: Tensor | None) -> tuple[Operand, Operand]:
        """A and B with their scales: with `fp8` rows in E4M3 and E5M2, or both in bfloat16 where
        the device has no float8; else in the dtype of B."""
        if not self.fp8:
            return (a if a_scale is None else dequantize_rows(a, a_scale, b.dtype), None), (b, None)
        if a_scale is None and not float8_works(a.device.type):
            return (a.to(torch.bfloat16), None), (b.to(torch.bfloat16), None)
        if a_scale is None:
            a, a_scale = torch.ops.molegrad.quantize_rows(a)
        return (a, a_scale), torch.ops.molegrad.quantize_rows(b, True)

    def finish(self) -> tuple[Tensor | None, ...]:
        if self.sums is None:  # no chunk has come
            return (None, None, None) if self.factors else (None,)
        if self.factors:
            return None, *self._factors()
        estimate = self._tangent() if self.tangent else self._power()
        self.counter.add_(1)
        return (estimate.to(self.weight.dtype),)

    def _factors(self) -> tuple[Tensor, Tensor]:
        y, w = self.sums[:2]
        if not self.tangent:
            norm_sq, status = self.sums[2:]
            self.stats[STATS.index("gradient_norm_sq")].copy_(norm_sq)
            self.stats[STATS.index("orth_status")].copy_(status)
            probes = self.start.shape[1] - self.k
            y, w = (torch.nn.functional.pad(x, (0, probes)) for x in (y, w))
        return y.to(self.u.dtype), w.to(self.v.dtype)

    def _power(self) -> Tensor:
        left, right, norm_sq, status = self.sums
        left, right = left.to(self.v.dtype), right.to(self.v.dtype)
        captured_sq = right.square().sum()
        trust = trust_factor(norm_sq, captured_sq, self.trust_max)
        estimate = left @ (right * trust).mT
        self._move(right, None, norm_sq, captured_sq, trust, status)
        return estimate

    def _tangent(self) -> Tensor:
        y, w = (x.to(self.v.dtype) for x in self.sums)
        y, g_omega = y[:, : self.k].contiguous(), y[:, self.k :]
        sketch = Sketch(self.u, self.v, y, w)
        left, right = sketch.factors()
        norm_sq = captured_sq = w.square().sum() + left[:, self.k :].square().sum()
        if self.omega is not None:
            norm_sq = hutch_norm_sq(y, g_omega, self.v, self.omega)
        trust = trust_factor(norm_sq, captured_sq, self.trust_max)
        estimate = left @ (right * trust).mT
        self._move(w, y, norm_sq, captured_sq, trust, None)
        return estimate

    def _move(self, w: Tensor, y: Tensor | None, norm_sq, captured_sq, trust, status) -> None:
        """V follows W, U follows Y where there is one; the statistics of both."""
        options = self.counter, self.explored
        new_v, condition, status_v = bases.refresh(
            self.v, w, *options, self.seed + 1, self.cond_max
        )
        if y is not None:
            new_u, _, status = bases.refresh(self.u, y, *options, self.seed + 2, self.cond_max)
        drift = bases.drift(self.v, new_v)
        self.v.copy_(new_v)
        if y is not None:
            self.u.copy_(new_u)
        values = (norm_sq, captured_sq, trust, condition, drift, torch.maximum(status, status_v))
        self.stats.copy_(torch.stack([value.to(self.stats.dtype) for value in values]))


def _check(name: str, weight, basis_u, basis_v, counter, stats, method, rank_k, *rest) -> None:
    cond_max = rest[5]
    checks.floating(name, weight=weight, basis_u=basis_u, basis_v=basis_v)
    m, n = weight.shape
    checks.basis(name, "basis_u", basis_u, m)
    checks.basis(name, "basis_v", basis_v, n)
    checks.step_counter(name, counter)
    largest = min(m, n, basis_v.shape[1])
    checks.require(
        1 <= rank_k <= largest, name, f"rank k={rank_k} must lie between 1 and {largest}"
    )
    checks.condition(name, cond_max)


linear_op(
    "linear_lowrank",
    "Tensor basis_u, Tensor basis_v, Tensor counter, Tensor stats, str method, int rank_k, "
    "int power_iters, int probes, float trust_max, int explored, int seed, float cond_max, "
    "bool fp8, bool factors",
    _check,
    LowRankSums,
)
