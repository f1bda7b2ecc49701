"""The metrics file: flushed, readable after a kill, continued by a resume; wandb optional."""

import builtins
import json
import math

import pytest

from molegrad.gpt.train.logger import METRICS, RunLogger, read_metrics


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
    monkeypatch.setattr(
        "molegrad.gpt.train.dashboards.start", lambda kind, *rest: asked.append(kind)
    )
    with RunLogger(tmp_path, dashboards=given, resume_step=1) as logger:
        logger.log({"step": 2})
    assert asked == kinds
    RunLogger(tmp_path, dashboards="none").close()
    assert asked == kinds
    with pytest.raises(ValueError, match="choose wandb, trackio"):
        RunLogger(tmp_path, dashboards="wandbb")
