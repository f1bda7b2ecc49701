"""What MoleGrad's commands import, and what of it is not there.

    python - <molegrad/_needs.py

scripts/setup.sh runs it where MOLEGRAD_DEPS=0 forbids to install anything else. Like _build.py it
needs neither torch nor the package. Every module is really imported: one that was brought along
without what it imports itself is as good as missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

COMMANDS = (  # of every benchmark, training and test, named as they are installed
    "torch>=2.10", "filelock", "numpy", "pytest", "rich", "rustbpe", "safetensors", "tiktoken",
)  # fmt: skip
BUILD = ("setuptools>=77", "cmake", "ninja", "pybind11")
INSTALL = ("setuptools>=77",)  # without the extension
FEATURES = {
    "chatterbot-corpus": "exchanges to fine-tune on",
    "clang-format": "lint",
    "matplotlib": "reports, budget and compare",
    "networkx": "part of the embedded text",
    "pyarrow": "downloaded text",
    "pytest-xdist": "tests side by side",
    "pyyaml": "exchanges to fine-tune on",
    "ruff": "lint",
    "sympy": "part of the embedded text",
    "wandb": "dashboards",
}
MODULES = {
    "chatterbot-corpus": "chatterbot_corpus",
    "clang-format": "clang_format",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
}
PROGRAMS = ("cmake", "ninja")  # which may come with the system, and not as a package


def absent(requirements: Iterable[str]) -> dict[str, str]:
    """Requirement -> what is wrong, of those that cannot be imported or are too old."""
    found = {}
    for requirement in requirements:
        name, _, floor = requirement.partition(">=")
        beside = Path(sys.executable).with_name(name)
        if name in PROGRAMS and (shutil.which(name) or beside.exists()):
            continue
        try:
            importlib.import_module(MODULES.get(name, name))
            version = importlib.metadata.version(name) if floor else ""
        except importlib.metadata.PackageNotFoundError:
            found[requirement] = f"the version of {name} is not known"
        except Exception as error:  # an extension of another Python, what it imports itself, ...
            found[requirement] = str(error) or type(error).__name__
        else:
            if _numbers(version) < _numbers(floor):
                found[requirement] = f"{name} {version} is too old"
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", version.partition("+")[0])[:2])


def report(missing: Mapping[str, str], features: Iterable[str]) -> str:
    """What to tell; "" where nothing is missing."""
    lines = []
    if missing:
        names = " ".join(f"'{name}'" if ">" in name else name for name in missing)
        lines = [
            "MOLEGRAD_DEPS=0 installs MoleGrad alone, and its commands need what is not here:",
            *(f"  {name}: {why}" for name, why in missing.items()),
            f"Remedy, with an index:  python -m pip install {names}",
            "without one, from wheels that were brought along:",
            f"  python -m pip install --no-index --find-links=FOLDER {names}",
            "or a folder on PYTHONPATH that holds them, what they import included.",
        ]
    left_out = ", ".join(f"{name} ({FEATURES[name]})" for name in features)
    return "\n".join([*lines, *([f"Not here, for single uses: {left_out}"] if left_out else [])])


def main() -> int:
    """Says what is missing; the status is 1 where a command could not run."""
    build = INSTALL if os.environ.get("MOLEGRAD_BUILD") == "0" else BUILD
    missing = absent((*build, *COMMANDS))
    text = report(missing, absent(FEATURES))
    if text:
        print(text, file=sys.stderr if missing else sys.stdout)
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
