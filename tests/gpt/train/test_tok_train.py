import dataclasses
import json

import pytest

from molegrad.gpt import paths
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.train.tok_train import TokTrainConfig, compression, limited_texts, main, tok_train


@pytest.fixture
def text_file(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.ENV, str(tmp_path / "home"))
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"The value of item {i} is {i * i}. " * 8 for i in range(400)))
    return path


def test_the_command(text_file, capsys):
    assert main([f"--data={text_file}", "--vocab-size=300"]) == 0
    assert "vocabulary  300 entries" in capsys.readouterr().out
    assert main(["--data=nowhere.txt"]) == 2
    assert capsys.readouterr().err.startswith("tok_train: ")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "usage: python -m scripts.tok_train" in capsys.readouterr().out


def test_trains_saves_and_records(text_file, capsys):
    config = TokTrainConfig(run="first", data=str(text_file), vocab_size=300)
    manifest = tok_train(config)
    tokenizer = Tokenizer.load(paths.tokenizer_dir())
    assert tokenizer.vocab_size == 300 and tokenizer.fingerprint == manifest["fingerprint"]
    saved = [paths.tokenizer_dir() / "manifest.json", paths.run_dir("first") / "tok_train.json"]
    for path in saved:
        assert json.loads(path.read_text()) == json.loads(json.dumps(manifest))
    corpus = open_corpus(str(text_file))
    assert manifest["corpus"]["sha256"] == corpus.manifest["sha256"]
    assert manifest["bytes_per_token"] > 1.5
    assert f"{manifest['bytes_per_token']:.3f} bytes per token" in capsys.readouterr().out


def test_a_named_tokenizer_leaves_the_default_one_alone(text_file):
    tok_train(TokTrainConfig(data=str(text_file), vocab_size=300))
    tok_train(TokTrainConfig(data=str(text_file), vocab_size=265, tokenizer="bytes"))
    assert Tokenizer.load(paths.tokenizer_dir()).vocab_size == 300
    assert Tokenizer.load(paths.tokenizer_dir("bytes")).vocab_size == 265


def test_compression_counts_held_out_text(text_file):
    corpus = open_corpus(str(text_file))
    tokenizer = Tokenizer.train(corpus.texts("train"), 280)
    found = compression(tokenizer, corpus)
    texts = list(corpus.texts("val"))
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert (found["held_out_bytes"], found["held_out_tokens"]) == (size, tokens)
    assert found["bytes_per_token"] == size / tokens and found["round_trip_exact"]


def test_limited_texts(text_file):
    corpus = open_corpus(str(text_file))
    texts = list(limited_texts(corpus, max_chars=2500, doc_cap=1000))
    assert [len(text) for text in texts] == [1000, 1000, 500]
    assert sum(map(len, limited_texts(corpus, 10**9, 10**9))) == sum(
        map(len, corpus.texts("train"))
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_chars", 0), ("doc_cap", 0), ("max_bytes", -1), ("run", "a/b"), ("tokenizer", "a/b")],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=str(value)):
        TokTrainConfig(**{field: value})


def test_a_small_vocabulary_is_refused_before_anything_is_saved(text_file):
    with pytest.raises(ValueError, match="vocab_size=100"):
        tok_train(TokTrainConfig(data=str(text_file), vocab_size=100))
    assert not list(paths.tokenizer_dir().iterdir())


def test_every_flag_has_help():
    assert all(field.metadata.get("help") for field in dataclasses.fields(TokTrainConfig))
