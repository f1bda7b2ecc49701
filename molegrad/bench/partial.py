"""Benchmarks that end early: what does not fit the device, and results so far on Ctrl-C.

result = {"rows": []}
with until_interrupted(result):
    for cell in cells:
        result["rows"].append(measure(cell))
print(json.dumps(result))
return exit_status(result)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch

STATUS = 130  # of a command that SIGINT has ended, as shells have it


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
    return STATUS if result.get("interrupted") else int(failed)
