"""One logger for a run: metrics.jsonl always, dashboards (wandb, trackio) beside it.

What: `RunLogger(folder, ...).log({"step": 10, "train/loss": 2.3})` appends one JSON line, flushed,
and hands the record to the dashboards.

Why: the local record needs no account and survives a killed run. wandb starts in offline mode
unless WANDB_MODE says otherwise; the command that uploads the run later (`wandb sync ...`) is
printed when it ends, as is the one that opens trackio. A machine without a dashboard loses nothing
but the copy, and one line says so.

The keys are nanochat's: step, total_training_time, total_training_flops, val/bpb, train/loss,
train/lrm, train/dt, train/tok_per_sec, train/mfu, train/epoch; MoleGrad's are streaming/METRIC,
layer/NAME/METRIC, shadow/METRIC, shadow/NAME/METRIC, health/findings and time/PHASE_ms.

Dashboards put charts whose names share what stands before the slash into one section, so
layer/NAME/METRIC would be one section of some hundred charts. A layer's metrics are renamed there:
those of all layers, layer_METRIC/NAME, stand side by side in a section per metric, as do those of
shadow_METRIC/NAME. metrics.jsonl keeps the names as they are.
"""

import os
import shlex
from pathlib import Path

from molegrad.monitor.instruments import line_of, read_records

METRICS = "metrics.jsonl"
PROJECT = "molegrad"


class RunLogger:
    """Appends to `folder`/metrics.jsonl; a context manager (or call `close`)."""

    def __init__(
        self,
        folder: Path,
        name: str = "run",
        config: dict | None = None,
        resume_step: int | None = None,
        active: bool = True,
        dashboards: str = "wandb",
    ):
        """
        Args:
            folder: the run's folder; created.
            name, config: what the dashboards show.
            resume_step: drop the records after this step, which the resumed run will write again;
                None starts the file from its beginning.
            active: False makes every method do nothing (all processes but the first).
            dashboards: "wandb", "trackio", "wandb,trackio" or "none".

        Raises:
            ValueError: a dashboard is unknown.
        """
        kinds = parse_dashboards(dashboards)
        self.folder, self._boards, self._file = Path(folder), [], None
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        kept = [] if resume_step is None else read_records(path, up_to=resume_step)
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        for record in kept:
            self._write(record)
        for kind in kinds:
            board = _start(kind, self.folder, name, config or {}, resume_step is not None)
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
    """All records of a run; see `molegrad.monitor.instruments.read_records`."""
    return read_records(Path(folder) / METRICS)


def parse_dashboards(text: str) -> tuple[str, ...]:
    """The dashboards that `--dashboards` names: "wandb,trackio", or () for "none".

    Raises:
        ValueError: a name is unknown, or "none" stands beside another.
    """
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if names == ("none",):
        return ()
    if not names or set(names) - {"wandb", "trackio"}:
        raise ValueError(
            f"dashboards={text!r}: choose wandb, trackio, both (wandb,trackio) or none"
        )
    return names


def grouped(record: dict) -> dict:
    """A record with the per-layer metrics under a name per metric: {"layer/h.0/x": 1} is
    {"layer_x/h.0": 1}."""
    result = {}
    for key, value in record.items():
        first, *rest = key.split("/")
        if first in ("layer", "shadow") and len(rest) > 1:
            key = f"{first}_{rest[-1]}/{'/'.join(rest[:-1])}"
        result[key] = value
    return result


def _start(kind: str, folder: Path, name: str, config: dict, resumed: bool):
    """The dashboard `kind`, open, or None after one line that says why: a logger must not end a
    training run."""
    try:
        if kind == "wandb":
            return Wandb(folder, name, config)
        return Trackio(name, config, resumed)
    except ImportError:
        print(f"{kind} is not installed: metrics go on without it (pip install {kind})")
    except Exception as error:
        print(f"{kind} could not start ({error}): metrics go on without it")
    return None


class Wandb:
    """A wandb run under `folder`/wandb, offline unless WANDB_MODE says otherwise.

    Charts run over `step`. The summary of a run is its lowest loss and bits per byte, the mean of
    every time/..., and the last value of everything else. A resumed training is a wandb run of its
    own of the same name, in the same group.
    """

    def __init__(self, folder: Path, name: str, config: dict):
        import wandb

        self.mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            group=name,
            config=config,
            dir=str(folder),
            mode=self.mode,
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for metric in ("train/loss", "train/loss_raw", "val/bpb", "val/loss"):
            self._run.define_metric(metric, step_metric="step", summary="min")
        self._times: set[str] = set()

    def log(self, record: dict) -> None:
        """Hand over one record."""
        # By name: of two patterns that match, "*" and "time/*", wandb takes either.
        for metric in record.keys() - self._times:
            if metric.startswith("time/"):
                self._run.define_metric(metric, step_metric="step", summary="mean")
                self._times.add(metric)
        self._run.log(grouped(record))

    def close(self) -> str:
        """End the run; the command that uploads it, "" where there is nothing to upload."""
        folder = Path(self._run.dir).parent
        self._run.finish()
        return f"wandb sync {shlex.quote(str(folder))}" if self.mode == "offline" else ""


class Trackio:
    """A trackio run: charts in a local page, no account.

    trackio keeps its database in $TRACKIO_DIR, else under ~/.cache/huggingface.
    """

    def __init__(self, name: str, config: dict, resumed: bool):
        import trackio

        resume = "allow" if resumed else "never"
        self._run = trackio.init(
            project=PROJECT, name=name, config=config, resume=resume, embed=False
        )

    def log(self, record: dict) -> None:
        """Hand over one record; its step is trackio's own."""
        values = {key: value for key, value in grouped(record).items() if key != "step"}
        self._run.log(values, step=record["step"])

    def close(self) -> str:
        """End the run; the command that shows it."""
        self._run.finish()
        where = os.environ.get("TRACKIO_DIR")
        prefix = f"TRACKIO_DIR={shlex.quote(where)} " if where else ""
        return f"{prefix}trackio show --project {PROJECT}"
