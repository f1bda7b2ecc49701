"""Every gate on records made by hand: met, not met, and not applicable, for the right reason."""

import json
import math

import pytest

from molegrad.gpt.report import gates
from molegrad.gpt.report.gates import Gate, Limits, Outcome, judge
from molegrad.gpt.report.record import RunRecord

LIMITS = Limits()
MIB = 2**20
PARTS = {"weights": 8 * MIB, "bases": 0, "gradients": 2 * MIB, "optimizer_state": 4 * MIB}


def lines(losses=None, bpb=2.0, **more):
    """Metrics of a run whose loss falls from 6 to 3."""
    losses = losses or [6 - 3 * i / 99 for i in range(100)]
    metrics = [{"step": i, "train/loss_raw": value} for i, value in enumerate(losses, 1)]
    metrics.append({"step": len(losses), "val/bpb": bpb})
    metrics.append({"step": len(losses), **{f"memory/{k}": v for k, v in PARTS.items()}})
    read = enumerate(zip(*more.values(), strict=True), 1)
    return [
        {"step": step, **dict(zip(more, values, strict=True))} for step, values in read
    ] + metrics


def record(label="m", metrics=None, folder=None, **config):
    config = {"steps": 100, "device_type": "cpu", "enable_streaming": label != "d", **config}
    return RunRecord(label, "base", folder, config, metrics or lines(), [])


def verdicts(found):
    return {gate.name: gate.met for gate in found}


def test_two_good_runs_meet_every_gate_that_applies():
    molegrad = record(
        metrics=lines(
            bpb=2.01,
            **{
                "layer/a/energy_capture": [0.9, 0.8, 0.8, 0.7],
                "layer/a/condition_number": [1e2, 1e9, 1e2, 1e3],
                "health/findings": [0, 0, 0, 0],
            },
        )
    )
    found = judge(
        LIMITS,
        [Outcome("dense", 100, 0), Outcome("molegrad", 100, 0)],
        record("d"),
        molegrad,
        {"dense": PARTS, "molegrad": PARTS},
        {"dense": [("a", " b")], "molegrad": [("a", " b"), ("c", "")]},
    )
    assert all(gate.met for gate in found), [gate for gate in found if not gate.met]
    values = {gate.name: gate.value for gate in found}
    assert values["quality"] == pytest.approx(0.5) and values["memory/dense/weights"] == 8
    assert values["metrics/condition_number"] == 550 and values["samples/molegrad"] == 1
    assert values["metrics/energy_capture"] == pytest.approx(0.7 / 0.9)
    assert len(values) == len(found) == 23
    json.dumps([gate.to_dict() for gate in found], allow_nan=False)


def test_nothing_recorded_meets_no_gate_but_leaves_no_traceback():
    failed = Outcome("molegrad", 100, 1, "NonFiniteError: step 3: loss nan")
    found = judge(LIMITS, [Outcome("dense", 100, 0), failed], record("d"), None, {}, {})
    met = verdicts(found)
    for name in ("ended/molegrad", "same_conditions", "loss/molegrad/falls", "quality"):
        assert met[name] is False
    for name in ("metrics/health", "memory/molegrad/weights", "samples/molegrad"):
        assert met[name] is False
    ended = next(gate for gate in found if gate.name == "ended/molegrad")
    assert "exit code 1: NonFiniteError: step 3: loss nan" in ended.how


def test_a_run_that_stopped_early_has_not_ended():
    early = record(metrics=lines([5.0, 4.0]))
    assert gates.ended(Outcome("dense", 2, 0), early).met
    gate = gates.ended(Outcome("dense", 100, 0), early)
    assert gate.met is False and (gate.value, gate.limit) == (2, 100)


def test_runs_in_other_conditions_are_told():
    gate = gates.same_conditions([record("d", seed=0), record("m", seed=1)])
    assert gate.met is False and gate.value == 1 and "seed: d 0, m 1" in gate.how


def test_memory_is_held_to_the_tolerance_both_ways():
    for factor, met in ((1.005, True), (0.995, True), (1.02, False), (0.98, False)):
        predicted = {**PARTS, "gradients": 2 * MIB * factor}
        found = verdicts(gates.memory("m", record(), predicted, LIMITS))
        assert found["memory/m/gradients"] is met and found["memory/m/weights"]
    wide = Limits(memory_tolerance=5)
    assert verdicts(gates.memory("m", record(), predicted, wide))["memory/m/gradients"]
    grown = record(metrics=[{"step": 1, "memory/bases": 10}])
    assert verdicts(gates.memory("m", grown, PARTS, LIMITS))["memory/m/bases"] is False
    (first, *_) = gates.memory("m", record(), None, LIMITS, "(no such optimizer)")
    assert first.met is False and "no prediction (no such optimizer)" in first.how


def test_the_peak_is_a_gate_on_cuda_alone():
    predicted = {**PARTS, "total": 100 * MIB}
    for peak, met in ((120, True), (130, False)):
        metrics = [*lines(), {"step": 100, "train/peak_memory_bytes": peak * MIB}]
        gpu = record(metrics=metrics, device_type="cuda")
        assert verdicts(gates.memory("m", gpu, predicted, LIMITS))["memory/m/peak"] is met
        cpu = record(metrics=metrics)
        assert "memory/m/peak" not in verdicts(gates.memory("m", cpu, predicted, LIMITS))


@pytest.mark.parametrize(
    ("losses", "falls", "rises"),
    [
        ([5.0] * 100, False, True),
        ([5 - 0.01 * (i % 2) - 0.02 * i for i in range(100)], True, True),
        ([5 - 0.05 * i if i < 50 else 3 + 0.03 * (i - 50) for i in range(100)], True, False),
        ([3 + 0.01 * i for i in range(100)], False, False),
        ([6.0, 5.0, 4.0, 3.9, 4.0], True, True),
        ([6.0], False, False),
    ],
)
def test_the_loss_has_to_fall_and_must_not_rise_again(losses, falls, rises):
    found = gates.loss("m", record(metrics=lines(losses)), LIMITS)
    assert [gate.met for gate in found] == [falls, rises], found


def test_numbers_that_are_not_finite_are_counted():
    assert gates.finite([record()]).met
    odd = record(metrics=[*lines(), {"step": 7, "train/loss": "nan", "val/bpb": math.inf}])
    gate = gates.finite([record("d"), odd])
    assert gate.met is False and gate.value == 2 and "m step 7: train/loss" in gate.how


def test_alarms_of_the_health_checks_are_gates_and_other_findings_are_not(tmp_path):
    watched = record(metrics=lines(**{"health/findings": [0, 1]}), folder=tmp_path)
    found = [{"step": 9, "layer": "h.0", "kind": "frozen", "message": "does not turn"}]
    (tmp_path / "health.jsonl").write_text("".join(json.dumps(f) + "\n" for f in found))
    assert gates.health(watched).met
    found.append({"step": 10, "layer": "h.1", "kind": "exploding", "message": "far too large"})
    (tmp_path / "health.jsonl").write_text("".join(json.dumps(f) + "\n" for f in found))
    gate = gates.health(watched)
    assert gate.met is False and gate.value == 1 and "step 10, h.1: far too large" in gate.how
    assert gates.health(record()).met is None


def test_condition_number_is_the_worst_layers_median():
    key = "condition_number"
    good = record(metrics=lines(**{f"layer/a/{key}": [10.0, 1e9, 20.0]}))
    assert gates.condition(good, LIMITS).met
    more = {f"layer/a/{key}": [10.0, 1e9, 20.0], f"layer/b/{key}": [1e7, 1e7, 1e7]}
    gate = gates.condition(record(metrics=lines(**more)), LIMITS)
    assert gate.met is False and gate.value == 1e7 and gate.how.endswith("readings: b")
    sampled = gates.condition(record(streaming_method="sampled"), LIMITS)
    assert sampled.met is None and "has no subspace" in sampled.how


def test_energy_that_collapses_in_one_layer_is_found():
    steady = {"layer/a/energy_capture": [0.9, 0.9, 0.9, 0.8]}
    fallen = {"layer/b/energy_capture": [0.9, 0.6, 0.3, 0.2]}
    assert gates.energy(record(metrics=lines(**steady)), LIMITS).met
    gate = gates.energy(record(metrics=lines(**steady, **fallen)), LIMITS)
    assert gate.met is False and gate.value == pytest.approx(2 / 9) and ": b; " in gate.how
    true = record(metrics=lines(**{"shadow/a/energy_capture": [0.9, 0.8]}))
    assert gates.energy(true, LIMITS).met and "shadow layers" in gates.energy(true, LIMITS).how
    assert gates.energy(record(streaming_probes=0), LIMITS).met is None


@pytest.mark.parametrize(("bpb", "within", "outer"), [(1.9, 1, 1), (2.03, 0, 1), (2.2, 0, 0)])
def test_quality_is_the_gap_to_dense(bpb, within, outer):
    found = gates.quality(record("d"), record(metrics=lines(bpb=bpb)), LIMITS)
    assert [gate.met for gate in found] == [bool(within), bool(outer)]
    assert found[0].value == pytest.approx(100 * (bpb / 2 - 1)) and found[0].limit == 1.0
    assert gates.quality(record("d"), record(metrics=lines(bpb="nan")), LIMITS)[0].met is False


def test_white_space_is_no_sample():
    assert gates.sampled("m", [("a", "  \n"), ("b", "")]).met is False


def test_words_and_cells():
    gate = Gate("x", None, None, math.inf, "how")
    assert gate.word == "does not apply" and gate.cells == ["x", "", "inf", "how"]
    assert gate.to_dict()["limit"] == "inf" and gate.to_dict()["value"] is None


def test_parts_are_equal_stretches():
    assert gates.parts([1, 2, 3, 4, 5, 6], 3) == [1.5, 3.5, 5.5]
    assert gates.parts([1.0, 5.0], 10) == [1.0, 5.0]
