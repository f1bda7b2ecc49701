"""The optimizers that MoleGrad is compared with, behind one function.

What: `Peer(name, rank, options).build(matrices, lr)` is a torch optimizer for the block matrices of
a model; `PEERS` lists the names, `OPTIONS` what each takes. GaLore, APOLLO and Fira come from
their authors' packages (pip install 'molegrad[peers]'); Dion is written here from its formula.

Why the packages are wrapped, and in what:
- Importing a package also imports bitsandbytes, for quantised variants that are not used here, so
  only the module that holds the optimizer is imported (it needs transformers).
- A matrix whose first gradient is exactly zero (behind a zero-initialised projection it is) would
  keep a meaningless subspace for 200 steps, or have its update limited to a norm of 1e-8 that
  grows by 1% a step: such gradients are passed over until one comes that is not zero.
- Their projections are views that keep whole SVDs alive, inside objects where nobody counts them:
  they become tensors of the optimizer's state.

None of them is meant to be resumed: a run of the laboratory is made in one piece.

How to run: the names are methods of python -m scripts.compare, as in --methods=galore:rank=16.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molegrad.estimators import LowRank

PEERS: dict[str, str] = {
    "galore": "GaLore: AdamW in the leading subspace of the gradient (arXiv 2403.03507)",
    "apollo": "APOLLO: a step size per channel, from a random projection (arXiv 2412.05270)",
    "fira": "Fira: GaLore, and the rest of the gradient scaled by its norm (arXiv 2410.01623)",
    "dion": "Dion: orthonormalised low-rank momentum, error feedback (arXiv 2504.05295)",
}
# Of the optimizers in packages: package, module, options of their parameter groups that a user may
# set, others of them, arguments of the constructor. The defaults are the papers' or packages'.
_QUIET = {"no_deprecation_warning": True}
_PACKAGES = {
    "galore": ("galore_torch", "adamw", {}, _QUIET),
    "apollo": ("apollo_torch", "apollo", {"proj": "random", "proj_type": "std"}, {}),
    "fira": ("fira", "fira_adamw", {"proj_type": "std"}, _QUIET),
}
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "update_proj_gap": 200}
OPTIONS: dict[str, dict] = {
    "galore": {**_ADAM, "scale": 0.25, "proj_type": "std"},
    # APOLLO-Mini is apollo:rank=1:scale=128:scale_type=tensor.
    "apollo": {**_ADAM, "scale": 1.0, "scale_type": "channel"},
    "fira": {**_ADAM, "alpha": 0.25},
    "dion": {"momentum": 0.95, "weight_decay": 0.0, "seed": 0},
}
_CHOICES = {"proj_type": ("std", "left", "right"), "scale_type": ("channel", "tensor")}


@dataclass(frozen=True)
class Peer:
    """One of `PEERS`, for the (m, n) block matrices of a model.

    Args:
        rank: an integer, a share of each matrix's smaller side, or None, as
            `LowRank.rank_k`.
        options: in place of `OPTIONS[name]`.

    Raises:
        ValueError: an unknown name or option, or an option out of range.
    """

    name: str
    rank: int | float | None = None
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in PEERS:
            raise ValueError(f"unknown peer {self.name!r}: choose among {', '.join(PEERS)}")
        known = OPTIONS[self.name]
        for option, value in self.options.items():
            if option not in known:
                raise ValueError(f"{self.name} has no option {option}: it takes {', '.join(known)}")
            if value not in _CHOICES.get(option, (value,)):
                raise ValueError(
                    f"{self.name}: {option} must be one of {', '.join(_CHOICES[option])}; "
                    f"got {value!r}"
                )

    def build(self, matrices: list[nn.Parameter], lr: float) -> Optimizer:
        """The optimizer; embeddings, head and vectors belong to another one.

        Raises:
            ValueError: a rank above a matrix's. ImportError: the method's package is missing; the
                message names the extra.
        """
        estimator = LowRank(rank_k=self.rank)
        by_rank: dict[int, list[nn.Parameter]] = defaultdict(list)
        for p in matrices:
            rank = estimator.rank_of(*p.shape, "")
            if rank > min(p.shape):
                raise ValueError(
                    f"{self.name}: rank {rank} is more than a matrix of shape {tuple(p.shape)} "
                    f"has; take a rank of at most {min(p.shape)}"
                )
            by_rank[rank].append(p)
        own = {**OPTIONS[self.name], **self.options}
        groups = [{**own, "params": params, "rank": rank} for rank, params in by_rank.items()]
        if self.name == "dion":
            return Dion(groups, lr)
        package, part, fixed, arguments = _PACKAGES[self.name]
        groups = [{**group, **fixed} for group in groups]
        return _adapted(_part_of(package, part, self.name).AdamW(groups, lr=lr, **arguments))


def _part_of(package: str, part: str, peer: str) -> types.ModuleType:
    """The module `package.part` without running the package's __init__; under a name of its own,
    so that an import of the whole package elsewhere stays what it is."""
    alias = f"_molegrad_peer_{package}"
    spec = importlib.util.find_spec(package)
    missing = package
    if spec is not None:
        shell = sys.modules.setdefault(alias, types.ModuleType(alias))
        shell.__path__ = list(spec.submodule_search_locations)
        try:
            return importlib.import_module(f"{alias}.{part}")
        except ModuleNotFoundError as error:
            missing = error.name
    raise ImportError(
        f"the peer {peer!r} needs the package {missing}: pip install 'molegrad[peers]'"
    )


def _adapted(optimizer: Optimizer) -> Optimizer:
    """A package's optimizer with what the module's docstring lists."""

    def pass_over_zeros(optimizer, args, kwargs) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            started = "projector" in optimizer.state.get(p, {})
            if p.grad is not None and not started and not bool(p.grad.any()):
                p.grad = None

    def show_projections(optimizer, args, kwargs) -> None:
        for state in optimizer.state.values():
            held = state.get("projector")
            if held is not None and held.ortho_matrix is not state.get("projection"):
                own = held.ortho_matrix.clone(memory_format=torch.contiguous_format)
                state["projection"] = held.ortho_matrix = own

    optimizer.register_step_pre_hook(pass_over_zeros)
    optimizer.register_step_post_hook(show_projections)
    return optimizer


class Dion(Optimizer):
    """Orthonormalised low-rank momentum with error feedback (Ahn et al., arXiv 2504.05295).

        M ← M + G;  P = orth(M Q);  R = MᵀP;  M ← M − (1 − μ) P Rᵀ
        Q ← R with columns of norm 1;  W ← (1 − lr·weight_decay) W − lr √(m/n) P Qᵀ

    so that M keeps what the update left out. A column of R that is zero leaves its column of Q as
    it was and moves nothing. A reference: its quality and its bytes count, not its speed.

    Args:
        params: groups of (m, n) matrices with rank (columns of P (m, r) and Q (n, r)), momentum
            (μ), weight_decay and seed (of the first Q, which is random).

    Raises:
        ValueError: the learning rate or the momentum is out of range.
    """

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            if group["lr"] < 0 or not 0 <= group["momentum"] < 1:
                raise ValueError(
                    f"dion: lr must be at least 0 and momentum in [0, 1), got lr={group['lr']}, "
                    f"momentum={group['momentum']}"
                )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every matrix that has a gradient; one that is zero starts no state."""
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state = self.state[p]
                if not state and bool(p.grad.any()):
                    generator = torch.Generator().manual_seed(group["seed"] + 7919 * index)
                    q = torch.randn(p.shape[1], group["rank"], generator=generator)
                    state["q"], state["momentum"] = q.to(p), torch.zeros_like(p)
                if state:
                    p.add_(self._direction(p.grad, state, group), alpha=-group["lr"])

    def _direction(self, gradient: Tensor, state: dict, group: dict) -> Tensor:
        momentum = state["momentum"].add_(gradient)
        p = torch.linalg.qr(momentum @ state["q"])[0]  # (m, r)
        r = momentum.mT @ p  # (n, r)
        momentum.addmm_(p, r.mT, alpha=-(1 - group["momentum"]))
        norm = torch.linalg.vector_norm(r, dim=0)
        q = torch.where(norm > 0, r / norm, 0.0)
        state["q"] = torch.where(norm > 0, q, state["q"])
        m, n = gradient.shape
        return (math.sqrt(m / n) * p) @ q.mT
