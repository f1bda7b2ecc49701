"""The base class of the optimizers of this package.

What: `FactoredOptimizer` validates groups, gathers the layers of groups of kind "factors" into
buckets (`molegrad.optim.bucket`), saves and restores the layers' bases and changes their ranks. A
subclass says what a step does with a group of kind "grad" and with a bucket, and which state a
layer has.

Why: a layer with gradient_mode "factors" has no weight gradient; it arrives as sketches in
`basis_u.grad` and `basis_v.grad` (`molegrad.linear`), and its optimizer also owns how the bases
follow the gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from molegrad.estimators.lowrank import STATS
from molegrad.ops.amp import exact_products
from molegrad.optim.bucket import Bucket
from molegrad.steps import STEPPED

FACTORS_KEYS = ("probes", "one_sided", "warm_start_decay", "trust_max", "cond_max", "seed")


class FactoredOptimizer(Optimizer):
    """Base class of the optimizers that take groups of kind "grad" and "factors".

    A "factors" group (`molegrad.optim.matrix_param_groups`) holds weight (m, n), basis_u (m, k + r)
    and basis_v (n, k + r) of each layer in turn, r its "probes"; each layer's k is what its bases
    have, so that the layers of one group may differ. The state of a layer lies with basis_u and
    basis_v: "basis" (the parameter's own storage, so that a state_dict carries the bases), "step"
    (int64), "stats" (float32, named by `molegrad.estimators.lowrank.STATS`), and what the subclass
    adds.

    Raises:
        ValueError: an option is out of range, a parameter is no matrix, a "factors" group is
            not made as above, or stochastic_rounding is asked for where weights are not bfloat16.
    """

    KINDS: tuple[str, ...] = ("grad", "factors")
    # Option: least and largest value.
    LIMITS: dict[str, tuple[float, float]] = {}

    def __init__(self, params, defaults: dict[str, Any]) -> None:
        super().__init__(params, {"kind": "grad", "stochastic_rounding": False, **defaults})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            _mark(group)

    def _grad_step(self, group: dict[str, Any]) -> None:
        """One step of a group of kind "grad"."""
        raise NotImplementedError

    def _momentum_step(self, group: dict[str, Any]) -> None:
        """One step of a group of layers whose backward passes add to their momentum."""
        raise NotImplementedError

    def _new_grad_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        """The state of a matrix of a "grad" group before its first step."""
        raise NotImplementedError

    def _new_momentum_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        """The same of a layer whose backward passes add to its momentum, beside the momentum."""
        raise NotImplementedError

    def _factors_step(self, bucket: Bucket) -> None:
        """One step of a bucket; calls `turn` at its end."""
        raise NotImplementedError

    def _new_factors_state(self, basis_u: Tensor, basis_v: Tensor, k: int) -> tuple[dict, dict]:
        """What the states of a layer's left and right basis hold before its first step, beside what
        every subclass has."""
        raise NotImplementedError

    def _resized(self, state_u: dict, state_v: dict, k: int) -> None:
        """Carry a layer's state over to rank k, in place."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._validate(self.param_groups[-1])
        self._validate_rounding(self.param_groups[-1])
        _mark(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "factors":
                for bucket in self._buckets(group):
                    torch._foreach_add_([state["step"] for state in bucket.states_u], 1)
                    # Bases have to be orthonormal and weak modes more than noise: no TF32.
                    with exact_products(bucket.u.device):
                        self._factors_step(bucket)
            elif group["kind"] == "momentum":
                self._momentum_step(group)
            else:
                self._grad_step(group)
        return loss

    def _with_grad(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, dict]]:
        """The parameters of a "grad" group that have a gradient, each with its state."""
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                if not state:
                    state.update(self._new_grad_state(group, p))
                yield p, state

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
        new_u, new_v = self._new_factors_state(basis_u, basis_v, basis_u.shape[1] - group["probes"])
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
            basis_u, basis_v: the layer's parameters, in a "factors" group of this optimizer.
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

    @torch.no_grad()
    def restart(self, basis_u: Tensor, basis_v: Tensor) -> None:
        """Forget a layer's momentum and moments, as before its first step; call it between two.

        For bases that have been replaced as a whole: what was kept in the old ones means nothing in
        the new. Gradients that are there are sketches of the old bases and go too.

        Raises:
            ValueError: the parameters are none of this optimizer's.
        """
        group = self._group_of(basis_u, basis_v)
        for basis in (basis_u, basis_v):
            basis.grad = None
            known = self.state.pop(basis, {})
            if "stats" in known:  # its readers hold on to the tensor
                known["stats"].fill_(math.nan)
        # Now and not at the next step: a checkpoint in between has the bases from the state.
        self._initialise(group, basis_u, basis_v)

    def _adopt(self, basis: Tensor, new: Tensor) -> None:
        """basis.data ← new, of any width; its gradient, of the old width, goes."""
        basis.grad = None
        basis.data = new
        if self.state.get(basis):
            self.state[basis]["basis"] = basis.detach()

    def _group_of(self, basis_u: Tensor, basis_v: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if group["kind"] == "factors":
                params = group["params"]
                for u, v in zip(params[1::3], params[2::3], strict=True):
                    if u is basis_u and v is basis_v:
                        return group
        raise ValueError(
            f"{type(self).__name__}: no group of kind 'factors' of this optimizer has these "
            "bases; give the basis_u and basis_v of one of its layers"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the bases are restored into the model's parameters, with the rank they had.
        stochastic_rounding stays what this optimizer was made with; the other options are loaded.

        Raises:
            ValueError: a saved basis does not fit its layer.
        """
        rounding = [group["stochastic_rounding"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, rounding, strict=True):
            group["stochastic_rounding"] = own
        self._keep_precision(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if "step" in state:  # torch leaves this key where it was loaded from
                    state["step"] = state["step"].to(p.device)
                if "basis" in state:
                    self._restore(p, state["basis"])

    def _keep_precision(self, state_dict: dict[str, Any]) -> None:
        """torch has rounded what it loaded to the parameter's dtype: take what was saved where a
        state has a dtype of its own."""
        places = iter([i for group in state_dict["param_groups"] for i in group["params"]])
        for group in self.param_groups:
            for p in group["params"]:
                saved, own = state_dict["state"].get(next(places), {}), self.state.get(p, {})
                for key, dtype in self._state_dtypes(group, p).items() if own else ():
                    if key in own and own[key].dtype != (dtype or saved[key].dtype):
                        own[key] = saved[key].to(p.device, dtype, copy=True)

    def _state_dtypes(self, group: dict[str, Any], p: Tensor) -> dict[str, torch.dtype | None]:
        """Dtypes of a weight's state by name; None is whatever was saved."""
        if group["kind"] == "factors":  # whose state lies with the bases, in their dtype
            return {}
        of_grad = group["kind"] == "grad"
        make = self._new_grad_state if of_grad else self._new_momentum_state
        return {key: x.dtype for key, x in make(group, p.detach().to("meta")).items()}

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

    def _validate_rounding(self, group: dict[str, Any]) -> None:
        if not group["stochastic_rounding"]:
            return
        name = type(self).__name__
        for weight in group["params"][:: _layer_width(group)]:
            if weight.dtype != torch.bfloat16:
                raise ValueError(
                    f"{name}: stochastic_rounding=True is for weights of torch.bfloat16, got a "
                    f"weight {tuple(weight.shape)} of {weight.dtype}: convert the model first "
                    "(model.to(torch.bfloat16)), or leave it off"
                )

    def _validate(self, group: dict[str, Any]) -> None:
        name, params = type(self).__name__, group["params"]
        for option, (low, high) in self.LIMITS.items():
            if not low <= float(group[option]) <= high:
                raise ValueError(
                    f"{name}: {option} must lie between {low:g} and {high:g}, got {group[option]}"
                )
        if group["kind"] not in self.KINDS:
            hint = ": gradient_mode='momentum' needs molegrad.optim.Muon"
            raise ValueError(
                f"{name}: kind must be one of {', '.join(self.KINDS)}, got {group['kind']!r}"
                + (hint if group["kind"] == "momentum" else "")
            )
        for p in params:
            if p.dim() != 2:
                raise ValueError(
                    f"{name} is for matrices, got a parameter of shape {tuple(p.shape)}: give "
                    "vectors, embeddings and the output head to torch.optim.AdamW "
                    "(molegrad.optim.other_params)"
                )
        if group["kind"] == "grad":
            return
        if group["kind"] == "momentum":
            each = 3 if group.get("quantized", False) else 2
            if [p.shape for p in params[::each]] != [p.shape for p in params[1::each]]:
                raise ValueError(
                    f"{name}: a momentum group holds weight and momentum, both (m, n), and where "
                    "it is quantized a scale of each layer in turn "
                    "(molegrad.optim.matrix_param_groups builds it); got "
                    f"{[tuple(p.shape) for p in params]}"
                )
            return
        shapes = [tuple(p.shape) for p in params]
        triples = list(zip(shapes[::3], shapes[1::3], shapes[2::3], strict=False))
        missing = [key for key in FACTORS_KEYS if key not in group]
        if (
            missing
            or len(shapes) % 3
            or any(u[0] != w[0] or v[0] != w[1] or u[1] != v[1] for w, u, v in triples)
            or any(u[1] <= group["probes"] for _, u, _ in triples)
        ):
            raise ValueError(
                f"{name}: a 'factors' group holds weight (m, n), basis_u (m, k + probes), basis_v "
                "(n, k + probes) of each layer in turn, and the options "
                f"{', '.join(FACTORS_KEYS)} (molegrad.optim.matrix_param_groups builds it); got "
                f"{shapes}" + (f", without {', '.join(missing)}" if missing else "")
            )


def _layer_width(group: dict[str, Any]) -> int:
    """How many parameters of each layer a group has in turn, its weight first."""
    return {"grad": 1, "factors": 3, "momentum": 3 if group.get("quantized") else 2}[group["kind"]]


def _mark(group: dict[str, Any]) -> None:
    """What the layers look for to know that somebody steps."""
    each = _layer_width(group)
    for i, p in enumerate(group["params"]):
        if i % each:
            setattr(p, STEPPED, True)
