"""The gradient estimate Ĝ of a converted layer as a matrix, and how close to G it comes.

What: `estimate_of` gives the Ĝ (m, n) that the optimizer's next step goes by, in every mode, with
the free estimates that come with it; `compare` says how it relates to the true gradient.

Why apart from training: in momentum and factored mode no such matrix exists there. It is built
here, in float32 or better, where somebody wants to look at it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from molegrad.estimators.lowrank_sums import STATS
from molegrad.estimators.sketches import trust_factor
from molegrad.linear import MoleLinear
from molegrad.ops.checks import acc_dtype
from molegrad.ops.power import hutch_norm_sq

_NORM, _CAPTURED = (STATS.index(name) for name in ("gradient_norm_sq", "captured_norm_sq"))


class Estimate(NamedTuple):
    """Of ‖G‖² and ‖Ĝ‖² what training knows: nan without probes; in dense mode of the last call."""

    matrix: Tensor  # Ĝ (m, n), trust factor included
    rank: int  # that Ĝ of a single backward pass may have; 0 where the method has none
    norm_sq: Tensor  # the free estimate of ‖G‖²
    captured_sq: Tensor  # ‖Ĝ‖² without trust factor


def accumulated(layer: MoleLinear) -> tuple[Tensor, ...] | None:
    """What backward passes add to: weight.grad; momentum, and its scale where it is int8; or the
    gradients of both bases. None where there is nothing yet."""
    mode = layer.config.gradient_mode
    if mode == "momentum":
        scale = () if layer.momentum_scale is None else (layer.momentum_scale.detach(),)
        return (layer.momentum.detach(), *scale)
    owners = (layer.weight,) if mode == "dense" else (layer.basis_u, layer.basis_v)
    gradients = tuple(p.grad for p in owners)
    return None if any(g is None for g in gradients) else gradients


def sketches_add_up(layer: MoleLinear) -> bool:
    """Whether the estimates of several backward passes add up in what `accumulated` gives; not so
    for method "power" in factored mode."""
    return not (layer.config.gradient_mode == "factors" and layer.config.method == "power")


def estimate_of(
    layer: MoleLinear, before: tuple[Tensor, ...] | None = None, trust_max: float = 0.0
) -> Estimate | None:
    """Ĝ from what has been accumulated since it was `before`; None where nothing has.

    Args:
        before: a copy of `accumulated` before the step's first backward pass; None: zeros.
        trust_max: limit of the trust factor in factored mode, where the optimizer applies it; 0
            for no factor. In dense mode the layer has applied it already.
    """
    now = accumulated(layer)
    if now is None:
        return None
    dtype = acc_dtype(layer.weight.dtype)
    rank = layer.config.needed_features(layer.rank)
    if layer.config.estimator.unbiased:
        rank = 0
    if layer.config.gradient_mode == "factors":
        now = tuple(x.to(dtype) for x in now)
        if before is not None:
            now = tuple(x - old.to(dtype) for x, old in zip(now, before, strict=True))
        return _from_sketches(layer, *now, rank, trust_max)
    matrix = _product(now, dtype)
    if before is not None:
        matrix = matrix - _product(before, dtype)
    stats = layer.stats.double()
    if layer.config.probes == 0:
        stats = torch.full_like(stats, math.nan)
    return Estimate(matrix, rank, stats[_NORM], stats[_CAPTURED])


def _product(value: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    matrix, *scale = value
    return matrix.to(dtype) * scale[0].to(dtype) if scale else matrix.to(dtype)


def _from_sketches(
    layer: MoleLinear, y: Tensor, w: Tensor, rank: int, trust_max: float
) -> Estimate:
    """As `molegrad.optim.bucket.estimate` reads the sketches, probe columns included."""
    c, k = layer.config, layer.rank
    u, v = (basis.detach().to(y.dtype) for basis in (layer.basis_u, layer.basis_v))
    (y, g_omega), w = (y[:, :k], y[:, k:]), w[:, :k]
    u, (v, omega) = u[:, :k], (v[:, :k], v[:, k:])
    if c.method == "power":  # its y is its left basis
        matrix = torch.ops.molegrad.orthonormalize(y, c.cond_max)[0] @ w.mT
        norm_sq = layer.stats[_NORM].double()
    else:
        matrix = u @ w.mT + (y - u @ (u.mT @ y)) @ v.mT
        norm_sq = hutch_norm_sq(y, g_omega, v, omega).double() if c.probes else None
    captured_sq = matrix.double().square().sum()
    if c.probes == 0:
        norm_sq = torch.full_like(captured_sq, math.nan)
    elif trust_max > 0 and c.method == "tangent":
        matrix = matrix * trust_factor(norm_sq, captured_sq, trust_max).to(matrix.dtype)
    return Estimate(matrix, rank, norm_sq, captured_sq)


def compare(
    gradient: Tensor, estimate: Tensor, rank: int, spectrum: int = 0
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """How Ĝ (m, n) relates to G (m, n): metrics (0-dim, float64), and the leading `spectrum`
    singular values of both. nan where it is not known: for G = 0, and where one is not finite.

    - cosine: ⟨G, Ĝ⟩ / (‖G‖ ‖Ĝ‖), 0 for Ĝ = 0; energy_capture: the same, at least 0
    - norm_ratio: ‖Ĝ‖ / ‖G‖; relative_error: ‖Ĝ − G‖ / ‖G‖
    - best_energy: √(s₁² + … + s_r²) / ‖G‖, r = `rank` and s the singular values of G; no Ĝ of rank
      r has a larger cosine (Eckart, Young 1936); nan for r = 0
    - effective_rank: exp(−Σ pᵢ log pᵢ), pᵢ = sᵢ / Σ s (Roy, Vetterli 2007), of G
    """
    g, e = gradient.double(), estimate.double()
    g_norm, e_norm = torch.linalg.vector_norm(g), torch.linalg.vector_norm(e)
    inner = ((g * e).sum() / (g_norm * e_norm)).clamp(-1.0, 1.0)
    cosine = torch.where((e_norm == 0) & (g_norm > 0), 0.0, inner)
    s = singular_values(g)
    energies = (s / torch.linalg.vector_norm(s)).square().cumsum(0).sqrt()
    metrics = {
        "energy_capture": cosine.clamp(min=0.0),
        "cosine": cosine,
        "norm_ratio": e_norm / g_norm,
        "best_energy": energies[min(rank, len(s)) - 1] if rank else inner.new_full((), math.nan),
        "relative_error": torch.linalg.vector_norm(e - g) / g_norm,
        "effective_rank": torch.special.entr(s / s.sum()).sum().exp(),
    }
    metrics["norm_ratio"] = torch.where(g_norm > 0, metrics["norm_ratio"], math.nan)
    metrics["relative_error"] = torch.where(g_norm > 0, metrics["relative_error"], math.nan)
    return metrics, s[:spectrum], singular_values(e)[:spectrum] if spectrum else s[:0]


def singular_values(x: Tensor) -> Tensor:
    """(min(m, n),) float64 of x (m, n), the largest first; nan where x is not finite.

    From the eigenvalues of the smaller Gram matrix, which is many times faster than svdvals. What
    is below 1e-8 of the largest is lost: in a gradient that was summed in float32 it is noise.
    """
    x = x.double()
    finite = x.isfinite().all()
    x = torch.where(finite, x, 0.0)
    scale = x.abs().amax()
    scale = torch.where(scale > 0, scale, 1.0)
    x = x / scale
    gram = x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().flip(0) * scale
    return torch.where(finite, values, math.nan)
