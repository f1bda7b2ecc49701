"""Kernels of csrc/cuda under test: all of csrc/cuda as one library, compiled for the CPU with
emulation.h.

A function that launches kernels is `extern "C" int name(...)`; it takes pointers, int, int64_t and
double, and a stream at the end, and returns 0 or a cudaError_t. Loading the library registers the
ops for CUDA too; `call_op` runs them on tensors of the CPU.

MOLEGRAD_TEST_ON_GPU=1 runs the launchers of the installed extension on the GPU instead: tensors are
copied there for a call and back after it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "emulated"
ON_GPU = os.environ.get("MOLEGRAD_TEST_ON_GPU", "") not in ("", "0")

CODES = {  # DType of csrc/cpu/kernels.h
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
}
INCLUDES = (ROOT / "csrc", KERNELS, HERE)
FLAGS = [
    "-O2",
    "-std=c++17",
    "-fPIC",
    *(f"-I{folder}" for folder in INCLUDES),
    "-DMOLEGRAD_EMULATED",
]
# Products and sums round as they are written, and a library's symbols are its own.
FLAGS += ["-ffp-contract=off", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-attributes"]


def missing() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    if torch.version.cuda is not None:
        return "emulated kernels: this torch has CUDA itself"
    if shutil.which(compiler()) is None:
        return f"emulated kernels: no compiler {compiler()}"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def sources() -> list[Path]:
    kernels = [KERNELS / "sketch_op.cpp", *KERNELS.glob("*.cu")]
    return sorted([*kernels, *HERE.glob("*.cu"), *HERE.glob("*.cpp")])


def shared_memory() -> int:
    """Bytes of a multiprocessor: of the GPU under test, else of an H100."""
    if not ON_GPU:
        return 228 << 10
    return torch.cuda.get_device_properties(0).shared_memory_per_multiprocessor


@functools.cache
def load() -> Library:
    """The library, with the ops registered. What has been compiled from the same text by the same
    command is taken from build/emulated, whoever of several processes has compiled it."""
    if ON_GPU:
        from molegrad import _C

        return Library(Path(_C.__file__))
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        path = _build()
    torch.ops.load_library(path)
    return Library(path)


def _build() -> Path:
    torch_root = Path(torch.__file__).parent
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    flags = [
        *FLAGS,
        f"-isystem{torch_root / 'include'}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    salt = f"{version!r} {torch.__version__} {flags}"
    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)))) as pool:
        objects = list(pool.map(lambda source: _object(source, flags, salt), sources()))
    names = " ".join(path.name for path in objects)
    library = CACHE / f"libemulated-{_digest(names)}.so"
    if not library.exists():
        link = ["-shared", "-Wl,-Bsymbolic", f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([compiler(), "-o", library, *objects, *link], library)
    return library


def _object(source: Path, flags: list[str], salt: str) -> Path:
    """The compiled source, named by what went into it."""
    texts = "".join(text for _, text in sorted(_texts(source, {}).items()))
    path = CACHE / f"{source.stem}-{_digest(salt + texts)}.o"
    if not path.exists():
        _run([compiler(), "-c", "-o", path, *flags, "-x", "c++", source], path)
    return path


def _texts(source: Path, seen: dict[str, str]) -> dict[str, str]:
    """The text of a source and of all files of ours that it includes, by path."""
    seen[str(source)] = text = source.read_text()
    for name in re.findall(r'#include "([^"]+)"', text):
        for folder in (source.parent, *INCLUDES):
            found = (folder / name).resolve()
            if found.is_file():
                if str(found) not in seen:
                    _texts(found, seen)
                break
    return seen


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run(command: list, output: Path) -> None:
    """Runs a compiler; the output appears when it is whole, and replaces those of its name."""
    unfinished = output.with_name(f"unfinished-{output.name}")
    command = [str(unfinished if part == output else part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    for old in CACHE.glob(f"{output.name.rpartition('-')[0]}-{'?' * 16}{output.suffix}"):
        old.unlink()
    unfinished.rename(output)


def run_check(check: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python text in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", check],
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
        if not ON_GPU:
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
