"""Corpora: the embedded one (docstrings of installed packages), local files, downloaded shards.

`open_corpus` is what commands call with their `--data` flag:

    embedded              docstrings of torch, sympy, networkx, numpy and the standard library
    climbmix:8            the first 8 training shards of ClimbMix and its validation shard
    fineweb-edu:8         the same of FineWeb-Edu
    PATH                  a text file, a folder of .txt files, a .parquet file or a folder of them

The embedded corpus needs no network. It moves with the versions of the packages, so its manifest
records them with the SHA-256 of the text. It is split by module, on a hash of the module's name:
the functions of one module describe each other, and a random split would leak them.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from molegrad.gpt import paths
from molegrad.gpt.data import docstrings, download, sources
from molegrad.gpt.data.sources import Document, Part

FORMAT = 1  # of the cached files; part of the cache key
STDLIB = "stdlib"
PACKAGES = (STDLIB, "torch", "sympy", "networkx", "numpy")
SPLITS = ("train", "val")
VAL_FRACTION = 0.05
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
log = logging.getLogger(__name__)


def check_split(split: str) -> None:
    """ValueError for anything but "train" and "val"."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents as ranges of files, and the manifest that describes them.

    manifest: JSON-able; "kind", "sha256" (of both splits), "train"/"val" with "sha256" and what is
    known without reading everything ("documents", "bytes" for the embedded corpus).
    max_bytes > 0 limits what `documents` yields of the training split (text bytes, UTF-8); the
    validation split is limited to a tenth of it.
    """

    train: tuple[Part, ...]
    val: tuple[Part, ...]
    manifest: dict
    max_bytes: int = 0

    def parts(self, split: str) -> tuple[Part, ...]:
        """The parts of "train" or "val"; ValueError for another name."""
        check_split(split)
        return self.train if split == "train" else self.val

    def limit(self, split: str) -> int:
        """The most text bytes `documents` yields of a split; 0 for no limit."""
        return self.max_bytes if split == "train" else -(-self.max_bytes // 10)

    def documents(self, split: str) -> Iterator[Document]:
        """Stream the documents of a split."""
        left = self.limit(split) or sys.maxsize
        for part in self.parts(split):
            for document in part.documents():
                left -= len(document.text.encode())
                yield document
                if left <= 0:
                    return

    def texts(self, split: str) -> Iterator[str]:
        """Stream the texts of a split."""
        return (document.text for document in self.documents(split))

    def sha256(self, split: str) -> str:
        """The hash that identifies the content of a split."""
        check_split(split)
        return self.manifest[split]["sha256"]


def is_validation(module: str, val_fraction: float = VAL_FRACTION) -> bool:
    """Whether a module belongs to validation: SHA-256 of its name, as a fraction, is below."""
    value = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big")
    return value < val_fraction * 2.0**64


def module_files(package: str) -> list[tuple[str, str]]:
    """(module name, path) of every source file of a package, tests left out; [] if missing.

    package: an importable top-level name, or "stdlib". Nothing is imported.
    """
    if package == STDLIB:
        root, prefix = Path(sysconfig.get_path("stdlib")), ""
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return []
        root, prefix = Path(next(iter(spec.submodule_search_locations))), f"{package}."
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        base = prefix + "".join(f"{part}." for part in Path(folder).relative_to(root).parts)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("test_"):
                module = base[:-1] if name == "__init__.py" else base + name[:-3]
                if module:
                    found.append((module, os.path.join(folder, name)))
    return found


def _records(files: list[tuple[str, str]]) -> Iterator[list[docstrings.Record]]:
    """The records of each file, in the order of `files`, by one worker process a core."""
    processes = max(1, min(4, os.cpu_count() or 1, len(files)))
    command = [sys.executable, "-I", "-W", "ignore", docstrings.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    workers = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    try:
        for index, worker in enumerate(workers):
            lines = "".join(f"{module}\t{path}\n" for module, path in files[index::processes])
            worker.stdin.write(lines.encode("utf-8", "surrogateescape"))
            worker.stdin.close()
        for index, (_, path) in enumerate(files):
            worker = workers[index % processes]
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(
                    f"the docstring worker ended with status {worker.wait()} at {path}"
                )
            yield json.loads(line)
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()
            worker.wait()


def embedded_corpus(max_bytes: int = 0, packages: tuple[str, ...] = PACKAGES) -> Corpus:
    """The corpus of installed packages' docstrings, extracted at the first call and then cached.

    max_bytes: about how much text to extract in all (0: everything), whole modules at a time.
    packages: top-level names and "stdlib"; missing ones are named in a warning and in the manifest.
    Raises RuntimeError when no package is left.
    """
    found = {package: module_files(package) for package in packages}
    missing = [package for package, files in found.items() if not files]
    versions = {
        package: importlib.metadata.version(package)
        if package != STDLIB
        else platform.python_version()
        for package, files in found.items()
        if files
    }
    if missing:
        log.warning("embedded corpus: not installed and left out: %s", ", ".join(missing))
    if not versions:
        raise RuntimeError(
            f"embedded corpus: none of {list(packages)} is installed with its source; "
            "pip install torch sympy networkx numpy, or give --data"
        )
    identity = {
        "kind": "embedded",
        "format": [FORMAT, docstrings.FORMAT],
        "python": platform.python_version(),
        "packages": versions,
        "missing": missing,
        "max_bytes": max_bytes,
        "split": {
            "by": "module",
            "rule": "SHA-256 of the module name, first 8 bytes as a fraction, < val_fraction",
            "val_fraction": VAL_FRACTION,
        },
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = paths.data_dir() / f"embedded-{key}"
    if not (folder / "manifest.json").exists():
        _build_embedded(folder, sum(found.values(), []), identity)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = [folder / manifest[split]["file"] for split in SPLITS]
    return Corpus(*((Part(path, "jsonl", 0, path.stat().st_size),) for path in files), manifest)


def _build_embedded(folder: Path, files: list[tuple[str, str]], identity: dict) -> None:
    """Extract into a temporary folder and rename it to `folder`."""
    start = time.perf_counter()
    # In the order of the names' hash a reduced corpus is a sample of all packages, and validation
    # goes first so that a docstring found in both splits stays out of training.
    files = sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest())
    manifest = dict(identity)
    seen: set[bytes] = set()
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for split, share in (("val", VAL_FRACTION), ("train", 1 - VAL_FRACTION)):
            mine = [file for file in files if is_validation(file[0]) == (split == "val")]
            limit = max(1, round(identity["max_bytes"] * share)) if identity["max_bytes"] else 0
            manifest[split] = _write_split(work / f"{split}.jsonl", mine, limit, seen)
        manifest["train"].pop(
            "modules"
        )  # validation's say with the rule what training has not seen
        manifest["sha256"] = _joint_hash(manifest)
        manifest["seconds"] = round(time.perf_counter() - start, 2)
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        try:
            os.rename(work, folder)
        except OSError:  # another process has finished the same corpus
            if not (folder / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_split(path: Path, files: list[tuple[str, str]], limit: int, seen: set[bytes]) -> dict:
    """Extract `files` into one JSON-lines file, without docstrings that are in `seen`; returns the
    split's part of the manifest."""
    count = size = 0
    modules = []
    digest = hashlib.sha256()
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for records in _records(files):
            before = count
            for record in records:
                # Inherited and re-exported docstrings differ in spacing at most.
                key = hashlib.sha1("".join(record[4].split()).encode()).digest()
                if key in seen:
                    continue
                seen.add(key)
                out.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
                text = sources.named_document(*record).text.encode()
                digest.update(text + b"\0")
                size += len(text)
                count += 1
            if count > before:
                modules.append(records[0][0])
            if limit and size >= limit:
                break
    if not count:
        raise RuntimeError(
            f"embedded corpus: {len(files)} modules hold no docstring for {path.stem}"
        )
    return {
        "file": path.name,
        "documents": count,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "module_count": len(modules),
        "modules": modules,
    }


def _joint_hash(manifest: dict) -> str:
    joined = "".join(manifest[split]["sha256"] for split in SPLITS)
    return hashlib.sha256(joined.encode()).hexdigest()


def _of_parts(train: list[Part], val: list[Part], manifest: dict, max_bytes: int = 0) -> Corpus:
    """The corpus of parts, whose hashes join the manifest."""
    manifest = {**manifest, "format": [FORMAT], "max_bytes": max_bytes}
    corpus = Corpus(tuple(train), tuple(val), manifest, max_bytes)
    for split in SPLITS:
        parts = corpus.parts(split)
        joined = "".join(part.fingerprint() for part in parts) + f":{corpus.limit(split)}"
        manifest[split] = {
            "files": len({part.path for part in parts}),
            "sha256": hashlib.sha256(joined.encode()).hexdigest(),
        }
    manifest["sha256"] = _joint_hash(manifest)
    return corpus


def local_corpus(data: str | Path, val_data: str | Path = "", max_bytes: int = 0) -> Corpus:
    """The corpus of local files: text, a folder of .txt, or parquet with a column `text`.

    val_data: validation files of the same kinds; empty takes the last part of `data`
    (sources.split_files says which). Hashes: Part.fingerprint.
    Raises FileNotFoundError or ValueError with the remedy.
    """
    files = sources.find_files(Path(data).expanduser().absolute())
    if val_data:
        val_files = sources.find_files(Path(val_data).expanduser().absolute())
        train = [part for path in files for part in sources.whole(path)]
        val = [part for path in val_files for part in sources.whole(path)]
        rule = f"validation from {Path(val_data).name}"
        if not train or not val:
            raise ValueError(f"{val_data if train else data} holds no text")
    else:
        train, val, rule = sources.split_files(files, VAL_FRACTION)
    manifest = {
        "kind": "local",
        "data": str(data),
        "val_data": str(val_data),
        "split": {"by": "position", "rule": rule, "val_fraction": VAL_FRACTION},
    }
    return _of_parts(train, val, manifest, max_bytes)


def shard_corpus(dataset: str, shards: int) -> Corpus:
    """The first `shards` training shards of a published dataset and its validation shard.

    Downloads what is missing into data/DATASET.
    """
    last = download.DATASETS[dataset].last
    if not 1 <= shards <= last:
        raise ValueError(f"{dataset}:{shards}: the number of training shards is 1 to {last}")
    folder = paths.data_dir() / dataset
    files = download.fetch_shards(dataset, [*range(shards), last], folder)
    train = [part for path in files[:-1] for part in sources.whole(path)]
    rule = {"by": "shard", "rule": f"shard {last} is validation"}
    manifest = {"kind": dataset, "shards": shards, "split": rule}
    return _of_parts(train, sources.whole(files[-1]), manifest)


def open_corpus(data: str = "embedded", val_data: str = "", max_bytes: int = 0) -> Corpus:
    """The corpus that a `--data` flag names: see the module's docstring for the forms.

    Raises ValueError or FileNotFoundError naming the value and the remedy.
    """
    if max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes} must be >= 0 (0 takes everything)")
    name, _, count = str(data).partition(":")
    if name not in ("embedded", *download.DATASETS) or Path(str(data)).exists():
        return local_corpus(data, val_data, max_bytes)
    if val_data:
        raise ValueError(f"val_data={val_data!r} goes with local files; {data!r} has its own")
    if name == "embedded":
        return embedded_corpus(max_bytes)
    if not count.isdigit():
        raise ValueError(f"data={data!r}: say how many training shards, as in {name}:8")
    if max_bytes:
        raise ValueError(f"max_bytes={max_bytes} does not apply to {data!r}; take fewer shards")
    return shard_corpus(name, int(count))
