"""Optimizers: every parameter in one group, learning rates by role; placement; processes."""

import pytest
import torch

from molegrad import optim
from molegrad.gpt.train import flags, setup
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.optim.rank import RankController
from tests.gpt.model.test_gpt import small, tokens
from tests.gpt.train.test_loop import ADAPTIVE, FACTORED, STREAM, losses, trainer

CPU = torch.device("cpu")
OPTIMIZERS = {"muon": optim.Muon, "adamw": optim.AdamW, "adafactor": optim.Adafactor}
EVERYWHERE = {**FACTORED, "streaming_target_layers": "all"}


def config(**values):
    return resolve(flags.make(BaseTrainConfig, **values), CPU)


def built(**values):
    return setup.build(small(), config(**values), CPU)


@pytest.mark.parametrize(
    ("optimizer", "values"),
    [
        ("muon", {}),
        ("muon", EVERYWHERE),
        ("muon", {"streaming_preset": "minimal"}),
        ("adamw", FACTORED),
        ("adafactor", STREAM),
    ],
)
def test_every_trainable_parameter_is_in_exactly_one_group(optimizer, values):
    made = built(optimizer=optimizer, **values)
    groups = [g for o in made.optimizers for g in o.param_groups]
    taken = [id(p) for g in groups for p in g["params"]]
    assert len(taken) == len(set(taken))
    assert {id(p) for p in made.model.parameters() if p.requires_grad} <= set(taken)
    assert all(g["initial_lr"] == g["lr"] and g["name"] for g in groups)
    assert [type(o) for o in made.optimizers] == [torch.optim.AdamW, OPTIMIZERS[optimizer]]


@pytest.mark.parametrize("values", [{}, EVERYWHERE], ids=["dense", "factors"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_each_optimizer_trains_the_matrices(optimizer, values, tmp_path):
    """With everything else frozen, at its default learning rate; and its flags reach it."""
    still = {"embedding_lr": 0.0, "unembedding_lr": 0.0, "warmdown_ratio": 0.0}
    values = {**values, **still, "weight_decay": 0.01, "momentum": 0.9}
    made = trainer(tmp_path, 40, optimizer=optimizer, **values)
    group = made.optimizers[1].param_groups[0]
    assert group["weight_decay"] == 0.01 and group.get("momentum", 0.9) == 0.9
    assert group.get("betas", (0.8, 0.95)) == (0.8, 0.95) and not group.get("relative", False)
    assert group.get("adjust_lr", "original") == "original"  # nanochat's
    made.loader.next_batch = lambda: tokens(4, 20, seed=1)  # one batch, to be learned by heart
    made.run()
    recorded = losses(tmp_path)
    assert recorded[-1] < 0.97 * recorded[0]


def test_learning_rates_by_role():
    made = built(embedding_lr=0.3, unembedding_lr=0.01, matrix_lr=0.05)
    rates = {g["name"]: g["lr"] for o in made.optimizers for g in o.param_groups}
    scale = (64 / 768) ** -0.5
    assert rates == {
        "embedding": pytest.approx(0.3 * scale),
        "head": pytest.approx(0.01 * scale),
        "matrix_grad": 0.05,
    }


def test_a_configuration_that_takes_no_layer_is_an_error():
    with pytest.raises(ValueError, match=r"takes no layer of this model(.|\n)*Lower --streaming_"):
        built(enable_streaming=True, streaming_rank_k=30, streaming_min_layer_utilization=0.9)


def test_block_power_that_was_asked_for_is_refused_in_chunks():
    chunks = {"max_seq_len": 32, "device_batch_size": 4, "sequence_chunk": 64}
    with pytest.raises(ValueError, match=r"cannot run in chunks \(--sequence_chunk\)"):
        built(**chunks, **STREAM, streaming_method="power")
    assert built(**chunks, **STREAM).model.transformer["h"][0].mlp.c_fc.config.method == "tangent"


def test_levers_that_do_less_than_their_flags_say_are_named():
    def notes(**values):
        c = config(max_seq_len=32, device_batch_size=4, **values)
        return setup.notes(setup.build(small(), c, CPU).model, c)

    fp8 = {**STREAM, "streaming_saved_inputs": "fp8"}
    assert notes() == notes(sequence_chunk=127) == notes(**fp8) == []
    assert "sequence_chunk=128 makes one chunk of a micro-batch" in notes(sequence_chunk=128)[0]
    (line,) = notes(**fp8, streaming_target_layers="all", sequence_chunk=64)
    assert "streaming_saved_inputs=fp8 has no effect on the 4 of 12 converted layers" in line
    grouped = {**FACTORED, "streaming_group_mib": 8, "sequence_chunk": 64}
    assert "streaming_group_mib has no effect on the 4 of 4" in notes(**grouped)[0]
    assert notes(**fp8, streaming_target_layers="attention_only", sequence_chunk=64) == []


def test_placement():
    model = setup.place(small(), config(weight_dtype="bfloat16"), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cos.dtype == torch.float32
    model = setup.place(small(), config(dtype="bfloat16"), CPU)
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert dtypes.pop("transformer.wte.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_stochastic_rounding_reaches_the_matrices(optimizer):
    values = {**FACTORED, "optimizer": optimizer, "head_rank": 8, "weight_dtype": "bfloat16"}
    for rounding in (False, True):
        _, *ours = built(**values, stochastic_rounding=rounding).optimizers
        groups = [group for o in ours for group in o.param_groups]
        assert {group["kind"] for group in groups} == {"grad", "factors"}
        assert len(ours) == 2 and {g["stochastic_rounding"] for g in groups} == {rounding}


def test_processes_from_the_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert setup.Processes.from_environment() == setup.Processes(0, 0, 1)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    processes = setup.Processes.from_environment()
    assert processes == setup.Processes(3, 1, 4) and not processes.first


@pytest.mark.parametrize("values", [{}, FACTORED], ids=["exact blocks", "factors"])
def test_a_head_of_low_rank_has_an_optimizer_of_its_own_and_learns(values, tmp_path):
    still = {"embedding_lr": 0.0, "matrix_lr": 1e-12}
    made = trainer(tmp_path, 40, warmdown_ratio=0.0, head_rank=8, **values, **still)
    head = made.model.lm_head
    assert (head.rank, head.config.gradient_mode) == (8, "factors")
    *_, last = made.optimizers
    assert isinstance(last, optim.AdamW)
    assert last.param_groups[0]["name"] == "head_factors"
    assert last.param_groups[0]["initial_lr"] == pytest.approx(0.004 * (64 / 768) ** -0.5)
    made.loader.next_batch = lambda: tokens(4, 20, seed=1)
    made.run()
    recorded = losses(tmp_path)
    assert recorded[-1] < 0.97 * recorded[0]


def test_adaptive_ranks_leave_the_head_alone():
    c = config(**FACTORED, **ADAPTIVE, head_rank=8)
    made = setup.build(small(), c, CPU)
    controller = RankController(made.model, made.optimizers, c.streaming)
    assert controller.ranks and "lm_head" not in controller.ranks


def test_a_head_that_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="output head 'lm_head' has gradient_mode='grad'"):
        built(**STREAM, streaming_target_layers="mlp,lm_head")
    with pytest.raises(ValueError, match="head_rank=33 must be at most"):
        built(head_rank=33)


def test_memory_is_expected_by_formula():
    sizes = {"max_seq_len": 64, "device_batch_size": 8, "loss_chunk": 0}
    exact, low = (
        setup.expected_memory(built(**sizes, **v), config(**sizes, **v)) for v in ({}, EVERYWHERE)
    )
    model = small()
    count = sum(p.numel() for p in model.parameters())
    assert exact["weights"] == exact["gradients"] == 4 * count
    matrices = 4 * model.count_parameters()["matrix"]
    assert exact["optimizer_state"] == 2 * 4 * count - matrices  # AdamW, and Muon's one number
    assert exact["activations"] == 8 * 64 * 2 * 64 * 18 * 4
    assert low["gradients"] < exact["gradients"] and low["total"] < exact["total"]
    chunked = {**sizes, "sequence_chunk": 64, "sequence_parts": "all"}
    assert setup.expected_memory(built(**chunked), config(**chunked))["activations"] == (
        exact["activations"] * 5 // 18
    )
