"""Fine-tuning from flags to checkpoints."""

import json

import pytest
import torch

from molegrad.gpt import paths
from molegrad.gpt import runs as stages
from molegrad.gpt.data.conversations import arithmetic_conversations
from molegrad.gpt.data.packing import held_out_batches, render
from molegrad.gpt.train import checkpoint, sft
from molegrad.gpt.train.flags import parse
from molegrad.gpt.train.logger import read_metrics
from molegrad.gpt.train.sft import (
    SFTConfig,
    build_optimizers,
    chat_sft,
    main,
    mean_loss,
    parse_mixture,
    resolve_sft,
    total_steps,
)
from tests.gpt.conftest import SFT

STREAM = [
    "--enable_streaming=True",
    "--streaming_rank_k=4",
    "--streaming_min_layer_utilization=0",
]
LEVERS = ["--sequence-chunk=128", "--sequence-parts=all", "--recompute=block", "--head-rank=8"]


def tune(*words):
    return chat_sft(parse(SFTConfig, [*SFT, "--run=tiny", *words]))


def test_a_run_learns_and_leaves_everything_behind(tiny):
    folder = tiny / "runs/tiny/sft"
    records = read_metrics(folder)
    losses = [r["val/loss"] for r in records if "val/loss" in r]
    bpb = [r["val/bpb"] for r in records if "val/bpb" in r]
    assert len(losses) == 5 and losses[-1] < losses[0] < 7 and bpb[-1] < bpb[0]
    config = json.loads((folder / "config.json").read_text())
    assert config["started_from"] == "tiny/base step 60" and config["steps"] == 200
    assert config["max_seq_len"] == 64 and config["total_batch_size"] == 4 * 64
    assert sum(config["conversation_sources"]["train"].values()) == 3000
    assert config["data_max_bytes"] == 150_000  # what the base run used
    opened = stages.open_stage("tiny", "sft")
    base = stages.open_stage("tiny", "base")
    assert opened.step == 200 and opened.tokenizer.fingerprint == base.tokenizer.fingerprint
    drift = (opened.model.lm_head.weight - base.model.lm_head.weight).abs().max()
    assert drift > 0


def test_the_fine_tuned_model_predicts_answers_better_than_the_base_model(tiny):
    base, tuned = (stages.open_stage("tiny", stage) for stage in ("base", "sft"))
    stream = arithmetic_conversations("val")
    rendered = render([next(stream) for _ in range(16)], base.tokenizer, 63)
    losses = [
        mean_loss(o.model, held_out_batches(rendered, 4, 64, o.tokenizer.bos, 10**6))
        for o in (base, tuned)
    ]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "words",
    [
        STREAM,
        [*STREAM, "--total-batch-size=512"],
        ["--optimizer=adamw", "--grad-clip=1"],
        [*STREAM, *LEVERS],
    ],
    ids=["streaming", "accumulated", "adamw", "levers"],
)
def test_the_flags_of_base_training_apply(tiny, words, capsys):
    result = tune("--model-tag=flags", "--num-iterations=6", "--overwrite", *words)
    assert not result["interrupted"] and result["val/loss"] < 7
    log = capsys.readouterr().out
    assert ("MoleGrad takes" in log) == ("--enable_streaming=True" in words)
    assert ("method tangent" in log) == bool({"--total-batch-size=512", *LEVERS[:1]} & {*words})


def test_a_resumed_run_repeats_the_uninterrupted_one(tiny):
    words = ["--num-iterations=8", "--keep-last=0", *STREAM]
    whole = tune("--model-tag=whole", "--save-every=4", *words)
    folder = paths.run_dir("tiny") / "sft-whole"
    part = checkpoint.stage_dir("tiny", "sft", "resume")
    (part / "step_000004").symlink_to(folder / "step_000004", target_is_directory=True)
    resumed = tune("--model-tag=resume", "--resume", *words)
    assert resumed["train/loss_raw"] == whole["train/loss_raw"]
    one, two = (stages.open_stage("tiny", "sft", tag).model for tag in ("whole", "resume"))
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_batches_without_targets_never_make_a_nan(tiny, monkeypatch):
    real = sft.render

    def mostly_mute(conversations, tokenizer, seq_len):
        rendered = real(conversations, tokenizer, seq_len)
        return [
            (ids, mask if i % 8 == 0 else [0] * len(ids)) for i, (ids, mask) in enumerate(rendered)
        ]

    monkeypatch.setattr(sft, "render", mostly_mute)
    monkeypatch.setattr(checkpoint, "stage_dir", lambda *a: tiny / "mute")
    (tiny / "mute").mkdir(exist_ok=True)
    result = tune("--num-iterations=40", "--device-batch-size=1", "--overwrite")
    assert result["skipped_rows"] > 0
    losses = [r["train/loss_raw"] for r in read_metrics(tiny / "mute") if "train/loss_raw" in r]
    assert len(losses) == 40 and all(isinstance(v, float) and v > 0 for v in losses)
    assert read_metrics(tiny / "mute")[-1]["train/skipped_rows"] == result["skipped_rows"]


def test_learning_rates_are_scaled(tiny):
    base = stages.open_stage("tiny", "base")
    config = parse(SFTConfig, [*SFT, "--init-lr-frac=0.5"])
    config = resolve_sft(config, base, torch.device("cpu"), 1)
    full = parse(SFTConfig, [*SFT, "--init-lr-frac=1"])
    full = resolve_sft(full, base, torch.device("cpu"), 1)
    rates = [
        [g["initial_lr"] for o in build_optimizers(base.model, c) for g in o.param_groups]
        for c in (config, full)
    ]
    assert rates[0] == pytest.approx([0.5 * r for r in rates[1]])


def test_length_of_the_run(tiny):
    base = stages.open_stage("tiny", "base")

    def steps(*words):
        config = resolve_sft(parse(SFTConfig, [*SFT, *words]), base, torch.device("cpu"), 1)
        return total_steps(config, rows_per_epoch=100)

    assert steps() == 25
    assert steps("--num-epochs=2") == 50
    assert steps("--num-iterations=7") == 7
    assert steps("--max-train-tokens=2560") == 10


def test_mixture():
    assert parse_mixture("") is None
    assert parse_mixture("summary=1, arithmetic=0.5") == {"summary": 1.0, "arithmetic": 0.5}
    for text in ("summary", "poetry=1", "summary=-1", "summary=x"):
        with pytest.raises(ValueError, match="mixture has"):
            parse_mixture(text)


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--run=missing"], "there is no run 'missing'.*there are: .*tiny"),
        (["--base-step=7"], "has steps 60, not a checkpoint of step 7"),
        (["--max-seq-len=128"], "beyond the base model's context of 64"),
        ([], "has a checkpoint of an earlier run"),
    ],
)
def test_what_does_not_fit_is_named(tiny, words, phrase):
    with pytest.raises((ValueError, FileNotFoundError), match=phrase):
        tune(*words)
    assert not (tiny / "runs/missing").exists()


@pytest.mark.parametrize(
    ("word", "phrase"),
    [
        ("--init-lr-frac=0", "must be positive"),
        ("--conversations=0", "at least 1"),
        ("--mixture=poetry=1", "sources are summary"),
    ],
)
def test_wrong_flags_end_with_code_2(word, phrase, capsys):
    with pytest.raises(SystemExit) as caught:
        main([word])
    assert caught.value.code == 2 and phrase in capsys.readouterr().err
