"""The benchmark of memory as it runs on a GPU, with tensors that lie on the CPU instead."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from molegrad.bench import memory, memory_config, memory_predictions, step
from molegrad.bench.memory_report import CHUNKS, DENSE, PLAIN
from tests.bench.test_memory_predictions import CUDA

TINY = {**CUDA, "steps": 1, "time_at": 32, "json": True}


def on_cpu(argument):
    """A device of the CPU in the place of a GPU."""
    if isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda"):
        return torch.device("cpu")
    return argument


class OnCpu(TorchFunctionMode):
    """Whoever asks for a CUDA tensor gets one of the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {key: on_cpu(value) for key, value in (kwargs or {}).items()}
        return function(*map(on_cpu, args), **kwargs)


class Event:
    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


class Gpu:
    """What was asked of the GPU."""

    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.trained: list[tuple] = []  # (variant, tokens, depth, cuDNN's attention, precision)
        self.peaks = 0
        self.cudnn = True

    def limit(self, fraction, device=None) -> None:
        assert isinstance(device, int)  # torch refuses a device without an index
        self.fractions.append(fraction)

    def peak(self, device) -> int:
        self.peaks += 1
        return 2**20 + 1000 * self.peaks

    def choose_cudnn(self, enabled) -> None:
        self.cudnn = enabled


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 8 GiB whose torch prefers cuDNN's attention; long sequences are of 96 tokens."""
    gpu = Gpu()
    for name, value in {
        "is_available": lambda: True,
        "Event": Event,
        "synchronize": lambda device: None,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: None,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=8 << 30),
        "get_device_name": lambda device: "a GPU",
        "empty_cache": lambda: None,
        "set_per_process_memory_fraction": gpu.limit,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": gpu.peak,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: gpu.cudnn)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", gpu.choose_cudnn)
    kernel = {True: "cudnn_attention", False: "flash_attention"}
    monkeypatch.setattr(step, "attention_backend", lambda *where: kernel[gpu.cudnn])
    monkeypatch.setattr(memory, "LONG", 96)
    monkeypatch.setattr(memory, "TOKENS", 64)
    monkeypatch.setattr(memory_predictions, "largest_depth", lambda *args: (3, 0))
    training = memory._training

    def trained(config, name, tokens, depth=0):
        precision = torch.get_float32_matmul_precision()
        gpu.trained.append((name, tokens, depth, gpu.cudnn, precision))
        with OnCpu():
            return training(config, name, tokens, depth)

    monkeypatch.setattr(memory, "_training", trained)
    return gpu


def run(capsys, **values) -> tuple[int, dict]:
    status = memory.main([f"--{name}={value}" for name, value in {**TINY, **values}.items()])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_whole_benchmark(gpu, capsys):
    status, result = run(capsys)
    assert status == 0 and result["device"] == "a GPU"
    assert result["attention"] == "flash_attention"
    names = [DENSE, PLAIN, CHUNKS]
    made = [entry[:3] for entry in gpu.trained]
    workspaces, made = made[:2], made[2:]  # thrown away, before the first row
    assert workspaces == [(DENSE, 32, 1), (CHUNKS, 32, 1)]
    assert made[:6] == [(name, tokens, 0) for name in names for tokens in (32, 96)]
    assert made[-2:] == [(DENSE, 64, 3), (CHUNKS, 64, 3)]
    assert all(tokens == 32 for _, tokens, _ in made[6:-2])  # of times; no long one once more
    assert {entry[3:] for entry in gpu.trained} == {(False, "high")}
    assert gpu.cudnn and torch.get_float32_matmul_precision() == "highest"
    assert gpu.fractions == [0.5, 1.0]
    assert all(row["predicted"] > 0 and row["measured"] for row in result["peaks"])
    assert [row["trains"] for row in result["capped"]] == [True] * 5
    assert [row["depth"] for row in result["capped"]] == [2, 2, 2, 3, 3]
    assert len(result["times"]) == 3 and all("ratio" in row for row in result["times"])


def test_torchs_own_choice_of_attention_can_be_measured(gpu, capsys):
    few = {"variants": DENSE, "time_at": -1, "cap_gib": 0}
    _, result = run(capsys, attention="auto", **few)
    assert result["attention"] == "cudnn_attention" and result["config"]["attention"] == "auto"
    assert {entry[3] for entry in gpu.trained} == {True} and gpu.fractions == []


def test_flash_attention_that_is_not_to_be_had_is_an_error(gpu, capsys, monkeypatch):
    monkeypatch.setattr(step, "attention_backend", lambda *where: "efficient_attention")
    arguments = [f"--{name}={value}" for name, value in TINY.items()]
    assert memory.main(arguments) == 2
    said = capsys.readouterr().out
    assert "torch takes efficient_attention; use --attention=auto" in said
    assert gpu.cudnn and gpu.trained == []


def test_what_attention_is_measured_by_default():
    default = memory_config.MemoryBenchConfig
    assert default().attention == default(device="cuda", dtype="float32").attention == "auto"
    assert default(device="cuda").attention == "flash"
