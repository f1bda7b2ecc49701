"""The whole benchmark as it runs on a GPU, with tensors that lie on the CPU instead."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from molegrad.bench import grad, layers, paths, targets, timing

TINY = ["--device=cuda", "--shapes=64x48", "--tokens=32", "--ranks=8", "--repeats=3", "--depth=2"]


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
    def sketch_path(self, dtype, n, m, tokens, rank):
        return os.environ[paths.VARIABLE]

    def fused_fits(self, tokens, n, m, rank, multiprocessors, shared_memory):
        return False


@pytest.fixture
def gpu(monkeypatch):
    """Counts how often cached memory was given back."""
    given_back = []
    properties = SimpleNamespace(
        L2_cache_size=1 << 10, multi_processor_count=1, shared_memory_per_multiprocessor=1
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
    }
    info["paths"] = {"fp8": {"supported": False, "reason": "no"}}
    monkeypatch.setattr(grad, "build_info", lambda: info)
    monkeypatch.setattr(paths, "build_info", lambda: info)
    monkeypatch.setattr(paths, "_native", SimpleNamespace(load=lambda: (Module(), None)))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1 << 10)
    for module in (grad, layers, paths):
        monkeypatch.setattr(module, "has_native", lambda name, device: True)
    with OnCpu():
        yield given_back


def test_every_table_has_its_rows(gpu, capsys):
    assert grad.main([*TINY, "--paths=own,fused", "--json"]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    assert "native kernels: 90a" in out[0] and "TFLOP/s" in out[2] and "host µs" in out[2]
    result = json.loads(out[-1])
    assert result["device"] == "a GPU" and result["bandwidth"]["best"] > 0
    found = {(row["op"], row["how"]): row for row in result["gradients"]}
    assert list(found) == [
        ("dense", "torch.mm"), ("sketch", "reference"), ("power", "reference"),
        ("sketch", "native"), ("sketch_accumulate_", "native"), ("power", "native"),
        ("sketch", "own"), ("power", "own"),
        ("sketch", "cublaslt"), ("power", "cublaslt"), ("sketch", "fused"),
        ("sketch", "fp8 A"), ("power", "fp8 A"), ("sketch", "fp8 A, B"), ("power", "fp8 A, B"),
    ]  # fmt: skip
    assert found["sketch", "cublaslt"]["note"] == "left out"
    assert found["sketch", "fused"]["note"] == "does not fit"
    assert found["power", "fp8 A"]["note"] == "left out"
    for how in ("native", "own"):
        row = found["sketch", how]
        assert "note" not in row and row["us_host"] > 0 and row["of_floor"] > 0
        work = 4 * row["k"] * row["tokens"] * (row["n"] + row["m"])
        assert row["tflops"] * row["us_p50"] * 1e6 == pytest.approx(work)
    blocks = {row["block"] for row in result["sampled"] if row["how"] == "native"}
    assert blocks == {1, 2, 4, 16, 64, 128}
    assert len([row for row in result["sampled"] if row["how"] == "reference"]) == 1
    assert len(result["layers"]) == 8 and len(result["bases"]) == 2
    cells = sum(len({(r.get("n"), r.get("k")) for r in result[name]}) for name in grad.TABLES)
    assert len(gpu) >= cells == len(grad.TABLES)


def test_targets_of_what_was_measured(gpu, capsys, monkeypatch):
    shape = {"n": 64, "m": 48, "tokens": 32, "k": 8}
    monkeypatch.setattr(targets, "SHAPE", shape)
    monkeypatch.setattr(targets, "DEPTH", 2)
    monkeypatch.setattr(targets, "RANK", 8)
    assert grad.main([*TINY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = targets.targets(result, None)
    native = {row["op"]: row for row in result["gradients"] if row["how"] == "native"}
    assert [row["measured"] for row in rows] == [
        native["sketch"]["vs_dense"],
        native["sketch"]["of_floor"],
        native["power"]["vs_dense"],
        result["bases"][1]["us_p50"],
        None,
        None,
        None,
    ]
