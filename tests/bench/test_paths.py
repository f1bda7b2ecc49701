import os
from types import SimpleNamespace

import pytest
import torch

from molegrad.bench import paths, products
from molegrad.bench.paths import Problem, fastest, forced, obstacle, ways

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def problem(device=GPU, n=1280, m=5120, tokens=8192, k=32, dtype=torch.bfloat16):
    return Problem(n, m, tokens, k, dtype, device)


def test_a_path_is_forced_for_the_calls_inside(monkeypatch):
    monkeypatch.delenv(paths.VARIABLE, raising=False)
    with forced("own"):
        assert os.environ[paths.VARIABLE] == "own"
        with pytest.raises(KeyError), forced("fused"):
            assert os.environ[paths.VARIABLE] == "fused"
            raise KeyError
        assert os.environ[paths.VARIABLE] == "own"
    assert paths.VARIABLE not in os.environ


def test_ways_of_an_op():
    assert ways("sketch", CPU) == ways("lowrank_grad", CPU) == ["native", "fp8 A", "fp8 A, B"]
    assert ways("sketch", GPU) == ["native", "own", "cublaslt", "fused", "fp8 A", "fp8 A, B"]
    assert "fused" not in ways("lowrank_grad", GPU)


class Module:
    """What molegrad._C says of an H100 whose torch has loaded no cuBLASLt."""

    def sketch_path(self, dtype, n, m, tokens, rank):
        wanted = os.environ[paths.VARIABLE]
        if dtype == "float16" or wanted == "cublaslt":
            return "own"
        return wanted

    def fused_fits(self, tokens, n, m, rank, multiprocessors, shared_memory):
        assert (multiprocessors, shared_memory) == (132, 233472)
        return rank <= 32


@pytest.fixture
def gpu(monkeypatch):
    info = {"paths": {"fp8": {"supported": False, "reason": "needs capability 8.9"}}}
    sizes = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233472)
    monkeypatch.setattr(paths, "has_native", lambda name, device: name != "lowrank_grad")
    monkeypatch.setattr(paths._native, "load", lambda: (Module(), None))
    monkeypatch.setattr(paths, "build_info", lambda: info)
    monkeypatch.setattr(paths, "takes", lambda name, argument: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sizes)


def test_why_a_way_is_not_measured(gpu):
    assert obstacle("sketch", "native", problem()) is None
    assert obstacle("sketch", "own", problem()) is None
    assert obstacle("sketch", "fused", problem()) is None
    assert obstacle("sketch", "fused", problem(k=64)) == "does not fit"
    assert obstacle("sketch", "cublaslt", problem()) == "not supported: bfloat16 takes own"
    half = problem(dtype=torch.float16)
    assert obstacle("sketch", "fused", half) == "not supported: float16 takes own"
    assert obstacle("sketch", "fp8 A", problem()) == "not supported: needs capability 8.9"
    assert obstacle("sketch", "fp8 A", problem(CPU)) is None
    assert obstacle("lowrank_grad", "native", problem()) == "not built"


def test_without_float8_operands_the_rows_say_so(gpu, monkeypatch):
    monkeypatch.setattr(paths, "takes", lambda name, argument: False)
    note = "not built: the op takes no float8 operands"
    assert obstacle("sketch", "fp8 A, B", problem()) == note
    monkeypatch.undo()
    assert paths.takes("sampled_grad_", "a_scale") and not paths.takes("rademacher", "a_scale")


def test_rows_of_every_way_of_a_gpu(gpu, monkeypatch):
    """The rows as on a GPU, on CPU tensors: what runs, under which path, and what has a note."""
    seen = []

    def sketch(a, b, u, v):
        seen.append(os.environ.get(paths.VARIABLE))

    monkeypatch.delenv(paths.VARIABLE, raising=False)
    monkeypatch.setattr(products.ops, "sketch", sketch)
    monkeypatch.setattr(products, "ways", lambda op, device: ways(op, GPU))
    cpu = problem(CPU, n=64, m=48, tokens=32, k=8)
    monkeypatch.setattr(paths, "takes", lambda name, argument: False)
    rows = products.bench_gradients(cpu, 2, 60.0, 1e10, left_out=("own",))
    found = {(row["op"], row["how"]): row for row in rows}
    assert found["sketch", "own"]["note"] == "left out"
    assert found["sketch", "cublaslt"]["note"] == "not supported: bfloat16 takes own"
    assert found["power", "native"]["note"] == found["power", "fp8 A"]["note"] == "not built"
    assert found["sketch", "fp8 A, B"]["note"].startswith("not built")
    assert "note" not in found["sketch", "fused"] and found["sketch", "fused"]["vs_dense"] > 0
    assert seen == [None, "fused"] * 3 and paths.VARIABLE not in os.environ
    assert ("power", "fused") not in found
    # Bytes of A and B over the bandwidth, as a share of the time.
    row = found["sketch", "native"]
    floor = 32 * (64 + 48) * 2 / 1e10
    assert row["of_floor"] == pytest.approx(floor / (row["us_p50"] * 1e-6))


def test_the_fastest_paths_as_rules():
    def row(how, us, tokens=8192, k=32, op="sketch", n=768):
        return {"op": op, "how": how, "n": n, "m": 3072, "tokens": tokens, "k": k, "us_p50": us}

    rows = [row("native", 1), row("own", 5), row("cublaslt", 9), row("fused", 4)]
    rows += [row("own", 2, 2048), row("fused", 3, 2048)]
    rows += [row("own", 7, k=64), row("cublaslt", 6, k=64), row("own", 1, n=64)]
    rows += [row("own", 1, op="power"), row("cublaslt", 0.5, op="power")]
    del (missing := row("fused", 0, n=64))["us_p50"]
    text = "768x3072x8192x32=fused,768x3072x2048x32=own,768x3072x8192x64=cublaslt,auto"
    assert fastest([*rows, missing]) == text  # of n = 64 there is one path only
    assert fastest([row("own", 1), row("native", 2)]) is None and fastest([]) is None


def test_float8_operands_count_their_own_bytes(monkeypatch):
    def sketch(a, b, u, v, a_scale, b_scale=None):
        assert a.dtype == torch.float8_e4m3fn and a_scale.shape == (32,)
        wanted = torch.bfloat16 if b_scale is None else torch.float8_e5m2
        assert b.dtype == wanted

    def quantize(x, e5m2=False):
        dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
        return x.to(dtype), x.new_ones(x.shape[:-1], dtype=torch.float32)

    monkeypatch.setattr(products.ops, "sketch", sketch)
    monkeypatch.setattr(products.ops, "quantize_rows", quantize)
    only = ("fp8 A", "fp8 A, B")
    monkeypatch.setattr(products, "ways", lambda op, device: only if op == "sketch" else [])
    monkeypatch.setattr(products, "obstacle", lambda op, way, problem: None if way in only else "")
    monkeypatch.setattr(products, "UNFORCED", ())
    rows = products.bench_gradients(problem(CPU, 64, 48, 32, 8), 1, 60.0, 1e10)
    found = {row["how"]: row for row in rows if row["op"] == "sketch"}
    for how, bytes_ in (("fp8 A", 32 * (64 + 2 * 48)), ("fp8 A, B", 32 * (64 + 48))):
        assert found[how]["gbytes"] * found[how]["us_p50"] * 1e3 == pytest.approx(bytes_)
