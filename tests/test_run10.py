"""run10.sh from start to end in its smallest profile, and what it does the second time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run10(home: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    settings = {
        "MOLEGRAD_HOME": str(home),
        "MOLEGRAD_VENV": "none",  # the interpreter that runs the tests
        "MOLEGRAD_SKIP_INSTALL": "1",
        "PYTHON": sys.executable,
        "PROFILE": "smoke",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "run10.sh", *stages],
        cwd=ROOT,
        env=clean | settings | environment,
        capture_output=True,
        text=True,
    )


def commands(text: str) -> list[str]:
    shown = [line for line in text.splitlines() if "== " in line and ": python -m" in line]
    return [line.split("scripts.")[1] for line in shown]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home):
    result = run10(home)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_it_trains_compares_evaluates_reports_and_says_how_to_chat(first, home):
    shown = commands(first)
    stages = ["tok_train", "base_train", "base_eval", "base_train", "base_eval", "chat_sft"]
    assert [c.split()[0] for c in shown] == [*stages, "chat_eval", "report"]
    flag = "--streaming_preset=balanced"
    assert flag in shown[3] and flag not in shown[1]
    assert "-m scripts.chat_cli --run=smoke" in first.splitlines()[-1]
    assert "smoke-dense" in (home / "report" / "report.md").read_text()
    for run in ("smoke-dense", "smoke"):
        assert list((home / "runs" / run / "base").glob("step_*"))


def test_the_second_run_does_what_is_left_and_stages_can_be_rerun(first, home):
    again = run10(home)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(" is done") == 7 and len(commands(again.stdout)) == 8
    (checkpoint,) = (home / "runs/smoke/sft").glob("step_*")
    (checkpoint / "meta.json").unlink()
    damaged = run10(home)
    assert damaged.returncode == 2 and "none is whole" in damaged.stderr
    assert damaged.stdout.count(" is done") == 5
    alone = run10(home, "sft", SFT_FLAGS="--num-iterations=2")
    assert alone.returncode == 0, alone.stderr
    assert [c.split()[0] for c in commands(alone.stdout)] == ["chat_sft"]
    assert "--overwrite=True" in alone.stdout and "step 00002/00002" in alone.stdout
    other = run10(home, SFT_FLAGS="--num-iterations=3")
    assert other.returncode == 0, other.stderr
    assert "trained with other num_iterations: it is trained again" in other.stdout
    assert other.stdout.count(" is done") == 5 and "step 00003/00003" in other.stdout


def test_the_chat_it_ends_with_answers(first, home):
    result = subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", "--run=smoke", "--prompt=Hello",
         "--max-new-tokens=4", "--device-type=cpu"],
        cwd=ROOT, env={**os.environ, "MOLEGRAD_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_large_profile_trains_its_first_steps_at_a_reduced_size(first, home):
    """The rtx5090 profile's own flags, with a small model, text and low rank in their place."""
    small = (
        "--depth=2 --aspect-ratio=32 --max-seq-len=128 --total-batch-size=256 --num-iterations=20 "
        "--data-max-bytes=400000 --eval-tokens=1024 --device-type=cpu"
    )
    result = run10(
        home, "molegrad", PROFILE="rtx5090", DATA="embedded", BASE_FLAGS=small,
        MOLEGRAD_FLAGS="--streaming_preset=lowrank --streaming_rank_k=8 "
        "--streaming_momentum_dtype=float32",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "hours on one RTX 5090" in result.stdout and "$" in result.stdout
    assert "method tangent, gradient_mode factors (a step needs sums over 2 micro" in result.stdout
    assert "step 00020/00020" in result.stdout


def test_unknown_profiles_and_stages_are_named(home):
    assert "PROFILE=abacus is unknown" in run10(home, PROFILE="abacus").stderr
    assert "unknown stage chat" in run10(home, "chat").stderr
