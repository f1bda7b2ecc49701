"""Going on: within a step bit for bit, with other micro-batches where that is possible."""

import datetime
import errno
import os
import shutil
import signal
import socket

import pytest
import torch

from molegrad.gpt import paths
from molegrad.gpt.data.loader import PackedLoader
from molegrad.gpt.data.packing import ConversationLoader
from molegrad.gpt.train import base as train
from molegrad.gpt.train import checkpoint, resume, sft
from molegrad.gpt.train.flags import parse
from molegrad.gpt.train.setup import Processes
from tests.gpt.conftest import BASE, SFT
from tests.gpt.model.test_gpt import tokens
from tests.gpt.train.test_loop import (
    ADAPTIVE,
    FACTORED,
    PRESET,
    STREAM,
    Batches,
    assert_same,
    losses,
    trainer,
    weights,
)

TANGENT = {**STREAM, "streaming_method": "tangent"}
INT8 = {**PRESET, "streaming_momentum_dtype": "int8"}
METHODS = {
    "dense": {},
    "adamw": {"optimizer": "adamw", "grad_clip": 1.0},
    "tangent": {**TANGENT, "streaming_probes": 2},
    "power": {**STREAM, "streaming_method": "power"},
    "factors": {**FACTORED, "streaming_probes": 2, "grad_clip": 1.0},
    "factors-adaptive": {**FACTORED, **ADAPTIVE},
    "sampled": {**PRESET, "streaming_gradient_mode": "grad"},
    "momentum": PRESET,
    "momentum-int8": INT8,
}


def stop_now():
    os.kill(os.getpid(), signal.SIGINT)


def stopped_during(micro, built):
    """`built`, to which a signal comes in the forward pass of micro-batch number `micro`."""
    called, count = built.called, []

    def counted(*batch):
        count.append(0)
        if len(count) == micro:
            stop_now()
        return called(*batch)

    built.called = counted
    return built


def newest(folder):
    return checkpoint.load(checkpoint.latest(folder))


def resumed(folder, **values):
    return trainer(folder, resume=newest(folder).step, **values)


# In the middle of a step


@pytest.mark.parametrize("method", METHODS)
def test_a_signal_between_micro_batches_costs_nothing(method, tmp_path):
    values = {"steps": 3, "total_batch_size": 240, "save_every": -1, **METHODS[method]}
    whole = trainer(tmp_path / "whole", **values)
    whole.run()
    expected, recorded = weights(whole), losses(tmp_path / "whole")
    for stop in (1, 5):  # micro-batches done: within the first step and within the second one
        folder = tmp_path / str(stop)
        assert stopped_during(stop, trainer(folder, **values)).run()["interrupted"]
        saved = newest(folder)
        assert saved.step == stop // 3 and saved.extra["progress"]["micro"] == stop % 3
        assert saved.loader == {"at": stop} and "loss" in saved.accumulated
        again = resumed(folder, **values)
        assert not again.run()["interrupted"]
        assert_same(weights(again), expected)
        assert losses(folder) == recorded
        assert again.progress.flops == whole.progress.flops
        assert newest(folder).accumulated == {}


def test_a_run_may_be_stopped_at_every_micro_batch(tmp_path, capsys):
    values = {"steps": 2, "total_batch_size": 240, "save_every": -1, **INT8}
    whole = trainer(tmp_path / "whole", **values)
    whole.run()
    folder = tmp_path / "cut"
    stopped_during(1, trainer(folder, **values)).run()
    for done in range(2, 6):
        assert stopped_during(1, resumed(folder, **values)).run()["interrupted"]
        assert newest(folder).loader == {"at": done}
        assert checkpoint.latest(folder).name == f"step_{done // 3:06d}"
    text = capsys.readouterr().out
    assert "stopped after step 0 of 2 and 2 of 3 micro-batches of the next; saved" in text
    assert "stopped after step 1 of 2; saved" in text
    built = resumed(folder, **values)
    assert not built.run()["interrupted"]
    assert_same(weights(built), weights(whole))
    assert losses(folder) == losses(tmp_path / "whole")


def test_what_is_saved_between_log_lines_is_counted_after_them(tmp_path):
    values = {"steps": 6, "total_batch_size": 160, "log_every": 4, "save_every": 3}
    whole = trainer(tmp_path / "whole", **values)
    whole.run()
    folder = tmp_path / "cut"
    stopped_during(11, trainer(folder, **values)).run()
    saved = newest(folder).extra["progress"]
    assert (saved["step"], saved["micro"], saved["logged"]) == (5, 1, 4) and saved["pending"] > 0
    again = resumed(folder, **values)
    again.run()
    assert again.progress.flops == whole.progress.flops
    assert again.progress.seconds > saved["seconds"] + saved["pending"]
    middle = checkpoint.load(tmp_path / "whole/step_000003").extra["progress"]
    assert middle["logged"] == 0 and middle["pending"] > 0


def test_a_step_begun_earlier_is_not_compared_with_half_of_itself(tmp_path):
    values = {"steps": 2, "total_batch_size": 160, "monitor_every": 1, "save_every": -1, **TANGENT}
    stopped_during(1, trainer(tmp_path, **values)).run()
    built = resumed(tmp_path, **values)
    begun = []
    begin = built.instruments.begin
    built.instruments.begin = lambda step, **due: (begun.append((step, due)), begin(step, **due))
    built.run()
    assert begun[0] == (1, {"metrics": False, "shadow": False})
    assert begun[1] == (2, {"metrics": True, "shadow": False})


def test_the_accumulated_must_fit_the_model(tmp_path):
    built = trainer(tmp_path, **PRESET)
    state = resume.accumulated_state(built.model)
    assert state and all(name.startswith("momentum/") for name in state)
    name = next(iter(state))
    for wrong in ({}, {**state, name: torch.zeros(2)}, {**state, "grad/other": torch.zeros(2)}):
        with pytest.raises(ValueError, match="middle of a step.*resume with the same flags"):
            resume.load_accumulated(built.model, wrong)
    resume.load_accumulated(built.model, state)


# With other micro-batches


class Rows(Batches):
    """Rows in one order, whatever the batch size; like the real loaders."""

    def next_batch(self):
        rows = [tokens(1, 20, seed=self.at + i) for i in range(self.rows)]
        self.at += self.rows
        idx, targets = (torch.cat(part) for part in zip(*rows, strict=True))
        return idx, targets.clamp(min=0)


def with_rows(folder, rows, **values):
    return trainer(folder, loader=Rows(rows), device_batch_size=rows, **values)


LINEAR = ["dense", "adamw", "factors", "factors-adaptive"]


@pytest.mark.parametrize(
    ("method", "rows"),
    [(method, 2 if i % 2 else 8) for i, method in enumerate([*LINEAR, "sampled", "momentum"])]
    + [("factors", 2), ("momentum-int8", 8)],
)
def test_other_micro_batches_make_the_same_steps(method, rows, tmp_path, capsys):
    values = {"steps": 6, "total_batch_size": 160, "save_every": 3, **METHODS[method]}
    whole = with_rows(tmp_path, 4, **values)
    whole.run()
    expected, recorded = weights(whole), losses(tmp_path)
    again = with_rows(tmp_path, rows, resume=3, **values)
    again.run()
    assert again.loader.at == whole.loader.at + rows - 4  # and one batch that waits
    text = capsys.readouterr().out
    if method in LINEAR:
        assert f"was 4 and is {rows}: steps are the same up to rounding" in text
        assert_same(weights(again), expected, exact=False)
        assert losses(tmp_path) == pytest.approx(recorded, rel=1e-5)
    else:
        assert f"was 4 and is {rows}: steps are the same on average" in text
        assert losses(tmp_path) == pytest.approx(recorded, rel=0.03)
        assert losses(tmp_path) != recorded


@pytest.mark.parametrize("method", ["tangent", "power"])
def test_what_depends_on_micro_batches_is_refused(method, tmp_path):
    values = {"steps": 2, "total_batch_size": 160, **METHODS[method]}
    with_rows(tmp_path, 4, **values).run()
    message = f"method='{method}' in weight.grad .*another method.*batch-size=4"
    with pytest.raises(ValueError, match=message):
        with_rows(tmp_path, 2, resume=2, **values)
    with_rows(tmp_path, 4, resume=2, **values)


def test_another_number_of_tokens_is_another_step(tmp_path):
    with_rows(tmp_path, 4, steps=2, total_batch_size=160).run()
    with pytest.raises(ValueError, match="total_batch_size=160, this run has 320.*-size=160"):
        with_rows(tmp_path, 4, resume=2, total_batch_size=320)


@pytest.mark.parametrize("method", ["dense", "factors"])
def test_the_rest_of_a_step_may_have_other_micro_batches(method, tmp_path):
    values = {"steps": 3, "total_batch_size": 240, "save_every": -1, **METHODS[method]}
    whole = with_rows(tmp_path / "whole", 4, **values)
    whole.run()
    folder = tmp_path / "cut"
    stopped_during(4, with_rows(folder, 4, **values)).run()  # 1 of 3 of the second step
    assert newest(folder).extra["progress"]["micro"] == 1
    with pytest.raises(ValueError, match="4 sequences done.*no multiple of 6.*or a divisor of it"):
        with_rows(folder, 6, resume=1, **values)
    again = with_rows(folder, 2, resume=1, **values)
    assert again.progress.micro == 2 and again.sizes.accumulation == 6
    again.run()
    assert_same(weights(again), weights(whole), exact=False)
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


# Several processes


def full(path, value):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _signalled(rank, world, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    patience = datetime.timedelta(seconds=40)  # for processes that wait for one another
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=patience)
    processes = Processes(rank, rank, world)
    with processes.joined(torch.device("cpu")):
        _stop_and_save(folder, processes)


def _stop_and_save(folder, processes):
    rank, world = processes.rank, processes.world_size
    values = {"save_every": -1, "total_batch_size": 320, "log_every": 2}
    built = trainer(folder, 12, Batches(rank=rank, world=world), processes, **values)
    step = built.optimizers[0].step

    def signalled(*args):
        if rank == 1 and built.progress.step == 3:  # after the others know of step 4
            stop_now()
        return step(*args)

    built.optimizers[0].step = signalled
    assert built.run()["interrupted"] and built.progress.step == 6 and not built.progress.micro
    if rank == 1:  # a disk that is full for one of them
        checkpoint._write_json = full
    with pytest.raises(OSError, match="was not saved.*untouched .step_000006.*--resume") as caught:
        built.save()
    assert caught.value.errno == (errno.ENOSPC if rank else None)


def test_processes_stop_at_the_same_step_and_save_all_or_none(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_signalled, (2, port, tmp_path), nprocs=2)
    assert checkpoint.load(checkpoint.latest(tmp_path), world_size=2).step == 6
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_000006"]


# The commands


@pytest.fixture
def home(tiny_folder, tmp_path, monkeypatch):
    """A copy of the home with the run "tiny", to write into."""
    shutil.copytree(tiny_folder, tmp_path / "home")
    monkeypatch.setenv(paths.ENV, str(tmp_path / "home"))


def base(*words):
    return train.base_train(parse(train.BaseTrainConfig, [*BASE, "--eval-every=-1", *words]))


def tune(*words):
    few = ["--run=tiny", "--eval-every=-1", "--sample-every=-1", "--conversations=200"]
    return sft.chat_sft(parse(sft.SFTConfig, [*SFT, *few, *words]))


def same_models(*folders):
    states = [newest(folder).model for folder in folders]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def stop_at(monkeypatch, loader, count):
    """A signal while the loader makes its batch number `count`."""
    fetch, made = loader.next_batch, []

    def counted(self):
        made.append(0)
        if len(made) == count:
            stop_now()
        return fetch(self)

    monkeypatch.setattr(loader, "next_batch", counted)


@pytest.mark.parametrize(
    ("stage", "loader", "words"),
    [
        (base, PackedLoader, ["--total-batch-size=1536", "--streaming_preset=balanced"]),
        (tune, ConversationLoader, ["--total-batch-size=768"]),
    ],
    ids=["base", "sft"],
)
def test_the_commands_stop_and_resume_within_a_step(
    stage, loader, words, home, monkeypatch, capsys
):
    name = "--run=middle-" if stage is base else "--model-tag=middle-"
    words = [*words, "--num-iterations=4"]
    whole = stage(f"{name}whole", *words)
    with monkeypatch.context() as patch:
        stop_at(patch, loader, 5)
        cut = stage(f"{name}cut", *words)
    assert cut["interrupted"] and newest(cut["folder"]).extra["progress"]["micro"] == 2
    again = stage(f"{name}cut", *words, "--resume")
    assert not again["interrupted"] and "and 2 of 3 micro-batches" in capsys.readouterr().out
    same_models(whole["folder"], again["folder"])


@pytest.mark.parametrize(
    ("stage", "words", "rows"),
    [(base, ["--total-batch-size=1024"], 4), (tune, ["--total-batch-size=512"], 2)],
    ids=["base", "sft"],
)
def test_the_commands_take_other_micro_batches(stage, words, rows, home, capsys):
    name = "--run=other" if stage is base else "--model-tag=other"
    words = [name, *words, "--num-iterations=4", "--save-every=2", "--keep-last=0"]
    whole = stage(*words)
    expected = newest(whole["folder"])
    again = stage(*words, "--resume-from-step=2", f"--device-batch-size={rows}")
    text = capsys.readouterr().out
    assert f"and is {rows}: steps are the same up to rounding" in text
    assert ("mean over its own targets" in text) == (stage is tune)
    assert again["train/loss_raw"] == pytest.approx(whole["train/loss_raw"], rel=0.02)
    if stage is base:
        assert_same(newest(again["folder"]).model, expected.model, exact=False)
    assert "step_000004 is not of this run any more" in text
    aside = checkpoint.load(checkpoint.latest(again["folder"]).parent / "step_000004.abandoned")
    assert aside.step == 4 and torch.equal(
        aside.model["lm_head.weight"], expected.model["lm_head.weight"]
    )


def test_resume_takes_the_newest_whole_one(home, capsys):
    words = ["--run=damaged", "--num-iterations=4", "--save-every=2", "--keep-last=0"]
    whole = base(*words)
    expected = {name: tensor.clone() for name, tensor in newest(whole["folder"]).model.items()}
    folder = checkpoint.latest(whole["folder"]).parent
    path = folder / "step_000004/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    base(*words, "--resume")
    text = capsys.readouterr().out
    assert "step_000004, which is not whole: model.safetensors has" in text
    assert "resumed" in text and "at step 2" in text and "step_000004.abandoned" in text
    for name, tensor in newest(folder).model.items():
        assert torch.equal(tensor, expected[name]), name
    for step in (2, 4):
        (folder / f"step_{step:06d}/meta.json").write_text("{")
    with pytest.raises(ValueError, match="has 2 checkpoints and none is whole.*--overwrite"):
        base(*words, "--resume")
    with pytest.raises(ValueError, match="step_000002 is not whole"):
        base(*words, "--resume-from-step=2")
    with pytest.raises(ValueError, match="--resume goes on from it, --overwrite deletes it"):
        base(*words)
    base(*words, "--overwrite")
    names = sorted(p.name for p in folder.glob("step_*"))
    assert names == ["step_000002", "step_000004"]


@pytest.mark.parametrize(("stage", "loader"), [(base, PackedLoader), (tune, ConversationLoader)])
def test_if_needed_does_what_is_left(stage, loader, home, monkeypatch, capsys):
    name = "--run=needed" if stage is base else "--model-tag=needed"
    words = [name, "--num-iterations=4", "--if-needed"]
    with monkeypatch.context() as patch:
        stop_at(patch, loader, 3)
        cut = stage(*words)
    assert cut["interrupted"] and newest(cut["folder"]).step == 2
    capsys.readouterr()
    ended = stage(*words)
    assert not ended["interrupted"] and "at step 2" in capsys.readouterr().out
    done = stage(*words)
    text = capsys.readouterr().out
    assert done == {"interrupted": False, "folder": cut["folder"], "step": 4}
    assert "is done with these flags and data" in text and "step 0000" not in text
    again = stage(*words, "--weight-decay=0.1")
    text = capsys.readouterr().out
    assert "trained with other weight_decay: it is trained again" in text
    assert again["step"] == 4 and newest(cut["folder"]).config["weight_decay"] == 0.1


def test_fine_tuning_is_needed_again_where_its_base_model_is_another(home, capsys):
    words = ["--model-tag=after", "--num-iterations=1", "--if-needed"]
    tune(*words)
    base("--run=tiny", "--num-iterations=1", "--overwrite")
    capsys.readouterr()
    tune(*words)
    assert "trained with other base_step, inputs: it is trained again" in capsys.readouterr().out
