import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from molegrad.bench import grad, layers, products, targets
from molegrad.bench.layers import BLOCKS, SHARES, bench_bases, layer_shapes
from molegrad.gpt.train import flags

TINY = ["--shapes=24x16,16x40", "--tokens=8,20", "--ranks=2,4", "--repeats=2", "--depth=2"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch):
    """Of 1 GB/s: what is measured has a test of its own, and takes a second."""
    rate = {"read": 1e9, "copy": 0.9e9, "best": 1e9}
    monkeypatch.setattr(grad, "bandwidth", lambda device: rate)


def test_the_command_prints_tables_and_then_one_json_object(capsys):
    assert grad.main([*TINY, "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("torch ") and "vs dense" in lines[2]
    result = json.loads(lines[-1])
    hows = 2 if result["native"] else 1
    assert len(result["gradients"]) == 2 * 2 * 2 * (6 + 4)  # four rows of float8 operands
    singly = result["native"]  # the row of sketch_accumulate_many_'s layers one by one
    assert len(result["small"]) == 2 * 2 * (len(grad.SMALL_OPS) * 2 + singly)
    assert len(result["layers"]) == 2 * 2 * 2 * (1 + 4 + 3)
    kernels = len(SHARES) * len(BLOCKS) * hows
    assert len(result["sampled"]) == 2 * 2 * (1 + kernels + (not result["native"]))
    measured = {name: [r for r in result[name] if "note" not in r] for name in grad.TABLES}
    native = [name for name in grad.SMALL_OPS if grad.has_native(name, CPU)]
    assert len(measured["small"]) == 2 * 2 * (len(grad.SMALL_OPS) + len(native) + singly)
    ratios = [*measured["sampled"], *measured["layers"]]
    assert all(row["vs_dense"] > 0 for row in ratios)
    for row in measured["gradients"]:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        dense = row["op"] == "dense"
        work = 2 * row["n"] * row["m"] if dense else 4 * row["k"] * (row["n"] + row["m"])
        assert row["gflops"] * row["us_p50"] * 1e3 == pytest.approx(row["tokens"] * work)
        assert (row["vs_dense"] == 1.0) if dense else row["of_limit"] > 0
        ours = row["how"] not in ("torch.mm", "reference")
        assert (row["vs_reference"] is not None) == ours
        if row["how"] == "native":
            passes = 2 if row["op"] == "power" else 1
            bytes_ = passes * row["tokens"] * (row["n"] + row["m"]) * 4
            assert row["of_floor"] * row["us_p50"] * 1e-6 == pytest.approx(bytes_ / 1e9)
    notes = {row["note"] for name in grad.TABLES for row in result[name] if "note" in row}
    assert not [note for note in notes if note.startswith("failed")]
    assert result["config"]["repeats"] == 2 and result["bandwidth"]["best"] == 1e9


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
    monkeypatch.setattr(layers, "has_native", lambda name, device: True)
    monkeypatch.setattr(layers.ops, "orthonormalize", lambda y: seen.append(tuple(y.shape)))
    bench_bases(2, 8, CPU, 1, 60.0)
    shapes = [(8, 128, 8), (8, 128, 8), (2, 512, 8), (2, 128, 8), (2, 128, 8), (2, 512, 8)]
    assert seen == shapes * 2  # the warm-up, and one round


def test_markdown(capsys):
    assert grad.main([*TINY, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| in | out | tokens | k | op | how |" in out and "| --- |" in out
    assert not out.rstrip().endswith("}")


def test_defaults_follow_the_device():
    cpu, gpu = grad.GradBenchConfig(), grad.GradBenchConfig(device="cuda")
    assert (cpu.dtype, cpu.token_list, cpu.rank_list) == ("float32", [8192], [32, 128])
    assert gpu.shape_list == [(768, 3072), (1280, 5120), (4096, 14336)]
    assert (gpu.dtype, gpu.token_list) == ("bfloat16", [2048, 8192, 32768])
    assert gpu.rank_list == [32, 64, 128] and gpu.repeats > cpu.repeats > 1
    assert grad.GradBenchConfig(device="cuda", dtype="float32").dtype == "float32"
    assert gpu.left_out == ()
    some = grad.GradBenchConfig(paths="own,cublaslt")
    assert some.left_out == ("fused", "fp8 A", "fp8 A, B")


def test_spent_seconds_leave_rows_that_say_so(capsys):
    assert grad.main([*TINY, "--seconds=1e-9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for name in grad.TABLES:
        assert result[name] and all("not measured" in row["note"] for row in result[name])


def test_a_failure_shows_in_the_row_and_the_status(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("the kernel broke")

    monkeypatch.setattr(products, "lowrank_grad_reference", broken)
    assert grad.main([*TINY, "--json"]) == 1
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    failed = [row for row in result["gradients"] if "failed" in row.get("note", "")]
    assert {(row["op"], row["how"]) for row in failed} >= {("power", "reference")}
    assert failed[0]["note"] == "failed: the kernel broke"


def test_rows_so_far_are_printed_on_ctrl_c(monkeypatch, capsys):
    measured = grad.bench_small

    def stop(n, **rest):
        if n == 16:
            os.kill(os.getpid(), signal.SIGINT)
        return measured(n, **rest)

    monkeypatch.setattr(grad, "bench_small", stop)
    assert grad.main([*TINY, "--json"]) == 130
    out = capsys.readouterr().out.strip().splitlines()
    result = json.loads(out[-1])
    assert result["interrupted"] is True and "interrupted: the rows so far" in out
    assert len(result["gradients"]) == 2 * 2 * 2 * (6 + 4) and result["bandwidth"]["best"] == 1e9
    assert {row["n"] for row in result["small"]} == {24}
    assert result["layers"] == result["sampled"] == []
    assert any("quantize_rows" in line for line in out[:-1])  # a part of the table is shown


def test_a_bandwidth_that_is_not_known_costs_its_column_only(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("memory bandwidth: no")

    monkeypatch.setattr(grad, "bandwidth", broken)
    assert grad.main([*TINY, "--json"]) == 1
    out = capsys.readouterr().out.strip().splitlines()
    result = json.loads(out[-1])
    assert result["bandwidth"] is None and "failed: memory bandwidth: no" in out[-2]
    times = [row for row in result["gradients"] if "note" not in row]
    assert times and all(row["of_floor"] is None for row in times)


def test_the_size_of_the_targets_comes_first(monkeypatch):
    seen = []

    def rows(problem, repeats, limit, *rest):
        seen.append(({"n": problem.n, "m": problem.m, "k": problem.k}, limit))
        return []

    monkeypatch.setattr(grad, "bench_gradients", rows)
    monkeypatch.setattr(targets, "SHAPE", {"n": 16, "m": 40, "tokens": 20, "k": 2})
    sizes = ["--shapes=24x16,16x40", "--tokens=20", "--ranks=2,4", "--depth=0", "--repeats=1"]
    grad.bench(flags.parse(grad.GradBenchConfig, [*sizes, "--seconds=10"]))
    assert [(x["n"], x["k"]) for x, _ in seen] == [(16, 2), (24, 2), (24, 4), (16, 4)]
    assert seen[0][1] > 5 > seen[1][1]


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
    device = torch.device("cpu")
    assert layers.bench_layers(16, 24, 8, 2, torch.float32, device, repeats=3, limit=0.0)
    assert not [w for w in recwarn if "molegrad.optim" in str(w.message)]
