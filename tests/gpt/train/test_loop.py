"""The loop: accumulation, schedules, resume, signals, non-finite numbers, data parallelism."""

import json
import os
import signal
import socket

import pytest
import torch

from molegrad.gpt.train import checkpoint, flags, guard, setup
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.gpt.train.logger import RunLogger, read_metrics
from molegrad.gpt.train.loop import Hooks, Trainer
from molegrad.gpt.train.stage import every_of, schedule_of
from molegrad.optim.rank import layer_ranks
from tests.gpt.model.test_gpt import small, stirred, tokens

STREAM = {
    "enable_streaming": True,
    "streaming_rank_k": 4,
    "streaming_min_layer_utilization": 0.0,
    "streaming_gradient_mode": "grad",
}
FACTORED = {**STREAM, "streaming_gradient_mode": "factors", "streaming_method": "tangent"}
POWER = {**FACTORED, "streaming_method": "power"}
PRESET = {"streaming_preset": "balanced"}
ADAPTIVE = {
    "streaming_probes": 2,
    "streaming_energy_target": 0.9,
    "streaming_rank_interval": 3,
    "streaming_rank_budget": 0.0,
}


class Batches:
    """Endless seeded batches; `hooks` are called when their batch is fetched."""

    epoch = 0

    def __init__(self, rows=4, rank=0, world=1, hooks=None):
        self.at, self.rows, self.rank, self.world = 0, rows, rank, world
        self.hooks = hooks or {}

    def next_batch(self):
        seed = self.at * self.world + self.rank
        self.at += 1
        self.hooks.get(self.at, lambda: None)()
        idx, targets = tokens(self.rows, 20, seed=seed)
        return idx, targets.clamp(min=0)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def trainer(
    folder, steps=8, loader=None, processes=None, resume=None, model=None, hooks=None, **values
):
    defaults = {"max_seq_len": 20, "device_batch_size": 4, "warmdown_ratio": 0.5, "save_every": 4}
    processes = processes or setup.Processes()
    rank, world, device = processes.rank, processes.world_size, torch.device("cpu")
    defaults["total_batch_size"] = 80 * world
    config = resolve(flags.make(BaseTrainConfig, **{**defaults, **values}), device, world)
    built = setup.build(model or stirred(small(), std=0.05), config, device)
    store = checkpoint.Store(folder, flags.resolved(config), config.keep_last, rank, world)
    made = Trainer(
        setup.parts(built, config, processes, peak=(1e12, "given")),
        loader or Batches(),
        schedule_of(config, steps),
        setup.BatchSizes.of(config, world),
        every_of(config),
        RunLogger(folder, dashboards="none", resume_step=resume, active=processes.first),
        None if config.save_every == -2 else store,
        hooks,
        processes,
    )
    if resume is not None:
        made.resume(checkpoint.load(checkpoint.find(folder, resume), rank, world))
    return made


def weights(built):
    return {name: tensor.clone() for name, tensor in built.model.state_dict().items()}


def assert_same(a, b, exact=True):
    assert a.keys() == b.keys()
    for name in a:
        if exact:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


def losses(folder):
    return [r["train/loss_raw"] for r in read_metrics(folder) if "train/loss_raw" in r]


def test_the_loss_falls_and_every_step_is_recorded(tmp_path):
    scores = iter((1.9, 1.7, 1.8))
    hooks = Hooks(evaluate=lambda: {"val/bpb": next(scores)})
    built = trainer(tmp_path, steps=30, hooks=hooks, eval_every=10)
    built.loader.next_batch = lambda: tokens(4, 20, seed=1)  # one batch, to be learned by heart
    result = built.run()
    recorded = losses(tmp_path)
    assert len(recorded) == 30 and recorded[-1] < 0.3 * recorded[0]
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if "val/bpb" in r] == [10, 20, 30]
    assert built.progress.best_bpb == 1.7 and result["val/bpb"] == 1.8
    keys = "step total_training_time train/loss train/lrm train/dt train/tok_per_sec train/mfu"
    assert set(keys.split()) <= set(records[0]) and not result["interrupted"]


def test_schedules_reach_the_optimizers(tmp_path):
    built = trainer(tmp_path, steps=4, momentum_warmup_steps=2, warmup_steps=2)
    seen = []
    for optimizer in built.optimizers:
        group = optimizer.param_groups[0]
        step = optimizer.step

        def note(group=group, step=step):
            seen.append((group["name"], group["lr"] / group["initial_lr"], group.get("momentum")))
            return step()

        optimizer.step = note
    built.run()
    matrix = [(lr, momentum) for name, lr, momentum in seen if name == "matrix_grad"]
    assert [lr for lr, _ in matrix] == [0.5, 1.0, 1.0, 0.5]
    assert [m for _, m in matrix] == pytest.approx([0.85, 0.90, 0.95, 0.95])


@pytest.mark.parametrize("values", [{}, FACTORED], ids=["dense", "factors"])
def test_accumulated_micro_batches_equal_one_batch(values, tmp_path):
    class Halves(Batches):
        """The rows of `Batches` in two parts."""

        def next_batch(self):
            if self.at % 2 == 0:
                self.whole = tokens(4, 20, seed=self.at // 2)
            part = slice(0, 2) if self.at % 2 == 0 else slice(2, 4)
            self.at += 1
            return self.whole[0][part], self.whole[1].clamp(min=0)[part]

    one = trainer(tmp_path / "one", steps=3, **values)
    two = trainer(tmp_path / "two", steps=3, loader=Halves(), device_batch_size=2, **values)
    assert (one.sizes.accumulation, two.sizes.accumulation) == (1, 2)
    one.run()
    two.run()
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    assert_same(weights(one), weights(two), exact=False)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"optimizer": "adamw"},
        {"optimizer": "adafactor", **FACTORED},
        {**STREAM, "streaming_method": "tangent", "streaming_probes": 2},
        {**STREAM, "streaming_method": "power"},
        {**FACTORED, "streaming_probes": 2, "total_batch_size": 160, "grad_clip": 1.0},
        POWER,
        PRESET,
        {**PRESET, "streaming_momentum_dtype": "int8", "total_batch_size": 160},
        {"streaming_preset": "exact"},
        {**STREAM, **ADAPTIVE},
        {**FACTORED, **ADAPTIVE, "total_batch_size": 160, "grad_clip": 1.0, "head_rank": 8},
    ],
    ids=[
        "dense", "adamw", "adafactor", "tangent", "power", "accumulated", "power-factors",
        "balanced", "int8", "exact", "adaptive", "adaptive-factors",
    ],
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(values, tmp_path):
    whole = trainer(tmp_path, **values)
    whole.run()
    expected, recorded = weights(whole), losses(tmp_path)
    assert len(recorded) == 8
    resumed = trainer(tmp_path, resume=4, **values)
    resumed.run()
    assert losses(tmp_path) == recorded
    assert_same(weights(resumed), expected)
    assert resumed.progress.reads == whole.progress.reads
    assert resumed.progress.flops == whole.progress.flops
    assert layer_ranks(resumed.model) == layer_ranks(whole.model)


@pytest.mark.parametrize("values", [STREAM, FACTORED], ids=["grad", "factors"])
def test_ranks_adapt_and_every_change_is_printed_and_counted(values, tmp_path, capsys):
    built = trainer(tmp_path, monitor_every=1, **values, **ADAPTIVE)
    costs = built.flops.actual
    built.run()
    ranks = layer_ranks(built.model)
    assert set(ranks.values()) != {4} and built.flops.actual != costs
    lines = [line for line in capsys.readouterr().out.splitlines() if " | rank of " in line]
    last = {line.split("rank of ")[1].split(":")[0]: line for line in lines}
    for name, rank in ranks.items():
        assert rank == 4 or f" -> {rank} (energy 0." in last[name]
    assert {line.split()[1] for line in lines} <= {"00003", "00006"}
    recorded = read_metrics(tmp_path)[-1]
    assert recorded["streaming/rank_max"] == max(ranks.values())
    assert recorded["streaming/rank_mean"] == sum(ranks.values()) / len(ranks)
    assert recorded["streaming/rank_min"] == min(ranks.values())


def test_adapted_ranks_are_not_resumed_without_what_adapts_them(tmp_path):
    values = {**FACTORED, **ADAPTIVE}
    trainer(tmp_path, **values).run()
    with pytest.raises(ValueError, match=r"was saved with rank .* --streaming_energy_target"):
        trainer(tmp_path, resume=8, **{**values, "streaming_energy_target": 0.0})
    trainer(tmp_path / "fixed", **FACTORED).run()
    with pytest.raises(
        ValueError, match=r"this run has 8: resume with the same --streaming_rank_k"
    ):
        trainer(tmp_path / "fixed", resume=8, **{**FACTORED, "streaming_rank_k": 8})
    later = trainer(tmp_path / "fixed", resume=8, steps=14, **values)  # switched on later
    later.run()
    assert set(layer_ranks(later.model).values()) != {4}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_and_saves(number, tmp_path, capsys):
    whole = trainer(tmp_path / "whole", save_every=-1)
    whole.run()
    handler = signal.getsignal(number)
    kill = {4: lambda: os.kill(os.getpid(), number)}  # while the third step runs
    cut = trainer(tmp_path / "cut", loader=Batches(hooks=kill), save_every=-1)
    assert cut.run()["interrupted"]
    assert signal.getsignal(number) == handler
    step = checkpoint.load(checkpoint.latest(tmp_path / "cut")).step
    text = capsys.readouterr().out
    assert step == 3 and f"--resume-from-step={step}" in text
    assert "finishing what is under way" in text
    resumed = trainer(tmp_path / "cut", resume=step, save_every=-1)
    assert not resumed.run()["interrupted"]
    assert_same(weights(resumed), weights(whole))


def test_nothing_is_saved_where_that_is_asked_for(tmp_path, capsys):
    trainer(tmp_path / "whole", save_every=-2).run()
    kill = {4: lambda: os.kill(os.getpid(), signal.SIGINT)}
    cut = trainer(tmp_path / "cut", loader=Batches(hooks=kill), save_every=-2)
    assert cut.run()["interrupted"]
    assert "stopped after step 3 of 8; nothing is saved" in capsys.readouterr().out
    for name in ("whole", "cut"):
        assert checkpoint.latest(tmp_path / name) is None
        assert not list((tmp_path / name).rglob("*.safetensors"))


@pytest.mark.parametrize("values", [{}, FACTORED], ids=["dense", "factors"])
def test_a_nan_stops_before_it_reaches_a_weight(values, tmp_path):
    model = stirred(small(), std=0.05)
    built = trainer(tmp_path, model=model, **values)

    def spoil():
        weight = model.transformer["h"][1].attn.c_k.weight
        weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("nan")))

    built.loader.hooks[4] = spoil  # fetched during step 2, so step 3 has the NaN
    with pytest.raises(guard.NonFiniteError, match=r"h\.1\.attn\.c_k\.weight"):
        built.run()
    report = json.loads((tmp_path / guard.REPORT).read_text())
    assert report["first_step"] == report["step"] == 3 and len(report["last_losses"]) == 4
    assert report["weights"] == [] and "matrix_grad" in report["learning_rates"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_between_log_lines_the_first_bad_step_is_remembered(tmp_path):
    model = stirred(small(), std=0.05)
    built = trainer(tmp_path, model=model, log_every=4)
    built.loader.hooks[2] = lambda: model.lm_head.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(guard.NonFiniteError, match="first at step 1"):
        built.run()
    assert json.loads((tmp_path / guard.REPORT).read_text())["step"] == 3


def test_a_micro_batch_without_targets_is_no_nan(tmp_path):
    built = trainer(tmp_path, steps=4, total_batch_size=160)
    fetch = built.loader.next_batch

    def some_empty():
        idx, targets = fetch()
        return idx, torch.full_like(targets, -1) if built.loader.at % 3 == 0 else targets

    built.loader.next_batch = some_empty
    built.run()
    assert all(torch.isfinite(p).all() for p in built.model.parameters())


def _worker(rank, world, port, folder, values):
    torch.set_num_threads(1)
    environment = {"MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world}
    os.environ.update({k: str(v) for k, v in environment.items()}, MASTER_ADDR="127.0.0.1")
    processes = setup.Processes(rank, rank, world)
    with processes.joined(torch.device("cpu")):
        _train_and_resume(rank, world, processes, folder, values)


def _train_and_resume(rank, world, processes, folder, values):
    built = trainer(folder, 4, Batches(4, rank, world), processes, save_every=2, **values)
    built.run()
    torch.save(weights(built), os.path.join(folder, f"weights_{rank}.pt"))
    again = trainer(
        folder, 4, Batches(4, rank, world), processes, resume=2, save_every=-1, **values
    )
    again.run()
    assert_same(weights(again), weights(built))


@pytest.mark.parametrize(
    "values",
    [{}, {**FACTORED, **ADAPTIVE, "streaming_rank_interval": 2}],
    ids=["dense", "factors"],
)
def test_two_processes_equal_one_with_twice_the_micro_batches(values, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = trainer(tmp_path / "one", 4, total_batch_size=160, save_every=-1, **values)
    one.run()
    folder = tmp_path / "two"
    torch.multiprocessing.spawn(_worker, (2, port, str(folder), values), nprocs=2)
    both = [torch.load(folder / f"weights_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same(both[0], both[1])
    assert 4 not in layer_ranks(one.model).values(), "the ranks were to change on the way"
    assert_same(weights(one), both[0], exact=False)
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (checkpoint.latest(folder) / "rank_1.safetensors").exists()
