"""Metrics of converted layers, each and aggregated.

    watch = LayerMetrics(model, optimizers)
    watch.snapshot()        # before the step: notes the bases
    ... forward and backward passes ...
    watch.after_backward()  # before gradients are clipped, used and dropped
    ... optimizers' steps, zero_grad ...
    values = watch.read()   # {layer: {metric: value}}, waits for the device

All three belong to the steps that are read; at the others nothing happens. What an estimate is
worth, its estimator says (`Estimator.stats`, `metrics`, `spectrum`); here that of all layers comes
in one transfer, small matrices included, whose singular values are found on the host, where they
cost microseconds. Products here are exact whatever training has: in TF32 perfect bases would seem
to be 7e-4 from orthonormal.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molegrad.estimators.spectra import stacked_singular_values
from molegrad.linear import MoleLinear
from molegrad.monitor.memory import address_of, bytes_of, plain_tensors, working_matrices
from molegrad.ops.amp import exact_products

MIB = 2**20
METRICS = (
    "energy_capture",
    "gradient_norm_compression_ratio",
    "subspace_quality",
    "subspace_quality_min",
    "layer_memory_usage",
    "trust_scaling_factor",
    "trust_factor",
    "condition_number",
    "subspace_drift",
    "memory_saved_mb",
    "effective_rank",
    "orthogonality_error",
    "orth_status",
    "gradient_norm",
    "estimate_norm",
    "sampled_share",
    "sampling_noise",
)
# How `aggregate` joins the layers' values; those not named here by their mean.
_SUMS = ("layer_memory_usage", "memory_saved_mb")
_WORST = {
    "subspace_quality_min": ("subspace_quality_min", min),
    "energy_capture_min": ("energy_capture", min),
    "condition_number_max": ("condition_number", max),
    "orthogonality_error_max": ("orthogonality_error", max),
}


class LayerMetrics:
    """Reads the metrics of every MoleLinear in `model`; what is not known is nan.

    `METRICS`, and others that an estimator of one's own has. Its estimator defines what
    `Estimator.metrics` gives: norms of gradient and estimate, energy capture, trust factor,
    condition number, drift, share and noise of a sample. Here are found:

    - effective_rank: exp(H(p)), H the entropy of the normalised singular values p = σ / Σσ of Ĝ
      (Roy and Vetterli 2007), of the methods of low rank; needs `after_backward`. Exact for one
      micro-batch. With gradient_mode "grad" several add up to a higher rank, of which about the
      leading 2k (method "power": k) modes count.
    - subspace_quality: cosines of the principal angles between a basis before the step and the
      basis after it, the singular values of QᵀQ' (Björck and Golub 1973): their mean over the
      angles of both sides, and subspace_quality_min the least. The directions of Q' that
      exploration has just drawn at random are left out, as they say nothing of the gradient (where
      all are drawn, all count). Needs `snapshot`.
    - orthogonality_error: largest entry of |QᵀQ − I| of both sides.
    - layer_memory_usage (MiB): all tensors that exist for the layer: weight, bias, gradients,
      bases, momentum or other state in `optimizers`, counters. Storage counts once. The input that
      is kept for the backward pass is not among them (`saved_bytes` measures that).
    - memory_saved_mb (MiB): a gradient of the weight's shape and dtype, less the tensors that are
      or stand for the weight's gradient: nothing saved in mode "grad", all but the sketches in mode
      "factors", all of it in mode "momentum". (An int8 momentum takes a gradient for the time of
      each layer's backward pass; none is held.) Gradients are measured by `after_backward`; without
      it, those that will be there count where there are none.

    Args:
        model: its converted layers are looked for now.
        optimizers: whose state counts as memory of the layers.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, MoleLinear)}
        self._optimizers = list(optimizers)
        self._forget()

    def _forget(self) -> None:
        self._before: list[_Bases] = []
        self._spectra: list[_Pending] = []
        self._gradients: dict[str, tuple[int, int]] = {}

    @torch.no_grad()
    def snapshot(self) -> None:
        """Note the bases before the step that is to be read; a copy of them is held until then."""
        self._before = list(_stacked_bases(self._layers))

    @torch.no_grad()
    def after_backward(self) -> None:
        """Note what the gradients say, as long as they are there; waits for nothing."""
        self._gradients = {name: _gradient_bytes(layer) for name, layer in self._layers.items()}
        with self._exact():
            self._spectra = list(_spectra(self._layers))

    @torch.no_grad()
    def read(self) -> dict[str, dict[str, float]]:
        """{layer: {metric: value}}; waits for the device, once."""
        if not self._layers:
            return {}
        with self._exact():
            pending = [*_statistics(self._layers), *self._of_bases(), *self._spectra]
        known: dict[str, dict[str, float]] = {name: {} for name in self._layers}
        for item, values in zip(pending, _transfer([p.values for p in pending]), strict=True):
            for name, metrics in zip(item.names, item.solve(values), strict=True):
                known[name] |= metrics
        for name, layer in self._layers.items():
            of_weight, of_all = self._gradients.get(name) or _gradient_bytes(layer)
            dense = bytes_of(layer.weight) if layer.trains else 0
            known[name] |= {
                "layer_memory_usage": (_held_bytes(layer, self._optimizers) + of_all) / MIB,
                "memory_saved_mb": (dense - of_weight) / MIB,
            }
        self._forget()
        return {name: {**dict.fromkeys(METRICS, math.nan), **m} for name, m in known.items()}

    def _of_bases(self) -> Iterator[_Pending]:
        """What bases say, now and with those of before the step."""
        before = {tuple(old.names): old for old in self._before}
        for now in _stacked_bases(self._layers):
            yield _Pending(now.names, now.orthogonality_error(), _orthogonality)
            old = before.get(tuple(now.names))
            # Other shapes: a rank has changed since.
            if old is not None and [q.shape for q in old.sides] == [q.shape for q in now.sides]:
                yield _Pending(now.names, old.angles(now), _subspace_quality)

    def _exact(self) -> contextlib.AbstractContextManager:
        """Around products of float32 matrices."""
        layer = next(iter(self._layers.values()), None)
        return contextlib.nullcontext() if layer is None else exact_products(layer.weight.device)


def layer_metrics(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> dict[str, dict[str, float]]:
    """{layer name: {metric: value}} of every MoleLinear in `model`, as things are now.

    `LayerMetrics` without a snapshot, so that subspace_quality is nan. effective_rank needs
    gradients that no optimizer has used: call it between backward pass and step for that, after the
    step for condition_number and subspace_drift of layers with gradient_mode "factors". Makes the
    host wait for the device, once.
    """
    watch = LayerMetrics(model, optimizers)
    watch.after_backward()
    return watch.read()


def aggregate(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Metrics of all layers together, of the finite values alone; nan where none is finite.

    Means, but sums of memory_saved_mb and layer_memory_usage; energy_capture_min,
    subspace_quality_min, condition_number_max and orthogonality_error_max are the worst layer's.
    """

    def finite(key: str) -> list[float]:
        return [m[key] for m in metrics.values() if math.isfinite(m.get(key, math.nan))]

    result = {}
    for key in dict.fromkeys([*METRICS, *(key for m in metrics.values() for key in m)]):
        values = finite(key)
        result[key] = math.fsum(values)
        if key not in _SUMS:
            result[key] = result[key] / len(values) if values else math.nan
    for key, (source, worst) in _WORST.items():
        result[key] = worst(finite(source), default=math.nan)
    return result


@torch.no_grad()
def device_checks(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> dict[str, dict[str, float]]:
    """{layer: {metric: value}} of what the other metrics do not say and `Health` wants to know:
    basis_nonfinite, state_nonfinite (momentum and optimizer's state) and weight_nonfinite, 1 or 0,
    of every layer, and momentum_norm of those that have one. Waits for the device, once."""
    optimizers = list(optimizers)
    names: list[tuple[str, str]] = []
    rows: list[Tensor] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, MoleLinear):
            continue
        held = (layer.weight, *layer.sketches)
        states = [o.state[p] for o in optimizers for p in held if p in o.state]
        # "stats" are nan where unknown, and "basis" is the basis itself.
        state = {k: t for s in states for k, t in s.items() if k not in ("stats", "basis")}
        tensors = layer.state.tensors
        if "momentum" in tensors:
            state["momentum_buffer"] = tensors["momentum"]
            state["momentum_scale"] = tensors.get("momentum_scale")
        for part, checked in (
            ("basis", working_matrices(layer)),
            ("state", [t for t in state.values() if isinstance(t, Tensor)]),
            ("weight", [layer.weight]),
        ):
            names.append((name, f"{part}_nonfinite"))
            rows.append(_nonfinite(checked, layer.weight.device))
        keys = ("momentum_buffer", "core", "exp_avg")
        momentum = next((state[k] for k in keys if state.get(k) is not None), None)
        if momentum is not None:
            value = momentum.float()  # the bases are orthonormal: a core has the momentum's norm
            if state.get("momentum_scale") is not None:
                value = value * state["momentum_scale"]
            names.append((name, "momentum_norm"))
            rows.append(torch.linalg.vector_norm(value))
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, metric), value in zip(names, _transfer(rows) if rows else [], strict=True):
        result[name][metric] = value.item()
    return dict(result)


def _nonfinite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """1 where one of the tensors holds NaN or Inf, else 0 (scalar on `device`)."""
    tensors = [t for t in tensors if t.is_floating_point() and t.numel()]
    if not tensors:
        return torch.zeros((), device=device)
    largest = torch._foreach_norm(tensors, math.inf)
    bad = [~norm.to(device).isfinite() for norm in largest]
    return torch.stack(bad).any().float()


class _Pending(NamedTuple):
    """Numbers still on the device, and how the host makes metrics of them."""

    names: list[str]
    values: Tensor  # (layers, …)
    solve: Callable[[Tensor], list[dict[str, float]]]  # of the values on the host, in float64


def _transfer(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on the host, in float64, by one transfer."""
    device = tensors[0].device
    flat = torch.cat([t.to(device, torch.float64).flatten() for t in tensors]).cpu()
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _statistics(layers: dict[str, MoleLinear]) -> Iterator[_Pending]:
    """What backward passes and optimizers have measured."""
    for name, layer in layers.items():
        estimator, stats = layer.config.estimator, layer.config.estimator.stats(layer.state)
        values = layer.weight.new_zeros(1, 0) if stats is None else stats[None]

        def solve(values: Tensor, estimator=estimator) -> list[dict[str, float]]:
            rows = values.tolist()
            return [estimator.metrics(dict(zip(estimator.STATS, r, strict=True))) for r in rows]

        yield _Pending([name], values, solve)


class _Bases(NamedTuple):
    """Copies of the bases of layers that are alike, each side (layers, features, k)."""

    names: list[str]
    sides: list[Tensor]
    kept: int  # directions that exploration leaves

    def orthogonality_error(self) -> Tensor:
        """(layers,)"""
        errors = []
        for q in self.sides:
            unit = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
            errors.append((q.mT @ q - unit).abs().amax((-2, -1)))
        return torch.stack(errors).amax(0)

    def angles(self, now: _Bases) -> Tensor:
        """QᵀQ' of each side, (layers, sides, k, kept), whose singular values are the cosines."""
        pairs = zip(self.sides, now.sides, strict=True)
        return torch.stack([old.mT @ new[..., : now.kept] for old, new in pairs], dim=1)


def _groups(layers: dict[str, MoleLinear]) -> Iterator[dict[str, MoleLinear]]:
    """Layers that may be stacked: alike in configuration, shape, rank, dtype and device."""
    groups: dict[tuple, dict[str, MoleLinear]] = defaultdict(dict)
    for name, layer in layers.items():
        w = layer.weight
        groups[(id(layer.config), w.shape, layer.rank, w.dtype, w.device)][name] = layer
    yield from groups.values()


def _stacked_bases(layers: dict[str, MoleLinear]) -> Iterator[_Bases]:
    """The bases of all layers that have any."""
    for group in _groups(layers):
        first = next(iter(group.values()))
        estimator = first.config.estimator
        by_side = zip(*(estimator.bases(layer.state) for layer in group.values()), strict=True)
        sides = [torch.stack([q.detach() for q in side]) for side in by_side]
        if sides:
            kept = first.rank - estimator.explored(first.state)
            yield _Bases(list(group), sides, kept or first.rank)


def _orthogonality(errors: Tensor) -> list[dict[str, float]]:
    return [{"orthogonality_error": error} for error in errors.tolist()]


def _subspace_quality(products: Tensor) -> list[dict[str, float]]:
    """From QᵀQ' of each side, (layers, sides, k, kept)."""
    cosines = stacked_singular_values(products).clamp(max=1.0).flatten(1)
    return [
        {"subspace_quality": mean, "subspace_quality_min": least}
        for mean, least in zip(cosines.mean(1).tolist(), cosines.amin(1).tolist(), strict=True)
    ]


def _spectra(layers: dict[str, MoleLinear]) -> Iterator[_Pending]:
    """Small matrices with the spectra of the estimates of all layers that have a gradient."""
    with_gradient = {
        name: layer
        for name, layer in layers.items()
        if layer.config.estimator.accumulated(layer.state) is not None
    }
    for group in _groups(with_gradient):
        states = [layer.state for layer in group.values()]
        spectrum = next(iter(group.values())).config.estimator.spectrum(states)
        if spectrum is not None:
            matrices, ranks = spectrum

            def solve(values: Tensor, ranks=ranks) -> list[dict[str, float]]:
                return [{"effective_rank": rank} for rank in ranks(values)]

            yield _Pending(list(group), matrices, solve)


def _gradient_bytes(layer: MoleLinear) -> tuple[int, int]:
    """Bytes of the tensors that are or stand for the weight's gradient, and of all gradients of the
    layer; of those it will have where there are none just now."""
    in_momentum = layer.config.gradient_mode == "momentum"
    expected = [] if in_momentum or not layer.trains else layer.sketches or [layer.weight]
    of_weight = 0
    for p in (layer.weight, *layer.sketches):
        if p.grad is not None:
            of_weight += bytes_of(p.grad)
        elif any(p is q for q in expected):
            of_weight += bytes_of(p)
    bias = layer.bias
    of_bias = bytes_of(bias) if bias is not None and bias.requires_grad else 0
    return of_weight, of_weight + of_bias


def _held_bytes(layer: MoleLinear, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of parameters, buffers and optimizer state, every storage once."""
    states = [o.state.get(p) for p in layer.parameters() for o in optimizers]
    kept: dict[int, int] = {}
    for part in plain_tensors([*layer.parameters(), *layer.buffers(), states]):
        kept[address_of(part)] = max(bytes_of(part), kept.get(address_of(part), 0))
    return sum(kept.values())
