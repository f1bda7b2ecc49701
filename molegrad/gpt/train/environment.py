"""What a run ran on: machine and software, as a record for its config.json.

A number without the machine and the versions that gave it cannot be compared with another.
"""

import importlib.metadata
import os
import platform

import torch

from molegrad import build_info
from molegrad.gpt.train.hardware import device_name

PACKAGES = ("numpy", "rustbpe", "tiktoken", "pyarrow", "safetensors")


def machine_record(device: torch.device, world_size: int = 1) -> dict:
    """JSON-able: device, memory, processors, system, versions, and what runs the ops."""
    record = {
        "device": device_name(device),
        "processes": world_size,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "molegrad_build": build_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "device_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return record


def _cpu_name() -> str:
    """The processor's name as the system gives it; "" where it gives none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
