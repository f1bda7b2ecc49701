import pytest

from molegrad.lab import summary
from molegrad.lab.sweep import LabConfig, cells, make_run, next_runs
from tests.lab.conftest import fake_record


def known_runs(config, text, record=fake_record):
    known = {}
    while runs := next_runs(config, text, known):
        for run in runs:
            known[run.key] = {**run.to_dict(), **record(run)}
    return known


@pytest.mark.parametrize(
    ("freedom", "value"),  # the 97.5% points of every table of Student's t
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_students_t(freedom, value):
    assert summary.student_quantile(0.975, freedom) == pytest.approx(value, abs=6e-4)
    assert summary.student_cdf(0.0, freedom) == 0.5
    assert summary.student_cdf(-value, freedom) == pytest.approx(0.025, abs=1e-4)


def test_interval_of_a_known_example():
    assert summary.interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert summary.interval([1.0]) is None


def test_gaps_are_paired_by_seed():
    def run(seed, bpb, status="ok"):
        return {"config": {"seed": seed}, "bpb": bpb, "status": status}

    dense = [run(0, 1.0), run(1, 2.0), run(2, 4.0)]
    found = summary.gap([run(2, 4.04), run(0, 1.01), run(1, 9.0, "failed")], dense)
    assert found["gaps"] == pytest.approx([1.0, 1.0])
    assert found["gap_percent"] == pytest.approx(1.0)
    assert found["gap_interval"] == pytest.approx(0.0, abs=1e-9)
    assert summary.gap([run(5, 1.0)], dense)["gap_percent"] is None


def test_a_row_says_what_was_measured(text):
    config = LabConfig(methods="factored-tangent:rank=48,adamw", seeds=3)
    dense, low, adamw = summary.summarise(config, text, known_runs(config, text))
    assert dense["reference"] and not low["reference"] and dense["gap_percent"] == 0
    assert (low["lr"], low["seeds"], low["bpb"]) == (0.02, 3, pytest.approx(2.21))
    assert low["gaps"] == pytest.approx(
        [100 * (2.2 + s) / (2.0 + s) - 100 for s in (0, 0.01, 0.02)]
    )
    assert low["gap_interval"] < 0.2 and adamw["gap_percent"] == 0
    assert low["gradient_flops_ratio"] == 0.25 and low["flops_ratio"] == 0.75
    assert (low["rank_share"], dense["rank_share"]) == (0.25, None)
    assert [tokens for tokens, _ in low["curve_gaps"]] == [150 * 2048, 300 * 2048]
    assert low["family"] == "factored-tangent"
    table = summary.table([dense, low, adamw])
    assert "### 3 blocks of width 192, 2,048 tokens a step, 300 steps" in table
    assert "| factored-tangent:rank=48 | 48 | 0.02 | 2.2100 | +9.95% ± 0.12 |" in table
    assert "| 0.250 | 0.00 | 0.00 | 0.00 | 2.86x | 1 | 3 |" in table  # 2000 bytes / 700
    assert all(line.count("|") == 16 for line in table.splitlines()[2:])


def test_equal_time_is_a_second_gap(text):
    config = LabConfig(methods="factored-tangent", seeds=2)
    known = known_runs(config, text)
    dense, low = cells(config)
    best = make_run(config, text, low, 0.02, 0)
    longer = [make_run(config, text, low, 0.02, seed, 400) for seed in range(2)]
    known |= {run.key: fake_record(run, 1.99 + 0.01 * run.config.seed) for run in longer}
    time = {"ratio": 0.75, "ratio_low": 0.7, "ratio_high": 0.8, "ms": 12.34}
    _, row = summary.summarise(config, text, known, {best.time_key: time}, {best.key: longer})
    assert row["equal_time"]["steps"] == 400
    assert row["equal_time"]["gaps"] == pytest.approx([-0.5, -0.497512])
    assert "| -0.50% ± 0.02 | 0.75 (0.70–0.80) | 12.3 |" in summary.table([row])


def test_several_settings_are_several_tables(text):
    config = LabConfig(methods="dense", sizes="2x64,4x128", num_iterations="100,200", seeds=1)
    rows = summary.summarise(config, text, known_runs(config, text))
    assert summary.table(rows).count("### ") == 4


def test_a_method_that_always_fails_keeps_its_row(text):
    def record(run):
        if run.config.optimizer == "adamw":
            return {"status": "failed", "reason": "step 3: loss nan | gradients"}
        return fake_record(run)

    config = LabConfig(methods="adamw", seeds=1)
    rows = summary.summarise(config, text, known_runs(config, text, record))
    line = summary.table(rows).splitlines()[-1]
    assert line.startswith("| adamw |  | 0.0025 (edge) | failed: step 3: loss nan \\| gradients |")

    def other(run):
        failed = run.config.optimizer == "muon"
        return {"status": "failed", "reason": "x"} if failed else fake_record(run)

    rows = summary.summarise(config, text, known_runs(config, text, other))
    assert rows[1]["gap_percent"] is None and "failed: x" in summary.table(rows)


def test_a_seed_that_fails_is_counted(text):
    def record(run):
        bad = run.config.seed == 1 and run.config.optimizer == "adamw"
        return {"status": "failed", "reason": "x"} if bad else fake_record(run)

    config = LabConfig(methods="adamw", seeds=3)
    rows = summary.summarise(config, text, known_runs(config, text, record))
    assert rows[1]["failed_seeds"] == 1 and len(rows[1]["gaps"]) == 2
    assert "| 2, 1 failed |" in summary.table(rows)
