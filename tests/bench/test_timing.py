import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from molegrad.bench import timing
from molegrad.bench.timing import (
    DeviceClock,
    exit_status,
    measure_cells,
    no_room,
    time_interleaved,
    until_interrupted,
)

CPU = torch.device("cpu")


class Device:
    """Two clocks: the host launches, the device works off what was launched."""

    def __init__(self):
        self.host = self.busy_until = 0.0
        self.log = []

    def launch(self, name, seconds, host=0.0):
        def run():
            self.host += host
            self.busy_until = max(self.busy_until, self.host) + seconds
            self.log.append(name)

        return run

    def wait(self):
        self.host = max(self.host, self.busy_until)

    def event(self):
        device = self

        class Event:
            def record(self):
                self.at = device.busy_until = max(device.busy_until, device.host)

            def synchronize(self):
                device.host = max(device.host, self.at)

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        return Event()


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: device.host)
    return device


def clock_of(device, flush=1e-4):
    return DeviceClock(device.event, device.launch("flush", flush), device.wait)


def test_launching_is_hidden_behind_the_flush(device):
    # A launch of 400 µs for 50 µs of work: the device's time is 50 µs, whatever the host does.
    slow = device.launch("slow", 5e-5, host=4e-4)
    timed = time_interleaved({"slow": slow}, 3, CPU, clock=clock_of(device))
    assert timed.seconds["slow"] == pytest.approx([5e-5] * 3)
    assert timed.host["slow"] == pytest.approx(4e-4)
    assert device.log[-7:] == ["flush"] * 6 + ["slow"]  # 600 µs of flushing cover 400 µs


def test_every_timed_run_follows_a_flush_and_a_warm_up(device):
    variants = {name: device.launch(name, 1e-4) for name in "ab"}
    clock = clock_of(device)
    device.log.clear()
    time_interleaved(variants, 2, CPU, clock=clock)
    assert device.log == ["a", "a", "b", "b"] + ["flush", "a", "flush", "b"] * 2


def test_rounds_end_at_the_limit_but_not_before_three(device):
    variants = {"x": device.launch("x", 1.0)}
    for limit, rounds in ((0.5, 3), (9.5, 7), (math.inf, 20)):
        timed = time_interleaved(variants, 20, CPU, limit, clock_of(device, 1e-9))
        assert len(timed.seconds["x"]) == rounds
    timed = time_interleaved(variants, 2, CPU, 0.0, clock_of(device, 1e-9))
    assert len(timed.seconds["x"]) == 2


def test_every_round_runs_every_variant_in_turn():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timed = time_interleaved(runs, 3, CPU)
    assert calls == ["a", "b"] * 4  # the first is the warm-up
    assert [len(x) for x in timed.seconds.values()] == [3, 3] and not timed.host


def test_a_variant_that_fails_is_named_and_the_others_go_on():
    def broken():
        raise RuntimeError("no such kernel\nand much more")

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    timed = time_interleaved({"a": broken, "b": too_large, "c": lambda: None}, 2, CPU)
    assert timed.failed == {"a": "failed: no such kernel", "b": "failed: out of memory"}
    assert list(timed.seconds) == ["c"] and len(timed.seconds["c"]) == 2


def test_a_variant_that_fails_in_a_later_round_is_named_and_the_others_go_on():
    calls = []

    def tired():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("torch_call_dispatcher(…) API call failed at ops.h, line 9")

    timed = time_interleaved({"a": tired, "b": lambda: None}, 4, CPU)
    assert list(timed.seconds) == ["b"] and len(timed.seconds["b"]) == 4 and len(calls) == 3
    assert timed.failed["a"].startswith("failed, out of memory as it seems: torch_call_disp")


def test_the_flush_reads_and_writes_nothing_large(monkeypatch):
    """Lines that a flush left dirty would be written back in the time of what is measured."""
    made, properties = [], SimpleNamespace(L2_cache_size=1 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1 << 16)
    monkeypatch.setattr(timing, "DeviceClock", lambda event, flush, wait: made.append(flush))
    for name in ("ones", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, device, make=make: make(*size))
    timing.clock_of(torch.device("cuda"))
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            written = (kwargs or {}).get("out")
            calls.append((function._schema.name, args[0].nbytes, written.nbytes))
            return function(*args, **(kwargs or {}))

    with Calls():
        made[0]()
    assert calls == [("aten::sum", 1 << 16, 4)]


def test_a_table_s_seconds_are_shared_and_what_is_left_out_says_so(device):
    given = []

    def measure(cell, limit):
        given.append(limit)
        device.host += 2.5
        return [cell | {"us_p50": 1.0}]

    rows = []
    measure_cells(rows, [{"n": n} for n in range(6)], measure, 6.0, CPU)
    assert given == pytest.approx([1.0, 0.7, 0.25])
    assert rows[:3] == [{"n": n, "us_p50": 1.0} for n in range(3)]
    assert rows[3:] == [
        {"n": n, "note": "not measured: the table's 6 s are spent"} for n in (3, 4, 5)
    ]


def test_a_cell_that_fails_has_a_row():
    raised = {1: RuntimeError("illegal memory access"), 2: KeyError("k")}

    def measure(cell, limit):
        if cell["n"] in raised:
            raise raised[cell["n"]]
        return [cell]

    rows = []
    measure_cells(rows, [{"n": n} for n in range(4)], measure, 0, CPU)
    notes = {1: "failed: illegal memory access", 2: "failed: 'k'"}
    assert rows == [{"n": n} | ({"note": notes[n]} if n in notes else {}) for n in range(4)]


def test_bandwidth_counts_the_bytes_that_move(monkeypatch):
    def fake(variants, repeats, device):
        for run in variants.values():
            run()
        return timing.Timed(seconds={"read": [0.5, 0.5, 9.0], "copy": [0.8, 0.8, 0.8]})

    monkeypatch.setattr(timing, "time_interleaved", fake)
    rate = timing.bandwidth(CPU, 1000)
    assert rate == {"read": 2000.0, "copy": 2500.0, "best": 2500.0}


def test_ratios_pair_the_rounds():
    # A load that slows one round by 10 must not show in the ratio.
    assert timing.median_ratio([4.0, 40.0, 4.0], [2.0, 20.0, 2.0]) == 2.0
    assert timing.percentiles([1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6])["us_p20"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "error, wanted",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("torch_call_dispatcher(...) API call failed at ops.h, line 60"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_does_not_fit(error, wanted):
    assert no_room(error) is wanted


def test_rows_before_the_interrupt_stay_and_later_signals_do_nothing():
    before = signal.getsignal(signal.SIGINT)
    result = {"rows": []}
    with until_interrupted(result):
        for number in range(5):
            result["rows"].append(number)
            if number == 2:
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                finally:
                    os.kill(os.getpid(), signal.SIGINT)
    assert result == {"rows": [0, 1, 2], "interrupted": True}
    assert signal.getsignal(signal.SIGINT) is before
    assert exit_status(result) == exit_status(result, True) == 130


def test_a_signal_counts_that_was_ignored_before():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = {}
        with until_interrupted(result):
            os.kill(os.getpid(), signal.SIGINT)
            result["not stopped"] = True
        assert result == {"interrupted": True}
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_an_interrupt_nothing_is_noted_and_errors_pass():
    result = {}
    with until_interrupted(result):
        pass
    with pytest.raises(RuntimeError, match="broken"), until_interrupted(result):
        raise RuntimeError("broken")
    assert result == {} and (exit_status(result), exit_status(result, True)) == (0, 1)
