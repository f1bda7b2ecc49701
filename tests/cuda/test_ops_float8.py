"""The ops of csrc/cuda/ops_products.cpp on float8 operands, with emulated kernels: see
test_ops_products.py."""

import pytest

from tests.cuda import build
from tests.cuda.test_ops_products import library  # noqa: F401

_CHECK = """
import sys
from molegrad.ops.checks import FLOAT8
from molegrad.ops.float8 import quantize_rows_reference
from molegrad.ops.float8 import quantize_tensor_reference
from molegrad.ops.power import lowrank_grad_reference
from molegrad.ops.sketch import sketch_reference
import torch
from tests.samples import error, orthonormal, randn, tokens

torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
E4M3, E5M2 = FLOAT8


def call(name, *args):
    return getattr(torch.ops.molegrad, name).default.redispatch(CUDA, *args)


def narrowed(x, dtype, by_row):
    if dtype not in FLOAT8:
        return x.to(dtype), None, x.to(dtype).double()
    data, scale = (quantize_rows_reference if by_row else quantize_tensor_reference)(
        x, dtype == E5M2
    )
    return data, scale, data.double() * (scale.unsqueeze(-1) if by_row else scale).double()


def check(x, true, tolerance):
    assert error(x, true) < tolerance, error(x, true)


pairs = [(E4M3, E5M2), (E5M2, E5M2), (E4M3, BF16), (F16, E5M2), (F32, E4M3), (E5M2, F64)]
for dtypes in pairs:
    wide = F64 if F64 in dtypes else F32
    tolerance = 1e-6 if F32 in dtypes or F64 in dtypes else 2e-5
    for (t, n, m, k), by_row in (((100, 24, 40, 6), True), ((33, 17, 9, 5), False)):
        a, b = tokens(t, n, m)
        a, a_scale, wide_a = narrowed(a, dtypes[0], by_row)
        b, b_scale, wide_b = narrowed(1e-5 * b, dtypes[1], by_row)
        u, v = orthonormal(m, max(1, k - 1), 1), orthonormal(n, k, 2)
        true = sketch_reference(wide_a, wide_b, u.double(), v.double())
        y, w = call("sketch", a, b, u, v, a_scale, b_scale)
        assert y.dtype == w.dtype == wide
        for x, exact in zip((y, w), true):
            check(x, exact, tolerance)

        def shaped(scale):
            return scale.view(1, t) if scale is not None and scale.dim() else scale

        more = a.view(1, t, n), b.view(1, t, m), u.double(), v, shaped(a_scale), shaped(b_scale)
        call("sketch_accumulate_", y, w, *more)
        for x, exact in zip((y, w), true):
            check(x, 2 * exact, tolerance)
        for power_iters, probes in ((1, None), (2, torch.ones(n, 2))):
            got = call("lowrank_grad", a, b, v, power_iters, probes, 1e3, a_scale, b_scale)
            exact = lowrank_grad_reference(
                wide_a, wide_b, v.double(), power_iters, None if probes is None else probes.double()
            )
            check(got[0].double() @ got[1].double().mT, exact[0] @ exact[1].mT, 10 * tolerance)
            check(got[2], exact[2], 4 * tolerance)
            assert got[0].dtype == got[1].dtype == got[2].dtype == wide

# strided: columns, transposed, scales with gaps
a, b = tokens(60, 24, 18)
(a, a_scale), (b, b_scale) = quantize_rows_reference(a), quantize_rows_reference(b, True)
u, v = orthonormal(18, 4), orthonormal(24, 5)
expected = call("sketch", a, b, u, v, a_scale, b_scale)
gaps = torch.stack([a_scale, -a_scale], dim=1)[:, 0]
got = call("sketch", a.mT.contiguous().mT, b.view(3, 20, 18)[:].view(60, 18), u, v, gaps, b_scale)
assert all(torch.equal(x, y) for x, y in zip(got, expected))
for args, message in (
    ((a, b, u, v, a_scale, None), "b of torch.float8_e5m2 needs b_scale"),
    ((a, b.float(), u, v, a_scale, b_scale), "b_scale belongs to a float8 b, got b of torch.float"),
    ((a, b, u, v, a_scale[:5], b_scale), "expected a_scale in torch.float32, one number or one"),
    ((a, b, u, v, a_scale.double(), b_scale), "got (60) of torch.float64"),
):
    try:
        call("sketch", *args)
        raise SystemExit("no error")
    except RuntimeError as error_:
        assert message in str(error_), error_
print("fine")
"""


@pytest.mark.parametrize("path", ["auto", "cublaslt", "fused"])
def test_ops(library, path):  # noqa: F811
    done = build.run_check(_CHECK, library, MOLEGRAD_SKETCH_PATH=path)
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr
    assert done.stderr.count("a float8 operand beside one of torch.float32 is converted") == 1
    assert done.stderr.count("is converted to that first") == 1  # said once
