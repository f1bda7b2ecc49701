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
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
log = logging.getLogger(__name__)


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
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
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
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        return self.manifest[split]["sha256"]

    @property
    def train_path(self) -> Path:
        """The first file of the training split."""
        return self.train[0].path

    @property
    def val_path(self) -> Path:
        """The first file of the validation split."""
        return self.val[0].path


def is_validation(module: str, val_fraction: float) -> bool:
    """Whether a module belongs to validation: SHA-256 of its name, as a fraction, is below."""
    value = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big")
    return value < val_fraction * 2.0**64


def module_files(package: str) -> list[tuple[str, str]] | None:
    """(module name, path) of every source file of a package, tests left out; None if missing.

    package: an importable top-level name, or "stdlib". Nothing is imported.
    """
    if package == STDLIB:
        root, prefix = Path(sysconfig.get_path("stdlib")), ""
    else:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            return None
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
    return found or None


def _records(files: list[tuple[str, str]], processes: int) -> Iterator[list[docstrings.Record]]:
    """The records of each file, in the order of `files`, by `processes` worker processes."""
    processes = max(1, min(processes, len(files)))
    command = [sys.executable, "-I", "-W", "ignore", docstrings.__file__]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(processes)
    ]
    try:
        for index, worker in enumerate(workers):
            lines = "".join(f"{module}\t{path}\n" for module, path in files[index::processes])
            worker.stdin.write(lines.encode("utf-8", "surrogateescape"))
            worker.stdin.close()
        for index in range(len(files)):
            line = workers[index % processes].stdout.readline()
            if not line:
                status = workers[index % processes].wait()
                raise RuntimeError(
                    f"the docstring worker ended with status {status} at {files[index][1]}"
                )
            yield json.loads(line)
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()
            worker.wait()


def _write_split(
    path: Path, files: list[tuple[str, str]], limit: int, processes: int, seen: set[bytes]
) -> dict:
    """Extract `files` into one JSON-lines file; returns the split's part of the manifest."""
    count = size = 0
    modules = []
    digest = hashlib.sha256()
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for records in _records(files, processes):
            used = False
            for record in records:
                # Inherited and re-exported docstrings differ in spacing at most.
                key = hashlib.sha1("".join(record[4].split()).encode()).digest()
                if key in seen:
                    continue
                seen.add(key)
                document = sources.named_document(*record)
                size += sources.write_document(out, document)
                digest.update(document.text.encode() + b"\0")
                count += 1
                used = True
            if used:
                modules.append(records[0][0])
            if limit and size >= limit:
                break
    return {
        "file": path.name,
        "documents": count,
        "bytes": size,
        "modules": modules,
        "sha256": digest.hexdigest(),
    }


def embedded_corpus(
    home: Path | None = None,
    packages: tuple[str, ...] = PACKAGES,
    max_bytes: int = 0,
    val_fraction: float = 0.05,
    processes: int = 0,
) -> Corpus:
    """The corpus of installed packages' docstrings, extracted at the first call and then cached.

    home: the folder that takes the place of $MOLEGRAD_HOME (its data/ holds the cache).
    packages: top-level names and "stdlib"; missing ones are named in a warning and in the manifest.
    max_bytes: about how much text to extract in all (0: everything), whole modules at a time.
    val_fraction: the share of modules (by hash of the name) that is validation, in (0, 1).
    processes: workers; 0 takes one per core, at most 4.
    Raises ValueError for bad values and RuntimeError when no package is left.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1")
    if max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes} must be >= 0 (0 takes everything)")
    data = paths.data_dir() if home is None else Path(home) / "data"
    files: list[tuple[str, str]] = []
    versions, missing = {}, []
    for package in packages:
        found = module_files(package)
        if found is None:
            missing.append(package)
            continue
        files += found
        versions[package] = (
            platform.python_version() if package == STDLIB else importlib.metadata.version(package)
        )
    if missing:
        log.warning("embedded corpus: not installed and left out: %s", ", ".join(missing))
    if not files:
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
            "val_fraction": val_fraction,
        },
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = data / f"embedded-{key}"
    if not (folder / "manifest.json").exists():
        _build_embedded(folder, files, identity, processes or min(4, os.cpu_count() or 1))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    splits = []
    for split in SPLITS:
        path = folder / manifest[split]["file"]
        splits.append((Part(path, "jsonl", 0, path.stat().st_size),))
    return Corpus(*splits, manifest)


def _build_embedded(folder: Path, files: list[tuple[str, str]], identity: dict, processes: int):
    """Extract into a temporary folder and rename it to `folder`."""
    start = time.perf_counter()
    fraction, max_bytes = identity["split"]["val_fraction"], identity["max_bytes"]
    # In the order of the names' hash a reduced corpus is a sample of all packages, and validation
    # goes first so that a docstring found in both splits stays out of training.
    files = sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest())
    groups = {
        "val": [file for file in files if is_validation(file[0], fraction)],
        "train": [file for file in files if not is_validation(file[0], fraction)],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        manifest = dict(identity)
        seen: set[bytes] = set()
        for split, share in (("val", fraction), ("train", 1 - fraction)):
            limit = max(1, round(max_bytes * share)) if max_bytes else 0
            manifest[split] = _write_split(
                work / f"{split}.jsonl", groups[split], limit, processes, seen
            )
            names = manifest[split].pop("modules")
            manifest[split]["module_count"] = len(names)
            if split == "val":  # with the rule they say what training has not seen
                manifest[split]["modules"] = names
            if not manifest[split]["documents"]:
                raise RuntimeError(
                    f"embedded corpus: no documents for the {split} split from "
                    f"{len(groups[split])} modules; use more packages or another val_fraction"
                )
        manifest["sha256"] = _joint_hash(manifest)
        manifest["seconds"] = round(time.perf_counter() - start, 2)
        text = json.dumps(manifest, indent=1)
        (work / "manifest.json").write_text(text, encoding="utf-8")
        try:
            os.rename(work, folder)
        except OSError:  # another process has finished the same corpus
            if not (folder / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _joint_hash(manifest: dict) -> str:
    joined = "".join(manifest[split]["sha256"] for split in SPLITS)
    return hashlib.sha256(joined.encode()).hexdigest()


def _hash_parts(parts: list[Part], limit: int) -> str:
    joined = "".join(part.fingerprint() for part in parts) + f":{limit}"
    return hashlib.sha256(joined.encode()).hexdigest()


def local_corpus(
    data: str | Path,
    val_data: str | Path = "",
    max_bytes: int = 0,
    val_fraction: float = 0.05,
) -> Corpus:
    """The corpus of local files: text, a folder of .txt, or parquet with a column `text`.

    val_data: validation files of the same kinds; empty takes the last part of `data`
    (sources.split_files says which). Hashes: Part.fingerprint.
    Raises FileNotFoundError or ValueError with the remedy.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1")
    if max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes} must be >= 0 (0 takes everything)")
    files = sources.find_files(Path(data).expanduser().absolute())
    if val_data:
        val_files = sources.find_files(Path(val_data).expanduser().absolute())
        train = [part for path in files for part in sources.whole(path)]
        val = [part for path in val_files for part in sources.whole(path)]
        rule = f"validation from {Path(val_data).name}"
        if not train or not val:
            raise ValueError(f"{data if not train else val_data} holds no text")
    else:
        train, val, rule = sources.split_files(files, val_fraction)
    manifest = {
        "kind": "local",
        "format": [FORMAT],
        "data": str(data),
        "val_data": str(val_data),
        "max_bytes": max_bytes,
        "split": {"by": "position", "rule": rule, "val_fraction": val_fraction},
        "train": {"files": len({part.path for part in train})},
        "val": {"files": len({part.path for part in val})},
    }
    corpus = Corpus(tuple(train), tuple(val), manifest, max_bytes)
    for split in SPLITS:
        manifest[split]["sha256"] = _hash_parts(corpus.parts(split), corpus.limit(split))
    manifest["sha256"] = _joint_hash(manifest)
    return corpus


def shard_corpus(dataset: str, shards: int, home: Path | None = None, **options) -> Corpus:
    """The first `shards` training shards of a published dataset and its validation shard.

    Downloads what is missing into data/DATASET (download.fetch_shards takes `options`).
    """
    data = paths.data_dir() if home is None else Path(home) / "data"
    spec = download.dataset(dataset)
    if not 1 <= shards <= spec.last:
        raise ValueError(f"{dataset}:{shards}: the number of training shards is 1 to {spec.last}")
    files = download.fetch_shards(dataset, [*range(shards), spec.last], data / dataset, **options)
    train = [part for path in files[:-1] for part in sources.whole(path)]
    val = sources.whole(files[-1])
    manifest = {
        "kind": dataset,
        "format": [FORMAT],
        "shards": shards,
        "max_bytes": 0,
        "split": {"by": "shard", "rule": f"shard {spec.last} is validation"},
        "train": {"files": shards, "sha256": _hash_parts(train, 0)},
        "val": {"files": 1, "sha256": _hash_parts(val, 0)},
    }
    manifest["sha256"] = _joint_hash(manifest)
    return Corpus(tuple(train), tuple(val), manifest)


def open_corpus(
    data: str = "embedded",
    val_data: str = "",
    max_bytes: int = 0,
    home: Path | None = None,
    **options,
) -> Corpus:
    """The corpus that a `--data` flag names: see the module's docstring for the forms.

    home takes the place of $MOLEGRAD_HOME. options go to shard_corpus (download settings).
    Raises ValueError or FileNotFoundError naming the value and the remedy.
    """
    name, _, count = str(data).partition(":")
    if name in ("embedded", *download.DATASETS) and not Path(str(data)).exists():
        if val_data:
            raise ValueError(f"val_data={val_data!r} goes with local files; {data!r} has its own")
        if name == "embedded":
            return embedded_corpus(home, max_bytes=max_bytes)
        if not count.isdigit():
            raise ValueError(f"data={data!r}: say how many training shards, as in {name}:8")
        if max_bytes:
            raise ValueError(f"max_bytes={max_bytes} does not apply to {data!r}; take fewer shards")
        return shard_corpus(name, int(count), home, **options)
    return local_corpus(data, val_data, max_bytes)
