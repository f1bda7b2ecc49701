import pytest
import torch

from molegrad.lab import table
from molegrad.lab.sweep import CompareConfig, compare
from tests.lab.conftest import faked


def rows_of(text, fails=lambda c: False, **values):
    return compare(CompareConfig(**values), text, {}, lambda words: None, faked(fails))


def test_interval_of_a_known_example():
    assert table.interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert table.interval([1.0]) is None
    wide = [float(i) for i in range(30)]  # beyond the table its last point, on the safe side
    assert table.interval(wide) == pytest.approx(2.262 * 8.803408 / 30**0.5, rel=1e-6)


def test_median_interval():
    assert table.median_interval([3.0]) == (3.0, 3.0)
    assert table.median_interval([5.0, 1.0, 2.0, 4.0, 3.0]) == (1.0, 5.0)  # too few for 95%
    thirty = [float(i) for i in range(1, 31)]
    assert table.median_interval(thirty) == (10.0, 21.0)  # the tables' n = 30
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        low, high = table.median_interval(torch.randn(15, generator=generator).exp().tolist())
        held += low <= 1.0 <= high
    assert 0.93 <= held / 400 <= 0.995


def test_gaps_are_paired_by_seed():
    def run(seed, bpb, status="ok"):
        return {"config": {"seed": seed}, "bpb": bpb, "status": status}

    dense = [run(0, 1.0), run(1, 2.0), run(2, 4.0)]
    found = table.gap([run(2, 4.04), run(0, 1.01), run(1, 9.0, "failed")], dense)
    assert found["gaps"] == pytest.approx([1.0, 1.0])
    assert found["gap_percent"] == pytest.approx(1.0)
    assert found["gap_interval"] == pytest.approx(0.0, abs=1e-9)
    assert table.gap([run(5, 1.0)], dense)["gap_percent"] is None


def test_a_row_says_what_was_measured(home, text):
    dense, low, adamw = rows_of(text, methods="tangent:rank=48,adamw", seeds=3, equal_time=True)
    assert dense["reference"] and not low["reference"] and dense["gap_percent"] == 0
    assert (low["lr"], low["seeds"], low["bpb"]) == (0.02, 3, pytest.approx(2.21))
    gaps = [100 * (2.2 + s) / (2.0 + s) - 100 for s in (0, 0.01, 0.02)]
    assert low["gaps"] == pytest.approx(gaps)
    assert low["gap_interval"] < 0.2 and adamw["gap_percent"] == 0
    assert low["gradient_flops_ratio"] == 0.25 and low["flops_ratio"] == 0.75
    shown = table.table([dense, low, adamw])
    assert "### 3 blocks of width 192, 2,048 tokens a step, 300 steps" in shown
    line = "| tangent:rank=48 | 0.02 | 2.2100 | +9.95% ± 0.12 | +9.95% ± 0.12 | 0.50 (0.50–0.50) |"
    assert f"{line} 500.0 | 0.250 | 0.00 | 0.00 | 0.00 | 2.86x | 1 | 3 |" in shown  # 2000 / 700
    assert all(line.count("|") == 15 for line in shown.splitlines()[2:])


def test_failures_are_seen(home, text):
    def fails(c):
        return c.enable_streaming or (c.optimizer == "adamw" and c.seed == 1)

    rows = rows_of(text, fails, methods="adamw,lowrank", seeds=3, time_steps=0)
    assert rows[1]["failed_seeds"] == 1 and len(rows[1]["gaps"]) == 2
    lines = table.table(rows).splitlines()
    assert lines[-2].endswith("| 2, 1 failed |")
    assert lines[-1].startswith("| lowrank | 0.0025 (edge) | failed: loss nan \\| gradients |")


def test_several_settings_are_several_tables_and_panels(home, text, tmp_path):
    values = {"sizes": "2x64,4x128", "num_iterations": "100,200", "time_steps": 0}
    rows = rows_of(text, methods="lowrank", **values)
    assert table.table(rows).count("### ") == 4
    for name in ("a.svg", "b.svg"):
        table.draw(rows, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count(">lowrank<") == 4 and "4 × 128, 2,048 × 200 tokens" in drawn
    assert drawn == (tmp_path / "b.svg").read_text()  # the same rows make the same file
