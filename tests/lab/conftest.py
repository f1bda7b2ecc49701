"""A home of its own for every test, and a world in which training costs nothing."""

import pytest

from molegrad.lab.sweep import Text


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLEGRAD_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def text():
    return Text("corpus", "", "tokenizer")


@pytest.fixture
def corpus(home):
    """A file of text that is just large enough to train on."""
    file = home / "text.txt"
    file.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i} * {i * i}" for i in range(900)))
    return file


def fake_record(run, bpb=None):
    """What a run could have measured: every method is best at 0.02, streaming ones lose 10%."""
    c = run.config
    low = c.enable_streaming
    penalty = abs(c.matrix_lr - 0.02) * 10 + 0.01 * c.seed
    return {
        **run.to_dict(),
        "status": "ok",
        "bpb": 2.0 * (1.1 if low else 1.0) + penalty if bpb is None else bpb,
        "train_loss": 3.0,
        "seconds": 1.0,
        "peak_memory_bytes": 2**20,
        "streaming": {},
        "memory": {"gradients": 100 if low else 800, "state": 200 if low else 800, "saved": 400},
        "flops": {
            "weight_gradient": 1.0 if low else 4.0,
            "weight_gradient_dense": 4.0,
            "actual": 9.0 if low else 12.0,
            "dense": 12.0,
        },
    }


def faked(fails=lambda c: False, untimed=lambda c: False):
    """A class to be given as `start`, in place of molegrad.lab.run.Process.

    Runs whose flags `fails` likes fail, those that `untimed` likes cannot be timed, and streaming
    takes half of dense's time. The class lists the runs of each task.
    """

    class Fake:
        runs = {"train": [], "pace": []}

        def __init__(self, run, task="train"):
            self.run = run
            self.runs[task].append(run)
            if task == "pace" and untimed(run.config):
                raise RuntimeError("out of memory")

        def result(self):
            if fails(self.run.config):
                return {"status": "failed", "reason": "loss nan | gradients", "log": "a.log"}
            return fake_record(self.run)

        def step(self):
            return 0.5 if self.run.config.enable_streaming else 1.0

        def close(self):
            pass

    return Fake
