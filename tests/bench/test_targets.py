import copy
import re
from pathlib import Path

import pytest

from molegrad.bench.targets import shown, targets

GPU_CHECK = Path(__file__).parents[2] / "scripts/gpu_check.sh"
FFN, MODES = "balanced:target_layers=ffn_only", "tangent:target_layers=all"

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
    "config": {"device": "cuda", "depth": 12, "aspect_ratio": 64},
    "rows": [
        {"sequences": s, "tokens": t, "method": method, "ratio": ratio, "gradients_mib": mib}
        | COMMON
        for s, t, method, ratio, mib in (
            (1, 8192, "dense", 1.0, 324.0),
            (1, 8192, "adamw", 0.5, 324.0),  # no method of ours
            (1, 8192, "balanced", 0.81, 0.0),
            (1, 8192, FFN, 0.87, 108.0),
            (1, 8192, "balanced:target_layers=attention_only", 0.4, 216.0),
            (1, 8192, "tangent", 0.9, 120.0),  # feed-forward layers only
            (1, 8192, MODES, 0.85, 20.0),
            (16, 2048, "dense", 1.0, 324.0),
            (16, 2048, "balanced", 0.3, 0.0),
            (16, 2048, MODES, 0.3, 1.0),
        )
    ],
}
NAMES = ["sketch", "bandwidth", "power", "bases", "step ffn", "step all", "bytes"]


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
        "step ffn": "met",
        "step all": "not met",
        "bytes": "met",
    }
    measured = {name: row["measured"] for name, row in found.items()}
    assert measured == {
        "sketch": 2.6,
        "bandwidth": 0.6,
        "power": 1.6,
        "bases": 151.0,
        "step ffn": 0.87,
        "step all": 0.81,
        "bytes": pytest.approx(16.2),
    }
    assert found["sketch"]["note"] == "fused: 3.10" and found["power"]["note"] == ""
    assert found["step ffn"]["note"] == FFN and found["step ffn"]["wanted"] == 0.88
    assert found["step all"]["note"] == "balanced" and found["step all"]["wanted"] == 0.80
    assert "1x8192" in found["step ffn"]["name"] and "all linear" in found["step all"]["name"]
    assert found["bytes"]["note"] == MODES


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
    step["rows"].append(step["rows"][2] | {"compiled": True, "ratio": 0.8})
    row = results(None, step)["step all"]
    assert (row["result"], row["note"]) == ("met", "balanced, compiled")


@pytest.mark.parametrize(
    "method, target",
    [
        ("exact", "step all"),
        ("minimal:target_layers=[c_fc,c_proj,c_q,c_k,c_v]", "step all"),
        ("balanced:target_layers=[mlp.c_fc,mlp.c_proj]", "step ffn"),
        ("lowrank-grad", "step ffn"),
        ("lowrank-grad:rank=16:target_layers=all", "step all"),
        ("balanced:target_layers=mlp.c_fc", None),
        ("lowrank-grad:rank=32:target_layers=all:min_layer_utilization=0.93", "step ffn"),
        ("dion", None),
    ],
)
def test_what_a_method_converts_decides_which_target_it_measures(method, target):
    rows = [STEP["rows"][0] | {"method": name} for name in ("dense", method)]
    found = results(None, STEP | {"rows": rows})
    measured = [name for name in ("step ffn", "step all") if found[name]["measured"] is not None]
    assert measured == ([] if target is None else [target])


def test_a_row_that_was_not_timed_measures_nothing():
    failed = {k: v for k, v in STEP["rows"][0].items() if k not in ("ratio", "gradients_mib")}
    rows = [*STEP["rows"], failed | {"method": "exact", "note": "out of memory"}]
    assert targets(None, STEP | {"rows": rows}) == targets(None, STEP)


def test_the_check_of_a_gpu_measures_every_target_of_a_step():
    text = GPU_CHECK.read_text()
    lists = re.findall(r"^ *steps=\((.*)\)$", text, re.MULTILINE)
    assert len(lists) == 3  # as it is, QUICK=1, FULL=1
    for line in lists:
        methods = re.search(r"--methods=(\S+)", line.replace("$methods", variable(text)))[1]
        assert "--depth=12" in line and "1x8192" in line
        names = ["dense", *methods.split(",")]
        rows = [STEP["rows"][0] | {"method": name, "gradients_mib": 1.0} for name in names]
        found = results(None, STEP | {"rows": rows})
        for name in ("step ffn", "step all", "bytes"):
            assert found[name]["measured"] is not None, (name, methods)


def variable(text):
    return re.search(r"^methods=(\S+)$", text, re.MULTILINE)[1]


def test_shown_as_markdown():
    text = shown(targets(GRAD, None))
    assert "| target | wanted | measured | result | note |" in text
    assert "| ≥ 2.50 | 2.60 | met | fused: 3.10 |" in text
    assert "| ≥ 65% | 60% | not met | fused: 0.70 |" in text
    assert "| ≤ 150 | 151 | not met |  |" in text and "| ≤ 0.88 |  | not measured |  |" in text
