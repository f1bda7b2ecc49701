"""Puts together what scripts/gpu_check.sh has measured: gpu_check.json and gpu_check.md.

    python -m scripts.gpu_report --folder=gpu_check

The folder has parts.txt, a line "name exit-status seconds" for every part that ran, and the logs
grad.log, step.log, compiled.log (steps too) and memory.log, with the benchmark's JSON on a line of
its own. What is missing there is said to be missing, and not measured is not guessed.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from molegrad import build_info
from molegrad.bench import grad, memory_report, step
from molegrad.bench import targets as targets_of
from molegrad.bench.table import table
from molegrad.gpt.train import flags
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.hardware import device_name

BENCHMARKS = ("grad", "step", "compiled", "memory")
# Of a part, by its exit status: `timeout` ends with 124, or 137 where it had to kill.
STATUS = {
    0: "passed", None: "not run", 124: "out of time", 130: "interrupted", 137: "out of time",
}  # fmt: skip


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
    """All results of a folder: "machine", "parts", "targets", and "grad", "step" and "memory", None
    where missing.

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
    measured = {name: _last_json(folder / f"{name}.log") for name in BENCHMARKS}
    measured["step"] = _joined(measured["step"], measured.pop("compiled"))
    return {
        "machine": machine(),
        "parts": parts,
        "targets": _targets(**measured),
        **measured,
    }


def _targets(grad: dict | None, step: dict | None, memory: dict | None) -> list[dict]:
    of_memory = [] if memory is None else memory.get("targets", [])
    return [*targets_of.targets(grad, step), *of_memory]


def _last_json(log: Path) -> dict | None:
    """The last line that is a JSON object: what goes to stderr may follow it."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
    return None


def _joined(eager: dict | None, compiled: dict | None) -> dict | None:
    """Steps of both runs of the benchmark in one result."""
    if eager is None or compiled is None:
        return eager or compiled
    rows = [*eager["rows"], *compiled["rows"]]
    stopped = {"interrupted": True} if compiled.get("interrupted") else {}
    return {**eager, "rows": rows, **stopped}


def _cut_short(measured: dict) -> list[str]:
    return ["Interrupted: what was measured until then.", ""] if "interrupted" in measured else []


def markdown(results: dict) -> str:
    """The report as Markdown."""
    lines = [
        *_machine_lines(results["machine"]),
        "",
        "| part | result | seconds | last line |",
        "|---|---|---|---|",
    ]
    for part in results["parts"]:
        status = STATUS.get(part["status"], f"failed ({part['status']})")
        said = part["said"].replace("|", "\\|")
        lines.append(f"| {part['name']} | {status} | {part['seconds']} | {said} |")
    lines += ["", "## Targets", "", targets_of.shown(results["targets"]), "", "## Ops", ""]
    if results["grad"] is None:
        lines += ["Not measured.", ""]
    else:
        lines += [*_cut_short(results["grad"]), _bandwidth_line(results["grad"]), ""]
        for name in grad.TABLES:
            lines += [table(results["grad"][name], markdown=True) or f"{name}: no rows", ""]
    lines += ["## Training steps", ""]
    if results["step"] is None:
        lines.append("Not measured.")
    else:
        lines += _cut_short(results["step"])
        lines.append(step.shown(results["step"]["rows"], markdown=True))
    lines += ["", "## Memory", ""]
    if results["memory"] is None:
        lines.append("Not measured: FULL=1, or python -m scripts.bench_memory --device=cuda.")
    else:
        lines += _cut_short(results["memory"])
        lines.append(memory_report.measured(results["memory"], markdown=True))
    return "\n".join(lines) + "\n"


def _machine_lines(machine: dict) -> list[str]:
    """What ran: the GPU, its driver, and the versions."""
    info = machine["build_info"]
    built, found = info.get("cuda_built", {}), info.get("cuda_found", {})
    extension = (
        f"built with CUDA {_version(built.get('toolkit'))} for {built['architectures']}, "
        f"cuBLASLt {found.get('cublaslt') or 'unknown'}"
        if built
        else info.get("reason", "built with the CPU ops only")
    )
    lines = [
        f"# {machine['gpu'] or 'No GPU'}",
        "",
        f"Driver {machine['driver'] or 'unknown'}, torch {machine['torch']}, CUDA "
        f"{machine['cuda']}; native extension: {extension}. "
        "Reproduce: `bash scripts/gpu_check.sh`.",
        "",
    ]
    for name, path in info.get("paths", {}).items():
        taken = ", ".join(f"{k} {v}" for k, v in path.items() if k not in ("supported", "reason"))
        supported = "yes" if path["supported"] else "no"
        lines.append(f"- {name}: {supported}, {path['reason']}{': ' * bool(taken)}{taken}")
    return lines


def _version(number: int | None) -> str:
    """CUDART_VERSION as people write it: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "unknown"


def _bandwidth_line(measured: dict) -> str:
    rate, config = measured["bandwidth"], measured["config"]
    if rate is None:
        why = measured.get("bandwidth_note", "not measured")
        return f"{measured['device']}, {config['dtype']}. Memory bandwidth: {why}."
    return (
        f"{measured['device']}, {config['dtype']}. Memory: {rate['read'] / 1e9:.0f} GB/s read by a "
        f"sum, {rate['copy'] / 1e9:.0f} GB/s copied (read and written); the larger is the floor "
        "under every pass over A and B."
    )


@flags.command("gpu_report")
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
