"""Devices, FLOPs counted against torch's own counter, memory, the record of the machine."""

import json
import platform

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from molegrad import MoleGradConfig, convert
from molegrad.gpt.train import hardware
from tests.gpt.model.test_gpt import small, stirred, tokens


def test_device_by_name_and_by_default():
    assert hardware.pick_device("cpu").type == "cpu"
    assert hardware.pick_device("").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="no device name"):
        hardware.pick_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available here"):
            hardware.pick_device("cuda")


def test_the_kernel_of_attention_is_the_one_that_torch_takes():
    where = torch.device("cpu"), torch.float32, 2, 16
    assert hardware.attention_backend(*where) == "flash_attention"
    with sdpa_kernel(SDPBackend.MATH):
        assert hardware.attention_backend(*where) == "math"


def test_dense_flops_equal_what_torch_counts():
    """With attention as plain matrix products torch's counter sees all of them but the head's
    weight gradient, which is accumulated by addmm_."""
    model = stirred(small(max_seq_len=20))
    idx, targets = tokens(batch=3, length=20)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, targets).backward()
    flops = hardware.flops_per_token(model, 20)
    assert flops.actual == flops.dense and flops.saving == 0
    assert flops.dense == counter.get_total_flops() / 60 + 2 * 61 * 64


@pytest.mark.parametrize(
    "options",
    [
        {"method": "tangent", "rank_k": 8, "probes": 4},
        {"method": "power", "rank_k": 8},
        {"method": "sampled"},
        {"method": "exact"},
    ],
)
def test_estimated_gradients_are_counted_as_what_they_cost(options):
    model = small()
    dense = hardware.flops_per_token(model, 24)
    config = MoleGradConfig.of(**options)
    convert(model, config)
    flops = hardware.flops_per_token(model, 24)
    assert flops.dense == dense.actual
    cost = config.estimator.cost
    saved = 2 * (2 * 2 * 64 * 256 - cost(64, 256, "c_proj") - cost(256, 64, "c_fc"))
    assert flops.dense - flops.actual == saved
    assert flops.saving == pytest.approx(saved / flops.dense)


def test_frozen_weights_cost_no_gradient():
    model = small()
    before = hardware.flops_per_token(model, 24)
    model.lm_head.weight.requires_grad_(False)
    after = hardware.flops_per_token(model, 24)
    assert before.actual - after.actual == 2 * 61 * 64


def test_peak_flops_of_this_machine_is_measured():
    threads = torch.get_num_threads()
    value, source = hardware.peak_flops(torch.device("cpu"))
    assert value > 1e8 and "measured" in source
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
    ],
)
def test_known_gpus(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    value, source = hardware.peak_flops(torch.device("cuda"), torch.bfloat16)
    assert value == tera * 1e12 and "data sheet" in source


def test_memory_grows_with_what_is_used():
    device = torch.device("cpu")
    before = hardware.peak_memory_bytes(device)
    block = torch.ones(before // 4 + 2**25)  # four bytes each: more than the peak so far
    assert hardware.peak_memory_bytes(device) - before >= block.numel()


def test_keeping_freed_memory_never_raises():
    assert hardware.keep_freed_memory() in (True, False)


def test_the_record_of_the_machine_is_complete_and_json_able():
    record = json.loads(json.dumps(hardware.machine_record(torch.device("cpu"), world_size=2)))
    assert record["torch"] == torch.__version__ and record["packages"]["numpy"]
    assert record["python"] == platform.python_version()
    assert record["processes"] == 2 and record["device"].startswith("CPU")
    assert record["molegrad_build"]["native"] in (True, False)
