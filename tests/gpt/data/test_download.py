import hashlib
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molegrad.gpt.data import corpus, download
from molegrad.gpt.data.download import DownloadError, fetch, fetch_shards


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
        self.files = {}
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
        server.requests.append((self.path, asked))
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
def server():
    server = Server()
    server.files["a.parquet"] = BODY
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def get(server, tmp_path, **options):
    options = {"backoff": 0.001, "timeout": 5, **options}
    return fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", **options)


def test_plain(server, tmp_path):
    path = get(server, tmp_path, sha256=hashlib.sha256(BODY).hexdigest().upper())
    assert path.read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    get(server, tmp_path)
    assert len(server.requests) == 1, "an existing file is not fetched again"


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([500, 503, 429], 4),
        (["truncate"], 2),
        (["truncate", "truncate", 500], 4),
        (["truncate", "ignore range"], 2),
        (["truncate", "wrong range"], 3),
        (["garbage"], 2),
        (["size"], 2),
        (["no length"], 1),
    ],
)
def test_recovers_from(server, tmp_path, faults, requests):
    server.faults = list(faults)
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == requests
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_resumes_where_it_stopped(server, tmp_path):
    server.faults = ["truncate"]
    get(server, tmp_path)
    assert server.requests[1][1] == f"bytes={len(BODY) // 2}-"


def test_resumes_after_a_failed_call(server, tmp_path):
    server.faults = ["truncate"]
    with pytest.raises(DownloadError):
        get(server, tmp_path, attempts=1)
    assert not (tmp_path / "a.parquet").exists()
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.requests[1][1] == f"bytes={len(BODY) // 2}-"


def test_part_that_is_complete_or_too_long(server, tmp_path):
    part = tmp_path / "a.parquet.part"
    part.write_bytes(BODY)
    assert get(server, tmp_path).read_bytes() == BODY
    (tmp_path / "a.parquet").unlink()
    part.write_bytes(BODY + b"more")
    assert get(server, tmp_path).read_bytes() == BODY


def test_part_of_another_file_is_found_out(server, tmp_path):
    (tmp_path / "a.parquet.part").write_bytes(b"y" * 100)
    assert get(server, tmp_path).read_bytes() == BODY
    assert [asked for _, asked in server.requests] == ["bytes=100-", None]


def test_final_error_names_address_and_remedy(server, tmp_path):
    server.faults = [500] * 10
    with pytest.raises(DownloadError) as info:
        get(server, tmp_path, attempts=3)
    text = str(info.value)
    assert f"{server.url}/a.parquet" in text and "3 attempt" in text and "500" in text
    assert "run the command again" in text and str(tmp_path / "a.parquet") in text
    assert len(server.requests) == 3


def test_not_found_is_not_retried(server, tmp_path):
    with pytest.raises(DownloadError, match=r"b.parquet after 1 attempt.*404"):
        fetch(f"{server.url}/b.parquet", tmp_path / "b.parquet", backoff=0.001)
    assert len(server.requests) == 1


def test_nobody_there(tmp_path):
    with pytest.raises(DownloadError, match="2 attempt"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", attempts=2, backoff=0.001, timeout=2)


def test_wrong_hash(server, tmp_path):
    with pytest.raises(DownloadError, match="SHA-256 is .* expected 00"):
        get(server, tmp_path, sha256="00", attempts=2)
    assert not list(tmp_path.iterdir())


def test_waits_grow(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.faults = [500] * 9
    with pytest.raises(DownloadError):
        get(server, tmp_path, backoff=8.0, attempts=6)
    assert waits == [8.0, 16.0, 32.0, 60.0, 60.0]


def test_files_other_than_parquet(server, tmp_path):
    server.files["note.txt"] = b"hello"
    path = fetch(f"{server.url}/note.txt", tmp_path / "note.txt", parquet=False)
    assert path.read_bytes() == b"hello"
    with pytest.raises(DownloadError, match="not a whole parquet file"):
        fetch(f"{server.url}/note.txt", tmp_path / "n", attempts=2, backoff=0.001)
    with pytest.raises(ValueError, match="attempts=0"):
        fetch(f"{server.url}/note.txt", tmp_path / "n", attempts=0)


@pytest.mark.parametrize(
    "data", [b"", b"PAR1PAR1", BODY[:-1], b"x" + BODY[1:], BODY[:4] + b"\xff\xff\xff\x7fPAR1"]
)
def test_is_parquet_says_no(tmp_path, data):
    path = tmp_path / "x"
    path.write_bytes(data)
    assert not download.is_parquet(path)


def test_shards_in_parallel_and_in_order(server, tmp_path):
    bodies = {i: parquet([f"shard {i}"] * 3) for i in (0, 1, 2, 6542)}
    server.files = {f"shard_{i:05d}.parquet": body for i, body in bodies.items()}
    server.faults = [500, "truncate"]
    options = {"base_url": server.url + "/", "workers": 3, "backoff": 0.001}
    hashes = {1: hashlib.sha256(bodies[1]).hexdigest()}
    paths = fetch_shards("climbmix", [2, 0, 1, 6542], tmp_path, sha256=hashes, **options)
    assert [p.name for p in paths][-1] == "shard_06542.parquet"
    assert [p.read_bytes() for p in paths] == [bodies[i] for i in (2, 0, 1, 6542)]


def test_one_missing_shard_fails_the_call_and_keeps_the_others(server, tmp_path):
    server.files = {"shard_00000.parquet": BODY}
    with pytest.raises(DownloadError, match="shard_00001.parquet"):
        fetch_shards("climbmix", [0, 1], tmp_path, base_url=server.url, backoff=0.001)
    assert [p.name for p in tmp_path.iterdir()] == ["shard_00000.parquet"]


def test_bad_shard_arguments(tmp_path):
    with pytest.raises(ValueError, match="no shard 6543; its shards are 0 to 6542"):
        fetch_shards("climbmix", [6543], tmp_path)
    with pytest.raises(ValueError, match="'pile' is unknown; known: climbmix, fineweb-edu"):
        fetch_shards("pile", [0], tmp_path)
    with pytest.raises(ValueError, match="workers=0"):
        fetch_shards("climbmix", [0], tmp_path, workers=0)


def test_published_addresses():
    for name, spec in download.DATASETS.items():
        assert spec.base_url.startswith("https://huggingface.co/datasets/karpathy/"), name
        assert spec.base_url.endswith("-shuffle/resolve/main")
    assert download.dataset("climbmix").last == 6542


def test_corpus_of_shards(server, tmp_path):
    for i in (0, 1, 6542):
        server.files[f"shard_{i:05d}.parquet"] = parquet([f"shard {i} row {r}" for r in range(4)])
    found = corpus.open_corpus("climbmix:2", home=tmp_path, base_url=server.url)
    assert list(found.texts("train"))[3:5] == ["shard 0 row 3", "shard 1 row 0"]
    assert list(found.texts("val"))[0] == "shard 6542 row 0"
    assert found.manifest["kind"] == "climbmix" and len(found.sha256("val")) == 64
