"""What ends a run early: numbers that are not finite, and signals.

What: `NonFiniteGuard.update` notes, per parameter, the first step whose gradient was not finite;
`report` says which ones. Nothing waits for the device until `report`'s caller reads the loss.
`StopSignals` takes Ctrl-C and SIGTERM as a wish to stop at the next moment at which all that was
done can be kept.

Why: a run that goes on after a NaN trains nothing for hours. The report names the layers in which
it began, which by the next step can no longer be seen: then everything is NaN.
"""

import json
import math
import signal
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from molegrad.linear import MoleLinear

REPORT = "nan_report.json"


class NonFiniteError(RuntimeError):
    """Training stopped because the loss or a gradient is NaN or infinite."""


class NonFiniteGuard:
    """Watches the gradients of `model`; keeps the last losses for the report."""

    def __init__(self, model: nn.Module, history: int = 20):
        momenta = {}
        for name, layer in model.named_modules():
            if isinstance(layer, MoleLinear) and "momentum" in layer.state.tensors:
                # An int8 momentum that is not finite has a scale that is not.
                tensors = layer.state.tensors
                momentum = tensors.get("momentum_scale", tensors["momentum"])
                momenta[f"{name}.momentum"] = momentum
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        named += momenta.items()  # there the gradients go that exist nowhere else
        self.names = [name for name, _ in named]
        self._params = [p for _, p in named]
        self._momenta = {id(p) for p in momenta.values()}
        self._weights = dict(model.named_parameters())
        device = self._params[0].device
        self._first = torch.full((len(named),), -1, dtype=torch.int64, device=device)
        self.losses: deque[tuple[int, float]] = deque(maxlen=history)

    @torch.no_grad()
    def update(self, step: int) -> Tensor:
        """Look at the gradients of this step; a 0-dim bool on the device: all finite so far.

        A norm that overflows float32 counts as not finite.
        """
        gradients = [self._gradient(p) for p in self._params]
        taken = iter(torch._foreach_norm([g for g in gradients if g is not None]))
        one = self._first.new_ones((), dtype=torch.float32)
        values = torch.stack([one if g is None else next(taken).float() for g in gradients])
        bad = ~values.isfinite()
        self._first = torch.where(bad & (self._first < 0), step, self._first)
        return (self._first < 0).all()

    def _gradient(self, p: Tensor) -> Tensor | None:
        return p if id(p) in self._momenta else p.grad

    def report(self, step: int, loss: float, learning_rates: dict[str, float]) -> dict:
        """What is not finite, JSON-able; reads from the device."""
        first = self._first.tolist()
        steps = [s for s in first if s >= 0]
        gradients = [
            {"name": name, "first_step": s, **_count(self._gradient(p))}
            for name, s, p in zip(self.names, first, self._params, strict=True)
            if s >= 0
        ]
        weights = [
            {"name": name, **_count(p)}
            for name, p in self._weights.items()
            if not bool(p.isfinite().all())
        ]
        return {
            "step": step,
            "first_step": min(steps, default=step),
            "loss": _text(loss),
            "gradients": sorted(gradients, key=lambda entry: entry["first_step"]),
            "weights": weights,
            "learning_rates": learning_rates,
            "last_losses": [[s, _text(value)] for s, value in self.losses],
        }


def stop(report: dict, folder: Path) -> None:
    """Write nan_report.json into `folder` and raise `NonFiniteError` with the gist of it."""
    path = Path(folder) / REPORT
    path.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    names = [entry["name"] for entry in report["gradients"]]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise NonFiniteError(
        f"step {report['step']}: loss {report['loss']}; gradients that are not finite: "
        f"{shown or 'none'} (first at step {report['first_step']}). The report is in {path}. "
        "Lower the learning rates, set --grad-clip=1, or resume from the last checkpoint"
    )


def _count(tensor: Tensor | None) -> dict[str, int]:
    if tensor is None:
        return {"nan": 0, "inf": 0, "numbers": 0}
    return {
        "nan": int(tensor.isnan().sum()),
        "inf": int(tensor.isinf().sum()),
        "numbers": tensor.numel(),
    }


def _text(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


class StopSignals:
    """Notes SIGINT and SIGTERM while it is entered, on the main thread alone: no other may set
    handlers. A second signal has its usual effect.

    Attributes:
        stop: the number of the signal that came, 0 before; may be set by hand, to stop for another
            reason.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.stop = 0
        self._say = say
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def _note(self, number: int, frame) -> None:
        self.stop = number
        self._restore()
        name = signal.Signals(number).name
        self._say(f"{name}: finishing what is under way, then stopping (again to quit)")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
