import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from molegrad.gpt import paths
from molegrad.gpt.data import sources, tokens
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.data.tokens import CorpusTokens


@pytest.fixture
def text_file(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.ENV, str(tmp_path))
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"paragraph {i} " + f"w{i} " * 60 for i in range(300)))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(["paragraph number w1 w2 " * 20]), 266)


def test_documents_are_those_of_the_corpus(text_file, tokenizer):
    corpus = open_corpus(str(text_file))
    source = CorpusTokens(corpus, "train", tokenizer)
    shard = source.shard(0)
    texts = list(corpus.texts("train"))
    assert source.num_shards == 1 and len(shard) == len(texts) > 5
    assert shard.tokens.dtype == np.uint16 and isinstance(shard.tokens, np.memmap)
    for index, text in enumerate(texts):
        document = shard.document(index)
        assert document[0] == tokenizer.bos
        assert tokenizer.decode(document[1:]) == text


def test_second_opening_reads_the_cache(text_file, tokenizer, monkeypatch):
    first = CorpusTokens(open_corpus(str(text_file)), "val", tokenizer)
    expected = np.array(first.shard(0).tokens)
    monkeypatch.setattr(Tokenizer, "encode_arrays", lambda *a: pytest.fail("encoded again"))
    again = CorpusTokens(open_corpus(str(text_file)), "val", tokenizer)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.shard(0).tokens, expected)


def test_key_depends_on_text_tokenizer_and_limit(text_file, tokenizer):
    def fingerprint(tok=tokenizer, **options):
        return CorpusTokens(open_corpus(str(text_file), **options), "train", tok).fingerprint

    prints = [fingerprint(), fingerprint(max_bytes=3000)]
    prints.append(fingerprint(Tokenizer.train(iter(["other text"]), 266)))
    text_file.write_text(text_file.read_text().replace("w7", "v7"))
    prints.append(fingerprint())
    assert len(set(prints)) == 4


def test_parts_are_shards_encoded_when_needed(text_file, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 15_000)
    monkeypatch.setattr(tokens, "_BATCH_CHARS", 6_000)
    corpus = open_corpus(str(text_file))
    source = CorpusTokens(corpus, "train", tokenizer)
    assert source.num_shards == len(corpus.train) > tokens._OPEN_SHARDS
    folder = tmp_path / "data" / "tokens"
    assert not list(folder.glob("*.bin"))
    source.prefetch(1)
    source.shard(1)
    assert len(list(folder.glob("*.bin"))) == 1
    decoded = [
        tokenizer.decode(source.shard(s).document(d)[1:])
        for s in range(source.num_shards)
        for d in range(len(source.shard(s)))
    ]
    assert decoded == list(corpus.texts("train"))
    assert len(source._open) <= tokens._OPEN_SHARDS
    assert not list(folder.glob("*.part"))
    limited = open_corpus(str(text_file), max_bytes=20_000)
    source = CorpusTokens(limited, "train", tokenizer)  # across parts: one shard
    assert source.num_shards == 1
    assert len(source.shard(0)) == len(list(limited.texts("train")))


def test_prefetch_error_comes_out_where_the_shard_is_used(text_file, tokenizer):
    source = CorpusTokens(open_corpus(str(text_file)), "train", tokenizer)
    text_file.unlink()
    source.prefetch(0)
    with pytest.raises(FileNotFoundError, match="a.txt"):
        source.shard(0)


def test_several_processes_encode_a_shard_once(text_file, tokenizer, monkeypatch):
    corpus = open_corpus(str(text_file))
    calls = []
    encode = Tokenizer.encode_arrays

    def slow(self, texts):
        calls.append(len(texts))
        time.sleep(0.2)
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_arrays", slow)
    sources = [CorpusTokens(corpus, "train", tokenizer) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        shards = list(pool.map(lambda source: source.shard(0), sources))
    assert len(calls) == 1
    assert all(np.array_equal(shard.tokens, shards[0].tokens) for shard in shards)


def test_damaged_cache_is_named(text_file, tokenizer, tmp_path):
    corpus = open_corpus(str(text_file))
    CorpusTokens(corpus, "train", tokenizer).shard(0)
    (file,) = (tmp_path / "data" / "tokens").glob("*.bin")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file.name}.*delete both files"):
        CorpusTokens(corpus, "train", tokenizer).shard(0)
