"""Base training from flags to checkpoints, on a small text, as the command runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molegrad.gpt import paths
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.train import checkpoint
from molegrad.gpt.train.base import base_train, main
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import parse
from molegrad.gpt.train.logger import read_metrics
from molegrad.gpt.train.stage import native_kernels

ROOT = Path(__file__).parents[3]
SIZES = [
    "--depth=2",
    "--aspect-ratio=32",
    "--head-dim=16",
    "--max-seq-len=32",
    "--device-batch-size=4",
    "--eval-tokens=256",
    "--warmdown-ratio=0.5",
    "--dashboards=none",
    "--threads=1",
]
STREAM = [
    "--enable_streaming=True",
    "--streaming_rank_k=4",
    "--streaming_min_layer_utilization=0",
]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A home with a tokenizer, and a text to train on."""
    monkeypatch.setenv("MOLEGRAD_HOME", str(tmp_path / "home"))
    text = "the sun rose over a small town and people began to walk to the river again"
    words = text.split()
    lines = [
        " ".join(words[(i * j + 3 * j) % len(words)] for j in range(12)) + "." for i in range(900)
    ]
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(lines))
    Tokenizer.train(iter(lines), 300).save(paths.tokenizer_dir())
    return path


def train(text, *words):
    return base_train(parse(BaseTrainConfig, [*SIZES, f"--data={text}", *words]))


def test_a_run_leaves_everything_behind(text, capsys):
    result = train(text, "--run=first", "--num-iterations=40", "--eval-every=20", *STREAM)
    folder = paths.run_dir("first") / "base"
    assert result["folder"] == str(folder) and not result["interrupted"]
    records = read_metrics(folder)
    bpb = [r["val/bpb"] for r in records if "val/bpb" in r]
    assert len(bpb) == 2 and bpb[1] < bpb[0] < 8 and result["best_bpb"] == min(bpb)
    training = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in training] == list(range(1, 41))
    assert training[-1]["train/loss_raw"] < 0.8 * training[0]["train/loss_raw"]
    assert 0 < training[-1]["train/mfu"] < training[-1]["train/mfu_dense_equivalent"]
    assert [r["step"] for r in records if "streaming/condition_number" in r] == [10, 20, 30, 40]
    config = json.loads((folder / "config.json").read_text())
    assert config["streaming_method"] == "power" and config["enable_streaming"] is True
    assert config["streaming_rank_k"] == 4 and config["steps"] == 40
    assert config["parameters"]["matrix"] == 2 * 12 * 64 * 64 and config["corpus"]["sha256"]
    assert Tokenizer.load(folder / "tokenizer").vocab_size == 300
    model, meta = checkpoint.load_model(checkpoint.latest(folder))
    assert meta["step"] == 40 and model.config.depth == 2
    log = capsys.readouterr().out
    first = (
        "MoleGrad: method power, gradient_mode factors (a step is one micro-batch of one process)"
    )
    assert log.splitlines()[0] == first
    for phrase in (
        "MoleGrad takes 4 of 13 linear layers",
        "FLOPs per token",
        "memory expected, by formula",
        "step 00040/00040 (100.0%)",
        "sample | 'Return a new array",
        "eta",
    ):
        assert phrase in log


@pytest.mark.parametrize("words", [[], STREAM])
def test_resume_through_the_command_is_bit_exact(text, words):
    words = ["--num-iterations=6", "--save-every=3", "--keep-last=0", "--eval-every=2", *words]
    train(text, "--run=whole", *words)
    folder = paths.run_dir("whole") / "base"
    expected = checkpoint.load(checkpoint.find(folder, 6))
    before = read_metrics(folder)
    train(text, "--run=whole", "--resume-from-step=3", *words)
    resumed = checkpoint.load(checkpoint.find(folder, 6))
    for name, tensor in expected.model.items():
        assert torch.equal(tensor, resumed.model[name]), name
    for key in ("step", "train/loss", "train/loss_raw", "val/bpb", "train/epoch"):
        assert [r.get(key) for r in read_metrics(folder)] == [r.get(key) for r in before]


def test_an_earlier_run_is_neither_mixed_nor_lost(text):
    train(text, "--run=a", "--num-iterations=2")
    folder = paths.run_dir("a") / "base"
    with pytest.raises(ValueError, match="--resume goes on from it, --overwrite deletes it"):
        train(text, "--run=a", "--num-iterations=3")
    assert checkpoint.latest(folder).name == "step_000002"
    train(text, "--run=a", "--num-iterations=1", "--overwrite")
    assert [p.name for p in checkpoint.step_folders(folder)] == ["step_000001"]
    with pytest.raises(FileNotFoundError, match="not a checkpoint of step 9"):
        train(text, "--run=a", "--resume-from-step=9")
    with pytest.raises(ValueError, match=r"depth=2 \(now 3\)"):
        train(text, "--run=a", "--resume", "--depth=3", "--num-iterations=3")


def test_resume_without_a_checkpoint_starts(text):
    assert train(text, "--run=new", "--num-iterations=1", "--resume")["step"] == 1


def test_another_tokenizer_is_refused(text):
    train(text, "--run=a", "--num-iterations=1")
    Tokenizer.train(iter([text.read_text()[::-1]]), 300).save(paths.tokenizer_dir())
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        train(text, "--run=a", "--resume", "--num-iterations=2")


def test_without_a_tokenizer_the_remedy_is_named(text):
    (paths.tokenizer_dir() / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tok_train"):
        train(text, "--run=a", "--num-iterations=1")


def test_optimizers_and_tokenizer_can_be_given(text):
    Tokenizer.train(text.read_text().splitlines(), 265).save(paths.tokenizer_dir("bytes"))
    given = []

    def build(model, config):
        given.append((model, config))
        return [torch.optim.SGD(model.parameters(), lr=0.3)]

    words = [*SIZES, f"--data={text}", "--run=a", "--tokenizer=bytes", "--num-iterations=4"]
    result = base_train(parse(BaseTrainConfig, [*words, "--save-every=-2"]), build)
    ((model, config),) = given
    assert model.config.vocab_size == 265 and config.dtype == "float32"
    assert result["memory/optimizer_state"] == 0 and result["val/bpb"] > 0
    assert checkpoint.latest(paths.run_dir("a") / "base") is None


def test_length_by_tokens_and_by_ratio(text):
    assert train(text, "--run=a", "--max-train-tokens=500")["step"] == 3
    ratio = "--target-param-data-ratio=0.005"  # of 98304 + 300 * 64 weights: 587 tokens
    assert train(text, "--run=b", ratio)["step"] == 4


def test_too_little_validation_text_is_found_at_the_start(text, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("one line")
    with pytest.raises(ValueError, match="holds .* tokens, one batch needs"):
        train(text, "--run=d", f"--val-data={short}", "--num-iterations=1")
    assert "step 0000" not in capsys.readouterr().out
    result = train(text, "--run=d", f"--val-data={short}", "--num-iterations=1", "--eval-every=-1")
    assert result["step"] == 1 and "val/bpb" not in result


def test_exit_codes_of_the_command(text, capsys):
    assert main([*SIZES, f"--data={text}", "--run=c", "--num-iterations=1"]) == 0
    with pytest.raises(SystemExit) as stopped:
        main(["--depht=2"])
    assert stopped.value.code == 2 and "--depth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--tokenizer=none"], "no tokenizer at"),
        (["--device-type=meta"], "device_type='meta' is not available here"),
        (["--total-batch-size=100"], "total_batch_size=100 is no multiple of one micro-batch"),
        (["--loss-chunk=-4"], "loss_chunk"),
        (["--kv-groups=3"], "kv_groups=3"),
        (["--depth=0"], "depth"),
        (["--head-rank=33"], "head_rank=33 must be at most 32"),
        ([*STREAM, "--streaming_rank_overrides=nothing=2"], "nothing=2"),
    ],
)
def test_wrong_input_of_the_command_is_one_line(text, words, phrase, capsys, monkeypatch):
    words = [*SIZES, f"--data={text}", "--run=w", "--num-iterations=1", "--save-every=-2", *words]
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) <= 2 and phrase in lines[0] and "Traceback" not in "".join(lines)
    monkeypatch.setenv("MOLEGRAD_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError), match=re.escape(phrase)):
        main(words)


def test_what_a_run_says_of_kernels_and_of_its_head(text, capsys):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert native_kernels({"native": False}, gpu) == "no, plain torch"
    assert native_kernels({"native": True, "cuda": False}, cpu) == "yes"
    assert native_kernels({"native": True, "cuda": True}, gpu) == "yes"
    told = native_kernels({"native": True, "cuda": False}, gpu)
    assert told.startswith("CPU ops only") and "MOLEGRAD_CUDA=ON" in told
    train(text, "--run=h", "--num-iterations=1", "--head-rank=8", "--save-every=-2")
    printed = capsys.readouterr().out
    assert (
        printed.startswith("MoleGrad: off in the blocks")
        and "output head: rank 8 sketches" in printed
    )
    assert "more work, not less" not in printed
    train(text, "--run=h", "--num-iterations=1", "--head-rank=32", "--save-every=-2")
    assert "more work, not less" in capsys.readouterr().out


def test_another_method_is_named_before_anything_that_follows_from_it(text):
    words = ["--run=m", "--num-iterations=2", *STREAM]
    train(text, *words)
    more = ["--resume", "--num-iterations=3"]
    with pytest.raises(ValueError, match=r"saved with streaming_method=power \(now tangent\)"):
        train(text, *words, *more, "--streaming_method=tangent")
    with pytest.raises(ValueError, match=r"saved with head_rank=0 \(now 4\)"):
        train(text, *words, *more, "--head-rank=4")
    with pytest.raises(ValueError, match=r"enable_streaming=True \(now False\)"):
        train(text, "--run=m", *more)
    train(text, *words, *more, "--streaming_method=power")


def test_two_processes_under_torchrun(text):
    words = ["--run=ddp", "--num-iterations=4", "--total-batch-size=256", f"--data={text}"]
    flags = [*SIZES, *words, *STREAM]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "scripts.base_train", "--", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    folder = paths.run_dir("ddp") / "base"
    assert done.stdout.count("step 00004/00004") == 1
    assert "method tangent, gradient_mode factors (a step needs sums over 2 proc" in done.stdout
    assert checkpoint.read_meta(checkpoint.latest(folder))["world_size"] == 2
    assert len([r for r in read_metrics(folder) if "train/loss" in r]) == 4
