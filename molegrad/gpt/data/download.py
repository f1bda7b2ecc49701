"""Fetch parquet shards of published pretraining datasets by HTTPS.

A shard is written to NAME.part, checked (size, parquet marks at both ends, SHA-256 where known) and
renamed, so a file under its own name is always whole. A .part of an interrupted attempt is resumed
by an HTTP Range request; a server that ignores Range is handled by starting over. Failures are
retried with exponentially growing waits; the final error names the URL and the remedy.
"""

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"PAR1"
CHUNK = 1 << 20
_FINAL_STATUS = {400, 401, 403, 404, 405, 410, 451}  # trying again won't help
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A published set of parquet shards 0 to `last`, of which the last is validation."""

    base_url: str
    last: int
    pattern: str = "shard_{:05d}.parquet"


DATASETS: Mapping[str, Dataset] = {
    "climbmix": Dataset(
        "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6542
    ),
    "fineweb-edu": Dataset(
        "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1822
    ),
}


class DownloadError(RuntimeError):
    """A file could not be fetched; the message names the URL and the remedy."""


class _Refused(Exception):
    """An answer that makes another attempt pointless."""


def dataset(name: str) -> Dataset:
    """The dataset of that name; ValueError naming the known ones otherwise."""
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is unknown; known: {', '.join(DATASETS)}")
    return DATASETS[name]


def is_parquet(path: Path) -> bool:
    """Whether a file begins and ends as parquet does and its footer fits into it."""
    size = path.stat().st_size
    if size < 12:
        return False
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            return False
        file.seek(-8, os.SEEK_END)
        tail = file.read(8)
    return tail[4:] == MAGIC and int.from_bytes(tail[:4], "little") <= size - 12


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _attempt(url: str, part: Path, timeout: float) -> None:
    """One request that begins or resumes `part`; raises OSError if the result is not whole."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "molegrad", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:  # longer than the file, or already all of it
                total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
                if total.isdigit() and int(total) == have:
                    return
                part.unlink()
                raise OSError(f"the partial file ({have} bytes) does not fit the file") from None
            if error.code in _FINAL_STATUS:
                raise _Refused(f"HTTP status {error.code} {error.reason}") from None
            raise OSError(f"HTTP status {error.code} {error.reason}") from None
    with response:
        resumed = have > 0 and response.status == 206
        start = have if resumed else 0
        content_range = response.headers.get("Content-Range", "")
        if resumed and not content_range.startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError(f"asked for bytes from {have}, got Content-Range {content_range!r}")
        length = response.headers.get("Content-Length")
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
    size = part.stat().st_size
    if length is not None and size != start + int(length):
        raise OSError(f"got {size} of {start + int(length)} bytes")


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str = "",
    parquet: bool = True,
    attempts: int = 6,
    backoff: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Fetch `url` to `target` (returned); a `target` that exists is taken as it is.

    sha256: expected hash in hexadecimal, or empty. parquet: check the marks of a parquet file.
    attempts: requests in all. backoff: seconds before the second attempt, doubled each time, at
    most 60. timeout: seconds without an answer. Raises DownloadError.
    """
    if attempts < 1:
        raise ValueError(f"attempts={attempts} must be >= 1")
    target = Path(target)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    problem = ""
    for attempt in range(attempts):
        if attempt:
            wait = min(60.0, backoff * 2 ** (attempt - 1))
            log.warning("%s: %s; trying again in %.1f s", url, problem, wait)
            time.sleep(wait)
        try:
            _attempt(url, part, timeout)
            if parquet and not is_parquet(part):
                part.unlink()
                raise OSError("what came is not a whole parquet file")
            if sha256 and (found := _sha256(part)) != sha256.lower():
                part.unlink()
                raise OSError(f"SHA-256 is {found}, expected {sha256.lower()}")
        except _Refused as error:
            problem = str(error)
            break
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
            continue
        os.replace(part, target)
        return target
    raise DownloadError(
        f"could not fetch {url} after {attempt + 1} attempt(s): {problem}. Check the connection "
        f"and the address, run the command again (it resumes), or put the file at {target} yourself"
    )


def fetch_shards(
    name: str,
    indices: Iterable[int],
    folder: Path,
    *,
    base_url: str = "",
    sha256: Mapping[int, str] | None = None,
    workers: int = 4,
    **options,
) -> list[Path]:
    """Fetch shards of the dataset `name` into `folder`, `workers` at a time; paths in order.

    base_url replaces the published address. sha256: expected hash per index. options go to fetch.
    Raises ValueError for an index the dataset lacks, DownloadError when a shard can't be had (the
    shards already under way are finished first).
    """
    spec = dataset(name)
    indices = list(indices)
    for index in indices:
        if not 0 <= index <= spec.last:
            raise ValueError(f"{name} has no shard {index}; its shards are 0 to {spec.last}")
    if workers < 1:
        raise ValueError(f"workers={workers} must be >= 1")
    base = (base_url or spec.base_url).rstrip("/")

    def one(index: int) -> Path:
        file = spec.pattern.format(index)
        digest = (sha256 or {}).get(index, "")
        return fetch(f"{base}/{file}", Path(folder) / file, sha256=digest, **options)

    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(one, index) for index in indices]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
