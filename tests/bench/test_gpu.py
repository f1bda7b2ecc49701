"""The benchmark of the ops as it runs on a GPU, with tensors that lie on the CPU instead."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from molegrad.bench import gpu, grad, timing
from molegrad.bench.gpu import Problem, fastest, forced, obstacle, targets, ways

TINY = ["--device=cuda", "--shapes=64x48", "--tokens=32", "--ranks=8", "--repeats=3", "--depth=2"]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def problem(device=GPU, n=1280, m=5120, tokens=8192, k=32, dtype=torch.bfloat16):
    return Problem(n, m, tokens, k, dtype, device)


def test_a_path_is_forced_for_the_calls_inside(monkeypatch):
    monkeypatch.delenv(gpu.VARIABLE, raising=False)
    with forced("own"):
        assert os.environ[gpu.VARIABLE] == "own"
        with pytest.raises(KeyError), forced("fused"):
            assert os.environ[gpu.VARIABLE] == "fused"
            raise KeyError
        assert os.environ[gpu.VARIABLE] == "own"
    assert gpu.VARIABLE not in os.environ


def test_ways_of_an_op():
    assert ways("sketch", CPU) == ways("lowrank_grad", CPU) == ["native", "fp8 A", "fp8 A, B"]
    assert ways("sketch", GPU) == ["native", "own", "cublaslt", "fused", "fp8 A", "fp8 A, B"]
    assert "fused" not in ways("lowrank_grad", GPU)
    assert ways("sketch_accumulate_", GPU) == ["native"]


class OnCpu(TorchFunctionMode):
    """Whoever asks for a CUDA tensor gets one of the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


class Module:
    """What molegrad._C says of an H100 whose torch has loaded no cuBLASLt."""

    def sketch_path(self, dtype, n, m, tokens, rank):
        wanted = os.environ[gpu.VARIABLE]
        return "own" if dtype == "float16" or wanted == "cublaslt" else wanted

    def fused_fits(self, tokens, n, m, rank, multiprocessors, shared_memory):
        assert (multiprocessors, shared_memory) == (132, 233472)
        return rank <= 32


@pytest.fixture
def device(monkeypatch):
    """Counts how often cached memory was given back."""
    given_back = []
    properties = SimpleNamespace(
        L2_cache_size=1 << 10, multi_processor_count=132, shared_memory_per_multiprocessor=233472
    )
    for name, value in {
        "is_available": lambda: True,
        "Event": Event,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device: "a GPU",
        "mem_get_info": lambda device: (8 << 20, 8 << 20),
        "empty_cache": lambda: given_back.append(1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    info = {
        "torch": "2",
        "cuda": True,
        "cpu_capability": "avx2",
        "cuda_built": {"architectures": "90a"},
        "paths": {"fp8": {"supported": False, "reason": "needs capability 8.9"}},
    }
    monkeypatch.setattr(grad, "build_info", lambda: info)
    monkeypatch.setattr(gpu, "build_info", lambda: info)
    monkeypatch.setattr(gpu, "_native", SimpleNamespace(load=lambda: (Module(), None)))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1 << 10)
    for module in (grad, gpu, timing):
        monkeypatch.setattr(module, "has_native", lambda name, device: True)
    with OnCpu():
        yield given_back


def test_why_a_way_is_not_measured(device, monkeypatch):
    for way in ("native", "own", "fused"):
        assert obstacle("sketch", way, problem()) is None
    assert obstacle("sketch", "fused", problem(k=64)) == "does not fit"
    assert obstacle("sketch", "cublaslt", problem()) == "not supported: bfloat16 takes own"
    half = problem(dtype=torch.float16)
    assert obstacle("sketch", "fused", half) == "not supported: float16 takes own"
    assert obstacle("sketch", "fp8 A", problem()) == "not supported: needs capability 8.9"
    assert obstacle("sketch", "fp8 A", problem(CPU)) is None
    monkeypatch.setattr(gpu, "has_native", lambda name, device: False)
    assert obstacle("lowrank_grad", "native", problem()) == "not built"


def test_every_table_has_its_rows(device, capsys):
    assert grad.main([*TINY, "--paths=own,fused", "--json"]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    assert "native kernels: 90a" in out[0] and "TFLOP/s" in out[2] and "host µs" in out[2]
    assert any("sketch vs_dense" in line and "not measured" in line for line in out)
    result = json.loads(out[-1])
    assert result["device"] == "a GPU" and result["bandwidth"]["best"] > 0
    found = {(row["op"], row["how"]): row for row in result["gradients"]}
    assert {how for op, how in found if op == "sketch"} == {
        "reference", "native", "own", "cublaslt", "fused", "fp8 A", "fp8 A, B",
    }  # fmt: skip
    assert found["sketch", "cublaslt"]["note"] == "left out"
    assert found["lowrank_grad", "fp8 A"]["note"] == "left out"
    for how in ("native", "own", "fused"):
        row = found["sketch", how]
        assert "note" not in row and row["us_host"] > 0 and row["of_floor"] > 0
        work = 4 * row["k"] * row["tokens"] * (row["n"] + row["m"])
        assert row["tflops"] * row["us_p50"] * 1e6 == pytest.approx(work)
    blocks = {row["block"] for row in result["sampled"] if row["how"] == "native"}
    assert blocks == {1, 2, 4, 16, 64, 128}
    assert len([row for row in result["sampled"] if row["how"] == "reference"]) == 1
    assert len(device) >= len(grad.TABLES)


def test_paths_are_taken_and_operands_counted(device, monkeypatch):
    seen = []

    def sketch(a, b, u, v, a_scale=None, b_scale=None):
        seen.append((os.environ.get(gpu.VARIABLE), a.dtype, b.dtype))

    monkeypatch.delenv(gpu.VARIABLE, raising=False)
    monkeypatch.setattr(grad.ops, "sketch", sketch)
    monkeypatch.setattr(grad, "ways", lambda op, _: ways(op, GPU) if op == "sketch" else [])
    given = problem(CPU, n=64, m=48, tokens=32, k=8)
    rows = grad.bench_gradients(given, 2, 60.0, 1e10, left_out=("own",))
    found = {row["how"]: row for row in rows if row["op"] == "sketch"}
    half, e4m3, e5m2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
    # A warm-up and two rounds.
    assert seen == 3 * [
        (None, half, half), ("fused", half, half), (None, e4m3, half), (None, e4m3, e5m2),
    ]  # fmt: skip
    assert gpu.VARIABLE not in os.environ and found["own"]["note"] == "left out"
    sizes = {"native": 2 * (64 + 48), "fp8 A": 64 + 2 * 48, "fp8 A, B": 64 + 48}
    for how, size in sizes.items():
        row = found[how]
        assert row["gbytes"] * row["us_p50"] * 1e3 == pytest.approx(32 * size)
        assert row["of_floor"] == pytest.approx(32 * size / 1e10 / (row["us_p50"] * 1e-6))


def test_the_fastest_paths_as_rules():
    def row(how, us, tokens=8192, k=32, op="sketch", n=768):
        return {"op": op, "how": how, "n": n, "m": 3072, "tokens": tokens, "k": k, "us_p50": us}

    rows = [row("native", 1), row("own", 5), row("cublaslt", 9), row("fused", 4)]
    rows += [row("own", 2, 2048), row("fused", 3, 2048)]
    rows += [row("own", 7, k=64), row("cublaslt", 6, k=64), row("own", 1, n=64)]
    rows += [row("own", 1, op="lowrank_grad"), row("cublaslt", 0.5, op="lowrank_grad")]
    del (missing := row("fused", 0, n=64))["us_p50"]
    text = "768x3072x8192x32=fused,768x3072x2048x32=own,768x3072x8192x64=cublaslt,auto"
    assert fastest([*rows, missing]) == text  # of n = 64 there is one path only
    assert fastest([row("own", 1), row("native", 2)]) is None and fastest([]) is None


def test_targets_are_judged_by_the_native_row_of_their_size():
    size = {"n": 1280, "m": 5120, "tokens": 8192, "k": 32, "how": "native"}
    sketch = {**size, "op": "sketch"}
    rows = [
        {**sketch, "how": "own", "vs_dense": 9.0, "of_floor": 0.9},
        {**sketch, "tokens": 2048, "vs_dense": 9.0, "of_floor": 0.9},
        {**sketch, "vs_dense": 2.6, "of_floor": 0.6},
        {**size, "op": "lowrank_grad", "note": "not built"},
    ]
    bases = [{"op": "orthonormalize", "depth": 12, "k": 32, "how": "native", "us_p50": 150.0}]
    found = targets({"gradients": rows, "bases": bases})
    assert [row["measured"] for row in found] == [2.6, 0.6, None, 150.0]
    assert [row["result"] for row in found] == ["met", "not met", "not measured", "met"]
