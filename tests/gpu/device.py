"""The device of the tests in this folder: a GPU, or what MOLEGRAD_TEST_DEVICE names.

    MOLEGRAD_TEST_DEVICE=cpu python -m pytest tests/gpu/test_streaming.py

runs on the CPU what does not ask for a GPU's own properties, to try the tests themselves.
"""

import contextlib
import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("MOLEGRAD_TEST_DEVICE", "cuda"))
needs_device = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)
needs_cuda = pytest.mark.skipif(
    DEVICE.type != "cuda" or not torch.cuda.is_available(), reason="needs a CUDA device"
)


@contextlib.contextmanager
def no_waiting():
    """An error where the host waits for the GPU; nothing on a CPU."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
