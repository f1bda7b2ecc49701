"""Timing: interleaved rounds, on a GPU between events and with a cold L2 cache; and what every
benchmark shares: failures as notes, a limit of seconds, results so far on Ctrl-C.

Several variants of one thing are run one after the other, round by round, so that another
program's load falls on all of them, and a ratio is the median of the rounds' own ratios.

On a GPU a variant's time is what passes on the device between two events around it. Before the
first event a buffer is read that is larger than the L2 cache, as other layers' tensors would have
been in a training step, and it is read as often as the host needs to launch the variant, so that
the device does not wait for launches. It is not written: the cache would then hold lines that have
to go to memory first, and the variant would wait for them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

import torch

from molegrad import ops
from molegrad.ops import OPS

INTERRUPTED = 130  # exit status of a command that SIGINT has ended, as shells have it
LEAST_ROUNDS = 3  # however little time there is
FLUSH_BYTES = 256 << 20  # at least, and twice the L2 cache
LONGEST_LAUNCH = 5e-3  # seconds of launching that are hidden behind the flush


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


def measure_cells(
    rows: list[dict],
    cells: list[dict],
    measure: Callable[[dict, float], list[dict]],
    seconds: float,
    device: torch.device,
) -> None:
    """Adds to `rows` those of all cells of a table. What is not measured has one with a "note".

    Args:
        cells: the sizes of each, such as {"n": 768, "m": 3072}.
        measure: (cell, seconds it may take) -> its rows.
        seconds: of the whole table, shared out among its cells; 0 is no limit.
    """
    end = time.perf_counter() + seconds if seconds else math.inf
    for done, cell in enumerate(cells):
        left = end - time.perf_counter()
        if left <= 0:
            rows.append(cell | {"note": f"not measured: the table's {seconds:g} s are spent"})
            continue
        try:
            if device.type == "cuda":  # the cell before may have left most of the memory cached
                gc.collect()
                torch.cuda.empty_cache()
            rows += measure(cell, left / (len(cells) - done))
        except Exception as error:  # whatever it was: the other cells are measured
            rows.append(cell | {"note": reason(error)})


def row_of(timed: Timed, name, labels: dict, dense=None, plain=None) -> dict:
    """A variant's row: percentiles and ratios to the variants `dense` and `plain`, or its note."""
    times = timed.seconds.get(name)
    if times is None:
        return labels | {"note": timed.failed[name]}
    row = labels | percentiles(times)
    if name in timed.host:
        row["us_host"] = timed.host[name] * 1e6
    for key, other in (("vs_dense", dense), ("vs_reference", plain)):
        if other in timed.seconds:
            row[key] = median_ratio(timed.seconds[other], times)
    return row


def has_native(name: str, device: torch.device) -> bool:
    """Whether `torch.ops.molegrad.<name>` has a native kernel on the device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"molegrad::{name}", device.type.upper())


def op_rows(
    name: str,
    run: Callable[[Callable], object],
    labels: dict,
    device: torch.device,
    repeats: int,
    limit: float,
    beside: dict[str, Callable] | None = None,
    reference: bool = True,
) -> list[dict]:
    """Rows of an op's reference and of its native kernel, or a note that none is built.

    Args:
        run: calls the op that it is given, on the operands to time.
        beside: what else is timed with them; ratios are to "dense", if it is there.
        reference: whether the reference runs.
    """
    kernels = {"reference": OPS[name].reference} if reference else {}
    native = has_native(name, device)
    if native:
        kernels["native"] = getattr(ops, name)
    variants = {**(beside or {}), **{how: lambda op=op: run(op) for how, op in kernels.items()}}
    timed = time_interleaved(variants, repeats, device, limit)
    rows = [
        row_of(timed, how, labels | {"op": name, "how": how}, "dense",
               "reference" if how == "native" else None)
        for how in variants
    ]  # fmt: skip
    if not native:
        rows.append(labels | {"op": name, "how": "native", "note": "not built"})
    return rows


def no_room(error: BaseException) -> bool:
    """Whether a measurement has failed because the device's memory does not suffice.

    An allocation that fails inside a native op does not arrive as an OutOfMemoryError: LibTorch's
    stable ABI says that an "API call failed", and of nothing else that fails there more than that.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "API call failed" in text
    )


@contextlib.contextmanager
def until_interrupted(result: dict) -> Iterator[None]:
    """Ctrl-C inside ends the block, not the program: result["interrupted"] is then True.

    Works where SIGINT was ignored too, as in what a script starts in the background, and with more
    than one signal, as `timeout` sends them: the first counts.
    """

    def stop(number, frame) -> None:
        if not result.get("interrupted"):
            result["interrupted"] = True
            raise KeyboardInterrupt

    before = None
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except KeyboardInterrupt:
        result["interrupted"] = True
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def exit_status(result: dict, failed: bool = False) -> int:
    """Of the command: 130 where it was interrupted, 1 where something failed, 0."""
    return INTERRUPTED if result.get("interrupted") else int(failed)
