import pytest

from molegrad.gpt import paths
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.lab.sweep import LabConfig, cells, make_run, next_runs, prepare_text, search
from tests.lab.conftest import fake_record


def complete(config, text, record=fake_record):
    """All runs of a sweep in the order in which they come up, and what is known at the end."""
    known, order = {}, []
    while runs := next_runs(config, text, known):
        order.append(runs[0])
        known[runs[0].key] = record(runs[0])
    return order, known


def test_every_method_gets_its_own_learning_rate_and_all_seeds(text):
    config = LabConfig(methods="factored-tangent,adamw:matrix_lrs=0.01|0.02|0.04", seeds=3)
    order, known = complete(config, text)
    assert len(order) == 3 * (3 + 2)
    for cell in cells(config):
        found = search(config, text, cell, known)
        assert found.lr == 0.02 and not found.edge and not found.missing
    assert sorted(r.config.seed for r in order if r.config.optimizer == "adamw") == [0, 0, 0, 1, 2]


def test_the_rates_are_extended_twice_at_most(text):
    config = LabConfig(methods="dense", matrix_lrs="0.08,0.16", seeds=1)
    order, known = complete(config, text)
    assert [r.config.matrix_lr for r in order] == [0.08, 0.16, 0.04, 0.02]
    found = search(config, text, cells(config)[0], known)
    assert found.lr == 0.02 and found.edge  # still at the edge
    assert [lr for lr, _ in found.sweep] == [0.02, 0.04, 0.08, 0.16]
    rising = complete(LabConfig(methods="dense", matrix_lrs="0.004,0.01", seeds=1), text)[0]
    assert [r.config.matrix_lr for r in rising] == [0.004, 0.01, 0.02, 0.04]
    fixed = LabConfig(methods="dense", matrix_lrs="0.08,0.16", seeds=1, extend_lrs=False)
    assert len(complete(fixed, text)[0]) == 2
    assert len(complete(LabConfig(methods="dense", matrix_lrs="0.08", seeds=1), text)[0]) == 1


def test_runs_that_fail_rank_last(text):
    def record(run):
        if run.config.matrix_lr >= 0.02:
            return fake_record(run, status="failed", reason="step 3: loss nan")
        return fake_record(run)

    config = LabConfig(methods="dense", seeds=2)
    order, known = complete(config, text, record)
    assert search(config, text, cells(config)[0], known).lr == 0.01
    assert [r.config.matrix_lr for r in order] == [0.01, 0.02, 0.04, 0.005, 0.01]
    order, known = complete(config, text, lambda run: {"status": "failed", "reason": "x"})
    assert [r.config.matrix_lr for r in order] == [0.01, 0.02, 0.04, 0.005, 0.0025]


def test_the_axes_span_the_cells(text):
    config = LabConfig(
        methods="factored-tangent",
        ranks="8,16",
        sizes="2x64,4x128",
        batch_sizes="512,2048,8192",
        train_tokens="81920,163840",
    )
    found = cells(config)
    assert len(found) == 2 * 3 * 2 * 3
    assert {(c.batch, c.steps) for c in found} == {
        *((512, 160), (512, 320), (2048, 40), (2048, 80), (8192, 10), (8192, 20))
    }
    runs = [make_run(config, text, cell, 0.02, 1) for cell in found]
    assert {(r.config.depth, r.config.aspect_ratio) for r in runs} == {(2, 32), (4, 32)}
    rows = {r.config.total_batch_size: r.config.device_batch_size for r in runs}
    assert rows == {512: 2, 2048: 8, 8192: 8}
    assert {r.config.num_iterations * r.config.total_batch_size for r in runs} == {81920, 163840}
    assert all(r.config.streaming_seed == r.config.seed == 1 for r in runs)


def test_runs_of_one_seed_differ_in_nothing_but_the_method(text):
    config = LabConfig(methods="factored-power")
    dense, low = (vars(make_run(config, text, cell, 0.02, 1).config) for cell in cells(config))
    differ = {k for k in dense if dense[k] != low[k]}
    assert {k for k in differ if not k.startswith("streaming_")} == {"run", "enable_streaming"}
    assert dense["save_every"] == -2 and dense["dashboards"] == "none"


def test_four_evaluations_whatever_the_length(text):
    for steps in (4, 7, 301):
        config = LabConfig(methods="dense", num_iterations=str(steps))
        every = make_run(config, text, cells(config)[0], 0.02, 0).config.eval_every
        assert len({*range(every, steps + 1, every), steps}) == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"matrix_lrs": "0.1,-1"}, "learning rates must be positive"),
        ({"sizes": "4-128"}, "'4-128' should look like 4x128"),
        ({"sizes": "3x128"}, "no multiple of its depth"),
        ({"batch_sizes": "3000"}, "3000 tokens are no multiple of one micro-batch of 2048"),
        ({"batch_sizes": "300"}, "300 tokens are no multiple of one sequence of 256"),
        ({"num_iterations": "many"}, "'many' is no positive integer"),
        ({"train_tokens": "100"}, "less than a batch"),
        ({"vocab": "words"}, "vocab='words'"),
        ({"methods": "sparse"}, "unknown method 'sparse'"),
    ],
)
def test_bad_flags_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        LabConfig(**values)


def test_a_width_that_is_no_multiple_of_the_heads_is_refused(text):
    config = LabConfig(sizes="2x48")
    with pytest.raises(ValueError, match="width 48 is no multiple of the heads' 32"):
        next_runs(config, text, {})


def test_tokenizers_are_trained_once_and_lie_beside_the_default(home):
    file = home / "text.txt"
    file.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i * i}" for i in range(400)))
    bytewise = prepare_text(LabConfig(data=str(file), vocab="bytes"))
    assert Tokenizer.load(paths.tokenizer_dir("bytes")).vocab_size == 265
    made = (paths.tokenizer_dir("bytes") / "tokenizer.json").stat().st_mtime_ns
    assert prepare_text(LabConfig(data=str(file), vocab="bytes")) == bytewise
    assert (paths.tokenizer_dir("bytes") / "tokenizer.json").stat().st_mtime_ns == made
    merged = prepare_text(LabConfig(data=str(file), vocab="300"))
    assert Tokenizer.load(paths.tokenizer_dir(merged.name)).vocab_size == 300
    with pytest.raises(FileNotFoundError, match="tok_train"):
        prepare_text(LabConfig(data=str(file)))
