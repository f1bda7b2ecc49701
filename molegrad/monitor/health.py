"""Health checks: subspaces and momenta that went wrong, found in metrics that were read anyway.

    names, scalars = device_checks(model, optimizers)      # join the transfer of the metrics
    health = Health(model, optimizers, parse_actions("frozen=reset,nan=raise"))
    findings = health.check(step, metrics)                 # {layer: {metric: value}}

| kind | methods "tangent" and "power" | method "sampled" |
|---|---|---|
| nan | NaN or Inf in basis, state, weight, norm | the same; it has no basis |
| exploding | a norm far above its median | the same, of the momentum |
| degenerate | directions without gradient | nothing is sampled, or too much noise |
| frozen | the subspace does not turn | has none |
| orthogonality | VᵀV is not I | has no basis |

Method "projected" has a basis, as the former, and a sample, as the latter: whether it is degenerate
goes by the sample, as an estimate with the right mean needs no direction of the basis.

What is done about a finding is set for each kind: nothing ("off"), a message ("warn"; once, and
another one when it is over), new bases ("reset") or an end of the run ("raise").

Why: each of these goes unnoticed for hours in the loss. `molegrad.gpt.train.guard` stops a run at the
gradient that is not finite; this looks at what lasts from step to step. Everything here works on
numbers on the host: nothing waits for the device but a reset that `check` decides on.

A reset draws the layer's bases anew, from the seed and the step. In factored mode the optimizer's
momentum and moments are expressed in the bases, hence they start anew too. In the other modes they
do not depend on the bases and are dropped only where they are at fault, with "nan" and "exploding".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molegrad.linear import MoleLinear
from molegrad.monitor.health_rules import RULES, HealthThresholds, History
from molegrad.optim.factored import FactoredOptimizer

KINDS = tuple(RULES)
ACTIONS = ("off", "warn", "reset", "raise")
DEFAULT_ACTIONS = {
    "nan": "raise",
    "exploding": "warn",
    "degenerate": "warn",
    "frozen": "warn",
    "orthogonality": "reset",
}
_PATIENT = ("degenerate", "frozen")  # one reading says little about these
_AT_FAULT = ("nan", "exploding")  # kinds whose reset drops the momentum in every mode
_WORDS = {
    "nan": "not finite",
    "exploding": "exploding",
    "degenerate": "degenerate",
    "frozen": "frozen",
    "orthogonality": "without an orthonormal basis",
}


def parse_actions(text: str | Mapping[str, str]) -> dict[str, str]:
    """{kind: action} for every kind, from "KIND=ACTION,..." or such a mapping.

    An ACTION alone is for all kinds, "default" stands for `DEFAULT_ACTIONS`: "frozen=reset" changes
    one of these, "off,nan=raise" leaves one check.

    Raises:
        ValueError: a kind or an action is unknown or a kind is named twice.
    """
    if isinstance(text, Mapping):
        text = ",".join(f"{kind}={action}" for kind, action in text.items())
    chosen: dict[str, str] = {}
    general = None
    for word in filter(None, (word.strip() for word in text.split(","))):
        kind, equals, action = (part.strip() for part in word.partition("="))
        if not equals:
            if general is not None:
                raise ValueError(f"health={text!r} names two actions for all kinds: give one")
            general = kind
            if kind not in (*ACTIONS, "default"):
                raise ValueError(
                    f"health={text!r}: {kind!r} is no action; give one of {', '.join(ACTIONS)} or "
                    f"default for all kinds, or KIND=ACTION with KIND of {', '.join(KINDS)}"
                )
            continue
        if kind not in KINDS:
            raise ValueError(
                f"health={text!r}: {kind!r} is no kind of finding; there are {', '.join(KINDS)}"
            )
        if action not in ACTIONS:
            raise ValueError(
                f"health={text!r}: {action!r} is no action; there are {', '.join(ACTIONS)}"
            )
        if kind in chosen:
            raise ValueError(f"health={text!r} names {kind} twice: give one action for it")
        chosen[kind] = action
    if general in (None, "default"):
        return {**DEFAULT_ACTIONS, **chosen}
    return {**dict.fromkeys(KINDS, general), **chosen}


@dataclass(frozen=True)
class Finding:
    """What is wrong with a layer at a step, the numbers that say so and what is done about it."""

    step: int
    layer: str
    kind: str
    values: dict[str, float]
    action: str
    message: str

    def record(self) -> dict[str, Any]:
        """A line of health.jsonl; its values may be inf or nan."""
        return dataclasses.asdict(self)


class HealthError(RuntimeError):
    """Training stopped because of a finding whose action is "raise"."""


@torch.no_grad()
def device_checks(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> tuple[list[tuple[str, str]], Tensor]:
    """What the other metrics do not tell: numbers that are not finite, and momenta's norms.

    Nothing waits for the device, so that the scalars can join a transfer that is made anyway.

    Returns:
        (layer name, metric) pairs and their values, float32, on the device of the first layer:
        basis_nonfinite, state_nonfinite (momentum and optimizer's state) and weight_nonfinite, 1 or
        0, of every layer, and momentum_norm of those that have one.
    """
    names: list[tuple[str, str]] = []
    rows: list[Tensor] = []
    optimizers = list(optimizers)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoleLinear)}
    for name, layer in layers.items():
        held = (layer.weight, layer.basis_u, layer.basis_v)
        states = [o.state[p] for o in optimizers for p in held if p in o.state]
        own = {} if layer.momentum is None else {"momentum_buffer": layer.momentum}
        if layer.momentum_scale is not None:
            own["momentum_scale"] = layer.momentum_scale
        # "stats" are nan where unknown, and "basis" is the basis itself.
        state = own | {k: t for s in states for k, t in s.items() if k not in ("stats", "basis")}
        for part, tensors in (
            ("basis", [layer.basis_u, layer.basis_v]),
            ("state", [t for t in state.values() if isinstance(t, Tensor)]),
            ("weight", [layer.weight]),
        ):
            names.append((name, f"{part}_nonfinite"))
            rows.append(_nonfinite(tensors, layer.weight.device))
        keys = ("momentum_buffer", "core", "exp_avg")
        momentum = next((state[k] for k in keys if state.get(k) is not None), None)
        if momentum is not None:
            value = momentum.float()  # the bases are orthonormal: a core has the momentum's norm
            if "momentum_scale" in state:
                value = value * state["momentum_scale"]
            names.append((name, "momentum_norm"))
            rows.append(torch.linalg.vector_norm(value))
    if not rows:
        return [], torch.zeros(0)
    return names, torch.stack([row.to(rows[0].device, torch.float32) for row in rows])


def _nonfinite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """1 where one of the tensors holds NaN or Inf, else 0 (scalar on `device`)."""
    tensors = [t for t in tensors if t.is_floating_point() and t.numel()]
    if not tensors:
        return torch.zeros((), device=device)
    largest = torch._foreach_norm(tensors, math.inf)
    bad = [~norm.to(device).isfinite() for norm in largest]
    return torch.stack(bad).any().float()


def reset_layer(
    layer: MoleLinear,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    draw: int = 0,
    momentum: bool = False,
) -> None:
    """New bases for a layer, between two steps, and an optimizer's state that fits them.

    Args:
        draw: another number draws other bases (see `MoleLinear.reset_bases`).
        momentum: drop the momentum and the optimizer's state in every mode; in factored mode, where
            they are expressed in the bases, this happens anyway.

    Raises:
        ValueError: the layer is in factored mode and none of `optimizers` has its bases.
    """
    optimizers = list(optimizers)
    factored = layer.config.gradient_mode == "factors"
    owner = _owner(layer, optimizers) if factored else None
    layer.reset_bases(draw)
    layer.stats.fill_(math.nan)
    if owner is not None:
        owner.restart(layer.basis_u, layer.basis_v)
    elif momentum:
        for optimizer in optimizers:
            optimizer.state.pop(layer.weight, None)
        if layer.momentum is not None:
            layer.momentum.detach().zero_()
        if layer.momentum_scale is not None:
            layer.momentum_scale.detach().fill_(1.0)


def _owner(layer: MoleLinear, optimizers: Iterable[torch.optim.Optimizer]) -> FactoredOptimizer:
    for optimizer in optimizers:
        held = (p for group in optimizer.param_groups for p in group["params"])
        if isinstance(optimizer, FactoredOptimizer) and any(p is layer.basis_v for p in held):
            return optimizer
    raise ValueError(
        f"layer {layer.name or 'MoleLinear'} is in factored mode and none of the given optimizers "
        "has its bases, so that a reset cannot make their state fit: give the optimizer of "
        "molegrad.optim that trains it, or choose another action than reset"
    )


class Health:
    """Looks at the metrics of the converted layers of `model`, and acts.

    Args:
        optimizers: of the model; a reset makes their state fit.
        actions: from `parse_actions`.
        thresholds: see `HealthThresholds`.
        say: prints a line. With several data-parallel processes only the first should, and all must
            be given the same metrics, so that a reset happens on all of them.

    Raises:
        ValueError: an action is unknown, or a reset would miss the optimizer of a factored layer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        actions: str | Mapping[str, str] = "default",
        thresholds: HealthThresholds | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.actions = parse_actions(actions)
        self.thresholds = thresholds or HealthThresholds()
        self._optimizers = list(optimizers)
        self._say = say
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, MoleLinear)}
        self._history = {name: History() for name in self._layers}
        self._cleared: list[str] = []
        if "reset" in self.actions.values():
            for layer in self._layers.values():
                if layer.config.gradient_mode == "factors" and layer.trains:
                    _owner(layer, self._optimizers)

    def check(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> list[Finding]:
        """`find`, then `act`."""
        findings = self.find(step, metrics)
        self.act(findings)
        return findings

    def find(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> list[Finding]:
        """Every finding of this reading; changes nothing but the histories.

        Args:
            step: completed steps.
            metrics: {layer: {metric: value}}; a metric that is nan or missing is not judged.

        Raises:
            ValueError: a name is none of a converted layer.
        """
        findings: list[Finding] = []
        for name, values in metrics.items():
            if name not in self._layers:
                raise ValueError(
                    f"metrics name a layer {name!r} that the model has not; its converted layers "
                    f"are {', '.join(self._layers) or 'none'}"
                )
            if self._layers[name].trains:
                findings += self._look(step, name, values)
        return findings

    def act(self, findings: Iterable[Finding]) -> None:
        """Print what is new or over, reset what is to be reset, then raise.

        Raises:
            HealthError: for the findings whose action is "raise".
        """
        findings = list(findings)
        for line in self._cleared:
            self._say(line)
        self._cleared = []
        resets: dict[str, list[Finding]] = {}
        for finding in findings:
            new = self._history[finding.layer].since.get(finding.kind) == finding.step
            if finding.action == "reset" or (finding.action == "warn" and new):
                self._say(finding.message)
            if finding.action == "reset":
                resets.setdefault(finding.layer, []).append(finding)
        for name, found in resets.items():
            faulty = any(finding.kind in _AT_FAULT for finding in found)
            reset_layer(self._layers[name], self._optimizers, found[0].step, momentum=faulty)
            self._history[name] = History(since=self._history[name].since)
        fatal = [finding.message for finding in findings if finding.action == "raise"]
        if fatal:
            raise HealthError("\n".join(fatal))

    def state_dict(self) -> dict[str, Any]:
        """The histories, JSON-able: a resumed run finds with them what the whole one does."""
        return {"layers": {name: dataclasses.asdict(h) for name, h in self._history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; layers that it does not know start anew.

        Raises:
            ValueError: it has layers that the model has not.
        """
        unknown = sorted(state["layers"].keys() - self._layers.keys())
        if unknown:
            raise ValueError(
                f"health histories of layers that this model has not: {', '.join(unknown)}; resume "
                "with the --streaming_target_layers that they were saved with"
            )
        for name, saved in state["layers"].items():
            self._history[name] = History(
                {key: [float(v) for v in values] for key, values in saved["norms"].items()},
                dict(saved["counts"]),
                dict(saved["since"]),
                bool(saved["nonzero"]),
            )

    def _look(self, step: int, name: str, values: Mapping[str, float]) -> list[Finding]:
        layer, history, findings = self._layers[name], self._history[name], []
        for kind in KINDS:
            action = self.actions[kind]
            if action == "off":
                continue
            problem = RULES[kind](layer, values, history, self.thresholds)
            if problem is None:
                history.counts.pop(kind, None)
                since = history.since.pop(kind, None)
                if since is not None:
                    self._cleared.append(
                        f"health: step {step}: layer {name} has recovered from the finding "
                        f"{kind!r} of step {since}"
                    )
                continue
            count = history.counts[kind] = history.counts.get(kind, 0) + 1
            if count < (self.thresholds.patience if kind in _PATIENT else 1):
                continue
            history.since.setdefault(kind, step)
            if action == "reset":
                action = problem.instead_of_reset or action
            message = (
                f"health: step {step}: layer {name} is {_WORDS[kind]}: {problem.what}"
                + (f", in {count} readings in turn" if kind in _PATIENT else "")
                + f". {_deed(layer, kind, action)}. Remedy: {problem.remedy}."
            )
            findings.append(Finding(step, name, kind, dict(problem.values), action, message))
        history.note(values, self.thresholds.window)
        return findings


def _deed(layer: MoleLinear, kind: str, action: str) -> str:
    """What an action does, in words."""
    if action == "warn":
        return "Nothing is changed"
    if action == "raise":
        return "The run stops"
    if not layer.rank:
        return "Its momentum is dropped"
    drops = layer.config.gradient_mode == "factors" or kind in _AT_FAULT
    return "Its bases are drawn anew" + (" and its momentum is dropped" if drops else "")
