"""One logger for a run: metrics.jsonl always, wandb (offline unless asked otherwise) beside it.

What: `RunLogger(folder, ...).log({"step": 10, "train/loss": 2.3})` appends one JSON line, flushed,
and hands the same dictionary to wandb.

Why: the local record needs no account and survives a killed run. wandb starts in offline mode
unless WANDB_MODE says otherwise; `wandb sync FOLDER/wandb/offline-run-*` uploads it later. A
machine without wandb loses nothing but the copy and is told so once.

The keys are nanochat's: step, total_training_time, total_training_flops, val/bpb, train/loss,
train/lrm, train/dt, train/tok_per_sec, train/mfu, train/epoch.
"""

import json
import math
import os
from pathlib import Path

METRICS = "metrics.jsonl"


class RunLogger:
    """Appends to `folder`/metrics.jsonl; a context manager (or call `close`)."""

    def __init__(
        self,
        folder: Path,
        name: str = "run",
        config: dict | None = None,
        wandb: bool = True,
        project: str = "molegrad",
        resume_step: int | None = None,
        active: bool = True,
    ):
        """
        Args:
            folder: the run's folder; created.
            name, config, project: what wandb shows.
            wandb: False for the local record alone.
            resume_step: drop the records after this step, which the resumed run will write again;
                None starts the file anew.
            active: False makes every method do nothing (all ranks but the first).
        """
        self.folder, self._wandb, self._file = Path(folder), None, None
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        kept = [] if resume_step is None else _records_up_to(path, resume_step)
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        for record in kept:
            self._write(record)
        if wandb:
            self._wandb = _start_wandb(self.folder, name, config or {}, project)

    def log(self, metrics: dict) -> None:
        """Append one record; "step" must be in it. NaN and Inf are written as strings."""
        if "step" not in metrics:
            raise ValueError(f"a record needs a 'step', got the keys {sorted(metrics)}")
        if self._file is None:
            return
        self._write(metrics)
        if self._wandb is not None:
            self._wandb.log(metrics)

    def close(self) -> None:
        """Flush and close; wandb's run is finished."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _write(self, record: dict) -> None:
        safe = {k: _json_number(v) for k, v in record.items()}
        self._file.write(json.dumps(safe, allow_nan=False) + "\n")
        self._file.flush()


def read_metrics(folder: Path) -> list[dict]:
    """All records of a run; a half-written last line (a killed run) is left out."""
    path = Path(folder) / METRICS
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def _records_up_to(path: Path, step: int) -> list[dict]:
    return [record for record in read_metrics(path.parent) if record["step"] <= step]


def _json_number(value):
    """JSON has no NaN or Inf: "nan", "inf", "-inf" stand for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(folder: Path, name: str, config: dict, project: str):
    """A wandb run, or None (after one line that says why)."""
    try:
        import wandb
    except ImportError:
        print("wandb is not installed: metrics go to metrics.jsonl alone (pip install wandb)")
        return None
    mode = os.environ.get("WANDB_MODE", "offline")
    try:
        return wandb.init(
            project=project,
            name=name,
            config=config,
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(silent=True),
        )
    except Exception as error:  # a logger must not end a training run
        print(f"wandb could not start ({error}): metrics go to metrics.jsonl alone")
        return None
