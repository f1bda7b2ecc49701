"""Export and import: the same logits in every format, and nothing unpickled."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import molegrad
from molegrad import MoleGradConfig, convert
from molegrad.gpt import runs as stages
from molegrad.gpt.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from molegrad.gpt.model import export
from molegrad.gpt.model.export_tokenizer import huggingface_tokenizer, save_huggingface
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.train import checkpoint
from tests.gpt.data.test_tokenizer import SAMPLES, VOCAB
from tests.gpt.model.test_gpt import small, stirred, tokens

MODELS = {
    "plain": {},
    "grouped": {"kv_groups": 2},
    "rounded-width": {"depth": 3, "aspect_ratio": 27},
    "no-softcap": {"softcap": 0.0, "rope_base": 500.0},
}


@pytest.fixture(scope="module")
def tokenizer():
    text = "Return the product of the matrices; it's 12345 naïve 漢字 \n\n  times.\n"
    return Tokenizer.train((text * 9 + f"word{i}" for i in range(40)), VOCAB)


def model_of(name, std=0.3):
    return stirred(small(**MODELS[name]), std).eval()


def logits(model, length=20):
    with torch.no_grad():
        out = model(tokens(length=length)[0])
    return getattr(out, "logits", out)


def assert_same(a, b):
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].float(), theirs[name].float()), name
    assert torch.equal(logits(a), logits(b))


class PlainBlock(nn.Module):
    """A block's matrices as somebody else writes them down."""

    def __init__(self, width):
        super().__init__()
        for part, names in (("attn", ("c_q", "c_k", "c_v", "c_proj")), ("mlp", ("c_fc", "c_proj"))):
            sizes = {"c_fc": (width, 4 * width)}
            if part == "mlp":
                sizes["c_proj"] = (4 * width, width)
            linears = {n: nn.Linear(*sizes.get(n, (width, width)), bias=False) for n in names}
            setattr(self, part, nn.ModuleDict(linears))


@pytest.mark.parametrize("mode", ["dense", "factored", "momentum"])
def test_weights_load_into_plain_linear_layers(mode, tmp_path):
    model = stirred(small())
    kind = {"method": "sampled", "gradient_mode": mode} if mode == "momentum" else {}
    kind = kind or {"rank_k": 4, "gradient_mode": mode}
    convert(model, MoleGradConfig(target_layers="all", min_layer_utilization=0, **kind))
    folder = checkpoint.save(tmp_path, 1, model)
    plain = nn.Module()
    plain.transformer = nn.ModuleDict(
        {"wte": nn.Embedding(61, 64), "h": nn.ModuleList(PlainBlock(64) for _ in range(2))}
    )
    plain.lm_head = nn.Linear(64, 61, bias=False)
    plain.load_state_dict(load_file(folder / "model.safetensors"))  # strict
    expected = model.transformer["h"][1].mlp.c_fc.weight
    assert torch.equal(plain.transformer["h"][1].mlp["c_fc"].weight, expected)
    assert_same(checkpoint.load_model(folder)[0], GPT.eval(_deconverted(model)))


def _deconverted(model):
    plain = GPT(model.config)
    plain.load_state_dict(model.state_dict())
    return plain


WRITE = {
    "hf": export.to_huggingface,
    "nanochat": lambda model, folder: export.to_nanochat(model, folder, dtype=torch.float32),
    "safetensors": export.to_safetensors,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", WRITE)
def test_what_is_written_is_read_back(kind, name, tmp_path):
    model = model_of(name)
    if kind == "nanochat" and name == "no-softcap":
        with pytest.raises(ValueError, match=r"softcap=0.0, not 15.0, rope_base=500.0"):
            export.to_nanochat(model, tmp_path)
        assert list(tmp_path.iterdir()) == []
        return
    WRITE[kind](model, tmp_path)
    back = export.load(tmp_path)
    sizes = ("width", "n_head", "n_kv_head", "max_seq_len")
    for size in sizes:
        assert getattr(back.config, size) == getattr(model.config, size), size
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[key]), key
    assert torch.equal(logits(back), logits(model)) and not back.training
    assert all(p.requires_grad for p in back.parameters())
    with pytest.raises(FileExistsError, match="another --output, or --overwrite"):
        WRITE[kind](model, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_same_logits(name, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = model_of(name)
    export.to_huggingface(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.dtype == torch.float32
    expected = logits(model)
    assert expected.std() > 1, "the logits must depend on what is compared"
    torch.testing.assert_close(logits(theirs.eval()), expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert torch.equal(logits(export.from_huggingface(tmp_path / "theirs")), expected)


def test_transformers_goes_on_writing_as_we_do(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from molegrad.gpt.model.engine import generate

    model = stirred(small(vocab_size=VOCAB), 0.3).eval()
    export.to_huggingface(model, tmp_path, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = [tokenizer.bos, 7, 40, 11]
    stop = [tokenizer.bos, tokenizer.special("<|assistant_end|>")]
    ours = list(generate(model, prompt, 12, temperature=0.0, stop_tokens=stop))
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    assert out[4 : 4 + len(ours)] == ours and len(ours) > 2


def test_the_nanochat_layout(tmp_path):
    model = model_of("grouped")
    written = export.to_nanochat(model, tmp_path, 1200, {"val_bpb": 0.9})
    assert [p.name for p in written] == ["model_001200.pt", "meta_001200.json"]
    meta = json.loads(written[1].read_text())
    assert meta["val_bpb"] == 0.9 and meta["model_config"] == {
        "sequence_len": 24, "vocab_size": 61, "n_layer": 2, "n_head": 4, "n_kv_head": 2,
        "n_embd": 64,
    }  # fmt: skip
    tensors = torch.load(written[0], weights_only=True)
    assert tensors.keys() == model.state_dict().keys()
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    assert dtypes.pop("transformer.wte.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    # Compiled models are saved under other names; the newest step is taken.
    torch.save({f"_orig_mod.{k}": v for k, v in tensors.items()}, tmp_path / "model_001300.pt")
    (tmp_path / "meta_001300.json").write_text(json.dumps(meta))
    back = export.from_nanochat(tmp_path)
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)
    with pytest.raises(FileNotFoundError, match="has steps 1200, 1300"):
        export.from_nanochat(tmp_path, 7)
    tensors["resid_lambdas"] = torch.ones(2)
    torch.save(tensors, tmp_path / "model_001300.pt")
    with pytest.raises(ValueError, match=r"not of this architecture .* resid_lambdas \(2,\)"):
        export.from_nanochat(tmp_path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran_code"),))


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = export.to_nanochat(model_of("plain"), tmp_path)
    torch.save({"lm_head.weight": Evil()}, written[0])
    with pytest.raises(Exception, match="[Ww]eights.only"):
        export.from_nanochat(tmp_path)
    assert not (tmp_path / "ran_code").exists()


def test_other_models_are_refused_by_name(tmp_path):
    export.to_huggingface(model_of("plain"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in [
        ({"model_type": "llama"}, "model_type='llama'"),
        (
            {"hidden_act": "gelu", "intermediate_size": 99},
            "hidden_act='gelu'.*intermediate_size=99",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"num_hidden_layers": 3}, "not of this architecture"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"num_hidden_layers": 65}, "does not reach"),
    ]:
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            export.from_huggingface(tmp_path)
    path.write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:60]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight \(6[01], 64\)"):
        export.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        export.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model_NNNNNN.pt"):
        export.load(tmp_path / "elsewhere")


# The tokenizer

TEXTS = [
    *SAMPLES[:4],
    "it's they'LL  here\n\n\n  x",
    "\r\n \x00",
    "Return the product of 12345678 matrices; naïve? 漢字漢 \n\n  times...\n" * 3,
    "ﬁ \u00a0\u2003 a\u0301 'RE +++///\n\n",
]


def test_the_tokenizer_gives_the_same_ids(tokenizer):
    pytest.importorskip("tokenizers")
    theirs = huggingface_tokenizer(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids) == text
    assert {name: theirs.token_to_id(name) for name in SPECIAL_TOKENS} == tokenizer.special_tokens
    assert theirs.get_vocab_size() == tokenizer.vocab_size


def test_transformers_renders_a_conversation_as_we_do(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    save_huggingface(tokenizer, tmp_path, 24)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.model_max_length) == (tokenizer.bos, 24)
    assert theirs.encode(TEXTS[-2]) == tokenizer.encode(TEXTS[-2])
    plain = theirs("a <|bos|> b", split_special_tokens=True)["input_ids"]
    assert plain == tokenizer.encode("a <|bos|> b")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is\n1 + 1? "},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.render_for_completion({"messages": messages})
    messages.append({"role": "assistant", "content": "Yes"})
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == tokenizer.render_conversation({"messages": messages})[0]


def test_without_the_package_the_model_is_written_alone(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    written = export.to_huggingface(small(vocab_size=VOCAB), tmp_path, tokenizer)
    assert [p.name for p in written] == ["config.json", "model.safetensors"]
    assert "only its ids are portable" in capsys.readouterr().out


# The command


@pytest.mark.parametrize("kind", ["hf", "nanochat", "safetensors"])
def test_the_command_writes_a_run(kind, tiny, tmp_path, capsys):
    output = tmp_path / "out"
    line = ["--run=tiny", "--stage=base", f"--format={kind}", f"--output={output}"]
    assert export.main(line) == 0
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in output.iterdir())
    opened = stages.open_stage("tiny", "base")
    exact = kind != "nanochat"  # whose embedding is bfloat16
    back = export.load(output)
    torch.testing.assert_close(
        logits(back), logits(opened.model), rtol=0, atol=0 if exact else 0.05
    )
    if kind == "nanochat":
        meta = json.loads((output / "meta_000060.json").read_text())
        assert meta["step"] == 60 and meta["user_config"]["depth"] == 2 and meta["val_bpb"] > 1
    assert export.main(line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert export.main([*line, "--overwrite", "--dtype=bfloat16"]) == 0
    assert export.load(output, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert not list(output.glob("*.part"))
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1


def test_the_command_says_what_is_wrong(tiny, tmp_path, capsys):
    out = f"--output={tmp_path}"
    assert export.main(["--run=nobody", out]) == 2 and "nobody" in capsys.readouterr().err
    assert export.main(["--run=tiny", "--step=7", out]) == 2
    assert "not a checkpoint of step 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main(["--run=tiny"])
    assert "--output=DIR" in capsys.readouterr().err
    assert export.main(["--run=tiny", "--format=safetensors", out]) == 0  # auto: fine-tuned
    sft = stages.open_stage("tiny", "sft").model
    assert torch.equal(export.load(tmp_path).lm_head.weight, sft.lm_head.weight)


# Unsafe loading anywhere in the package

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
            if called == "torch.load" and given.get("weights_only") != "True":
                found.append(ast.unparse(node))
            if (
                called in ("np.load", "numpy.load")
                and given.get("allow_pickle", "False") != "False"
            ):
                found.append(ast.unparse(node))
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                found.append(ast.unparse(node))
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
