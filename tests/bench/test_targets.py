import copy

import pytest

from molegrad.bench.targets import shown, targets

LABELS = {"n": 1280, "m": 5120, "tokens": 8192, "k": 32}
GRAD = {
    "config": {"device": "cuda", "dtype": "bfloat16"},
    "gradients": [
        LABELS | {"op": "dense", "how": "torch.mm", "vs_dense": 1.0},
        LABELS | {"op": "sketch", "how": "reference", "vs_dense": 9.0, "of_floor": 0.99},
        LABELS | {"op": "sketch", "how": "native", "vs_dense": 2.6, "of_floor": 0.6},
        LABELS | {"op": "sketch", "how": "own", "vs_dense": 2.6, "of_floor": 0.6},
        LABELS | {"op": "sketch", "how": "fused", "vs_dense": 3.1, "of_floor": 0.7},
        LABELS | {"op": "sketch", "how": "cublaslt", "note": "not supported"},
        LABELS | {"op": "power", "how": "native", "vs_dense": 1.6, "of_floor": 0.4},
        LABELS | {"k": 64, "op": "power", "how": "native", "vs_dense": 0.5},
        LABELS | {"tokens": 2048, "op": "sketch", "how": "native", "vs_dense": 0.1},
    ],
    "bases": [
        {"depth": 12, "k": 64, "op": "orthonormalize", "how": "native", "us_p50": 1.0},
        {"depth": 12, "k": 32, "op": "orthonormalize", "how": "reference", "us_p50": 9000.0},
        {"depth": 12, "k": 32, "op": "orthonormalize", "how": "native", "us_p50": 151.0},
    ],
}
COMMON = {"compiled": False, "in_turn": True}
STEP = {
    "config": {"device": "cuda", "depth": 12},
    "rows": [
        {"sequences": s, "tokens": t, "method": method, "ratio": ratio, "gradients_mib": mib}
        | COMMON
        for s, t, method, ratio, mib in (
            (1, 8192, "dense", 1.0, 324.0),
            (1, 8192, "balanced", 0.87, 0.0),
            (1, 8192, "factored-tangent", 0.9, 20.0),
            (16, 2048, "dense", 1.0, 324.0),
            (16, 2048, "balanced", 0.85, 0.0),
            (16, 2048, "factored-tangent", 0.81, 20.0),
        )
    ],
}
NAMES = ["sketch", "bandwidth", "power", "bases", "step 8192", "step 2048", "bytes"]


def results(grad, step):
    rows = targets(grad, step)
    assert len(rows) == len(NAMES)
    return dict(zip(NAMES, rows, strict=True))


def test_every_target_is_judged_by_its_own_row():
    found = results(GRAD, STEP)
    assert {name: row["result"] for name, row in found.items()} == {
        "sketch": "met",
        "bandwidth": "not met",
        "power": "met",  # exactly 1.6
        "bases": "not met",
        "step 8192": "met",
        "step 2048": "not met",
        "bytes": "met",
    }
    measured = {name: row["measured"] for name, row in found.items()}
    assert measured == {
        "sketch": 2.6,
        "bandwidth": 0.6,
        "power": 1.6,
        "bases": 151.0,
        "step 8192": 0.87,
        "step 2048": 0.81,
        "bytes": pytest.approx(16.2),
    }
    assert found["sketch"]["note"] == "fused: 3.10" and found["power"]["note"] == ""
    assert found["step 8192"]["note"] == "balanced"
    assert found["step 2048"]["note"] == "factored-tangent"


def test_nothing_measured_meets_nothing():
    on_cpu = copy.deepcopy(GRAD)
    on_cpu["config"]["device"] = "cpu"
    shallow = copy.deepcopy(STEP)
    shallow["config"]["depth"] = 4
    for grad, step in ((None, None), (on_cpu, shallow)):
        found = results(grad, step)
        assert all(row["result"] == "not measured" for row in found.values())
        assert all(row["measured"] is None for row in found.values())


def test_a_row_without_times_is_not_measured_and_says_why():
    grad = copy.deepcopy(GRAD)
    for row in grad["gradients"]:
        if row["op"] == "power":
            del row["vs_dense"]
            row["note"] = "failed: out of memory"
    grad["gradients"].append({**LABELS, "note": "not measured: the table's 14 s are spent"})
    grad["bases"] = [{"depth": 12, "k": 32, "note": "not measured: the table's 14 s are spent"}]
    found = results(grad, None)
    assert found["power"]["result"] == found["bases"]["result"] == "not measured"
    assert found["power"]["note"] == "failed: out of memory"
    assert found["sketch"]["result"] == "met"
    grad["config"]["dtype"] = "float32"
    assert results(grad, None)["sketch"]["result"] == "not measured"


def test_compiled_steps_count_and_are_named():
    step = copy.deepcopy(STEP)
    step["rows"].append(step["rows"][4] | {"compiled": True, "ratio": 0.8})
    row = results(None, step)["step 2048"]
    assert (row["result"], row["note"]) == ("met", "balanced, compiled")


def test_shown_as_markdown():
    text = shown(targets(GRAD, None))
    assert "| target | wanted | measured | result | note |" in text
    assert "| ≥ 2.50 | 2.60 | met | fused: 3.10 |" in text
    assert "| ≥ 65% | 60% | not met | fused: 0.70 |" in text
    assert "| ≤ 150 | 151 | not met |  |" in text and "| ≤ 0.80 |  | not measured |  |" in text
