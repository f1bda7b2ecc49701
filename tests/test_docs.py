"""The pages: generated ones are up to date, README and design short, links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "csrc" / "README.md",
    ROOT / "scripts" / "gpu" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_generated_pages_are_what_the_code_says():
    """In a process of its own: estimators that other tests define would be methods too."""
    command = [sys.executable, "-m", "scripts.make_docs", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_has_its_flags_on_the_page():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    commands = {p.stem for p in (ROOT / "scripts").glob("*.py")} - {"__init__", "make_docs"}
    assert commands == set(re.findall(r"^## `scripts\.(\w+)`$", text, re.MULTILINE))


@pytest.mark.parametrize(("name", "most"), [("README.md", 150), ("docs/design.md", 120)])
def test_pages_that_people_read_first_are_short(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    paths = [link.partition("#")[0] for link in links if "://" not in link]
    assert not [path for path in paths if path and not (page.parent / path).exists()]
