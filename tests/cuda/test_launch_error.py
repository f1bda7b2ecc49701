"""What a user reads where a kernel cannot be launched."""

import pytest
import torch

from tests.cuda import build


@pytest.fixture
def said(emulated):
    if build.ON_GPU:
        pytest.skip("emulated errors")

    def say(status: int) -> str | None:
        text = torch.zeros(2000, dtype=torch.uint8)
        if emulated.value("say_launch", status, text, len(text)) == 0:
            return None
        return bytes(text.tolist()).split(b"\0")[0].decode()

    return say


def test_no_error_says_nothing(said):
    assert said(0) is None


@pytest.mark.parametrize("status", [98, 209, 222])
def test_a_gpu_that_the_kernels_were_not_built_for(said, status):
    text = said(status)
    assert "sketch" in text and "not for this GPU" in text
    assert "MOLEGRAD_CUDA_ARCHITECTURES=native pip install -e ." in text
    assert "MOLEGRAD_BUILD=0" in text


def test_other_errors_are_told_as_they_are(said):
    assert "CUDA error" in said(1) and "pip install" not in said(1)
