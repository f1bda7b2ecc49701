"""What the dashboards are handed, and the commands that they end with."""

import os
import subprocess
import sys
import time

import pytest

from molegrad.gpt.train import dashboards
from molegrad.gpt.train.dashboards import Trackio, Wandb, grouped, parse_names

RECORD = {
    "step": 3,
    "train/loss": 2.0,
    "streaming/energy_capture": 0.9,
    "layer/transformer.h.0.mlp.c_fc/energy_capture": 0.8,
    "shadow/cosine": 0.7,
    "shadow/transformer.h.0.mlp.c_fc/cosine": 0.6,
}


def test_names():
    assert parse_names("wandb") == ("wandb",) and parse_names("none") == ()
    assert parse_names(" trackio, wandb,trackio") == ("trackio", "wandb")
    for wrong in ("", "wandbb", "wandb,none", "tensorboard"):
        with pytest.raises(ValueError, match="choose wandb, trackio"):
            parse_names(wrong)


def test_layers_stand_side_by_side_in_one_section_a_metric():
    assert grouped(RECORD) == {
        "step": 3,
        "train/loss": 2.0,
        "streaming/energy_capture": 0.9,
        "layer_energy_capture/transformer.h.0.mlp.c_fc": 0.8,
        "shadow/cosine": 0.7,
        "shadow_cosine/transformer.h.0.mlp.c_fc": 0.6,
    }


def test_a_dashboard_that_fails_is_told_and_left_out(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def fail(**options):
        raise RuntimeError("no disk")

    monkeypatch.setattr(wandb, "init", fail)
    assert dashboards.start("wandb", tmp_path, "x", {}, "p") is None
    assert "wandb could not start (no disk)" in capsys.readouterr().out


def times(value):
    return {f"time/{phase}_ms": value for phase in ("forward", "backward", "data")}


def test_an_offline_wandb_run_holds_charts_over_steps_and_the_best(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    board = Wandb(tmp_path, "first", {"depth": 2, "layers": ("a", "b")}, "molegrad", False)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        board.log({**RECORD, "step": step, "val/bpb": loss, **times(loss)})
    run, summary = board._run, board._run.summary
    deadline = time.monotonic() + 20  # wandb's other process makes the summary
    while isinstance(summary.get("time/data_ms"), (float, type(None))):
        assert time.monotonic() < deadline, dict(summary)
        time.sleep(0.02)
    assert summary["val/bpb"]["min"] == 2.0
    assert [summary[name]["mean"] for name in times(0)] == [2.5] * 3
    assert summary["layer_energy_capture/transformer.h.0.mlp.c_fc"] == 0.8
    command = board.close()
    folder = command.removeprefix("wandb sync ")
    assert os.path.isdir(folder) and os.path.dirname(folder) == str(tmp_path / "wandb")
    assert [f for f in os.listdir(folder) if f.endswith(".wandb")]
    assert run.config["depth"] == 2 and run.name == "first" and run.group == "first"


TRACK = """
import sys
from pathlib import Path
from molegrad.gpt.train.logger import RunLogger
for resume in (None, 1):
    with RunLogger(Path(sys.argv[1]), "first", {"depth": 2, "layers": ("a",)}, resume_step=resume,
                   dashboards="trackio") as logger:
        logger.log({"step": 1 + (resume or 0), "train/loss": 2.0, "layer/h.0/energy_capture": 0.5})
import trackio
runs = trackio.Api().runs("molegrad")
print(len(runs), runs[0].name, runs[0].config["depth"])
"""


def test_trackio_keeps_one_local_run_that_a_resume_goes_on_with(tmp_path):
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "db")}
    words = [sys.executable, "-c", TRACK, str(tmp_path / "run")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = f"trackio: TRACKIO_DIR={tmp_path / 'db'} trackio show --project molegrad"
    assert done.stdout.count(shown) == 2
    assert "1 first 2" in done.stdout.splitlines()
    assert "Reserved" not in done.stderr


def test_trackio_is_handed_the_step_apart(tmp_path, monkeypatch):
    seen = {}

    class Run:
        def log(self, values, step):
            seen["logged"] = (step, values)

        def finish(self):
            seen["finished"] = True

    class Module:
        @staticmethod
        def init(**options):
            seen["options"] = options
            return Run()

    monkeypatch.setitem(sys.modules, "trackio", Module)
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    board = Trackio(tmp_path, "first", {"depth": 2}, "p", resumed=True)
    board.log(RECORD)
    assert seen["options"]["resume"] == "allow" and seen["options"]["config"] == {"depth": 2}
    step, values = seen["logged"]
    assert step == 3 and "step" not in values and values["shadow/cosine"] == 0.7
    assert board.close() == "trackio show --project p" and seen["finished"]
