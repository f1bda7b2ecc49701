"""The optimizers that MoleGrad is compared with, behind one function.

What: `build(name, matrices, lr, rank, **options)` returns a torch optimizer for the block matrices
of a model; `PEERS` lists the names. GaLore, APOLLO and Fira come from their authors' packages
(pip install 'molegrad[peers]'); LDAdam, MoFaSGD and Dion from molegrad.lab.references; AdamW and
Muon, also stepped inside the backward pass, from torch and molegrad.optim.

Why the packages are wrapped, and in what:
- Importing a package also imports bitsandbytes, for quantised variants that are not used here, so
  only the module that holds the optimizer is imported (it needs transformers).
- A matrix whose first gradient is exactly zero (behind a zero-initialised projection it is) would
  keep a meaningless subspace for 200 steps, or have its update limited to a norm of 1e-8 that
  grows by 1% a step: such gradients are passed over until one comes that is not zero.
- Their projectors are objects, which neither a checkpoint nor torch.load(weights_only=True) takes,
  and hold views that keep whole SVDs alive: the state dict holds plain values, and the projection
  is a tensor of the state, where it is counted.

How to run: the names are methods of python -m scripts.compare, as in --methods=galore:rank=16.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from molegrad.config import MoleGradConfig
from molegrad.lab.references import Dion, LDAdam, MoFaSGD, check_rank, in_rows
from molegrad.optim import Muon

PEERS: dict[str, str] = {
    "adamw": "AdamW, dense (Loshchilov & Hutter, arXiv 1711.05101)",
    "muon": "Muon, dense (Jordan et al. 2024)",
    "galore": "GaLore: AdamW in the leading subspace of the gradient (arXiv 2403.03507)",
    "apollo": "APOLLO: a step size per channel, from a random projection (arXiv 2412.05270)",
    "apollo-mini": "APOLLO-Mini: a step size per matrix, from a projection of rank 1 (2412.05270)",
    "fira": "Fira: GaLore, and the rest of the gradient scaled by its norm (arXiv 2410.01623)",
    "ldadam": "LDAdam: Adam in a subspace that turns, with error feedback (arXiv 2410.16103)",
    "mofasgd": "MoFaSGD: factored momentum, spectral update (arXiv 2507.08091)",
    "dion": "Dion: orthonormalised low-rank momentum, error feedback (arXiv 2504.05295)",
    "in-backward-muon": "Muon stepped inside the backward pass (as LOMO, arXiv 2306.09782)",
    "in-backward-adamw": "AdamW stepped inside the backward pass (as LOMO, arXiv 2306.09782)",
}


def build(
    name: str, matrices: list[nn.Parameter], lr: float, rank: int | float, **options
) -> Optimizer:
    """The optimizer `name` for `matrices`; embeddings, head and vectors belong to another one.

    Args:
        name: a key of `PEERS`.
        matrices: the (m, n) weights.
        lr: learning rate.
        rank: of the low-rank methods: an integer, or a share of each matrix's smaller side as in
            `MoleGradConfig.rank_k`. apollo-mini always has rank 1; the dense ones have none.
        options: what the method takes besides. The defaults are those of its paper or package,
            except for weight_decay, which is 0 for all.

    Raises:
        ValueError: an unknown name or option, a parameter that is no matrix, a rank above a
            matrix's, an option out of range.
        TypeError: the rank is no number.
        ImportError: the method's package is missing; the message names the extra.
    """
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}: choose among {', '.join(PEERS)}")
    matrices = list(matrices)
    if not matrices:
        raise ValueError(f"{name}: there is no matrix to train")
    for p in matrices:
        if p.dim() != 2:
            raise ValueError(
                f"{name}: got a parameter of shape {tuple(p.shape)}, but the peers are for "
                "matrices: give vectors to AdamW"
            )
    if name in _DENSE:
        kind, defaults, known = _DENSE[name]
        _check_options(name, options, known)
        return kind(matrices, lr=lr, **{**defaults, **options})
    groups = _groups_by_rank(name, matrices, 1 if name == "apollo-mini" else rank)
    if name in _REFERENCES:
        kind = _REFERENCES[name]
        _check_options(name, options, _arguments(kind) - {"rank"})
        return kind(groups, lr=lr, **options)
    return _PACKAGES[name].build(name, groups, lr, options)


def _groups_by_rank(name: str, matrices: list[nn.Parameter], rank: int | float) -> list[dict]:
    config = MoleGradConfig(rank_k=rank)
    groups: dict[int, list[nn.Parameter]] = defaultdict(list)
    for p in matrices:
        own = config.rank_of(*p.shape)
        check_rank(name, own, p.shape)
        groups[own].append(p)
    return [{"params": params, "rank": own} for own, params in groups.items()]


def _arguments(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters) - {"params", "lr"}


def _check_options(name: str, options: dict, known) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(sorted(known))
        raise ValueError(f"{name} has no option {', '.join(unknown)}: it takes {takes}")


# In the backward pass


class InBackward:
    """Makes of an optimizer one that steps each parameter as soon as its gradient is complete.

    `class X(InBackward, AnyOptimizer)`: a hook on every parameter takes its step and frees its
    gradient, so that no two exist at a time. (Under torch.compile the backward pass of a graph is
    one piece, and its gradients do exist together.) The hook reads the options in `param_groups`,
    so schedules work; `step()` only marks the end of a step.

    What needs all gradients before the first step is impossible: accumulation, clipping by the
    global norm, averaging over processes. And a gradient that is not finite reaches its weight
    before anything can look at it; the next loss shows it.

    Args:
        grad_clip: the training loop's; refused unless it is 0.

    Raises:
        RuntimeError: (in the backward pass) a parameter gets a second gradient before `step()`.
        ValueError: the gradients are to be clipped, or there are several processes.
    """

    def __init__(self, params, grad_clip: float = 0.0, **options) -> None:
        who = type(self).__name__
        if grad_clip > 0:
            raise ValueError(
                f"{who} cannot clip by the global gradient norm (grad_clip={grad_clip:g}): the "
                "first weights have moved before the last gradient is known; set grad_clip=0"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            if world > 1:
                raise ValueError(
                    f"{who} steps before gradients are averaged over the {world} processes: train "
                    "with one process, or with the ordinary optimizer"
                )
        self._stepped: set[Tensor] = set()
        super().__init__(params, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            p.register_post_accumulate_grad_hook(self._on_gradient)

    def _on_gradient(self, p: Tensor) -> None:
        if p in self._stepped:
            p.grad = None
            raise RuntimeError(
                f"{type(self).__name__}: a second backward pass before step(), but the first one "
                "has already moved the weights: make every step of one micro-batch "
                "(total_batch_size = device_batch_size * max_seq_len), or use the ordinary "
                "optimizer, which can accumulate"
            )
        super().step()  # the other gradients are freed or not there yet: this steps p alone
        p.grad = None
        self._stepped.add(p)

    def step(self, closure=None):
        """The end of a step: the weights have moved already. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped.clear()
        return loss

    def gradient_bytes(self) -> int:
        """Bytes of gradients that exist at one time: those of the largest parameter."""
        return max(
            p.numel() * p.element_size() for group in self.param_groups for p in group["params"]
        )


class InBackwardMuon(InBackward, Muon):
    """`molegrad.optim.Muon`, dense, in the backward pass."""


class InBackwardAdamW(InBackward, AdamW):
    """`torch.optim.AdamW` in the backward pass."""


# From packages


@dataclass(frozen=True)
class _Package:
    """Where an optimizer is in a package, and the options of its parameter groups."""

    package: str
    module: str
    projector: str
    options: dict
    fixed: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)  # of the optimizer's constructor, fixed

    def build(self, name: str, groups: list[dict], lr: float, options: dict) -> Optimizer:
        defaults = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
        _check_options(name, options, [*defaults, *self.options])
        own = {**self.options, **{k: v for k, v in options.items() if k in self.options}}
        if own["update_proj_gap"] < 1:
            raise ValueError(
                f"{name}: update_proj_gap must be at least 1 step, got {own['update_proj_gap']}"
            )
        for option, choices in _CHOICES.items():
            if own.get(option, choices[0]) not in choices:
                raise ValueError(
                    f"{name}: {option} must be one of {', '.join(choices)}; got {own[option]!r}"
                )
        module = _part_of(self.package, self.module, name)
        groups = [{**group, **own, **self.fixed} for group in groups]
        defaults |= {k: v for k, v in options.items() if k in defaults}
        optimizer = module.AdamW(groups, lr=lr, **defaults, **self.arguments)
        return _adapt(optimizer, getattr(module, self.projector))


def _part_of(package: str, part: str, peer: str) -> types.ModuleType:
    """The module `package.part` without running the package's __init__; under a name of its own,
    so that an import of the whole package elsewhere stays what it is."""
    alias = f"_molegrad_peer_{package}"
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(_missing(peer, package))
    if alias not in sys.modules:
        shell = types.ModuleType(alias)
        shell.__path__ = list(spec.submodule_search_locations)
        sys.modules[alias] = shell
    try:
        return importlib.import_module(f"{alias}.{part}")
    except ModuleNotFoundError as error:
        raise ImportError(_missing(peer, error.name)) from error


def _missing(peer: str, package: str) -> str:
    return f"the peer {peer!r} needs the package {package}: pip install 'molegrad[peers]'"


def _adapt(optimizer: Optimizer, projector: type) -> Optimizer:
    """Put the adaptations that the module's docstring lists into a package's optimizer."""

    def pass_over_zeros(optimizer, args, kwargs) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            started = "projector" in optimizer.state.get(p, {})
            if p.grad is not None and not started and not bool(p.grad.any()):
                p.grad = None

    def show_projections(optimizer, args, kwargs) -> None:
        for state in optimizer.state.values():
            held = state.get("projector")
            if held is not None and held.ortho_matrix is not state.get("projection"):
                state["projection"] = held.ortho_matrix = in_rows(held.ortho_matrix)

    def make_plain(optimizer, state_dict) -> None:
        for key, state in state_dict["state"].items():
            plain = {k: v for k, v in state.items() if k != "projection"}
            if "projector" in plain:
                plain["projector"] = dict(vars(plain["projector"]))
            state_dict["state"][key] = plain  # a copy: `state` is the optimizer's own

    def make_objects(optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if "projector" in state:
                    held = projector.__new__(projector)
                    # torch's load_state_dict takes texts in a state apart
                    vars(held).update(state["projector"], proj_type=group["proj_type"])
                    state["projector"] = held
        show_projections(optimizer, (), {})

    optimizer.register_step_pre_hook(pass_over_zeros)
    optimizer.register_step_post_hook(show_projections)
    optimizer.register_state_dict_post_hook(make_plain)
    optimizer.register_load_state_dict_post_hook(make_objects)
    return optimizer


# The table: optimizer, defaults that differ from its own, its options

_ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
_MUON = ("momentum", "nesterov", "weight_decay", "adjust_lr", "ns_steps")
_DENSE: dict[str, tuple[type[Optimizer], dict, tuple[str, ...]]] = {
    "adamw": (AdamW, _ADAMW, tuple(_ADAMW)),
    "muon": (Muon, {}, _MUON),
    "in-backward-muon": (InBackwardMuon, {}, (*_MUON, "grad_clip")),
    "in-backward-adamw": (InBackwardAdamW, _ADAMW, (*_ADAMW, "grad_clip")),
}
_REFERENCES: dict[str, type[Optimizer]] = {"ldadam": LDAdam, "mofasgd": MoFaSGD, "dion": Dion}
_APOLLO = _Package(
    package="apollo_torch",
    module="apollo",
    projector="GradientProjector",
    options={"update_proj_gap": 200, "scale": 1.0, "scale_type": "channel"},
    fixed={"proj": "random", "proj_type": "std"},
)
_PACKAGES = {
    "galore": _Package(
        package="galore_torch",
        module="adamw",
        projector="GaLoreProjector",
        options={"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
        arguments={"no_deprecation_warning": True},
    ),
    "apollo": _APOLLO,
    "apollo-mini": replace(
        _APOLLO, options={"update_proj_gap": 200, "scale": 128.0, "scale_type": "tensor"}
    ),
    "fira": _Package(
        package="fira",
        module="fira_adamw",
        projector="GradientProjector",
        options={"update_proj_gap": 200, "alpha": 0.25},
        fixed={"proj_type": "std"},
        arguments={"no_deprecation_warning": True},
    ),
}
_CHOICES = {
    "proj_type": ("std", "left", "right"),
    "scale_type": ("channel", "tensor"),
}
