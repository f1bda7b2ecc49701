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
        timeout=600,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home):
    result = run10(home)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_it_trains_compares_evaluates_reports_and_says_how_to_chat(first, home):
    commands = [line for line in first.splitlines() if "== " in line and ": python -m" in line]
    stages = ["tok_train", "base_train", "base_eval", "base_train", "base_eval", "chat_sft"]
    stages += ["chat_eval", "report"]
    assert [c.split("scripts.")[1].split()[0] for c in commands] == stages
    flag = "--streaming_preset=balanced"
    assert flag in commands[3] and flag not in commands[1]
    assert "-m scripts.chat_cli --run=smoke" in first.splitlines()[-1]
    assert (home / "report" / "report.md").is_file()
    assert list((home / "report").glob("*.png"))
    report = (home / "report" / "report.md").read_text()
    assert "smoke-dense" in report
    for run in ("smoke-dense", "smoke"):
        assert list((home / "runs" / run / "base").glob("step_*"))


def test_the_second_run_reuses_everything_and_stages_can_be_rerun(first, home):
    again = run10(home)
    assert again.returncode == 0, again.stderr
    assert "== " in again.stdout and "python -m scripts.base_train --run=smoke " in again.stdout
    assert again.stdout.count("is done (bash run10.sh") == 8
    alone = run10(home, "report")
    assert alone.returncode == 0, alone.stderr
    assert "== report: python -m scripts.report" in alone.stdout.replace("\033[1m", "")
    assert "molegrad: python -m" not in alone.stdout and "tokenizer: python" not in alone.stdout


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
        MOLEGRAD_FLAGS="--streaming_method=tangent --streaming_gradient_mode=factored "
        "--streaming_rank_k=8 --streaming_power_iters=1 --streaming_target_layers=ffn_only "
        "--streaming_warm_start_decay=0.95",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "hours on one RTX 5090" in result.stdout and "$" in result.stdout
    assert "step 00020/00020" in result.stdout


def test_fine_tuning_has_flags_of_its_own(first, home):
    result = run10(home, "sft", SFT_FLAGS="--num-iterations=2")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "--num-iterations=6 --eval-every=3 --num-iterations=2" in result.stdout
    assert "step 00002/00002" in result.stdout


def test_evaluation_leaves_out_models_that_are_not_there(home):
    result = run10(home, "eval", RUN="nothing")
    assert result.returncode == 0, result.stderr
    left_out = [line for line in result.stdout.splitlines() if "eval leaves out" in line]
    assert [line.rpartition("run10.sh ")[2] for line in left_out] == ["dense", "molegrad", "sft"]
    assert "chat_eval of run nothing, which has no such model yet" in left_out[-1]


def test_unknown_profiles_and_stages_are_named(home):
    assert "PROFILE=abacus is unknown" in run10(home, PROFILE="abacus").stderr
    assert "unknown stage chat" in run10(home, "chat").stderr
