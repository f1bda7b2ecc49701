"""The validation as a command: two real trainings, a failing one, and the flags."""

import json
from dataclasses import fields, replace

import pytest
import torch

from molegrad.gpt import paths
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.report.validate import (
    Outcome,
    ValidateConfig,
    main,
    predict,
    reason,
    state,
    train,
    with_preset,
)
from molegrad.gpt.train import checkpoint, flags, setup
from molegrad.gpt.train.base import model_config
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.gpt.train.logger import METRICS, read_metrics
from molegrad.monitor import memory_bytes

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
    assert gates["memory/molegrad/gradients"]["limit"] < gates["memory/dense/gradients"]["limit"]
    assert gates["metrics/condition_number"]["met"] is None
    final = {k: read_metrics(home / f"runs/{k}/base") for k in ("validate", "validate-dense")}
    bpb = {k: [r["val/bpb"] for r in v if "val/bpb" in r] for k, v in final.items()}
    assert len(bpb["validate"]) == 10  # evaluations, evenly spaced
    gap = 100 * (bpb["validate"][-1] / bpb["validate-dense"][-1] - 1)
    assert result["gap_percent"] == gates["quality"]["value"] == pytest.approx(gap)
    assert "every gate is met" in printed and "python -m scripts.base_train" in printed
    page = (home / "report/validate.html").read_text()
    assert result["page"] == str(home / "report/validate.html") and "Every gate is met" in page
    for name in ("train-loss", "energy-capture", "spectra", "memory", "phases"):
        assert f'<figure id="plot-{name}"' in page
    assert (home / "runs/validate/validate.log").read_text().count("step 00030/00030") == 1


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
    assert "not met: loss/dense/falls, loss/molegrad/falls" in out
    assert json.loads(out.splitlines()[-1])["met"] is False


def test_a_run_made_with_other_flags_is_not_passed_off(done, words, capfd):
    assert main([*words, "--matrix-lr=0.01"]) == 2
    assert "matrix_lr 0.02 (now 0.01): --overwrite" in capfd.readouterr().err
    assert main([*words[:-2], "--steps=40"]) == 2
    assert "steps 30 (now 40)" in capfd.readouterr().err


def test_states(done, home, words):
    mine = flags.parse(ValidateConfig, with_preset(words))
    training = resolve(mine.trainings("small")["molegrad"], CPU)
    folder = home / "runs/validate/base"
    assert state(training, folder) == "done" and state(training, folder, True) == "overwrite"
    assert state(training, home / "runs/nothing/base") == "new"
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    (folder / METRICS).write_text("".join(lines[:-1]))  # as if stopped before the last line
    assert state(training, folder) == "resume"
    assert train("molegrad", training, folder, "resume") == Outcome("molegrad", 30, 0)
    assert "resumed" in (home / "runs/validate/validate.log").read_text()
    assert state(training, folder) == "done"


def test_the_dense_run_has_the_same_levers_and_an_exact_head(words):
    mine = flags.parse(
        ValidateConfig, with_preset([*words, "--head-rank=8", "--sequence-chunk=64"])
    )
    pair = mine.trainings("small")
    assert [pair[name].head_rank for name in ("dense", "molegrad")] == [0, 8]
    assert {training.sequence_chunk for training in pair.values()} == {64}


def test_a_training_that_fails_is_an_outcome(home, words, capfd):
    mine = flags.parse(ValidateConfig, with_preset([*words, "--run=bad", "--embedding-lr=1e39"]))
    training = resolve(mine.trainings("small")["dense"], CPU)
    folder = checkpoint.stage_dir(training.run, "base")
    (folder / METRICS).write_text('{"step": 30, "val/bpb": 1.0}\n')  # of an earlier run
    outcome = train("dense", training, folder, "new")
    assert isinstance(outcome, Outcome) and outcome.code == 1 and outcome.name == "dense"
    assert outcome.error.startswith("molegrad.gpt.train.guard.NonFiniteError: step ")
    assert all("val/bpb" not in record or record["step"] < 30 for record in read_metrics(folder))


def test_reasons():
    log = "step 1\nTraceback (most recent call last):\n  x\nValueError: no data\nwandb: bye\n"
    assert reason(log, 1) == "ValueError: no data"
    assert reason("only this\n\n", 3) == "only this" and reason("", 1) == "no message"
    assert reason(log, -9) == "killed by SIGKILL (out of memory?)"


@pytest.mark.parametrize(
    "streaming",
    [
        [],
        ["--streaming_preset=minimal"],
        ["--streaming_gradient_mode=factored", "--streaming_rank_k=4", "--optimizer=adamw"],
        ["--streaming_method=power", "--streaming_rank_k=4", "--optimizer=adafactor"],
    ],
)
def test_memory_is_predicted_from_shapes_alone(streaming):
    extra = ["--streaming_min_layer_utilization=0"] if len(streaming) > 1 else []
    training = resolve(config(*streaming, *extra).trainings("")["molegrad"], CPU)
    predicted = predict(training, 300)
    model = setup.place(GPT(model_config(training, 300), seed=0), training, CPU)
    setup.equip(model, training)
    optimizers = setup.build_optimizers(model, training)
    tokens = torch.randint(300, (2, 32))
    model.train()
    model(tokens, tokens).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for part, measured in memory_bytes(model, optimizers).items():
        assert predicted[part] == pytest.approx(measured, rel=1e-3), part
    assert predicted["total"] > predicted["weights"] + predicted["optimizer_state"]
    assert predicted["activations"] > 0


def test_the_preset_is_taken_where_no_streaming_flag_is_given():
    assert with_preset(["--json"]) == ["--json", "--streaming_preset=balanced"]
    for word in ("--streaming-method=tangent", "--streaming_seed=1", "--enable-streaming"):
        assert with_preset(["--run", "x", word]) == ["--run", "x", word]
    made = config("--streaming_rank_k=4").trainings("")["molegrad"]
    assert made.streaming_gradient_mode == "dense" and made.streaming_rank_k == 4


def test_trainings_have_every_flag_of_base_train():
    mine = config("--steps=55", "--seed=3", "--weight-decay=0.1")
    pair = mine.trainings("small")
    assert pair["molegrad"].num_iterations == 55 and pair["molegrad"].eval_every == 6
    assert pair["dense"] == replace(
        pair["molegrad"],
        run="validate-dense",
        **{
            f.name: f.default
            for f in fields(BaseTrainConfig)
            if f.name.startswith(("streaming_", "enable_streaming"))
        },
    )
    assert config("--eval-every=20").trainings("")["dense"].eval_every == 20


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--num-iterations=5", "give --steps"),
        ("--max-train-tokens=5", "give --steps"),
        ("--resume", "goes on by itself"),
        ("--model-tag=x", "give --run"),
        ("--steps=0", "steps must be at least 1"),
        ("--no-enable-streaming", "nothing to compare"),
        ("--eval-every=-1", "need val/bpb"),
        ("--save-every=-2", "need the last checkpoint"),
        ("--vocab=many", "neither a number"),
        ("--limit=-1", "limit must not be negative"),
        ("--run=a/b", "not usable as a folder name"),
    ],
)
def test_flags_that_make_no_validation_are_refused(word, told, capsys):
    with pytest.raises(SystemExit):
        config(word)
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())
