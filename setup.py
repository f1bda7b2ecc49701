"""Builds molegrad._C with CMake; molegrad/_build.py decides what, and explains the flags."""

import atexit
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def _load_build_tools():
    # By path: importing the package would need torch, which an isolated build does not have.
    spec = importlib.util.spec_from_file_location("molegrad_build", ROOT / "molegrad" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tools = _load_build_tools()


class CMakeBuild(build_ext):
    def run(self):
        try:
            self.plan = tools.make_plan()
        except tools.BuildError as error:
            sys.exit(f"molegrad: {error}")
        for note in self.plan.notes:
            print(f"molegrad: {note}", flush=True)
        if not self.plan.native:
            self.extensions = []
        super().run()
        # At exit, so that it is the build's last line.
        atexit.register(print, self.plan.summary(), flush=True)

    def build_extension(self, ext):
        try:
            import pybind11
        except ImportError:
            sys.exit(
                "molegrad: pybind11 was not found. Remedy: pip install pybind11 cmake ninja, or "
                "leave out --no-build-isolation"
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        # A cache of another environment names compilers and packages that may be gone.
        (work / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = tools.find_tool("cmake", os.environ)
        if cmake is None:
            sys.exit("molegrad: cmake was not found. Remedy: pip install cmake ninja")
        ninja = tools.find_tool("ninja", os.environ)
        arguments = tools.cmake_arguments(
            self.plan, target.parent, sys.executable, pybind11.get_cmake_dir(), ninja
        )
        subprocess.run([cmake, str(ROOT), *arguments], cwd=work, check=True)
        subprocess.run([cmake, "--build", "."], cwd=work, check=True)


setup(
    ext_modules=[Extension("molegrad._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
