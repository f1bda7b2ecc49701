"""What all optimizers on factored gradients share.

A layer in factored mode has no weight gradient: its gradient arrives as sketches Y = GV (m, k) and
W = GᵀU (n, k) in `basis_u.grad` and `basis_v.grad` (`molegrad.linear`). In an orthonormal basis
L = [U, Y⊥] of the left side the estimate is Ĝ = L Fᵀ, in one R = [V, W⊥] of the right side too it
is Ĝ = L C Rᵀ with a small core C; no matrix of the weight's size is ever formed. An optimizer makes
its update from these and then turns the layer's bases to the directions it wants to see next.

`FactoredOptimizer` is the base class: it validates groups, gathers layers of one shape and rank
into a `Bucket` of stacked tensors (one batched operation instead of one for each layer), saves and
restores the bases and changes ranks. A subclass says what it does with a dense group, with a
bucket, and which state a layer has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from molegrad import bases
from molegrad.autograd import STATS, trust_factor
from molegrad.config import explored_directions
from molegrad.reference import hutch_norm_sq

FACTORED_KEYS = ("probes", "method", "warm_start_decay", "trust_max", "cond_max", "seed")


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

    def stacked(self, name: str, side: str = "u") -> Tensor:
        """State `name` of all layers, (size, ...)."""
        states = self.states_u if side == "u" else self.states_v
        return torch.stack([state[name] for state in states])

    def keep(self, name: str, new: Tensor, finite: Tensor, side: str = "u") -> None:
        """State `name` ← `new` (size, ...), except of layers that are not `finite` (size,)."""
        states = self.states_u if side == "u" else self.states_v
        mask = finite.view(-1, *[1] * (new.dim() - 1))
        old = torch.stack([state[name] for state in states])
        for state, value in zip(states, torch.where(mask, new, old), strict=True):
            state[name].copy_(value)


class Estimate(NamedTuple):
    """Ĝ = left (c_w Wᵀ + c_v Vᵀ) of a bucket, `left` an orthonormal basis of span(U, Y).

    left (size, m, j) with j = min(2k, m); u_c, c_w, c_v (size, j, k), U = left u_c; the power
    method has no c_v. The others are (size,): ‖G‖²_F by Hutch++ (nan without probes), ‖Ĝ‖²_F before
    the trust factor, and the trust factor, which is in c_w and c_v already.
    """

    left: Tensor
    u_c: Tensor
    c_w: Tensor
    c_v: Tensor | None
    norm_sq: Tensor
    captured_sq: Tensor
    trust: Tensor


def estimate(bucket: Bucket) -> Estimate:
    """The estimate that a bucket's sketches stand for."""
    u, v, y, w = bucket.u, bucket.v, bucket.y, bucket.w
    cond_max, trust_max = bucket.group["cond_max"], bucket.group["trust_max"]
    if bucket.group["method"] == "power":  # Ĝ = U₁ Wᵀ with U₁ = orth(Y): clipping scales Y, not U₁
        u_1, _, _ = torch.ops.molegrad.orthonormalize(y, cond_max)
        left, u_c, c_w = extend(u, u_1, cond_max)
        c_v = None
        captured_sq = w.square().sum((-2, -1))
    else:  # Ĝ = U Wᵀ + (I − UUᵀ) Y Vᵀ
        left, u_c, y_c = extend(u, y, cond_max)
        c_w, c_v = u_c, y_c - u_c @ (u.mT @ y)
        captured_sq = w.square().sum((-2, -1)) + c_v.square().sum((-2, -1))
    norm_sq = torch.full_like(captured_sq, math.nan)
    if c_v is not None and bucket.omega.shape[-1]:  # the power method's layers measure it
        norm_sq = hutch_norm_sq(y, bucket.g_omega, v, bucket.omega)
    trust = torch.ones_like(captured_sq)
    if trust_max > 0:
        trust = trust_factor(norm_sq, captured_sq, trust_max)
        c_w = c_w * trust[:, None, None]
        c_v = None if c_v is None else c_v * trust[:, None, None]
    return Estimate(left, u_c, c_w, c_v, norm_sq, captured_sq, trust)


def right_factor(bucket: Bucket, est: Estimate) -> Tensor:
    """F (size, n, j) with Ĝ = left Fᵀ."""
    factor = bucket.w @ est.c_w.mT
    return factor if est.c_v is None else factor + bucket.v @ est.c_v.mT


def two_sided(bucket: Bucket, est: Estimate) -> tuple[Tensor, Tensor, Tensor]:
    """right (size, n, i) orthonormal, i = min(2k, n); V in it (size, i, k); the core C of Ĝ.

    Ĝ = left C rightᵀ, C (size, j, i).
    """
    right, v_c, w_c = extend(bucket.v, bucket.w, bucket.group["cond_max"])
    core = est.c_w @ w_c.mT
    return right, v_c, core if est.c_v is None else core + est.c_v @ v_c.mT


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


def without_explored(core: Tensor, bucket: Bucket) -> Tensor:
    """A momentum's core (size, k, k) without the modes that `turn` replaces by random ones."""
    kept = bucket.rank - bucket.explored
    mask = (torch.arange(bucket.rank, device=core.device) < kept).to(core.dtype)
    return core * mask * mask[:, None]


def resized_core(core: Tensor, k: int) -> Tensor:
    """A momentum's core (k', k') for rank k: its leading part, or itself with zeros around it."""
    kept = min(k, core.shape[0])
    new = core.new_zeros(k, k)
    new[:kept, :kept] = core[:kept, :kept]
    return new


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
    data-parallel process draw the same ones. Also writes the layers' statistics.
    """
    step = bucket.states_u[0]["step"]
    seed = bucket.group["seed"] + 7919 * (bucket.first + 1)
    turned_v = _turned(bucket, bucket.v, new_v, finite, step, seed + 1)
    overlap = (bucket.v.mT @ turned_v).square().sum((-2, -1)) / bucket.rank
    rows = [est.norm_sq, est.captured_sq, est.trust, condition, (1 - overlap).clamp_min(0)]
    stats = torch.zeros(bucket.size, len(STATS), device=bucket.u.device)
    stats[:, : len(rows)] = torch.stack([row.float() for row in rows], dim=1)
    for params, new, offset in (
        (bucket.bases_u, _turned(bucket, bucket.u, new_u, finite, step, seed), 3),
        (bucket.bases_v, turned_v, 4),
    ):
        probes = bucket.omega.shape[-1]
        if probes:
            random = _random(new, probes, step, seed + offset)
            new = torch.cat([new, random], dim=-1)
        for basis, value in zip(params, new, strict=True):
            basis.copy_(value)
    for state, row in zip(bucket.states_v, stats, strict=True):
        state["stats"].copy_(row)


def _turned(bucket: Bucket, old, new, finite, step, seed: int) -> Tensor:
    explored = bucket.explored
    if explored:
        random = _random(new, explored, step, seed)
        new = torch.cat([new[..., : bucket.rank - explored], random], dim=-1)
    new, _, _ = torch.ops.molegrad.orthonormalize(new, bucket.group["cond_max"])
    return torch.where(finite[:, None, None], new, old)


def _random(like: Tensor, columns: int, step: Tensor, seed: int) -> Tensor:
    """Random signs (size, rows, columns) for `like` (size, rows, …), other ones for each layer."""
    size, rows = like.shape[:2]
    return bases.rademacher(size * rows, columns, step, seed, like.dtype).view(size, rows, columns)


class FactoredOptimizer(Optimizer):
    """Base class of the optimizers that take groups of kind "dense" and "factored".

    A factored group (`molegrad.optim.matrix_param_groups`) holds weight (m, n), basis_u (m, k + r)
    and basis_v (n, k + r) of each layer in turn, r its "probes"; each layer's k is what its bases
    have, so that the layers of one group may differ. The state of a layer lies with basis_u and
    basis_v: "basis" (the parameter's own storage, so that a state_dict carries the bases), "step"
    (int64), "stats" (float32, named by `molegrad.autograd.STATS`), and what the subclass adds.

    Raises:
        ValueError: an option is out of range, a parameter is no matrix, or a factored group is not
            made as above.
    """

    # Option: least and largest value.
    LIMITS: dict[str, tuple[float, float]] = {}

    def __init__(self, params, defaults: dict[str, Any]) -> None:
        super().__init__(params, {"kind": "dense", **defaults})

    def _dense_step(self, group: dict[str, Any]) -> None:
        """One step of a dense group."""
        raise NotImplementedError

    def _factored_step(self, bucket: Bucket) -> None:
        """One step of a bucket; calls `turn` at its end."""
        raise NotImplementedError

    def _new_state(self, basis_u: Tensor, basis_v: Tensor, k: int) -> tuple[dict, dict]:
        """What a layer adds to the states of its left and right basis before its first step."""
        raise NotImplementedError

    def _resized(self, state_u: dict, state_v: dict, k: int) -> None:
        """Carry a layer's state over to rank k, in place."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._validate(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "factored":
                for bucket in self._buckets(group):
                    torch._foreach_add_([state["step"] for state in bucket.states_u], 1)
                    self._factored_step(bucket)
            else:
                self._dense_step(group)
        return loss

    def _buckets(self, group: dict[str, Any]) -> list[Bucket]:
        params = group["params"]
        layers: dict[tuple, list[tuple]] = defaultdict(list)
        for index, layer in enumerate(zip(params[::3], params[1::3], params[2::3], strict=True)):
            weight, basis_u, basis_v = layer
            if basis_u.grad is not None and basis_v.grad is not None:
                self._initialise(group, basis_u, basis_v)
                key = (weight.shape, basis_u.shape[1], weight.dtype, weight.device)
                layers[key].append((index, *layer))
        return [self._bucket(group, bucket) for bucket in layers.values()]

    def _initialise(self, group: dict[str, Any], basis_u: Tensor, basis_v: Tensor) -> None:
        state_u, state_v = self.state[basis_u], self.state[basis_v]
        if state_u:
            return
        device = basis_u.device
        for basis, state in ((basis_u, state_u), (basis_v, state_v)):
            state["basis"] = basis.detach()
        state_u["step"] = torch.zeros((), dtype=torch.int64, device=device)
        state_v["stats"] = torch.full((len(STATS),), math.nan, device=device)
        new_u, new_v = self._new_state(basis_u, basis_v, basis_u.shape[1] - group["probes"])
        state_u.update(new_u)
        state_v.update(new_v)

    def _bucket(self, group: dict[str, Any], layers: list[tuple]) -> Bucket:
        indices, weights, bases_u, bases_v = (list(column) for column in zip(*layers, strict=True))
        k = bases_u[0].shape[1] - group["probes"]
        u, v = torch.stack(bases_u)[..., :k], torch.stack(bases_v)
        y, w = (torch.stack([basis.grad for basis in side]) for side in (bases_u, bases_v))
        return Bucket(
            group, indices[0], weights, bases_u, bases_v,
            [self.state[p] for p in bases_u], [self.state[p] for p in bases_v],
            u, v[..., :k], y[..., :k], w[..., :k], y[..., k:], v[..., k:],
        )  # fmt: skip

    @torch.no_grad()
    def resize_rank(self, basis_u: Tensor, basis_v: Tensor, new_u: Tensor, new_v: Tensor) -> None:
        """Give a layer other bases, of another rank k'; call it between two steps.

        The first min(k, k') columns of the new bases are the old ones; momentum and moments of
        directions that go are dropped, those of new directions start as documented by the subclass.

        Args:
            basis_u, basis_v: the layer's parameters, in a factored group of this optimizer.
            new_u: (m, k' + r), new_v: (n, k' + r), r the group's probes.

        Raises:
            ValueError: the parameters are none of this optimizer's, or the new bases do not fit.
        """
        group = self._group_of(basis_u, basis_v)
        (m, _), (n, _), probes = basis_u.shape, basis_v.shape, group["probes"]
        k = new_u.shape[-1] - probes
        fits = tuple(new_u.shape) == (m, k + probes) and tuple(new_v.shape) == (n, k + probes)
        if not (fits and 1 <= k <= min(m, n)):
            raise ValueError(
                f"{type(self).__name__}.resize_rank: expected bases ({m}, k + {probes}) and "
                f"({n}, k + {probes}) with 1 <= k <= {min(m, n)} and {probes} probes, got "
                f"{tuple(new_u.shape)} and {tuple(new_v.shape)}"
            )
        if self.state.get(basis_u):
            self._resized(self.state[basis_u], self.state[basis_v], k)
        for basis, new in ((basis_u, new_u), (basis_v, new_v)):
            self._adopt(basis, new.to(basis.device, basis.dtype, copy=True))

    def _adopt(self, basis: Tensor, new: Tensor) -> None:
        """basis.data ← new, of any width; its gradient, of the old width, goes."""
        basis.grad = None
        basis.data = new
        if self.state.get(basis):
            self.state[basis]["basis"] = basis.detach()

    def _group_of(self, basis_u: Tensor, basis_v: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if group["kind"] == "factored":
                params = group["params"]
                for u, v in zip(params[1::3], params[2::3], strict=True):
                    if u is basis_u and v is basis_v:
                        return group
        raise ValueError(
            f"{type(self).__name__}.resize_rank: no factored group of this optimizer has these "
            "bases; give the basis_u and basis_v of one of its layers"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the bases are restored into the model's parameters, with the rank they had.

        Raises:
            ValueError: a saved basis does not fit its layer.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            if group["kind"] != "factored":
                continue
            for index, p in enumerate(group["params"]):
                state = self.state.get(p)
                if index % 3 and state:
                    self._restore(p, state["basis"])
                    if "step" in state:  # torch leaves this key where it was loaded from
                        state["step"] = state["step"].to(p.device)

    @torch.no_grad()
    def _restore(self, p: Tensor, saved: Tensor) -> None:
        if saved.shape[0] != p.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: the saved basis has {saved.shape[0]} rows, the layer "
                f"needs {p.shape[0]}: load a state_dict of the same model"
            )
        if saved.shape == p.shape:
            p.copy_(saved)
            self.state[p]["basis"] = p.detach()
        else:
            self._adopt(p, saved.clone())

    def _validate(self, group: dict[str, Any]) -> None:
        name, params = type(self).__name__, group["params"]
        for option, (low, high) in self.LIMITS.items():
            if not low <= float(group[option]) <= high:
                raise ValueError(
                    f"{name}: {option} must lie between {low:g} and {high:g}, got {group[option]}"
                )
        if group["kind"] not in ("dense", "factored"):
            raise ValueError(f"{name}: kind must be 'dense' or 'factored', got {group['kind']!r}")
        for p in params:
            if p.dim() != 2:
                raise ValueError(
                    f"{name} is for matrices, got a parameter of shape {tuple(p.shape)}: give "
                    "vectors, embeddings and the output head to torch.optim.AdamW "
                    "(molegrad.optim.other_params)"
                )
        if group["kind"] == "dense":
            return
        shapes = [tuple(p.shape) for p in params]
        triples = list(zip(shapes[::3], shapes[1::3], shapes[2::3], strict=False))
        missing = [key for key in FACTORED_KEYS if key not in group]
        if (
            missing
            or len(shapes) % 3
            or any(u[0] != w[0] or v[0] != w[1] or u[1] != v[1] for w, u, v in triples)
            or any(u[1] <= group["probes"] for _, u, _ in triples)
        ):
            raise ValueError(
                f"{name}: a factored group holds weight (m, n), basis_u (m, k + probes), basis_v "
                "(n, k + probes) of each layer in turn, and the options "
                f"{', '.join(FACTORED_KEYS)} (molegrad.optim.matrix_param_groups builds it); got "
                f"{shapes}" + (f", without {', '.join(missing)}" if missing else "")
            )
