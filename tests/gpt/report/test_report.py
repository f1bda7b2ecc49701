"""The report of real small runs: what it says is in their files, what is not there is named."""

import json
import math

import pytest

from molegrad.gpt import paths
from molegrad.gpt.evaluate.evaluate import main_base, main_chat
from molegrad.gpt.report.plots import curves, draw
from molegrad.gpt.report.record import RunRecord, read_runs
from molegrad.gpt.report.report import ReportConfig, comparison, main, markdown_table, report
from molegrad.gpt.train.base import base_train
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import parse
from molegrad.gpt.train.logger import read_metrics
from tests.gpt.conftest import BASE

STREAM = [
    "--enable_streaming=True",
    "--streaming_rank_k=4",
    "--streaming_min_layer_utilization=0",
    "--streaming_probes=2",
]
WATCH = ["--shadow-every=20"]


@pytest.fixture(scope="module")
def text(tiny_folder):
    """The report of the run "tiny" and of a low-rank run beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.ENV, str(tiny_folder))
        words = [*BASE, "--run=lowrank", "--num-iterations=60", "--overwrite", *STREAM, *WATCH]
        base_train(parse(BaseTrainConfig, words))
        quick = ["--run=tiny", "--max-questions=8"]
        assert main_base(quick) == 0 and main_chat(quick) == 0
        path = report(ReportConfig(runs="tiny,lowrank", show=False))
        assert path == tiny_folder / "report/report.md"
        return path.read_text()


def record(label="a", **changes):
    """A record as a run of 20 steps would give it."""
    metrics = [
        {"step": i, "train/dt": 0.01 * i, "train/tok_per_sec": 100.0 / i, "train/loss": 5.0}
        for i in range(1, 21)
    ]
    metrics.append({"step": 20, "val/bpb": 2.0})
    values = {"stage": "base", "folder": None, "config": {"steps": 20}, "metrics": metrics}
    return RunRecord(**{"label": label, "evaluations": [], **values, **changes})


def row_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_the_table_is_what_the_runs_logged(text, tiny_folder):
    final = {}
    for run in ("tiny", "lowrank"):
        records = read_metrics(tiny_folder / f"runs/{run}/base")
        final[run] = [r["val/bpb"] for r in records if "val/bpb" in r][-1]
        assert f"{final[run]:.4f}" in row_of(text, run)
    gap = 100 * (final["lowrank"] / final["tiny"] - 1)
    assert f"| {gap:+.2f}% |" in row_of(text, "lowrank")
    assert "| reference |" in row_of(text, "tiny")
    assert "rank 4, tangent, dense, ffn_only, muon" in row_of(text, "lowrank")
    assert "| 30,720 |" in row_of(text, "tiny")  # 60 steps of 8 x 64 tokens
    assert "not recorded" not in row_of(text, "tiny") + row_of(text, "lowrank")


def test_the_same_flags_are_no_difference(text):
    assert "differ in more than the method" not in text.split("## Fine-tuning")[0]


def test_every_part_is_there(text, tiny_folder):
    config = json.loads((tiny_folder / "runs/tiny/base/config.json").read_text())
    assert config["corpus"]["sha256"] in text and config["tokenizer"] in text
    assert config["machine"]["torch"] in text and config["machine"]["device"] in text
    for part in ("four_way", "arithmetic", "spelling", "Return a new array", "tiny/sft"):
        assert part in text
    assert "transformer.h.0.mlp.c_fc" in text and "taken" in text
    assert row_of(text, "streaming_rank_k").split(" | ")[1:] == ["null", "null", "4 |"]
    assert text.rstrip().endswith("tokenizer's command (tok_train --run)")  # of lowrank alone
    assert "- tiny" not in text.split("## Missing")[1]


def test_plots_are_pictures(text, tiny_folder):
    for name in ("val_bpb_step", "val_bpb_time", "train_loss", "step_time", "sft_train_loss"):
        data = (tiny_folder / f"report/{name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
        assert f"]({name}.png)" in text


def test_what_converted_layers_logged_is_shown(text, tiny_folder):
    part = text.split("## Gradient estimates")[1].split("## Health")[0]
    records = read_metrics(tiny_folder / "runs/lowrank/base")
    first, *_, last = [r["streaming/energy_capture"] for r in records
                       if "streaming/energy_capture" in r]  # fmt: skip
    assert f"| energy_capture | {first:.4g} | {last:.4g} |" in part
    true = [r["shadow/energy_capture"] for r in records if "shadow/energy_capture" in r]
    assert len(true) == 3
    assert f"| lowrank | 60 | mean | {true[-1]:.4g} |" in part
    assert "only methods 'sampled' and 'projected' add such noise" in part and "tiny:" not in part
    times = text.split("## Time by phase")[1].split("## ")[0]
    assert "| tiny |" in times and "| lowrank |" in times and "| tiny/sft |" in times
    assert "kind | action" in text.split("## Health")[1].split("## ")[0] or (
        "No findings were recorded" in text
    )
    for name in ("energy_capture", "subspace_drift", "spectra", "phases", "sft_phases"):
        assert (tiny_folder / f"report/{name}.png").stat().st_size > 5000, name
        assert f"]({name}.png)" in text


def test_a_dense_run_alone_has_no_estimates(tiny, tmp_path):
    path = report(ReportConfig(runs="tiny", output=str(tmp_path), show=False))
    part = path.read_text().split("## Gradient estimates")[1]
    assert part.lstrip().startswith("All weight gradients are dense.")
    assert not (tmp_path / "energy_capture.png").exists()


def test_the_commands_give_the_same_configurations(text, tiny_folder):
    block = text.split("## Commands")[1].split("```")[1].strip().splitlines()
    scripts = [line.split()[2] for line in block]
    names = ["tok_train", "base_train", "base_eval", "chat_sft", "chat_eval", "base_train"]
    assert scripts == [f"scripts.{name}" for name in names]
    for line, run in ((block[1], "tiny"), (block[5], "lowrank")):
        config = parse(BaseTrainConfig, line.split()[3:])
        saved = json.loads((tiny_folder / f"runs/{run}/base/config.json").read_text())
        for name in BaseTrainConfig.__dataclass_fields__:
            if name != "overwrite":
                value = getattr(config, name)
                assert (list(value) if isinstance(value, tuple) else value) == saved[name], name
    assert "--enable_streaming=True" in block[5] and "--streaming_rank_k=4" in block[5]


def test_medians_leave_the_first_steps_out():
    row = record().summary()
    assert row["step_ms"] == pytest.approx(130)  # of steps 6 .. 20
    assert row["step_ms_spread"] == "88.0 to 172.0"
    assert row["bpb"] == 2.0 and row["gradient_bytes"] is None and row["steps"] == 20


def test_what_is_not_there_is_named_and_not_invented(tmp_path):
    bare = record(metrics=[{"step": 3, "train/loss": 5.0}])
    missing = []
    table = comparison([bare], missing)
    for name in ("val bits per byte", "ms a step", "gradients MiB", "tokens"):
        assert f"a: {name}" in missing
    assert "a: ended after step 3 of 20" in missing
    assert row_of(table, "a").count("not recorded") >= 8
    files, lines = draw(curves([bare]), tmp_path)
    assert [f.name for f in files] == ["train_loss.png"]
    assert any("val/bpb" in line for line in lines)


def test_without_a_dense_run_there_is_no_gap():
    low = record(config={"enable_streaming": True, "steps": 20})
    assert "| no dense run |" in row_of(comparison([low], []), "a")


def test_runs_that_are_not_alike_are_told():
    one = record("one", config={"steps": 20, "depth": 2, "corpus": {"sha256": "a" * 64}})
    two = record("two", config={"steps": 30, "depth": 2, "corpus": {"sha256": "b" * 64}})
    text = comparison([one, two], [])
    assert "- steps: one 20, two 30" in text
    assert "- corpus: one aaaaaaaaaaaa..., two bbbbbbbbbbbb..." in text
    assert "depth" not in text


def test_numbers_that_are_not_finite_are_left_out():
    metrics = [{"step": 1, "val/bpb": 3.0}, {"step": 2, "val/bpb": "nan"}]
    assert record(metrics=metrics).series("val/bpb") == ([1], [3.0])
    assert record(metrics=[{"step": 1, "val/bpb": math.inf}]).last("val/bpb") is None


def test_cells_cannot_break_a_table():
    assert markdown_table(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x\\|y z |"


def test_the_command_shows_the_report(text, tiny, tmp_path, capsys):
    assert main(["--run=tiny", f"--output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "Base training" in out and "written" in out
    assert (tmp_path / "out/report.md").exists()


def test_names():
    assert ReportConfig(runs="a, b,a", run="c").names == ["a", "b", "c"]
    with pytest.raises(SystemExit):
        main([])


def test_missing_runs_are_named(tiny, capsys):
    assert main(["--runs=nothing"]) == 2
    assert "there is no run 'nothing'" in capsys.readouterr().err
    (tiny / "runs/empty").mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match="'empty' has no metrics"):
        read_runs(["empty"])
    (tiny / "runs/empty").rmdir()
