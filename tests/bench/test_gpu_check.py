"""scripts/gpu_check.sh with a Python that stands in for what needs a GPU."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GRAD = """
import json, sys, time
from molegrad.bench import grad
from molegrad.bench.partial import exit_status, until_interrupted

result = {name: [] for name in grad.TABLES}
result |= {"device": "a GPU", "bandwidth": None, "config": {"dtype": "bfloat16", "device": "cuda"}}
with until_interrupted(result):
    print("measuring")
    time.sleep(60)
print(json.dumps(result))
print("a warning at the very end", file=sys.stderr)
sys.exit(exit_status(result))
"""


@pytest.fixture
def check(tmp_path):
    """Starts the script with settings; its folder is tmp_path / "out". `ignored`: with SIGINT
    ignored, as what a shell starts in the background."""
    (tmp_path / "grad.py").write_text(GRAD)
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in\n'
        f'  *scripts.bench_grad*) exec "{sys.executable}" "{tmp_path}/grad.py" ;;\n'
        '  *scripts.bench_* | "-m pytest"*) echo "$PYTORCH_CUDA_ALLOC_CONF $*" ; exit 3 ;;\n'
        f'  *) exec "{sys.executable}" "$@" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    started = []

    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def start(ignored=False, **settings):
        environment = os.environ | {
            "MOLEGRAD_VENV": "none", "MOLEGRAD_SKIP_INSTALL": "1", "PYTHON": str(python),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                ["bash", "scripts/gpu_check.sh", str(tmp_path / "out")],
                cwd=ROOT, env=environment | settings, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                preexec_fn=ignore if ignored else None,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()


def impatient(tmp_path):
    """A PATH whose `timeout` waits for 8 seconds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shim = folder / "timeout"
    shim.write_text(f'#!/bin/sh\nshift 3\nexec {shutil.which("timeout")} --signal=INT 8 "$@"\n')
    shim.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_part_out_of_time_leaves_what_it_has(check, tmp_path):
    settings = {"PATH": impatient(tmp_path), "MEMORY_FLAGS": "--steps=3 --x=1"}
    script = check(ignored=True, PARTS="grad memory", **settings)
    out, _ = script.communicate(timeout=120)
    assert script.returncode == 1, out
    parts = [line.split()[:2] for line in (tmp_path / "out/parts.txt").read_text().splitlines()]
    assert parts == [["grad", "124"], ["memory", "3"]]
    log = (tmp_path / "out/grad.log").read_text()
    assert log.startswith("measuring") and '"interrupted": true' in log
    assert log.endswith("a warning at the very end\n")
    text = (tmp_path / "out/gpu_check.md").read_text()
    assert "| grad | out of time |" in text and "a GPU, bfloat16." in text
    assert "Interrupted: what was measured until then." in text
    memory = (tmp_path / "out/memory.log").read_text()
    assert memory.startswith("expandable_segments:True -m scripts.bench_memory --device=cuda")
    assert "--steps=3 --x=1 --json" in memory

    # Another part into the same folder: what is there of others stays.
    again = check(PARTS="memory")
    out, _ = again.communicate(timeout=120)
    parts = [line.split()[:2] for line in (tmp_path / "out/parts.txt").read_text().splitlines()]
    assert parts == [["grad", "124"], ["memory", "3"]], out
    assert "a GPU, bfloat16." in (tmp_path / "out/gpu_check.md").read_text()


def test_ctrl_c_ends_the_part_at_hand_and_leaves_out_the_rest(check, tmp_path):
    script, log = check(PARTS="grad step"), tmp_path / "out/grad.log"
    end = time.time() + 60
    while time.time() < end and not (log.is_file() and "measuring" in log.read_text()):
        time.sleep(0.1)
    script.send_signal(signal.SIGINT)
    out, _ = script.communicate(timeout=120)
    assert script.returncode == 1, out
    parts = [line.split()[:2] for line in (tmp_path / "out/parts.txt").read_text().splitlines()]
    assert parts == [["grad", "130"], ["step", "missing"]], out
    text = (tmp_path / "out/gpu_check.md").read_text()
    assert "| grad | interrupted |" in text and "left out after Ctrl-C" in text


def test_an_unknown_part_is_named(check):
    script = check(PARTS="grad everything")
    out, _ = script.communicate(timeout=60)
    assert script.returncode == 2 and "PARTS: everything is unknown" in out
