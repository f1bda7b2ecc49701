"""Timing of ops: interleaved rounds, on a GPU between events and with a cold L2 cache.

Several variants of one thing are run one after the other, round by round, so that another
program's load falls on all of them, and a ratio is the median of the rounds' own ratios.

On a GPU a variant's time is what passes on the device between two events around it. Before the
first event a buffer is read that is larger than the L2 cache, as other layers' tensors would have
been in a training step, and it is read as often as the host needs to launch the variant: the device
must not be seen to wait for launches. Were it written, the cache would hold what has yet to go to
memory, and that would be the variant's to wait for.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from molegrad.bench.partial import no_room

LEAST_ROUNDS = 3  # however little time there is
FLUSH_BYTES = 256 << 20  # at least, and twice the L2 cache
LONGEST_LAUNCH = 5e-3  # seconds of launching that are hidden behind the flush
FIRST_COUNTS = 8  # cells for whose time a table's first cell is measured


@dataclass
class Timed:
    """What a number of variants took.

    Attributes:
        seconds: variant -> seconds of every round.
        host: variant -> seconds that the host takes to launch it; on a GPU only.
        failed: variant -> what it raised. Such a variant has no seconds.
    """

    seconds: dict[Hashable, list[float]] = field(default_factory=dict)
    host: dict[Hashable, float] = field(default_factory=dict)
    failed: dict[Hashable, str] = field(default_factory=dict)


class HostClock:
    """Seconds on the host, for a device that works while it is called."""

    def warm_up(self, run: Callable) -> None:
        run()

    def time(self, run: Callable, host: float | None = None) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class DeviceClock:
    """Seconds on a device that works behind the host's back.

    Args:
        event: makes an event with record(), synchronize() and elapsed_time(later) in milliseconds.
        flush: launches what empties the device's cache.
        wait: waits for everything that was launched.
    """

    def __init__(self, event: Callable, flush: Callable, wait: Callable) -> None:
        self._event, self._flush, self._wait = event, flush, wait
        flush()
        wait()
        times = [self._between(flush) for _ in range(5)]
        self._flush_seconds = max(statistics.median(times), 1e-6)

    def warm_up(self, run: Callable) -> float:
        """Runs it twice; the seconds that the host took to launch the second."""
        run()
        self._wait()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self._wait()
        return seconds

    def time(self, run: Callable, host: float) -> float:
        hidden = 1.5 * min(host, LONGEST_LAUNCH)
        for _ in range(max(1, math.ceil(hidden / self._flush_seconds))):
            self._flush()
        return self._between(run)

    def _between(self, run: Callable) -> float:
        start, end = self._event(), self._event()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> HostClock | DeviceClock:
    """The clock that measures what a device does."""
    if device.type != "cuda":
        return HostClock()
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.ones(max(2 * l2, FLUSH_BYTES) // 4, device=device)
    sink = torch.empty((), device=device)
    return DeviceClock(
        lambda: torch.cuda.Event(enable_timing=True),
        lambda: torch.sum(buffer, dim=0, out=sink),
        lambda: torch.cuda.synchronize(device),
    )


def time_interleaved(
    variants: dict[Hashable, Callable],
    repeats: int,
    device: torch.device,
    limit: float = math.inf,
    clock: HostClock | DeviceClock | None = None,
) -> Timed:
    """Seconds of every variant in every round, one round after the other, after a warm-up.

    Args:
        repeats: rounds. limit: seconds after which no further round begins, once there are three.
        clock: by default `clock_of(device)`.

    A variant that raises RuntimeError is left out from then on and named in `failed`.
    """
    begun = time.perf_counter()
    clock = clock or clock_of(device)
    timed = Timed()
    for name, run in variants.items():
        try:
            host = clock.warm_up(run)
        except RuntimeError as error:  # out of memory is one
            timed.failed[name] = reason(error)
            continue
        timed.seconds[name] = []
        if host is not None:
            timed.host[name] = host
    last = 0.0  # seconds of the round before
    for done in range(repeats):
        start = time.perf_counter()
        if done >= LEAST_ROUNDS and start + last - begun > limit:
            break
        for name in list(timed.seconds):
            try:
                taken = clock.time(variants[name], timed.host.get(name))
            except RuntimeError as error:
                del timed.seconds[name]
                timed.failed[name] = reason(error)
            else:
                timed.seconds[name].append(taken)
        last = time.perf_counter() - start
    return timed


def reason(error: Exception) -> str:
    """The first line of what went wrong, as a table's note."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    if not no_room(error):
        return f"failed: {first}"
    if "out of memory" in str(error):
        return "failed: out of memory"
    return f"failed, out of memory as it seems: {first}"


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Microseconds at the 20th, 50th and 80th percentile."""
    points = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {f"us_p{p}": x * 1e6 for p, x in zip((20, 50, 80), points.tolist(), strict=True)}


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast: how many times faster `fast` is."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def bandwidth(device: torch.device, size: int | None = None) -> dict[str, float]:
    """Bytes a second to and from the device's memory: the floor under every pass over tensors.

    Args:
        size: bytes of the tensor that is read; by default larger than any cache, 1 GiB on a GPU
            and 256 MiB on the CPU, and at most an eighth of a GPU's free memory.

    Returns:
        "read" (a sum), "copy" (read and written bytes together), "best", the larger of both.
    """
    cuda = device.type == "cuda"
    if size is None:
        size = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 8) if cuda else 256 << 20
    x = torch.ones(size // 4, device=device)
    y = torch.zeros_like(x)
    timed = time_interleaved({"read": x.sum, "copy": lambda: y.copy_(x)}, 5, device)
    if timed.failed:
        raise RuntimeError(f"memory bandwidth: {timed.failed}")
    nbytes = x.numel() * 4
    read = nbytes / statistics.median(timed.seconds["read"])
    copy = 2 * nbytes / statistics.median(timed.seconds["copy"])
    return {"read": read, "copy": copy, "best": max(read, copy)}


class Budget:
    """The seconds of a table, shared out among its cells, so that the last ones get some too.

    Args:
        seconds: of the whole table; 0 is no limit. cells: how many shares there are.
    """

    def __init__(self, seconds: float, cells: int) -> None:
        self._cells = cells
        self._end = time.perf_counter() + seconds if seconds else math.inf

    def share(self, cells: int = 1) -> float | None:
        """Seconds for the next cell, which counts as so many; None where nothing is left."""
        left = self._end - time.perf_counter()
        share = left * cells / max(self._cells, cells)
        self._cells -= cells
        return share if left > 0 else None


def measure_cells(
    rows: list[dict],
    cells: list[dict],
    measure: Callable[[dict, float], list[dict]],
    seconds: float,
    device: torch.device,
    first: dict | None = None,
) -> None:
    """Adds to `rows` those of all cells of a table. What is not measured has one with a "note".

    Args:
        cells: what tells one from the other, such as {"n": 768, "m": 3072}.
        measure: (cell, seconds it may take) -> its rows.
        seconds: of the whole table; 0 is no limit.
        first: the cell that matters most. If it is among them, it goes before the others and has
            the time of FIRST_COUNTS cells.
    """
    if first in cells:
        cells = [first, *(cell for cell in cells if cell != first)]
    counts = [FIRST_COUNTS if cell == first else 1 for cell in cells]
    budget = Budget(seconds, sum(counts))
    for cell, count in zip(cells, counts, strict=True):
        limit = budget.share(count)
        if limit is None:
            rows.append(cell | {"note": f"not measured: the table's {seconds:g} s are spent"})
            continue
        try:
            if device.type == "cuda":  # the cell before may have left most of the memory cached
                gc.collect()
                torch.cuda.empty_cache()
            rows += measure(cell, limit)
        except Exception as error:  # whatever it was: the other cells are measured
            rows.append(cell | {"note": reason(error)})
