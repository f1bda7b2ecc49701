import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from molegrad.bench import gpu, grad, layer
from molegrad.bench.layer import bench_bases, layer_shapes
from molegrad.gpt.train import flags
from molegrad.ops import OPS

TINY = ["--shapes=24x16,16x40", "--tokens=8,20", "--ranks=2,4", "--repeats=2", "--depth=2"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch):
    """Of 1 GB/s: what is measured has a test of its own, and takes a second."""
    rate = {"read": 1e9, "copy": 0.9e9, "best": 1e9}
    monkeypatch.setattr(grad, "bandwidth", lambda device: rate)


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_command_prints_tables_and_then_one_json_object(capsys):
    assert grad.main([*TINY, "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("torch ") and "vs dense" in lines[2]
    result = json.loads(lines[-1])
    assert all(result[name] for name in grad.TABLES)
    measured = {name: [r for r in result[name] if "note" not in r] for name in grad.TABLES}
    assert {row["fraction"] for row in measured["sampled"]} == {0.25, 0.125}
    ratios = [*measured["sampled"], *measured["layers"]]
    assert all(row["vs_dense"] > 0 for row in ratios)
    for row in measured["gradients"]:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        dense = row["op"] == "dense"
        work = 2 * row["n"] * row["m"] if dense else 4 * row["k"] * (row["n"] + row["m"])
        assert row["gflops"] * row["us_p50"] * 1e3 == pytest.approx(row["tokens"] * work)
        limit = row["n"] * row["m"] / (2 * row["k"] * (row["n"] + row["m"]))
        assert dense or row["of_limit"] == pytest.approx(row["vs_dense"] / limit)
        assert not dense or row["vs_dense"] == 1.0
        assert ("vs_reference" in row) == (row["how"] not in ("torch.mm", "reference"))
        if row["how"] == "native":
            passes = 2 if row["op"] == "lowrank_grad" else 1
            bytes_ = passes * row["tokens"] * (row["n"] + row["m"]) * 4
            assert row["of_floor"] * row["us_p50"] * 1e-6 == pytest.approx(bytes_ / 1e9)
    notes = {row["note"] for name in grad.TABLES for row in result[name] if "note" in row}
    assert notes <= {"not built"}
    assert result["config"]["repeats"] == 2 and result["bandwidth"]["best"] == 1e9


def test_every_op_with_a_kernel_has_a_benchmark_of_its_name(capsys):
    few = ["--shapes=24x16", "--tokens=8", "--ranks=2", "--repeats=1", "--depth=2"]
    assert grad.main([*few, "--json"]) == 0
    result = last_json(capsys)
    timed = {row["op"] for name in grad.TABLES for row in result[name]}
    assert {name for name, op in OPS.items() if not op.composed} <= timed
    native = {row["op"] for name in grad.TABLES for row in result[name] if row["how"] == "native"}
    assert native <= OPS.keys()


def test_bases_of_all_layers_of_a_model():
    # 24 square layers for attention, six wider and six narrower ones, two sides each.
    assert layer_shapes(6) == {(384, 384): 24, (1536, 384): 6, (384, 1536): 6}
    rows = bench_bases(2, 4, CPU, 2, 60.0)
    assert [row["how"] for row in rows] == ["reference", "native"]
    assert all(row["layers"] == 12 and row["depth"] == 2 for row in rows)
    assert rows[0]["us_p50"] > 0 and ("note" in rows[1] or rows[1]["vs_reference"] > 0)
    assert bench_bases(2, 200, CPU, 1, 60.0) == []


def test_bases_are_made_in_one_call_for_each_side_of_a_shape(monkeypatch):
    seen = []
    monkeypatch.setattr(
        layer, "op_rows", lambda name, run, *rest: run(lambda y: seen.append(tuple(y.shape)))
    )
    bench_bases(2, 8, CPU, 1, 60.0)
    shapes = [(8, 128, 8), (8, 128, 8), (2, 512, 8), (2, 128, 8), (2, 128, 8), (2, 512, 8)]
    assert seen == shapes


def test_markdown(capsys):
    assert grad.main([*TINY, "--markdown", "--seconds=1e-9"]) == 0
    out = capsys.readouterr().out
    assert "| in | out | tokens | k | note |" in out and "| --- |" in out
    assert not out.rstrip().endswith("}")


def test_defaults_follow_the_device():
    cpu, cuda = grad.GradBenchConfig(), grad.GradBenchConfig(device="cuda")
    assert (cpu.dtype, cpu.integers("tokens"), cpu.integers("ranks")) == (
        "float32",
        [8192],
        [32, 128],
    )
    assert cuda.shape_list == [(768, 3072), (1280, 5120), (4096, 14336)]
    assert (cuda.dtype, cuda.integers("tokens")) == ("bfloat16", [2048, 8192, 32768])
    assert cuda.integers("ranks") == [32, 64, 128] and cuda.repeats > cpu.repeats > 1
    assert grad.GradBenchConfig(device="cuda", dtype="float32").dtype == "float32"
    assert cuda.left_out == ()
    some = grad.GradBenchConfig(paths="own,cublaslt")
    assert some.left_out == ("fused", "fp8 A", "fp8 A, B")


def test_spent_seconds_leave_rows_that_say_so(capsys):
    assert grad.main([*TINY, "--seconds=1e-9", "--json"]) == 0
    result = last_json(capsys)
    for name in grad.TABLES:
        assert result[name] and all("not measured" in row["note"] for row in result[name])


def test_a_failure_shows_in_the_row_and_the_status(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("the kernel broke")

    broken_op = dataclasses.replace(OPS["lowrank_grad"], reference=broken)
    monkeypatch.setitem(OPS, "lowrank_grad", broken_op)
    assert grad.main([*TINY, "--json"]) == 1
    result = last_json(capsys)
    failed = [row for row in result["gradients"] if "failed" in row.get("note", "")]
    assert {(row["op"], row["how"]) for row in failed} == {("lowrank_grad", "reference")}
    assert failed[0]["note"] == "failed: the kernel broke"


def test_rows_so_far_are_printed_on_ctrl_c(monkeypatch, capsys):
    measured = grad.bench_ops

    def stop(n, **rest):
        if n == 16:
            os.kill(os.getpid(), signal.SIGINT)
        return measured(n, **rest)

    monkeypatch.setattr(grad, "bench_ops", stop)
    assert grad.main([*TINY, "--json"]) == 130
    out = capsys.readouterr().out.strip().splitlines()
    result = json.loads(out[-1])
    assert result["interrupted"] is True and "interrupted: the rows so far" in out
    assert result["gradients"] and result["bandwidth"]["best"] == 1e9
    assert {row["n"] for row in result["ops"]} == {24}
    assert result["layers"] == result["sampled"] == []
    assert any("quantize_rows" in line for line in out[:-1])  # a part of the table is shown


def test_a_bandwidth_that_is_not_known_costs_its_column_only(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("memory bandwidth: no")

    monkeypatch.setattr(grad, "bandwidth", broken)
    few = ["--shapes=24x16", "--tokens=8", "--ranks=2", "--repeats=1", "--depth=0"]
    assert grad.main([*few, "--json"]) == 1
    out = capsys.readouterr().out.strip().splitlines()
    result = json.loads(out[-1])
    assert result["bandwidth"] is None and "failed: memory bandwidth: no" in out[-2]
    times = [row for row in result["gradients"] if "note" not in row]
    assert times and all(row.get("of_floor") is None for row in times)


def test_the_size_of_the_targets_comes_first(monkeypatch):
    seen = []

    def rows(problem, *rest):
        seen.append((problem.n, problem.k))
        return []

    monkeypatch.setattr(grad, "bench_gradients", rows)
    monkeypatch.setattr(grad, "SIZE", {"n": 16, "m": 40, "tokens": 20, "k": 2})
    sizes = ["--shapes=24x16,16x40", "--tokens=20", "--ranks=2,4", "--depth=0", "--repeats=1"]
    grad.bench(flags.parse(grad.GradBenchConfig, [*sizes, "--seconds=1e-3"]))
    assert seen == [(16, 2), (24, 2), (24, 4), (16, 4)]
    assert gpu.SIZE == {"n": 1280, "m": 5120, "tokens": 8192, "k": 32}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shapes=24"], "shapes=24"),
        (["--tokens=a"], "tokens=a"),
        (["--tokens=0"], "tokens=0"),
        (["--ranks=32", "--shapes=24x16"], "rank 32 does not fit shape 24x16"),
        (["--dtype=int8"], "dtype=int8"),
        (["--repeats=-1"], "repeats=-1"),
        (["--paths=own,fast"], "paths=own,fast should be of own, cublaslt,"),
        (["--seconds=-1"], "seconds=-1"),
    ],
)
def test_bad_flags_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        grad.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_it_works_without_the_extension():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_grad", *TINY, "--json"],
        env=os.environ | {"MOLEGRAD_BUILD": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["native"] is False and "MOLEGRAD_BUILD=0" in result["build_info"]["reason"]
    measured = {row["how"] for row in result["gradients"] if "note" not in row}
    assert measured == {"torch.mm", "reference"}
    notes = {row["note"] for row in result["gradients"] if row["how"] not in measured}
    assert notes == {"not built"}


def test_layers_that_nobody_steps_are_meant(recwarn):
    assert layer.bench_layers(16, 24, 8, 2, torch.float32, CPU, repeats=3, limit=0.0)
    assert not [w for w in recwarn if "molegrad.optim" in str(w.message)]
