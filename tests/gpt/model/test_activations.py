"""Levers against activations: every combination gives the gradients of the plain model, keeps what
its table says, or is refused."""

import copy
import itertools
import pickle
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from molegrad import MoleGradConfig, convert
from molegrad.gpt.model.activations import Activations
from molegrad.gpt.train import checkpoint, setup
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.monitor import Shadow
from tests.gpt.model.test_gpt import small, stirred, tokens
from tests.gpt.train.test_loop import PRESET, assert_same, trainer, weights

LOW_RANK = {"rank_k": 4, "target_layers": "all", "min_layer_utilization": 0.0, "method": "tangent"}
FACTORS = {**LOW_RANK, "gradient_mode": "factors"}
EXACT = {"method": "exact", "gradient_mode": "momentum", "target_layers": "all"}
MODES = {
    "dense": None,
    "tangent": {**LOW_RANK, "probes": 2, "trust_scaling": True},
    "factors": {**FACTORS, "probes": 2},
    "factors, fp8": {**FACTORS, "products": "fp8"},
    "factors, grouped": {**FACTORS, "group_mib": 1},
    "exact": {"method": "exact", "target_layers": "all"},
    "momentum": EXACT,
    "momentum, bfloat16": {**EXACT, "momentum_dtype": "bfloat16"},
}
WHOLE_INPUT = {  # refused with sequence_chunk, at home with recompute
    "power": {**LOW_RANK, "method": "power"},
    "factors, power": {**FACTORS, "method": "power"},
}
LEVERS = {
    f"chunk={chunk} {parts} {recompute}{' offload' if offload else ''}": Activations(
        chunk, parts, recompute, offload
    )
    for chunk, parts, recompute, offload in itertools.product(
        (0, 14), ("mlp", "all"), ("none", "selective", "block"), (False, True)
    )
    if (chunk or parts == "mlp") and (recompute != "none" or not offload)
}


def model_of(values: dict | None, head_rank: int = 0):
    model = stirred(small())
    if values is not None:
        convert(model, MoleGradConfig.of(**values))
    if head_rank:
        head = {**FACTORS, "rank_k": head_rank, "target_layers": ("lm_head",)}
        convert(model, MoleGradConfig.of(**head))
    return model


def trained(model, levers: Activations, called=None, dtype=None, micro_batches: int = 2) -> dict:
    """Loss, and every gradient, basis and momentum, after some micro-batches."""
    model.set_activations(levers)
    called = model if called is None else called
    for seed in range(micro_batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = called(*tokens(seed=seed))
        (loss / micro_batches).backward()
    found = {f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    found |= {f"own {k}": b for k, b in model.named_buffers() if "basis" in k}
    found |= {f"own {k}": p.detach() for k, p in model.named_parameters() if "momentum" in k}
    return {"loss": loss.detach(), **found}


def assert_close(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for key, x in ours.items():
        y = theirs[key]
        assert (x - y).float().norm() <= tolerance * y.float().norm() + 1e-12, key


# Each mode with four levers or three, each lever with two modes.
PAIRS = [(list(MODES)[i % len(MODES)], list(LEVERS)[i % len(LEVERS)]) for i in range(30)]


@pytest.mark.parametrize(("mode", "levers"), PAIRS)
def test_gradients_agree_to_rounding(mode, levers):
    """Over two micro-batches, which add up."""
    model = model_of(MODES[mode])
    expected = trained(copy.deepcopy(model), Activations())
    ours = trained(model, LEVERS[levers])
    assert_close(ours, expected, 1e-2 if "bfloat16" in mode or "fp8" in mode else 2e-5)


@pytest.mark.parametrize(
    ("mode", "levers"),
    [
        ("dense", "chunk=14 all none"),
        ("factors", "chunk=14 mlp selective offload"),
        ("momentum", "chunk=14 all none"),
    ],
)
def test_gradients_agree_under_autocast(mode, levers):
    model = model_of(MODES[mode])
    expected = trained(copy.deepcopy(model), Activations(), dtype=torch.bfloat16)
    assert_close(trained(model, LEVERS[levers], dtype=torch.bfloat16), expected, 1e-2)


@pytest.mark.parametrize(
    ("mode", "levers"),
    [("power", "chunk=0 mlp selective"), ("factors, power", "chunk=0 mlp block offload")],
)
def test_recomputed_blocks_take_methods_that_need_their_whole_input(mode, levers):
    model = model_of(WHOLE_INPUT[mode])
    expected = trained(copy.deepcopy(model), Activations(), micro_batches=1)
    assert_close(trained(model, LEVERS[levers], micro_batches=1), expected, 2e-5)


@pytest.mark.parametrize("levers", ["chunk=0 mlp none", "chunk=14 all block offload"])
def test_the_low_rank_head_goes_with_them(levers):
    model = model_of(MODES["momentum"], head_rank=4)
    expected = trained(copy.deepcopy(model), Activations())
    assert "grad lm_head.basis_u" in expected and "grad lm_head.weight" not in expected
    assert_close(trained(model, LEVERS[levers]), expected, 2e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence_chunk": -1}, "sequence_chunk must not be negative, got -1"),
        ({"sequence_parts": "all"}, "set sequence_chunk too"),
        ({"sequence_chunk": 8, "sequence_parts": "some"}, "one of mlp, all; got 'some'"),
        ({"recompute": "half"}, "one of none, selective, block; got 'half'"),
        ({"offload": True}, "set recompute to 'block' or 'selective' too"),
    ],
)
def test_levers_that_have_no_meaning_are_refused(values, message):
    for config in (Activations, BaseTrainConfig):
        with pytest.raises(ValueError, match=message):
            config(**values)


def test_a_compiled_model_cannot_offload():
    flags = {"offload": True, "recompute": "block"}
    with pytest.raises(ValueError, match="offload=True is not for compiled models"):
        BaseTrainConfig(**flags, compile=True)
    assert resolve(BaseTrainConfig(), torch.device("cuda")).compile
    assert not resolve(BaseTrainConfig(**flags), torch.device("cuda")).compile


def kept_numbers(levers: Activations) -> float:
    """Numbers a token and block keeps for the backward pass, in units of the width."""

    def total(depth: int) -> int:
        model, kept = small(depth=depth, aspect_ratio=64 // depth), {}
        model.set_activations(levers)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*tokens(2, 20))
        del loss
        return sum(storage.nbytes() for storage in kept.values()) / 4

    width = small().config.width
    return (total(4) - total(2)) / 2 / (2 * 20) / width


@pytest.mark.parametrize(
    ("levers", "most"),
    [
        (Activations(), 18.5),
        (Activations(8), 9.5),
        (Activations(8, "all"), 5.5),
        (Activations(recompute="block"), 1.01),
    ],
)
def test_a_block_keeps_what_the_table_says(levers, most):
    found = kept_numbers(levers)
    assert most - 1 < found <= most


class AttentionCalls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in str(op) and "backward" not in str(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "times"), [("none", 1), ("selective", 1), ("block", 2)])
def test_only_recomputing_whole_blocks_runs_attention_twice(kind, times):
    with AttentionCalls() as calls:
        trained(model_of(None), Activations(recompute=kind), micro_batches=1)
    assert calls.count == 2 * times  # of two blocks


def check_compiled(model, levers: Activations, micro_batches: int = 2) -> None:
    expected = trained(copy.deepcopy(model), Activations(), micro_batches=micro_batches)
    compiled = torch.compile(model, dynamic=False, backend="aot_eager")
    assert_close(trained(model, levers, compiled, micro_batches=micro_batches), expected, 2e-5)


@pytest.mark.parametrize(
    ("mode", "levers"),
    [
        ("dense", "chunk=14 all none"),
        ("tangent", "chunk=14 mlp block"),
        ("factors", "chunk=0 mlp block"),
        ("momentum", "chunk=14 all none"),
    ],
)
def test_compiled_models_give_the_same_gradients(mode, levers, compiler):
    check_compiled(model_of(MODES[mode], head_rank=4), LEVERS[levers])


@pytest.mark.parametrize(
    ("mode", "levers"),
    [("power", "chunk=0 mlp none"), ("factors, power", "chunk=0 mlp selective")],
)
def test_compiled_models_take_the_other_methods_too(mode, levers, compiler):
    check_compiled(model_of(WHOLE_INPUT[mode]), LEVERS[levers], micro_batches=1)


def test_the_inductor_compiles_around_the_chunks(compiler):
    model = model_of(MODES["momentum"])
    levers = LEVERS["chunk=14 all block"]
    expected = trained(copy.deepcopy(model), Activations())
    compiled = torch.compile(model, dynamic=False)
    assert_close(trained(model, levers, compiled), expected, 2e-5)


def test_a_run_with_every_lever_resumes_bit_for_bit(tmp_path):
    flags = {
        **PRESET,
        "sequence_chunk": 32,
        "sequence_parts": "all",
        "recompute": "selective",
        "offload": True,
        "head_rank": 4,
        "total_batch_size": 160,
        "log_every": 1,
    }
    whole = trainer(tmp_path / "whole", **flags)
    whole.run()
    again = trainer(tmp_path / "whole", **flags, resume=4)
    assert checkpoint.find(tmp_path / "whole", 4)
    again.run()
    assert_same(weights(again), weights(whole))


def test_shadow_layers_see_streamed_layers():
    """Chosen layers run as a whole in the extra pass, the others in chunks; training notices
    nothing."""
    model = model_of(MODES["factors"])
    model.set_activations(LEVERS["chunk=14 all none"])
    plain = copy.deepcopy(model)
    plain.set_activations(Activations())
    found = []
    for net in (model, plain):
        shadow = Shadow(net, "transformer.h.0.mlp.c_fc,transformer.h.1.attn.c_q")
        shadow.begin()
        shadow.observe(lambda net=net: net(*tokens()))
        net(*tokens()).backward()
        shadow.compare()
        found.append(shadow.read())
    ours, theirs = found
    assert set(ours) == set(theirs) and len(ours) == 2
    for name, values in theirs.items():
        assert ours[name]["cosine"] == pytest.approx(values["cosine"], rel=1e-3)
        assert 0 < values["cosine"] < 1


def test_a_model_with_levers_can_be_copied_and_saved():
    model = model_of(MODES["momentum"])
    model.set_activations(LEVERS["chunk=14 all block offload"])
    again = pickle.loads(pickle.dumps(model))
    expected = trained(copy.deepcopy(model), model.activations)
    assert again.activations == model.activations
    assert_close(trained(again, again.activations), expected, 0.0)


def _worker(rank: int, port: int, mode: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        model = model_of(MODES[mode])
        model.set_activations(LEVERS["chunk=14 all selective"])
        processes = setup.Processes(rank, rank, 2)
        called = setup.wrap(model, BaseTrainConfig(compile=False), processes)
        idx, targets = tokens(4)
        targets = targets.clamp(min=0)
        called(idx[2 * rank :][:2], targets[2 * rank :][:2]).backward()
        results[rank] = _found(model)
    finally:
        torch.distributed.destroy_process_group()


def _found(model) -> tuple[dict, dict]:
    """Gradients, and momenta that backward passes have added to."""
    parameters = dict(model.named_parameters())
    momenta = {k: p.detach() for k, p in parameters.items() if k.endswith("momentum")}
    return {k: p.grad for k, p in parameters.items() if p.grad is not None}, momenta


@pytest.mark.parametrize("mode", ["dense", "factors", "momentum"])
def test_data_parallel_processes_average_streamed_gradients(mode):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, args=(port, mode, results), nprocs=2)
        results = dict(results)
    model = model_of(MODES[mode])
    idx, targets = tokens(4)
    model(idx, targets.clamp(min=0)).backward()
    expected, momenta = _found(model)
    (ours, own), (others, other) = results[0], results[1]
    assert ours.keys() == expected.keys() and own.keys() == momenta.keys()
    assert bool(momenta) == (mode == "momentum")
    for key, gradient in expected.items():
        assert torch.equal(ours[key], others[key])
        assert (ours[key] - gradient).norm() < 1e-4 * gradient.norm(), key
    for key, momentum in momenta.items():  # of its own sequences; Muon averages them
        mean = (own[key] + other[key]) / 2
        assert (mean - momentum).norm() < 1e-4 * momentum.norm(), key
