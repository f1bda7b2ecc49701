"""The export of a run, and that nothing in the package unpickles."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import molegrad
from molegrad.gpt import runs
from molegrad.gpt.export import main


@pytest.mark.parametrize("kind", ["hf", "nanochat", "safetensors"])
def test_the_command_writes_a_run(kind, tiny, tmp_path, capsys):
    output = tmp_path / "out"
    line = ["--run=tiny", "--stage=base", f"--format={kind}", f"--output={output}"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in output.iterdir())
    head = runs.open_stage("tiny", "base").model.lm_head.weight
    if kind == "nanochat":
        found = torch.load(output / "model_000060.pt", weights_only=True)
        meta = json.loads((output / "meta_000060.json").read_text())
        assert meta["step"] == 60 and meta["user_config"]["depth"] == 2 and meta["val_bpb"] > 1
    else:
        found = load_file(output / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], head)
    assert main(line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*line, "--overwrite", "--dtype=bfloat16"]) == 0
    assert not list(output.glob("*.part"))
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1


def test_the_command_says_what_is_wrong(tiny, tmp_path, capsys):
    out = f"--output={tmp_path}"
    assert main(["--run=nobody", out]) == 2 and "nobody" in capsys.readouterr().err
    assert main(["--run=tiny", "--step=7", out]) == 2
    assert "not a checkpoint of step 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--run=tiny"])
    assert "--output=DIR" in capsys.readouterr().err
    assert main(["--run=tiny", "--format=safetensors", out]) == 0  # auto: fine-tuned
    sft = runs.open_stage("tiny", "sft").model.lm_head.weight
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], sft)


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def unsafe_uses(source):
    """Imports and calls that unpickle, as text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in UNSAFE]
        elif isinstance(node, ast.ImportFrom) and node.module in UNSAFE:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            unsafe = (
                (called == "torch.load" and given.get("weights_only") != "True")
                or (called == "np.load" and given.get("allow_pickle", "False") != "False")
                or called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
            )
            found += [ast.unparse(node)] if unsafe else []
    return found


def test_nothing_is_unpickled():
    package = Path(molegrad.__file__).parent
    files = [*package.rglob("*.py"), *(package.parent / "scripts").rglob("*.py")]
    assert len(files) > 60
    uses = {str(p): unsafe_uses(p.read_text(encoding="utf-8")) for p in files}
    assert {path: found for path, found in uses.items() if found} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from shelve import open",
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
    ],
)
def test_the_search_finds(line):
    assert unsafe_uses(line)
    assert not unsafe_uses("torch.load(path, weights_only=True); np.load(path); yaml.safe_load(t)")
