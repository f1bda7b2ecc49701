"""Puts together what scripts/gpu_check.sh has measured: gpu_check.json and gpu_check.md.

    python -m scripts.gpu_report --folder=gpu_check

The folder has parts.txt, a line "name exit-status seconds" for every part that ran, and the logs
grad.log and step.log, whose last line is the benchmark's JSON. What is missing there is said to be
missing, and not measured is not guessed.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from molegrad import build_info
from molegrad.bench import grad, step
from molegrad.gpt import flags
from molegrad.gpt.flags import flag
from molegrad.gpt.hardware import device_name

BENCHMARKS = ("grad", "step")


@dataclass(frozen=True)
class GpuReportConfig:
    """Put the results of scripts/gpu_check.sh together."""

    folder: str = flag("gpu_check", "where they are, and where the report goes")


def machine() -> dict:
    """The GPU, its driver, and the versions at work."""
    found = torch.cuda.is_available()
    info = {
        "gpu": device_name(torch.device("cuda")) if found else None,
        "driver": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "build_info": build_info(),
    }
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        info["driver"] = answer.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        pass  # the report says that it is not known
    return info


def collect(folder: Path) -> dict:
    """All results of a folder: "machine", "parts", and "grad" and "step", None where missing.

    Raises:
        FileNotFoundError: the folder holds no results.
    """
    listing = folder / "parts.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing} is missing: run bash scripts/gpu_check.sh {folder}")
    parts = []
    for line in listing.read_text().splitlines():
        name, status, seconds = line.split()
        known = int(status) if status.isdigit() else None
        log = folder / f"{name}.log"
        said = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        last = said[-1][:200] if said and not said[-1].startswith("{") else ""
        parts.append({"name": name, "status": known, "seconds": int(seconds), "said": last})
    return {
        "machine": machine(),
        "parts": parts,
        **{name: _last_json(folder / f"{name}.log") for name in BENCHMARKS},
    }


def _last_json(log: Path) -> dict | None:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None


def markdown(results: dict) -> str:
    """The report as Markdown."""
    m = results["machine"]
    lines = [
        f"# {m['gpu'] or 'No GPU'}",
        "",
        f"Driver {m['driver'] or 'unknown'}, torch {m['torch']}, CUDA {m['cuda']}. "
        "Reproduce: `bash scripts/gpu_check.sh`.",
        "",
        "| part | result | seconds | last line |",
        "|---|---|---|---|",
    ]
    for part in results["parts"]:
        status = {0: "passed", None: "not run"}.get(part["status"], f"failed ({part['status']})")
        lines.append(f"| {part['name']} | {status} | {part['seconds']} | {part['said']} |")
    lines += ["", "## Ops", ""]
    if results["grad"] is None:
        lines.append("Not measured.")
    else:
        for name in ("gradients", "sampled", "layers", "small"):
            lines += [grad.table(results["grad"][name], markdown=True), ""]
    lines += ["## Training steps", ""]
    if results["step"] is None:
        lines.append("Not measured.")
    else:
        lines.append(step.shown(results["step"]["rows"], markdown=True))
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command; its status is 1 where there are no results."""
    config = flags.parse(GpuReportConfig, argv, prog="python -m scripts.gpu_report")
    folder = Path(config.folder)
    try:
        results = collect(folder)
    except FileNotFoundError as error:
        print(f"gpu_report: {error}")
        return 1
    (folder / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "gpu_check.md").write_text(markdown(results))
    print(f"written: {folder / 'gpu_check.json'}, {folder / 'gpu_check.md'}")
    return 0
