"""What CUDA's kernels keep and allocate where the CPU's do otherwise: for `plan.simulate`.

`scratch` is the memory that they take for themselves while they run, where it grows with a size
that peaks depend on: attention's backward pass and the sampled gradient. Others take a few MiB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SAMPLED = torch.ops.molegrad.sampled_grad_.default
_BLOCK = 128  # rows of a tile of attention's backward pass, to which its buffers are rounded up
_SAMPLE_MEMORY = 128 << 20  # kSampleMemory of csrc/cuda/ops_sampled.cpp
_WARP_FEATURES, _GROUP = 256, 64  # kWarpFeatures, and the features of a group


def scratch(func, args) -> int:
    """Bytes that the CUDA kernel behind `func` takes while it runs.

    Args:
        func: an op as a TorchDispatchMode sees it on the CPU. args: what it is called with.
    """
    if func is _ATTENTION_BACKWARD:
        return _attention_backward(args[1], args[2])
    if func is _SAMPLED:
        return _sampled(*args[:4], args[5], args[6] if len(args) > 6 else 2)
    return 0


def _attention_backward(query, key) -> int:
    """FlashAttention-2: the query's gradient is gathered in float32, beside a number for each row;
    keys and values that several heads share get a gradient of each first."""
    batch, heads, length, width = query.shape
    rows = -(-length // _BLOCK) * _BLOCK
    gathered = 4 * batch * heads * rows * (width + 1)
    shared = 0
    if key.shape[1] != heads:
        shared = 2 * batch * heads * key.shape[2] * width * query.element_size()
    return gathered + shared


def _sampled(grad, a, b, a_scale, share: float, block: int) -> int:
    """As `Plan` in csrc/cuda/sampled.cu: scores, random marks, and what is taken of the wider
    operand, in parts of at most 128 MiB; float8 operands are converted first."""
    tokens = b.numel() // b.shape[-1]
    wide_a = a.shape[-1] > b.shape[-1]
    features, columns = (a, b)[not wide_a].shape[-1], (a, b)[wide_a].shape[-1]
    if share >= 1 and a_scale is None and grad.dtype == a.dtype == b.dtype:
        return 0  # the library's product
    sampling = share < 1
    copies_x = sampling or (wide_a and a_scale is not None)
    copies_z = not wide_a and a_scale is not None
    size = b.element_size()
    total = 4 * tokens * (-(-features // block) + 1) if sampling else 0
    if copies_x:
        groups = -(-features // _GROUP)
        steps = max(1, _SAMPLE_MEMORY // max(1, tokens * _WARP_FEATURES * size))
        part = min(groups, steps * (_WARP_FEATURES // _GROUP))
        total += part * _GROUP * tokens * size + 4 * part * -(-tokens // 32)
    return total + (tokens * columns * size if copies_z else 0)


class FunctionalOnCuda:
    """torch.nn.functional with rms_norm as autocast and the fused kernel make it there."""

    def __getattr__(self, name: str):
        return getattr(F, name)

    @staticmethod
    def rms_norm(x: Tensor, shape, weight: Tensor | None = None, eps: float | None = None):
        if weight is not None:
            raise NotImplementedError("the plan knows rms_norm without a weight only")
        if torch.is_autocast_enabled("cpu"):  # CUDA's autocast computes it in float32
            x = x.float()
        return _FusedRMSNorm.apply(x)


class _FusedRMSNorm(torch.autograd.Function):
    """One kernel, which keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, _ = ctx.saved_tensors
        return torch.empty_like(x)
