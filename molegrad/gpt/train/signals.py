"""Ctrl-C and SIGTERM as a wish to stop at the next moment at which all that was done can be kept.

    with StopSignals(print) as signals:
        while not signals.stop:
            ...                     # a micro-batch, or a step

A second signal has its usual effect. `stop` may also be set by hand, to stop for another reason.
"""

import signal
import threading
from collections.abc import Callable


class StopSignals:
    """Notes SIGINT and SIGTERM while it is entered, on the main thread alone: no other may set
    handlers.

    Attributes:
        stop: the number of the signal that came, 0 before.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.stop = 0
        self._tell = tell
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
        self._tell(f"{name}: finishing what is under way, then stopping (again to quit)")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
