"""GPU time by kernel of training steps.

    python scripts/gpu/profile_steps.py dense,exact,balanced 4 2048 14

For each method, named as for bench_step, the kernels that take most of three steps of a model of
depth 12: milliseconds a step, launches a step and name. On a CPU the same of operators.
"""

from __future__ import annotations

import argparse
import collections
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from molegrad.bench.step import StepBenchConfig, Training, clean, prepared
from molegrad.lab.methods import parse_methods

STEPS = 3


def profiled(training: Training, device: torch.device) -> tuple[dict[str, list], float]:
    """Kernel -> [launches, microseconds] of STEPS steps, and the seconds they took."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    for _ in range(STEPS):
        training.step()
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            training.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    found: dict[str, list] = collections.defaultdict(lambda: [0, 0.0])
    for event in recorded.events():
        if event.device_type == kind:
            own = event.device_time if kind == DeviceType.CUDA else event.self_cpu_time_total
            found[event.name][0] += 1
            found[event.name][1] += own
    return found, seconds


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", help="as scripts.bench_step takes them; dense only if named")
    parser.add_argument("sequences", type=int)
    parser.add_argument("tokens", type=int, help="of a sequence")
    parser.add_argument("top", type=int, help="kernels to show")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--depth", type=int, default=12)
    flags = parser.parse_args()
    batch = flags.sequences, flags.tokens
    config = StepBenchConfig(device=flags.device, depth=flags.depth)
    named = [name.strip() for name in flags.methods.split(",")]
    with prepared(config) as device:
        for method in parse_methods(flags.methods):
            if method.label == "dense" and "dense" not in named:
                continue
            kernels, seconds = profiled(Training(config, method, batch, flags.compiled), device)
            busy = sum(time for _, time in kernels.values()) / STEPS / 1e3
            count = sum(count for count, _ in kernels.values()) // STEPS
            print(
                f"\n{method.label}, {batch[0]}x{batch[1]}: {busy:.1f} ms a step in {count} kernels,"
                f" {1e3 * seconds / STEPS:.1f} ms with profiling"
            )
            ordered = sorted(kernels.items(), key=lambda item: -item[1][1])
            for name, (count, micros) in ordered[: flags.top]:
                print(f"{micros / STEPS / 1e3:9.3f} ms {count / STEPS:7.1f}x  {name[:130]}")
            clean()
            torch.compiler.reset()


if __name__ == "__main__":
    main()
