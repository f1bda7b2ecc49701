"""Evaluation from flags to the JSON file."""

import json

import pytest

from molegrad.gpt import runs
from molegrad.gpt.evaluate.evaluate import (
    BaseEvalConfig,
    ChatEvalConfig,
    chosen,
    evaluate,
    main_base,
    main_chat,
    read_evaluations,
)
from molegrad.gpt.train.logger import read_metrics

QUICK = ["--run=tiny", "--max-questions=12", "--threads=1"]


def test_base_eval_repeats_the_bits_per_byte_of_training(tiny, capsys):
    assert main_base(QUICK) == 0
    record = read_evaluations(tiny / "runs/tiny/base")[-1]
    assert record["step"] == 60 and set(record["tasks"]) == {"bpb", "four_way", "samples"}
    trained = [r["val/bpb"] for r in read_metrics(tiny / "runs/tiny/base") if "val/bpb" in r][-1]
    bpb = record["tasks"]["bpb"]
    assert bpb["bpb"] == pytest.approx(trained, rel=1e-6)
    assert bpb["tokens"] == 2048 and bpb["corpus_as_trained"]
    config = json.loads((tiny / "runs/tiny/base/config.json").read_text())
    assert bpb["corpus_sha256"] == config["corpus"]["sha256"]
    assert record["tasks"]["four_way"]["questions"] == 12
    assert len(record["tasks"]["samples"]["texts"]) == 4
    out = capsys.readouterr().out
    assert "bits per byte" in out and "25%" in out and "eval_000060.json" in out


def test_chat_eval_and_tasks_one_by_one(tiny):
    assert main_chat([*QUICK, "--tasks=arithmetic"]) == 0
    first = read_evaluations(tiny / "runs/tiny/sft")[-1]["tasks"]["arithmetic"]
    assert main_chat([*QUICK, "--tasks=spelling,four_way,samples,bpb"]) == 0
    record = read_evaluations(tiny / "runs/tiny/sft")[-1]
    assert record["stage"] == "sft" and record["step"] == 200
    assert set(record["tasks"]) == {"arithmetic", "spelling", "four_way", "samples", "bpb"}
    assert record["tasks"]["arithmetic"] == first
    assert 0 <= record["tasks"]["spelling"]["accuracy"] <= 1
    assert record["tasks"]["bpb"]["tokens"] == 2048  # the base run's text and settings


def test_a_repeated_evaluation_gives_the_same(tiny):
    config = BaseEvalConfig(run="tiny", tasks="four_way,samples", max_questions=20)
    one, two = (evaluate(config)["tasks"] for _ in range(2))
    for name in ("four_way", "samples"):
        drop = {"seconds"}
        assert {k: v for k, v in one[name].items() if k not in drop} == {
            k: v for k, v in two[name].items() if k not in drop
        }


def test_another_corpus_is_noticed(tiny, capsys, monkeypatch):
    real = runs.training_corpus
    monkeypatch.setattr(
        runs, "training_corpus", lambda c: real({**c, "corpus": {"sha256": "0" * 64}})
    )
    config = BaseEvalConfig(run="tiny", tasks="bpb", eval_tokens=512, batch_size=2)
    result = evaluate(config)["tasks"]["bpb"]
    assert not result["corpus_as_trained"] and result["tokens"] == 512
    assert "not comparable" in capsys.readouterr().out


def test_tasks_are_chosen_in_their_order():
    assert chosen(BaseEvalConfig()) == ["bpb", "four_way", "samples"]
    assert chosen(ChatEvalConfig(tasks="samples, bpb")) == ["bpb", "samples"]


@pytest.mark.parametrize(
    ("main", "words", "phrase"),
    [
        (main_base, ["--tasks=arithmetic"], "has the tasks"),
        (main_chat, ["--tasks="], "has the tasks"),
        (main_base, ["--max-questions=0"], "max_questions must be at least 1"),
    ],
)
def test_wrong_flags_end_with_code_2(main, words, phrase, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and phrase in capsys.readouterr().err


def test_a_missing_run_is_named(tiny, capsys):
    assert main_base(["--run=none"]) == 2
    assert "no run 'none'" in capsys.readouterr().err
    assert not (tiny / "runs/none").exists()
