"""Schedules: number of steps, learning-rate factor, momentum."""

import pytest

from molegrad.gpt.train.schedule import lr_multiplier, momentum_at, total_steps


def test_number_of_steps():
    assert total_steps(1000, num_iterations=7) == 7
    assert total_steps(1000, num_iterations=7, max_train_tokens=3500) == 3
    assert total_steps(1000, max_train_tokens=3500) == 3
    assert total_steps(1000, target_param_data_ratio=12, parameters=10_000) == 120
    assert total_steps(1000, max_train_tokens=10) == 1
    with pytest.raises(ValueError, match="how long to train"):
        total_steps(1000)


def test_learning_rate_rises_holds_and_falls():
    factors = [lr_multiplier(s, 100, 10, 0.4, 0.1) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[10:61] == [1.0] * 51
    assert factors[80] == pytest.approx(0.5 + 0.5 * 0.1)
    assert all(a > b for a, b in zip(factors[60:], factors[61:], strict=False))
    assert lr_multiplier(100, 100, 10, 0.4, 0.1) == pytest.approx(0.1)


def test_constant_without_warmup_and_warmdown():
    assert {lr_multiplier(s, 20, 0, 0.0) for s in range(20)} == {1.0}


def test_momentum_warms_up():
    assert momentum_at(0) == pytest.approx(0.85)
    assert momentum_at(150) == pytest.approx(0.90)
    assert momentum_at(1000) == pytest.approx(0.95)
    assert momentum_at(0, warmup_steps=0) == 0.95
