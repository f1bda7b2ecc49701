"""The low-rank estimator: the leading modes of G = BᵀA by a warm-started block power method.

Two methods (formulas in `molegrad.estimators.sketches`): "power", rank k, with two dependent passes
over A and B, for a single micro-batch; "tangent", rank 2k, one pass and linear in G, so that
micro-batches, chunks of tokens and processes add up exactly.

In mode "grad" the estimate goes to weight.grad as a matrix, and the bases U and V are buffers that
move with every backward pass. In mode "factors" no matrix of the weight's size is built: the
parameters `basis_u` (m, k + probes) and `basis_v` (n, k + probes) get the sketches as their
gradients, and an optimizer of `molegrad.optim` makes an update of them and moves the bases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molegrad.estimators import bases, spectra
from molegrad.estimators.base import Estimate, Estimator, State
from molegrad.estimators.grouping import SketchGroup, grouped_linear
from molegrad.estimators.lowrank_options import LowRankOptions
from molegrad.estimators.lowrank_sums import STATS, LowRankSums, explored_directions
from molegrad.estimators.sketches import Sketch, trust_factor
from molegrad.ops.checks import acc_dtype
from molegrad.ops.power import hutch_norm_sq

_DRAW = 2_654_435_761  # between the seeds of two draws of a basis; far from those of other streams
_NORM, _CAPTURED = STATS.index("gradient_norm_sq"), STATS.index("captured_norm_sq")


@dataclass(frozen=True)
class LowRank(LowRankOptions, Estimator):
    """The leading modes of the weight gradient; its options are `LowRankOptions`'."""

    METHODS = {"power": {"method": "power"}, "tangent": {"method": "tangent"}}
    MODES = ("grad", "factors")
    STATS = STATS
    OP, ACCUMULATOR = "linear_lowrank", LowRankSums

    @property
    def adds_up(self) -> bool:
        return self.method == "tangent"

    @property
    def needs_all_tokens(self) -> str | None:
        if self.method == "tangent":
            return None
        return (
            "method='power' makes two passes over all tokens, the second with what the first has "
            "found: choose method='tangent' (or 'exact', 'sampled')"
        )

    @property
    def reads_float8(self) -> bool:
        return self.products == "fp8"

    @property
    def adaptive(self) -> bool:
        return self.energy_target > 0

    def refuses_mode(self, mode: str) -> str | None:
        if self.group_mib and mode != "factors":
            return (
                f"group_mib={self.group_mib} needs gradient_mode='factors', got {mode!r}: leave it "
                "at 0"
            )
        if mode == "factors" and self.trust_scaling and self.one_sided:
            return (
                "trust_scaling=True with gradient_mode='factors' needs method='tangent', got "
                "'power', whose norm estimate does not reach the optimizer: switch trust_scaling "
                "off or choose the other method or gradient_mode='grad'"
            )
        return None

    # A layer's state

    def sketches(self, mode: str) -> tuple[str, ...]:
        return ("basis_u", "basis_v") if mode == "factors" else ()

    def new_tensors(self, weight: Tensor, mode: str, name: str) -> dict[str, Tensor]:
        (m, n), device = weight.shape, weight.device
        width = self.rank_of(m, n, name) + (self.probes if mode == "factors" else 0)
        dtype = acc_dtype(weight.dtype)
        return {
            "basis_u": torch.empty(m, width, dtype=dtype, device=device),
            "basis_v": torch.empty(n, width, dtype=dtype, device=device),
            "counter": torch.zeros((), dtype=torch.int64, device=device),
            "stats": torch.full((len(STATS),), math.nan, device=device),
        }

    def dtypes(self, weight: Tensor) -> dict[str, torch.dtype]:
        wide = acc_dtype(weight.dtype)
        return {"basis_u": wide, "basis_v": wide, "stats": torch.float32}

    def reset(self, state: State, draw: int = 0) -> None:
        """Draw both bases from the seed. In mode "factors" an optimizer's state is expressed in the
        old ones: `molegrad.monitor.reset_layer` resets both."""
        k = self.rank(state)
        for stream, basis in enumerate(self._bases(state)):
            if basis.is_meta:
                continue
            rows, width = basis.shape
            seed = (self._seed_of(state, stream) + _DRAW * draw) % 2**62
            options = {"device": basis.device, "dtype": basis.dtype}
            basis[:, :k] = bases.initial_basis(rows, k, seed, **options)
            if width > k:
                zero = torch.zeros_like(state.tensors["counter"])
                basis[:, k:] = bases.rademacher(rows, width - k, zero, seed + 1, basis.dtype)

    def shared(self) -> SketchGroup | None:
        return SketchGroup(self.group_mib) if self.group_mib else None

    def rank(self, state: State) -> int:
        width = state.tensors["basis_v"].shape[1]
        return width - (self.probes if state.mode == "factors" else 0)

    def explored(self, state: State) -> int:
        return explored_directions(self.rank(state), self.warm_start_decay)

    def bases(self, state: State) -> list[Tensor]:
        k = self.rank(state)
        return [basis[:, :k] for basis in self._bases(state)]

    def resized(self, state: State, rank: int, step: int) -> dict[str, Tensor]:
        """Bases of another rank: the first directions of those there are, and behind them random
        ones that depend on seed and step; the probe columns stay."""
        k = self.rank(state)
        return {
            f"basis_{side}": torch.cat(
                [
                    bases.resized(basis[:, :k], rank, self._seed_of(state, stream), step),
                    basis[:, k:],
                ],
                dim=1,
            )
            for stream, (side, basis) in enumerate(zip("uv", self._bases(state), strict=True))
        }

    def _bases(self, state: State) -> tuple[Tensor, Tensor]:
        return state.tensors["basis_u"].detach(), state.tensors["basis_v"].detach()

    def _seed_of(self, state: State, stream: int) -> int:
        return state.seed + 101 * (stream + 1)

    def watch(self, state: State) -> None:
        """A second backward pass before the optimizer's step would add the bases of method "power"
        to one another. A hook sees that without a device synchronisation."""
        if state.mode == "factors" and self.one_sided and state.tensors["basis_v"].requires_grad:
            guard = _SinglePassGuard(state.title)
            state.tensors["basis_v"].register_post_accumulate_grad_hook(guard)

    # The passes

    def arguments(self, state: State) -> tuple:
        t = state.tensors
        return (
            t["basis_u"], t["basis_v"], t["counter"], t["stats"], self.method, self.rank(state),
            self.power_iters, self.probes, self.trust_max if self.trust_scaling else 0.0,
            self.explored(state), state.seed, self.cond_max, self.reads_float8,
            state.mode == "factors",
        )  # fmt: skip

    def forward(self, x, bias, saved, state: State) -> Tensor:
        if state.shared is None:
            return super().forward(x, bias, saved, state)
        u, v = state.tensors["basis_u"], state.tensors["basis_v"]
        return grouped_linear(state.shared, x, state.weight, bias, *saved, u, v)

    # What can be read of it

    def stats(self, state: State) -> Tensor:
        """The layer's own, completed by what the optimizer of its bases measures."""
        own = state.tensors["stats"]
        known = getattr(state.tensors["basis_v"], "molegrad_stats", own).to(own.device)
        joined = torch.where(known.isnan(), own, known)
        status = STATS.index("orth_status")
        joined[status] = torch.fmax(own[status], known[status])
        return joined

    def metrics(self, values: dict[str, float]) -> dict[str, float]:
        """The values of `STATS` but the squared norms, and energy_capture = ‖Ĝ‖ / ‖G‖ (Ĝ before
        trust scaling), the norms themselves, and gradient_norm_compression_ratio, energy_capture
        times trust factor."""
        captured, total = values["captured_norm_sq"], values["gradient_norm_sq"]
        measured = self.probes > 0 and total > 0
        capture = min(math.sqrt(captured / total), 1.0) if measured else math.nan
        own = ("trust_factor", "condition_number", "subspace_drift", "orth_status")
        return {
            **{name: values[name] for name in own},
            "energy_capture": capture,
            "gradient_norm_compression_ratio": capture * values["trust_factor"],
            "trust_scaling_factor": values["trust_factor"],
            "gradient_norm": math.sqrt(total) if measured else math.nan,
            "estimate_norm": math.sqrt(captured) if captured >= 0 else math.nan,
        }

    def remedy(self, kind: str, state: State) -> str:
        no_rank = "or take --streaming_method=sampled, which has no rank"
        frozen = (
            "the exploration does not reach it: see whether its gradients are finite "
            "(--grad-clip=1, --streaming_gradient_mode=grad) and whether an optimizer steps it"
            if self.explored(state)
            else f"lower --streaming_warm_start_decay (here {self.warm_start_decay:g}: nothing is "
            "explored), e.g. 0.95"
        )
        return {
            "degenerate": "lower --streaming_rank_k, give batches with more different tokens, "
            + no_rank,
            "low energy": "raise --streaming_rank_k, lower --streaming_warm_start_decay so that "
            f"more directions are explored, {no_rank}",
            "frozen": frozen,
            "orthogonality": f"lower --streaming_cond_max (here {self.cond_max:g}) so that the "
            "Householder fallback takes over earlier, or lower --streaming_rank_k",
        }.get(kind, "")

    def accumulated(self, state: State) -> tuple[Tensor, ...] | None:
        if state.mode != "factors":
            return super().accumulated(state)
        sketches = tuple(state.tensors[name].grad for name in self.sketches(state.mode))
        return None if any(x is None for x in sketches) else sketches

    def sketch(self, state: State, now: tuple[Tensor, ...], before=None) -> Sketch:
        """Mode "factors": the sketches without probe columns, in float32 or float64. U₁ of a
        one-sided estimate is orthonormalised, as clipping scales it."""
        dtype, k = acc_dtype(state.weight.dtype), self.rank(state)
        y, w = (x.to(dtype)[:, :k] for x in now)
        if before is not None:
            y, w = (x - old.to(dtype)[:, :k] for x, old in zip((y, w), before, strict=True))
        if self.one_sided:
            y = torch.ops.molegrad.orthonormalize(y, self.cond_max)[0]
        u, v = (basis.to(dtype) for basis in self.bases(state))
        return Sketch(u, v, y, w, self.one_sided)

    def norm_sq(self, state: State) -> Tensor | None:
        now = self.accumulated(state)
        if now is None or state.mode != "factors":
            return super().norm_sq(state)
        k = self.rank(state)
        return Sketch(*self.bases(state), *(x[:, :k] for x in now), self.one_sided).norm_sq()

    def matrix(self, state: State, now, before=None, trust_max: float = 0.0) -> Estimate:
        rank = self.estimate_rank(self.rank(state))
        stats = state.tensors["stats"].double()
        norm_sq, captured_sq = stats[_NORM], stats[_CAPTURED]
        if state.mode == "factors":
            matrix = self.sketch(state, now, before).matrix()
            captured_sq = matrix.double().square().sum()
            if self.probes and not self.one_sided:
                norm_sq = self._norm_sq(state, now, before).double()
                factor = trust_factor(norm_sq, captured_sq, trust_max)
                matrix = matrix * factor.to(matrix.dtype)
        else:
            matrix = super().matrix(state, now, before).matrix
        if self.probes == 0:
            norm_sq = torch.full_like(captured_sq, math.nan)
            captured_sq = captured_sq if state.mode == "factors" else norm_sq
        return Estimate(matrix, rank, norm_sq, captured_sq)

    def _norm_sq(self, state: State, now, before=None) -> Tensor:
        """Mode "factors" with probes: the Hutch++ estimate of ‖G‖²."""
        k, (_, v) = self.rank(state), self._bases(state)
        y = now[0] if before is None else now[0] - before[0]
        return hutch_norm_sq(y[:, :k], y[:, k:], v[:, :k], v[:, k:])

    def spectrum(self, states: list[State]):
        if any(self.accumulated(state) is None for state in states):
            return None
        first = states[0]
        if first.mode == "grad":
            rank, dtype = self.estimate_rank(self.rank(first)), acc_dtype(first.weight.dtype)
            grams = spectra.range_grams([state.weight.grad for state in states], rank, dtype)
            return grams, spectra.ranks_of_grams
        k = self.rank(first)
        y, w = (
            torch.stack([state.tensors[name].grad[:, :k] for state in states])
            for name in self.sketches(first.mode)
        )
        if self.one_sided:  # Ĝ = U₁ Wᵀ has the singular values of W
            return spectra.gram(w), spectra.ranks_of_grams
        u, v = (torch.stack(side) for side in zip(*map(self.bases, states), strict=True))
        return spectra.tangent_blocks(u, v, y, w), spectra.ranks_of_tangents

    def reading(self, state: State) -> Tensor:
        """‖G‖², ‖Ĝ‖² and C(1) … C(k) of this step for adaptive ranks, (2 + k,) float32; one zero
        without a gradient. In mode "grad" the sketches of the estimate stand for those of G."""
        stats, now = state.tensors["stats"], self.accumulated(state)
        if now is None:
            return stats.new_zeros(1)
        norm_sq, captured_sq = stats[_NORM], stats[_CAPTURED]
        if state.mode == "grad":
            u, v = self._bases(state)
            matrix = now[0].to(v.dtype)
            y, w = matrix @ v, matrix.mT @ u
            # Ĝ of method "power" lives on V, the orthonormalised W; U is not kept.
            seen = Sketch(u, v, y, y if self.one_sided else w, self.one_sided)
            energies = seen.energies()
        else:
            k = self.rank(state)
            u, v = self.bases(state)
            energies = Sketch(u, v, now[0][:, :k], now[1][:, :k], self.one_sided).energies()
            captured_sq = energies[-1]
            if not self.one_sided:
                norm_sq = self._norm_sq(state, now)
        return torch.cat([norm_sq.reshape(1), captured_sq.reshape(1), energies]).to(stats.dtype)

    def optimizer_options(self, seed: int) -> dict[str, Any]:
        return {
            "probes": self.probes,
            "one_sided": self.one_sided,
            "warm_start_decay": self.warm_start_decay,
            "trust_max": self.trust_max if self.trust_scaling else 0.0,
            "cond_max": self.cond_max,
            "seed": seed,
        }


class _SinglePassGuard:
    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.seen: Tensor | None = None

    def __call__(self, basis: Tensor) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            reason = "and here several processes would average it"
        elif self.seen is not None and basis.grad is self.seen:
            reason = "and here a second backward pass came before zero_grad(set_to_none=True)"
        else:
            self.seen = basis.grad
            return
        raise RuntimeError(
            f"{self.layer}: method='power' with gradient_mode='factors' is not linear in the "
            f"gradient, {reason}. Use method='tangent', which is exact under accumulation and "
            "data parallelism, or gradient_mode='grad'"
        )
