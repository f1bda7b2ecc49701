"""The kernels of csrc/cuda for every test of this folder; see build.py."""

import os
from pathlib import Path

import pytest

from tests.cuda import build

if os.environ.get("MOLEGRAD_BUILD") == "0":
    collect_ignore_glob = ["test_*.py"]  # the kernels are the same without the extension


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("emulated")


@pytest.fixture(scope="session")
def emulated():
    """csrc/cuda as a `build.Library`."""
    if not build.ON_GPU and build.missing():
        pytest.skip(build.missing())
    return build.load()


@pytest.fixture(scope="session")
def emulated_ops(emulated):
    """The ops registered for CUDA, for `build.call_op`."""
    if build.ON_GPU:
        pytest.skip("emulated ops: a GPU has its own, which tests/gpu looks at")
    return build.call_op


@pytest.fixture(params=["forward", "reverse"])
def order(request, monkeypatch):
    """Blocks and threads one after the other, or the last one first."""
    monkeypatch.setenv("MOLEGRAD_EMULATION_ORDER", request.param)
