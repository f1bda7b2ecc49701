"""Muon on dense and on factored gradients, as one torch.optim.Optimizer.

Dense groups: momentum, Newton–Schulz, weight −= lr · scale · polar(momentum) (Jordan et al. 2024).

Factored groups never see a matrix of the weight's size except the weight. A layer's gradient
arrives as sketches Y and W in `basis_u.grad` and `basis_v.grad`; its momentum is kept as U S Vᵀ,
whose bases U and V *are* the layer's sketch bases. In the orthonormal bases L = [U, Y⊥] and
R = [V, W⊥] both gradient and momentum are small cores of at most 2k × 2k, where the momentum's
average, its polar factor (exact) and its truncation to rank k all take place (the update of
MoFaSGD, Mahdavi et al. 2025, with a block iteration in place of its SVD, which would make the host
wait for the device).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from molegrad import bases
from molegrad.autograd import STATS, trust_factor
from molegrad.optim.newton_schulz import newton_schulz
from molegrad.reference import hutch_norm_sq

ADJUST_LR = ("spectral", "original", "match_rms_adamw", "none")


def lr_scale(adjust_lr: str, m: int, n: int) -> float:
    """Factor on the learning rate of an (m, n) weight.

    "spectral" √(m/n) (Yang, Simon, Bernstein 2023), "original" √max(1, m/n) (Jordan et al.),
    "match_rms_adamw" 0.2 √max(m, n) (Liu et al. 2025), "none" 1.
    """
    return {
        "spectral": math.sqrt(m / n),
        "original": math.sqrt(max(1.0, m / n)),
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "none": 1.0,
    }[adjust_lr]


class Muon(Optimizer):
    """Momentum, orthogonalised.

    Args:
        params: matrices, or groups from `molegrad.optim.matrix_param_groups` (kind "dense" or
            "factored"); every option below can be set per group.
        lr: learning rate, before `adjust_lr`.
        momentum: μ of the average M ← μ M + (1 − μ) Ĝ.
        nesterov: orthogonalise μ M + (1 − μ) Ĝ instead of M.
        weight_decay: decoupled, weight ← (1 − lr · weight_decay) weight.
        adjust_lr: "spectral", "original", "match_rms_adamw" or "none", see `lr_scale`.
        ns_steps: Newton–Schulz steps of the dense groups.
        truncation_iters: block iterations that truncate the factored momentum to rank k.

    Raises:
        ValueError: an option is out of range, a parameter is no matrix, or a factored group is not
            made of (weight, basis_u, basis_v).
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adjust_lr: str = "spectral",
        ns_steps: int = 5,
        truncation_iters: int = 2,
    ) -> None:
        defaults = {
            "kind": "dense",
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr": adjust_lr,
            "ns_steps": ns_steps,
            "truncation_iters": truncation_iters,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _validate(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "factored":
                self._factored_step(group)
            else:
                self._dense_step(group)
        return loss

    def _dense_step(self, group: dict[str, Any]) -> None:
        mu = group["momentum"]
        by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            buffer = state["momentum_buffer"].lerp_(p.grad, 1 - mu)
            update = p.grad.lerp(buffer, mu) if group["nesterov"] else buffer
            by_shape[(p.shape, p.dtype, p.device)].append((p, update))
        for (shape, _, _), pairs in by_shape.items():
            lr = group["lr"] * lr_scale(group["adjust_lr"], *shape)
            polar = newton_schulz(torch.stack([u for _, u in pairs]), group["ns_steps"])
            for (p, _), direction in zip(pairs, polar.unbind(), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.to(p.dtype), alpha=-lr)

    def _factored_step(self, group: dict[str, Any]) -> None:
        params = group["params"]
        by_shape: dict[tuple, list[tuple]] = defaultdict(list)
        for index, layer in enumerate(zip(params[::3], params[1::3], params[2::3], strict=True)):
            weight, basis_u, basis_v = layer
            if basis_u.grad is not None and basis_v.grad is not None:
                self._init_factored_state(group, basis_u, basis_v)
                key = (weight.shape, weight.dtype, weight.device)
                by_shape[key].append((index, *layer))
        for (shape, _, _), layers in by_shape.items():
            self._factored_bucket(group, shape, layers)

    def _init_factored_state(self, group, basis_u: Tensor, basis_v: Tensor) -> None:
        if self.state[basis_u]:
            return
        k = group["rank_k"]
        for basis in (basis_u, basis_v):  # references: the state_dict carries the bases
            self.state[basis]["basis"] = basis.detach()
        self.state[basis_u]["core"] = basis_u.new_zeros(k, k)
        self.state[basis_u]["step"] = torch.zeros((), dtype=torch.int64, device=basis_u.device)
        self.state[basis_v]["stats"] = torch.full(
            (len(STATS),), math.nan, device=basis_u.device, dtype=torch.float32
        )

    def _factored_bucket(self, group, shape, layers) -> None:
        """One step of all factored layers of one shape (m, n); L of them."""
        k, mu = group["rank_k"], group["momentum"]
        states = [(self.state[bu], self.state[bv]) for _, _, bu, bv in layers]
        u_all = torch.stack([bu for _, _, bu, _ in layers])
        v_all = torch.stack([bv for _, _, _, bv in layers])
        y_all = torch.stack([bu.grad for _, _, bu, _ in layers])
        w_all = torch.stack([bv.grad for _, _, _, bv in layers])
        core = torch.stack([su["core"] for su, _ in states])
        u, v = u_all[..., :k], v_all[..., :k]
        left, right, momentum_c, gradient_c, stats = _cores(
            group, u, v, y_all, w_all, v_all[..., k:], core
        )
        average = mu * momentum_c + (1 - mu) * gradient_c  # (L, ≤2k, ≤2k)
        direction = mu * average + (1 - mu) * gradient_c if group["nesterov"] else average
        polar = torch.ops.molegrad.polar_factor(direction.mT)  # of its transpose: (R-side, L-side)
        update = right @ polar  # (L, n, ≤2k): the update is left · updateᵀ

        new_left, new_core, new_right, condition = _truncate(
            average, k, group["truncation_iters"], group["cond_max"]
        )
        finite = average.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        drift = []
        for i, (index, weight, basis_u, basis_v) in enumerate(layers):
            lr = group["lr"] * lr_scale(group["adjust_lr"], *shape)
            torch.ops.molegrad.lowrank_update_(
                weight, left[i], update[i], -lr, group["lr"] * group["weight_decay"]
            )
            state_u, state_v = states[i]
            step = state_u["step"].add_(1)
            seed = group["seed"] + 7919 * (index + 1)
            old_v = v[i]
            _turn(basis_u, left[i] @ new_left[i], finite[i], step, group, seed)
            _turn(basis_v, right[i] @ new_right[i], finite[i], step, group, seed + 1)
            new_core_i = new_core[i].clone()
            explored = group["explored"]
            new_core_i[k - explored :] = 0  # the directions that exploration gave up
            new_core_i[:, k - explored :] = 0
            state_u["core"].copy_(torch.where(finite[i], new_core_i, state_u["core"]))
            drift.append(bases.drift(old_v, basis_v[:, :k]))
        rows = [*stats, condition, torch.stack(drift)]
        table = torch.stack([row.float() for row in rows])
        for i, (_, state_v) in enumerate(states):
            state_v["stats"][: len(rows)] = table[:, i]
            state_v["stats"][len(rows) :] = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the bases of factored layers are restored into the model's parameters."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            if group["kind"] != "factored":
                continue
            for index, p in enumerate(group["params"]):
                state = self.state.get(p)
                if index % 3 and state:
                    with torch.no_grad():
                        p.copy_(state["basis"])
                    state["basis"] = p.detach()
                    if "step" in state:  # torch leaves this key where it was loaded from
                        state["step"] = state["step"].to(p.device)


def _validate(group: dict[str, Any]) -> None:
    limits = {"lr": (0.0, math.inf), "momentum": (0.0, 1.0), "weight_decay": (0.0, math.inf)}
    for name, (low, high) in limits.items():
        value = group[name]
        if not low <= float(value) <= high:
            raise ValueError(f"Muon: {name} must lie between {low:g} and {high:g}, got {value}")
    if group["adjust_lr"] not in ADJUST_LR:
        raise ValueError(
            f"Muon: adjust_lr must be one of {', '.join(ADJUST_LR)}; got {group['adjust_lr']!r}"
        )
    if group["kind"] not in ("dense", "factored"):
        raise ValueError(f"Muon: kind must be 'dense' or 'factored', got {group['kind']!r}")
    params = group["params"]
    for p in params:
        if p.dim() != 2:
            raise ValueError(
                f"Muon is for matrices, got a parameter of shape {tuple(p.shape)}: give vectors, "
                "embeddings and the output head to AdamW (molegrad.optim.other_params)"
            )
    if group["kind"] == "factored":
        shapes = [tuple(p.shape) for p in params]
        triples = list(zip(shapes[::3], shapes[1::3], shapes[2::3], strict=False))
        if len(shapes) % 3 or any(
            u[0] != w[0] or v[0] != w[1] or u[1] != v[1] for w, u, v in triples
        ):
            raise ValueError(
                "Muon: a factored group holds weight (m, n), basis_u (m, k), basis_v (n, k) of "
                f"each layer in turn (molegrad.optim.matrix_param_groups builds it), got {shapes}"
            )


def _cores(group, u, v, y_all, w_all, probes, core):
    """Momentum and gradient as cores in common orthonormal bases; batched over L layers.

    Returns:
        left (L, m, ≤2k), right (L, n, ≤2k), momentum core and gradient core (L, ≤2k, ≤2k), and the
        rows of statistics (gradient_norm_sq, captured_norm_sq, trust_factor), each (L,).
    """
    k, cond_max = group["rank_k"], group["cond_max"]
    y, w = y_all[..., :k], w_all[..., :k]
    if group["method"] == "power":  # Ĝ = U₁ Wᵀ with U₁ = orth(Y): clipping scales Y, never U₁
        u_1, _, _ = torch.ops.molegrad.orthonormalize(y, cond_max)
        left, u_c, u_1c = bases.extend(u, u_1, cond_max)
        right, v_c, w_c = bases.extend(v, w, cond_max)
        gradient_c = u_1c @ w_c.mT
        captured_sq = w.square().sum((-2, -1))
        norm_sq = torch.full_like(captured_sq, math.nan)
    else:  # Ĝ = U Wᵀ + (I − UUᵀ) Y Vᵀ
        left, u_c, y_c = bases.extend(u, y, cond_max)
        right, v_c, w_c = bases.extend(v, w, cond_max)
        y_perp_c = y_c - u_c @ (u.mT @ y)
        gradient_c = u_c @ w_c.mT + y_perp_c @ v_c.mT
        captured_sq = gradient_c.square().sum((-2, -1))
        norm_sq = torch.full_like(captured_sq, math.nan)
        if probes.shape[-1]:
            norm_sq = hutch_norm_sq(y, y_all[..., k:], v, probes)
    trust = torch.ones_like(captured_sq)
    if group["trust_max"] > 0:
        trust = trust_factor(norm_sq, captured_sq, group["trust_max"])
        gradient_c = gradient_c * trust[:, None, None]
    return left, right, u_c @ core @ v_c.mT, gradient_c, (norm_sq, captured_sq, trust)


def _truncate(core: Tensor, k: int, iters: int, cond_max: float):
    """Leading k modes of core (L, j, j): P (L, j, k), S (L, k, k), Q (L, j, k), condition (L,).

    Block iteration from the leading k columns, where the momentum sits already; it orders the
    modes by strength.
    """
    orth = torch.ops.molegrad.orthonormalize
    p = orth(core[..., :k], cond_max)[0]
    for _ in range(iters):
        q = orth(core.mT @ p, cond_max)[0]
        p, r, _ = orth(core @ q, cond_max)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return p, p.mT @ core @ q, q, diagonal.amax(-1) / diagonal.amin(-1)


def _turn(basis: Tensor, new: Tensor, finite: Tensor, step: Tensor, group, seed: int) -> None:
    """basis ← the new modes, the weakest replaced by random directions, new probes behind them."""
    rows, width = basis.shape
    k, explored = group["rank_k"], group["explored"]
    if explored:
        random = bases.rademacher(rows, explored, step, seed, basis.dtype)
        new = torch.cat([new[:, : k - explored], random], dim=1)
    new, _, _ = torch.ops.molegrad.orthonormalize(new, group["cond_max"])
    basis[:, :k] = torch.where(finite, new, basis[:, :k])
    if width > k:
        basis[:, k:] = bases.rademacher(rows, width - k, step, seed + 3, basis.dtype)
