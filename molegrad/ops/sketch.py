"""Sketches Y = G V = Bᵀ(A V) and W = Gᵀ U = Aᵀ(B U) of a weight gradient, in one pass over A and B.

Sums over tokens, hence exact under accumulation, chunks of tokens and data parallelism.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from molegrad.ops import checks
from molegrad.ops.checks import TOKEN_CHUNK, acc_dtype, flat
from molegrad.ops.registry import call, op, refuse

# Of float8 operands.
SCALES = "Tensor? a_scale=None, Tensor? b_scale=None"


def _scaled_tokens(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Token chunks of X in `dtype`; a float8 one times its scale, of all X or of each token."""
    x = flat(x)
    if scale is None:
        return (chunk.to(dtype) for chunk in x.split(TOKEN_CHUNK))
    scale = scale.to(dtype).reshape(-1, 1).expand(x.shape[0], 1)
    pairs = zip(x.split(TOKEN_CHUNK), scale.split(TOKEN_CHUNK), strict=True)
    return (chunk.to(dtype) * factor for chunk, factor in pairs)


def token_chunks(
    a: Tensor, b: Tensor, a_scale: Tensor | None = None, b_scale: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token chunks of A and B in the accumulation dtype."""
    dtype = acc_dtype(a.dtype, b.dtype)
    return zip(_scaled_tokens(a, a_scale, dtype), _scaled_tokens(b, b_scale, dtype), strict=True)


def sketch_accumulate_reference(
    y: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> None:
    """Y += Bᵀ(A V), W += Aᵀ(B U), reading A and B once."""
    u, v = u.to(y.dtype), v.to(y.dtype)
    for a_t, b_t in token_chunks(a, b, a_scale, b_scale):
        y.addmm_(b_t.mT, a_t @ v)
        w.addmm_(a_t.mT, b_t @ u)


def sketch_reference(
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = Bᵀ(A V) and W = Aᵀ(B U)."""
    y, w = (x.zero_() for x in _fake_sketch(a, b, u, v))
    sketch_accumulate_reference(y, w, a, b, u, v, a_scale, b_scale)
    return y, w


def sketch_accumulate_many_reference(
    y: list[Tensor],
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
) -> None:
    """`sketch_accumulate_` of every layer, in their order."""
    for layer in zip(y, w, a, b, u, v, strict=True):
        sketch_accumulate_reference(*layer)


def _check_sketch(a, b, u, v, a_scale=None, b_scale=None, name: str = "sketch") -> None:
    checks.operands(name, a, b, a_scale, b_scale, u=u, v=v)
    checks.basis(name, "u", u, b.shape[-1])
    checks.basis(name, "v", v, a.shape[-1])


def _check_accumulate(
    y, w, a, b, u, v, a_scale=None, b_scale=None, name: str = "sketch_accumulate_"
) -> None:
    _check_sketch(a, b, u, v, a_scale, b_scale, name)
    checks.floating(name, float8=("a",), a=a, y=y, w=w)
    dtype = acc_dtype(a.dtype, b.dtype)
    for label, x, shape in (
        ("y", y, (b.shape[-1], v.shape[1])),
        ("w", w, (a.shape[-1], u.shape[1])),
    ):
        checks.require(
            tuple(x.shape) == shape and x.dtype == dtype and x.is_contiguous(), name,
            f"expected {label} contiguous of shape {shape} and {dtype}, "
            f"got {checks.text(x)}, {x.dtype}, strides {tuple(x.stride())}",
        )  # fmt: skip


def _check_accumulate_many(y, w, a, b, u, v) -> None:
    name = "sketch_accumulate_many_"
    counts = [len(x) for x in (y, w, a, b, u, v)]
    checks.require(counts[0] >= 1, name, "expected at least one layer, got none")
    checks.require(
        len(set(counts)) == 1, name,
        f"expected one of y, w, a, b, u and v for each layer, got {', '.join(map(str, counts))}",
    )  # fmt: skip
    for i, layer in enumerate(zip(y, w, a, b, u, v, strict=True)):
        _check_accumulate(*layer, name=f"{name}: layer {i}")
        checks.require(
            a[i].device == a[0].device, name,
            f"expected all layers on one device, got {a[0].device} and, at {i}, {a[i].device}",
        )  # fmt: skip


def _fake_sketch(a, b, u, v, a_scale=None, b_scale=None):
    dtype = acc_dtype(a.dtype, b.dtype)
    return (
        a.new_empty((b.shape[-1], v.shape[1]), dtype=dtype),
        a.new_empty((a.shape[-1], u.shape[1]), dtype=dtype),
    )


op(
    "sketch",
    f"(Tensor a, Tensor b, Tensor u, Tensor v, {SCALES}) -> (Tensor y, Tensor w)",
    sketch_reference,
    check=_check_sketch,
    fake=_fake_sketch,
    backward=refuse("sketch"),
)
op(
    "sketch_accumulate_",
    f"(Tensor(a!) y, Tensor(b!) w, Tensor a, Tensor b, Tensor u, Tensor v, {SCALES}) -> ()",
    sketch_accumulate_reference,
    check=_check_accumulate,
)
op(
    "sketch_accumulate_many_",
    "(Tensor(a!)[] y, Tensor(b!)[] w, Tensor[] a, Tensor[] b, Tensor[] u, Tensor[] v) -> ()",
    sketch_accumulate_many_reference,
    check=_check_accumulate_many,
)


def sketch(
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = Bᵀ(A V) (m, k_v) and W = Aᵀ(B U) (n, k_u) in one pass over A and B.

    Args:
        a, b, a_scale, b_scale: as in `lowrank_grad`. u: (m, k_u). v: (n, k_v), any floating dtype.

    Returns:
        y, w in float32, or float64 for float64 inputs; not differentiable.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    return call("sketch", a, b, u, v, a_scale, b_scale)


def sketch_accumulate_(
    y: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> None:
    """Y += Bᵀ(A V) and W += Aᵀ(B U) in place: call it per token chunk, the sum is exact.

    `y` (m, k_v) and `w` (n, k_u) are contiguous and float32 (float64 for float64 inputs); the
    others as in `sketch`.
    """
    call("sketch_accumulate_", y, w, a, b, u, v, a_scale, b_scale)


def sketch_accumulate_many_(
    y: list[Tensor],
    w: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
) -> None:
    """`sketch_accumulate_` of several layers at once: y[i] += B_iᵀ(A_i V_i), w[i] += A_iᵀ(B_i U_i).

    On a GPU a few launches serve all layers in 16 bits of ranks up to 128.

    Args:
        y, w, a, b, u, v: for each layer what `sketch_accumulate_` takes. Shapes, token counts,
            ranks and dtypes may differ from layer to layer; the device may not. A layer may appear
            several times, with the same `y` and `w`.
    """
    call("sketch_accumulate_many_", y, w, a, b, u, v)
