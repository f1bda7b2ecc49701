"""A bucket of layers, their gradients' estimate in orthonormal bases, and how the bases turn.

The mathematics that all optimizers on factors share. A layer's gradient arrives as
sketches Y = GV (m, k) and W = GᵀU (n, k). In an orthonormal basis L = [U, Y⊥] of the left side the
estimate is Ĝ = L Fᵀ, in one R = [V, W⊥] of the right side too it is Ĝ = L C Rᵀ with a small core C;
no matrix of the weight's size is ever formed. Layers of one shape and rank are stacked, so that a
step costs one batched operation instead of one for each layer; nothing makes the host wait for the
device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molegrad.estimators import bases
from molegrad.estimators.lowrank_sums import explored_directions
from molegrad.estimators.sketches import Sketch, trust_factor
from molegrad.ops.orth import NON_FINITE
from molegrad.ops.power import hutch_norm_sq


class Bucket(NamedTuple):
    """One step's layers of one shape (m, n), rank k, dtype and device; there are `size` of them.

    Tensors are stacked: u (size, m, k), v (size, n, k), y (size, m, k), w (size, n, k), and of the
    r probes (random columns Ω on the right side) omega (size, n, r) and g_omega = GΩ (size, m, r).
    """

    group: dict[str, Any]
    first: int  # index of the first layer in its group: seeds the random directions
    weights: list[Tensor]
    bases_u: list[Tensor]
    bases_v: list[Tensor]
    states_u: list[dict[str, Any]]
    states_v: list[dict[str, Any]]
    u: Tensor
    v: Tensor
    y: Tensor
    w: Tensor
    g_omega: Tensor
    omega: Tensor

    @property
    def size(self) -> int:
        return len(self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[-2], self.v.shape[-2]

    @property
    def rank(self) -> int:
        return self.u.shape[-1]

    @property
    def explored(self) -> int:
        """How many of the k directions are replaced by random ones after each step."""
        return explored_directions(self.rank, self.group["warm_start_decay"])

    def kept_columns(self, like: Tensor) -> Tensor:
        """(k,) in `like`'s dtype: 1 for the directions that stay, 0 for those to be explored."""
        kept = torch.arange(self.rank, device=like.device) < self.rank - self.explored
        return kept.to(like.dtype)

    def stacked(self, name: str, side: str = "u") -> Tensor:
        """State `name` of all layers, (size, ...)."""
        states = self.states_u if side == "u" else self.states_v
        return torch.stack([state[name] for state in states])

    def keep(self, name: str, new: Tensor, finite: Tensor, side: str = "u") -> None:
        """State `name` ← `new` (size, ...), except of layers that are not `finite` (size,)."""
        states = self.states_u if side == "u" else self.states_v
        mask = finite.view(-1, *[1] * (new.dim() - 1))
        old = torch.stack([state[name] for state in states])
        kept = torch.where(mask, new, old).unbind()
        torch._foreach_copy_([state[name] for state in states], kept)


class Estimate(NamedTuple):
    """Ĝ of a bucket, `left` (size, m, j) an orthonormal basis of span(U, Y), j = min(2k, m).

    `sketch` is Ĝ with its left side in the coordinates of `left`, trust factor included: its u and
    y are (size, j, k), and left sketch.matrix() = Ĝ. `u_c` (size, j, k): U = left u_c. The others
    are (size,): ‖G‖²_F by Hutch++ (nan without probes), ‖Ĝ‖²_F before the trust factor, and the
    trust factor.
    """

    left: Tensor
    u_c: Tensor
    sketch: Sketch
    norm_sq: Tensor
    captured_sq: Tensor
    trust: Tensor


def estimate(bucket: Bucket) -> Estimate:
    """The estimate that a bucket's sketches stand for."""
    u, v, y, w, group = bucket.u, bucket.v, bucket.y, bucket.w, bucket.group
    one_sided, cond_max = group["one_sided"], group["cond_max"]
    block = torch.ops.molegrad.orthonormalize(y, cond_max)[0] if one_sided else y
    left, u_c, block_c = extend(u, block, cond_max)
    sketch = Sketch(u_c, v, block_c, w, one_sided)
    captured_sq = sketch.norm_sq()
    if one_sided:
        # Y was U₁, orthonormal, ‖Y‖² = k; clipping has scaled it and W alike, and captured_sq is
        # wanted as it was when the layer measured ‖G‖.
        captured_sq = captured_sq * (bucket.rank / y.square().sum((-2, -1)))
    norm_sq, trust = torch.full_like(captured_sq, math.nan), torch.ones_like(captured_sq)
    if bucket.omega.shape[-1] and not one_sided:  # where it is, the layer measures ‖G‖
        norm_sq = hutch_norm_sq(y, bucket.g_omega, v, bucket.omega)
        trust = trust_factor(norm_sq, captured_sq, group["trust_max"])
        y, w = (x * trust[:, None, None] for x in (sketch.y, sketch.w))
        sketch = sketch._replace(y=y, w=w)
    return Estimate(left, u_c, sketch, norm_sq, captured_sq, trust)


def two_sided(bucket: Bucket, est: Estimate) -> tuple[Tensor, Tensor, Tensor]:
    """right (size, n, i) orthonormal, i = min(2k, n); V in it (size, i, k); the core C of Ĝ.

    Ĝ = left C rightᵀ, C (size, j, i).
    """
    right, v_c, w_c = extend(bucket.v, est.sketch.w, bucket.group["cond_max"])
    return right, v_c, est.sketch._replace(v=v_c, w=w_c).matrix()


def extend(basis: Tensor, block: Tensor, cond_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """`bases.extend`, for any rank: where span(basis, block) may be all of space, the unit vectors.

    Args:
        basis, block: (…, rows, k); basis with orthonormal columns.

    Returns:
        q (…, rows, min(2k, rows)) orthonormal, basis and block in its coordinates.
    """
    rows, k = basis.shape[-2:]
    if 2 * k <= rows:
        return bases.extend(basis, block, cond_max)
    unit = torch.eye(rows, dtype=basis.dtype, device=basis.device)
    return unit.expand(*basis.shape[:-2], rows, rows), basis, block


def truncate(core: Tensor, start: Tensor, iters: int, cond_max: float):
    """Leading k modes of `core`, by block iteration.

    Args:
        core: (…, j, i).
        start: (…, i, k), approximate right modes, such as those of the step before.

    Returns:
        P (…, j, k) and Q (…, i, k) orthonormal, the modes ordered by strength; S = PᵀCQ (…, k, k);
        the condition number of the kept modes (…).
    """
    orth = torch.ops.molegrad.orthonormalize
    p = orth(core @ start, cond_max)[0]
    for _ in range(iters):
        q = orth(core.mT @ p, cond_max)[0]
        p, r, _ = orth(core @ q, cond_max)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return p, p.mT @ core @ q, q, diagonal.amax(-1) / diagonal.amin(-1)


def all_finite(x: Tensor) -> Tensor:
    """Which of the stacked matrices x (size, …) hold neither NaN nor Inf: (size,)."""
    return x.isfinite().flatten(1).all(-1)


def turn(bucket: Bucket, est: Estimate, new_u: Tensor, new_v: Tensor, condition, finite) -> None:
    """Bases ← new modes, the weakest replaced by random directions, new probes behind them.

    Args:
        new_u, new_v: (size, m, k), (size, n, k), orthonormal, the strongest mode first.
        condition: (size,), of the modes, for the statistics.
        finite: (size,), false where the old bases must stay.

    The random directions depend on seed, step and place only, so that a resumed run and every
    data-parallel process draw the same ones. Also writes the layers' statistics, which the layer
    finds at its basis_v as `molegrad_stats`.
    """
    step = bucket.states_u[0]["step"]
    seed = bucket.group["seed"] + 7919 * (bucket.first + 1)
    turned_u, status_u = _turned(bucket, bucket.u, new_u, finite, step, seed)
    turned_v, status_v = _turned(bucket, bucket.v, new_v, finite, step, seed + 1)
    overlap = (bucket.v.mT @ turned_v).square().sum((-2, -1)) / bucket.rank
    drift, status = (1 - overlap).clamp_min(0), torch.maximum(status_u, status_v)
    # In the order of `molegrad.estimators.lowrank.STATS`.
    rows = (est.norm_sq, est.captured_sq, est.trust, condition, drift, status)
    stats = torch.stack([row.float() for row in rows], dim=1)
    for params, new, offset in ((bucket.bases_u, turned_u, 3), (bucket.bases_v, turned_v, 4)):
        probes = bucket.omega.shape[-1]
        if probes:
            random = _random(new, probes, step, seed + offset)
            new = torch.cat([new, random], dim=-1)
        torch._foreach_copy_(list(params), new.unbind())
    torch._foreach_copy_([state["stats"] for state in bucket.states_v], stats.unbind())
    for basis, state in zip(bucket.bases_v, bucket.states_v, strict=True):
        basis.molegrad_stats = state["stats"]


def _turned(bucket: Bucket, old, new, finite, step, seed: int) -> tuple[Tensor, Tensor]:
    """The next bases, and the status of their orthonormalisation (size,)."""
    explored = bucket.explored
    if explored:
        random = _random(new, explored, step, seed)
        new = torch.cat([new[..., : bucket.rank - explored], random], dim=-1)
    new, _, status = torch.ops.molegrad.orthonormalize(new, bucket.group["cond_max"])
    status = torch.where(finite, status, NON_FINITE)
    return torch.where(finite[:, None, None], new, old), status


def _random(like: Tensor, columns: int, step: Tensor, seed: int) -> Tensor:
    """Random signs (size, rows, columns) for `like` (size, rows, …), other ones for each layer."""
    size, rows = like.shape[:2]
    return bases.rademacher(size * rows, columns, step, seed, like.dtype).view(size, rows, columns)
