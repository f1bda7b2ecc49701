"""Training flags: what "auto" becomes, which method a step needs, contradictions found early."""

import json

import pytest
import torch

from molegrad import MoleGradConfig
from molegrad.config import PRESETS
from molegrad.gpt.train import flags
from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, resolve
from molegrad.gpt.train.sft import SFTConfig
from molegrad.monitor.health import HealthThresholds

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON = {"enable_streaming": True}
SMALL = {"max_seq_len": 64, "device_batch_size": 4}


def made(**values):
    return flags.make(BaseTrainConfig, **values)


def test_auto_on_the_cpu_and_on_a_gpu():
    cpu, gpu = resolve(made(), CPU), resolve(made(), GPU, world_size=3)
    names = ("dtype", "compile", "max_seq_len", "device_batch_size", "total_batch_size")
    assert [getattr(cpu, n) for n in names] == ["float32", False, 256, 16, 16 * 256]
    # the largest multiple of micro-batches within 524288
    assert [getattr(gpu, n) for n in names] == ["bfloat16", True, 2048, 32, 2 * 3 * 32 * 2048]
    assert compute_dtype(gpu) == torch.bfloat16 and compute_dtype(cpu) == torch.float32


def test_what_is_given_stays():
    given = {"dtype": "float32", "compile": False, "total_batch_size": 1024, "matrix_lr": 0.1}
    config = resolve(made(**SMALL, **given), GPU, world_size=2)
    assert {name: getattr(config, name) for name in given} == given


def test_a_batch_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match="4 x 64 x 1 = 256 tokens: take 768 or 1024"):
        resolve(made(**SMALL, total_batch_size=1000), CPU)


@pytest.mark.parametrize(
    ("optimizer", "lr"), [("muon", 0.02), ("adamw", 0.002), ("adafactor", 0.002)]
)
def test_matrix_lr_follows_the_optimizer_and_the_factors(optimizer, lr):
    def rate(**values):
        return resolve(made(optimizer=optimizer, **values), CPU).matrix_lr

    assert rate() == rate(**ON, streaming_gradient_mode="grad") == lr
    assert rate(**ON) == lr * (2 if optimizer == "adamw" else 1)
    assert rate(**ON, matrix_lr=0.7) == 0.7


# The flags of estimators


def parsed(*words):
    return flags.parse(BaseTrainConfig, words).streaming


def test_streaming_alone_is_block_power_with_factors():
    default = MoleGradConfig.of(gradient_mode="factors")
    assert parsed() is None and parsed("--enable_streaming=True") == default
    readme = ["--enable_streaming=True", "--streaming_rank_k=32", "--streaming_power_iters=1"]
    readme += ["--streaming_target_layers=ffn_only", "--streaming_warm_start_decay=0.95"]
    assert parsed(*readme) == default.changed(rank_k=32)
    exact = parsed("--enable_streaming", "--streaming_method=exact")
    assert exact == MoleGradConfig.of("exact")
    words = ["--enable_streaming", "--streaming_target_layers=c_fc,attn", "--streaming_rank_k=0.25"]
    found = parsed(*words, "--streaming_rank_overrides=attn=8,c_fc=0.5")
    assert found.target_layers == ("c_fc", "attn") and found.estimator.rank_k == 0.25
    assert found.estimator.rank_overrides == ("attn=8", "c_fc=0.5")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_fields_and_flags_beside_it_win(preset):
    assert parsed(f"--streaming_preset={preset}") == MoleGradConfig.preset(preset)
    changed = parsed("--streaming-preset", preset, "--streaming_seed=3", "--enable_streaming")
    assert changed == MoleGradConfig.preset(preset, seed=3)


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ("--streaming_rank_k=8", "streaming_rank_k=8 has no effect without --enable_streaming"),
        (
            "--streaming_method=exact --streaming_cond_max=5",
            "streaming_method='exact', streaming_cond_max=5.0 have no effect without",
        ),
        (
            "--streaming_preset=exact --enable_streaming=False",
            "streaming_preset=exact and enable_streaming=False: drop one of them",
        ),
        (
            "--streaming_preset=balanced --streaming_rank_k=8",
            "stands for --streaming_gradient_mode=momentum --streaming_target_layers=all",
        ),
        ("--streaming_preset=best", "'best' is not one of lowrank, lowrank-grad, exact"),
        ("--enable_streaming --streaming_method=projected", "'projected' is not one of power"),
        (
            "--enable_streaming --streaming_sample_share=0.5",
            "Perhaps you meant --streaming_sampling_fraction.",
        ),
        ("--enable_streaming --streaming_project_stride=4", "unknown flag --streaming_project_str"),
        ("--enable_streaming --streaming_rank_k=0", "rank_k must be at least 1"),
        (
            "--enable_streaming --streaming_method=sampled --streaming_probes=2",
            "is no option of method='sampled'",
        ),
    ],
)
def test_wrong_streaming_flags_are_named(words, phrase, capsys):
    with pytest.raises(SystemExit):
        flags.parse(BaseTrainConfig, words.split())
    assert phrase in capsys.readouterr().err


def test_modes_by_their_former_names_are_told_apart():
    for old, new in (("dense", "grad"), ("factored", "factors")):
        with pytest.raises(ValueError, match=f"{old}' is now called '{new}'"):
            made(**ON, streaming_gradient_mode=old)


@pytest.mark.parametrize("kind", [BaseTrainConfig, SFTConfig])
def test_the_resolved_flags_make_the_same_run(kind):
    presets = [{"streaming_preset": preset} for preset in PRESETS]
    for given in ({}, {**ON, "streaming_rank_k": 0.5}, *presets):
        config = flags.make(kind, **SMALL, health_patience=5, **given)
        assert config.health_limits == HealthThresholds(patience=5)
        assert flags.make(kind, **flags.resolved(config)).streaming == config.streaming
        config = resolve(config, CPU)
        values = json.loads(json.dumps(flags.resolved(config)))
        again = flags.make(kind, **values)
        assert flags.resolved(again) == values and again.streaming == config.streaming


# The method that a step needs


@pytest.mark.parametrize(
    ("values", "world", "method", "because"),
    [
        ({}, 1, "power", "a step is one micro-batch of one process"),
        ({"total_batch_size": 1024}, 1, "tangent", "sums over 4 micro-batches a step"),
        ({"total_batch_size": 512}, 2, "tangent", "sums over 2 processes"),
        ({"sequence_chunk": 128}, 1, "tangent", "sums over chunks of 128 tokens"),
        (
            {"sequence_chunk": 128, "streaming_target_layers": "attention_only"},
            1,
            "power",
            "one micro-batch",
        ),
        ({"streaming_preset": "lowrank", "total_batch_size": 512}, 1, "tangent", "2 micro-batches"),
        ({"streaming_preset": "lowrank-grad", "total_batch_size": 512}, 1, "power", "one micro"),
        ({"streaming_method": "power"}, 1, "power", "as given"),
        ({"streaming_method": "tangent"}, 1, "tangent", "as given"),
        ({"streaming_method": "exact", "total_batch_size": 512}, 1, "exact", "as given"),
        ({"streaming_preset": "balanced", "total_batch_size": 512}, 1, "sampled", "as given"),
    ],
)
def test_low_rank_is_power_where_one_pass_makes_a_step_and_tangent_where_sums_do(
    values, world, method, because
):
    config = resolve(made(**ON, **SMALL, **values), CPU, world)
    assert config.streaming.method == method and because in config.method_because
    assert resolve(config, CPU, world) == config


@pytest.mark.parametrize(
    ("values", "world", "phrase"),
    [
        ({"total_batch_size": 512}, 1, "got 2 micro-batches a step: .*device_batch_size=8 or "),
        ({}, 2, "got 2 processes: take streaming_method=tangent.* total_batch_size=256"),
    ],
)
def test_block_power_that_was_asked_for_is_refused_where_a_step_is_a_sum(values, world, phrase):
    config = made(**ON, **SMALL, streaming_method="power", **values)
    with pytest.raises(ValueError, match=phrase):
        resolve(config, CPU, world)
    resolve(made(**ON, **SMALL, streaming_method="power", streaming_gradient_mode="grad"), CPU, 1)


def test_groups_of_sketches_are_not_compiled_and_not_for_several_processes():
    values = {**ON, "streaming_method": "tangent"}
    grouped = made(**values, streaming_group_mib=64)
    assert resolve(grouped, GPU).compile is False
    assert resolve(made(**values), GPU).compile is True
    with pytest.raises(ValueError, match="streaming_group_mib is not for compiled models"):
        made(**values, streaming_group_mib=64, compile=True)
    with pytest.raises(ValueError, match="not for data parallelism, got 2 processes"):
        resolve(grouped, GPU, world_size=2)


@pytest.mark.parametrize(
    ("values", "phrase"),
    [
        ({"warmdown_ratio": 1.5}, "warmdown_ratio must lie between 0 and 1"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"num_iterations": 0}, "must be positive, or -1"),
        ({"save_every": -3}, "save_every must be a number of steps, -1"),
        ({"resume": True, "overwrite": True}, "give one"),
        ({"if_needed": True, "overwrite": True}, "give one"),
        ({"stochastic_rounding": True}, "is for bfloat16 weights, got weight_dtype=auto: give"),
        ({"target_param_data_ratio": 0.0}, "target_param_data_ratio must be positive"),
        ({"embedding_lr": -1.0}, "embedding_lr must not be negative"),
        ({"head_rank": -1}, "head_rank must not be negative"),
        ({"dashboards": "wandbb"}, "choose wandb, trackio"),
        ({"health": "sometimes"}, "is no action"),
        ({"health_patience": 0}, "patience must lie between 1"),
        ({"recompute": "block", "offload": True, "compile": True}, "offload=True is not for comp"),
        ({"streaming_preset": "exact", "grad_clip": 1.0}, "'momentum' needs grad_clip=0.0, got 1"),
        ({"streaming_preset": "exact", "optimizer": "adamw"}, "'momentum' needs optimizer=muon"),
    ],
)
def test_contradictions_are_named(values, phrase):
    with pytest.raises(ValueError, match=phrase):
        made(**values)
