"""The metrics file: flushed, readable after a kill, continued by a resume; dashboards optional."""

import builtins
import json
import math
import os
import subprocess
import sys
import time

import pytest

from molegrad.gpt.train import logger as module
from molegrad.gpt.train.logger import (
    METRICS,
    RunLogger,
    Trackio,
    Wandb,
    grouped,
    parse_dashboards,
    read_metrics,
)

RECORD = {
    "step": 3,
    "train/loss": 2.0,
    "streaming/energy_capture": 0.9,
    "layer/transformer.h.0.mlp.c_fc/energy_capture": 0.8,
    "shadow/cosine": 0.7,
    "shadow/transformer.h.0.mlp.c_fc/cosine": 0.6,
}


def test_records_are_on_disk_at_once(tmp_path):
    with RunLogger(tmp_path, dashboards="none") as logger:
        logger.log({"step": 1, "train/loss": 2.5})
        assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.5}]
        logger.log({"step": 2, "train/loss": math.nan})
    text = (tmp_path / METRICS).read_text()
    assert [json.loads(line) for line in text.splitlines()][1] == {"step": 2, "train/loss": "nan"}


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    with RunLogger(tmp_path, dashboards="none") as logger:
        for step in range(1, 6):
            logger.log({"step": step, "run": "first"})
    with RunLogger(tmp_path, dashboards="none", resume_step=3) as logger:
        logger.log({"step": 4, "run": "second"})
    assert [(r["step"], r["run"]) for r in read_metrics(tmp_path)] == [
        (1, "first"),
        (2, "first"),
        (3, "first"),
        (4, "second"),
    ]
    RunLogger(tmp_path, dashboards="none").close()
    assert read_metrics(tmp_path) == []


def test_a_half_written_last_line_is_left_out(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2, "tr')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_record_without_a_step_is_an_error(tmp_path):
    with (
        RunLogger(tmp_path, dashboards="none") as logger,
        pytest.raises(ValueError, match="'step'"),
    ):
        logger.log({"loss": 1.0})


def test_an_inactive_logger_writes_nothing(tmp_path):
    with RunLogger(tmp_path / "run", active=False) as logger:
        logger.log({"step": 1})
    assert not (tmp_path / "run").exists()


def test_without_wandb_one_line_says_so(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def no_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_wandb)
    with RunLogger(tmp_path) as logger:
        logger.log({"step": 1})
        logger.log({"step": 2})
    assert capsys.readouterr().out.count("wandb is not installed") == 1
    assert len(read_metrics(tmp_path)) == 2


class Run:
    """A wandb run that notes what it is told."""

    def __init__(self, folder, seen):
        self.dir, self.seen = str(folder / "wandb/offline-run-1/files"), seen
        seen |= {"logged": [], "defined": {}}

    def define_metric(self, name, **options):
        self.seen["defined"][name] = options

    def log(self, metrics):
        self.seen["logged"].append(metrics)

    def finish(self):
        self.seen["finished"] = True


@pytest.mark.parametrize(("variable", "mode"), [(None, "offline"), ("disabled", "disabled")])
def test_wandb_is_offline_unless_the_user_chose(tmp_path, monkeypatch, capsys, variable, mode):
    wandb = pytest.importorskip("wandb")
    seen = {}
    monkeypatch.setattr(
        wandb, "init", lambda **options: seen.update(options) or Run(tmp_path, seen)
    )
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    with RunLogger(tmp_path, name="x", config={"depth": 2}) as logger:
        logger.log({"step": 1, "train/loss": 2.0, "layer/a/drift": 0.1})
    assert seen["mode"] == mode and seen["name"] == "x" and seen["config"] == {"depth": 2}
    assert seen["logged"] == [{"step": 1, "train/loss": 2.0, "layer_drift/a": 0.1}]
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0, "layer/a/drift": 0.1}]
    assert seen["finished"] and seen["defined"]["*"] == {"step_metric": "step"}
    assert seen["defined"]["val/bpb"]["summary"] == "min"
    shown = f"wandb: wandb sync {tmp_path / 'wandb/offline-run-1'}" in capsys.readouterr().out
    assert shown == (mode == "offline")


@pytest.mark.parametrize(
    ("given", "kinds"), [("none", []), ("wandb,trackio", ["wandb", "trackio"])]
)
def test_dashboards_are_those_named(tmp_path, monkeypatch, given, kinds):
    asked = []
    monkeypatch.setattr(module, "_start", lambda kind, *rest: asked.append(kind))
    with RunLogger(tmp_path, dashboards=given, resume_step=1) as logger:
        logger.log({"step": 2})
    assert asked == kinds


def test_names_of_dashboards():
    assert parse_dashboards("wandb") == ("wandb",) and parse_dashboards("none") == ()
    assert parse_dashboards(" trackio, wandb,trackio") == ("trackio", "wandb")
    for wrong in ("", "wandbb", "wandb,none", "tensorboard"):
        with pytest.raises(ValueError, match="choose wandb, trackio"):
            parse_dashboards(wrong)


def test_layers_stand_side_by_side_in_one_section_a_metric():
    assert grouped(RECORD) == {
        "step": 3,
        "train/loss": 2.0,
        "streaming/energy_capture": 0.9,
        "layer_energy_capture/transformer.h.0.mlp.c_fc": 0.8,
        "shadow/cosine": 0.7,
        "shadow_cosine/transformer.h.0.mlp.c_fc": 0.6,
    }


def test_a_dashboard_that_fails_is_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def fail(**options):
        raise RuntimeError("no disk")

    monkeypatch.setattr(wandb, "init", fail)
    RunLogger(tmp_path).close()
    assert "wandb could not start (no disk)" in capsys.readouterr().out


def times(value):
    return {f"time/{phase}_ms": value for phase in ("forward", "backward", "data")}


def test_an_offline_wandb_run_holds_charts_over_steps_and_the_best(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    board = Wandb(tmp_path, "first", {"depth": 2, "layers": ("a", "b")})
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
from molegrad.gpt.logger import RunLogger
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
    board = Trackio("first", {"depth": 2}, resumed=True)
    board.log(RECORD)
    assert seen["options"]["resume"] == "allow" and seen["options"]["config"] == {"depth": 2}
    step, values = seen["logged"]
    assert step == 3 and "step" not in values and values["shadow/cosine"] == 0.7
    assert board.close() == "trackio show --project molegrad" and seen["finished"]
