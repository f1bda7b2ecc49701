from types import SimpleNamespace

import pytest
import torch

from molegrad.monitor import PhaseTimer
from molegrad.monitor import phases as module


class Clock:
    """A host that has time only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def passes(self, seconds):
        self.now += seconds


def test_times_are_means_over_the_steps_since_the_last_read(monkeypatch):
    clock, timer = Clock(monkeypatch), PhaseTimer("cpu")
    for forward in (2.0, 4.0):
        for _ in range(2):  # micro-batches add up
            with timer("forward"):
                clock.passes(forward)
            clock.passes(100)  # of no phase
            with timer("backward"):
                clock.passes(1)
        timer.step()
    values = timer.read()
    assert values == {"time/forward_ms": 6000.0, "time/backward_ms": 2000.0}
    assert list(values) == ["time/forward_ms", "time/backward_ms"]
    assert timer.read() == {}
    with timer("backward"):
        clock.passes(3)
    timer.step()
    assert timer.read() == {"time/backward_ms": 3000.0}


def test_each_moment_belongs_to_the_innermost_phase_also_where_one_fails(monkeypatch):
    clock, timer = Clock(monkeypatch), PhaseTimer()
    with timer("optimizer"):
        clock.passes(1)
        with pytest.raises(RuntimeError, match="no"), timer("monitor"):
            clock.passes(10)
            with timer("optimizer"):
                clock.passes(100)
            clock.passes(1000)
            raise RuntimeError("no")
        clock.passes(10000)
    clock.passes(5)
    timer.step()
    assert timer.read() == {"time/optimizer_ms": 10101e3, "time/monitor_ms": 1010e3}


def test_a_phase_that_is_open_while_read_is_split(monkeypatch):
    clock, timer = Clock(monkeypatch), PhaseTimer()
    timer.step()
    with timer("monitor"):
        clock.passes(1)
        assert timer.read() == {"time/monitor_ms": 1000.0}
        clock.passes(2)
    timer.step()
    assert timer.read() == {"time/monitor_ms": 2000.0}


class Event:
    """A CUDA event of a device that has done what a test says it has."""

    made, done, issued = 0, 0.0, 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1

    def record(self, stream):
        assert stream == "stream of cuda:3"
        Event.issued += 1.0
        self.at = Event.issued

    def synchronize(self):
        Event.done = max(Event.done, self.at)

    def elapsed_time(self, end):
        assert end.at <= Event.done, "the device has not come so far"
        return 1e3 * (end.at - self.at)


def test_on_cuda_events_are_waited_for_at_the_read_and_used_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    timer = PhaseTimer("cuda:3")
    for _ in range(5):
        for _ in range(4):
            with timer("forward"):
                pass
            with timer("optimizer"), timer("monitor"):
                pass
            timer.step()
        assert Event.done < Event.issued
        assert timer.read() == {
            "time/forward_ms": 1000.0, "time/optimizer_ms": 2000.0, "time/monitor_ms": 1000.0,
        }  # fmt: skip
        assert Event.done == Event.issued
    assert Event.made <= 4 * 6 + 2
