"""Kernels of csrc/cuda under test: compiled for the CPU with emulation.h, or for a GPU.

A function that launches kernels is `extern "C" int name(...)`; it takes pointers, int, int64_t and
double, and a stream at the end, and returns 0 or a cudaError_t.

MOLEGRAD_TEST_ON_GPU=folder runs the same tests on the GPU instead: tensors are copied there for a
call and back after it. Libraries that lie in the folder are used, others are built with nvcc, for
MOLEGRAD_TEST_ARCHITECTURE (default native). `python -m tests.cuda.build` builds all of them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
HERE = Path(__file__).resolve().parent

CODES = {  # DType of csrc/cuda
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
}


GPU_LIBRARIES = os.environ.get("MOLEGRAD_TEST_ON_GPU")


ARCHITECTURE = os.environ.get("MOLEGRAD_TEST_ARCHITECTURE", "native")


def compiler() -> str | None:
    """The compiler that the tests need, or None."""
    if GPU_LIBRARIES:  # what is there need not be compiled
        return shutil.which("nvcc") or next(map(str, Path(GPU_LIBRARIES).glob("*.so")), None)
    return shutil.which(os.environ.get("CXX", "g++"))


def shared_memory() -> int:
    """Bytes of a multiprocessor: of the GPU under test, else of an H100."""
    if not GPU_LIBRARIES:
        return 228 << 10
    return torch.cuda.get_device_properties(0).shared_memory_per_multiprocessor


def build(folder: Path, *sources: Path, extra: tuple[str, ...] = ()) -> Library:
    """Compiles sources into one library in `folder` and loads it."""
    library = folder / f"lib{sources[0].stem}.so"
    flags = ["-O2", "-shared", "-std=c++17", f"-I{ROOT / 'csrc'}"]
    if GPU_LIBRARIES:
        library = Path(GPU_LIBRARIES) / library.name
        if library.exists():
            return Library(library)
        flags += [f"-arch={ARCHITECTURE}", "-Xcompiler=-fPIC"]
    else:
        # Products and sums round as they are written, and a library's symbols are its own.
        flags += ["-ffp-contract=off", "-fno-gnu-unique", "-Wl,-Bsymbolic", "-U_FORTIFY_SOURCE"]
        flags += ["-fno-strict-aliasing", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        flags += ["-DMOLEGRAD_EMULATED", f"-I{HERE}", "-x", "c++"]
    command = [compiler(), "-o", str(library), *flags, *map(str, sources), *extra]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return Library(library)


def beside_torch() -> tuple[str, ...]:
    """Flags of the compiler for sources that use torch's stable ABI."""
    root = Path(torch.__file__).parent
    flags = (f"-isystem{root / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    return (*flags, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")


def build_op(folder: Path, name: str, *kernels: str) -> None:
    """Registers csrc/cuda/ops_<name>.cpp with its emulated kernels, those of <name>.cu where no
    other files are named: `call_op` runs them."""
    sources = [KERNELS / f"ops_{name}.cpp"]
    sources += [KERNELS / f"{kernel}.cu" for kernel in kernels or (name,)]
    sources.append(HERE / "cublaslt_stub.cpp")
    torch.ops.load_library(build(folder, *sources, extra=beside_torch()).path)


def build_products(folder: Path, *sources: str) -> Path:
    """The library of files of csrc/cuda that need cuBLASLt, with a stub in its place; for
    `run_check`. Skips the test where emulated ops cannot be built."""
    if GPU_LIBRARIES or compiler() is None or torch.version.cuda is not None:
        pytest.skip("emulated ops: for a torch without CUDA, with a C++ compiler")
    files = (*(KERNELS / name for name in sources), HERE / "cublaslt_stub.cpp")
    return build(folder, *files, extra=beside_torch()).path


def run_check(check: str, library: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python text, with `library` as its argument, in a process of its own: variables of the
    environment are its own, and the ops are registered there alone."""
    return subprocess.run(
        [sys.executable, "-c", check, str(library)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def call_op(name: str, *args):
    """torch.ops.molegrad.<name> by the kernel that is registered for CUDA, on CPU tensors."""
    return getattr(torch.ops.molegrad, name).default._op_dk(torch._C.DispatchKey.CUDA, *args)


class Library:
    """`library.name(*args)` calls a launcher: tensors give their memory, None a null pointer."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str):
        function = getattr(self._library, name)

        def call(*args) -> None:
            memory = Memory()
            status = function(*(_argument(x, memory) for x in args), None)  # the stream
            memory.give_back()
            assert status == 0, f"{name}: CUDA error {status}"

        return call

    def value(self, name: str, *args) -> int:
        """What a function returns that launches nothing, as int64 (sizes of scratch memory)."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        return function(*(_argument(x, Memory()) for x in args))


class Memory:
    """Where the memory of tensors lies for one call."""

    def __init__(self):
        self.copies = {}

    def address(self, x: Tensor) -> int:
        if not GPU_LIBRARIES:
            return x.data_ptr()
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.copies:
            self.copies[storage.data_ptr()] = (storage, storage.cuda())
        copy = self.copies[storage.data_ptr()][1]
        return copy.data_ptr() + x.data_ptr() - storage.data_ptr()

    def give_back(self) -> None:
        for storage, copy in self.copies.values():
            storage.copy_(copy)


class Struct:
    """A pointer to a struct whose fields, each of eight bytes, have these values."""

    def __init__(self, *fields):
        self.fields = fields


def _argument(x, memory: Memory):
    if isinstance(x, Struct):
        slots = (ctypes.c_uint64 * len(x.fields))()
        for i, field in enumerate(x.fields):
            if isinstance(field, torch.dtype):
                field = CODES[field]
            value = _argument(field, memory)
            ctypes.memmove(ctypes.addressof(slots) + 8 * i, ctypes.addressof(value), 8)
        return slots
    if x is None:
        return ctypes.c_void_p(None)
    if isinstance(x, Tensor):
        return ctypes.c_void_p(memory.address(x))
    if isinstance(x, torch.dtype):
        return ctypes.c_int(CODES[x])
    if isinstance(x, float):
        return ctypes.c_double(x)
    return ctypes.c_int64(x)


if __name__ == "__main__":
    for source in (HERE / "probe.cu", *sorted(KERNELS.glob("*.cu"))):
        if source.with_suffix(".cuh").exists() or source.parent == HERE:
            print(build(Path(GPU_LIBRARIES), source).path, flush=True)
