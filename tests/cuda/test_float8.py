import pytest
import torch

from molegrad.ops.checks import FLOAT8
from molegrad.ops.float8 import (
    add_quantized_reference,
    float8_dtype,
    quantize_rows_reference,
    quantize_tensor_reference,
)
from molegrad.ops.registry import OPS
from tests.cuda.build import call_op
from tests.cuda.pairs import pairwise
from tests.samples import randn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def rows_of_every_kind(t, n, dtype):
    x = randn(t, n) * (3 * randn(t, n, seed=1)).exp()
    if t > 8:
        x[0], x[1], x[2, 0], x[3] = 0.0, torch.nan, torch.inf, -0.0
        x[4] *= 1e-41
        x[5] = 1e6
        x[5, n // 2], x[6, 0] = torch.nan, -torch.inf
        x[7] = 448.0
    return x.to(dtype)


def quantize(library, x, e5m2=False):
    data = torch.zeros(x.shape, dtype=torch.uint8)
    scale = torch.zeros(x.shape[0])
    library.molegrad_quantize_rows(x.dtype, x, *x.shape, x.stride(0), int(e5m2), data, scale)
    return data.view(float8_dtype(e5m2)), scale


def saturated(ratio, e5m2):
    """Numbers beyond the largest, which only a row that is not finite has, are the largest here;
    in torch they are NaN or infinite."""
    dtype = float8_dtype(e5m2)
    largest = torch.finfo(dtype).max
    return ratio.clamp(-largest, largest).to(dtype)


def same(data, expected):  # -0 is not 0 here, but one NaN is as good as another
    bits, nan = expected.view(torch.uint8), expected.float().isnan()
    return torch.equal(data.float().isnan(), nan) and (data.view(torch.uint8) == bits)[~nan].all()


ROWS = [(1, 1), (11, 3), (9, 64), (12, 257), (3, 2056), (2, 2504), (1, 16640), (1, 16645)]


@pytest.mark.parametrize("shape, dtype, e5m2", pairwise(ROWS, [F32, F64, BF16, F16], [False, True]))
def test_float8_rows_bit_for_bit(emulated, shape, dtype, e5m2):
    t, n = shape
    x = rows_of_every_kind(t, n, dtype)
    expected_scale = quantize_rows_reference(x, e5m2)[1]
    expected = saturated(x.float() / expected_scale[:, None], e5m2)
    wide = torch.zeros(t, n + 9, dtype=dtype)
    apart, shifted = wide[:, :n], wide[:, 1 : n + 1]
    for view in (x, apart, shifted):
        view.copy_(x)
        data, scale = quantize(emulated, view, e5m2)
        assert torch.equal(scale, expected_scale)
        assert same(data, expected)
    if n > 3000:
        return
    apart = torch.zeros(t, n // 16 * 16 + 32, dtype=dtype)[:, :n]  # whole packs, rows apart
    apart.copy_(x)
    assert same(quantize(emulated, apart, e5m2)[0], expected)


@pytest.mark.parametrize("e5m2", [False, True])
def test_float8_rows_round_every_magnitude_as_torch_does(emulated, e5m2):
    dtype = float8_dtype(e5m2)
    largest = torch.finfo(dtype).max
    bits = torch.arange(0, 2**31, 49999, dtype=torch.int64).to(torch.int32)
    x = bits.view(F32)
    x = x[x <= largest]
    x = torch.cat([x, -x, torch.tensor([largest])])[None]  # the scale is 1
    data, scale = quantize(emulated, x, e5m2)
    assert scale.item() == 1 and same(data, x.to(dtype))


@pytest.mark.parametrize(
    "shape, dtype, e5m2",
    pairwise([(1, 1), (11, 3), (9, 64), (12, 257), (0, 5)], [F32, F64, BF16, F16], [False, True]),
)
def test_float8_of_a_whole_tensor_bit_for_bit(emulated, shape, dtype, e5m2):
    t, n = shape
    finite = randn(t, n) * (3 * randn(t, n, seed=1)).exp()
    for factor, bad in ((1.0, None), (0.0, None), (1e-40, None), (1.0, torch.nan), (1, torch.inf)):
        x = (factor * finite).to(dtype)
        if bad is not None and t > 0:
            x[t // 2, n // 2] = bad
        expected_scale = quantize_tensor_reference(x, e5m2)[1]
        expected = saturated(x.float() / expected_scale, e5m2)
        wide = torch.zeros(t, n + 9, dtype=dtype)
        packed = torch.zeros(t, n // 16 * 16 + 32, dtype=dtype)
        for view in (x, wide[:, :n], wide[:, 1 : n + 1], packed[:, :n]):
            view.copy_(x)
            data = torch.zeros(x.shape, dtype=torch.uint8)
            scale, scratch = torch.zeros(()), torch.full((4,), 255, dtype=torch.uint8)
            emulated.molegrad_quantize_tensor(
                dtype, view, t, n, view.stride(0), int(e5m2), data, scale, scratch
            )
            assert torch.equal(scale, expected_scale)
            assert same(data.view(expected.dtype), expected)


@pytest.mark.parametrize(
    "dtype, by_row, out", pairwise(FLOAT8, [True, False], [F32, F64, BF16, F16])
)
def test_dequantized(emulated, dtype, by_row, out):
    codes = torch.arange(256, dtype=torch.uint8).repeat(3).view(dtype).view(12, 64)
    scale = torch.rand(12) if by_row else torch.rand(1)
    wide = torch.zeros(12, 70).to(dtype)
    wide[:, 1:65] = codes
    for x in (codes, wide[:, 1:65]):
        got = torch.zeros(12, 64, dtype=out)
        emulated.molegrad_dequantize(dtype, x, 12, 64, x.stride(0), scale, int(by_row), out, got)
        wide_out = F64 if out == F64 else F32
        expected = (codes.to(wide_out) * scale.to(wide_out)[:, None]).to(out)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


SUMS = [(1, 1), (13, 11), (1, 5), (5, 1), (70, 264), (131, 48), (2, 2504), (1, 16645)]


@pytest.mark.parametrize(
    "shape, dtype, by_column", pairwise(SUMS, [F32, F64, BF16, F16], [False, True])
)
def test_int8_sums_bit_for_bit(emulated, shape, dtype, by_column):
    m, n = shape
    x = 5 * randn(m, n, dtype=dtype)
    scale = randn(1, n).abs() if by_column else randn(m, 1).abs()
    data = (40 * randn(m, n, seed=3)).clamp(-127, 127).to(torch.int8)
    if m > 12:
        x[:, 3], data[:, 3] = 0, 0
        x[4], data[4] = 0, 0
        x[5, 5], x[6, 6] = torch.inf, torch.nan
    expected, expected_scale = data.clone(), scale.clone()
    add_quantized_reference(expected, expected_scale, x)
    for view in (x, torch.zeros(m, n + 9, dtype=dtype)[:, 1 : n + 1]):
        view.copy_(x)
        got, got_scale = data.clone(), scale.clone()
        scratch = torch.full((8 * n,), 255, dtype=torch.uint8)
        emulated.molegrad_add_quantized(
            dtype, view, m, n, view.stride(0), got, got_scale, by_column, scratch
        )
        torch.testing.assert_close(got_scale, expected_scale, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got, expected)


def test_nothing_to_do(emulated):
    quantize(emulated, torch.zeros(0, 5))
    for by_column in (False, True):
        for m, n in ((0, 5), (5, 0)):
            scale = torch.full((max(m, n),), 3.0)
            emulated.molegrad_add_quantized(
                F32, torch.zeros(m, n), m, n, n, torch.zeros(m, n), scale, by_column, None
            )
            assert (scale == 3).all()


@pytest.mark.parametrize(
    "x",
    [randn(5), randn(2, 3, 7), randn(7, 12).mT, randn(4, 3, 8).transpose(0, 1), randn(0, 4)],
    ids=lambda x: str(tuple(x.shape)),
)
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("e5m2", [False, True])
def test_the_ops_of_float8(emulated_ops, x, dtype, e5m2):
    x = x.to(dtype)
    for name in ("quantize_rows", "quantize_tensor"):
        data, scale = call_op(name, x, e5m2)
        expected, expected_scale = OPS[name].reference(x, e5m2)
        assert data.shape == x.shape and data.is_contiguous() and data.dtype == expected.dtype
        assert same(data, expected) and torch.equal(scale, expected_scale)
        assert scale.shape == expected_scale.shape


@pytest.mark.parametrize("by_column", [False, True])
def test_the_op_add_quantized(emulated_ops, by_column):
    x = randn(12, 20)
    scale = randn(1, 20).abs() if by_column else randn(12, 1).abs()
    data = (40 * randn(12, 20, seed=3)).to(torch.int8)
    expected, expected_scale = data.clone(), scale.clone()
    add_quantized_reference(expected, expected_scale, x)
    for values, scales, sums in (
        (data.clone(), scale.clone(), x),
        (
            data.mT.contiguous().mT,
            scale.repeat(2, 2)[: len(scale), : scale.shape[1]],
            x.mT.clone().mT,
        ),
    ):
        call_op("add_quantized_", values, scales, sums)
        assert torch.equal(values, expected) and torch.equal(scales, expected_scale)
