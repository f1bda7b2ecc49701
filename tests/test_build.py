"""What the build decides from what it finds, without building anything."""

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from molegrad import _build
from molegrad._build import BuildError, Nvcc, Torch

CPU = Torch("2.13.0+cpu", None, Path("/site/torch"))
CU128 = Torch("2.10.0+cu128", "12.8", Path("/site/torch"))
CU130 = Torch("2.11.0+cu130", "13.0", Path("/site/torch"))
NVCC13 = Nvcc(Path("/cuda/bin/nvcc"), "13.0")


def decide(torch=CPU, nvcc=None, compiler="/usr/bin/c++", **environ):
    return _build.plan(environ, torch, nvcc, compiler)


@pytest.mark.parametrize(
    "torch, nvcc, mode, cuda",
    [
        (CPU, None, "AUTO", "none"),
        (CPU, NVCC13, "AUTO", "none"),
        (CU130, None, "AUTO", "none"),
        (CU130, NVCC13, "AUTO", "link"),
        (CU130, NVCC13, "ON", "link"),
        (CU130, NVCC13, "OFF", "none"),
        (CU128, NVCC13, "OFF", "none"),
        (CPU, NVCC13, "OBJECTS", "objects"),
        (CU128, NVCC13, "objects", "objects"),
    ],
)
def test_what_is_built(torch, nvcc, mode, cuda):
    plan = decide(torch, nvcc, MOLEGRAD_CUDA=mode)
    assert plan.native and plan.cuda == cuda and plan.torch == torch
    assert plan.architectures == "90a-real;120-real;120-virtual"
    left_out = mode == "AUTO" and cuda == "none"
    assert any(note.startswith("CAUTION: only the CPU ops") for note in plan.notes) == left_out


@pytest.mark.parametrize(
    "found, environ, words",
    [
        ({"torch": None}, {"MOLEGRAD_BUILD": "1"}, ["no torch", "--no-build-isolation"]),
        ({"torch": None}, {"MOLEGRAD_CUDA": "ON"}, ["no torch", "torch >= 2.10"]),
        (
            {"torch": Torch("2.9.1", None, Path("/t"))},
            {},
            ["torch 2.9.1 is too old", "pip install"],
        ),
        ({"compiler": None}, {}, ["no C++ compiler", "apt install g++", "MOLEGRAD_BUILD=0"]),
        ({"compiler": None}, {"CXX": "icpx"}, ["CXX=icpx"]),
        ({"nvcc": NVCC13}, {"MOLEGRAD_CUDA": "ON"}, ["2.13.0+cpu is a CPU build", "OBJECTS"]),
        ({"torch": CU130}, {"MOLEGRAD_CUDA": "ON"}, ["CUDA 13.0, but no nvcc", "CUDA_HOME"]),
        ({}, {"MOLEGRAD_CUDA": "OBJECTS"}, ["needs nvcc", "CUDA_HOME"]),
        ({}, {"MOLEGRAD_CUDA": "MAYBE"}, ["MOLEGRAD_CUDA=MAYBE", "AUTO, ON, OFF, OBJECTS"]),
    ],
)
def test_what_cannot_be_built_names_the_remedy(found, environ, words):
    with pytest.raises(BuildError) as caught:
        decide(**found, **environ)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("mode", ["AUTO", "ON"])
def test_a_major_mismatch_names_both_versions(mode):
    with pytest.raises(BuildError) as caught:
        decide(CU128, NVCC13, MOLEGRAD_CUDA=mode)
    message = str(caught.value)
    assert "nvcc is 13.0 (/cuda/bin/nvcc)" in message and "uses CUDA 12.8" in message
    assert "CUDA 12 toolkit" in message and "MOLEGRAD_CUDA=OFF" in message


def test_without_torch_the_package_installs_and_says_so():
    plan = decide(torch=None)
    assert not plan.native and "CAUTION" in plan.notes[0]
    assert "without native kernels" in plan.summary()
    assert not decide(MOLEGRAD_BUILD="0").native


def test_the_summary_says_what_was_built():
    assert decide().summary() == "molegrad: built molegrad._C with CPU ops (torch 2.13.0+cpu)"
    objects = decide(nvcc=NVCC13, MOLEGRAD_CUDA="OBJECTS").summary()
    assert "not linked" in objects and "120-virtual" in objects and "nvcc 13.0" in objects
    linked = decide(CU130, NVCC13, MOLEGRAD_CUDA_ARCHITECTURES="90").summary()
    assert "CPU ops and CUDA for 90 " in linked


def test_torch_is_looked_for_where_the_installation_goes():
    asked = []

    def ask(python, environ):
        asked.append((python, "PYTHONPATH" in environ))

    environ = {"PYTHONPATH": "/overlay", "PYTHONNOUSERSITE": "1", "VIRTUAL_ENV": "/venv"}
    assert _build.find_torch(environ, ask) is None
    assert asked == [
        (sys.executable, True),
        (sys.executable, False),
        ("/venv/bin/python", False),
    ]
    asked.clear()
    _build.find_torch({"MOLEGRAD_PYTHON": "/other/python", **environ}, ask)
    assert asked == [("/other/python", False)]


def test_the_real_torch_is_found_behind_an_overlay(tmp_path):
    """As in an isolated build: a torch on PYTHONPATH that is no torch must not be taken."""
    import torch

    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    found = _build.find_torch(os.environ | {"PYTHONPATH": str(tmp_path)})
    assert found.version == torch.__version__ and found.cuda == torch.version.cuda
    assert (found.includes[0] / "torch" / "csrc" / "stable" / "library.h").exists()
    assert all(path.exists() for path in found.libraries(cuda=False))


def test_asking_a_python_that_is_missing_or_has_no_torch(tmp_path):
    assert _build.ask_torch(str(tmp_path / "python"), {}) is None
    (tmp_path / "torch.py").write_text("raise ImportError")
    assert _build.ask_torch(sys.executable, os.environ | {"PYTHONPATH": str(tmp_path)}) is None


def fake_nvcc(folder: Path, release: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_nvcc_of_cuda_home_comes_before_the_one_on_the_path(tmp_path):
    home = fake_nvcc(tmp_path / "home", "12.8")
    other = fake_nvcc(tmp_path / "other", "13.0")
    environ = {"PATH": str(other.parent), "CUDA_HOME": str(tmp_path / "home")}
    assert _build.find_nvcc(environ) == Nvcc(home, "12.8")
    assert _build.find_nvcc({"PATH": str(other.parent)}) == Nvcc(other, "13.0")


def test_compiler(tmp_path):
    assert _build.find_compiler({"PATH": str(tmp_path)}) is None
    assert _build.find_compiler({"PATH": str(tmp_path), "CXX": "c++"}) is None
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert _build.find_compiler({"PATH": str(tmp_path)}) == str(compiler)


def test_tools_are_found_beside_a_python_that_is_not_activated(tmp_path):
    tool = tmp_path / "venv" / "bin" / "cmake"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    environ = {"PATH": str(tmp_path)}
    assert _build.find_tool("cmake", environ, str(tool.with_name("python"))) == str(tool)
    assert _build.find_tool("cmake", environ, str(tmp_path / "python")) is None


@pytest.mark.parametrize("torch, headers", [(CU128, ["cublas", "cuda_runtime"]), (CU130, ["cu13"])])
def test_cuda_headers_of_the_pip_packages(torch, headers, tmp_path):
    torch = Torch(torch.version, torch.cuda, tmp_path / "torch")
    for name in headers:
        (tmp_path / "nvidia" / name / "include").mkdir(parents=True)
        (tmp_path / "nvidia" / name / "lib").mkdir()
    library = tmp_path / "nvidia" / headers[-1] / "lib" / f"libcudart.so.{torch.cuda_major}"
    library.touch()
    includes, cudart = _build.cuda_package(torch)
    assert includes == [tmp_path / "nvidia" / name / "include" for name in headers]
    assert cudart == library


def test_cmake_arguments():
    def arguments(plan):
        return _build.cmake_arguments(plan, Path("/out"), "/py", "/pybind", "/bin/ninja")

    cpu = arguments(decide())
    assert "-DCMAKE_MAKE_PROGRAM=/bin/ninja" in cpu and "-DMOLEGRAD_CUDA_MODE=none" in cpu
    assert not any("CMAKE_CUDA" in argument for argument in cpu)
    objects = arguments(decide(nvcc=NVCC13, MOLEGRAD_CUDA="OBJECTS"))
    assert "-DCMAKE_CUDA_COMPILER=/cuda/bin/nvcc" in objects
    assert not any("torch_cuda" in argument for argument in objects)
    linked = arguments(decide(CU130, NVCC13))
    assert any("libtorch_cuda" in argument for argument in linked)
    assert "-DMOLEGRAD_CUDART=" in linked  # none beside torch: the toolkit's own


def test_the_build_file_needs_neither_torch_nor_the_package(tmp_path):
    """setup.py loads it by path in an isolated environment."""
    path = importlib.util.find_spec("molegrad._build").origin
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('b', {path!r})\n"
        "m = importlib.util.module_from_spec(spec); sys.modules['b'] = m\n"
        "spec.loader.exec_module(m); print('torch' in sys.modules, m.BuildError.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "BuildError"]
