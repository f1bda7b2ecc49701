"""Shadow layers: now and then the true gradient of some layers, beside the estimate in use.

What: at a step that is due, `Shadow` computes G = BᵀA (m, n) of chosen layers in float32 (float64
for float64 models) from the step's own micro-batches, and compares it with the estimate Ĝ that
training makes of them. Nothing of it is applied.

How: an extra forward and backward pass before each micro-batch's own, with the same weights and the
same random numbers, so the same dropout masks (`molegrad.monitor.extra_pass`). It moves nothing:
training with and without shadow layers gives the same bits.

    shadow = Shadow(model, optimizers=optimizers)
    shadow.begin()                                       # a due step
    for inputs, targets in micro_batches:
        shadow.observe(lambda: loss(model(inputs), targets) / len(micro_batches))
        (loss(called(inputs), targets) / len(micro_batches)).backward()
    shadow.compare()                                     # before clipping and the optimizers' steps
    metrics = shadow.read()                              # waits for the device

Costs at a due step: a forward pass and most of a backward pass without weight gradients; a product
BᵀA and two eigenvalue problems of the smaller side's size for each chosen layer; and until
`compare`, G and what Ĝ is found from, and during `observe` A and B, of the chosen layers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molegrad.estimators import Estimate
from molegrad.linear import MoleLinear
from molegrad.monitor.extra_pass import Call, output_gradients
from molegrad.ops.amp import exact_products
from molegrad.ops.checks import TOKEN_CHUNK, acc_dtype
from molegrad.targets import layer_role, normalized_targets, not_targeted

SHADOW_METRICS = (
    "energy_capture",
    "cosine",
    "norm_ratio",
    "best_energy",
    "relative_error",
    "norm_estimate_error",
    "energy_estimate_error",
    "effective_rank",
)


class Shadow:
    """Compares the gradient estimates of some layers of `model` with the true gradients.

    In several data-parallel processes (torch.distributed) all of them take part: as
    DistributedDataParallel averages gradients and Muon momenta, G and Ĝ are means over the
    processes. What a process estimates for itself alone is compared with its own G.

    Args:
        model: the bare model, neither compiled nor data-parallel.
        layers: "auto" (see `choose_layers`), "all", or what `MoleGradConfig.target_layers` takes.
        optimizers: those that hold the sketches of layers with gradient_mode "factors", for their
            trust_max; the estimator's options decide where none does.
        spectrum: how many leading singular values of G and of Ĝ `records` gives; 0 for none.

    Raises:
        ValueError: no converted, trained layer is chosen, a pattern matches none, `spectrum` is
            negative, or a weight is no plain tensor (sharded over processes).
        TypeError: `layers` is neither a string nor a list of strings.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "auto",
        optimizers: Iterable[torch.optim.Optimizer] = (),
        spectrum: int = 64,
    ) -> None:
        if spectrum < 0:
            raise ValueError(f"spectrum must be a number of singular values >= 0, got {spectrum}")
        self.model, self.optimizers, self.spectrum = model, list(optimizers), spectrum
        self.layers = choose_layers(model, layers)
        for name, layer in self.layers.items():
            _require_plain(name, layer)
        self._sums: dict[str, _Sums] | None = None  # of the step that is due
        self._rows: list[_Row] = []
        self._values: list[list[float]] | None = None  # the rows, once they have been read

    @torch.no_grad()
    def begin(self) -> None:
        """A due step starts: sums at zero, a copy of what the backward passes will add to.

        Raises:
            ValueError: a layer whose sketches do not add up has some already.
        """
        sums = {}
        for name, layer in self.layers.items():
            _require_plain(name, layer)
            before = layer.config.estimator.accumulated(layer.state)
            if before is not None and not _adds_up(layer):
                raise ValueError(
                    f"layer {name}: estimates of method={layer.config.method!r} do not add up, and "
                    "there are gradients before the step's first backward pass: call "
                    "zero_grad(set_to_none=True) before Shadow.begin()"
                )
            sums[name] = _Sums(layer, before)
        self._sums = sums

    def observe(self, loss: Callable[[], Tensor]) -> None:
        """Add a micro-batch to G; call it before the micro-batch's own forward pass.

        Args:
            loss: runs the bare model; returns the very scalar that backward() will be called on,
                so divided by the number of micro-batches. Autocast is as the caller has it. The
                model's forward hooks run as they always do.

        Raises:
            RuntimeError: `begin` was not called, `loss` calls none of the chosen layers (or under
                no_grad only), or it changes a layer's input in place.
        """
        sums = self._begun("observe")
        for entry in sums.values():
            entry.claim()  # the backward pass of the micro-batch before has left its statistics
        calls = output_gradients(self.model, self.layers, loss)
        for entry in sums.values():
            entry.start_micro_batch()
        with torch.no_grad(), self._exact():
            while calls:  # popped, so that A and B go as they are used
                call, b = calls.pop()
                if b is not None:
                    sums[call.name].add(call, b)
            for entry in sums.values():
                entry.end_micro_batch()

    @torch.no_grad()
    def compare(self) -> None:
        """Compare, on the device: after the step's last backward pass, before gradients are clipped
        and optimizers step. G is freed.

        Raises:
            RuntimeError: `begin` or `observe` was not called, no chosen layer has a gradient, or a
                layer whose sketches do not add up was called more than once.
        """
        sums = self._begun("compare")
        if not any(entry.calls for entry in sums.values()):
            raise RuntimeError(
                "Shadow.compare() without observe(): call it for every micro-batch of the step"
            )
        self._sums = None
        with self._exact():
            rows = [self._row(name, sums.pop(name)) for name in self.layers]
        self._rows, self._values = [row for row in rows if row is not None], None
        if not self._rows:
            raise RuntimeError(
                f"none of the layers {', '.join(self.layers)} has a gradient: call "
                "Shadow.compare() after the backward passes and before zero_grad()"
            )

    def read(self) -> dict[str, dict[str, float]]:
        """{layer name: {metric: value}} of the last comparison, {} before the first; nan where a
        value is not known, such as everything relative to a gradient of zero.

        - energy_capture: max(0, cosine), the share of ‖G‖ along Ĝ: for a projection ‖Ĝ‖ / ‖G‖
          without its trust factor. At most best_energy, for every method with a rank
        - cosine: ⟨G, Ĝ⟩ / (‖G‖ ‖Ĝ‖); 0 where Ĝ is zero
        - norm_ratio: ‖Ĝ‖ / ‖G‖, trust factor included; relative_error: ‖Ĝ − G‖ / ‖G‖
        - best_energy: √(s₁² + … + s_r²) / ‖G‖, s the singular values of G: what the best matrix of
          rank r captures. r is the rank that Ĝ may have: k (power) or 2k (tangent), in mode "grad"
          times the number of backward passes (and processes), as bases move with each. nan where
          the estimate has full rank
        - norm_estimate_error: the free estimate of ‖G‖ (probes) relative to the truth, minus 1
        - energy_estimate_error: the free energy_capture minus the one by the true ‖G‖. For unbiased
          estimates: the sampling_noise that the step claimed minus ‖Ĝ − G‖² / Σ_t ‖a_t‖² ‖b_t‖²,
          which is one draw of it, and has what the rounding of inputs and momentum adds
        - effective_rank: exp(−Σ pᵢ log pᵢ), pᵢ = sᵢ / Σ s (Roy, Vetterli 2007), of G

        In mode "grad" the free estimates are those of the last micro-batch, compared with its own
        G; they are nan where a layer is called more than once in it.
        """
        return {row.name: dict(zip(SHADOW_METRICS, v, strict=False)) for row, v in self._read()}

    def records(self) -> list[dict]:
        """One dictionary for each layer of the last comparison: "layer", the metrics of `read`,
        "rank" (the r of best_energy, 0 for none), "spectrum" and "estimate_spectrum", the leading
        singular values of G and Ĝ."""
        records = []
        for row, values in self._read():
            metrics, rest = values[: len(SHADOW_METRICS)], values[len(SHADOW_METRICS) :]
            half = len(rest) // 2
            records.append(
                {"layer": row.name, **dict(zip(SHADOW_METRICS, metrics, strict=True))}
                | {"rank": row.rank, "spectrum": rest[:half], "estimate_spectrum": rest[half:]}
            )
        return records

    def _begun(self, method: str) -> dict[str, _Sums]:
        if self._sums is None:
            raise RuntimeError(f"Shadow.{method}() before begin(): a due step starts with begin()")
        return self._sums

    def _read(self) -> list[tuple[_Row, list[float]]]:
        if self._values is None and self._rows:
            device = self._rows[0].values.device
            parts = [row.values.to(device) for row in self._rows]
            flat = torch.cat(parts).cpu()  # the one transfer
            self._values = [part.tolist() for part in flat.split([len(part) for part in parts])]
        return list(zip(self._rows, self._values or [], strict=True))

    def _exact(self):
        return exact_products(next(iter(self.layers.values())).weight.device)

    def _row(self, name: str, sums: _Sums) -> _Row | None:
        layer, mode = sums.layer, sums.layer.config.gradient_mode
        sums.claim()
        world = _processes()
        if world > 1:
            for tensor in (sums.gradient, sums.claimed, sums.total_pairs):
                _average(tensor, world)
        if sums.calls > 1 and not _adds_up(layer):
            raise RuntimeError(
                f"layer {name}: estimates of method={layer.config.method!r} do not add up, so that "
                f"{sums.calls} calls in one step have none: use method='tangent'"
            )
        estimator, state = layer.config.estimator, layer.state
        now = estimator.accumulated(state)
        if now is None:
            return None
        est = estimator.matrix(state, now, sums.before, self._trust_max(layer))
        if mode == "momentum" and world > 1:  # as Muon will at its step
            _average(est.matrix, world)
        passes = 1 if mode == "factors" else sums.calls * world
        rank = min(est.rank * passes, *layer.weight.shape)
        metrics, *spectra = compare(sums.gradient, est.matrix, rank, self.spectrum)
        metrics |= _free_errors(sums, est, world)
        values = torch.stack([metrics[key] for key in SHADOW_METRICS])
        return _Row(name, rank, torch.cat([values, *spectra]))

    def _trust_max(self, layer: MoleLinear) -> float:
        """What limits the trust factor where an optimizer applies it; 0 where there is none."""
        if not layer.sketches:
            return 0.0
        options = layer.config.estimator.optimizer_options(layer.config.seed)
        for group in (group for o in self.optimizers for group in o.param_groups):
            if any(p is layer.stepped for p in group["params"]):
                options = group
        return options.get("trust_max", 0.0)


def compare(
    gradient: Tensor, estimate: Tensor, rank: int, spectrum: int = 0
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """How Ĝ (m, n) relates to G (m, n): metrics of `Shadow.read` (0-dim, float64; nan for G = 0 and
    where one is not finite), and the leading `spectrum` singular values of both.

    No Ĝ of rank r has a larger cosine than best_energy (Eckart, Young 1936), nan for r = 0.
    """
    g, e = gradient.double(), estimate.double()
    g_norm, e_norm = torch.linalg.vector_norm(g), torch.linalg.vector_norm(e)
    inner = ((g * e).sum() / (g_norm * e_norm)).clamp(-1.0, 1.0)
    cosine = torch.where((e_norm == 0) & (g_norm > 0), 0.0, inner)
    s = singular_values(g)
    energies = (s / torch.linalg.vector_norm(s)).square().cumsum(0).sqrt()
    nonzero = torch.where(g_norm > 0, g_norm, math.nan)
    metrics = {
        "energy_capture": cosine.clamp(min=0.0),
        "cosine": cosine,
        "norm_ratio": e_norm / nonzero,
        "best_energy": energies[min(rank, len(s)) - 1] if rank else inner.new_full((), math.nan),
        "relative_error": torch.linalg.vector_norm(e - g) / nonzero,
        "effective_rank": torch.special.entr(s / s.sum()).sum().exp(),
    }
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


def choose_layers(model: nn.Module, layers: str | Sequence[str] = "auto") -> dict[str, MoleLinear]:
    """The converted layers of `model` that are trained and chosen, by name, in the model's order.

    "auto" takes of each role (`molegrad.targets.layer_role`: feed-forward, attention, ...) one
    layer in the first, the middle and the last block that has it: the largest, of equal ones the
    first. A block is what a name says up to its first number (`h.3` of `h.3.mlp.c_fc`); a layer
    without a number is a block of its own. An output head is never chosen: its gradient is made
    with its loss, a chunk of tokens at a time, where no call of the layer can be seen.

    Raises:
        ValueError, TypeError: see `Shadow`.
    """
    trained = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, MoleLinear) and layer.trains and layer_role(name) != "head"
    }
    if not trained:
        raise ValueError(
            "shadow layers: the model has no MoleLinear that is trained, an output head apart; "
            "convert it first"
        )
    if layers == "auto":
        chosen = _first_middle_last(trained)
        return {name: layer for name, layer in trained.items() if name in chosen}
    try:
        targets = normalized_targets(layers)
    except (TypeError, ValueError) as error:
        raise type(error)(f"shadow layers: {error}") from None
    for target in [targets] if isinstance(targets, str) else [(t,) for t in targets]:
        if all(not_targeted(name, target) for name in trained):
            named = target if isinstance(target, str) else target[0]
            raise ValueError(
                f"shadow layers: {named!r} matches no converted, trained layer of this model; "
                f"there are {', '.join(trained)}"
            )
    return {name: layer for name, layer in trained.items() if not not_targeted(name, targets)}


def _first_middle_last(layers: dict[str, MoleLinear]) -> set[str]:
    roles: dict[str, dict[str, list[str]]] = {}
    for name in layers:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        block = ".".join(parts[: number + 1])
        roles.setdefault(layer_role(name), {}).setdefault(block, []).append(name)
    chosen = set()
    for blocks in map(list, (blocks.values() for blocks in roles.values())):
        for names in (blocks[0], blocks[len(blocks) // 2], blocks[-1]):
            chosen.add(max(names, key=lambda name: layers[name].weight.numel()))
    return chosen


class _Row(NamedTuple):
    """A layer's results: metrics, spectrum of G, spectrum of Ĝ in one tensor on its device."""

    name: str
    rank: int
    values: Tensor


class _Sums:
    """What a due step gathers of one layer."""

    def __init__(self, layer: MoleLinear, before: tuple[Tensor, ...] | None) -> None:
        dtype = acc_dtype(layer.weight.dtype)
        self.layer = layer
        self.before = None if before is None else tuple(t.detach().clone() for t in before)
        self.gradient = torch.zeros_like(layer.weight, dtype=dtype, requires_grad=False)
        self.calls = self.last_calls = 0  # of the step, of the last micro-batch
        # G of the last micro-batch alone, where the layer's statistics are about that one.
        own = layer.config.gradient_mode == "grad" and not layer.config.estimator.unbiased
        self.own = torch.zeros_like(self.gradient) if own else None
        # Σ_t ‖a_t‖² ‖b_t‖² of the last micro-batch and of the step, and the sampling noise that
        # the backward passes claim.
        zeros = [self.gradient.new_zeros((), dtype=torch.float64) for _ in range(3)]
        self.pairs, self.total_pairs, self.claimed = zeros

    def start_micro_batch(self) -> None:
        self.last_calls = 0
        self.pairs = torch.zeros_like(self.pairs)
        if self.own is not None:
            self.own.zero_()

    def add(self, call: Call, b: Tensor) -> None:
        """G += BᵀA."""
        target = self.gradient if self.own is None else self.own
        chunks = (x.reshape(-1, x.shape[-1]).split(TOKEN_CHUNK) for x in (call.a, b))
        for a_t, b_t in zip(*chunks, strict=True):
            a_t, b_t = a_t.to(call.dtype).to(target.dtype), b_t.to(target.dtype)
            target.addmm_(b_t.mT, a_t)
            if self.layer.config.estimator.unbiased:
                squares = a_t.square().sum(1, dtype=torch.float64), b_t.square().sum(1)
                self.pairs += squares[0] @ squares[1].double()
        self.calls += 1
        self.last_calls += 1

    def end_micro_batch(self) -> None:
        if self.own is not None:
            self.gradient += self.own

    @torch.no_grad()
    def claim(self) -> None:
        """Take up what the last backward pass said of its sampling noise."""
        if self.last_calls:
            # Of several calls only the last one's is known.
            noise = _sampling_noise(self.layer) if self.last_calls == 1 else math.nan
            self.claimed += noise * self.pairs
            self.total_pairs += self.pairs


def _free_errors(sums: _Sums, est: Estimate, world: int) -> dict[str, Tensor]:
    """What the free estimates of training are worth; see `Shadow.read`."""
    config = sums.layer.config
    truth = sums.gradient
    if config.gradient_mode == "grad":  # its statistics are those of a single call
        truth = sums.own if sums.own is not None and sums.last_calls == 1 else truth * math.nan
    truth = torch.linalg.vector_norm(truth, dtype=torch.float64)
    norm, captured = est.norm_sq.sqrt(), est.captured_sq.sqrt()
    energy_error = (captured / norm).clamp(max=1.0) - captured / truth
    if config.estimator.unbiased:
        # Errors of processes are independent: the square of their mean's is a share of theirs.
        error_sq = (est.matrix - sums.gradient).double().square().sum() * world
        energy_error = (sums.claimed - error_sq) / sums.total_pairs
    return {"norm_estimate_error": norm / truth - 1, "energy_estimate_error": energy_error}


def _sampling_noise(layer: MoleLinear) -> Tensor | float:
    """What the last backward pass said of its sampling noise; nan where nothing does."""
    estimator, key = layer.config.estimator, "sampling_noise"
    if key in estimator.STATS:
        return estimator.stats(layer.state)[estimator.STATS.index(key)].double()
    return estimator.metrics({}).get(key, math.nan) if not estimator.STATS else math.nan


def _adds_up(layer: MoleLinear) -> bool:
    """Whether the estimates of several backward passes add up where they are accumulated: as
    matrices they do."""
    return layer.config.estimator.adds_up or not layer.sketches


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _average(x: Tensor, world: int) -> None:
    torch.distributed.all_reduce(x)
    x /= world


def _require_plain(name: str, layer: MoleLinear) -> None:
    kind = type(layer.weight.detach())
    if kind is not Tensor:
        raise ValueError(
            f"shadow layer {name}: its weight is a {kind.__name__}, of which no process has all; "
            "shadow layers need plain tensors"
        )
