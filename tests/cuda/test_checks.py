"""What the native ops refuse, for the CPU and for CUDA: what they would read or write elsewhere.

Python refuses the same in more words before it calls them (molegrad/ops/checks.py).
"""

import pytest
import torch

from molegrad import build_info
from molegrad.ops.checks import FLOAT8
from tests.cuda.build import call_op
from tests.samples import randn

BF16, F64 = torch.bfloat16, torch.float64
A, B, U, V = randn(5, 4), randn(5, 3), randn(3, 2), randn(4, 2)
A8, SCALE, STEP = A.to(FLOAT8[0]), torch.ones(5), torch.tensor(3)
W, INT8, META = randn(3, 4), torch.zeros(3, 4, dtype=torch.int8), torch.zeros(5, 4, device="meta")
MANY = 1.0, 0.0, True, STEP, 0
GRAD = {
    "grad": torch.zeros(3, 4), "a": A, "b": B, "a_scale": None, "counter": STEP, "fraction": 0.5,
    "block": 4, "alpha": 1.0, "seed": 0,
}  # fmt: skip
CALLS = [
    ("sketch", (A[:4], B, U, V)),
    ("sketch", (A.int(), B, U, V)),
    ("sketch", (A, B.double(), U, V)),
    ("sketch", (A, B, U[:2], V)),
    ("sketch", (A, B, U, V.int())),
    ("sketch", (A, B, U, V[:, :0])),
    ("sketch", (META, B, U, V)),
    ("sketch", (A8, B, U, V)),
    ("sketch", (A, B, U, V, SCALE)),
    ("sketch", (A8, B, U, V, SCALE[:4])),
    ("sketch", (A8, B, U, V, SCALE.double())),
    ("sketch_accumulate_", (torch.zeros(3, 2), torch.zeros(2, 4).mT, A, B, U, V)),
    ("sketch_accumulate_", (torch.zeros(3, 2), torch.zeros(4, 2, dtype=F64), A, B, U, V)),
    ("sketch_accumulate_", (torch.zeros(3, 3), torch.zeros(4, 2), A, B, U, V)),
    ("sketch_accumulate_many_", ([], [], [], [], [], [])),
    ("sketch_accumulate_many_", ([torch.zeros(3, 2)], [torch.zeros(4, 2)], [A], [B], [U], [])),
    ("lowrank_grad", (A, B, randn(4, 4), 1, None, 1e3)),
    ("lowrank_grad", (A, B, V, 1, randn(3, 1), 1e3)),
    ("orthonormalize", (W, 1e3)),
    ("orthonormalize", (INT8, 1e3)),
    ("polar_factor", (randn(3),)),
    ("lowrank_update_", (W, U, randn(4, 1), 1.0, 0.0)),
    ("lowrank_update_", (W, U[:2], V, 1.0, 0.0)),
    ("rademacher", (-1, 7, STEP, 9)),
    ("rademacher", (1, 7, torch.tensor(1.0), 9)),
    ("quantize_rows", (torch.zeros(3, 0), False)),
    ("quantize_tensor", (STEP, False)),
    ("add_quantized_", (W, torch.ones(3, 1), W)),
    ("add_quantized_", (INT8, torch.ones(4, 1), W)),
    ("add_quantized_", (INT8, torch.ones(3, 1), W.mT)),
    ("sampled_grad_", tuple((GRAD | {"grad": torch.zeros(4, 3)}).values())),
    ("sampled_grad_", tuple((GRAD | {"a": A.int()}).values())),
    ("sampled_grad_", tuple((GRAD | {"b": B.half()}).values())),
    ("sampled_grad_", tuple((GRAD | {"a": META}).values())),
    ("sampled_grad_", tuple((GRAD | {"a": A8}).values())),
    ("sampled_grad_", tuple((GRAD | {"counter": torch.tensor(1.0)}).values())),
    ("sampled_grad_", tuple((GRAD | {"block": 0}).values())),
]
CUDA_ALONE = [
    ("lowrank_update_many_", ([], U[None], V[None], *MANY)),
    ("lowrank_update_many_", ([W, W.mT], U[None], V[None], *MANY)),
    ("lowrank_update_many_", ([W], U, V[None], *MANY)),
    ("lowrank_update_many_", ([W], U[None], V[None, :, :1], *MANY)),
    ("lowrank_update_many_", ([W], U[None], V[None], *MANY)),
    ("lowrank_update_many_", ([W.to(BF16)], U[None], V[None], 1.0, 0.0, True, None, 0)),
]


def refused(call, name, args):
    with pytest.raises(RuntimeError) as caught:
        call(name, *args)
    assert str(caught.value).startswith(f"molegrad::{name}: ")


@pytest.mark.parametrize("name, args", CALLS + CUDA_ALONE)
def test_on_cuda(emulated_ops, name, args):
    refused(call_op, name, args)


@pytest.mark.skipif(not build_info()["native"], reason="the extension is not built")
@pytest.mark.parametrize("name, args", CALLS)
def test_on_the_cpu(name, args):
    # The op's own kernel, whatever the device of the first tensor.
    kernel = getattr(torch.ops.molegrad, name).default
    refused(lambda _, *args: kernel._op_dk(torch._C.DispatchKey.CPU, *args), name, args)
