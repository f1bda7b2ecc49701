"""What layers keep of their inputs for the backward pass in place of them: float8 rows.

An input that several layers have (query, key and value) is quantised once for all of them.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from molegrad.ops.checks import FLOAT8


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of x (…, n), once for all layers that x is the input of."""
    if _computes_afresh(x):
        return torch.ops.molegrad.quantize_rows(x.detach())
    known = getattr(x, "_molegrad_float8", None)
    if known is None or known[0] != x._version:
        x._molegrad_float8 = known = x._version, torch.ops.molegrad.quantize_rows(x.detach())
    return known[1]


def _computes_afresh(x: Tensor) -> bool:
    """Whether what is made of x cannot be kept for the other layers that x is the input of.

    Compiled code cannot see whether x has been changed in between (and has equal calls only once
    anyway). What a CUDA graph computes does not exist until it is replayed, and what was computed
    before would be replayed for every later content of x.
    """
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.compiler.assume_constant_result
def float8_works(device_type: str) -> bool:
    """Whether tensors on such a device can be float8; where they cannot, a warning says so once."""
    return device_type == "meta" or _float8_works(device_type)


@functools.cache
def _float8_works(device_type: str) -> bool:
    try:
        for dtype in FLOAT8:
            torch.ones(1, device=device_type).to(dtype)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"products='fp8': tensors on {device_type!r} cannot be float8 ({reason}), so products "
            "are computed in bfloat16 and layers keep their whole inputs",
            stacklevel=2,
        )
        return False
    return True
