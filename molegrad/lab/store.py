"""What has been trained: $MOLEGRAD_HOME/report/compare.jsonl, one JSON line a run.

A run is found again by what determines its result: the resolved flags of base training (without
those that only steer its output), the peer, the corpus, the tokenizer, and whether the native
kernels ran. The key is computed from the flags written in a record, completed by today's defaults:
a flag that is added later does not make old runs unknown, a default that changes does. While
streaming is off its flags do not count.

Several processes may read and append at once; lines that cannot be read are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import filelock

from molegrad import build_info
from molegrad.gpt import paths
from molegrad.gpt.train import flags
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import PREFIX
from molegrad.lab.methods import Peer

FORMAT = 2
RUNS, TIMES = "compare.jsonl", "compare-times.jsonl"
# Flags that do not change what is learnt; the corpus and the tokenizer count by their content.
STEERING = {
    *("run", "model_tag", "dashboards", "threads", "log_every", "monitor_every", "eval_every"),
    *("sample_every", "save_every", "keep_last", "resume", "resume_from_step", "overwrite"),
    *("data", "val_data", "data_max_bytes", "tokenizer"),
    *("layer_metrics", "shadow_every", "shadow_layers"),
}


@dataclass(frozen=True)
class Run:
    """One training run.

    label: the method's, for people. config: resolved flags. peer: in place of the optimizer of the
    block matrices. corpus, tokenizer: SHA-256 of their content.
    """

    label: str
    config: BaseTrainConfig
    corpus: str
    tokenizer: str
    peer: Peer | None = None

    @property
    def title(self) -> str:
        """The method with its rank, for people."""
        rank = self.peer.rank if self.peer else None
        if self.config.enable_streaming:
            rank = getattr(self.config, PREFIX + "rank_k")
        return self.label if rank is None else f"{self.label}, k = {rank:g}"

    @functools.cached_property
    def key(self) -> str:
        """What makes two runs the same."""
        return key_of(self.to_dict())

    @functools.cached_property
    def time_key(self) -> str:
        """What makes two runs equally fast: all but the seed, the learning rate and the length."""
        values = self.to_dict()
        settled = {"seed": 0, PREFIX + "seed": 0, "matrix_lr": 1.0, "num_iterations": 1}
        return key_of({**values, "config": {**values["config"], **settled}})

    def to_dict(self) -> dict:
        """JSON-able; `Run.from_dict` gives the same run back."""
        return {
            "format": FORMAT,
            "method": self.label,
            "config": flags.resolved(self.config),
            "peer": dataclasses.asdict(self.peer) if self.peer else None,
            "corpus": self.corpus,
            "tokenizer": self.tokenizer,
            "native": bool(build_info()["native"]),
        }

    @classmethod
    def from_dict(cls, values: dict) -> Run:
        peer = values["peer"]
        return cls(
            values["method"],
            BaseTrainConfig(**values["config"]),
            values["corpus"],
            values["tokenizer"],
            Peer(**peer) if peer else None,
        )


@functools.lru_cache(maxsize=1)
def _defaults() -> dict:
    return flags.resolved(BaseTrainConfig())


def key_of(record: dict) -> str | None:
    """The key of a record, None where it has flags that base training no longer knows."""
    config = {**_defaults(), **record["config"]}
    streaming = config["enable_streaming"]
    counted = {
        name: value
        for name, value in config.items()
        if name not in STEERING and (streaming or not name.startswith(PREFIX))
    }
    if not counted.keys() <= _defaults().keys():
        return None
    identity = {name: record[name] for name in ("format", "peer", "corpus", "tokenizer", "native")}
    text = json.dumps({**identity, "config": counted}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_runs() -> dict[str, dict]:
    """Key -> the newest record of every run in the store."""
    found = {}
    for record in _lines(paths.report_dir() / RUNS):
        key = key_of(record) if record.get("format") == FORMAT else None
        if key is not None:
            found[key] = record
    return found


def read_times() -> dict[str, dict]:
    """Key -> the newest timing that the key (see `molegrad.lab.timing`) has in the store."""
    return {record["key"]: record for record in _lines(paths.report_dir() / TIMES)}


def append(name: str, record: dict) -> None:
    """Add a record to a file of the store (RUNS or TIMES)."""
    path = paths.report_dir() / name
    line = json.dumps(record, allow_nan=False) + "\n"
    with filelock.FileLock(f"{path}.lock"), open(path, "ab+") as file:
        if file.tell():  # a process that was killed may have left half a line
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def claim(key: str) -> filelock.FileLock:
    """A lock that the process training a run holds; it falls off when the process dies."""
    folder = paths.report_dir() / "compare-locks"
    folder.mkdir(exist_ok=True)
    return filelock.FileLock(folder / f"{key}.lock")


def _lines(path: Path) -> list[dict]:
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records
