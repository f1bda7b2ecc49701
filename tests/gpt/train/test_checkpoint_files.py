"""Folders of checkpoints: whole or absent, whatever is killed, full or damaged."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from molegrad.gpt.train import checkpoint, checkpoint_files
from molegrad.gpt.train.checkpoint import Record, Store
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.gpt.train.setup import build_optimizers
from tests.gpt.model.test_gpt import small, stirred, tokens

CONFIG = resolve(BaseTrainConfig(), torch.device("cpu"))
FILES = [
    "meta.json",
    "model.safetensors",
    "optimizer.safetensors",
    "rank_0.json",
    "rank_0.safetensors",
]


def trained():
    model = stirred(small())
    optimizers = build_optimizers(model, CONFIG)
    model(*tokens()).backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


@pytest.fixture(scope="module")
def parts():
    return trained()


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def cut(path, count=1):
    path.write_bytes(path.read_bytes()[:-count])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
def test_a_damaged_one_is_left_out_and_the_one_before_taken(name, damage, parts, tmp_path, capsys):
    for step in (1, 2):
        Store(tmp_path).save(step, *parts)
    newest = checkpoint.latest(tmp_path)
    assert newest.name == "step_000002" and capsys.readouterr().out == ""
    if (name, damage) == ("meta.json", flip):
        (newest / name).write_text((newest / name).read_text().replace("{", "[", 1))
    else:
        damage(newest / name)
    assert checkpoint.latest(tmp_path).name == "step_000001"
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "step_000002, which is not whole: " in line
    assert name in line or "can't be read" in line
    assert checkpoint.find(tmp_path).name == "step_000001"
    with pytest.raises(ValueError, match="step_000002 is not whole: .*name another step"):
        checkpoint.find(tmp_path, 2)
    checkpoint.load(checkpoint.latest(tmp_path))


def test_none_is_whole(parts, tmp_path, capsys):
    cut(Store(tmp_path).save(1, *parts) / "model.safetensors")
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="has steps 1, not a whole checkpoint"):
        checkpoint.find(tmp_path)


def test_old_ones_go_and_damaged_ones_do_not_count(parts, tmp_path):
    for step in (1, 2, 3):
        Store(tmp_path).save(step, *parts)
    cut(tmp_path / "step_000003/model.safetensors")
    (tmp_path / "step_000001.tmp").mkdir()
    Store(tmp_path, keep_last=2).save(4, *parts)
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000004"]
    Store(tmp_path, keep_last=2).save(5, *parts)
    assert names(tmp_path) == ["step_000004", "step_000005"]


def test_going_back_leaves_no_newer_one_in_the_way(parts, tmp_path, capsys):
    for step in (1, 2, 3):
        Store(tmp_path).save(step, *parts)
    checkpoint_files.set_aside_after(tmp_path, 1)
    assert capsys.readouterr().out.count("goes on from step 1") == 2
    assert checkpoint.latest(tmp_path).name == "step_000001"
    Store(tmp_path, keep_last=1).save(2, *parts)
    checkpoint_files.set_aside_after(tmp_path, 1, say=lambda text: None)
    aside = ["step_000002.2.abandoned", "step_000002.abandoned", "step_000003.abandoned"]
    assert names(tmp_path) == aside
    checkpoint_files.remove_all(tmp_path)
    assert names(tmp_path) == []


def test_a_save_does_not_delete_itself_where_later_ones_are(parts, tmp_path):
    for step in (5, 6, 2):
        Store(tmp_path, keep_last=1).save(step, *parts)
    assert names(tmp_path) == ["step_000002", "step_000006"]


def test_a_replaced_one_counts_until_the_new_one_is_there(parts, tmp_path):
    folder = Store(tmp_path).save(3, *parts, Record(extra={"count": 1}))
    os.replace(folder, tmp_path / "step_000003.old")  # killed between the two renames
    assert checkpoint.load(checkpoint.latest(tmp_path)).extra == {"count": 1}
    assert checkpoint.find(tmp_path, 3).name == "step_000003.old"
    Store(tmp_path).save(4, *parts)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    Store(tmp_path).save(3, *parts, Record(extra={"count": 2}))
    assert checkpoint.load(tmp_path / "step_000003").extra == {"count": 2}
    assert names(tmp_path) == ["step_000003", "step_000004"]


# A full disk


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_the_earlier_ones(name, parts, tmp_path, monkeypatch):
    earlier = Store(tmp_path).save(1, *parts)
    before = contents(earlier)
    for kind in ("_write_tensors", "_write_json"):
        write = getattr(checkpoint, kind)

        def full(path, value, write=write):
            write(path, value)
            if path.name == name:
                cut(path, 10)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(checkpoint, kind, full)
    for step in (1, 2):
        with pytest.raises(OSError, match="disk is full.*lower --keep-last.*--resume") as caught:
            Store(tmp_path, keep_last=1).save(step, *parts)
        assert caught.value.errno == errno.ENOSPC and "(step_000001)" in str(caught.value)
        assert names(tmp_path) == ["step_000001"]
    assert checkpoint.latest(tmp_path) == earlier and contents(earlier) == before


@pytest.mark.parametrize("name", FILES)
def test_the_system_refuses_a_byte_in_a_file(name, parts, tmp_path):
    resource = pytest.importorskip("resource")
    earlier = Store(tmp_path).save(1, *parts)
    before = contents(earlier)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(before[name]) > 300
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[name]) - 1, limits[1]))
    try:
        with pytest.raises(OSError, match="was not saved.*earlier checkpoints are untouched"):
            Store(tmp_path).save(2, *parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step_000001"] and contents(earlier) == before
    Store(tmp_path).save(2, *parts)
    assert checkpoint.latest(tmp_path).name == "step_000002"


def test_what_is_no_fault_of_the_disk_is_not_called_one(parts, tmp_path):
    with pytest.raises(TypeError, match="which a checkpoint cannot hold"):
        Store(tmp_path).save(1, *parts, Record(loader={"a": {1}}))
    assert names(tmp_path) == []


# Killed while it saves


def count_of(folder):
    """The counter of the newest whole checkpoint, all of which is read."""
    newest = checkpoint.latest(folder, say=lambda text: None)
    return checkpoint.load(newest).extra["count"] if newest else 0


def save_at(folder, parts, count, same_step):
    record = Record(extra={"count": count})
    Store(folder, keep_last=2).save(1 if same_step else count, *parts, record)


def in_child(action):
    """Process id of a fork that does `action` and nothing else."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def killed_at_every_call(folder, same_step):
    """A save is killed at its 1st, 2nd, ... call that the file system sees, until one survives."""
    parts, count, at, died = trained(), 1, 0, True
    save_at(folder, parts, count, same_step)

    def dying():
        left = [at]

        def hook(event, arguments):
            if arguments and str(folder) in str(arguments[0]) and event != "import":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save_at(folder, parts, count + 1, same_step)

    while died:
        at += 1
        died = os.WIFSIGNALED(os.waitpid(in_child(dying), 0)[1])
        found = count_of(folder)
        assert found in (count, count + 1), (at, found, count, names(folder))
        assert not any(map(checkpoint_files.flaw, checkpoint_files.folders(folder))), at
        count = found
    assert at > 20, f"only {at} calls were seen"


def killed_at_any_time(folder, seed, same_step):
    """A process that saves in a loop is killed some time after its 1st, 2nd or 3rd save, several
    times over."""
    draw, parts = random.Random(seed), trained()
    for _ in range(6):
        start, (done, tell) = count_of(folder), os.pipe()

        def saving(start=start, tell=tell):
            for count in range(start + 1, start + 10_000):
                save_at(folder, parts, count, same_step)
                os.write(tell, b".")

        pid = in_child(saving)
        os.close(tell)
        with open(done, "rb", buffering=0) as file:
            known = start + sum(len(file.read(1)) for _ in range(draw.randint(1, 3)))
            time.sleep(draw.uniform(0.0, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            known += len(file.read())
        found = count_of(folder)
        assert found in (known, known + 1), (found, known, names(folder))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("same_step", [False, True], ids=["steps", "same-step"])
def test_a_killed_process_costs_at_most_the_save_it_was_at(same_step, tmp_path):
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from tests.gpt.train import test_checkpoint_files as test\n"
        f"test.killed_at_every_call(Path({str(tmp_path / 'calls')!r}), {same_step})\n"
        f"for seed in (0, 1): test.killed_at_any_time(Path({str(tmp_path)!r}) / f'time_{{seed}}', "
        f"seed, {same_step})\n"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, check=True)
