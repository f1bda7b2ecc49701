"""Predicted peaks against measured ones."""

from dataclasses import replace

import pytest
import torch

from molegrad import build_info
from molegrad.gpt.model import gpt as model_module
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.train import setup
from molegrad.gpt.train.base import model_config
from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, resolve
from molegrad.gpt.train.flags import PREFIX, make
from molegrad.memory import cuda as memory_cuda
from molegrad.memory import simulate as memory_sim
from molegrad.memory.simulate import PARTS, simulate
from molegrad.monitor.memory import peak_bytes
from molegrad.optim import muon
from molegrad.optim.clip import clip_grad_norm_

VOCAB = 512
SMALL = {"depth": 2, "aspect_ratio": 64, "device_batch_size": 2, "max_seq_len": 256}
LOW_RANK = {"enable_streaming": True, "streaming_rank_k": 8}
FACTORED = {**LOW_RANK, "streaming_gradient_mode": "factors"}
CHUNKS = {"sequence_chunk": 64, "sequence_parts": "all"}


def preset(name: str) -> dict:
    return {"streaming_preset": name}


def resolved(device: str = "cpu", accumulation: int = 1, **values):
    values = {**SMALL, "num_iterations": 1, "compile": False, "device_type": "cpu", **values}
    micro = values["device_batch_size"] * values["max_seq_len"]
    config = make(BaseTrainConfig, total_batch_size=accumulation * micro, **values)
    return replace(resolve(config, torch.device(device)), device_type=device)


def train(config, steps: int = 2) -> None:
    """Real steps, as the loop makes them."""
    model = setup.place(GPT(model_config(config, VOCAB)), config, torch.device("cpu"))
    setup.equip(model, config)
    optimizers = setup.build_optimizers(model, config)
    dtype = compute_dtype(config)
    rows, tokens = config.device_batch_size, config.max_seq_len
    text = torch.randint(VOCAB, (rows, tokens + 1))
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    count = config.total_batch_size // (rows * tokens)
    for _ in range(steps):
        for _ in range(count):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(inputs, targets)
            (loss / count).backward()
            del loss
        if config.grad_clip:
            clip_grad_norm_(model, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"dtype": "bfloat16"},
        {"accumulation": 2},
        {"kv_groups": 2, "head_dim": 32},
        {"optimizer": "adamw", "grad_clip": 1.0},
        {"recompute": "selective", "dtype": "bfloat16"},
        {**FACTORED, **CHUNKS},
        preset("balanced"),
        {**preset("balanced"), "dtype": "bfloat16", "accumulation": 2},
        {**preset("minimal"), "max_seq_len": 512},
        {**preset("balanced"), **CHUNKS},
        {**preset("balanced"), **CHUNKS, "recompute": "block", "offload": True},
        FACTORED,
        {**FACTORED, "optimizer": "adafactor", "dtype": "bfloat16"},
        {**LOW_RANK, "optimizer": "adamw"},
        {**FACTORED, "streaming_method": "power"},
        {**LOW_RANK, "streaming_products": "fp8"},
        {**FACTORED, "streaming_method": "tangent", "streaming_group_mib": 1},
        {**preset("balanced"), "head_rank": 8},
    ],
    ids=lambda values: ",".join(f"{k.removeprefix(PREFIX)}={v}" for k, v in values.items())[:60],
)
def test_the_peak_is_what_is_measured(values):
    config = resolved(**values)
    found = simulate(config, model_config(config, VOCAB))
    others = peak_bytes(lambda: None)  # of tests before this one
    # Not predicted: what oneDNN takes for a product in bfloat16, about 0.4 MiB, and, where no
    # kernels are built, what the reference formulas make.
    near = 0.04 if build_info()["native"] else 0.3
    assert found.peak == pytest.approx(peak_bytes(lambda: train(config)) - others, rel=near)
    kept = sum(found.of(phase) for phase in ("forward", "backward")) / 2
    held = sum(found.held.values())
    assert kept > 1.2 * held  # the passes matter at these sizes


@pytest.mark.parametrize(
    "values",
    [
        {"kv_groups": 2},
        {**preset("balanced"), "recompute": "selective", "device": "cuda", "dtype": "bfloat16"},
        {**FACTORED, **CHUNKS, "recompute": "block", "offload": True, "accumulation": 2},
        {**preset("balanced"), "recompute": "block", "offload": True, "device": "cuda"},
    ],
    ids=["dense", "selective", "factors", "offload"],
)
def test_a_deep_model_is_that_of_few_blocks_continued(values):
    config = resolved(depth=6, aspect_ratio=32, max_seq_len=128, **values)
    sizes = model_config(config, VOCAB)
    found, whole = simulate(config, sizes), memory_sim._simulated(config, sizes)
    for phase, amounts in whole.phases.items():
        assert found.of(phase) == pytest.approx(whole.of(phase), rel=1e-3), phase
        for part in PARTS:
            assert found.phases[phase][part] == pytest.approx(amounts[part], abs=0.005 * whole.peak)
    assert found.host == whole.host and sum(found.held.values()) > 0


def test_parts_of_a_dense_step_on_cuda():
    config = resolved("cuda", dtype="bfloat16")
    found = simulate(config, model_config(config, VOCAB))
    model = GPT(model_config(config, VOCAB))
    counts = model.count_parameters()
    tokens, width, blocks = 512, 128, 2
    bytes_ = 4 * counts["total"] - 2 * counts["embedding"]  # the embedding is bfloat16
    assert found.phases["forward"]["weights"] == bytes_
    # Two moments of AdamW, a momentum of Muon; the counters of two parameters.
    state = 4 * (counts["matrix"] + 2 * counts["head"]) + 2 * 2 * counts["embedding"]
    assert found.held["optimizer"] == state + 2 * 4
    assert found.phases["optimizer"]["gradients"] == bytes_
    forward = found.phases["forward"]
    assert forward["keys and values"] == blocks * 2 * tokens * width * 2
    assert forward["weight casts"] == 2 * (counts["matrix"] + counts["head"])
    # relu(h), its square, and h of the last block or the output before it is cast
    assert forward["feed-forward"] >= blocks * 2 * tokens * 4 * width * 2
    assert found.phases["optimizer"]["keys and values"] == 0
    assert sum(found.parts.values()) == found.peak


def test_chunks_take_the_activations_away_and_recompute_the_rest():
    def parts(**values):
        config = resolved("cuda", dtype="bfloat16", max_seq_len=2048, loss_chunk=64, **values)
        found = simulate(config, model_config(config, VOCAB))
        return found.phases[found.passes], found

    dense, whole = parts()
    chunks, streamed = parts(**CHUNKS)
    block, recomputed = parts(**CHUNKS, recompute="block")
    moved, offloaded = parts(**CHUNKS, recompute="block", offload=True)
    assert chunks["feed-forward"] < dense["feed-forward"] / 8
    assert chunks["keys and values"] == dense["keys and values"]
    assert block["keys and values"] <= chunks["keys and values"] / 2  # of a block at a time
    peaks = [x.of(x.passes) for x in (whole, streamed, recomputed, offloaded)]
    assert peaks == sorted(peaks, reverse=True) and peaks[1] < peaks[0] / 2
    assert offloaded.host > 0 == recomputed.host


def test_offloaded_tensors_are_the_cpus_own_memory_there():
    config = resolved(**CHUNKS, recompute="block", offload=True)
    on_cpu = simulate(config, model_config(config, VOCAB))
    assert on_cpu.host == 0
    on_gpu = simulate(replace(config, device_type="cuda"), model_config(config, VOCAB))
    assert on_gpu.host == 2 * 256 * 128 * 4  # one of two blocks; the last one's input stays


def test_norms_keep_what_they_are_given_and_float32_where_cudas_autocast_has_its_way(monkeypatch):
    def norms(**values) -> int:
        config = resolved("cuda", **values)
        return simulate(config, model_config(config, VOCAB)).phases["forward"]["norms"]

    rows, numbers = 4 * 512, 4 * 512 * 128  # two norms in each of two blocks
    assert norms(dtype="bfloat16") == 2 * numbers + 4 * rows
    assert norms(dtype="float32") == 4 * numbers + 4 * rows

    def within_autocast(x):
        return model_module.F.rms_norm(x, (x.size(-1),))

    monkeypatch.setattr(model_module, "rms_norm", within_autocast)
    assert norms(dtype="bfloat16") == 4 * numbers + 4 * rows  # what goes in, cast


def test_muons_polar_factors_are_made_in_bfloat16_on_cuda(monkeypatch):
    config = resolved("cuda", device_batch_size=1, max_seq_len=32, aspect_ratio=256)
    workspace = {}
    for name, dtype in (("as it is", None), ("float32", torch.float32)):
        if dtype is not None:
            monkeypatch.setattr(memory_sim, "working_dtype", lambda device, dtype=dtype: dtype)
        found = simulate(config, model_config(config, VOCAB))
        workspace[name] = found.phases["optimizer"]["workspace"]
    wide = 2 * 4 * 512 * 512  # numbers of two blocks' widest layers, which go together
    # The stack and one more of its size, at least.
    assert workspace["as it is"] >= 2 * 2 * wide
    assert workspace["float32"] - workspace["as it is"] >= 2 * 2 * wide


def test_planning_takes_no_memory_and_leaves_no_trace():
    config = resolved("cuda", depth=48, max_seq_len=65536, device_batch_size=1, dtype="bfloat16")
    state, peaks = torch.get_rng_state(), []
    functions = model_module.F, muon.working_dtype
    before = peak_bytes(lambda: None)

    def run():
        peaks.append(simulate(config, model_config(config, 32768)).peak)

    assert peak_bytes(run) - before < 2**21
    assert peaks[0] > 300 * 2**30
    assert torch.equal(torch.get_rng_state(), state)
    assert (model_module.F, muon.working_dtype) == functions
    assert not torch.is_autocast_enabled("cpu")
    assert type(torch.empty(1)) is torch.Tensor


def test_an_error_leaves_no_trace_either(monkeypatch):
    def fail(self, phases):
        raise RuntimeError("stop")

    monkeypatch.setattr(memory_sim._Run, "step", fail)
    config, before = resolved("cuda"), model_module.F
    with pytest.raises(RuntimeError, match="stop"):
        simulate(config, model_config(config, VOCAB))
    assert model_module.F is before and type(torch.empty(1)) is torch.Tensor


def test_attention_gathers_the_querys_gradient_in_float32():
    query, key = torch.empty(2, 4, 300, 64), torch.empty(2, 2, 300, 64)
    assert memory_cuda._attention_backward(query, query) == 4 * 2 * 4 * 384 * 65
    shared = 2 * 2 * 4 * 300 * 64 * 4
    assert memory_cuda._attention_backward(query, key) == 4 * 2 * 4 * 384 * 65 + shared


def test_scratch_is_there_beside_what_its_kernel_gives(monkeypatch):
    config, large = resolved("cuda", dtype="bfloat16"), 2**30

    def scratch(func, args):
        return large if func is memory_cuda._ATTENTION_BACKWARD else 0

    monkeypatch.setattr(memory_sim, "scratch", scratch)
    found = simulate(config, model_config(config, VOCAB))
    gradients = 3 * 512 * 128 * 2  # of queries, keys and values
    assert found.phase == "backward"
    assert found.parts["workspace"] >= large + gradients


def test_scratch_of_the_sampled_gradient():
    a, b = (torch.empty(1024, n, dtype=torch.bfloat16) for n in (512, 256))
    grad, scale = torch.empty(256, 512, dtype=torch.bfloat16), torch.empty(1024)
    sampled = memory_cuda._sampled
    assert sampled(grad, a, b, None, 1.0, 2) == 0  # the library's product
    scores, taken, marks = 4 * 1024 * 257, 1024 * 512 * 2, 4 * 8 * 32
    assert sampled(grad, a, b, None, 0.25, 2) == scores + taken + marks
    assert sampled(grad, a, b, scale, 1.0, 2) == taken + marks
    assert sampled(grad.t(), b, a, scale, 1.0, 2) == 1024 * 256 * 2  # the narrow one is copied
    long = torch.empty(2**20, 512, dtype=torch.bfloat16, device="meta")
    narrow = torch.empty(2**20, 256, dtype=torch.bfloat16, device="meta")
    parts = sampled(grad, long, narrow, None, 0.25, 2) - 4 * 2**20 * 257
    assert parts == pytest.approx(2**20 * 256 * 2, rel=0.1)  # half of the features at a time
