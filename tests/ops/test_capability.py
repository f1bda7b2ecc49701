"""Instruction sets narrower than this machine's compute the same."""

import os
import subprocess
import sys

import pytest

from tests.ops.samples import needs_native

PROBE = """
import torch
from molegrad import _native, ops
from tests.ops import samples, test_float8, test_orth, test_sampled, test_sketch, test_update
torch.set_num_threads(1)
for dtype in samples.DTYPES:
    for shape in test_sketch.SHAPES:
        test_sketch.test_sketches_against_float64(shape, dtype)
    for shape in test_sampled.SHAPES[:8]:
        for make in (test_sampled.tokens, test_sampled.sparse_tokens):
            for block in (1, 4, 7, 16):
                test_sampled.test_it_takes_the_sample_of_the_reference(make, shape, dtype, block)
    for size in test_update.SIZES:
        test_update.test_every_layout_against_float64(ops.lowrank_update_, size, dtype)
    for shape in test_float8.SHAPES:
        test_float8.test_quantised_bit_for_bit(shape, dtype, True)
for block in (1, 4, 16):
    test_sampled.test_every_kind_of_tile(block)
test_sampled.test_every_float8_number()
test_orth.test_every_condition_and_scale(ops.orthonormalize, (101, 33), 2, 1.0, torch.float32)
test_orth.test_polar_factor(ops.polar_factor, (149, 7), 0.6, torch.float64)
print("RESULT", _native.build_info()["cpu_capability"])
"""


@needs_native
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_narrower_instruction_sets_compute_the_same(capability):
    env = os.environ | {"MOLEGRAD_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("baseline", capability)
