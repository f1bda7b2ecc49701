"""Instruments of a training run: layer metrics, shadow layers, health checks and phase times.

    instruments.begin(step, metrics=True, shadow=False)    # what is due at this step
    for every micro-batch:
        instruments.micro_batch(lambda: model(inputs, targets) / micro_batches)
        ... forward and backward pass ...
    instruments.backward_done()
    ... optimizer's step, zero_grad ...
    record |= instruments.read()                           # waits for the device

At a step where nothing is due, all of this costs the notes of the phase timer. Where something is
due, the device is waited for in `read` alone, where the loop waits for the loss anyway.

`read` gives flat numbers for the log: `streaming/METRIC` over all converted layers,
`layer/NAME/METRIC` of each, `shadow/METRIC` and `shadow/NAME/METRIC`, `health/findings`. Spectra
and findings go to shadow.jsonl and health.jsonl in the run's folder, one JSON object a line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molegrad.linear import MoleLinear
from molegrad.monitor.health import Health
from molegrad.monitor.metrics import LayerMetrics, aggregate, device_checks
from molegrad.monitor.phases import PhaseTimer
from molegrad.monitor.shadow import Shadow

SHADOW_RECORDS = "shadow.jsonl"
HEALTH_RECORDS = "health.jsonl"


class Instruments:
    """What watches a training run.

    Args:
        model: the bare model, converted or not; without converted layers only phases are timed.
        optimizers: of the model; they hold the state of layers whose gradients are factors.
        shadow: compares estimates with true gradients at the steps that `begin` says; None: never.
        health: looks at the metrics wherever they are read; None: never.
        folder: for shadow.jsonl and health.jsonl; None writes neither.
        per_layer: whether `read` gives each layer's metrics beside the aggregated ones.
        device: where the phases are timed; the model's own by default.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        shadow: Shadow | None = None,
        health: Health | None = None,
        folder: Path | None = None,
        per_layer: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self._model, self._optimizers = model, list(optimizers)
        converted = any(isinstance(module, MoleLinear) for module in model.modules())
        self.metrics = LayerMetrics(model, self._optimizers) if converted else None
        self.shadow, self.health = shadow, health
        self.folder = None if folder is None else Path(folder)
        self.per_layer = per_layer
        device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
        self.timer = PhaseTimer(device)
        self._step = 0
        self._metrics_due = self._shadow_due = False

    def begin(self, step: int, metrics: bool, shadow: bool) -> None:
        """Step number `step` (the first is 1) starts; whether its metrics and shadow are due."""
        self._step = step
        self._metrics_due = metrics and self.metrics is not None
        self._shadow_due = shadow and self.shadow is not None
        if self._metrics_due:
            with self.timer("monitor"):
                self.metrics.snapshot()
        if self._shadow_due:
            with self.timer("shadow"):
                self.shadow.begin()

    def micro_batch(self, loss: Callable[[], Tensor]) -> None:
        """Before the forward pass of a micro-batch; `loss` runs one, divided by their number."""
        if self._shadow_due:
            with self.timer("shadow"):
                self.shadow.observe(loss)

    def backward_done(self) -> None:
        """After the last backward pass of the step, before anything changes the gradients."""
        if self._shadow_due:
            with self.timer("shadow"):
                self.shadow.compare()
        if self._metrics_due:
            with self.timer("monitor"):
                self.metrics.after_backward()

    def read(self) -> dict[str, float]:
        """What was due at this step, by name; {} where nothing was. Waits for the device.

        Raises:
            HealthError: a finding whose action is to raise.
        """
        values: dict[str, float] = {}
        if self._shadow_due:
            with self.timer("shadow"):
                values |= self._read_shadow()
        if self._metrics_due:
            with self.timer("monitor"):
                values |= self._read_metrics()
        self._metrics_due = self._shadow_due = False
        return values

    def state_dict(self) -> dict:
        """What a resumed run needs to find the same; JSON-able."""
        return {} if self.health is None else {"health": self.health.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if self.health is not None and "health" in state:
            self.health.load_state_dict(state["health"])

    def forget_after(self, step: int) -> None:
        """Drop the records of later steps: a resumed run will make them again."""
        for name in (SHADOW_RECORDS, HEALTH_RECORDS):
            path = None if self.folder is None else self.folder / name
            if path is not None and path.exists():
                kept = read_records(path, up_to=step)
                path.write_text("".join(map(line_of, kept)), encoding="utf-8")

    def _read_shadow(self) -> dict[str, float]:
        layers = self.shadow.read()
        self._append(SHADOW_RECORDS, self.shadow.records())
        return _named("shadow", _means(layers)) | _per_layer("shadow", layers)

    def _read_metrics(self) -> dict[str, float]:
        layers = self.metrics.read()
        values = _named("streaming", aggregate(layers))
        if self.per_layer:
            values |= _per_layer("layer", layers)
        if self.health is not None:
            checked = device_checks(self._model, self._optimizers)
            # Written before an action that ends the run.
            findings = self.health.find(
                self._step, {name: known | checked[name] for name, known in layers.items()}
            )
            self._append(HEALTH_RECORDS, [finding.record() for finding in findings])
            values["health/findings"] = len(findings)
            self.health.act(findings)
        return values

    def _append(self, name: str, records: list[dict]) -> None:
        if self.folder is None or not records:
            return
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(line_of({"step": self._step, **record}) for record in records)


def line_of(record: Mapping[str, Any]) -> str:
    """A record as a line of a .jsonl file. JSON has no NaN and Inf: "nan", "inf" and "-inf" stand
    for them."""

    def safe(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: safe(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [safe(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(safe(record), allow_nan=False) + "\n"


def read_records(path: Path, up_to: float = math.inf) -> list[dict]:
    """The records of a .jsonl file; [] where there is none. A half-written last line (a killed run)
    is left out, and so are the records of steps after `up_to`, where that is given."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    if up_to < math.inf:
        records = [record for record in records if record["step"] <= up_to]
    return records


def _means(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of every metric over the layers that know it."""
    known: dict[str, list[float]] = {}
    for metrics in layers.values():
        for key, value in metrics.items():
            if math.isfinite(value):
                known.setdefault(key, []).append(value)
    return {key: math.fsum(values) / len(values) for key, values in known.items()}


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{key}": value for key, value in values.items() if math.isfinite(value)}


def _per_layer(prefix: str, layers: dict[str, dict[str, float]]) -> dict[str, float]:
    named = {}
    for name, metrics in layers.items():
        named |= _named(f"{prefix}/{name}", metrics)
    return named
