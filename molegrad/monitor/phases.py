"""Times of the phases of a training step, taken without making the host wait.

timer = PhaseTimer(device)
with timer("forward"):
    ...
timer.step()
timer.read()  # {"time/forward_ms": ...}, a mean over the steps since the last read
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch


class PhaseTimer:
    """Adds up the time of each phase.

    On the CPU a phase takes the host's time. On CUDA it takes the device's, between events on the
    current stream, so that host work which the device does not wait for counts as nothing. Of
    phases inside one another, each moment belongs to the innermost. Every phase leaves two marks
    until the next `read`.

    Args:
        device: whose time is taken.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._marks: list[tuple[Any, str | None]] = []  # a moment, and the phase that it begins
        self._inside: list[str] = []  # the phases that are open, the innermost last
        self._order: dict[str, None] = {}  # of the phases' first use
        self._free: list[torch.cuda.Event] = []
        self._steps = 0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """What the context encloses is time of `phase`, any text."""
        self._order.setdefault(phase)
        self._inside.append(phase)
        self._mark()
        try:
            yield
        finally:
            self._inside.pop()
            self._mark()

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """{"time/PHASE_ms": milliseconds per step} since the last read, by each phase's first use;
        {} where no step was counted. On CUDA it waits for the last event."""
        self._mark()  # an open phase so far; what follows is of the next read
        marks, self._marks = self._marks, self._marks[-1:]
        if self._device.type == "cuda":
            marks[-1][0].synchronize()
            self._free += [event for event, _ in marks[:-1]]
        seconds: dict[str, float] = defaultdict(float)
        for (start, phase), (end, _) in zip(marks, marks[1:], strict=False):
            if phase is not None:
                seconds[phase] += self._seconds(start, end)
        steps, self._steps = self._steps, 0
        return {
            f"time/{phase}_ms": 1e3 * seconds[phase] / steps
            for phase in self._order
            if phase in seconds and steps
        }

    def _mark(self) -> None:
        if self._device.type == "cuda":
            now = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
        else:
            now = time.perf_counter()
        self._marks.append((now, self._inside[-1] if self._inside else None))

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
