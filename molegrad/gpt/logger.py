"""One logger for a run: metrics.jsonl always, dashboards (wandb, trackio) beside it.

What: `RunLogger(folder, ...).log({"step": 10, "train/loss": 2.3})` appends one JSON line, flushed,
and hands the record to the dashboards (`molegrad.gpt.dashboards`).

Why: the local record needs no account and survives a killed run. wandb starts in offline mode
unless WANDB_MODE says otherwise; the command that uploads the run later (`wandb sync ...`) is
printed when it ends, as is the one that opens trackio. A machine without a dashboard loses nothing
but the copy and is told so once.

The keys are nanochat's: step, total_training_time, total_training_flops, val/bpb, train/loss,
train/lrm, train/dt, train/tok_per_sec, train/mfu, train/epoch; MoleGrad's are streaming/METRIC,
layer/NAME/METRIC, shadow/METRIC, shadow/NAME/METRIC, health/findings and time/PHASE_ms.
"""

import json
import math
from pathlib import Path

from molegrad.gpt import dashboards as boards

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
        dashboards: str | None = None,
    ):
        """
        Args:
            folder: the run's folder; created.
            name, config, project: what the dashboards show.
            wandb: where `dashboards` is None, True stands for "wandb", False for "none".
            resume_step: drop the records after this step, which the resumed run will write again;
                None starts the file anew.
            active: False makes every method do nothing (all ranks but the first).
            dashboards: "wandb", "trackio", "wandb,trackio" or "none".

        Raises:
            ValueError: a dashboard is unknown.
        """
        if dashboards is None:
            dashboards = "wandb" if wandb else "none"
        kinds = boards.parse_names(dashboards)
        self.folder, self._boards, self._file = Path(folder), [], None
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        kept = [] if resume_step is None else _records_up_to(path, resume_step)
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        for record in kept:
            self._write(record)
        resumed = resume_step is not None
        for kind in kinds:
            board = boards.start(kind, self.folder, name, config or {}, project, resumed)
            if board is not None:
                self._boards.append(board)

    def log(self, metrics: dict) -> None:
        """Append one record; "step" must be in it. NaN and Inf are written as strings."""
        if "step" not in metrics:
            raise ValueError(f"a record needs a 'step', got the keys {sorted(metrics)}")
        if self._file is None:
            return
        self._write(metrics)
        for board in self._boards:
            board.log(metrics)

    def close(self) -> None:
        """Flush and close; the dashboards' runs end, and how to see them is printed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        while self._boards:
            board = self._boards.pop(0)
            command = board.close()
            if command:
                print(f"{type(board).__name__.lower()}: {command}")

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
