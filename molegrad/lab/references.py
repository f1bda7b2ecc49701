"""Low-rank optimizers of other papers, written from their formulas.

What: `LDAdam` (arXiv 2410.16103), `MoFaSGD` (arXiv 2507.08091) and `Dion` (arXiv 2504.05295) as
plain torch optimizers for (m, n) matrices. They are given the dense gradient G.

Why: MoleGrad is compared with them. They are references: the quality they reach and the bytes of
state they keep count, their speed does not (MoFaSGD's SVD makes the host wait for the device).

A matrix gets its state with its first gradient that is not zero: behind a zero-initialised
projection the very first gradient is exactly zero, and no subspace can be read off it. That test,
too, makes the host wait, until the state is there.

How to run: `molegrad.lab.peers.build("ldadam", matrices, lr=1e-3, rank=32)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from molegrad.optim.muon import ADJUST_LR, lr_scale


def check_rank(who: str, rank: int, shape: tuple[int, ...]) -> None:
    """ValueError unless 1 <= rank <= min(shape)."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{who}: rank must be an integer of at least 1, got {rank!r}")
    if rank > min(shape):
        raise ValueError(
            f"{who}: rank {rank} is more than a matrix of shape {tuple(shape)} has; take a rank of "
            f"at most {min(shape)} or leave that matrix to another optimizer"
        )


class MatrixOptimizer(Optimizer):
    """What the references share: checks, weight decay, the walk over the matrices.

    A subclass has `_start`, which makes the state of a matrix, and `_direction`, which updates it
    and returns the (m, n) direction D of weight ← (1 − lr · weight_decay) weight − lr · D.

    Raises:
        ValueError: an option is out of range, the rank exceeds a matrix's, or a parameter is no
            matrix of float32 or float64.
    """

    limits: dict[str, tuple[float, float]] = {}  # of the options: lower (included), upper (not)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group, who = self.param_groups[-1], type(self).__name__
        limits = {"lr": (0.0, math.inf), "weight_decay": (0.0, math.inf), **self.limits}
        for option, (low, high) in limits.items():
            if not low <= float(group[option]) < high:
                raise ValueError(
                    f"{who}: {option} must be at least {low:g} and below {high:g}, "
                    f"got {group[option]}"
                )
        if group.get("adjust_lr", "none") not in ADJUST_LR:
            raise ValueError(
                f"{who}: adjust_lr must be one of {', '.join(ADJUST_LR)}; "
                f"got {group['adjust_lr']!r}"
            )
        for p in group["params"]:
            if p.dim() != 2 or p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{who} is for matrices of float32 or float64, got a parameter of shape "
                    f"{tuple(p.shape)} and {p.dtype}: give others to AdamW, and lower the "
                    "precision of the computation by autocast, not of the weights"
                )
            check_rank(who, group["rank"], p.shape)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state = self.state[p]
                if not state:
                    if not bool(p.grad.any()):
                        continue
                    self._start(p.grad, state, group, index)
                p.add_(self._direction(p.grad, state, group), alpha=-group["lr"])
        return loss

    def _start(self, gradient: Tensor, state: dict, group: dict, index: int) -> None:
        raise NotImplementedError

    def _direction(self, gradient: Tensor, state: dict, group: dict) -> Tensor:
        raise NotImplementedError


def block_power_iteration(target: Tensor, basis: Tensor) -> Tensor:
    """One step B Bᵀ P, orthonormalised: target B (d, D), basis P (d, r) -> (d, r)."""
    return torch.linalg.qr(target @ (target.mT @ basis))[0]


class LDAdam(MatrixOptimizer):
    """Adam in a subspace that turns at every step (Robert et al., arXiv 2410.16103).

    With A the gradient plus the error kept from the step before (d × D, d the smaller side; a tall
    matrix is transposed), P the basis (d, r), m̂ and v̂ the bias-corrected moments (r, D) and
    Q = PₜᵀPₜ₋₁:

        Pₜ ← orth(B Bᵀ Pₜ₋₁), B = ρ Pₜ₋₁ m̂ + (1 − ρ) A;  P₁ holds the leading left singular vectors
        m ← β₁ Q m + (1 − β₁) PₜᵀA
        v ← β₂ (1 − β₂ᵗ⁻¹) |(Q∘Q)(v̂ − m̂²) + (Q m̂)²| + (1 − β₂) (PₜᵀA)²
        E ← A − Pₜ PₜᵀA + β₁/(1 − β₁) (Pₜ₋₁ m − Pₜ Q m)
        D = Pₜ m̂ / (√v̂ + ε)

    Args:
        rank: r.
        betas: β₁ and β₂; the defaults, ρ's too, are those of the authors' experiments.
        rho: ρ, the share of the momentum in what the basis follows.
        error_feedback: keep E. The authors hold it in a gradient buffer that is never cleared;
            here it is a state of its own, as a training loop clears the gradients.
    """

    limits = {"rho": (0.0, 1.0), "eps": (0.0, math.inf)}

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        rank: int = 16,
        betas: tuple[float, float] = (0.908, 0.99),
        rho: float = 0.908,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        error_feedback: bool = True,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"LDAdam: betas must be two numbers in [0, 1), got {betas}")
        defaults = {"lr": lr, "rank": rank, "betas": tuple(betas), "rho": rho, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "error_feedback": error_feedback}
        super().__init__(params, defaults)

    def _start(self, gradient, state, group, index) -> None:
        g = _wide(gradient)
        state["step"] = 0
        state["basis"] = in_rows(torch.linalg.svd(g, full_matrices=False)[0][:, : group["rank"]])
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = g.new_zeros(group["rank"], g.shape[1])
        if group["error_feedback"]:
            state["error"] = torch.zeros_like(gradient)

    def _direction(self, gradient, state, group) -> Tensor:
        (beta1, beta2), t = group["betas"], state["step"]
        old, m, v = state["basis"], state["exp_avg"], state["exp_avg_sq"]
        tall = gradient.shape[0] > gradient.shape[1]
        a = _wide(gradient + state["error"] if group["error_feedback"] else gradient)  # (d, D)
        basis, moved = old, m
        if t > 0:
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
            target = group["rho"] * (old @ m_hat) + (1 - group["rho"]) * a
            basis = block_power_iteration(target, old)
            turn = basis.mT @ old  # (r, r)
            moved = turn @ m
            variance = turn.square() @ (v_hat - m_hat.square())
            v = (variance + (turn @ m_hat).square()).abs() * (1 - beta2**t)
        low = basis.mT @ a  # (r, D)
        if group["error_feedback"]:
            lost = old @ m - basis @ moved
            error = a - basis @ low + beta1 / (1 - beta1) * lost
            state["error"].copy_(error.mT if tall else error)
        m = beta1 * moved + (1 - beta1) * low
        v = beta2 * v + (1 - beta2) * low.square()
        state.update(step=t + 1, basis=in_rows(basis), exp_avg=m, exp_avg_sq=v)
        denominator = (v / (1 - beta2 ** (t + 1))).sqrt() + group["eps"]
        direction = basis @ (m / (1 - beta1 ** (t + 1)) / denominator)
        return direction.mT if tall else direction


class MoFaSGD(MatrixOptimizer):
    """Momentum kept as U diag(σ) Vᵀ of rank r (Mahdavinia & Mahdavi, arXiv 2507.08091).

    It begins as the truncated SVD of the first gradient. From then on the average of the momentum
    and of the gradient's projection on the tangent space at (U, V),
        M = β U diag(σ) Vᵀ + (1 − β) (UUᵀG + G VVᵀ − UUᵀG VVᵀ),
    whose rank is at most 2r, is factored in the orthonormal bases of [U, GV] and [V, GᵀU] and
    truncated to rank r by the SVD of a small core. The direction is its polar factor, U Vᵀ.

    Args:
        rank: r.
        momentum: β.
        adjust_lr: factor on the learning rate by shape, see `molegrad.optim.muon.lr_scale`; the
            paper has none.
    """

    limits = {"momentum": (0.0, 1.0)}

    def __init__(
        self,
        params,
        lr: float = 0.02,
        rank: int = 16,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adjust_lr: str = "none",
    ) -> None:
        defaults = {"lr": lr, "rank": rank, "momentum": momentum}
        defaults |= {"weight_decay": weight_decay, "adjust_lr": adjust_lr}
        super().__init__(params, defaults)

    def _start(self, gradient, state, group, index) -> None:
        left, sigma, right = torch.linalg.svd(gradient, full_matrices=False)
        r = group["rank"]
        state["left"], state["right"] = in_rows(left[:, :r]), in_rows(right[:r].mT)
        state["sigma"] = in_rows(sigma[:r])

    def _direction(self, gradient, state, group) -> Tensor:
        beta, r = group["momentum"], group["rank"]
        u, v = state["left"], state["right"]  # (m, r), (n, r)
        y, w = gradient @ v, gradient.mT @ u
        left, left_c = torch.linalg.qr(torch.cat([u, y], dim=1))
        right, right_c = torch.linalg.qr(torch.cat([v, w], dim=1))
        eye = (1 - beta) * torch.eye(r, dtype=y.dtype, device=y.device)
        top = torch.cat([beta * state["sigma"].diag() - (1 - beta) * (u.mT @ y), eye], dim=1)
        middle = torch.cat([top, torch.cat([eye, torch.zeros_like(eye)], dim=1)])  # (2r, 2r)
        p, sigma, q = torch.linalg.svd(left_c @ middle @ right_c.mT)
        u, sigma, v = left @ p[:, :r], in_rows(sigma[:r]), right @ q[:r].mT
        state.update(left=u, sigma=sigma, right=v)
        noise = torch.finfo(sigma.dtype).eps * max(gradient.shape) * sigma[0]
        scale = lr_scale(group["adjust_lr"], *gradient.shape)
        return (u * (scale * (sigma > noise))) @ v.mT  # of a rank below r no arbitrary directions


class Dion(MatrixOptimizer):
    """Orthonormalised low-rank momentum with error feedback (Ahn et al., arXiv 2504.05295).

        M ← M + G;  P = orth(M Q);  R = MᵀP;  M ← M − (1 − μ) P Rᵀ
        Q ← R with columns of norm 1;  D = √(m/n) P Qᵀ

    so that M keeps what the update left out. A column of R that is zero leaves its column of Q as
    it was and moves nothing.

    Args:
        rank: columns of P (m, r) and Q (n, r).
        momentum: μ.
        adjust_lr: factor on the learning rate by shape, see `molegrad.optim.muon.lr_scale`; the
            paper's √(m/n) is "spectral".
        seed: of the first Q, which is random.
    """

    limits = {"momentum": (0.0, 1.0)}

    def __init__(
        self,
        params,
        lr: float = 0.02,
        rank: int = 16,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adjust_lr: str = "spectral",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "rank": rank, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"adjust_lr": adjust_lr, "seed": seed})

    def _start(self, gradient, state, group, index) -> None:
        generator = torch.Generator().manual_seed(group["seed"] + 7919 * index)
        q = torch.randn(gradient.shape[1], group["rank"], generator=generator)
        state["q"] = q.to(gradient.device, gradient.dtype)
        state["momentum"] = torch.zeros_like(gradient)

    def _direction(self, gradient, state, group) -> Tensor:
        momentum = state["momentum"].add_(gradient)
        p = torch.linalg.qr(momentum @ state["q"])[0]  # (m, r)
        r = momentum.mT @ p  # (n, r)
        momentum.addmm_(p, r.mT, alpha=-(1 - group["momentum"]))
        norm = torch.linalg.vector_norm(r, dim=0)
        q = torch.where(norm > 0, r / norm, 0.0)
        state["q"] = torch.where(norm > 0, q, state["q"])
        return (lr_scale(group["adjust_lr"], *gradient.shape) * p) @ q.mT


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def in_rows(tensor: Tensor) -> Tensor:
    """A copy in rows: a view would keep all of a decomposition alive, and columns would make a
    resumed run, whose state is read in rows, differ from the uninterrupted one in the last bit."""
    return tensor.clone(memory_format=torch.contiguous_format)
