import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molegrad.gpt import paths
from molegrad.gpt.data import corpus, download
from molegrad.gpt.data.download import Dataset, DownloadError, fetch, fetch_shards


def parquet(texts):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue()


BODY = parquet([f"document {i} " * 20 for i in range(500)])


class Server(ThreadingHTTPServer):
    """A server whose `faults` are used up one per request, whatever the path."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"a.parquet": BODY}
        self.faults = []
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        fault = server.faults.pop(0) if server.faults else ""
        asked = self.headers.get("Range")
        server.requests.append(asked)
        body = server.files.get(self.path.lstrip("/"))
        if isinstance(fault, int) or body is None:
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if fault == "ignore range":
            start, asked = 0, None
        if start >= len(body) and asked:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        sent = body[start:]
        self.send_response(206 if asked else 200)
        if asked:
            first = start + (7 if fault == "wrong range" else 0)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(sent) + (9 if fault == "size" else 0)))
        self.end_headers()
        if fault == "garbage":
            sent = b"x" * len(sent)
        self.wfile.write(sent[: len(sent) // 2] if fault == "truncate" else sent)


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(paths.ENV, str(tmp_path / "home"))
    server = Server()
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setattr(download, "TIMEOUT", 5)
    monkeypatch.setitem(download.DATASETS, "climbmix", Dataset(server.url, 6542))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, tmp_path):
    return fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([], 1),
        ([500, 503, 429], 4),
        (["truncate"], 2),
        (["truncate", "truncate", 500], 4),
        (["truncate", "ignore range"], 2),
        (["truncate", "wrong range"], 3),
        (["garbage"], 2),
        (["size"], 1),
        (["no length"], 1),
    ],
)
def test_recovers_from(server, tmp_path, faults, requests):
    server.faults = list(faults)
    for _ in range(2):  # a file that exists is not fetched again
        assert get(server, tmp_path).read_bytes() == BODY
        assert len(server.requests) == requests
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_resumes_after_a_failed_call(server, tmp_path, monkeypatch):
    server.faults = ["truncate"]
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with pytest.raises(DownloadError):
        get(server, tmp_path)
    assert not (tmp_path / "a.parquet").exists()
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.requests[1] == f"bytes={len(BODY) // 2}-"


@pytest.mark.parametrize(
    ("part", "requests"),
    [
        (BODY, []),
        (BODY + b"more", [f"bytes={len(BODY) + 4}-", None]),
        (b"y" * 100, ["bytes=100-", None]),
    ],
    ids=["complete", "too long", "of another file"],
)
def test_a_part_that_is_there(server, tmp_path, part, requests):
    (tmp_path / "a.parquet.part").write_bytes(part)
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.requests == requests


def test_final_error_names_address_and_remedy(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    monkeypatch.setattr(download, "BACKOFF", 8.0)
    server.faults = [500] * 6
    with pytest.raises(DownloadError) as info:
        get(server, tmp_path)
    text = str(info.value)
    assert f"{server.url}/a.parquet" in text and "6 attempt" in text and "500" in text
    assert "run the command again" in text and str(tmp_path / "a.parquet") in text
    assert waits == [8.0, 16.0, 32.0, 60.0, 60.0]
    with pytest.raises(DownloadError, match=r"b.parquet after 1 attempt.*404"):
        fetch(f"{server.url}/b.parquet", tmp_path / "b.parquet")  # not tried again


def test_nobody_there(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    with pytest.raises(DownloadError, match="2 attempt"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x")


@pytest.mark.parametrize(
    "data", [b"", b"PAR1PAR1", BODY[:-1], b"x" + BODY[1:], BODY[:4] + b"\xff\xff\xff\x7fPAR1"]
)
def test_is_parquet_says_no(tmp_path, data):
    path = tmp_path / "x"
    path.write_bytes(data)
    assert not download.is_parquet(path)


def test_one_missing_shard_fails_the_call_and_keeps_the_others(server, tmp_path):
    server.files = {"shard_00000.parquet": BODY}
    with pytest.raises(DownloadError, match="shard_00001.parquet"):
        fetch_shards("climbmix", [0, 1], tmp_path / "shards")
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["shard_00000.parquet"]


def test_corpus_of_shards(server):
    server.faults = [500, "truncate"]
    for i in (0, 1, 6542):
        server.files[f"shard_{i:05d}.parquet"] = parquet([f"shard {i} row {r}" for r in range(4)])
    found = corpus.open_corpus("climbmix:2")
    assert list(found.texts("train"))[3:5] == ["shard 0 row 3", "shard 1 row 0"]
    assert list(found.texts("val"))[0] == "shard 6542 row 0"
    assert found.manifest["kind"] == "climbmix" and len(found.sha256("val")) == 64


def test_published_addresses():
    assert download.DATASETS["fineweb-edu"] == Dataset(
        "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1822
    )
    assert download.DATASETS["climbmix"].last == 6542
