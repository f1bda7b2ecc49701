"""Device code and host code of csrc/cuda against another CUDA toolkit than nvcc's, without a GPU.

nvcc of CUDA 12.8 is in no Python package, but NVRTC of 12.8 is, and headers are. MOLEGRAD_CUDA12
names a folder with those packages (pip install --no-deps --target FOLDER; nvidia-cuda-nvrtc-cu12,
nvidia-cuda-runtime-cu12, nvidia-cuda-nvcc-cu12, nvidia-cuda-cccl-cu12, nvidia-cublas-cu12 of 12.8);
`.ci/run` makes one.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

torch_include = Path(pytest.importorskip("torch").__file__).parent / "include"
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
TOOLKIT = Path(os.environ.get("MOLEGRAD_CUDA12") or "none")
KERNELS = sorted(path.name for path in SOURCES.glob("*.cu"))
# What calls the CUDA runtime and cuBLASLt; the last is for tensors.h, which all kernels share.
HOST = [*sorted(SOURCES.glob("*.cpp")), Path(__file__).with_name("launch_error.cpp")]
pytestmark = pytest.mark.skipif(
    not TOOLKIT.is_dir(), reason="MOLEGRAD_CUDA12 names no folder with CUDA 12.8's packages"
)
# What launchers use of the standard library, which NVRTC does not have.
HEADERS = {
    "cstdint": "#pragma once\n",
    "cstddef": "#pragma once\n",
    "algorithm": """#pragma once
namespace std {
template <typename T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <typename T> constexpr T max(T a, T b) { return a < b ? b : a; }
template <typename T> constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
}
""",
}


class Nvrtc:
    """NVRTC, as far as compiling a file needs it."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))

    def compile(self, source: Path, options: list[str]) -> bytes:
        """The machine code of a file; AssertionError with the compiler's messages."""
        names, texts = list(HEADERS), list(HEADERS.values())
        program = ctypes.c_void_p()
        status = self._library.nvrtcCreateProgram(
            ctypes.byref(program), source.read_bytes(), source.name.encode(), len(names),
            _strings(texts), _strings(names),
        )  # fmt: skip
        assert status == 0, f"nvrtcCreateProgram: {status}"
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._get(program, "ProgramLog").decode(errors="replace")
            assert status == 0, f"{source.name} {options[0]}:\n{log[:4000]}"
            return self._get(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self._library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw


def _strings(values: list[str]):
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def includes() -> list[Path]:
    return sorted(path for path in (TOOLKIT / "nvidia").glob("*/include") if path.is_dir())


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_120"])
@pytest.mark.parametrize("name", KERNELS)
def test_device_code_of_cuda_12(name, architecture):
    (library,) = (TOOLKIT / "nvidia" / "cuda_nvrtc" / "lib").glob("libnvrtc.so.12")
    options = [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device"]
    options += [f"-I{SOURCES}", f"-I{SOURCES.parent}", *(f"-I{path}" for path in includes())]
    code = Nvrtc(library).compile(SOURCES / name, options)
    assert b"kernel" in code  # every launcher's kernels are in it


@pytest.mark.parametrize("source", HOST, ids=lambda path: path.name)
def test_host_code_on_the_headers_of_cuda_12(source):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-fvisibility=hidden"]
    command += ["-Wall", "-Wextra", "-Werror"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    command += [f"-I{SOURCES.parent}", f"-I{SOURCES}"]
    for path in (torch_include, torch_include / "torch" / "csrc" / "api" / "include", *includes()):
        command += ["-isystem", str(path)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
