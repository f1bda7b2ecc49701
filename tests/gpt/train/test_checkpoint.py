"""Checkpoints: nothing lost, nothing half-written, no pickle."""

import json

import pytest
import torch

from molegrad import bases_state_dict, convert
from molegrad.gpt.train import checkpoint
from molegrad.gpt.train.checkpoint import Record, Store
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.gpt.train.setup import build_optimizers
from tests.gpt.model.test_gpt import small, stirred, tokens

CONFIG = resolve(BaseTrainConfig(), torch.device("cpu"))
MODES = [None, "grad", "factors"]


def trained(mode, seed=0, steps=3):
    """A model, its optimizers after a few steps, both with every kind of state."""
    model = stirred(small())
    if mode:
        convert(
            model,
            rank_k=4,
            target_layers="all",
            gradient_mode=mode,
            probes=2,
            min_layer_utilization=0,
        )
    optimizers = build_optimizers(model, CONFIG)
    for step in range(steps):
        advance(model, optimizers, seed + step)
    return model, optimizers


def advance(model, optimizers, seed):
    loss = model(*tokens(seed=seed))
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


class Loader:
    def __init__(self, position):
        self.position = position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("mode", MODES)
def test_everything_that_determines_the_next_step_comes_back(mode, tmp_path):
    model, optimizers = trained(mode)
    torch.manual_seed(11)
    record = Record(loader=Loader(7).state_dict(), extra={"note": "x"})
    folder = Store(tmp_path, {"depth": 2}).save(3, model, optimizers, record)
    drawn = torch.rand(4)
    expected = [advance(model, optimizers, seed) for seed in (20, 21, 22)]

    other, other_optimizers = trained(mode, seed=50, steps=1)
    saved = checkpoint.load(folder)
    loader = Loader(0)
    checkpoint.restore(saved, other, other_optimizers, loader)
    assert (saved.step, saved.config, saved.extra) == (3, {"depth": 2}, {"note": "x"})
    assert loader.position == 7 and torch.equal(torch.rand(4), drawn)
    assert [advance(other, other_optimizers, seed) for seed in (20, 21, 22)] == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for name, tensor in bases_state_dict(model).items():
        same = torch.equal(tensor.nan_to_num(), bases_state_dict(other)[name].nan_to_num())
        assert same, name


def test_the_files_are_safetensors_and_json(tmp_path):
    folder = Store(tmp_path).save(1, *trained("factors"))
    assert sorted(p.name for p in folder.iterdir()) == [
        "meta.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rank_0.json",
        "rank_0.safetensors",
    ]
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def test_a_bare_model_is_rebuilt_for_evaluation(tmp_path):
    model, optimizers = trained("grad")
    Store(tmp_path, {"run": "a"}).save(1, model, optimizers)
    rebuilt, meta = checkpoint.load_model(checkpoint.find(tmp_path))
    idx, _ = tokens()
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(idx), model.eval()(idx))
    assert not rebuilt.training and meta["step"] == 1 and meta["config"] == {"run": "a"}
    assert all(p.requires_grad for p in rebuilt.parameters())


def test_newest_whole_one_is_found_and_old_ones_go(tmp_path, capsys):
    model, optimizers = trained(None, steps=0)
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 200):
        Store(tmp_path, keep_last=2).save(step, model, optimizers)
    (tmp_path / "step_000300.tmp").mkdir()  # a save that was killed
    (tmp_path / "step_000400").mkdir()  # no meta.json
    names = [p.name for p in checkpoint.step_folders(tmp_path)]
    assert names == ["step_000010", "step_000200", "step_000400"]
    assert checkpoint.latest(tmp_path).name == "step_000200"
    assert "step_000400, which is not whole: meta.json is missing" in capsys.readouterr().out
    assert checkpoint.find(tmp_path, 10).name == "step_000010"
    with pytest.raises(FileNotFoundError, match="has steps 10, 200, 400, not a .* step 7"):
        checkpoint.find(tmp_path, 7)
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        checkpoint.find(tmp_path / "elsewhere")


def test_what_does_not_fit_is_named(tmp_path):
    model, optimizers = trained("grad")
    folder = Store(tmp_path).save(1, model, optimizers)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="written by 1 processes, this run has 2"):
        checkpoint.load(folder, world_size=2)
    saved = checkpoint.load(folder)
    plain, plain_optimizers = trained(None)
    with pytest.raises(RuntimeError, match="bases do not fit"):
        checkpoint.restore(saved, plain, plain_optimizers)
    with pytest.raises(ValueError, match="holds 2 optimizers, this run has 1"):
        checkpoint.restore(saved, model, optimizers[:1])
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads up to 2"):
        checkpoint.load(folder)


def test_a_run_of_the_former_format_is_not_resumed_and_its_weights_load(tmp_path):
    model, optimizers = trained("grad")
    folder = Store(tmp_path).save(1, model, optimizers)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    with pytest.raises(ValueError, match="saved in format 1, .*cannot be resumed .*still load"):
        checkpoint.load(checkpoint.find(tmp_path))
    rebuilt, meta = checkpoint.load_model(folder)
    assert meta["format"] == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor)


def test_nested_state_survives_the_file(tmp_path):
    state = {"a": [1, (2.5, None)], 3: {"t": torch.arange(3), "flag": True}, "empty": {}}
    tensors = {}
    tree = json.loads(json.dumps(checkpoint._flatten(state, tensors)))
    back = checkpoint._unflatten(tree, tensors)
    assert torch.equal(back[3].pop("t"), state[3].pop("t")) and back == state
    with pytest.raises(TypeError, match="/a/0 is a set"):
        checkpoint._flatten({"a": [{1}]}, {})
