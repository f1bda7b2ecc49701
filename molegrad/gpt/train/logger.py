"""One logger for a run: metrics.jsonl always, dashboards (wandb, trackio) beside it.

What: `RunLogger(folder, ...).log({"step": 10, "train/loss": 2.3})` appends one JSON line, flushed,
and hands the record to the dashboards (`molegrad.gpt.train.dashboards`).

Why: the local record needs no account and survives a killed run. wandb starts in offline mode
unless WANDB_MODE says otherwise; the command that uploads the run later (`wandb sync ...`) is
printed when it ends, as is the one that opens trackio. A machine without a dashboard loses nothing
but the copy and is told so once.

The keys are nanochat's: step, total_training_time, total_training_flops, val/bpb, train/loss,
train/lrm, train/dt, train/tok_per_sec, train/mfu, train/epoch; MoleGrad's are streaming/METRIC,
layer/NAME/METRIC, shadow/METRIC, shadow/NAME/METRIC, health/findings and time/PHASE_ms.
"""

from pathlib import Path

from molegrad.gpt.train import dashboards as boards
from molegrad.monitor.instruments import line_of, read_records

METRICS = "metrics.jsonl"


class RunLogger:
    """Appends to `folder`/metrics.jsonl; a context manager (or call `close`)."""

    def __init__(
        self,
        folder: Path,
        name: str = "run",
        config: dict | None = None,
        project: str = "molegrad",
        resume_step: int | None = None,
        active: bool = True,
        dashboards: str = "wandb",
    ):
        """
        Args:
            folder: the run's folder; created.
            name, config, project: what the dashboards show.
            resume_step: drop the records after this step, which the resumed run will write again;
                None starts the file anew.
            active: False makes every method do nothing (all ranks but the first).
            dashboards: "wandb", "trackio", "wandb,trackio" or "none".

        Raises:
            ValueError: a dashboard is unknown.
        """
        kinds = boards.parse_names(dashboards)
        self.folder, self._boards, self._file = Path(folder), [], None
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        kept = [] if resume_step is None else read_records(path, up_to=resume_step)
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
        self._file.write(line_of(record))
        self._file.flush()


def read_metrics(folder: Path) -> list[dict]:
    """All records of a run; see `molegrad.monitor.instruments`."""
    return read_records(Path(folder) / METRICS)
