"""MoleLinear: nn.Linear with an estimate of its weight gradient.

The forward pass, the parameters' names and the state_dict are nn.Linear's. What differs is the
backward pass, by `config.gradient_mode`:

- "grad": `weight.grad` is the estimate as a matrix. Any optimizer works.
- "momentum": the estimate is added straight to `momentum` (m, n), which Muon steps from and decays;
  `weight.grad` stays None. Backward passes add up until Muon steps, whatever zero_grad does.
- "factors": no matrix of the weight's size is built. The weight has requires_grad=False and gets
  no gradient; two small parameters of the estimator get sketches as theirs, and an optimizer of
  `molegrad.optim` turns them into an update.

What is estimated, and how, is the estimator's (`molegrad.estimators`); the layer holds its tensors.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molegrad.config import MoleGradConfig
from molegrad.estimators import State
from molegrad.estimators.inputs import float8_rows, float8_works
from molegrad.steps import Steps

_OWN = ("config", "name", "steps", "_seed", "_setting", "_shared", "_tensors", "_watched")


def int8_scale(m: int, n: int, device=None) -> Tensor:
    """Scales of an int8 matrix (m, n), one for each feature of its wider side; float32 ones."""
    return torch.ones((m, 1) if m >= n else (1, n), device=device)


class MoleLinear(nn.Linear):
    """Drop-in for nn.Linear: x (…, in_features) to (…, out_features).

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear takes them.
        config: default `MoleGradConfig()`; `config.target_layers` has no meaning here.
        name: the layer's name in its model; with `config.seed` it seeds the layer's random numbers,
            and options for single layers go by it.
        shared: what `config.estimator.shared()` made for the layers of a model; None makes one for
            this layer alone.

    Raises:
        ValueError: the estimator's options do not fit the layer.
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
        shared=None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._equip(config or MoleGradConfig(), name, shared)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: MoleGradConfig, name: str = "", shared=None
    ) -> MoleLinear:
        """A MoleLinear that takes over the very parameters, hooks and mode of `linear`."""
        layer = cls.__new__(cls)
        layer.__dict__.update(_own_containers(linear))
        layer._equip(config, name, shared)
        return layer

    def to_linear(self) -> nn.Linear:
        """The nn.Linear with this layer's parameters, hooks and mode; gradients are not kept."""
        linear = nn.Linear.__new__(nn.Linear)
        linear.__dict__.update(_own_containers(self))
        for key in self._tensors:
            linear._buffers.pop(key, None)
            linear._parameters.pop(key, None)
            linear._non_persistent_buffers_set.discard(key)
        for attribute in _OWN:
            linear.__dict__.pop(attribute, None)
        linear.weight.requires_grad_(self.trains)
        return linear

    def _equip(self, config: MoleGradConfig, name: str, shared=None) -> None:
        e, mode = config.estimator, config.gradient_mode
        m, n = self.weight.shape
        k = e.rank_of(m, n, name)
        if e.estimate_rank(k) > min(m, n):
            raise ValueError(
                f"{e.describe(m, n, name)} with method={config.method!r} needs a layer of at least "
                f"{e.estimate_rank(k)} features on both sides, this one is {n} -> {m}: lower "
                "rank_k or leave the layer dense"
            )
        self.config, self.name, self.steps = config, name, Steps()
        self._seed = (config.seed * 1_000_003 + zlib.crc32(name.encode())) % 2**62
        self._setting, self._shared = e.setting(name), shared or e.shared()
        trains, parameters = self.weight.requires_grad, e.sketches(mode)
        tensors = e.new_tensors(self.weight, mode, name)
        if mode == "momentum":
            dtype = getattr(torch, config.momentum_dtype)
            tensors["momentum"] = torch.zeros_like(self.weight.detach(), dtype=dtype)
            if dtype == torch.int8:
                tensors["momentum_scale"] = int8_scale(m, n, device=self.weight.device)
        self._tensors = tuple(tensors)
        for key, tensor in tensors.items():
            if key in parameters:
                self.register_parameter(key, nn.Parameter(tensor, requires_grad=trains))
            elif key in ("momentum", "momentum_scale"):
                self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(key, tensor, persistent=False)
        if parameters:
            self.weight.requires_grad_(False)
        e.watch(self.state)
        self.reset()

    @property
    def state(self) -> State:
        """The layer as its estimator knows it."""
        held = {**self._parameters, **self._buffers}
        tensors = {key: held[key] for key in self._tensors}
        mode = self.config.gradient_mode
        return State(self.weight, mode, self._seed, self.name, tensors, self._setting, self._shared)

    @property
    def rank(self) -> int:
        """k, the number of kept directions now; 0 where the estimate has full rank."""
        return self.config.estimator.rank(self.state)

    @property
    def sketches(self) -> tuple[nn.Parameter, ...]:
        """The parameters that get the gradient in mode "factors"; () in the other modes."""
        names = self.config.estimator.sketches(self.config.gradient_mode)
        return tuple(self._parameters[name] for name in names)

    @property
    def working_parameters(self) -> tuple[nn.Parameter, ...]:
        """Parameters that the layer works with and that are no weights: in no state_dict of the
        model."""
        return tuple(self._parameters[key] for key in self._tensors if key in self._parameters)

    @property
    def trains(self) -> bool:
        """Whether the weight is trained (in mode "factors" its sketches carry that mark)."""
        return all(p.requires_grad for p in self.sketches or (self.weight,))

    @property
    def stepped(self) -> Tensor | None:
        """What an optimizer of `molegrad.optim` has to hold: None in mode "grad"."""
        if self.config.gradient_mode == "momentum":
            return self.momentum
        return self.sketches[-1] if self.sketches else None

    @torch.no_grad()
    def reset(self, draw: int = 0) -> None:
        """Start the estimator's tensors from the seed: 0 as a fresh layer has them, another number
        draws others. `molegrad.monitor.reset_layer` resets an optimizer's state with them."""
        self.config.estimator.reset(self.state, draw)

    def replace(self, **tensors: Tensor) -> None:
        """Other tensors for some of the estimator's buffers, also of another rank.

        Raises:
            ValueError: one is no buffer of this layer, or its features do not fit.
        """
        for key, new in tensors.items():
            old = self._buffers.get(key)
            if old is None or new.dim() != old.dim() or new.shape[:1] != old.shape[:1]:
                kind = "a buffer" if old is None else f"of shape {tuple(old.shape)}"
                raise ValueError(
                    f"layer {self.name or 'MoleLinear'} ({self.in_features} -> "
                    f"{self.out_features}): {key} of shape {tuple(new.shape)} does not fit, it is "
                    f"{'no ' if old is None else ''}{kind} here; the tensors of mode 'factors' "
                    "belong to their optimizer (resize_rank)"
                )
        for key, new in tensors.items():
            setattr(self, key, new.to(self._buffers[key].device, self._buffers[key].dtype))

    def metrics(self) -> dict[str, float]:
        """The estimator's metrics of the last step by name (such as energy_capture, trust_factor,
        condition_number, subspace_drift), nan where one is not known. Waits for the device.

        `molegrad.monitor.LayerMetrics` defines them, reads many layers at once, and has more.
        """
        estimator = self.config.estimator
        stats = estimator.stats(self.state)
        values = {} if stats is None else dict(zip(estimator.STATS, stats.tolist(), strict=True))
        return estimator.metrics(values)

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.trains):
            return F.linear(input, self.weight, self.bias)
        c = self.config
        if c.gradient_mode != "grad" and not torch.compiler.is_compiling():
            self.steps.expect(self, input.device.type)
        saved = (None, None)
        if c.saved_inputs == "fp8":
            device = input.device.type
            if not c.estimator.reads_float8 or float8_works(device):
                saved = float8_rows(input)
        return c.estimator.forward(input, self.bias, saved, self.state)

    def extra_repr(self) -> str:
        c = self.config
        what = c.estimator.describe(self.out_features, self.in_features, self.name)
        return f"{super().extra_repr()}, {what}, method={c.method}, gradient_mode={c.gradient_mode}"

    # The estimator's tensors are working state, not weights: the state_dict stays nn.Linear's in
    # both directions.

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in self._tensors:
            destination.pop(prefix + key, None)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ours = {prefix + key for key in self._tensors}
        missing_keys[:] = [key for key in missing_keys if key not in ours]

    def _apply(self, fn, recurse=True):
        """Follow the weight to another device or dtype, but keep the dtypes that the estimator and
        the momentum have."""
        before = {key: tensor.detach() for key, tensor in self.state.tensors.items()}
        super()._apply(fn, recurse)
        dtypes = {
            **self.config.estimator.dtypes(self.weight),
            "momentum_scale": torch.float32,
            "momentum": getattr(torch, self.config.momentum_dtype),
        }
        materialised = False
        for key, old in before.items():
            now = getattr(self, key)
            wanted = dtypes.get(key, old.dtype)
            if old.is_meta and not now.is_meta:
                now.data = torch.zeros_like(now, dtype=wanted)
                materialised = True
            elif now.dtype != wanted:
                now.data = old.to(device=now.device, dtype=wanted)
        if materialised:
            self.reset()
        return self

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.config.estimator.watch(self.state)


def _own_containers(module: nn.Module) -> dict:
    """A module's attributes with its dictionaries copied, so that two modules can share tensors."""
    return {
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in module.__dict__.items()
    }
