"""Numbers in 8 bits: rounding bit for bit as torch does it, in float8 and in int8."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.float8 import add_quantized_reference, float8_dtype
from tests.ops.samples import (
    BF16,
    DTYPES,
    E4M3,
    E5M2,
    F32,
    F64,
    assert_refused,
    counter,
    narrowed,
)  # fmt: skip
from tests.samples import error, pairwise, randn, tokens

SHAPES = [(), (5,), (7, 3), (2, 5, 11), (300, 257), (0, 4)]


@pytest.mark.parametrize("shape, dtype, e5m2", pairwise(SHAPES, DTYPES, [False, True]), ids=str)
def test_quantised_bit_for_bit(shape, dtype, e5m2):
    """Native as the reference: zeros, subnormal numbers, NaN and infinity too."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    x = (x * (3 * x).exp()).clamp(-400, 400).to(dtype)  # beside NaN the scale is 1
    cases = [x, 0 * x, (1e-41 * x.float()).to(dtype), x.movedim(0, -1) if x.dim() else x]
    for bad in (torch.nan, torch.inf):
        if x.numel() > 0:
            cases.append(x.clone())
            cases[-1].view(-1)[x.numel() // 2] = bad
    for case in cases:
        names = ["quantize_tensor"] + ["quantize_rows"] * (case.dim() > 0 and case.shape[-1] > 0)
        for name in names:
            data, scale = getattr(ops, name)(case, e5m2)
            expected, expected_scale = ops.OPS[name].reference(case, e5m2)
            assert data.dtype == expected.dtype == (E5M2 if e5m2 else E4M3)
            assert data.shape == case.shape and torch.equal(scale, expected_scale)
            torch.testing.assert_close(
                data.float(), expected.float(), rtol=0, atol=0, equal_nan=True
            )
            assert not data.float().isnan().any() or not case.isfinite().all()


@pytest.mark.parametrize("e5m2", [False, True])
def test_every_magnitude_is_rounded_as_torch_does(e5m2):
    dtype = float8_dtype(e5m2)
    x = torch.arange(0, 2**31, 4999, dtype=torch.int64).to(torch.int32).view(F32)
    x = x[x <= torch.finfo(dtype).max]
    x = torch.cat([x, -x, torch.tensor([torch.finfo(dtype).max])])  # so that the scale is 1
    for quantize in (ops.quantize_rows, ops.quantize_tensor):
        data, scale = quantize(x, e5m2)
        assert scale.item() == 1 and torch.equal(data.float(), x.to(dtype).float())


def test_rows_keep_their_largest_and_lose_a_sixteenth_at_most():
    x = randn(3, 7, 33) * torch.logspace(-6, 6, 7)[:, None]
    x[1, 2] = 0
    data, scale = ops.quantize_rows(x)
    back = data.float() * scale.unsqueeze(-1)
    largest = x.abs().amax(-1, keepdim=True)
    assert data.dtype == E4M3 and scale.shape == (3, 7)
    assert ((back - x).abs() <= x.abs() / 16 + largest * 2.0**-17).all()
    torch.testing.assert_close(back.abs().amax(-1, keepdim=True), largest)


def test_scales_of_rows_keep_small_tokens_and_one_scale_does_not():
    x = randn(4, 64) * torch.tensor([[1.0], [1e-3], [1e-6], [1e-12]])
    for dtype, kept in ((E4M3, 2), (E5M2, 3)):
        of_rows, of_all = (
            [error(narrowed(x, dtype, by_row)[2][t], x[t].double()) for t in range(4)]
            for by_row in (True, False)
        )
        assert max(of_rows) < 0.07 and max(of_all[:kept]) < 0.2 and of_all[-1] == 1


@pytest.mark.parametrize(
    "size, dtype, by_column",
    pairwise([(13, 11), (300, 257), (1, 5), (5, 1), (1, 1)], [F32, F64, BF16], [False, True]),
    ids=str,
)
def test_add_quantized_bit_for_bit(size, dtype, by_column):
    m, n = size
    x = 5 * randn(m, n, dtype=dtype)
    scale = randn(1, n).abs() if by_column else randn(m, 1).abs()
    data = (40 * randn(m, n, seed=3)).clamp(-127, 127).to(torch.int8)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for layout in (data, data.mT.contiguous().mT):
            got, scales = layout.clone(), scale.clone()
            expected, expected_scales = data.clone(), scale.clone()
            ops.add_quantized_(got, scales, x)
            add_quantized_reference(expected, expected_scales, x)
            assert torch.equal(got, expected) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("shape", [(13, 1), (1, 11)])
def test_add_quantized_rounds_to_half_a_step(shape):
    data, scale = torch.zeros(13, 11, dtype=torch.int8), torch.ones(shape)
    x = randn(13, 11) * torch.logspace(-3, 3, shape[0] + shape[1] - 1).view(shape)
    total = torch.zeros(13, 11)
    for _ in range(3):
        ops.add_quantized_(data, scale, x)
        total += x
        assert ((data * scale - total).abs() <= 1.51 * scale).all()
    ops.add_quantized_(data, scale, -(data * scale))
    assert not data.any() and torch.equal(scale, torch.ones(shape))
    ops.add_quantized_(data, scale, torch.full((13, 11), float("nan")))
    assert (data * scale).isnan().all()


INT8, ONE = torch.zeros(13, 11, dtype=torch.int8), torch.ones(13, 1)
FULL, COUNTER = tokens(13, 11, 1)[0], counter()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("quantize_rows", (torch.tensor(1.0),), r"x needs at least one feature, got \(\)"),
        ("quantize_rows", (torch.ones(3, 0),), r"x needs at least one feature, got \(3, 0\)"),
        ("quantize_rows", (torch.ones(3, 2).to(E4M3),), "of 16 bits or more"),
        ("quantize_tensor", (COUNTER,), "x must be floating point, got torch.int64"),
        ("add_quantized_", (INT8, torch.ones(11), FULL), r"expected scale \(13, 1\) or \(1, 11\)"),
        ("add_quantized_", (INT8, ONE.double(), FULL), "in float32, got .*float64"),
        ("add_quantized_", (FULL, ONE, FULL), "expected data in int8, got torch.float32"),
        ("add_quantized_", (INT8, ONE, FULL[:3]), r"expected x \(13, 11\), got \(3, 11\)"),
        ("add_quantized_", (INT8[0], ONE, FULL), "data must be a matrix"),
    ],
)
def test_bad_input_says_what_was_wrong(name, args, message):
    assert_refused(name, args, message)
