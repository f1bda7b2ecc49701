"""A small trained run, made once per test process: base model and fine-tuned model."""

import pytest

from molegrad.gpt import paths
from molegrad.gpt.train.base import base_train
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import parse
from molegrad.gpt.train.sft import SFTConfig, chat_sft
from molegrad.gpt.train.tok_train import TokTrainConfig, tok_train

BYTES = 150_000
COMMON = ["--dashboards=none", "--threads=1", "--device-type=cpu"]
BASE = [
    *COMMON,
    "--eval-every=20",
    "--depth=2",
    "--aspect-ratio=32",
    "--head-dim=16",
    "--max-seq-len=64",
    "--device-batch-size=8",
    "--eval-tokens=2048",
    f"--data-max-bytes={BYTES}",
]
SFT = [
    *COMMON,
    "--eval-every=40",
    "--conversations=3000",
    "--val-conversations=40",
    "--device-batch-size=4",
    "--eval-tokens=4096",
]
LEARN = ["--num-iterations=200", "--init-lr-frac=1"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """MOLEGRAD_HOME with the run "tiny" (base, 60 steps; sft, 200 steps)."""
    home = tmp_path_factory.mktemp("tiny-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.ENV, str(home))
        tok_train(TokTrainConfig(vocab_size=512, max_bytes=BYTES, run="tiny"))
        base_train(parse(BaseTrainConfig, [*BASE, "--run=tiny", "--num-iterations=60"]))
        chat_sft(parse(SFTConfig, [*SFT, "--run=tiny", *LEARN]))
    return home


@pytest.fixture
def tiny(tiny_folder, monkeypatch):
    """The same as the present MOLEGRAD_HOME; tests must not change the run "tiny"."""
    monkeypatch.setenv(paths.ENV, str(tiny_folder))
    return tiny_folder
