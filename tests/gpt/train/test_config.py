"""Training flags: what "auto" becomes, contradictions found before anything is built."""

import pytest
import torch

from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, resolve
from molegrad.gpt.train.flags import parse

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_on_the_cpu_and_on_a_gpu():
    cpu, gpu = resolve(BaseTrainConfig(), CPU), resolve(BaseTrainConfig(), GPU, world_size=3)
    assert (cpu.dtype, cpu.compile, cpu.max_seq_len, cpu.total_batch_size) == (
        "float32",
        False,
        256,
        16 * 256,
    )
    assert (gpu.dtype, gpu.compile, gpu.max_seq_len, gpu.device_batch_size) == (
        "bfloat16",
        True,
        2048,
        32,
    )
    assert gpu.total_batch_size == 2 * 3 * 32 * 2048  # the largest multiple within 524288
    assert compute_dtype(gpu) == torch.bfloat16 and compute_dtype(cpu) == torch.float32


def test_what_is_given_stays():
    words = "--dtype=float32 --compile=False --max-seq-len=64 --total_batch_size=1024"
    config = parse(BaseTrainConfig, [*words.split(), "--device-batch-size=4", "--matrix-lr=0.1"])
    config = resolve(config, GPU, world_size=2)
    assert (config.dtype, config.compile, config.max_seq_len) == ("float32", False, 64)
    assert (config.total_batch_size, config.matrix_lr) == (1024, 0.1)


def test_a_batch_that_does_not_divide_names_those_that_do():
    config = BaseTrainConfig(max_seq_len=64, device_batch_size=4, total_batch_size=1000)
    with pytest.raises(ValueError, match="4 x 64 x 1 = 256 tokens: take 768 or 1024"):
        resolve(config, CPU)


def test_matrix_lr_follows_the_optimizer():
    def rate(optimizer, **values):
        return resolve(BaseTrainConfig(optimizer=optimizer, **values), CPU).matrix_lr

    rates = {"muon": 0.02, "adamw": 0.002, "adafactor": 0.002}
    factored = {"enable_streaming": True, "streaming_gradient_mode": "factored"}
    for optimizer, expected in rates.items():
        assert rate(optimizer) == rate(optimizer, enable_streaming=True) == expected
        doubled = 2 if optimizer == "adamw" else 1
        assert rate(optimizer, **factored) == doubled * expected
        assert rate(optimizer, **factored, matrix_lr=0.7) == 0.7


def test_groups_of_sketches_are_not_compiled_and_not_for_several_processes():
    values = {"enable_streaming": True, "streaming_gradient_mode": "factored"}
    grouped = BaseTrainConfig(**values, streaming_group_mib=64)
    assert resolve(grouped, GPU).compile is False
    assert resolve(BaseTrainConfig(**values), GPU).compile is True
    with pytest.raises(ValueError, match="streaming_group_mib=64 is not for compiled models"):
        BaseTrainConfig(**values, streaming_group_mib=64, compile=True)
    with pytest.raises(ValueError, match="not for data parallelism, got 2 processes"):
        resolve(grouped, GPU, world_size=2)


def test_factored_power_takes_one_micro_batch_on_one_process():
    values = {"enable_streaming": True, "streaming_gradient_mode": "factored"}
    values |= {"max_seq_len": 64, "device_batch_size": 4, "streaming_method": "power"}
    assert resolve(BaseTrainConfig(**values), CPU).total_batch_size == 256
    for more, world, phrase in (
        ({"total_batch_size": 512}, 1, "got 2 on 1: on one process give device_batch_size=8, or"),
        ({}, 2, "got 1 on 2: .* or total_batch_size=256; or"),
    ):
        with pytest.raises(ValueError, match=phrase):
            resolve(BaseTrainConfig(**values, **more), CPU, world)
        resolve(BaseTrainConfig(**{**values, "streaming_method": "tangent"}, **more), CPU, world)


@pytest.mark.parametrize(
    ("values", "phrase"),
    [
        ({"warmdown_ratio": 1.5}, "warmdown_ratio must lie between 0 and 1"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"num_iterations": 0}, "must be positive, or -1"),
        ({"save_every": -3}, "save_every must be a number of steps, -1"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"stochastic_rounding": True}, "is for bfloat16 weights, got weight_dtype=auto: give"),
        ({"target_param_data_ratio": 0.0}, "target_param_data_ratio must be positive"),
        ({"embedding_lr": -1.0}, "embedding_lr must not be negative"),
        ({"enable_streaming": True, "streaming_rank_k": 0}, "rank_k must be at least 1"),
    ],
)
def test_contradictions_are_named(values, phrase):
    with pytest.raises(ValueError, match=phrase):
        BaseTrainConfig(**values)
