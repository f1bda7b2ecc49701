import pytest

from molegrad.gpt.train import flags
from molegrad.gpt.train.budget import BudgetConfig, main, predict


def test_hours_follow_from_operations_and_speed():
    config = BudgetConfig(depth=12, max_seq_len=2048, device_batch_size=16, vocab_size=32768)
    budget = predict(config)
    # About 6 operations per matrix parameter and token, plus attention: 110M parameters, ratio 12.
    assert 110e6 * 12 * 0.99 < budget.tokens < 111e6 * 12 * 1.01
    assert 6 * 110e6 * budget.tokens < budget.flops < 10 * 110e6 * budget.tokens
    assert budget.hours == pytest.approx(budget.flops / (0.4 * 209.5e12) / 3600)
    assert budget.dollars == pytest.approx((0.69 * budget.hours, 1.14 * budget.hours))
    double = predict(BudgetConfig(depth=12, max_seq_len=2048, device_batch_size=16, runs=2))
    assert double.hours == pytest.approx(2 * budget.hours)


def test_low_rank_gradients_are_priced():
    dense = BudgetConfig(depth=6, max_seq_len=1024)
    low = flags.make(
        BudgetConfig, depth=6, max_seq_len=1024, enable_streaming=True, streaming_rank_k=32
    )
    assert 0.75 * predict(dense).hours < predict(low).hours < 0.95 * predict(dense).hours


def test_command(capsys):
    assert main(["--depth=4", "--max-seq-len=512", "--gpu=H100", "--num-iterations=10"]) == 0
    out = capsys.readouterr().out
    assert "10 steps" in out and "on one H100" in out and "$" in out
    with pytest.raises(SystemExit):
        main(["--gpu=Abacus"])
    assert "gpu='Abacus' is not known" in capsys.readouterr().err
