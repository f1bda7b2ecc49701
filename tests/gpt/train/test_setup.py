"""Optimizers: every parameter in one group, learning rates by role; placement; processes."""

import pytest
import torch

from molegrad import optim
from molegrad.gpt.train import setup
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.optim.rank import RankController
from tests.gpt.model.test_gpt import small, tokens
from tests.gpt.train.test_loop import losses, trainer


def config(**values):
    return resolve(BaseTrainConfig(**values), torch.device("cpu"))


STREAM = {
    "enable_streaming": True,
    "streaming_rank_k": 4,
    "streaming_min_layer_utilization": 0.0,
}


FACTORED = {**STREAM, "streaming_gradient_mode": "factored"}
OPTIMIZERS = {
    "muon": optim.Muon,
    "adamw": optim.AdamW,
    "adafactor": optim.Adafactor,
}


@pytest.mark.parametrize(
    "values", [{}, STREAM, FACTORED, {**FACTORED, "streaming_target_layers": "all"}]
)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_trainable_parameter_is_in_exactly_one_group(optimizer, values):
    model, c = small(), config(optimizer=optimizer, **values)
    setup.equip(model, c)
    optimizers = setup.build_optimizers(model, c)
    taken = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(taken) == len(set(taken))
    assert {id(p) for p in model.parameters() if p.requires_grad} <= set(taken)
    assert {id(p) for p in model.parameters()} == set(taken)
    assert all(g["initial_lr"] == g["lr"] and g["name"] for o in optimizers for g in o.param_groups)
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, OPTIMIZERS[optimizer]]


@pytest.mark.parametrize("values", [{}, FACTORED], ids=["dense", "factored"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_each_optimizer_trains_the_matrices(optimizer, values, tmp_path):
    """With everything else frozen, at its default learning rate; and its flags reach it."""
    values = {**values, "weight_decay": 0.01, "momentum": 0.9}
    if values.get("enable_streaming"):
        values["streaming_target_layers"] = "all"
    still = {"embedding_lr": 0.0, "unembedding_lr": 0.0}
    built = trainer(tmp_path, 40, optimizer=optimizer, warmdown_ratio=0.0, **values, **still)
    group = built.optimizers[1].param_groups[0]
    assert group["weight_decay"] == 0.01 and group.get("momentum", 0.9) == 0.9
    assert group.get("betas", (0.8, 0.95)) == (0.8, 0.95) and not group.get("relative", False)
    built.loader.next_batch = lambda: tokens(4, 20, seed=1)  # one batch, to be learned by heart
    built.run()
    recorded = losses(tmp_path)
    assert recorded[-1] < 0.97 * recorded[0]


def test_learning_rates_by_role():
    model, c = small(), config(embedding_lr=0.3, unembedding_lr=0.01, matrix_lr=0.05)
    optimizers = setup.build_optimizers(model, c)
    rates = {g["name"]: g["lr"] for o in optimizers for g in o.param_groups}
    scale = (64 / 768) ** -0.5
    assert rates == {
        "embedding": pytest.approx(0.3 * scale),
        "head": pytest.approx(0.01 * scale),
        "matrix_dense": 0.05,
    }


def test_a_rank_that_fits_no_layer_is_named():
    c = config(enable_streaming=True, streaming_rank_k=4000)
    with pytest.raises(ValueError, match="takes no layer of this model"):
        setup.equip(small(), c)


def test_a_head_rank_beyond_half_of_the_smaller_side_is_named():
    most = min(small().lm_head.weight.shape) // 2
    with pytest.raises(ValueError, match=f"head_rank={most + 1} must be at most {most}"):
        setup.equip(small(), config(head_rank=most + 1))
    setup.equip(small(), config(head_rank=most))


def test_levers_that_do_less_than_their_flags_say_are_named():
    def notes(**values):
        c = config(max_seq_len=32, device_batch_size=4, **values)
        model = small()
        setup.equip(model, c)
        return setup.notes(model, c)

    fp8 = {"enable_streaming": True, "streaming_saved_inputs": "fp8"}
    assert notes() == notes(sequence_chunk=127) == notes(**fp8) == []
    assert "sequence_chunk=128 makes one chunk of a micro-batch" in notes(sequence_chunk=128)[0]
    everywhere = {**fp8, "streaming_target_layers": "all"}
    (line,) = notes(**everywhere, sequence_chunk=64)
    assert "streaming_saved_inputs=fp8 has no effect on the 4 of 12 converted layers" in line
    grouped = {**FACTORED, "streaming_group_mib": 8, "sequence_chunk": 64}
    assert "streaming_group_mib=8 has no effect on the 4 of 4" in notes(**grouped)[0]
    assert notes(**{**fp8, "streaming_target_layers": "attention_only"}, sequence_chunk=64) == []


def test_placement():
    model = setup.place(small(), config(weight_dtype="bfloat16"), torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cos.dtype == torch.float32
    model = setup.place(small(), config(dtype="bfloat16"), torch.device("cpu"))
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert dtypes.pop("transformer.wte.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_stochastic_rounding_reaches_the_matrices(optimizer):
    values = {**FACTORED, "optimizer": optimizer, "head_rank": 8, "weight_dtype": "bfloat16"}
    for rounding in (False, True):
        c = config(**values, stochastic_rounding=rounding)
        model = setup.place(small(), c, torch.device("cpu"))
        setup.equip(model, c)
        _, *ours = setup.build_optimizers(model, c)
        groups = [group for o in ours for group in o.param_groups]
        assert {group["kind"] for group in groups} == {"dense", "factored"}
        assert len(ours) == 2 and {g["stochastic_rounding"] for g in groups} == {rounding}


def test_processes_from_the_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert setup.Processes.from_environment() == setup.Processes(0, 0, 1)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    processes = setup.Processes.from_environment()
    assert processes == setup.Processes(3, 1, 4) and not processes.first


@pytest.mark.parametrize("values", [{}, FACTORED], ids=["dense blocks", "factored blocks"])
def test_a_head_of_low_rank_has_an_optimizer_of_its_own_and_learns(values, tmp_path):
    still = {"embedding_lr": 0.0, "matrix_lr": 1e-12}
    built = trainer(tmp_path, 40, warmdown_ratio=0.0, head_rank=8, **values, **still)
    head = built.model.lm_head
    assert (head.rank, head.config.gradient_mode) == (8, "factored")
    *_, last = built.optimizers
    assert isinstance(last, optim.AdamW)
    assert last.param_groups[0]["name"] == "head_factored"
    assert last.param_groups[0]["initial_lr"] == pytest.approx(0.004 * (64 / 768) ** -0.5)
    built.loader.next_batch = lambda: tokens(4, 20, seed=1)
    built.run()
    recorded = losses(tmp_path)
    assert recorded[-1] < 0.97 * recorded[0]


def test_adaptive_ranks_leave_the_head_alone():
    adaptive = {
        "streaming_energy_target": 0.5,
        "streaming_probes": 2,
        "streaming_rank_budget": 0.0,
    }
    model, c = small(), config(**FACTORED, **adaptive, head_rank=8)
    setup.equip(model, c)
    controller = RankController(model, setup.build_optimizers(model, c), c.streaming_config())
    assert controller._watched and "lm_head" not in controller._watched


def test_a_head_that_cannot_be_trained_is_refused():
    values = {**STREAM, "streaming_target_layers": "mlp,lm_head", "streaming_method": "tangent"}
    with pytest.raises(ValueError, match="output head 'lm_head' has gradient_mode='dense'"):
        setup.equip(small(), config(**values))
    with pytest.raises(ValueError, match="head_rank must not be negative"):
        config(head_rank=-1)
