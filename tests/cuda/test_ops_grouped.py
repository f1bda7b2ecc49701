"""The op of csrc/cuda/ops_grouped.cpp with emulated kernels, on tensors of the CPU.

As test_ops_products.py: the environment variables are read once, so each has a process of its own.
"""

import pytest

from tests.cuda import build

SOURCES = ["ops_products.cpp", "ops_grouped.cpp"]
SOURCES += ["grouped.cu", "sketch.cu", "sketch_fused.cu", "products.cu", "estimate.cu"]
SOURCES += ["quantized.cu"]

_CHECK = """
import ctypes
import os
import sys
from molegrad.ops.checks import acc_dtype
from molegrad.ops.sketch import sketch_reference
import torch
from tests.samples import orthonormal, randn, tokens

torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F32: 2e-6, F64: 1e-14, BF16: 2e-5, F16: 1e-5}


def call(*lists):
    torch.ops.molegrad.sketch_accumulate_many_.default.redispatch(CUDA, *map(list, lists))


def layer(t, n, m, kv, ku, dtype, seed):
    a, b = tokens(t, n, m, dtype, seed=seed)
    acc = acc_dtype(dtype)
    y, w = torch.zeros(m, kv, dtype=acc), torch.zeros(n, ku, dtype=acc)
    return y, w, a, b, orthonormal(m, ku, seed + 1), orthonormal(n, kv, seed + 2)


counter = ctypes.CDLL(sys.argv[1]).emulation_launches
counter.restype = ctypes.POINTER(ctypes.c_int64)


def launches(layers):
    before = counter().contents.value
    call(*zip(*layers))
    return counter().contents.value - before


def check(layers, times=1):
    for number, (y, w, a, b, u, v) in enumerate(layers):
        true = sketch_reference(a.double(), b.double(), u.double(), v.double())
        for x, exact in zip((y, w), true):
            error = (x.double() - times * exact).norm() / exact.norm().clamp_min(1e-300)
            assert error < TOLERANCE[a.dtype], f"layer {number}: {error:.1e}"


# dtypes and ranks that share a launch and that do not, no tokens, more tokens than a chunk
layers = [
    layer(100, 24, 40, 6, 5, BF16, 0), layer(33, 17, 9, 5, 8, BF16, 1),
    layer(60, 25, 40, 8, 20, BF16, 2), layer(0, 8, 6, 2, 2, BF16, 3),
    layer(700, 24, 40, 16, 16, BF16, 4), layer(5, 12, 30, 7, 3, BF16, 5),
    layer(40, 24, 40, 6, 5, F16, 6), layer(50, 20, 11, 2, 3, F16, 7),
    layer(40, 24, 40, 6, 5, F32, 8), layer(40, 9, 40, 6, 5, F64, 9),
    layer(40, 150, 140, 130, 3, BF16, 10), layer(1, 4, 6, 1, 2, BF16, 11),
]
call(*zip(*layers))
check(layers)
call(*zip(*layers))
check(layers, 2)
# layouts: leading dimensions, columns that are not neighbours, rows that share their memory
y, w, a, b, u, v = layer(60, 24, 40, 6, 5, BF16, 0)
other = layer(30, 12, 10, 3, 4, BF16, 1)
b_columns = b.mT.contiguous().mT.view(3, 20, 40)
call(*zip(other, (y, w, a.view(3, 20, 24), b_columns, u.mT.clone().mT, v)))
check([(y, w, a, b, u, v), other])
# a layer that is used twice adds to one sum
y, w, a, b, u, v = layer(60, 24, 40, 6, 5, BF16, 0)
c, d = tokens(20, 24, 40, BF16, seed=9)
call(*zip((y, w, a, b, u, v), layer(8, 24, 40, 6, 5, BF16, 3), (y, w, c, d, u, v)))
check([(y, w, torch.cat([a, c]), torch.cat([b, d]), u, v)])
for lists, message in (
    (([], [], [], [], [], []), "many_: expected at least one layer"),
    (([y], [w], [a], [b], [u], []), "for each layer, got 1, 1, 1, 1, 1, 0"),
    (([y] * 2, [w] * 2, [a] * 2, [b, b[1:]], [u] * 2, [v] * 2), "layer 1: expected a and b"),
    (([y], [y], [a], [b], [u], [v]), "layer 0: expected w contiguous of shape (24, 5)"),
):
    try:
        call(*lists)
        raise SystemExit("no error")
    except RuntimeError as error:
        assert message in str(error), error
# launches: the emulated L2 holds 36 KB of A and B
wide = [layer(64, 24, 40, 6, 5, BF16, i) for i in range(24)]  # 24 x 16 KB in tiles of 128 tokens
alone, together = sum(launches([x]) for x in wide), launches(wide)
check(wide, 2)
tall = [layer(700, 24, 40, 6, 5, BF16, i) for i in range(3)]  # 90 KB each
tall_alone, tall_together = sum(launches([x]) for x in tall), launches(tall)
check(tall, 2)
grouped = os.environ["MOLEGRAD_GROUPED_PATH"]
if os.environ["MOLEGRAD_SKETCH_PATH"] in ("own", "auto") and grouped != "single":
    chunks = -(-24 // 2)
    assert together == 1 + 3 * chunks <= 4 * chunks and alone == 24 * 4, (alone, together)
    # layers of several chunks each: in a group they would take more launches
    assert (tall_together > tall_alone) == (grouped == "together"), (tall_alone, tall_together)
else:
    assert together == alone and tall_together == tall_alone, (alone, together)
print("fine")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build.build_products(tmp_path_factory.mktemp("ops_grouped"), *SOURCES)


@pytest.mark.parametrize("sketch", ["own", "cublaslt", "auto", "fused"])
@pytest.mark.parametrize("grouped", ["auto", "together", "single"])
def test_op(library, sketch, grouped):
    done = build.run_check(
        _CHECK, library, MOLEGRAD_SKETCH_PATH=sketch, MOLEGRAD_GROUPED_PATH=grouped
    )
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr


def test_a_path_that_does_not_exist_is_named(library):
    done = build.run_check(_CHECK, library, MOLEGRAD_GROUPED_PATH="both")
    assert "MOLEGRAD_GROUPED_PATH must be auto, together or single, got both" in done.stderr
