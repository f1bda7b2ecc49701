"""Numbers in 8 bits with scales: float8 operands and inputs, int8 momenta.

Sources: Micikevicius et al., "FP8 formats for deep learning" (2022); Dettmers et al., "8-bit
optimizers via block-wise quantization" (2022), here with one scale a row, rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.ops import checks
from molegrad.ops.registry import call, op, refuse


def float8_dtype(e5m2: bool) -> torch.dtype:
    """float8_e5m2, which has more exponents, or float8_e4m3fn, which has more digits."""
    return torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn


def _float8_scale(peak: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor by which the largest number of `dtype` becomes `peak`."""
    scale = peak / torch.finfo(dtype).max
    # A subnormal scale is too coarse: by it, the largest would not fit.
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)


def quantize_rows_reference(x: Tensor, e5m2: bool = False) -> tuple[Tensor, Tensor]:
    """float8 rows and their scales: x ≈ data · scale."""
    x, dtype = x.to(torch.float32), float8_dtype(e5m2)
    scale = _float8_scale(x.abs().amax(-1), dtype)
    return (x / scale.unsqueeze(-1)).to(dtype), scale


def quantize_tensor_reference(x: Tensor, e5m2: bool = False) -> tuple[Tensor, Tensor]:
    """float8 numbers and one scale for all of them: x ≈ data · scale."""
    x, dtype = x.to(torch.float32), float8_dtype(e5m2)
    peak = x.abs().amax() if x.numel() > 0 else x.new_zeros(())
    scale = _float8_scale(peak, dtype)
    return (x / scale).to(dtype), scale


def dequantize_rows(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """data (…, n) times scale (…), in `dtype`: what `quantize_rows` has left of its input."""
    return data.to(dtype) * scale.to(dtype).unsqueeze(-1)


def add_quantized_reference(data: Tensor, scale: Tensor, x: Tensor) -> None:
    """data · scale += x, rounded to int8 with new scales, one for each row or column."""
    value = data.to(torch.float32) * scale + x.to(torch.float32)
    dim = 1 if scale.shape == (data.shape[0], 1) else 0
    new = value.abs().amax(dim, keepdim=True) / 127.0
    scale.copy_(torch.where(new == 0, 1.0, new))
    data.copy_((value / scale).round_())


def _check_rows(x, e5m2=False) -> None:
    name = "quantize_rows"
    checks.floating(name, x=x)
    checks.require(
        x.dim() >= 1 and x.shape[-1] >= 1, name,
        f"x needs at least one feature, got {checks.text(x)}",
    )  # fmt: skip


def _check_add(data, scale, x) -> None:
    name = "add_quantized_"
    checks.matrix(name, "data", data)
    m, n = data.shape
    checks.require(data.dtype == torch.int8, name, f"expected data in int8, got {data.dtype}")
    checks.require(
        tuple(scale.shape) in ((m, 1), (1, n)) and scale.dtype == torch.float32, name,
        f"expected scale ({m}, 1) or (1, {n}) in float32, "
        f"got {checks.text(scale)} in {scale.dtype}",
    )  # fmt: skip
    checks.floating(name, x=x, scale=scale)
    checks.same_device(name, "x", x, "data", data)
    checks.require(
        x.shape == data.shape, name, f"expected x {checks.text(data)}, got {checks.text(x)}"
    )


def _fake(x: Tensor, e5m2: bool, scales: torch.Size) -> tuple[Tensor, Tensor]:
    data = x.new_empty(x.shape, dtype=float8_dtype(e5m2))
    return data, x.new_empty(scales, dtype=torch.float32)


op(
    "quantize_rows",
    "(Tensor x, bool e5m2=False) -> (Tensor data, Tensor scale)",
    quantize_rows_reference,
    check=_check_rows,
    fake=lambda x, e5m2=False: _fake(x, e5m2, x.shape[:-1]),
    backward=refuse("quantize_rows"),
)
op(
    "quantize_tensor",
    "(Tensor x, bool e5m2=False) -> (Tensor data, Tensor scale)",
    quantize_tensor_reference,
    check=lambda x, e5m2=False: checks.floating("quantize_tensor", x=x),
    fake=lambda x, e5m2=False: _fake(x, e5m2, ()),
    backward=refuse("quantize_tensor"),
)
op(
    "add_quantized_",
    "(Tensor(a!) data, Tensor(b!) scale, Tensor x) -> ()",
    add_quantized_reference,
    check=_check_add,
)


def quantize_rows(x: Tensor, e5m2: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of x in float8, each with a scale of its own, its largest magnitude over float8's.

    Args:
        x: (…, T, n), float16, bfloat16, float32 or float64.
        e5m2: float8_e5m2 with its wider range, for output gradients, instead of float8_e4m3fn.

    Returns:
        data (…, T, n) float8 and scale (…, T) float32 with x ≈ data · scale. E4M3, largest number
        448: relative rounding of 2⁻⁴ down to 2⁻¹⁵ of the row's largest magnitude; E5M2, largest
        57344: of 2⁻³ down to 2⁻³⁰. A row with NaN or infinity has NaN; one whose magnitudes are
        all below 448 · 2⁻¹²⁶ (57344 · 2⁻¹²⁶) becomes zeros.

    Raises:
        RuntimeError: x has no feature, or a dtype that is not one of these.
    """
    return call("quantize_rows", x, e5m2)


def quantize_tensor(x: Tensor, e5m2: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_rows` with one scale, a scalar tensor, for all of x, of any shape.

    Of rows much smaller than the largest less is left; where one number is infinite, only zeros
    and NaN are.
    """
    return call("quantize_tensor", x, e5m2)


def add_quantized_(data: Tensor, scale: Tensor, x: Tensor) -> None:
    """data · scale += x in place, with new scales: the largest magnitude of each over 127.

    Args:
        data: (m, n) int8. scale: (m, 1), one for each row, or (1, n), one for each column,
            float32. x: (m, n), any floating dtype; where it is NaN the scale becomes NaN.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    call("add_quantized_", data, scale, x)
