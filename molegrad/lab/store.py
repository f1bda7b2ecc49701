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

import filelock

from molegrad import build_info
from molegrad.gpt import paths
from molegrad.gpt.train import flags
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import PREFIX
from molegrad.lab.peers import Peer

FORMAT = 3
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
        config = flags.make(BaseTrainConfig, **values["config"])
        peer = Peer(**values["peer"]) if values["peer"] else None
        return cls(values["method"], config, values["corpus"], values["tokenizer"], peer)


@functools.lru_cache(maxsize=1)
def _defaults() -> dict:
    return {entry.name: entry.default for entry in flags.fields_as_flags(BaseTrainConfig)}


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
    names = ("format", "peer", "corpus", "tokenizer", "native")
    return hash_of({**{name: record[name] for name in names}, "config": counted})


def hash_of(values) -> str:
    """A short name of something JSON-able."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read(name: str) -> dict[str, dict]:
    """Key -> the newest record of a file of the store (RUNS or TIMES)."""
    path = paths.report_dir() / name
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            if record["format"] == FORMAT:
                found[key_of(record) if name == RUNS else record["key"]] = record
        except (json.JSONDecodeError, TypeError, KeyError):
            continue  # half a line of a process that was killed, or an older format
    found.pop(None, None)
    return found


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
