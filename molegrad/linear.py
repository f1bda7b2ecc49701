"""MoleLinear: nn.Linear with an estimate, sampled or of low rank, of its weight gradient.

The forward pass, the parameters' names and the state_dict are nn.Linear's. What differs is the
backward pass, by `config.gradient_mode`:

- "dense": `weight.grad` is the estimate Ĝ as a matrix, and the warm-started bases are buffers that
  move with every backward pass. Any optimizer works.
- "momentum": the estimate is added straight to `momentum` (m, n), which Muon steps from and decays;
  `weight.grad` stays None. Backward passes add up until Muon steps, whatever zero_grad does.
- "factored": no matrix of the weight's size is built. The weight has requires_grad=False and gets
  no gradient; the parameters `basis_u` (m, k + probes) and `basis_v` (n, k + probes) receive the
  sketches as theirs, and an optimizer of `molegrad.optim` turns them into an update.
"""

from __future__ import annotations

import functools
import math
import warnings
import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molegrad import bases
from molegrad.autograd import STATS
from molegrad.config import MoleGradConfig, explored_directions
from molegrad.grouping import SketchGroup, grouped_linear
from molegrad.ops.checks import FLOAT8, acc_dtype
from molegrad.steps import Steps

# Parameters that a layer works with and that are in no state_dict of the model.
WORKING_PARAMETERS = ("basis_u", "basis_v", "momentum", "momentum_scale")
_WORKING_STATE = (*WORKING_PARAMETERS, "counter", "stats")
_DRAW = 2_654_435_761  # between the seeds of two draws of a basis; far from those of other streams


def int8_scale(m: int, n: int, device=None) -> Tensor:
    """Scales of an int8 matrix (m, n), one for each feature of its wider side; float32 ones."""
    return torch.ones((m, 1) if m >= n else (1, n), device=device)


class MoleLinear(nn.Linear):
    """Drop-in for nn.Linear: x (…, in_features) to (…, out_features).

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear takes them.
        config: the estimator; `config.target_layers` has no meaning here.
        name: the layer's name in its model; with `config.seed` it seeds the layer's bases, and
            `config.rank_overrides` go by it.
        group: what `config.group_mib` gathers sketches in; `convert` gives the layers of a model
            one to share. None makes one for this layer alone.

    Raises:
        ValueError: the rank does not fit the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        config: MoleGradConfig | None = None,
        name: str = "",
        group: SketchGroup | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._equip(config or MoleGradConfig(), name, group)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: MoleGradConfig,
        name: str = "",
        group: SketchGroup | None = None,
    ) -> MoleLinear:
        """A MoleLinear that takes over the very parameters, hooks and mode of `linear`."""
        layer = cls.__new__(cls)
        layer.__dict__.update(_own_containers(linear))
        layer._equip(config, name, group)
        return layer

    def to_linear(self) -> nn.Linear:
        """The nn.Linear with this layer's parameters, hooks and mode; gradients are not kept."""
        linear = nn.Linear.__new__(nn.Linear)
        linear.__dict__.update(_own_containers(self))
        for attribute in ("config", "name", "_seed", "share", "_guard", "group", "steps"):
            linear.__dict__.pop(attribute, None)
        for key in _WORKING_STATE:
            linear._buffers.pop(key, None)
            linear._parameters.pop(key, None)
            linear._non_persistent_buffers_set.discard(key)
        linear.weight.requires_grad_(self.trains)
        return linear

    def _equip(self, config: MoleGradConfig, name: str, group: SketchGroup | None = None) -> None:
        smallest = min(self.in_features, self.out_features)
        k = config.rank_of(self.out_features, self.in_features, name)
        needed = config.needed_features(k)
        if needed > smallest:
            raise ValueError(
                f"rank {k} ({config.rank_source(name)}) with method={config.method!r} needs a "
                f"layer of at least {needed} features on both sides, this one is "
                f"{self.in_features} -> {self.out_features}: lower rank_k or leave the layer dense"
            )
        self.config, self.name, self.steps = config, name, Steps()
        self.group = (group or SketchGroup(config.group_mib)) if config.group_mib else None
        # The share of the products that method "sampled" takes; 1 for the other methods.
        self.share = config.share_of(name) if config.method == "sampled" else 1.0
        self._seed = (config.seed * 1_000_003 + zlib.crc32(name.encode())) % 2**62
        trains = self.weight.requires_grad
        factored = config.gradient_mode == "factored"
        width = k + config.probes if factored else k
        dtype, device = acc_dtype(self.weight.dtype), self.weight.device
        one_sided = config.method == "projected"
        for key, rows in (("basis_u", self.out_features), ("basis_v", self.in_features)):
            size = 0 if one_sided and key == "basis_u" else width
            basis = torch.empty(rows, size, dtype=dtype, device=device)
            if factored:
                self.register_parameter(key, nn.Parameter(basis, requires_grad=trains))
            else:
                self.register_buffer(key, basis, persistent=False)
        counter = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("counter", counter, persistent=False)
        stats = torch.full((len(STATS),), math.nan, device=device)
        self.register_buffer("stats", stats, persistent=False)
        if factored:
            self.weight.requires_grad_(False)
        self.momentum = self.momentum_scale = None
        if config.gradient_mode == "momentum":
            momentum = torch.zeros_like(self.weight, dtype=getattr(torch, config.momentum_dtype))
            self.momentum = nn.Parameter(momentum, requires_grad=False)
        if config.momentum_dtype == "int8" and self.momentum is not None:
            scale = int8_scale(*self.weight.shape, device=device)
            self.momentum_scale = nn.Parameter(scale, requires_grad=False)
        self._guard_accumulation()
        self.reset_bases()

    @property
    def rank(self) -> int:
        """k: the width of the layer's right basis, probe columns not counted; 0 for method
        "sampled"."""
        factored = self.config.gradient_mode == "factored"
        return self.basis_v.shape[1] - (self.config.probes if factored else 0)

    @property
    def trains(self) -> bool:
        """Whether the weight is trained (in factored mode its bases carry that mark)."""
        factored = self.config.gradient_mode == "factored"
        return self.basis_v.requires_grad if factored else self.weight.requires_grad

    @torch.no_grad()
    def reset_bases(self, draw: int = 0) -> None:
        """Draw both bases anew from the seed: 0 as a fresh layer has them, another number others.

        In factored mode an optimizer's state is expressed in the old ones and has to go with them:
        `molegrad.monitor.reset_layer` does both.
        """
        k = self.rank
        for stream, basis in enumerate((self.basis_u, self.basis_v)):
            if basis.is_meta or basis.shape[1] == 0:
                continue
            rows, width = basis.shape
            seed = (self.basis_seed(stream) + _DRAW * draw) % 2**62
            options = {"device": basis.device, "dtype": basis.dtype}
            basis[:, :k] = bases.initial_basis(rows, k, seed, **options)
            if width > k:
                basis[:, k:] = bases.rademacher(
                    rows, width - k, torch.zeros_like(self.counter), seed + 1, basis.dtype
                )

    def basis_seed(self, stream: int) -> int:
        """Seed of the random directions of basis_u (stream 0) or basis_v (stream 1)."""
        return self._seed + 101 * (stream + 1)

    def set_bases(self, basis_u: Tensor, basis_v: Tensor) -> None:
        """Other bases (m, k) and (n, k), of any rank, in dense mode; (m, 0) for method "projected",
        which has no left one.

        Raises:
            ValueError: the layer is in factored mode, where its optimizer has a state to fit
                (`resize_rank`), or the bases do not fit the layer.
        """
        k = basis_v.shape[-1]
        left = 0 if self.config.method == "projected" else k
        wanted = ((self.out_features, left), (self.in_features, k))
        if self.config.gradient_mode == "factored":
            raise ValueError(
                f"layer {self.name or 'MoleLinear'} is in factored mode: change its bases with "
                "resize_rank of its optimizer"
            )
        if (tuple(basis_u.shape), tuple(basis_v.shape)) != wanted:
            raise ValueError(
                f"layer {self.name or 'MoleLinear'} ({self.in_features} -> {self.out_features}) "
                f"needs bases {wanted[0]} and {wanted[1]}, got {tuple(basis_u.shape)} and "
                f"{tuple(basis_v.shape)}"
            )
        self.basis_u = basis_u.to(self.basis_u.device, self.basis_u.dtype)
        self.basis_v = basis_v.to(self.basis_v.device, self.basis_v.dtype)

    def metrics(self) -> dict[str, float]:
        """energy_capture, trust_factor, condition_number, subspace_drift and memory_saved_mb of the
        last step; nan where it is not known. Waits for the device.

        Defined in `molegrad.monitor.LayerMetrics`, which reads many layers at once and has more. In
        factored mode an optimizer of `molegrad.optim` measures: nan before its first step.
        """
        from molegrad.monitor.metrics import LayerMetrics  # which imports this module

        values = LayerMetrics(self).read()[""]
        return {
            name: values[name]
            for name in (
                "energy_capture", "trust_factor", "condition_number", "subspace_drift",
                "memory_saved_mb",
            )
        }  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.trains):
            return F.linear(input, self.weight, self.bias)
        c = self.config
        if c.gradient_mode != "dense" and not torch.compiler.is_compiling():
            self.steps.expect(self)
            if self.momentum is not None:
                _tell_of_float16(input.device.type)
        if c.method == "projected":
            return self._forward_projected(input)
        fp8 = c.products == "fp8"
        float8 = c.saved_inputs == "fp8" and (not fp8 or float8_works(input.device.type))
        saved = _float8(input) if float8 else (None, None)
        if c.method == "sampled":
            return torch.ops.molegrad.linear_sampled(
                input, self.weight, self.bias, *saved, self.momentum, self.momentum_scale,
                self.counter, self.stats, self.share, c.sample_block, self._seed,
            )  # fmt: skip
        if c.gradient_mode == "dense":
            return torch.ops.molegrad.linear_dense(
                input, self.weight, self.bias, *saved, self.basis_u, self.basis_v, self.counter,
                self.stats, c.method, c.power_iters, c.probes,
                c.trust_max if c.trust_scaling else 0.0,
                explored_directions(self.rank, c.warm_start_decay), self._seed, c.cond_max, fp8,
            )  # fmt: skip
        if self.group is not None:
            return grouped_linear(
                self.group, input, self.weight, self.bias, *saved, self.basis_u, self.basis_v
            )
        return torch.ops.molegrad.linear_factored(
            input, self.weight, self.bias, *saved, self.basis_u, self.basis_v, self.stats,
            c.method, self.rank, c.power_iters, c.cond_max, fp8,
        )  # fmt: skip

    def _forward_projected(self, x: Tensor) -> Tensor:
        """All that is kept of x is made here, so that checkpointing makes it anew."""
        c = self.config
        return torch.ops.molegrad.linear_projected(
            x, self.weight, self.bias, *self._projection(x), self.basis_v, self.momentum,
            self.momentum_scale, self.counter, self.stats, c.project_stride,
            explored_directions(self.rank, c.warm_start_decay), self._seed, c.cond_max,
        )  # fmt: skip

    def _projection(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """What method "projected" keeps of x: P, V, rows, their scale (of float8) and index.

        The layers that x is the input of (query, key and value) share what the first of them has
        made, its basis too: an estimate has the right mean whatever the basis. A layer that meets
        the same x once more makes it anew. Where nothing can be shared each layer has its own.
        """
        c, ops, a = self.config, torch.ops.molegrad, x.detach()

        def make() -> tuple[Tensor | None, ...]:
            rows, index = ops.sample_tokens(a, self.counter, c.project_stride, self._seed)
            data, scale = ops.quantize_rows(rows) if c.saved_inputs == "fp8" else (rows, None)
            return *ops.project_tokens(a, self.basis_v), data, scale, index

        if _makes_anew(x):
            return make()
        key = (x._version, self.rank, c.project_stride, c.saved_inputs, _product_dtype(x))
        known = getattr(x, "_molegrad_projection", None)
        if known is None or known.key != key or id(self) in known.layers:
            x._molegrad_projection = known = _Projection(key, make(), set())
        known.layers.add(id(self))
        return known.kept

    def extra_repr(self) -> str:
        c = self.config
        size = f"share={self.share:g}" if c.method == "sampled" else f"rank={self.rank}"
        if c.method == "projected":
            size += f", stride={c.project_stride}"
        return f"{super().extra_repr()}, {size}, method={c.method}, gradient_mode={c.gradient_mode}"

    # Bases are working state, not weights: the state_dict stays nn.Linear's in both directions.

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in WORKING_PARAMETERS:
            destination.pop(prefix + key, None)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ours = {prefix + key for key in WORKING_PARAMETERS}
        missing_keys[:] = [key for key in missing_keys if key not in ours]

    def _apply(self, fn, recurse=True):
        """Follow the weight to another device or dtype, but keep the bases in full precision and
        the momentum in its own."""
        state = {key: getattr(self, key) for key in (*WORKING_PARAMETERS, "stats")}
        before = {key: tensor.detach() for key, tensor in state.items() if tensor is not None}
        super()._apply(fn, recurse)
        dtypes = {
            "stats": torch.float32,
            "momentum_scale": torch.float32,
            "momentum": getattr(torch, self.config.momentum_dtype),
        }
        for key, old in before.items():
            now = getattr(self, key)
            wanted = dtypes.get(key, acc_dtype(self.weight.dtype))
            if old.is_meta and not now.is_meta:
                now.data = torch.zeros_like(now, dtype=wanted)
            elif now.dtype != wanted:
                now.data = old.to(device=now.device, dtype=wanted)
        if before["basis_v"].is_meta and not self.basis_v.is_meta:
            self.counter.zero_()
            self.reset_bases()
        return self

    # Sketches of the power method are not linear in the gradient: a second backward pass before
    # the optimizer's step would add bases to one another. Hooks see that without a device sync.

    def _guard_accumulation(self) -> None:
        self._guard = None
        power = self.config.gradient_mode == "factored" and self.config.method == "power"
        if power and self.basis_v.requires_grad:
            self._guard = _SinglePassGuard(self.name)
            self.basis_v.register_post_accumulate_grad_hook(self._guard)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self._guard_accumulation()


class _Projection(NamedTuple):
    """What the first layer has made of an input, and which layers have it."""

    key: tuple
    kept: tuple[Tensor | None, ...]
    layers: set[int]


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which autocast has x in products."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _SinglePassGuard:
    def __init__(self, name: str) -> None:
        self.name = name
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
            f"layer {self.name or 'MoleLinear'}: method='power' in factored mode is not linear in "
            f"the gradient, {reason}. Use method='tangent', which is exact under accumulation and "
            "data parallelism, or gradient_mode='dense'"
        )


@torch.compiler.assume_constant_result
def float8_works(device_type: str) -> bool:
    """Whether tensors on such a device can be float8; where they cannot, a warning says so once."""
    return device_type == "meta" or _float8_works(device_type)


@functools.cache
def _float8_works(device_type: str) -> bool:
    try:
        for dtype in FLOAT8:
            torch.ones(1, device=device_type).to(dtype)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"products='fp8': tensors on {device_type!r} cannot be float8 ({reason}), so products "
            "are computed in bfloat16 and layers keep their whole inputs",
            stacklevel=2,
        )
        return False
    return True


def _tell_of_float16(device_type: str) -> None:
    enabled = torch.is_autocast_enabled(device_type)
    if enabled and torch.get_autocast_dtype(device_type) == torch.float16:
        _warn_of_float16()


@functools.cache
def _warn_of_float16() -> None:
    warnings.warn(
        "gradient_mode='momentum' under float16 autocast: GradScaler cannot unscale what backward "
        "passes add to the momentum, and what overflows stays there. Use bfloat16 autocast, or "
        "gradient_mode='dense' or 'factored' (said once)",
        stacklevel=2,
    )


def _makes_anew(x: Tensor) -> bool:
    """Whether what is made of x cannot be kept for the other layers that x is the input of.

    Compiled code cannot tell whether x has been changed in between (and has equal calls only once
    anyway). What a CUDA graph computes does not exist until it is replayed, and what was computed
    before would be replayed for every later content of x.
    """
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of x, once for all layers that x is the input of (query, key and value)."""
    if _makes_anew(x):
        return torch.ops.molegrad.quantize_rows(x.detach())
    known = getattr(x, "_molegrad_float8", None)
    if known is None or known[0] != x._version:
        x._molegrad_float8 = known = x._version, torch.ops.molegrad.quantize_rows(x.detach())
    return known[1]


def _own_containers(module: nn.Module) -> dict:
    """A module's attributes with its dictionaries copied, so that two modules can share tensors."""
    return {
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in module.__dict__.items()
    }


def ignored_by_ddp(model: nn.Module) -> list[str]:
    """Names of the weights in momentum mode: they require a gradient and never get one.

    DistributedDataParallel waits for the gradients of all its parameters, so tell it before it is
    made: `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)`. Muon
    averages the momentum over the processes itself.
    """
    weights = {
        id(layer.weight)
        for layer in model.modules()
        if isinstance(layer, MoleLinear) and layer.momentum is not None
    }
    return [name for name, p in model.named_parameters() if id(p) in weights]


def bases_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What an exact resume needs beside the state_dicts of model and optimizer.

    That is the bases, counters and statistics of the layers in dense mode; in factored mode the
    optimizer's state_dict holds the bases, and only counter and statistics are found here; the
    same goes for the momentum of gradient_mode "momentum".
    """
    return {
        f"{name}.{key}": layer._buffers[key]
        for name, layer in model.named_modules()
        if isinstance(layer, MoleLinear)
        for key in _WORKING_STATE
        if layer._buffers.get(key) is not None and layer._buffers[key].numel() > 0
    }


@torch.no_grad()
def load_bases_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore what `bases_state_dict` returned, into a model converted with the same config.

    Raises:
        RuntimeError: names or shapes differ; the message lists them.
    """
    own = bases_state_dict(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise RuntimeError(
            f"bases do not fit this model: missing {missing}, unexpected {unexpected}; convert it "
            "with the configuration the bases were saved under"
        )
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise RuntimeError(
                f"bases do not fit this model: {key} is {tuple(state[key].shape)}, expected "
                f"{tuple(tensor.shape)} (was rank_k or probes changed?)"
            )
    for key, tensor in own.items():
        tensor.copy_(state[key])
