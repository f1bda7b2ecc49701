"""Schedules: number of steps, learning-rate factor, momentum."""

import pytest

from molegrad.gpt.train.schedule import Schedule, total_steps


def test_number_of_steps():
    assert total_steps(1000, num_iterations=7) == 7
    assert total_steps(1000, num_iterations=7, max_train_tokens=3500) == 3
    assert total_steps(1000, max_train_tokens=3500) == 3
    assert total_steps(1000, wanted_tokens=120_999.0) == 120
    assert total_steps(1000, max_train_tokens=10) == 1


def test_learning_rate_rises_holds_and_falls():
    schedule = Schedule(100, 10, 0.4, 0.1)
    factors = [schedule.lr_multiplier(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[10:61] == [1.0] * 51
    assert factors[80] == pytest.approx(0.5 + 0.5 * 0.1)
    assert all(a > b for a, b in zip(factors[60:], factors[61:], strict=False))
    assert schedule.lr_multiplier(100) == pytest.approx(0.1)
    constant = Schedule(20, 0, 0.0)
    assert {constant.lr_multiplier(step) for step in range(20)} == {1.0}


def test_momentum_warms_up():
    momenta = [Schedule(2000).momentum_at(step) for step in (0, 150, 1000)]
    assert momenta == pytest.approx([0.85, 0.90, 0.95])
    assert Schedule(10, momentum_warmup_steps=0).momentum_at(0) == 0.95
