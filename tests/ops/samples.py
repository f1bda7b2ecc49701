"""Sample inputs of every op, and what the ops' tests share.

Measure of rightness of a native kernel: its relative error against a float64 truth may be at most
four times that of the same formula in plain torch products on the same data.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from molegrad import _native, ops
from molegrad.ops.checks import FLOAT8, acc_dtype
from tests.samples import error, orthonormal, randn, tokens

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
E4M3, E5M2 = FLOAT8
DTYPES = [F32, F64, BF16, F16]

MODULE, REASON = _native.load()
needs_native = pytest.mark.skipif(MODULE is None, reason=f"native kernels: {REASON}")


def counter(step: int = 0) -> Tensor:
    return torch.tensor(step)


def eps(dtype: torch.dtype) -> float:
    """Rounding of sums of this dtype's numbers."""
    return torch.finfo(acc_dtype(dtype)).eps


def assert_as_good_as_torch(x: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert x.dtype == plain.dtype and x.shape == plain.shape
    assert error(x, truth) <= 4 * max(error(plain, truth), eps(dtype))


def distance_from_orthonormal(q: Tensor) -> float:
    eye = torch.eye(q.shape[-1], dtype=F64)
    return (q.double().mT @ q.double() - eye).norm(dim=(-2, -1)).max().item()


def narrowed(x: Tensor, dtype: torch.dtype, by_row: bool = True):
    """x in `dtype`, its scale if that is float8, and what the two stand for."""
    if dtype not in FLOAT8:
        return x.to(dtype), None, x.to(dtype).double()
    data, scale = (ops.quantize_rows if by_row else ops.quantize_tensor)(x, dtype == E5M2)
    return data, scale, data.double() * (scale.unsqueeze(-1) if by_row else scale).double()


def assert_refused(name: str, args, message: str) -> None:
    """The wrapper says what was wrong; the op itself refuses too, before memory is touched."""
    with pytest.raises(RuntimeError, match=rf"molegrad::{name}: .*{message}"):
        getattr(ops, name)(*args)


def without_reference(monkeypatch, family: str, function: str) -> None:
    """Makes a reference fail by a function that it needs, so that native code must run."""

    def forbidden(*args):
        raise AssertionError("the reference ran instead of the native kernel")

    # The family `sketch` has the name of one of its ops, which molegrad.ops shows.
    monkeypatch.setattr(sys.modules[f"molegrad.ops.{family}"], function, forbidden)


def opchecks(args, without=()) -> list[str]:
    """opcheck's tests; that of the schema computes with its inputs, which float8 does not allow."""
    float8 = any(getattr(arg, "dtype", None) in FLOAT8 for arg in args)
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    names += ("test_aot_dispatch_dynamic",)
    return [n for n in names if n not in without and not (float8 and n == "test_schema")]


def sample_inputs(name: str) -> list[tuple]:
    """Argument tuples for `torch.ops.molegrad.<name>`."""
    a, b = tokens(19, 11, 13)
    u, v = orthonormal(13, 4, 1), orthonormal(11, 4, 2)
    a3, b3 = a.view(1, 19, 11), b.view(1, 19, 13)
    weight = randn(13, 11)
    step = counter()
    a8, a8_scale = torch.ops.molegrad.quantize_tensor(a)
    b8, b8_scale = torch.ops.molegrad.quantize_rows(b, True)
    data8, scale8 = torch.ops.molegrad.quantize_rows(a3)
    return {
        "lowrank_grad": [
            (a, b, v),
            (a3, b3, v, 2, torch.ops.molegrad.rademacher(11, 3, step, 1)),
            (a3.to(torch.bfloat16), b3.to(torch.bfloat16), v, 0),
            (a8, b8, v, 1, None, 1e3, a8_scale, b8_scale),
        ],
        "sketch": [
            (a, b, u, v), (a3, b3, u[:, :2], v), (a8, b8, u, v, a8_scale, b8_scale),
            (a3.to(torch.bfloat16), b8.view(1, 19, 13), u, v, None, b8_scale.view(1, 19)),
        ],
        "sketch_accumulate_": [
            (randn(13, 4), randn(11, 4), a, b, u, v),
            (randn(13, 4), randn(11, 4), a8, b8, u, v, a8_scale, b8_scale),
        ],
        "sketch_accumulate_many_": [
            (
                [randn(13, 4), randn(11, 3), randn(13, 2)],
                [randn(11, 4), randn(13, 3), randn(11, 4)],
                [a, b3, a3.bfloat16()],
                [b, a3, b3.bfloat16()],
                [u, v[:, :3], u],
                [v, u[:, :3], v[:, :2]],
            ),
        ],
        "orthonormalize": [(randn(9, 4),), (randn(3, 9, 4), 10.0)],
        "polar_factor": [(randn(9, 4),), (randn(3, 9, 4),)],
        "lowrank_update_": [
            (weight.clone(), u, v, -0.1, 0.01),
            (weight.to(torch.bfloat16), u, v, 0.5),
        ],
        "lowrank_update_many_": [
            ([weight.clone(), weight.clone()], torch.stack([u, u]), torch.stack([v, v]), 0.5, 0.01),
            ([weight.bfloat16(), weight.bfloat16().mT.contiguous().mT], torch.stack([u, u]),
             torch.stack([v, v]), -0.1, 0.0, True, step, 5),
        ],
        "sampled_grad_": [
            (randn(13, 11), a, b, None, step, 0.4, 4),
            (randn(13, 11).bfloat16(), data8, b3, scale8, step, 0.5, 8, -2.0),
            (randn(11, 13), b3, a3, None, step, 2.0, 3, 1.0, 5),
        ],
        "rademacher": [(5, 3, step, 7)],
        "add_quantized_": [
            (torch.zeros(13, 11, dtype=torch.int8), torch.ones(13, 1), randn(13, 11)),
            (torch.ones(13, 11, dtype=torch.int8), torch.ones(1, 11), randn(13, 11).bfloat16()),
        ],
        "quantize_rows": [(randn(2, 5, 11),), (randn(7, 3).bfloat16(), True)],
        "quantize_tensor": [(randn(2, 5, 11),), (randn(7, 3).bfloat16(), True)],
    }[name]  # fmt: skip
