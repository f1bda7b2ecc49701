import pytest
import torch

from molegrad.lab import store
from molegrad.lab.sweep import LabConfig, cells, make_run, next_runs
from molegrad.lab.timing import WARM_UP, equal_time_runs, measure_times, median_interval
from tests.lab.conftest import fake_record

CONFIG = LabConfig(methods="factored-tangent,adamw", seeds=2, threads=1, num_iterations="200,300")


def trained(config, text):
    known = {}
    while runs := next_runs(config, text, known):
        known |= {run.key: fake_record(run) for run in runs}
    return known


class Clock:
    """A machine that gets slower with every pair; factored takes three quarters of dense's time."""

    def __init__(self):
        self.runs, self.order, self.open = [], [], 0

    def __call__(self, run):
        self.runs.append(run)
        self.open += 1
        return Steps(self, run)


class Steps:
    def __init__(self, clock, run):
        self.clock, self.run, self.taken = clock, run, 0

    def step(self):
        self.clock.order.append(self.run.label)
        self.taken += 1
        slow = 100.0 if self.taken <= WARM_UP else self.taken - WARM_UP
        return slow * (0.75 if self.run.config.enable_streaming else 1.0)

    def close(self):
        self.clock.open -= 1


def test_ratios_pair_the_steps_and_are_stored(home, text):
    known, clock, said = trained(CONFIG, text), Clock(), []
    times = measure_times(CONFIG, text, known, 19, said.append, start=clock)
    labels = [run.label for run in clock.runs]  # both lengths share a timing
    assert labels == ["dense", "factored-tangent", "dense", "adamw"] and clock.open == 0
    first = clock.order[: 2 * (WARM_UP + 19)]
    assert first[:4] == ["factored-tangent", "dense", "dense", "factored-tangent"]  # in turn
    assert len({run.config.run for run in clock.runs[:2]}) == 2  # side by side in two folders
    assert {run.config.threads for run in clock.runs} == {0}  # all, whatever the sweep had
    assert min(run.config.num_iterations for run in clock.runs) > WARM_UP + 19
    assert {(run.config.eval_every, run.config.save_every) for run in clock.runs} == {(-1, -2)}
    by_method = {record["method"]: record for record in times.values()}
    assert by_method["dense"]["ratio"] == by_method["adamw"]["ratio"] == 1.0
    low = by_method["factored-tangent"]
    assert low["ratio"] == low["ratio_low"] == low["ratio_high"] == 0.75
    assert (low["ms"], by_method["dense"]["ms"], low["steps"]) == (7500, 10000, 19)
    assert said[0] == "factored-tangent, k = 32: step time / dense 0.750 (0.750 to 0.750)"

    again = measure_times(CONFIG, text, known, 19, said.append, start=clock)
    assert again == times and len(clock.runs) == 4
    measure_times(CONFIG, text, known, 19, said.append, again=True, start=clock)
    assert len(clock.runs) == 8

    more = LabConfig(methods="factored-tangent,factored-power", threads=1)
    clock.runs.clear()
    measure_times(more, text, trained(more, text), 19, said.append, start=clock)
    assert [run.label for run in clock.runs] == ["dense", "factored-power"]  # only what is new
    assert len(store.read_times()) == 4


def test_what_cannot_be_timed_is_left_out(home, text):
    clock, said = Clock(), []

    def start(run):
        if run.config.enable_streaming:
            raise RuntimeError("out of memory")
        return clock(run)

    times = measure_times(CONFIG, text, trained(CONFIG, text), 3, said.append, start=start)
    assert {record["method"] for record in times.values()} == {"dense", "adamw"}
    assert "factored-tangent, k = 32 could not be timed: out of memory" in said
    assert clock.open == 0  # also the one whose partner did not come

    alone = LabConfig(methods="dense", threads=1, batch_sizes="4096")
    times = measure_times(alone, text, trained(alone, text), 3, said.append, start=clock)
    assert [record["ratio"] for record in times.values()] == [1.0]


def test_median_interval():
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([5.0, 1.0, 2.0, 4.0, 3.0]) == (1.0, 5.0)  # too few for 95%
    assert median_interval([float(i) for i in range(1, 31)]) == (10.0, 21.0)  # the tables' n = 30
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        low, high = median_interval(torch.randn(15, generator=generator).exp().tolist())
        held += low <= 1.0 <= high
    assert 0.93 <= held / 400 <= 0.995


def test_equal_time_gives_as_many_steps_as_fit(home, text):
    known = trained(CONFIG, text)
    times = measure_times(CONFIG, text, known, 3, lambda words: None, start=Clock())
    runs = equal_time_runs(CONFIG, text, known, times)
    steps = {cell.method.label: [] for cell in cells(CONFIG)}
    for of_cell in runs.values():
        assert [run.config.seed for run in of_cell] == [0, 1]
        steps[of_cell[0].label].append(of_cell[0].config.num_iterations)
    assert steps == {"dense": [], "factored-tangent": [267, 400], "adamw": [200, 300]}
    best = make_run(CONFIG, text, cells(CONFIG)[1], 0.02, 0)
    assert runs[best.key][0].config.matrix_lr == pytest.approx(0.02)
