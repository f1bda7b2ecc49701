import json
import logging
import sys

import pytest

from molegrad.gpt.data import corpus as corpora
from molegrad.gpt.data.corpus import embedded_corpus, local_corpus, open_corpus

SIZE = 200_000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def small(home):
    return embedded_corpus(home, max_bytes=SIZE)


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


def test_split_by_module(small):
    modules = {s: {d.module for d in small.documents(s)} for s in ("train", "val")}
    assert not modules["train"] & modules["val"]
    assert sorted(modules["val"]) == sorted(small.manifest["val"]["modules"])
    fraction = small.manifest["split"]["val_fraction"]
    assert all(corpora.is_validation(m, fraction) for m in modules["val"])
    assert not any(corpora.is_validation(m, fraction) for m in modules["train"])


def test_no_docstring_twice(small):
    docs = ["".join(d.doc.split()) for s in ("train", "val") for d in small.documents(s)]
    assert len(docs) == len(set(docs))


def test_documents_are_named(small):
    for document in small.documents("train"):
        assert document.text == f"{document.head}\n\n{document.doc}"
        assert document.name in document.head


def test_cached_and_independent_of_the_number_of_processes(small, home, tmp_path, monkeypatch):
    alone = embedded_corpus(tmp_path, max_bytes=SIZE, processes=1)
    assert alone.manifest["sha256"] == small.manifest["sha256"]
    monkeypatch.setattr(corpora, "_build_embedded", lambda *a: pytest.fail("not cached"))
    assert embedded_corpus(home, max_bytes=SIZE).train_path == small.train_path
    assert not list((home / "data").glob("*.*")), "temporary folders are left"


def test_missing_package_is_named_and_skipped(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = embedded_corpus(tmp_path, ("stdlib", "no_such_package"), max_bytes=20_000)
    assert found.manifest["missing"] == ["no_such_package"]
    assert "no_such_package" in caplog.text
    with pytest.raises(RuntimeError, match="none of .*no_such_package.*pip install"):
        embedded_corpus(tmp_path, ("no_such_package",))


def test_broken_worker_is_an_error(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("import sys; sys.stdin.read(); sys.exit(3)")
    monkeypatch.setattr(corpora.docstrings, "__file__", str(worker))
    with pytest.raises(RuntimeError, match="status 3"):
        embedded_corpus(tmp_path, ("stdlib",), max_bytes=1000)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("options", [{"val_fraction": 0}, {"val_fraction": 1}, {"max_bytes": -1}])
def test_bad_values(tmp_path, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        embedded_corpus(tmp_path, **options)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        local_corpus(tmp_path, **options)


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
        (("/does/not/exist",), "/does/not/exist does not exist"),
    ],
)
def test_open_corpus_errors(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_corpus(*arguments, home=tmp_path)


def test_unknown_split(small):
    with pytest.raises(ValueError, match="'test' is not one of"):
        small.documents("test").__next__()
    with pytest.raises(ValueError, match="'test' is not one of"):
        small.sha256("test")
