"""The levers against memory that grows with the sequence, on a GPU."""

import functools

import pytest
import torch

from molegrad import MoleLinear
from molegrad.bench.step import StepBenchConfig, Training
from molegrad.lab.methods import parse_methods
from molegrad.monitor.memory import peak_bytes
from tests.gpu.device import DEVICE, needs_cuda, needs_device, no_waiting

pytestmark = needs_device
DEPTH, TOKENS, CHUNK = 2, 1024, 192  # chunks that do not divide the sequence
LEVERS = (
    f"sequence_chunk={CHUNK}",
    f"sequence_chunk={CHUNK}:sequence_parts=all",
    "recompute=selective",
    "recompute=block",
    "recompute=block:offload=True",
    f"sequence_chunk={CHUNK}:sequence_parts=all:recompute=selective:offload=True",
    f"sequence_chunk={CHUNK}:sequence_parts=all:recompute=block:offload=True",
)
# Every estimator that is the same for a sum of chunks; the presets keep inputs in float8, which
# streaming need not, and sums in bfloat16.
METHODS = (
    "dense",
    "exact:saved_inputs=full:momentum_dtype=float32",
    "lowrank-grad:method=tangent:target_layers=all",
    "tangent:target_layers=all",
)
# ‖difference‖ / ‖gradient‖ of one parameter: sums in another order; bfloat16 sums in between.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}


def training(label, dtype="float32", batch=(1, TOKENS), depth=DEPTH, compiled=False):
    """A small model by the flags of a method, its projections not zero as at the start."""
    method = parse_methods(label)[-1]
    config = StepBenchConfig(
        device=DEVICE.type, depth=depth, aspect_ratio=256 // depth, vocab=512, dtype=dtype
    )
    made = Training(config, method, batch, compiled)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in made.model.transformer["h"]:
            for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return made


def gradients(label, dtype, passes=1, **values):
    """What a parameter has got of `passes` backward passes: its gradient, or momentum."""
    made = training(label, dtype, **values)
    for _ in range(passes):
        made.loss().backward()
    found = {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}
    for name, layer in made.model.named_modules():
        if isinstance(layer, MoleLinear) and layer.momentum is not None:
            found[f"{name}.momentum"] = layer.momentum.detach()
    return {name: grad.double().cpu() for name, grad in found.items()}


unstreamed = functools.cache(gradients)


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.norm() > 0, f"{name} has no gradient to compare"
        error = (found[name] - grad).norm() / grad.norm()
        assert error < tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("levers", LEVERS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_without_levers(method, levers, dtype):
    found = gradients(f"{method}:{levers}", dtype)
    assert_close(found, unstreamed(method, dtype), TOLERANCE[dtype])


# Not lowrank-grad, whose bases move with every pass, and rounding with them.
@pytest.mark.parametrize("method", [m for m in METHODS if "lowrank-grad" not in m])
def test_gradients_of_several_sequences_and_passes(method):
    found = gradients(f"{method}:{LEVERS[-1]}", "float32", 2, batch=(3, 341))
    assert_close(found, unstreamed(method, "float32", 2, batch=(3, 341)), TOLERANCE["float32"])


def test_the_low_rank_head():
    found = gradients(f"dense:head_rank=16:{LEVERS[-1]}", "float32")
    wanted = unstreamed("dense:head_rank=16", "float32")
    assert "lm_head.weight" not in found and "lm_head.basis_u" in found
    assert_close(found, wanted, TOLERANCE["float32"])


@pytest.mark.parametrize(
    "label",
    [f"{method}:{levers}" for method in ("dense", "balanced", METHODS[-1]) for levers in LEVERS],
)
def test_a_training_step_waits_for_nothing(label):
    made = training(label, "bfloat16")
    # The embedding's own backward pass sorts tokens; what it waits for is not asked here.
    made.model.transformer["wte"].weight.requires_grad_(False)

    def step():
        made.loss().backward()
        for optimizer in made.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    with no_waiting():
        for _ in range(2):
            step()
    assert made.loss().isfinite()


def step_peak(label, depth, tokens):
    """Bytes that a forward and a backward pass take beside what is there before and after."""
    made = training(label, "bfloat16" if DEVICE.type == "cuda" else "float32", (1, tokens), depth)
    made.loss().backward()  # libraries' workspaces, host buffers
    for p in made.model.parameters():
        p.grad = None
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    return peak_bytes(lambda: made.loss().backward(), DEVICE) - before


def test_every_lever_lowers_the_peak_of_a_long_sequence():
    depth, tokens = 4, 4096
    chunk = "sequence_chunk=256"
    levers = ["", f":{chunk}", f":{chunk}:sequence_parts=all"]
    levers += [f":{chunk}:sequence_parts=all:recompute={kind}" for kind in ("selective", "block")]
    peaks = [step_peak(f"dense{lever}", depth, tokens) for lever in levers]
    # A number of each token's C, once per block; the last block's are needed either way.
    unit = (depth - 1) * tokens * 256 * (2 if DEVICE.type == "cuda" else 4)
    least = 9, 3, 3, 1  # of the table in molegrad.gpt.model.activations
    saved = [(a - b) / unit for a, b in zip(peaks, peaks[1:], strict=False)]
    assert all(s > 0.8 * wanted for s, wanted in zip(saved, least, strict=True)), saved


@needs_cuda
def test_offloading_lowers_the_peak_by_the_stream():
    depth, tokens = 8, 8192
    levers = "dense:sequence_chunk=256:sequence_parts=all:recompute=block"
    kept, moved = (step_peak(f"{levers}:offload={off}", depth, tokens) for off in (False, True))
    assert kept - moved > (depth - 4) * tokens * 256 * 2


@pytest.mark.parametrize(
    "method, levers",
    [
        ("dense", f"sequence_chunk={CHUNK}:sequence_parts=all:recompute=block"),
        ("tangent:target_layers=all", "recompute=block"),
    ],
)
def test_compiled_steps_have_the_same_gradients(method, levers):
    torch.compiler.reset()
    found = gradients(f"{method}:{levers}", "bfloat16", compiled=True)
    assert_close(found, unstreamed(method, "bfloat16"), TOLERANCE["bfloat16"])
