"""Random numbers: the very ones that resumed runs and other devices must draw."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.random import rademacher_reference
from tests.ops.samples import assert_refused, counter

MASK = 2**64 - 1


def splitmix_bits(step: int, seed: int, index: int) -> int:
    """64 bits of the hash of (seed, step, index), in Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    stream = mix((step * 2862933555777941757 + seed) & MASK)
    return mix((stream + (index + 1) * 0x9E3779B97F4A7C15) & MASK)


@pytest.mark.parametrize("rademacher", [ops.rademacher, rademacher_reference])
@pytest.mark.parametrize(
    "rows, cols, step, seed",
    [(33, 7, 5, 0), (1, 1, 0, 7), (0, 4, 1, 7), (129, 3, -2, -9), (9, 8, 1, 2**62), (5, 5, 0, 0)],
)
def test_signs_are_those_of_splitmix64(rademacher, rows, cols, step, seed):
    x = rademacher(rows, cols, counter(step), seed)
    signs = [1.0 - 2 * (splitmix_bits(step, seed, i) >> 40 & 1) for i in range(rows * cols)]
    assert x.shape == (rows, cols) and x.dtype == torch.float32 and x.flatten().tolist() == signs


def test_signs_are_balanced_and_streams_independent():
    x = ops.rademacher(200, 64, counter(3), 9)
    assert torch.equal(x.abs(), torch.ones(200, 64)) and abs(x.mean().item()) < 0.04
    for step, seed in ((4, 9), (3, 10)):
        assert abs((x * ops.rademacher(200, 64, counter(step), seed)).mean().item()) < 0.04
    assert (x.mT @ x / 200 - torch.eye(64)).abs().max() < 0.4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((2, 2, torch.zeros(())), "expected counter as an int64 scalar"),
        ((2, 2, torch.zeros(1, dtype=torch.int64)), r"got \(1\) of torch.int64"),
        ((-1, 2, counter()), "rows and cols must be >= 0, got -1 and 2"),
    ],
)
def test_bad_input_says_what_was_wrong(args, message):
    assert_refused("rademacher", args, message)
