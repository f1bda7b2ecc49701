import json

import pytest

from molegrad.bench import compare as bench
from molegrad.bench.compare import METHODS, CompareConfig, compare, table, training_config
from molegrad.gpt import paths
from molegrad.gpt.corpus import open_corpus
from molegrad.gpt.tok_train import TokTrainConfig, tok_train


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLEGRAD_HOME", str(tmp_path))
    return tmp_path


def fake_run(calls):
    """A world where every method is best at 0.02 and the factored ones lose 10%."""

    def run(config):
        calls.append(config)
        penalty = abs(config.matrix_lr - 0.02) * 10 + 0.01 * config.seed
        factored = config.enable_streaming and config.streaming_gradient_mode == "factored"
        return {
            "bpb": 2.0 * (1.1 if factored else 1.0) + penalty,
            "train_loss": 3.0,
            "step_ms": 50.0 if factored else 100.0,
            "gradient_bytes": 100 if factored else 800,
            "state_bytes": 200 if factored else 800,
            "tokens": 1000,
        }

    return run


def test_every_method_gets_its_own_learning_rate_and_all_seeds(home):
    calls, config = [], CompareConfig(seeds=3)
    rows = compare(config, run=fake_run(calls), say=lambda text: None)
    assert [row["method"] for row in rows] == list(METHODS)
    assert len(calls) == len(METHODS) * (3 + 2)  # three rates with one seed, two more seeds
    assert all(row["lr"] == 0.02 and not row["lr_at_edge_of_sweep"] for row in rows)
    factored = rows[-1]
    assert factored["bpb"] == pytest.approx(2.2 + 0.01)
    assert factored["gap_percent"] == pytest.approx(100 * (2.21 / 2.01 - 1))
    assert factored["bpb_spread"] == pytest.approx(0.02)
    assert (factored["step_ratio"], factored["gradient_ratio"], factored["state_ratio"]) == (
        0.5,
        8,
        4,
    )
    assert rows[0]["gap_percent"] == 0
    text = table(rows)
    assert "| factored-tangent | 0.02 | 2.2100 | 0.0200 | +9.95% | 50 | 0.50 |" in text


def test_what_is_known_is_not_trained_again(home):
    first, second, more = [], [], []
    compare(CompareConfig(methods="dense"), run=fake_run(first), say=lambda text: None)
    compare(CompareConfig(methods="dense"), run=fake_run(second), say=lambda text: None)
    compare(CompareConfig(methods="dense", seeds=4), run=fake_run(more), say=lambda text: None)
    assert (len(first), len(second), len(more)) == (4, 0, 2)


def test_runs_differ_in_nothing_but_the_method():
    config = CompareConfig()
    dense, low = (vars(training_config(config, m, 0.02, 1)) for m in ("dense", "factored-power"))
    differ = {k for k in dense if dense[k] != low[k]}
    assert {k for k in differ if not k.startswith("streaming_")} == {"run", "enable_streaming"}


def test_bad_flags():
    with pytest.raises(ValueError, match="unknown methods"):
        CompareConfig(methods="sparse")
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        CompareConfig(seeds=0)
    with pytest.raises(ValueError, match="matrix_lrs must be positive"):
        CompareConfig(matrix_lrs="0.1,-1")


def test_the_command_trains_for_real(home, capsys):
    text = home / "text.txt"
    text.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i} * {i * i}" for i in range(900)))
    tok_train(TokTrainConfig(vocab_size=300, data=str(text)))
    arguments = (
        f"--data={text} --methods=dense,factored-tangent --matrix-lrs=0.02 --seeds=1 --depth=2 "
        "--aspect-ratio=32 --max-seq-len=32 --device-batch-size=2 --num-iterations=8 "
        "--streaming_rank_k=8 --eval-tokens=128 --device-type=cpu --threads=1 --json"
    )
    assert bench.main(arguments.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    dense, low = result["rows"]
    assert dense["tokens"] == low["tokens"] == 8 * 64
    assert 1 < dense["bpb"] < 9 and 1 < low["bpb"] < 9 and dense["bpb"] != low["bpb"]
    assert low["gradient_bytes"] < dense["gradient_bytes"]
    assert low["state_bytes"] < dense["state_bytes"]
    assert len((paths.report_dir() / "compare.jsonl").read_text().splitlines()) == 2
    assert open_corpus(str(text)).manifest
