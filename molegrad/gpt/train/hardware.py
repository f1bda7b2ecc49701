"""The machine: which device, how fast it could be, what a token costs, how much memory was used.

What: `pick_device`, `peak_flops`, `flops_per_token`, `peak_memory_bytes`, `attention_backend`, and
`machine_record`, the machine and the software for a run's config.json: a number without them cannot
be compared with another.

Why: model FLOPs utilisation (MFU) is honest only if the floating-point operations are those that
were done. A converted layer does fewer of them, so `flops_per_token` gives two figures: `actual`
(the numerator of MFU) and `dense`, what the same model would cost without MoleGrad.

How to run: `flops_per_token(model, seq_len)` after conversion; the layers say what they are.
"""

import ctypes
import importlib.metadata
import os
import platform
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from molegrad import MoleLinear, build_info

_PACKAGES = ("numpy", "rustbpe", "tiktoken", "pyarrow", "safetensors")
# Dense bf16 FLOP/s with float32 accumulation, from the makers' data sheets; the first name that
# occurs in the device's name counts.
PEAK_BF16 = {
    "RTX 5090": 209.5e12,
    "RTX 5080": 112.6e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71.0e12,
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "L40S": 362.0e12,
    "A100": 312.0e12,
}


def pick_device(device_type: str = "") -> torch.device:
    """The device named ("cuda", "cuda:1", "cpu", "mps"), or the best one there is for "".

    Raises:
        ValueError: there is no such device here.
    """
    available = ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    if not device_type:
        return torch.device(available[0])
    try:
        device = torch.device(device_type)
    except RuntimeError as error:
        raise ValueError(f"device_type={device_type!r} is no device name: {error}") from None
    if device.type not in available:
        raise ValueError(
            f"device_type={device_type!r} is not available here (there is: {', '.join(available)})"
        )
    return device


def device_name(device: torch.device) -> str:
    """The device as its driver calls it; for the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return device.type


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, str]:
    """FLOP/s the device can reach in `dtype`, and where the figure is from.

    Known GPUs in bf16 have their data sheet's value. Everything else is measured with square
    matrix products, see `measured_flops`.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, value in PEAK_BF16.items():
            if known in name:
                return value, f"data sheet of {known}, dense bf16"
    return measured_flops(device, dtype), "measured with a matrix product"


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Best FLOP/s of square matrix products within about `seconds`.

    On the CPU also the best of one thread times the number of threads, whichever is larger: where
    other programs compete for the cores, the threads' product waits for the slowest of them, and a
    figure that is too low would make MFU exceed 100%.
    """
    best = _best_product(device, dtype, seconds)
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1:
        torch.set_num_threads(1)
        try:
            best = max(best, threads * _best_product(device, dtype, seconds))
        finally:
            torch.set_num_threads(threads)
    return best


def _best_product(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per trained token, forward and backward."""

    actual: float  # with the estimated weight gradients of the converted layers
    dense: float  # of the same model with dense weight gradients
    weight_gradient: float  # the part of `actual` that is weight gradients

    @property
    def saving(self) -> float:
        """Share of the dense operations that is not done."""
        return 1.0 - self.actual / self.dense


def flops_per_token(model: nn.Module, seq_len: int) -> Flops:
    """Operations of one training token of a GPT.

    A linear layer (m, n) costs 2mn forward, 2mn for the gradient of its input and 2mn for that of
    its weight; a MoleLinear's weight gradient what its estimator says. Attention costs 12·H·D·T per
    layer with the full T x T square counted (the convention of PaLM, appendix B, and nanochat),
    although a causal kernel may skip half. The embedding is a look-up and costs nothing.
    """
    common = weight_dense = weight_actual = 0.0
    for layer in model.modules():
        if not isinstance(layer, nn.Linear):
            continue
        m, n = layer.out_features, layer.in_features
        common += 4 * m * n
        estimated = isinstance(layer, MoleLinear)
        if not (layer.trains if estimated else layer.weight.requires_grad):
            continue
        weight_dense += 2 * m * n
        if estimated:
            weight_actual += layer.config.estimator.cost(m, n, layer.name, layer.rank)
        else:
            weight_actual += 2 * m * n
    size = model.config
    common += 12 * size.depth * size.n_head * size.head_dim * seq_len
    return Flops(common + weight_actual, common + weight_dense, weight_actual)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: torch's allocator on CUDA, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def attention_backend(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> str:
    """The kernel that torch's scaled_dot_product_attention takes for causal training there, as
    settings and versions have it: "flash_attention", "cudnn_attention" (which torch prefers on some
    GPUs where cuDNN is new enough), "efficient_attention", "math", or "error" where none is left.
    """
    shape = (1, 1024, heads, head_dim)  # transposed below, as the model has it
    q = torch.empty(shape, device=device, dtype=dtype, requires_grad=True).transpose(1, 2)
    choice = torch._fused_sdp_choice(q, q, q, None, 0.0, True)
    return SDPBackend(choice).name.lower()


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step; True where that was possible.

    A CPU training step frees and allocates the same large blocks every time. By default glibc
    returns them to the system, and every first touch of a page is a fault: 5 to 6% of a step at
    depth 4 (half of all page faults are gone with this). The peak of resident memory is the same.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL(None)
        return bool(
            libc.mallopt(m_mmap_threshold, 32 * 2**20) and libc.mallopt(m_trim_threshold, 2**31 - 1)
        )
    except (OSError, AttributeError, TypeError):
        return False


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
        "packages": {name: _version(name) for name in _PACKAGES},
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
