"""Fetch parquet shards of published pretraining datasets by HTTPS.

A shard is written to NAME.part, checked (size, parquet marks at both ends) and renamed, so a file
under its own name is always whole. A .part of an interrupted attempt is resumed by an HTTP Range
request; a server that ignores Range is handled by starting over. Failures are retried with
exponentially growing waits; the final error names the URL and the remedy.
"""

import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ATTEMPTS = 6  # requests for one file
BACKOFF = 1.0  # seconds before the second attempt, doubled each time
MAX_WAIT = 60.0
TIMEOUT = 30.0  # seconds without an answer
WORKERS = 4  # files at a time
_PASSING = {408, 416, 425, 429}  # statuses of the client's that another attempt may change
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A published set of parquet shards 0 to `last`, of which the last is validation."""

    url: str
    last: int


_HUB = "https://huggingface.co/datasets/karpathy"
DATASETS = {
    "climbmix": Dataset(f"{_HUB}/climbmix-400b-shuffle/resolve/main", 6542),
    "fineweb-edu": Dataset(f"{_HUB}/fineweb-edu-100b-shuffle/resolve/main", 1822),
}


class DownloadError(RuntimeError):
    """A file could not be fetched; the message names the URL and the remedy."""


def is_parquet(path: Path) -> bool:
    """Whether a file begins and ends as parquet does and its footer fits into it."""
    size = path.stat().st_size
    if size < 12:
        return False
    with open(path, "rb") as file:
        first = file.read(4)
        file.seek(-8, os.SEEK_END)
        footer, last = int.from_bytes(file.read(4), "little"), file.read(4)
    return first == last == b"PAR1" and footer <= size - 12


def _attempt(url: str, part: Path) -> None:
    """One request that begins or resumes `part`; OSError if the result is not a whole file."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "molegrad", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        start = have if response.status == 206 else 0
        if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise OSError(f"the server did not go on at byte {start}, as asked")
        with open(part, "ab" if start else "wb") as file:
            shutil.copyfileobj(response, file)
        length = response.headers.get("Content-Length")
    size = part.stat().st_size
    if length is not None and size != start + int(length):
        raise OSError(f"got {size} of {start + int(length)} bytes")
    if not is_parquet(part):
        part.unlink()
        raise OSError("what came is not a whole parquet file")


def fetch(url: str, target: Path) -> Path:
    """Fetch the parquet file at `url` to `target` (returned); one that exists is taken as it is.

    Raises DownloadError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    attempt, problem = 0, ""
    while not target.exists():
        attempt += 1
        try:
            if not (part.exists() and is_parquet(part)):
                _attempt(url, part)
            os.replace(part, target)
            break
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
            final = attempt == ATTEMPTS
            if isinstance(error, urllib.error.HTTPError):
                final = final or (error.code < 500 and error.code not in _PASSING)
                if error.code == 416:  # the part is longer than the file
                    part.unlink(missing_ok=True)
        if final:
            raise DownloadError(
                f"could not fetch {url} after {attempt} attempt(s): {problem}. Check the "
                "connection and the address, run the command again (it resumes), or put the file "
                f"at {target} yourself"
            )
        wait = min(MAX_WAIT, BACKOFF * 2 ** (attempt - 1))
        log.warning("%s: %s; trying again in %.1f s", url, problem, wait)
        time.sleep(wait)
    return target


def fetch_shards(name: str, indices: Iterable[int], folder: Path) -> list[Path]:
    """Fetch shards of the dataset `name` into `folder`, some at a time; paths in order.

    Raises DownloadError when a shard can't be had (those under way are finished first).
    """
    url = DATASETS[name].url

    def one(index: int) -> Path:
        file = f"shard_{index:05d}.parquet"
        return fetch(f"{url}/{file}", Path(folder) / file)

    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(one, index) for index in indices]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
