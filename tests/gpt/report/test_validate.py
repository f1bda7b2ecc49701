"""The validation: two real trainings and a failing one, the flags, and every criterion."""

import json
import math
from dataclasses import replace

import pytest
import torch

from molegrad.gpt import paths
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.report.criteria import Limits, is_text, judge
from molegrad.gpt.report.record import RunRecord, read_runs
from molegrad.gpt.report.validate import ValidateConfig, main, reason, state, train, with_preset
from molegrad.gpt.train import checkpoint, flags
from molegrad.gpt.train.config import resolve
from molegrad.gpt.train.logger import METRICS, read_metrics

SIZES = [
    "--depth=2",
    "--aspect-ratio=32",
    "--head-dim=16",
    "--max-seq-len=32",
    "--device-batch-size=4",
    "--eval-tokens=512",
    "--dashboards=none",
    "--threads=1",
    "--device-type=cpu",
    "--tokenizer=small",
    "--shadow-every=10",
    "--loss-margin=1",
    "--limit=4",
    "--time-limit=1000",
]
CPU = torch.device("cpu")


def config(*words):
    return flags.parse(ValidateConfig, with_preset([*SIZES, *words]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a text, a tokenizer and the runs of `done`."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv(paths.ENV, str(home))
        text = "the sun rose over a small town and people began to walk to the river"
        words = text.split()
        lines = [
            " ".join(words[(i * j + 3 * j) % len(words)] for j in range(12)) + "."
            for i in range(900)
        ]
        (home / "text.txt").write_text("\n<|endoftext|>\n".join(lines))
        Tokenizer.train(iter(lines), 300).save(paths.tokenizer_dir("small"))
        yield home


@pytest.fixture(scope="module")
def words(home):
    return [*SIZES, f"--data={home / 'text.txt'}", "--steps=30", "--json"]


@pytest.fixture(scope="module")
def done(home, words):
    """(exit code, the JSON of the last line, everything printed)."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(words)
    return code, json.loads(out.getvalue().splitlines()[-1]), out.getvalue()


def test_a_validation_meets_its_gates(done, home):
    code, result, printed = done
    gates = {gate["name"]: gate for gate in result["gates"]}
    open_gates = {name: gate for name, gate in gates.items() if gate["met"] is False}
    assert code == 0 and result["met"], open_gates
    assert gates["ended/dense"]["value"] == gates["ended/molegrad"]["value"] == 30
    assert gates["memory/gradients"]["value"] == "inf"  # the momentum takes their place
    assert gates["metrics/condition_number"]["met"] is None and len(gates) == 17
    final = {k: read_metrics(home / f"runs/{k}/base") for k in ("validate", "validate-dense")}
    bpb = {k: [r["val/bpb"] for r in v if "val/bpb" in r] for k, v in final.items()}
    assert len(bpb["validate"]) == 10  # evaluations, evenly spaced
    gap = 100 * (bpb["validate"][-1] / bpb["validate-dense"][-1] - 1)
    assert result["gap_percent"] == gates["quality"]["value"] == pytest.approx(gap)
    assert "Every criterion is met" in printed and "python -m scripts.base_train" in printed
    assert result["page"] == str(home / "report/validate.html")
    page, text = ((home / f"report/validate.{kind}").read_text() for kind in ("html", "md"))
    for shown in (page, text):
        assert "Every criterion is met" in shown and "One run of each with seed 0" in shown
    assert "| saved inputs MiB |" in text and "Return a new array" in text and "## Criteria" in text
    assert result["runs"]["dense"]["saved_bytes"] > 3 * result["runs"]["molegrad"]["saved_bytes"]
    for title in ("Training loss", "Energy capture", "Memory by part", "Time of a step by phase"):
        assert f"![{title}](validate-plots/" in text


def test_the_runs_are_alike_but_for_the_method(done, home):
    saved = {
        name: json.loads((home / f"runs/{name}/base/config.json").read_text())
        for name in ("validate", "validate-dense")
    }
    low, dense = saved["validate"], saved["validate-dense"]
    differ = {k for k in low if low[k] != dense.get(k)}
    streaming = {name for name in differ if name.startswith(("streaming_", "enable_streaming"))}
    assert differ - streaming == {"run"}
    assert low["streaming_gradient_mode"] == "momentum" and not dense["enable_streaming"]
    records = [read_metrics(home / f"runs/{name}/base") for name in saved]
    for key in ("train/tokens", "train/lrm", "train/epoch"):
        first, second = ([r.get(key) for r in run if "train/loss" in r] for run in records)
        assert first == second and len(first) == 30


def test_what_is_trained_is_not_trained_again(done, home, words, capfd):
    before = (home / "runs/validate/base" / METRICS).stat().st_mtime_ns
    assert main([*words, "--output", str(home / "again.html")]) == 0
    out = capfd.readouterr().out
    assert out.count("trained already") == 2 and (home / "again.html").exists()
    assert (home / "runs/validate/base" / METRICS).stat().st_mtime_ns == before
    assert json.loads(out.splitlines()[-1])["gap_percent"] == done[1]["gap_percent"]


def test_limits_decide_the_exit_code(done, words, capfd):
    assert main([*words, "--loss-margin=99"]) == 1
    out = capfd.readouterr().out
    assert "Not met: loss/dense/falls, loss/molegrad/falls" in out
    assert json.loads(out.splitlines()[-1])["met"] is False


def test_a_run_made_with_other_flags_is_not_passed_off(done, words, capfd):
    assert main([*words, "--matrix-lr=0.01"]) == 2
    assert "matrix_lr 0.02 (now 0.01): --overwrite" in capfd.readouterr().err
    assert main([*words[:-2], "--steps=40"]) == 2
    assert "steps 30 (now 40)" in capfd.readouterr().err


def test_a_run_that_stopped_before_its_last_line_is_resumed(done, home, words):
    mine = flags.parse(ValidateConfig, with_preset(words))
    training = resolve(mine.trainings("small")["molegrad"], CPU)
    folder = home / "runs/validate/base"
    assert state(training) == "done" and state(training, overwrite=True) == "overwrite"
    assert state(replace(training, run="nothing")) == "new"
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    (folder / METRICS).write_text("".join(lines[:-1]))
    assert state(training) == "resume" and train(training, "resume") == ""
    assert state(training) == "done" and len(read_metrics(folder)) == len(lines)


def test_the_dense_run_has_the_same_levers_and_an_exact_head(words):
    mine = flags.parse(
        ValidateConfig, with_preset([*words, "--head-rank=8", "--sequence-chunk=64"])
    )
    pair = mine.trainings("small")
    assert [pair[name].head_rank for name in ("dense", "molegrad")] == [0, 8]
    assert {training.sequence_chunk for training in pair.values()} == {64}


def test_a_training_that_fails_says_why(home, words):
    mine = flags.parse(ValidateConfig, with_preset([*words, "--run=bad", "--embedding-lr=1e39"]))
    training = resolve(mine.trainings("small")["dense"], CPU)
    folder = checkpoint.stage_dir(training.run, "base")
    (folder / METRICS).write_text('{"step": 30, "val/bpb": 1.0}\n')  # of an earlier run
    error = train(training, "new")
    assert error.startswith("exit status 1: molegrad.gpt.train.guard.NonFiniteError: step ")
    assert all("val/bpb" not in record or record["step"] < 30 for record in read_metrics(folder))


def test_reasons():
    log = "step 1\nTraceback (most recent call last):\n  x\nValueError: no data\nwandb: bye\n"
    assert reason(log, 1) == "exit status 1: ValueError: no data"
    assert reason("only this", 3) == "exit status 3: only this"
    assert reason("", -9) == "exit status -9, SIGKILL: "


def test_the_preset_is_taken_where_no_streaming_flag_is_given():
    assert with_preset(["--json"]) == ["--json", "--streaming_preset=balanced"]
    for word in ("--streaming_preset=lowrank", "--enable-streaming", "--no-enable-streaming"):
        assert with_preset(["--run", "x", word]) == ["--run", "x", word]
    made = config("--streaming_rank_k=4").trainings("")["molegrad"].streaming
    assert made.gradient_mode == "factors" and made.estimator.rank_k == 4


def test_trainings_have_every_flag_of_base_train():
    mine = config("--steps=55", "--seed=3", "--weight-decay=0.1").trainings("small")["molegrad"]
    assert (mine.num_iterations, mine.eval_every, mine.seed, mine.weight_decay) == (55, 6, 3, 0.1)
    assert config("--eval-every=20").trainings("")["dense"].eval_every == 20


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--num-iterations=5", "give --steps"),
        ("--max-train-tokens=5", "give --steps"),
        ("--resume", "goes on by itself"),
        ("--model-tag=x", "give --run"),
        ("--steps=0", "steps=0: give at least 1"),
        ("--no-enable-streaming", "nothing to compare"),
        ("--eval-every=-1", "need val/bpb"),
        ("--save-every=-2", "need a checkpoint"),
        ("--vocab=many", "give a number, or 'bytes'"),
        ("--limit=-1", "limit=-1.0: give 0 or more"),
        ("--run=a/b", "not usable as a folder name"),
    ],
)
def test_flags_that_make_no_validation_are_refused(word, told, capsys):
    with pytest.raises(SystemExit):
        config(word)
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())


# The criteria, on records made by hand


def lines(losses=None, bpb=2.0, **more):
    """Metrics of a run whose loss falls from 6 to 3, and `more` at the first steps."""
    losses = losses or [6 - 3 * i / 99 for i in range(100)]
    metrics = [{"step": i, "train/loss_raw": x, "train/dt": 0.1} for i, x in enumerate(losses, 1)]
    for step in range(max(map(len, more.values()), default=0)):
        metrics.insert(step, {"step": step + 1, **{k: v[step] for k, v in more.items()}})
    return [*metrics, {"step": len(losses), "val/bpb": bpb}]


def record(label="m", metrics=None, folder=None, **config):
    config = {"steps": 100, "device_type": "cpu", "enable_streaming": label != "d", **config}
    return RunRecord(label, "base", folder, config, metrics or lines(), [])


def judged(dense, low, samples=None, error=""):
    errors, samples = {"dense": "", "molegrad": error}, samples or {"dense": [], "molegrad": []}
    found = judge(Limits(), 100, errors, dense, low, samples)
    json.dumps([one.to_dict() for one in found], allow_nan=False)
    return {one.name: one for one in found}


def test_a_good_run_meets_every_criterion_that_applies():
    readings = {
        "layer/a/energy_capture": [0.9, 0.8, 0.8, 0.7],
        "layer/a/condition_number": [1e2, 1e9, 1e2, 1e3],
        "health/findings": [0, 0, 0, 0],
    }
    low = record(metrics=lines(bpb=2.01, **readings))
    texts = {"dense": [("a", " some words")], "molegrad": [("a", " text"), ("c", "")]}
    found = judged(record("d"), low, texts)
    assert {name for name, one in found.items() if not one.met} == {"memory/gradients"}
    assert found["quality"].value == pytest.approx(0.5) and found["time"].value == 0
    assert found["metrics/condition_number"].value == 550
    assert found["metrics/energy_capture"].value == pytest.approx(0.7 / 0.9)
    assert found["samples/molegrad"].value == 1


def test_nothing_recorded_meets_no_criterion():
    found = judged(
        record("d"), RunRecord("m", "base", None, {}, [], []), error="exit status 1: NonFiniteError"
    )
    met = {name for name, one in found.items() if one.met}
    assert met == {"ended/dense", "loss/dense/falls", "loss/dense/rises", "metrics/finite"}
    assert all(one.met is False for name, one in found.items() if name not in met)
    assert "; exit status 1: NonFiniteError" in found["ended/molegrad"].how


def test_a_run_that_stopped_early_has_not_ended():
    ended = judged(record("d"), record(metrics=lines([5.0, 4.0])))["ended/molegrad"]
    assert ended.met is False and (ended.value, ended.limit) == (2, 100)


def test_other_conditions_are_named():
    found = judged(record("d", seed=0), record("m", seed=1))["same_conditions"]
    assert found.met is False and found.value == 1 and "seed: d 0, m 1" in found.how


@pytest.mark.parametrize(
    ("losses", "falls", "rises"),
    [
        ([5.0] * 100, False, True),
        ([5 - 0.01 * (i % 2) - 0.02 * i for i in range(100)], True, True),
        ([5 - 0.05 * i if i < 50 else 3 + 0.03 * (i - 50) for i in range(100)], True, False),
        ([3 + 0.01 * i for i in range(100)], False, False),
        ([6.0, 5.0, 4.0, 3.9, 4.0], True, True),
        ([6.0], False, False),
    ],
)
def test_the_loss_has_to_fall_and_must_not_rise_again(losses, falls, rises):
    found = judged(record("d"), record(metrics=lines(losses)))
    assert found["loss/molegrad/falls"].met is falls and found["loss/molegrad/rises"].met is rises


def test_numbers_that_are_not_finite_are_counted():
    odd = record(metrics=[*lines(), {"step": 7, "train/loss": "nan", "val/bpb": math.inf}])
    found = judged(record("d"), odd)["metrics/finite"]
    assert found.met is False and found.value == 2 and "m step 7: train/loss" in found.how


def test_alarms_of_the_health_checks_count_and_other_findings_do_not(tmp_path):
    watched = record(metrics=lines(**{"health/findings": [0, 1]}), folder=tmp_path)
    for kind, met in (("frozen", True), ("exploding", False)):
        row = {"step": 9, "layer": "h.0", "kind": kind, "message": "what was found"}
        (tmp_path / "health.jsonl").write_text(json.dumps(row) + "\n")
        found = judged(record("d"), watched)["metrics/health"]
        assert found.met is met and ("step 9, h.0: what was found" in found.how) is not met
    assert judged(record("d"), record())["metrics/health"].met is None


@pytest.mark.parametrize(
    ("key", "readings", "met", "worst"),
    [
        ("condition_number", {"layer/a": [10.0, 1e9, 20.0], "layer/b": [1e7] * 3}, False, "b"),
        ("condition_number", {"layer/a": [10.0, 1e9, 20.0]}, True, "a"),
        ("energy_capture", {"layer/a": [0.9] * 4, "layer/b": [0.9, 0.6, 0.3, 0.2]}, False, "b"),
        ("energy_capture", {"shadow/a": [0.9, 0.8], "shadow": [0.9, 0.1]}, True, "a"),
        ("energy_capture", {"streaming": [0.9, 0.8]}, True, "mean over layers"),
        ("energy_capture", {}, None, "none logged"),
    ],
)
def test_the_worst_layer_decides(key, readings, met, worst):
    low = record(metrics=lines(**{f"{name}/{key}": values for name, values in readings.items()}))
    found = judged(record("d"), low)[f"metrics/{key}"]
    assert found.met is met and f": {worst};" in found.how


@pytest.mark.parametrize(("bpb", "within", "outer"), [(1.9, 1, 1), (2.03, 0, 1), ("nan", 0, 0)])
def test_quality_is_the_gap_to_dense(bpb, within, outer):
    found = judged(record("d"), record(metrics=lines(bpb=bpb)))
    assert (found["quality"].met, found["quality/outer"].met) == (within, outer)
    assert bpb == "nan" or found["quality"].value == pytest.approx(100 * (bpb / 2 - 1))


def test_a_slow_step_and_a_large_gradient_are_found(done, home, monkeypatch):
    monkeypatch.setenv(paths.ENV, str(home))
    dense, low = (read_runs([name])[0] for name in ("validate-dense", "validate"))
    slow = replace(low, metrics=[{**r, "train/dt": 9.0} for r in low.metrics])
    assert judged(dense, slow)["time"].met is False
    assert judged(dense, low)["memory/gradients"].met
    saved = {f"layer/{name}/memory_saved_mb": values[-1] * 0.7
             for name, (_, values) in low.layers("memory_saved_mb").items()}  # fmt: skip
    found = judged(dense, replace(low, metrics=[{"step": 1, **saved}]))["memory/gradients"]
    assert found.met is False and found.value == pytest.approx(1 / 0.3)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("a new array of the input.\n\n>>> x", True),
        (" été und Wörter", True),
        ("  \n", False),
        ("!!! ,, .", False),
        ("\ufffd\ufffd some words", False),
        ("words\x1b[0m", False),
        ("1 2 3 4", False),
    ],
)
def test_only_text_passes_as_a_sample(text, good):
    assert is_text(text) is good
