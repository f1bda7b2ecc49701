"""Muon on gradients as matrices, as factors and in the momentum, as one torch.optim.Optimizer.

Groups of kind "grad": momentum, Newton–Schulz, weight −= lr · scale · polar(momentum) (Jordan et
al. 2024).

Groups of kind "factors" see no matrix of the weight's size but the weight. A layer's momentum is
U S Vᵀ with a core S (k, k), and its bases U and V *are* the layer's sketch bases, so that one state
serves both. In the orthonormal bases L = [U, Y⊥] and R = [V, W⊥] both gradient and momentum are
small cores of at most 2k × 2k, where their average, its exact polar factor and its truncation to
rank k all take place (the update of MoFaSGD, Mahdavi et al. 2025, with a block iteration in place
of its SVD, which would make the host wait for the device).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from molegrad.linear import int8_scale
from molegrad.optim.bucket import Bucket, all_finite, estimate, truncate, turn, two_sided
from molegrad.optim.factored import FactoredOptimizer
from molegrad.optim.rounding import add_rounded_, places_of, update_weights

# Numbers of the matrices whose polar factors are taken together: enough to keep a GPU busy, little
# beside a model. All at once, they were the peak of a run whose activations are small.
TOGETHER = 2**24
ADJUST_LR = ("spectral", "original", "match_rms_adamw", "none")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic


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


class Muon(FactoredOptimizer):
    """Momentum, orthogonalised.

    Args:
        params: matrices, or groups from `molegrad.optim.matrix_param_groups` (kind "grad",
            "factors" or "momentum"); every option below can be set per group.
        lr: learning rate, before `adjust_lr`.
        momentum: μ of the average M ← μ M + (1 − μ) Ĝ.
        nesterov: orthogonalise μ M + (1 − μ) Ĝ instead of M. Groups of kind "momentum" have no Ĝ
            apart from M; they keep the M of the step before, in int8, to find it.
        weight_decay: decoupled, weight ← (1 − lr · weight_decay) weight.
        adjust_lr: "spectral", "original", "match_rms_adamw" or "none", see `lr_scale`.
        ns_steps: Newton–Schulz steps of the "grad" and "momentum" groups.
        truncation_iters: block iterations that truncate the factored momentum to rank k.
        stochastic_rounding: round bfloat16 weights at random (`molegrad.optim.rounding`).

    State: "grad" groups a momentum (m, n); those of kind "momentum" the layer's own, its parameter,
    and with nesterov an int8 matrix (m, n); "factors" groups a core S (k, k) with the layer's
    bases. A direction that `resize_rank` adds starts without momentum. With stochastic_rounding
    every weight has a "step" beside.

    Raises:
        ValueError: see `FactoredOptimizer`; or adjust_lr is unknown.
    """

    KINDS = ("grad", "factors", "momentum")
    LIMITS = {"lr": (0.0, math.inf), "momentum": (0.0, 1.0), "weight_decay": (0.0, math.inf)}

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
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr": adjust_lr,
            "ns_steps": ns_steps,
            "truncation_iters": truncation_iters,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        if group["adjust_lr"] not in ADJUST_LR:
            raise ValueError(
                f"Muon: adjust_lr must be one of {', '.join(ADJUST_LR)}; got {group['adjust_lr']!r}"
            )

    def _grad_step(self, group: dict[str, Any]) -> None:
        mu = group["momentum"]
        updates = []
        for p, state in self._with_grad(group):
            buffer = state["momentum_buffer"].lerp_(p.grad, 1 - mu)
            share = mu if group["nesterov"] else 1.0
            updates.append((p, partial(p.grad.lerp, buffer, share)))
        self._along_polar_factors(group, updates)

    def _along_polar_factors(
        self, group: dict[str, Any], updates: list[tuple[Tensor, Callable[[], Tensor]]]
    ) -> None:
        """Step each matrix along the polar factor of the update that its function makes. Matrices
        of one shape go together, as many as `TOGETHER` allows, and only theirs exist."""
        decay, rounded = group["lr"] * group["weight_decay"], group["stochastic_rounding"]
        if rounded:
            self._count([p for p, _ in updates])
        places = places_of(group) if rounded else {}
        by_shape: dict[tuple, list[tuple[Tensor, Callable[[], Tensor]]]] = defaultdict(list)
        for p, update in updates:
            by_shape[(p.shape, p.dtype, p.device)].append((p, update))
        for (shape, _, device), same in by_shape.items():
            lr = group["lr"] * lr_scale(group["adjust_lr"], *shape)
            dtype, size = working_dtype(device), max(1, TOGETHER // shape.numel())
            for batch in (same[i : i + size] for i in range(0, len(same), size)):
                stacked = torch.stack([update().to(dtype) for _, update in batch])
                directions = newton_schulz(stacked, group["ns_steps"], dtype)
                for (p, _), direction in zip(batch, directions.unbind(), strict=True):
                    if rounded:
                        step = self.state[p]["step"]
                        add_rounded_(p, direction, -lr, decay, step, places[id(p)])
                        continue
                    if decay:
                        p.mul_(1 - decay)
                    p.add_(direction.to(p.dtype), alpha=-lr)
                del stacked, directions

    def _count(self, weights: list[Tensor]) -> None:
        """One step more of each weight, on its device: stochastic rounding draws by it."""
        for p in weights:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.int64, device=p.device)
        if weights:
            torch._foreach_add_([self.state[p]["step"] for p in weights], 1)

    def _momentum_step(self, group: dict[str, Any]) -> None:
        """The backward passes have made M ← M + Ĝ; step along a polar factor, then M ← μ M.

        (1 − μ) is left out, as a factor changes no polar factor. Nesterov's μ M + Ĝ is (1 + μ) M
        minus what M was before the backward passes.
        """
        mu, layers, updates = group["momentum"], _momentum_layers(group), []
        for p, *momentum in layers:
            state = self.state[p]
            if not state:
                state.update(_named(momentum), **self._new_momentum_state(group, p))
            _average_over_processes(*momentum)
            before = state if group["nesterov"] else None
            updates.append((p, partial(_momentum_update, mu, before, *momentum)))
        self._along_polar_factors(group, updates)
        torch._foreach_mul_([layer[-1] for layer in layers], mu)
        if group["nesterov"]:
            for p, *momentum in layers:
                _snapshot(self.state[p], *momentum)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `FactoredOptimizer`'s; the momentum of gradient_mode "momentum" is restored into the
        model's parameters."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            if group["kind"] != "momentum":
                continue
            for p, *momentum in _momentum_layers(group):
                saved = self.state.get(p, {})
                for key, tensor in _named(momentum).items():
                    if key in saved:
                        tensor.copy_(saved[key])
                        saved[key] = tensor

    def _state_dtypes(self, group: dict[str, Any], p: Tensor) -> dict[str, torch.dtype | None]:
        dtypes = super()._state_dtypes(group, p)
        return dtypes | dict.fromkeys(_MOMENTUM_STATE) if group["kind"] == "momentum" else dtypes

    def _new_grad_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(p)}

    def _new_momentum_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        return _new_snapshot(p) if group["nesterov"] else {}

    def _factors_step(self, bucket: Bucket) -> None:
        group, mu = bucket.group, bucket.group["momentum"]
        est = estimate(bucket)
        right, v_c, gradient = two_sided(bucket, est)
        momentum = est.u_c @ bucket.stacked("core") @ v_c.mT
        average = mu * momentum + (1 - mu) * gradient  # cores (size, j, i)
        direction = mu * average + (1 - mu) * gradient if group["nesterov"] else average
        lr = group["lr"] * lr_scale(group["adjust_lr"], *bucket.shape)
        decay = group["lr"] * group["weight_decay"]
        update_weights(bucket, est.left @ polar(direction), right, -lr, decay)
        p, core, q, condition = truncate(average, v_c, group["truncation_iters"], group["cond_max"])
        finite, kept = all_finite(average), bucket.kept_columns(core)
        # No momentum along the modes that `turn` replaces by random ones.
        bucket.keep("core", core * kept * kept[:, None], finite)
        turn(bucket, est, est.left @ p, right @ q, condition, finite)

    def _new_factors_state(self, basis_u: Tensor, basis_v: Tensor, k: int) -> tuple[dict, dict]:
        return {"core": basis_u.new_zeros(k, k)}, {}

    def _resized(self, state_u: dict, state_v: dict, k: int) -> None:
        old = state_u["core"]
        kept = min(k, old.shape[0])
        state_u["core"] = old.new_zeros(k, k)
        state_u["core"][:kept, :kept] = old[:kept, :kept]


# Where the state_dict has a layer's momentum, and its scale if it is quantized.
_MOMENTUM_STATE = ("momentum_buffer", "momentum_scale")


def _momentum_layers(group: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """(weight, momentum) or (weight, momentum, scale) of every layer; momentum · scale is M."""
    params, each = group["params"], 3 if group["quantized"] else 2
    return [tuple(params[i : i + each]) for i in range(0, len(params), each)]


def _named(momentum: list[Tensor]) -> dict[str, Tensor]:
    """As in the state_dict; the tensors share the parameters' memory."""
    return {key: p.detach() for key, p in zip(_MOMENTUM_STATE, momentum, strict=False)}


def _momentum_update(
    mu: float, before: dict[str, Tensor] | None, momentum: Tensor, scale: Tensor | None = None
) -> Tensor:
    """M, or with what it was before the backward passes, (1 + μ) M minus that."""
    update = momentum.detach() if scale is None else momentum * scale
    if before is None:
        return update
    return (1 + mu) * update.float() - before["before"] * before["before_scale"]


def _new_snapshot(p: Tensor) -> dict[str, Tensor]:
    """M before the next backward passes, in int8; the parameter is the weight (m, n)."""
    return {
        "before": torch.zeros_like(p, dtype=torch.int8),
        "before_scale": int8_scale(*p.shape, device=p.device),
    }


def _snapshot(state: dict[str, Tensor], momentum: Tensor, scale: Tensor | None = None) -> None:
    if scale is None:
        torch.ops.molegrad.add_quantized_(state["before"].zero_(), state["before_scale"], momentum)
    else:
        state["before"].copy_(momentum)
        state["before_scale"].copy_(scale)


def _average_over_processes(momentum: Tensor, scale: Tensor | None = None) -> None:
    """The mean over data-parallel processes, which all hold the same momentum but for this step's
    gradients."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world = torch.distributed.get_world_size()
    if world > 1 and scale is None:
        torch.distributed.all_reduce(momentum.div_(world))
    elif world > 1:
        value = momentum * (scale / world)
        torch.distributed.all_reduce(value)
        torch.ops.molegrad.add_quantized_(momentum.zero_(), scale, value)


def working_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate polar factor of g (…, m, n), in `dtype` (default `working_dtype`), which is also
    the result's. Zero matrices stay zero.

    Five steps of the quintic bring every singular value into about [0.7, 1.2], which is close
    enough to the polar factor for an update (Jordan et al. 2024, "Muon: an optimizer for hidden
    layers in neural networks").
    """
    if dtype is None:
        dtype = working_dtype(g.device)
    a, b, c = NEWTON_SCHULZ
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


def polar(core: Tensor) -> Tensor:
    """Polar factor of small cores (…, j, i), exact."""
    if core.shape[-2] >= core.shape[-1]:
        return torch.ops.molegrad.polar_factor(core)
    return torch.ops.molegrad.polar_factor(core.mT).mT
