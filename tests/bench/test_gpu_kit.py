"""The scripts for a GPU machine, as far as a CPU can run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KIT = ROOT / "scripts/gpu"
# All but tests, which the suite collects by itself, and compiled, whose flags are those of step.
PARTS = ("info", "grad", "step", "profile", "fp8", "memory")


def run(tmp_path, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"),
        "MOLEGRAD_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", **settings,
    }  # fmt: skip
    command = ["bash", str(KIT / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_part_runs_on_a_cpu(tmp_path):
    done = run(tmp_path, "on-gpu.sh", "--dry-run", *PARTS)
    logs = {part: (tmp_path / f"out/{part}.log").read_text() for part in PARTS}
    assert done.returncode == 0, f"{done.stdout}\n{logs}"
    assert done.stdout.count("status 0") == len(PARTS)
    said = {
        "info": '"torch"', "grad": "lowrank_grad", "step": "tangent:rank=4", "fp8": "dw added",
        "profile": "kernels", "memory": "measured / predicted",
    }  # fmt: skip
    assert [part for part in PARTS if said[part] not in logs[part]] == []


def test_a_failure_and_an_unknown_part_are_said(tmp_path):
    done = run(tmp_path, "on-gpu.sh", "--dry-run", "memory", MEMORY_FLAGS="--lengths=7")
    assert done.returncode == 1 and "status 2" in done.stdout
    assert "needs two lengths" in done.stdout
    done = run(tmp_path, "on-gpu.sh", "info", "everything")
    assert done.returncode == 2 and "everything is no part: info tests" in done.stderr


def test_the_training_runs_on_a_cpu(tmp_path):
    done = run(tmp_path, "train.sh", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--- dense" in done.stdout and "--- exact" in done.stdout and "bpb" in done.stdout
    done = run(tmp_path, "train.sh", "--dry-run", METHODS="dense magic")
    assert done.returncode == 2 and "METHODS: magic is none of" in done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in KIT.glob("*.sh")))
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(KIT / script)], check=True)
