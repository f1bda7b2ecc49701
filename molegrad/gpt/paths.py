"""Where everything a run writes lies: the one place that knows $MOLEGRAD_HOME.

    $MOLEGRAD_HOME (default ~/.cache/molegrad)
        tokenizer/     tokenizer.json and its manifest
        tokenizers/NAME/   further tokenizers
        data/          corpora, shards, token caches
        runs/NAME/     config.json, metrics.jsonl, checkpoints
        report/        report.md and plots

Every function creates the directory it returns. The environment variable is read at each call, so
tests (and programs) may set it at any time.
"""

import os
import re
from pathlib import Path

ENV = "MOLEGRAD_HOME"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _made(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot create the directory {path} ({error}); set {ENV} to a folder you can write"
        ) from error
    return path


def home() -> Path:
    """The root folder: $MOLEGRAD_HOME, or ~/.cache/molegrad where that is unset or empty."""
    value = os.environ.get(ENV, "").strip()
    root = Path(value).expanduser() if value else Path.home() / ".cache" / "molegrad"
    return _made(root.absolute())


def tokenizer_dir(name: str = "") -> Path:
    """The folder of the default tokenizer, or of the one called `name`."""
    return _made(home() / "tokenizers" / check_run_name(name) if name else home() / "tokenizer")


def data_dir() -> Path:
    """The folder of corpora, downloaded shards and token caches."""
    return _made(home() / "data")


def report_dir() -> Path:
    """The folder of report.md and its plots."""
    return _made(home() / "report")


def check_run_name(name: str) -> str:
    """Return `name` if it can be a folder's name on every system; raise ValueError otherwise."""
    if not isinstance(name, str) or not _RUN_NAME.fullmatch(name) or name.endswith("."):
        raise ValueError(
            f"run name {name!r} is not usable as a folder name: take 1 to 100 of the characters "
            "A-Z a-z 0-9 . _ - and begin with a letter or digit"
        )
    return name


def run_dir(name: str) -> Path:
    """The folder of the run `name`; ValueError if the name can't be a folder's name."""
    return _made(home() / "runs" / check_run_name(name))
