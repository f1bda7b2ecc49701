import os
import signal
import threading

import pytest
import torch

from molegrad.bench.partial import exit_status, no_room, until_interrupted


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


def test_other_threads_can_measure_too():
    results = []

    def work():
        result = {}
        with until_interrupted(result):
            raise KeyboardInterrupt
        results.append(result)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [{"interrupted": True}]
