"""Metrics of converted layers, each and aggregated.

    watch = LayerMetrics(model, optimizers)
    watch.snapshot()        # before the step: notes the bases
    ... forward and backward passes ...
    watch.after_backward()  # before gradients are clipped, used and dropped
    ... optimizers' steps, zero_grad ...
    values = watch.read()   # {layer: {metric: value}}, waits for the device

All three belong to the steps that are read; at the others nothing happens. What the device has to
tell of all layers, small matrices included, comes in one transfer, and singular values are found on
the host, where they cost microseconds and nothing has to be waited for once more. Products here are
exact whatever training has: in TF32 perfect bases would seem to be 7e-4 from orthonormal.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molegrad.estimators import bases
from molegrad.estimators.lowrank_sums import STATS
from molegrad.estimators.lowrank_sums import explored_directions
from molegrad.linear import MoleLinear
from molegrad.monitor.memory import _address, _bytes, _tensors
from molegrad.ops.amp import exact_products
from molegrad.ops.checks import acc_dtype

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

    Of the step's gradient:

    - energy_capture: ‖Ĝ‖ / ‖G‖ in [0, 1], Ĝ before trust scaling, ‖G‖ by the Hutch++ estimate
      (Meyer et al. 2021); needs probes >= 1. In dense mode of the last micro-batch.
    - gradient_norm, estimate_norm: ‖G‖ as estimated, and ‖Ĝ‖ before trust scaling.
    - trust_scaling_factor, and the same as trust_factor: what Ĝ was scaled by.
    - gradient_norm_compression_ratio: the norm of the gradient that is used over ‖G‖, that is
      energy_capture times trust factor.
    - effective_rank: exp(H(p)), H the entropy of the normalised singular values p = σ / Σσ of Ĝ
      (Roy and Vetterli 2007), of the methods of low rank; needs `after_backward`. Exact for one
      micro-batch. In dense mode several add up to a higher rank, of which about the leading 2k
      (method "power": k) modes count.
    - sampled_share: of the products that the gradient is a sum of (method "projected": of the
      tokens), in the last backward pass; sampling_noise: the variance that sampling adds, relative
      to the gradient's own from its tokens (see `molegrad.ops.sampled_grad_`, `projected_grad_`).

    Of the bases, U and V (method "projected": of V, all that it has):

    - condition_number: of the kept modes, estimated from their triangular factor.
    - subspace_drift: 1 − ‖VᵀV'‖²_F / k between one step and the next.
    - subspace_quality: cosines of the principal angles between a basis before the step and the
      basis after it, the singular values of QᵀQ' (Björck and Golub 1973): their mean over the
      angles of both sides, and subspace_quality_min the least. The directions of Q' that
      exploration has just drawn at random are left out, as they say nothing of the gradient (where
      all are drawn, all count). Needs `snapshot`.
    - orthogonality_error: largest entry of |QᵀQ − I| of both.
    - orth_status: of the last orthonormalisation, see `molegrad.ops.orthonormalize`; 0 is well.

    Of the memory, in MiB:

    - layer_memory_usage: all tensors that exist for the layer: weight, bias, gradients, bases,
      momentum or other state in `optimizers`, counters. Storage counts once. The input that is kept
      for the backward pass is not among them (`saved_bytes` measures that).
    - memory_saved_mb: a gradient of the weight's shape and dtype, less the tensors that are or
      stand for the weight's gradient: nothing saved in dense mode, all but the sketches in factored
      mode, all of it in momentum mode. (An int8 momentum takes a gradient for the time of
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
        """Note what the gradients tell, as long as they are there; waits for nothing."""
        self._gradients = {name: _gradient_bytes(layer) for name, layer in self._layers.items()}
        with self._exact():
            self._spectra = list(_spectra(self._layers))

    @torch.no_grad()
    def read(self) -> dict[str, dict[str, float]]:
        """{layer: {metric: value}}; waits for the device, once."""
        if not self._layers:
            return {}
        with self._exact():
            pending = [_statistics(self._layers), *self._of_bases(), *self._spectra]
        known: dict[str, dict[str, float]] = {name: {} for name in self._layers}
        for item, values in zip(pending, _transfer([p.values for p in pending]), strict=True):
            for name, metrics in zip(item.names, item.solve(values), strict=True):
                known[name] |= metrics
        result = {
            name: self._named(name, layer, known[name]) for name, layer in self._layers.items()
        }
        self._forget()
        return result

    def _of_bases(self) -> Iterator[_Pending]:
        """What bases tell, now and with those of before the step."""
        before = {tuple(old.names): old for old in self._before}
        for now in _stacked_bases(self._layers):
            yield _Pending(now.names, now.orthogonality_error(), _orthogonality)
            old = before.get(tuple(now.names))
            if old is not None and old.v.shape == now.v.shape:  # else a rank has changed since
                yield _Pending(now.names, old.angles(now), _subspace_quality)

    def _exact(self) -> contextlib.AbstractContextManager:
        """Around products of float32 matrices."""
        layer = next(iter(self._layers.values()), None)
        return contextlib.nullcontext() if layer is None else exact_products(layer.weight.device)

    def _named(self, name: str, layer: MoleLinear, known: dict[str, float]) -> dict[str, float]:
        """All metrics of a layer, in order, from those that the device told."""
        captured, total = known["captured_norm_sq"], known["gradient_norm_sq"]
        measured = layer.config.probes > 0 and total > 0
        capture = min(math.sqrt(captured / total), 1.0) if measured else math.nan  # nan stays
        of_weight, of_all = self._gradients.get(name) or _gradient_bytes(layer)
        dense = _bytes(layer.weight) if layer.trains else 0
        values = {
            **known,
            "energy_capture": capture,
            "gradient_norm_compression_ratio": capture * known["trust_factor"],
            "trust_scaling_factor": known["trust_factor"],
            "gradient_norm": math.sqrt(total) if measured else math.nan,
            "estimate_norm": math.sqrt(captured) if captured >= 0 else math.nan,
            "layer_memory_usage": (_held_bytes(layer, self._optimizers) + of_all) / MIB,
            "memory_saved_mb": (dense - of_weight) / MIB,
        }
        return {metric: values.get(metric, math.nan) for metric in METRICS}


def layer_metrics(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> dict[str, dict[str, float]]:
    """{layer name: {metric: value}} of every MoleLinear in `model`, as things are now.

    For the definitions see `LayerMetrics`, which this reads without a snapshot, so that
    subspace_quality is nan. effective_rank needs gradients that no optimizer has used: call it
    between backward pass and step for that, after the step for condition_number and subspace_drift
    of layers in factored mode. Makes the host wait for the device, once.
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
        return [m[key] for m in metrics.values() if math.isfinite(m[key])]

    result = {}
    for key in METRICS:
        values = finite(key)
        result[key] = math.fsum(values)
        if key not in _SUMS:
            result[key] = result[key] / len(values) if values else math.nan
    for key, (source, worst) in _WORST.items():
        result[key] = worst(finite(source), default=math.nan)
    return result


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


def _statistics(layers: dict[str, MoleLinear]) -> _Pending:
    """What backward passes and optimizers have measured of every layer."""
    device = next(iter(layers.values())).stats.device
    own = torch.stack([layer.stats.to(device) for layer in layers.values()])
    # The optimizer of a layer in factored mode knows what the layer does not.
    rows = [getattr(layer.basis_v, "molegrad_stats", layer.stats) for layer in layers.values()]
    known = torch.stack([row.to(device) for row in rows])
    joined = torch.where(known.isnan(), own, known)
    status = STATS.index("orth_status")
    joined[:, status] = torch.fmax(own[:, status], known[:, status])

    def solve(values: Tensor) -> list[dict[str, float]]:
        return [dict(zip(STATS, row, strict=True)) for row in values.tolist()]

    return _Pending(list(layers), joined, solve)


# Bases


class _Bases(NamedTuple):
    """Copies of the bases of layers of one shape and rank: u (layers, m, k), v (layers, n, k)."""

    names: list[str]
    u: Tensor
    v: Tensor
    kept: int  # directions that exploration leaves

    def orthogonality_error(self) -> Tensor:
        """(layers,)"""
        errors = []
        for q in self.sides():
            unit = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
            errors.append((q.mT @ q - unit).abs().amax((-2, -1)))
        return torch.stack(errors).amax(0)

    def angles(self, now: _Bases) -> Tensor:
        """QᵀQ' of each side, (layers, 2 or 1, k, kept), whose singular values are the cosines."""
        pairs = zip(self.sides(), now.sides(), strict=True)
        return torch.stack([old.mT @ new[..., : now.kept] for old, new in pairs], dim=1)

    def sides(self) -> list[Tensor]:
        """Those that there are: method "projected" has no left basis."""
        return [q for q in (self.u, self.v) if q.shape[-1] > 0]


def _groups(layers: dict[str, MoleLinear], key: Callable) -> Iterator[dict[str, MoleLinear]]:
    """Layers that may be stacked: alike in mode, method, shape, rank, device and `key`."""
    groups: dict[tuple, dict[str, MoleLinear]] = defaultdict(dict)
    for name, layer in layers.items():
        v, c = layer.basis_v, layer.config
        alike = (c.gradient_mode, c.method, layer.weight.shape, layer.rank, v.dtype, v.device)
        groups[(*alike, key(layer))][name] = layer
    yield from groups.values()


def _stacked_bases(layers: dict[str, MoleLinear]) -> Iterator[_Bases]:
    """The bases of all layers that have any."""
    ranked = {name: layer for name, layer in layers.items() if layer.rank > 0}
    for group in _groups(ranked, lambda layer: layer.config.warm_start_decay):
        first = next(iter(group.values()))
        k = first.rank
        kept = k - explored_directions(k, first.config.warm_start_decay)
        u = torch.stack([layer.basis_u.detach()[:, :k] for layer in group.values()])
        v = torch.stack([layer.basis_v.detach()[:, :k] for layer in group.values()])
        yield _Bases(list(group), u, v, kept or k)


def _orthogonality(errors: Tensor) -> list[dict[str, float]]:
    return [{"orthogonality_error": error} for error in errors.tolist()]


def _subspace_quality(products: Tensor) -> list[dict[str, float]]:
    """From QᵀQ' of each side, (layers, sides, k, kept)."""
    cosines = _singular_values(products).clamp(max=1.0).flatten(1)
    return [
        {"subspace_quality": mean, "subspace_quality_min": least}
        for mean, least in zip(cosines.mean(1).tolist(), cosines.amin(1).tolist(), strict=True)
    ]


# The singular values of the estimates, from what is left of them after the backward pass


def _spectra(layers: dict[str, MoleLinear]) -> Iterator[_Pending]:
    """Small matrices with the spectra of the estimates of all layers that have a gradient."""

    def source(layer: MoleLinear) -> Tensor | None:
        dense = layer.config.gradient_mode == "grad"
        return layer.weight.grad if dense else layer.basis_v.grad

    with_gradient = {
        name: layer
        for name, layer in layers.items()
        if not layer.config.estimator.unbiased and source(layer) is not None
    }
    for group in _groups(with_gradient, lambda layer: None):
        members = list(group.values())
        first = members[0]
        if first.config.gradient_mode == "grad":
            yield _Pending(list(group), _dense_grams(members), _ranks_of_grams)
        elif first.config.method == "power":  # Ĝ = U Wᵀ with U orthonormal
            w = torch.stack([layer.basis_v.grad[:, : layer.rank] for layer in members])
            yield _Pending(list(group), _gram(w), _ranks_of_grams)
        else:
            yield _Pending(list(group), _tangent_blocks(members), _ranks_of_tangents)


def _gram(x: Tensor) -> Tensor:
    """xᵀx in float64, so that its eigenvalues give the small singular values too."""
    return x.double().mT @ x.double()


def _dense_grams(layers: list[MoleLinear]) -> Tensor:
    """Gram matrices (layers, w, w) of QᵀĜ, Q the range of Ĝ, found with as many random columns as
    one micro-batch's estimate has modes (Halko, Martinsson, Tropp 2011): exact up to that rank."""
    m, n = layers[0].weight.shape
    rank = layers[0].config.needed_features(layers[0].rank)
    dtype, device = acc_dtype(layers[0].weight.dtype), layers[0].weight.device
    counter = torch.zeros((), dtype=torch.int64, device=device)
    omega = bases.rademacher(n, min(rank, m, n), counter, 0, dtype)
    images = torch.stack([layer.weight.grad.to(dtype) @ omega for layer in layers])
    q, _, _ = torch.ops.molegrad.orthonormalize(images)
    pairs = zip(layers, q, strict=True)
    return _gram(torch.stack([layer.weight.grad.to(dtype).mT @ q_i for layer, q_i in pairs]))


def _tangent_blocks(layers: list[MoleLinear]) -> Tensor:
    """(layers, 4, k, k): (UᵀY)ᵀ, VᵀW and the Gram matrices of Y and W outside of U and V."""
    k = layers[0].rank
    u, v, y, w = (
        torch.stack([tensor[:, :k] for tensor in tensors])
        for tensors in zip(
            *(
                (x.basis_u.detach(), x.basis_v.detach(), x.basis_u.grad, x.basis_v.grad)
                for x in layers
            ),
            strict=True,
        )
    )
    y_core, w_core = u.mT @ y, v.mT @ w
    grams = _gram(y - u @ y_core), _gram(w - v @ w_core)
    return torch.stack([y_core.mT.double(), w_core.double(), *grams], dim=1)


def _ranks_of_grams(grams: Tensor) -> list[dict[str, float]]:
    """Of matrices with these Gram matrices (layers, w, w)."""
    finite = grams.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    squares = torch.linalg.eigvalsh(torch.where(finite, grams, 0.0))
    return _effective_ranks(squares.clamp_min(0.0).sqrt())


def _ranks_of_tangents(blocks: Tensor) -> list[dict[str, float]]:
    """Of Ĝ = U Wᵀ + Y⊥ Vᵀ, from its core of 2k × 2k in orthonormal bases.

    With A = VᵀW, Y⊥ = Q R and W − V A = P S, Ĝ = [U, Q] [[Aᵀ, Sᵀ], [R, 0]] [V, P]ᵀ, where R and S
    are Cholesky factors of the Gram matrices. Sketches of these bases have A = (UᵀY)ᵀ = VᵀGᵀU;
    where the two differ, the optimizer has turned the bases since, and the ranks are unknown.
    """
    other_core, core, gram_y, gram_w = blocks.unbind(1)
    differ = torch.linalg.matrix_norm(other_core - core) > 0.1 * torch.linalg.matrix_norm(core)
    r, s = (_root(gram) for gram in (gram_y, gram_w))
    whole = torch.cat(
        [torch.cat([core.mT, s.mT], dim=-1), torch.cat([r, torch.zeros_like(r)], dim=-1)], dim=-2
    )
    values = _singular_values(torch.where(differ[:, None, None], torch.nan, whole))
    return _effective_ranks(values)


def _root(gram: Tensor) -> Tensor:
    """R (…, k, k) with RᵀR = gram, which may be singular; nan where it is not finite."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype)
    tiny = torch.finfo(gram.dtype).tiny
    shift = trace * (4 * gram.shape[-1] * torch.finfo(gram.dtype).eps) + tiny
    lower, info = torch.linalg.cholesky_ex(gram + shift * unit)
    return torch.where((info == 0)[..., None, None], lower.mT, torch.nan)


def _singular_values(x: Tensor) -> Tensor:
    """Of stacked matrices, nan for those that are not finite, on which the library would fail."""
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values = torch.linalg.svdvals(torch.where(finite, x, 0.0))
    return torch.where(finite[..., 0], values, torch.nan)


def _effective_ranks(values: Tensor) -> list[dict[str, float]]:
    """exp of the entropy of singular values (layers, j); nan where all are zero."""
    shares = values / values.sum(-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(-1)
    return [{"effective_rank": rank} for rank in entropy.exp().tolist()]


# Memory


def _gradient_bytes(layer: MoleLinear) -> tuple[int, int]:
    """Bytes of the tensors that are or stand for the weight's gradient, and of all gradients of the
    layer; of those it will have where there are none just now."""
    mode = layer.config.gradient_mode
    expected = {"dense": ("weight",), "factored": ("basis_u", "basis_v"), "momentum": ()}[mode]
    of_weight = 0
    for key in ("weight", "basis_u", "basis_v"):
        tensor = getattr(layer, key)
        if tensor.grad is not None:
            of_weight += _bytes(tensor.grad)
        elif key in expected and layer.trains:
            of_weight += _bytes(tensor)
    bias = layer.bias
    of_bias = _bytes(bias) if bias is not None and bias.requires_grad else 0
    return of_weight, of_weight + of_bias


def _held_bytes(layer: MoleLinear, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of parameters, buffers and optimizer state, every storage once."""
    states = [o.state.get(p) for p in layer.parameters() for o in optimizers]
    kept: dict[int, int] = {}
    for part in _tensors([*layer.parameters(), *layer.buffers(), states]):
        kept[_address(part)] = max(_bytes(part), kept.get(_address(part), 0))
    return sum(kept.values())
