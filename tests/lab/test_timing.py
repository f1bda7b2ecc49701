import pytest

from molegrad.lab import store
from molegrad.lab.sweep import LabConfig, cells, make_run, next_runs
from molegrad.lab.timing import ROUNDS, WARM_UP, equal_time_runs, measure_times
from tests.lab.conftest import fake_record

CONFIG = LabConfig(methods="factored-tangent,adamw", seeds=2, threads=1, num_iterations="200,300")


def trained(config, text):
    known = {}
    while runs := next_runs(config, text, known):
        known |= {run.key: fake_record(run) for run in runs}
    return known


def clock(calls):
    """A machine that gets slower round by round; factored takes three quarters of dense's time."""

    def perform(run):
        calls.append(run)
        slow = 1.0 + (len(calls) - 1) // 3
        factor = 0.75 if run.config.enable_streaming else 1.0
        return [100.0] * WARM_UP + [slow * factor] * (run.config.num_iterations - WARM_UP)

    return perform


def test_ratios_pair_the_rounds_and_are_stored(home, text):
    known, calls, said = trained(CONFIG, text), [], []
    times = measure_times(CONFIG, text, known, 20, said.append, perform=clock(calls))
    assert len(calls) == 3 * ROUNDS == len(said)  # both lengths share a timing
    labels = [run.label for run in calls]
    assert labels[0] == "dense" and labels[5] == "dense" and labels[7] == "dense"  # in turn
    assert {run.config.threads for run in calls} == {0}  # all of them, whatever the sweep had
    assert {run.config.num_iterations for run in calls} == {WARM_UP + 7}
    assert {(run.config.eval_every, run.config.save_every) for run in calls} == {(-1, -2)}
    by_method = {record["method"]: record for record in times.values()}
    assert by_method["dense"]["ratio"] == by_method["adamw"]["ratio"] == 1.0
    low = by_method["factored-tangent"]
    assert low["ratio"] == low["ratio_low"] == low["ratio_high"] == 0.75
    assert (low["ms"], low["ms_low"], low["ms_high"]) == (1500, 750, 2250)

    again = measure_times(CONFIG, text, known, 20, said.append, perform=clock(calls))
    assert again == times and len(calls) == 3 * ROUNDS
    measure_times(CONFIG, text, known, 20, said.append, again=True, perform=clock(calls))
    assert len(calls) == 6 * ROUNDS

    more = LabConfig(methods="factored-tangent,factored-power", threads=1)
    calls.clear()
    measure_times(more, text, trained(more, text), 20, said.append, perform=clock(calls))
    assert {run.label for run in calls} == {"dense", "factored-power"}  # what is new, and dense
    assert len(store.read_times()) == 4


def test_what_cannot_be_timed_is_left_out(home, text):
    def perform(run):
        if run.config.enable_streaming:
            return {"status": "failed", "reason": "out of memory"}
        return [1.0] * run.config.num_iterations

    said = []
    times = measure_times(CONFIG, text, trained(CONFIG, text), 3, said.append, perform=perform)
    assert {record["method"] for record in times.values()} == {"dense", "adamw"}
    assert "factored-tangent, k = 32 could not be timed: out of memory" in said


def test_equal_time_gives_as_many_steps_as_fit(home, text):
    known = trained(CONFIG, text)
    times = measure_times(CONFIG, text, known, 3, lambda words: None, perform=clock([]))
    runs = equal_time_runs(CONFIG, text, known, times)
    steps = {cell.method.label: [] for cell in cells(CONFIG)}
    for of_cell in runs.values():
        assert [run.config.seed for run in of_cell] == [0, 1]
        steps[of_cell[0].label].append(of_cell[0].config.num_iterations)
    assert steps == {"dense": [], "factored-tangent": [267, 400], "adamw": [200, 300]}
    best = make_run(CONFIG, text, cells(CONFIG)[1], 0.02, 0)
    assert runs[best.key][0].config.matrix_lr == pytest.approx(0.02)
