"""Random numbers that are pure functions of seed, counter and place, bit for bit the same on every
device: a resumed run draws what an unbroken one does.

Source: splitmix64, Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.ops import checks
from molegrad.ops.registry import call, op

# splitmix64's constants as signed 64-bit integers.
_WEYL = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685
_STREAM = 2862933555777941757


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; the masks make arithmetic right shifts logical ones."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def random_bits(index: Tensor, counter: Tensor, seed: int) -> Tensor:
    """24 random bits per index (int64, from 1 on) from a hash of (seed, counter, index)."""
    stream = _mix(counter.to(torch.int64) * _STREAM + seed)
    return (_mix(stream + index * _WEYL) >> 40) & 0xFFFFFF


def rademacher_reference(rows: int, cols: int, counter: Tensor, seed: int = 0) -> Tensor:
    """The lowest bit of each place's hash as a sign."""
    index = torch.arange(1, rows * cols + 1, device=counter.device, dtype=torch.int64)
    return (1 - 2 * (random_bits(index, counter, seed) & 1)).to(torch.float32).view(rows, cols)


def _check_rademacher(rows, cols, counter, seed=0) -> None:
    name = "rademacher"
    checks.require(
        rows >= 0 and cols >= 0, name, f"rows and cols must be >= 0, got {rows} and {cols}"
    )
    checks.step_counter(name, counter)


op(
    "rademacher",
    "(SymInt rows, SymInt cols, Tensor counter, int seed=0) -> Tensor",
    rademacher_reference,
    check=_check_rademacher,
    fake=lambda rows, cols, counter, seed=0: counter.new_empty((rows, cols), dtype=torch.float32),
)


def rademacher(rows: int, cols: int, counter: Tensor, seed: int = 0) -> Tensor:
    """Random signs ±1 (rows, cols), float32: a pure function of its arguments on every device.

    Args:
        counter: int64 scalar tensor, usually the step; the result lies on its device.
        seed: distinguishes streams; any integer of 64 bits.

    Raises:
        RuntimeError: a negative size, or a counter of another dtype or shape.
    """
    return call("rademacher", rows, cols, counter, seed)
