"""The ops of csrc/cuda/ops_products.cpp with emulated kernels, on tensors of the CPU.

What is called is the kernel registered for CUDA: everything but the GPU itself is what runs there.
The library runs in processes of its own, whose environment names the path.
"""

import os
import subprocess
import sys

import pytest

from tests.cuda import build

SOURCES = ["ops_products.cpp", "sketch.cu", "sketch_fused.cu", "products.cu", "estimate.cu"]
SOURCES += ["quantized.cu"]

_CHECK = """
import sys
from molegrad.ops.checks import acc_dtype
from molegrad.ops.power import lowrank_grad_reference
from molegrad.ops.sketch import sketch_reference
import torch
from tests.samples import orthonormal, randn, tokens

torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def call(name, *args):
    return getattr(torch.ops.molegrad, name).default.redispatch(CUDA, *args)


def check(x, true, tolerance):
    error = (x.double() - true).norm() / true.norm().clamp_min(1e-300)
    assert error < tolerance, f"{error:.1e}"


for dtype, tolerance in ((F32, 2e-6), (F64, 1e-14), (BF16, 2e-5), (F16, 1e-5)):
    # sizes that the stand-in for cuBLASLt supports, does not, and partly does; in the last one it
    # is the rest behind chunks of tokens that it does not
    for t, n, m, k in ((100, 24, 40, 6), (33, 17, 9, 5), (60, 25, 40, 8), (1, 4, 6, 1),
                       (701, 24, 40, 6)):
        a, b = tokens(t, n, m, dtype)
        u, v = orthonormal(m, max(1, k - 1), 1), orthonormal(n, k, 2)
        true = sketch_reference(a.double(), b.double(), u.double(), v.double())
        y, w = call("sketch", a, b, u, v)
        assert y.dtype == w.dtype == acc_dtype(dtype)
        for x, exact in zip((y, w), true):
            check(x, exact, tolerance)
        call("sketch_accumulate_", y, w, a.view(1, t, n), b.view(1, t, m), u.double(), v)
        for x, exact in zip((y, w), true):
            check(x, 2 * exact, tolerance)
        for power_iters in (0, 1, 3):
            for probes in (None, torch.ops.molegrad.rademacher(n, 3, torch.tensor(4), 1)):
                got = call("lowrank_grad", a, b, v.to(dtype), power_iters, probes, 1e3)
                wide = None if probes is None else probes.double()
                exact = lowrank_grad_reference(
                    a.double(), b.double(), v.to(dtype).double(), power_iters, wide
                )
                check(got[0].double() @ got[1].double().mT, exact[0] @ exact[1].mT, 4 * tolerance)
                check(got[2], exact[2], 2 * tolerance)
                assert got[0].dtype == got[1].dtype == got[2].dtype == y.dtype
                assert got[2].shape == () and got[3].dtype == torch.int32
                assert int(got[3]) == int(exact[3])

    a, b = tokens(0, 6, 5, dtype)
    u, v = orthonormal(5, 2), orthonormal(6, 3)
    y, w = call("sketch", a, b, u, v)
    assert not y.any() and not w.any() and y.shape == (5, 3) and w.shape == (6, 2)
    before = y + 1, w + 1
    call("sketch_accumulate_", *before, a, b, u, v)
    assert (before[0] == 1).all() and (before[1] == 1).all()
    u, w, norm_sq, status = call("lowrank_grad", a, b, orthonormal(6, 2), 1, None, 1e3)
    assert int(status) == 2 and not w.any() and norm_sq == 0

for args, message in (
    ((randn(3, 4), randn(2, 5), randn(5, 1), randn(4, 1)), "expected a and b to agree"),
    ((randn(3, 4).int(), randn(3, 5), randn(5, 1), randn(4, 1)), "a must be floating point"),
):
    try:
        call("sketch", *args)
        raise SystemExit("no error")
    except RuntimeError as error:
        assert message in str(error), error
print("fine")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build.build_products(tmp_path_factory.mktemp("ops_products"), *SOURCES)


@pytest.mark.parametrize("path", ["own", "cublaslt", "auto", "fused", "24x40x64=fused,cublaslt"])
def test_ops(library, path):
    done = build.run_check(_CHECK, library, MOLEGRAD_SKETCH_PATH=path)
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr


def test_a_path_that_does_not_exist_is_named(library):
    done = build.run_check(_CHECK, library, MOLEGRAD_SKETCH_PATH="fast")
    assert "MOLEGRAD_SKETCH_PATH must be auto, own, cublaslt or fused, or rules" in done.stderr
    assert "; got fast" in done.stderr


def test_the_path_taken_is_visible(library):
    code = (
        f"import ctypes, torch; f = ctypes.CDLL({str(library)!r}).molegrad_sketch_path\n"
        "n, m, tokens, *ranks = [ctypes.c_int64(x) for x in (768, 3072, 8192, 32, 200)]\n"
        "print([f(dtype, n, m, tokens, rank) for dtype in range(4) for rank in ranks])"
    )
    for path, expected in (
        ("auto", [2, 2, 2, 2, 1, 2, 1, 1]),
        ("own", [1] * 8),
        ("cublaslt", [2, 2, 2, 2, 2, 2, 1, 1]),
        ("fused", [2, 2, 2, 2, 3, 3, 1, 1]),
        ("768x3072x8192x32=fused,cublaslt", [2, 2, 2, 2, 3, 2, 1, 1]),
    ):
        env = os.environ | {"MOLEGRAD_SKETCH_PATH": path}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == str(expected), done.stderr


def test_the_path_is_read_at_every_call(library):
    code = (
        f"import ctypes, os, torch; f = ctypes.CDLL({str(library)!r}).molegrad_sketch_path\n"
        "for path in ('own', 'fused', 'cublaslt', 'own'):\n"
        "    os.environ['MOLEGRAD_SKETCH_PATH'] = path\n"
        "    print(f(2, *(ctypes.c_int64(x) for x in (768, 3072, 8192, 32))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "3", "2", "1"], done.stderr
