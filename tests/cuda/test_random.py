import pytest
import torch

from molegrad.ops.random import rademacher_reference
from tests.cuda.build import call_op


@pytest.mark.parametrize("seed", [0, 7, -9, 2**62])
def test_signs_are_those_of_the_reference(emulated, seed):
    library = emulated
    for rows, cols, counter in ((33, 7, 5), (1, 1, 0), (0, 4, 1), (129, 3, -2), (64, 64, 2**40)):
        step = torch.tensor(counter)
        out = torch.zeros(rows * cols + 3)
        library.molegrad_rademacher(step, seed, rows * cols, out)
        expected = rademacher_reference(rows, cols, step, seed).flatten()
        assert torch.equal(out, torch.cat([expected, torch.zeros(3)]))


def test_the_op(emulated_ops):
    step = torch.tensor(3)
    got = call_op("rademacher", 5, 7, step, 9)
    assert torch.equal(got, rademacher_reference(5, 7, step, 9))
