import subprocess
import sys
from pathlib import Path

import pytest

from molegrad import _needs

ROOT = Path(__file__).parents[1]


def test_what_is_missing_broken_or_too_old_is_named(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import surely_not_there\n")
    (tmp_path / "unknown_age.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = ("torch>=2.10", "torch>=99", "nowhere", "halfway", "unknown_age>=1", "numpy")
    assert _needs.absent(wanted) == {
        "torch>=99": f"torch {_needs.importlib.metadata.version('torch')} is too old",
        "nowhere": "No module named 'nowhere'",
        "halfway": "No module named 'surely_not_there'",
        "unknown_age>=1": "the version of unknown_age is not known",
    }


def test_programs_of_the_system_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(_needs.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(sys.modules, "cmake", None)  # as if there were no such package
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "cmake" in _needs.absent(["cmake"])
    (tmp_path / "cmake").touch(mode=0o755)
    assert _needs.absent(["cmake"]) == {}


def test_the_report_has_a_remedy_and_names_what_is_of_no_consequence():
    missing = {"tiktoken": "No module named 'tiktoken'", "torch>=2.10": "too old"}
    text = _needs.report(missing, ["wandb"])
    assert "  tiktoken: No module named 'tiktoken'\n" in text
    assert "pip install --no-index --find-links=FOLDER tiktoken 'torch>=2.10'\n" in text
    assert text.endswith("Not here, for single uses: wandb (dashboards)")
    assert _needs.report({}, []) == ""


def test_every_dependency_is_asked_for():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = {*project["project"]["dependencies"], *extras["gpt"], *extras["test"]}
    assert wanted == {*_needs.COMMANDS, *_needs.FEATURES}
    build = {name.partition(">=")[0] for name in project["build-system"]["requires"]}
    assert build == {name.partition(">=")[0] for name in _needs.BUILD}


def test_it_runs_where_nothing_is_installed(tmp_path):
    """-S: without the packages of the environment, torch among them."""
    done = subprocess.run(
        [sys.executable, "-S", "-"], input=Path(_needs.__file__).read_text(), cwd=tmp_path,
        capture_output=True, text=True, env={"PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1 and "  tiktoken: No module named 'tiktoken'" in done.stderr
    assert "  torch>=2.10: No module named 'torch'" in done.stderr
