"""Adaptive ranks: each layer's k follows the share of the gradient that its estimate captures.

What: `RankController` watches energy_capture = ‖Ĝ‖ / ‖G‖ of the layers (‖G‖ by the Hutch++
estimate, hence `probes` >= 1) and raises or lowers ranks so that it stays near `energy_target`,
within `rank_min`, `rank_max` and one budget for all layers together.

How another rank is predicted. The sketches that a step has made anyway tell exactly what a smaller
rank would have captured, C(1) … C(k) of `molegrad.estimators.sketches.Sketch.energies`; the columns
are ordered by strength, as orthogonal iteration leaves them. A larger rank is extrapolated by the
slope of the second half of C. As C is concave this promises too much, so that a rank rises towards
what the target needs from below. No decision more than doubles or halves a rank: a wider basis
follows a gradient that turns better than its own first columns tell, a narrower one worse.

Why not the singular values of the momentum, which are there too: noise is averaged out of them, so
that they promise for a small rank a share of the momentum, not of the gradient.

The last readings before a decision are added up on the device; only the decision, every
`rank_interval` steps, makes the host wait, for one transfer. Under torch.distributed the sums are
averaged over the processes first, so that all decide the same.

    controller = RankController(model, optimizers, config)
    loss.backward(); controller.observe()       # before gradients are clipped
    optimizer.step(); optimizer.zero_grad()
    for change in controller.step(): print(change)

A change of rank changes the shapes of the bases: torch.compile compiles again, and
DistributedDataParallel must be made again (`decide` and `apply` are the two halves of `step`;
`molegrad.gpt.train.loop` does both).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molegrad.config import MoleGradConfig
from molegrad.estimators.lowrank_sums import explored_directions
from molegrad.linear import MoleLinear

WINDOW = 8  # readings before a decision: one gradient is mostly noise
HELD = 1.5  # what a captured direction counts over a promised one, see `_fit`


def layer_ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every MoleLinear in `model`, by its name there."""
    return {n: m.rank for n, m in model.named_modules() if isinstance(m, MoleLinear)}


@dataclass(frozen=True)
class RankChange:
    """A layer's rank from `old` to `new`; the energy_capture that was read (nan: none was)."""

    name: str
    old: int
    new: int
    energy: float

    def __str__(self) -> str:
        return f"rank of {self.name}: {self.old} -> {self.new} (energy {self.energy:.3f})"


@dataclass(frozen=True)
class EnergyCurve:
    """Share of ‖G‖² that a layer would capture at any rank, predicted from rank k.

    Args:
        rank: k, the rank of the readings.
        captured: ‖Ĝ‖² / ‖G‖² at rank k.
        energies: C(1), …, C(k) up to a factor.
        decay: `warm_start_decay`: the directions that explore at rank j capture next to nothing.
    """

    rank: int
    captured: float
    energies: tuple[float, ...]
    decay: float

    def __call__(self, rank: int) -> float:
        """Predicted ‖Ĝ‖² / ‖G‖² at `rank` >= 1, at most 1."""
        if rank <= self.rank:
            return self.captured * self._settled(rank) / self._settled(self.rank)
        return min(1.0, self.captured + self.slope * (rank - self.rank))

    @property
    def slope(self) -> float:
        """Gain per direction at rank k: the mean over the last half, as the very last ones have
        had little time to turn towards the gradient."""
        span = max(1, self.rank // 2)
        inner = self(self.rank - span) if span < self.rank else 0.0
        return max(0.0, self.captured - inner) / span

    def _settled(self, rank: int) -> float:
        kept = rank - explored_directions(rank, self.decay)
        return self.energies[(kept or rank) - 1]


@dataclass
class _Watched:
    """A layer, with what never changes about it."""

    layer: MoleLinear
    optimizer: Any  # holds its bases; None with gradient_mode "grad"
    start: int  # the rank that the configuration gives it
    lower: int
    upper: int
    unit: int
    cost: int  # numbers per direction: m + n

    def below(self, rank: int) -> int:
        """The next smaller rank that may be chosen."""
        return max(self.lower, (rank - 1) // self.unit * self.unit)

    def choices(self, low: int, high: int) -> range:
        """Ranks within [low, high] that may be chosen (multiples of the unit), rising."""
        return range(-(-low // self.unit) * self.unit, high + 1, self.unit)


class RankController:
    """Chooses the ranks of all converted layers of `model`.

    Args:
        model: with layers made by `molegrad.convert`; those that are not trained are left alone.
        optimizers: those with the bases of layers with gradient_mode "factors"; they need
            `resize_rank`.
        config: of an adaptive estimator: energy_target > 0, and the rank_… options.

    Raises:
        ValueError: the estimator is not adaptive; no layer is converted; the smallest ranks exceed
            the budget; the optimizer of a layer's bases cannot resize its state.
    """

    def __init__(
        self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], config: MoleGradConfig
    ) -> None:
        self.options = config.estimator
        if not self.options.adaptive:
            raise ValueError(
                "energy_target is 0, which keeps the ranks fixed: give the wanted share "
                "||estimate|| / ||gradient||, such as 0.8"
            )
        optimizers = list(optimizers)
        self._watched = {
            name: _watch(name, layer, optimizers, self.options)
            for name, layer in model.named_modules()
            if isinstance(layer, MoleLinear) and layer.trains and layer.config.estimator.adaptive
        }
        if not self._watched:
            raise ValueError("energy_target is set, but the model has no trained MoleLinear")
        self._budget = self._limit()
        self._steps = 0
        self._sums = self._no_readings()

    @property
    def ranks(self) -> dict[str, int]:
        """Each layer's rank now."""
        return {name: w.layer.rank for name, w in self._watched.items()}

    def metrics(self) -> dict[str, float]:
        """rank_mean, rank_min and rank_max over the layers."""
        ranks = self.ranks.values()
        return {
            "rank_mean": sum(ranks) / len(ranks),
            "rank_min": min(ranks),
            "rank_max": max(ranks),
        }

    @torch.no_grad()
    def observe(self) -> None:
        """Add this step's readings; after the backward pass, before gradients are clipped.

        Does nothing but in the last `WINDOW` steps before a decision; the host never waits.
        """
        interval = self.options.rank_interval
        if self._steps % interval < interval - WINDOW:
            return
        rows = self._sums.new_zeros(self._sums.shape)
        for row, w in zip(rows, self._watched.values(), strict=True):
            reading = w.layer.config.estimator.reading(w.layer.state)
            row[0] = 1.0
            row[1 : 1 + len(reading)] = reading
        usable = rows.isfinite().all(1) & (rows[:, 1] > 0)
        self._sums += torch.where(usable[:, None], rows, 0.0)

    def step(self) -> list[RankChange]:
        """Count a step; where a decision is due, make and apply it. Between two steps only."""
        changes = self.decide()
        self.apply(changes)
        return changes

    @torch.no_grad()
    def decide(self) -> list[RankChange]:
        """Count a step; the changes that are due, not yet made. All processes find the same."""
        self._steps += 1
        if self._steps % self.options.rank_interval:
            return []
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self._sums)
        table = self._sums.tolist()  # the one transfer
        self._sums = self._no_readings()
        curves = {
            name: self._curve(w.layer, row)
            for (name, w), row in zip(self._watched.items(), table, strict=True)
        }
        wanted = {name: self._wanted(w, curves[name]) for name, w in self._watched.items()}
        self._fit(wanted, curves)
        return [
            RankChange(name, old, wanted[name], math.sqrt(curves[name].captured))
            if curves[name]
            else RankChange(name, old, wanted[name], math.nan)
            for name, old in self.ranks.items()
            if wanted[name] != old
        ]

    def apply(self, changes: Iterable[RankChange]) -> None:
        """Resize layers and their optimizer's state; gradients of the old shapes are dropped."""
        for change in changes:
            self._resize(self._watched[change.name], change.new)
        self._sums = self._no_readings()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: ranks, steps and the readings since the last decision."""
        return {"ranks": self.ranks, "steps": self._steps, "sums": self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the layers their saved ranks; load the optimizers' states after this.

        Raises:
            ValueError: the state is of other layers.
        """
        if state["ranks"].keys() != self._watched.keys():
            differ = sorted(state["ranks"].keys() ^ self._watched.keys())
            raise ValueError(
                f"the saved ranks are of other layers; these are in one of both only: {differ}: "
                "convert the model as it was when they were saved"
            )
        for name, rank in state["ranks"].items():
            if rank != self._watched[name].layer.rank:
                self._resize(self._watched[name], rank)
        self._steps = state["steps"]
        self._sums = state["sums"].to(self._no_readings())

    def _limit(self) -> float:
        """The budget in numbers."""
        c, watched = self.options, self._watched.values()
        at_start = sum(w.start * w.cost for w in watched)
        least = sum(w.lower * w.cost for w in watched)
        budget = c.rank_budget * at_start if c.rank_budget else math.inf
        if least > budget:
            raise ValueError(
                f"rank_budget={c.rank_budget:g} allows {budget:,.0f} numbers in the factors, but "
                f"rank_min={c.rank_min} takes {least:,} in these {len(watched)} layers: lower "
                f"rank_min or raise rank_budget to {least / at_start:.2f} or more"
            )
        return budget

    def _no_readings(self) -> Tensor:
        """(layers, 3 + largest k): count, norm, captured energy, C(1) … C(k)."""
        width = 3 + max(self.ranks.values())
        device = next(iter(self._watched.values())).layer.weight.device
        return torch.zeros(len(self._watched), width, device=device)

    def _curve(self, layer: MoleLinear, row: list[float]) -> EnergyCurve | None:
        count, norm, captured, *energies = row
        k, decay = layer.rank, layer.config.estimator.warm_start_decay
        # Sums of squares may overflow; Hutch++ may estimate ‖G‖ below what was captured.
        usable = count > 0 and math.isfinite(norm) and all(map(math.isfinite, energies[:k]))
        if not usable or not captured > 0 or not energies[0] > 0:
            return None
        return EnergyCurve(k, min(1.0, captured / norm), tuple(energies[:k]), decay)

    def _wanted(self, w: _Watched, curve: EnergyCurve | None) -> int:
        """The rank that meets the target, whatever the others need."""
        k = min(max(w.layer.rank, w.lower), w.upper)
        if curve is None:
            return k
        target, band = self.options.energy_target, self.options.rank_hysteresis
        energy = math.sqrt(curve.captured)
        top = min(target * (1 + band), (target + 1) / 2)  # near 1, too, there is a way back
        if energy > top:
            # Not the target, and by half at most: fewer directions also follow the gradient less
            # well, and the rank would soon be raised again.
            low = max(w.lower, -(-k // 2))
            enough = (j for j in w.choices(low, k) if curve(j) >= top**2)
            return next(enough, k)
        if energy < target * (1 - band):
            high = min(2 * k, w.upper)
            enough = (j for j in w.choices(k + 1, high) if curve(j) >= target**2)
            return next(enough, max(high, k))
        return k

    def _fit(self, wanted: dict[str, int], curves: Mapping[str, EnergyCurve | None]) -> None:
        """Lower `wanted`, in place, to the budget: where a number captures the least, first.

        Energies are relative to each layer's own gradient: optimizers that normalise the update
        let a layer with small gradients count as much as any other. What a direction captures
        counts `HELD` times what one to come promises, which is an upper limit, and noisy: layers
        alike would trade directions for ever.
        """

        def loss(name: str) -> float:
            w, curve, rank = self._watched[name], curves[name], wanted[name]
            if curve is None:
                return math.inf
            lower = w.below(rank)
            held = HELD if rank <= curve.rank else 1.0
            return held * (curve(rank) - curve(lower)) / ((rank - lower) * w.cost)

        total = sum(rank * self._watched[name].cost for name, rank in wanted.items())
        while total > self._budget:
            lowerable = [name for name in wanted if wanted[name] > self._watched[name].lower]
            name = min(lowerable, key=loss)
            lower = self._watched[name].below(wanted[name])
            total -= (wanted[name] - lower) * self._watched[name].cost
            wanted[name] = lower

    @torch.no_grad()
    def _resize(self, w: _Watched, rank: int) -> None:
        layer = w.layer
        new = layer.config.estimator.resized(layer.state, rank, self._steps)
        if w.optimizer is None:
            layer.replace(**new)
        else:
            for basis in layer.sketches:
                _forget_shape(basis)
            w.optimizer.resize_rank(*layer.sketches, *new.values())


def _watch(name: str, layer: MoleLinear, optimizers, options) -> _Watched:
    m, n = layer.weight.shape
    lower, upper, unit = options.rank_limits(m, n)
    owner = None
    if layer.sketches:
        held = ((o, p) for o in optimizers for group in o.param_groups for p in group["params"])
        owner = next((o for o, p in held if p is layer.stepped), None)
        if not hasattr(owner, "resize_rank"):
            holder = "no optimizer" if owner is None else f"a {type(owner).__name__}"
            raise ValueError(
                "adaptive ranks with gradient_mode='factors' need an optimizer with resize_rank "
                f"(such as molegrad.optim.Muon): {holder} has the bases of {name}"
            )
    start = layer.config.estimator.rank_of(m, n, layer.name)
    return _Watched(layer, owner, start, lower, upper, unit, m + n)


def _forget_shape(p: nn.Parameter) -> None:
    """Make autograd forget the shape that gradients of `p` have.

    As long as a graph of an earlier step is alive (the loss in a variable is enough), autograd
    goes on with that graph's accumulator, which insists on the old shape. Another dtype makes it
    take a new one; another shape alone does not.
    """
    p.grad = None
    data = p.data
    p.data = data.to(torch.float16)
    p.data = data
