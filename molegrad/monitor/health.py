"""Health checks: subspaces and momenta that went wrong, found in metrics that were read anyway.

    health = Health(model, optimizers, parse_actions("frozen=reset,nan=raise"))
    findings = health.check(step, metrics)   # {layer: {metric: value}}, of `LayerMetrics.read`
                                             # joined with those of `device_checks`

| kind | a bad reading | it counts |
|---|---|---|
| nan | NaN or Inf in a basis, momentum, optimizer's state, weight or norm | at once |
| exploding | a norm far above its median | at once |
| degenerate | directions without gradient; sampled: nothing taken, or too much noise | in a row |
| frozen | the subspace does not turn | in a row |
| orthogonality | VᵀV is not I | at once |

What is done about a finding is set for each kind: nothing ("off"), a message ("warn"; once, and
another one when it is over), new bases ("reset") or an end of the run ("raise").

Why: each of these goes unnoticed for hours in the loss. `molegrad.gpt.train.guard` stops a run at
the gradient that is not finite; this looks at what lasts from step to step. It works on numbers on
the host: nothing waits for the device but a reset.

A reset draws the layer's bases from the seed and the step. With gradient_mode "factors" the
optimizer's momentum and moments are expressed in the bases and start again with them. In the other
modes they do not depend on the bases and are dropped only where they are at fault, with "nan" and
"exploding".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from molegrad.linear import MoleLinear
from molegrad.monitor.rules import RULES, HealthThresholds, History
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
_WORDS = {"nan": "not finite", "orthogonality": "without an orthonormal basis"}


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
    for word in filter(None, (word.strip() for word in text.split(","))):
        kind, equals, action = (part.strip() for part in word.partition("="))
        if not equals:
            kind, action = "all kinds", kind
        elif kind not in KINDS:
            raise ValueError(
                f"health={text!r}: {kind!r} is no kind of finding; there are {', '.join(KINDS)}"
            )
        if action not in ACTIONS and (equals or action != "default"):
            raise ValueError(
                f"health={text!r}: {action!r} is no action; give one of {', '.join(ACTIONS)} as "
                "KIND=ACTION, or alone, as default, for all kinds"
            )
        if kind in chosen:
            raise ValueError(f"health={text!r} names {kind} twice: give one action for it")
        chosen[kind] = action
    general = chosen.pop("all kinds", "default")
    start = DEFAULT_ACTIONS if general == "default" else dict.fromkeys(KINDS, general)
    return {**start, **chosen}


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


class Health:
    """Looks at the metrics of the converted layers of `model`, and acts.

    Args:
        optimizers: of the model; a reset makes their state fit.
        actions: from `parse_actions`.
        thresholds: see `HealthThresholds`.
        say: prints a line. With several data-parallel processes only the first should, and all must
            be given the same metrics, so that a reset happens on all of them.

    Raises:
        ValueError: an action is unknown, or a reset would miss the optimizer of a layer's bases.
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
                if layer.sketches and layer.trains:
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
        """Restore what `state_dict` returned; layers that it does not know start afresh.

        Raises:
            ValueError: it has layers that the model has not.
        """
        unknown = sorted(state["layers"].keys() - self._layers.keys())
        if unknown:
            raise ValueError(
                f"health histories of layers that this model has not: {', '.join(unknown)}; resume "
                "with the --streaming_target_layers that they were saved with"
            )
        self._history |= {name: History(**saved) for name, saved in state["layers"].items()}

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
                f"health: step {step}: layer {name} is {_WORDS.get(kind, kind)}: {problem.what}"
                + (f", in {count} readings in a row" if kind in _PATIENT else "")
                + f". {_deed(layer, kind, action)}. Remedy: {problem.remedy}."
            )
            findings.append(Finding(step, name, kind, dict(problem.values), action, message))
        history.note(values, self.thresholds.window)
        return findings


def reset_layer(
    layer: MoleLinear,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    draw: int = 0,
    momentum: bool = False,
) -> None:
    """New bases for a layer, between two steps, and an optimizer's state that fits them.

    Args:
        draw: another number draws other bases (see `MoleLinear.reset`).
        momentum: drop the momentum and the optimizer's state in every mode; with gradient_mode
            "factors", where they are expressed in the bases, this happens anyway.

    Raises:
        ValueError: the layer has gradient_mode "factors" and none of `optimizers` has its bases.
    """
    optimizers = list(optimizers)
    owner = _owner(layer, optimizers) if layer.sketches else None
    layer.reset(draw)
    tensors = layer.state.tensors
    if "stats" in tensors:
        tensors["stats"].fill_(float("nan"))
    if owner is not None:
        owner.restart(*layer.sketches)
    elif momentum:
        for optimizer in optimizers:
            optimizer.state.pop(layer.weight, None)
        for key, start in (("momentum", 0), ("momentum_scale", 1)):
            if key in tensors:
                tensors[key].detach().fill_(start)


def _owner(layer: MoleLinear, optimizers: Iterable[torch.optim.Optimizer]) -> FactoredOptimizer:
    for optimizer in optimizers:
        held = (p for group in optimizer.param_groups for p in group["params"])
        if isinstance(optimizer, FactoredOptimizer) and any(p is layer.stepped for p in held):
            return optimizer
    raise ValueError(
        f"layer {layer.name or 'MoleLinear'} has gradient_mode='factors' and none of the given "
        "optimizers has its bases, so that a reset cannot make their state fit: give the optimizer "
        "of molegrad.optim that trains it, or choose another action than reset"
    )


def _deed(layer: MoleLinear, kind: str, action: str) -> str:
    """What an action does, in words."""
    if action == "warn":
        return "Nothing is changed"
    if action == "raise":
        return "The run stops"
    if not layer.rank:
        return "Its momentum is dropped"
    drops = layer.sketches or kind in _AT_FAULT
    return "Its bases are drawn again" + (" and its momentum is dropped" if drops else "")
