"""Decides what `pip install` compiles: finds torch, a compiler and CUDA, and plans the build.

setup.py loads this file by path, so it imports neither torch nor the package. The decisions are
plain functions of what was found; tests/test_build.py runs them without any of it installed.

Environment variables:
    MOLEGRAD_BUILD   0 installs without compiling, 1 fails where the extension cannot be built;
                     unset builds it, or says why not where torch is missing.
    MOLEGRAD_CUDA    AUTO (default) builds the CUDA side where nvcc and a CUDA torch are there,
                     ON fails where they are not, OFF builds the CPU ops only, OBJECTS compiles
                     every CUDA source beside any torch without linking it.
    MOLEGRAD_CUDA_ARCHITECTURES
                     as CMAKE_CUDA_ARCHITECTURES, default 90a-real;120-real;120-virtual.
    MOLEGRAD_PYTHON  the Python whose torch to build for, where it is not the one that installs.
    CUDA_HOME, CXX   as everywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = "90a-real;120-real;120-virtual"
TORCH_FLOOR = (2, 10)
CUDA_MODES = ("AUTO", "ON", "OFF", "OBJECTS")

_ASK_TORCH = """
import json, os, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda}
facts["root"] = os.path.dirname(torch.__file__)
print("MOLEGRAD" + json.dumps(facts))
"""


class BuildError(RuntimeError):
    """The build cannot go on; the message names the remedy."""


@dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None  # CUDA version torch was built with, "12.8", or None
    root: Path

    @property
    def cuda_major(self) -> int | None:
        return int(self.cuda.split(".")[0]) if self.cuda else None

    @property
    def includes(self) -> list[Path]:
        return [self.root / "include"]

    def libraries(self, cuda: bool) -> list[Path]:
        names = ["torch_cpu", "c10"] + (["torch_cuda"] if cuda else [])
        suffix = "dylib" if sys.platform == "darwin" else "so"
        return [self.root / "lib" / f"lib{name}.{suffix}" for name in names]


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class Plan:
    """What to build: `cuda` is none, objects (compiled, not linked) or link."""

    native: bool
    cuda: str = "none"
    torch: Torch | None = None
    nvcc: Nvcc | None = None
    architectures: str = ARCHITECTURES
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        if not self.native:
            return "molegrad: installed without native kernels (torch reference only)"
        what = {
            "none": "CPU ops",
            "objects": f"CPU ops; CUDA sources compiled for {self.architectures}, not linked",
            "link": f"CPU ops and CUDA for {self.architectures}",
        }[self.cuda]
        beside = f"torch {self.torch.version}"
        if self.cuda != "none":
            beside += f", nvcc {self.nvcc.version}"
        return f"molegrad: built molegrad._C with {what} ({beside})"


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which sys.executable sees its own packages.

    An isolated build shadows them: pip puts an overlay with a sitecustomize.py on PYTHONPATH and
    sets PYTHONNOUSERSITE.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
    return {name: value for name, value in environ.items() if name not in hidden}


def ask_torch(python: str, environ: Mapping[str, str]) -> Torch | None:
    """The torch that `python` imports, or None."""
    try:
        done = subprocess.run(
            [python, "-c", _ASK_TORCH], env=dict(environ), capture_output=True, text=True
        )
    except OSError:
        return None
    found = re.search(r"^MOLEGRAD(\{.*\})$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or found is None:
        return None
    facts = json.loads(found.group(1))
    return Torch(facts["version"], facts["cuda"], Path(facts["root"]))


def find_torch(environ: Mapping[str, str], ask=ask_torch) -> Torch | None:
    """torch of the environment that is being installed into.

    Tried in order: MOLEGRAD_PYTHON; sys.executable as it is (--no-build-isolation) and without
    the overlay of an isolated build; the active virtual environment, for installers that build in
    an environment of their own.
    """
    if environ.get("MOLEGRAD_PYTHON"):
        return ask(environ["MOLEGRAD_PYTHON"], clean_environment(environ))
    clean = clean_environment(environ)
    candidates = [(sys.executable, dict(environ)), (sys.executable, clean)]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if environ.get(variable):
            candidates.append((str(Path(environ[variable]) / "bin" / "python"), clean))
    for python, env in candidates:
        torch = ask(python, env)
        if torch is not None:
            return torch
    return None


def find_nvcc(environ: Mapping[str, str]) -> Nvcc | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            path = Path(environ[variable]) / "bin" / "nvcc"
            if path.exists():
                break
    else:
        on_path = shutil.which("nvcc", path=environ.get("PATH"))
        path = Path(on_path or "/usr/local/cuda/bin/nvcc")
        if not path.exists():
            return None
    done = subprocess.run([str(path), "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return Nvcc(path, found.group(1)) if found else None


def find_compiler(environ: Mapping[str, str]) -> str | None:
    wanted = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in wanted:
        path = shutil.which(name.split()[0], path=environ.get("PATH"))
        if path:
            return path
    return None


def find_tool(name: str, environ: Mapping[str, str], python: str = sys.executable) -> str | None:
    """A program on the PATH or beside `python`, whose environment need not be activated."""
    return shutil.which(name, path=environ.get("PATH")) or shutil.which(
        name, path=str(Path(python).parent)
    )


def version_tuple(version: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def plan(
    environ: Mapping[str, str], torch: Torch | None, nvcc: Nvcc | None, compiler: str | None
) -> Plan:
    """What to build from what was found.

    Raises:
        BuildError: something that was asked for cannot be built; says what is missing.
    """
    wish = environ.get("MOLEGRAD_BUILD", "")
    if wish == "0":
        return Plan(native=False, notes=["MOLEGRAD_BUILD=0: nothing is compiled."])
    mode = environ.get("MOLEGRAD_CUDA", "AUTO").upper() or "AUTO"
    if mode not in CUDA_MODES:
        raise BuildError(f"MOLEGRAD_CUDA={mode} is not one of {', '.join(CUDA_MODES)}.")
    if torch is None:
        message = (
            "no torch was found in the environment that is being installed into. Remedy: install "
            "torch >= 2.10 first and install molegrad again; or add --no-build-isolation; or set "
            "MOLEGRAD_PYTHON to the Python that has it."
        )
        if wish == "1" or mode in ("ON", "OBJECTS"):
            raise BuildError(message)
        return Plan(native=False, notes=["CAUTION: native kernels are left out: " + message])
    if version_tuple(torch.version) < TORCH_FLOOR:
        raise BuildError(
            f"torch {torch.version} is too old for the native kernels, which need 2.10 or newer. "
            "Remedy: pip install 'torch>=2.10', or MOLEGRAD_BUILD=0 to install without them."
        )
    if compiler is None:
        raise BuildError(
            f"no C++ compiler was found{' as CXX=' + environ['CXX'] if environ.get('CXX') else ''}"
            ". Remedy: install g++ 9 or newer (Debian, Ubuntu: apt install g++), or set CXX, or "
            "MOLEGRAD_BUILD=0 to install without native kernels."
        )
    architectures = environ.get("MOLEGRAD_CUDA_ARCHITECTURES") or ARCHITECTURES
    built = {"native": True, "torch": torch, "nvcc": nvcc, "architectures": architectures}
    if mode == "OFF":
        return Plan(**built)
    if mode == "OBJECTS":
        if nvcc is None:
            raise BuildError("MOLEGRAD_CUDA=OBJECTS needs nvcc. " + _NVCC_REMEDY)
        return Plan(cuda="objects", **built)

    obstacle = _cuda_obstacle(torch, nvcc)
    if obstacle is None:
        return Plan(cuda="link", **built)
    if mode == "ON" or (nvcc and torch.cuda_major and nvcc.major != torch.cuda_major):
        raise BuildError(obstacle)
    return Plan(notes=["CAUTION: only the CPU ops are built: " + obstacle], **built)


_NVCC_REMEDY = (
    "Remedy: install the CUDA toolkit or point CUDA_HOME at it; MOLEGRAD_CUDA=OFF builds the CPU "
    "ops only."
)


def _cuda_obstacle(torch: Torch, nvcc: Nvcc | None) -> str | None:
    if torch.cuda is None:
        return (
            f"torch {torch.version} is a CPU build. Remedy: install a CUDA build of torch for the "
            "GPU ops; MOLEGRAD_CUDA=OBJECTS checks the CUDA sources without one."
        )
    if nvcc is None:
        return f"torch {torch.version} uses CUDA {torch.cuda}, but no nvcc is there. {_NVCC_REMEDY}"
    if nvcc.major != torch.cuda_major:
        return (
            f"nvcc is {nvcc.version} ({nvcc.path}) but torch {torch.version} uses CUDA "
            f"{torch.cuda}: their major versions must agree. Remedy: point CUDA_HOME at a CUDA "
            f"{torch.cuda_major} toolkit, or install a torch built for CUDA {nvcc.major}, or set "
            "MOLEGRAD_CUDA=OFF for the CPU ops only."
        )
    return None


def cuda_package(torch: Torch) -> tuple[list[Path], Path | None]:
    """Header directories and the cudart library of the pip packages beside torch, if any."""
    site = torch.root.parent / "nvidia"
    if torch.cuda_major == 12:
        roots = [site / name for name in ("cublas", "cuda_runtime", "cuda_nvcc", "cuda_cccl")]
    else:
        roots = [site / f"cu{torch.cuda_major}"]
    includes = [root / "include" for root in roots if (root / "include").is_dir()]
    cudart = [path for root in roots for path in sorted((root / "lib").glob("libcudart.so.*"))]
    return includes, cudart[0] if cudart else None


def cmake_arguments(plan: Plan, output: Path, python: str, pybind11_dir: str, ninja: str | None):
    """Arguments of the configuring cmake call."""
    cuda = plan.cuda == "link"
    arguments = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        f"-DPython_EXECUTABLE={python}",
        f"-Dpybind11_DIR={pybind11_dir}",
        f"-DMOLEGRAD_TORCH_INCLUDE={_list(plan.torch.includes)}",
        f"-DMOLEGRAD_TORCH_LIBRARIES={_list(plan.torch.libraries(cuda))}",
        f"-DMOLEGRAD_TORCH_VERSION={plan.torch.version}",
        f"-DMOLEGRAD_CUDA_MODE={plan.cuda}",
    ]
    if ninja:  # always: an isolated build leaves a cache that points at a ninja since deleted
        arguments += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if plan.cuda != "none":
        arguments += [
            f"-DCMAKE_CUDA_COMPILER={plan.nvcc.path}",
            f"-DCMAKE_CUDA_ARCHITECTURES={plan.architectures}",
        ]
    if cuda:
        includes, cudart = cuda_package(plan.torch)
        arguments += [
            f"-DMOLEGRAD_CUDA_INCLUDE={_list(includes)}",
            f"-DMOLEGRAD_CUDART={cudart or ''}",  # empty: the toolkit's own
        ]
    return arguments


def _list(paths) -> str:
    return ";".join(str(path) for path in paths)


def make_plan() -> Plan:
    """The plan for this process's environment."""
    environ = os.environ
    if environ.get("MOLEGRAD_BUILD") == "0":
        return plan(environ, None, None, None)
    return plan(environ, find_torch(environ), find_nvcc(environ), find_compiler(environ))
