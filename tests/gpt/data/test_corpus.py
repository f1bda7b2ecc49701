import json
import logging
import sys

import pytest

from molegrad.gpt import paths
from molegrad.gpt.data import corpus as corpora
from molegrad.gpt.data.corpus import embedded_corpus, open_corpus

SIZE = 200_000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.ENV, str(tmp_path_factory.mktemp("home")))
        return embedded_corpus(SIZE)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.ENV, str(tmp_path / "home"))
    return tmp_path / "home"


def test_size_and_manifest(small):
    total = small.manifest["train"]["bytes"] + small.manifest["val"]["bytes"]
    assert SIZE <= total < 3 * SIZE
    assert small.manifest["python"] == sys.version.split()[0]
    assert small.manifest["packages"]["torch"]
    for split in ("train", "val"):
        documents = list(small.documents(split))
        entry = small.manifest[split]
        assert len(documents) == entry["documents"] > 0
        assert sum(len(d.text.encode()) for d in documents) == entry["bytes"]
    json.dumps(small.manifest)


def test_split_by_module_and_no_docstring_twice(small):
    documents = {split: list(small.documents(split)) for split in ("train", "val")}
    modules = {split: {d.module for d in found} for split, found in documents.items()}
    assert sorted(modules["val"]) == sorted(small.manifest["val"]["modules"])
    assert all(corpora.is_validation(m) for m in modules["val"])
    assert not any(corpora.is_validation(m) for m in modules["train"])
    docs = ["".join(d.doc.split()) for found in documents.values() for d in found]
    assert len(docs) == len(set(docs))
    for document in documents["train"]:
        head, doc = document.text.split("\n\n", 1)
        assert document.name in head and doc == document.doc


def test_cached_and_independent_of_the_number_of_processes(small, home, monkeypatch):
    monkeypatch.setattr(corpora.os, "cpu_count", lambda: 1)
    alone = embedded_corpus(SIZE)
    assert alone.manifest["sha256"] == small.manifest["sha256"]
    monkeypatch.setattr(corpora, "_build_embedded", lambda *a: pytest.fail("not cached"))
    assert embedded_corpus(SIZE) == alone
    assert not list((home / "data").glob("*.*")), "temporary folders are left"


def test_missing_package_is_named_and_skipped(caplog):
    with caplog.at_level(logging.WARNING):
        found = embedded_corpus(20_000, ("stdlib", "no_such_package"))
    assert found.manifest["missing"] == ["no_such_package"]
    assert "no_such_package" in caplog.text
    with pytest.raises(RuntimeError, match="none of .*no_such_package.*pip install"):
        embedded_corpus(packages=("no_such_package",))


def test_broken_worker_is_an_error(tmp_path, home, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("import sys; sys.stdin.read(); sys.exit(3)")
    monkeypatch.setattr(corpora.docstrings, "__file__", str(worker))
    with pytest.raises(RuntimeError, match="status 3"):
        embedded_corpus(1000, ("stdlib",))
    assert not list((home / "data").iterdir())


def test_stdlib_modules_are_named_as_imported():
    files = dict(corpora.module_files("stdlib"))
    assert {"json", "json.decoder", "argparse"} <= files.keys()
    assert not any("test" in m.split(".") or "site-packages" in p for m, p in files.items())


def test_local_text_with_a_limit_and_a_validation_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {i} " + "x" * 80 for i in range(2000)))
    (tmp_path / "v.txt").write_text("held out text\n")
    full = open_corpus(str(path), str(tmp_path / "v.txt"))
    assert list(full.texts("val")) == ["held out text"]
    limited = open_corpus(str(path), max_bytes=30_000)
    size = sum(len(text) for text in limited.texts("train"))
    assert 30_000 <= size < 60_000 < sum(len(text) for text in full.texts("train"))
    assert limited.sha256("train") != open_corpus(str(path)).sha256("train")


def test_local_hash_sees_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\nthree\n\n" * 100)
    before = open_corpus(str(path)).manifest["sha256"]
    assert open_corpus(str(path)).manifest["sha256"] == before
    path.write_text("one\n\ntwo\n\nthreE\n\n" * 100)
    assert open_corpus(str(path)).manifest["sha256"] != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("climbmix",), "say how many training shards"),
        (("climbmix:0",), "1 to 6542"),
        (("climbmix:2", "val.txt"), "goes with local files"),
        (("climbmix:2", "", 5), "take fewer shards"),
        (("embedded", "val.txt"), "goes with local files"),
        (("embedded", "", -1), "max_bytes=-1"),
        (("/does/not/exist",), "/does/not/exist does not exist"),
    ],
)
def test_open_corpus_errors(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_corpus(*arguments)


def test_unknown_split(small):
    for ask in (small.sha256, lambda split: next(small.documents(split))):
        with pytest.raises(ValueError, match="'test' is not one of"):
            ask("test")
