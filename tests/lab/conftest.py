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


def fake_record(run, bpb=None, **values):
    """What a run could have measured: every method is best at 0.02, factored ones lose 10%."""
    c = run.config
    factored = c.enable_streaming and c.streaming_gradient_mode == "factored"
    penalty = abs(c.matrix_lr - 0.02) * 10 + 0.01 * c.seed
    bpb = 2.0 * (1.1 if factored else 1.0) + penalty if bpb is None else bpb
    held = {"gradients": 100 if factored else 800, "state": 200 if factored else 800, "saved": 400}
    return {
        **run.to_dict(),
        "key": run.key,
        "status": "ok",
        "bpb": bpb,
        "curve": [[c.num_iterations // 2, bpb + 1], [c.num_iterations, bpb]],
        "train_loss": 3.0,
        "tokens": c.num_iterations * c.total_batch_size,
        "seconds": 1.0,
        "peak_memory_bytes": 2**20,
        "streaming": {},
        "memory": {"matrix": held, "model": held},
        "flops": {
            "weight_gradient": 1.0 if factored else 4.0,
            "weight_gradient_dense": 4.0,
            "actual": 9.0 if factored else 12.0,
            "dense": 12.0,
        },
        **values,
    }


@pytest.fixture
def fake():
    """fake(calls) -> perform: notes the run in `calls` and returns `fake_record`."""
    return lambda calls: lambda run: calls.append(run) or fake_record(run)
