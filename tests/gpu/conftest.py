"""What a test leaves on the GPU shows in that test, and harms no other."""

import os

import pytest
import torch

from tests.gpu.device import DEVICE


@pytest.fixture(autouse=True)
def _nothing_goes_wrong_later():
    """Waits for the GPU after each test. An illegal access ruins the process: under xdist it ends
    here, which counts as this test's failure, and another worker takes its place."""
    yield
    if DEVICE.type != "cuda" or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise
