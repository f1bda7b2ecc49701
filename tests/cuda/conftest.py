"""Kernels of csrc/cuda, compiled once per test process."""

import pytest
import torch

from tests.cuda import build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """emulated(name): csrc/cuda/<name>.cu as a `build.Library`."""
    if build.compiler() is None:
        pytest.skip("emulated kernels: no compiler was found")
    folder, libraries = tmp_path_factory.mktemp("emulated"), {}

    def library(name: str) -> build.Library:
        if name not in libraries:
            libraries[name] = build.build(folder, build.KERNELS / f"{name}.cu")
        return libraries[name]

    return library


@pytest.fixture(scope="session")
def emulated_op(tmp_path_factory):
    """emulated_op(name, *kernels) registers csrc/cuda/ops_<name>.cpp, for `build.call_op`."""
    if torch.version.cuda is not None:
        pytest.skip("emulated ops: this torch has CUDA itself")
    if build.compiler() is None or build.GPU_LIBRARIES:
        pytest.skip("emulated ops: no C++ compiler was found")
    folder, done = tmp_path_factory.mktemp("emulated_ops"), set()

    def register(name: str, *kernels: str) -> None:
        if name not in done:
            build.build_op(folder, name, *kernels)
            done.add(name)

    return register
