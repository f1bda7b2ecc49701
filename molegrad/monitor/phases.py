"""Times of the phases of a training step, taken without making the host wait.

timer = PhaseTimer(device)
with timer("forward"):
    ...
timer.step()
timer.read()  # {"time/forward_ms": ...}, a mean over the steps since the last read
"""

from __future__ import annotations

import time
from collections import defaultdict

import torch

_PENDING = 1024  # intervals that may wait for `read` before finished ones are looked for


class PhaseTimer:
    """Adds up the time of each phase.

    On the CPU a phase takes the host's time. On CUDA it takes the device's, between events on the
    current stream, so that host work which the device does not wait for counts as nothing. Of
    phases inside one another, each moment belongs to the innermost.

    Args:
        device: whose time is taken.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._clock = _Events(device) if device.type == "cuda" else _Host()
        self._phases: dict[str, _Phase] = {}
        self._inside: list[str] = []  # the phases that are open, the innermost last
        self._since = None  # the mark at which the innermost one went on
        self._steps = 0

    def __call__(self, phase: str) -> _Phase:
        """A context manager; what it encloses is time of `phase`, any text."""
        known = self._phases.get(phase)
        if known is None:
            known = self._phases[phase] = _Phase(self, phase)
        return known

    def step(self) -> None:
        """Count a step."""
        self._steps += 1
        self._clock.collect()

    def read(self) -> dict[str, float]:
        """{"time/PHASE_ms": milliseconds per step} since the last read, by each phase's first use;
        {} where no step was counted. On CUDA it waits for the last event."""
        if self._inside:  # the open phase so far; what follows is of the next read
            self._turn()
        seconds = self._clock.read()
        steps, self._steps = self._steps, 0
        if not steps:
            return {}
        return {
            f"time/{phase}_ms": 1e3 * seconds[phase] / steps
            for phase in self._phases
            if phase in seconds
        }

    def _turn(self) -> None:
        """Give the time since the last mark to the phase it belongs to, and mark anew."""
        now = self._clock.mark()
        if self._inside:
            self._clock.add(self._inside[-1], self._since, now)
        self._since = now

    def _enter(self, phase: str) -> None:
        self._turn()
        self._inside.append(phase)

    def _leave(self) -> None:
        self._turn()
        self._inside.pop()


class _Phase:
    """`with` on a phase; it holds nothing, so that one object serves every use of the phase."""

    __slots__ = ("_name", "_timer")

    def __init__(self, timer: PhaseTimer, name: str) -> None:
        self._timer, self._name = timer, name

    def __enter__(self) -> None:
        self._timer._enter(self._name)

    def __exit__(self, *exception) -> None:
        self._timer._leave()


class _Host:
    """The host's clock."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    mark = staticmethod(time.perf_counter)

    def add(self, phase: str, start: float, end: float) -> None:
        self._seconds[phase] += end - start

    def collect(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the last read."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds


class _Events:
    """The device's clock: events, used again once the time between them is known."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._intervals: list[tuple] = []  # (phase, first event, last event), in order
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, phase: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._intervals.append((phase, start, end))

    def collect(self) -> None:
        """Where many intervals have piled up, resolve those that are over; waits for nothing."""
        if len(self._intervals) > _PENDING:
            over = 0
            while over < len(self._intervals) and self._intervals[over][2].query():
                over += 1
            self._resolve(over)

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the last read; waits for the last event."""
        if self._intervals:
            self._intervals[-1][2].synchronize()
        self._resolve(len(self._intervals))
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds

    def _resolve(self, count: int) -> None:
        resolved, self._intervals = self._intervals[:count], self._intervals[count:]
        for index, (phase, start, end) in enumerate(resolved):
            self._seconds[phase] += start.elapsed_time(end) / 1e3
            self._free.append(start)
            # The next interval, which may not be here yet, may start where this one ends.
            if index + 1 < count and resolved[index + 1][1] is not end:
                self._free.append(end)
