"""Sketches, native and reference, against float64: every layout, sums over chunks, float8."""

import pytest
import torch

from molegrad import ops
from molegrad.ops.sketch import sketch_reference
from tests.ops.samples import (
    BF16,
    DTYPES,
    E4M3,
    E5M2,
    F16,
    F32,
    F64,
    assert_as_good_as_torch,
    assert_refused,
    narrowed,
    needs_native,
    without_reference,
)  # fmt: skip
from tests.samples import error, orthonormal, pairwise, randn, tokens

SHAPES = [  # T, n, m, k
    (0, 7, 5, 3), (1, 7, 5, 1), (5, 13, 11, 7),  # fewer tokens than rank
    (24, 48, 96, 16),  # whole tiles
    (97, 101, 53, 32), (97, 53, 101, 33), (193, 67, 149, 50), (300, 257, 31, 17),
]  # fmt: skip
FLOAT8_PAIRS = [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2), (E4M3, BF16), (F16, E5M2),
                (F32, E4M3), (E5M2, F64)]  # fmt: skip
FLOAT8_SHAPES = [(0, 7, 5, 3), (1, 7, 5, 1), (5, 13, 11, 7), (97, 101, 53, 32), (193, 67, 149, 20)]


def check(a, b, u, v, a_scale=None, b_scale=None, wide=None, dtype=F32):
    """`sketch` and `sketch_accumulate_` against the float64 sketch of what a and b stand for."""
    wide_a, wide_b = wide or (a.double(), b.double())
    g = wide_b.mT @ wide_a
    got = ops.sketch(a, b, u, v, a_scale, b_scale)
    plain = sketch_reference(a, b, u, v, a_scale, b_scale)
    for x, p, true in zip(got, plain, (g @ v.double(), g.mT @ u.double()), strict=True):
        assert_as_good_as_torch(x, p, true, dtype)
    sums = tuple(torch.ones_like(x) for x in got)
    ops.sketch_accumulate_(*sums, a, b, u, v, a_scale, b_scale)
    torch.testing.assert_close(sums, tuple(x + 1 for x in got))


@pytest.mark.parametrize("shape, dtype", pairwise(SHAPES, DTYPES), ids=str)
def test_sketches_against_float64(shape, dtype):
    t, n, m, k = shape
    check(
        *tokens(t, n, m, dtype), orthonormal(m, min(m, k), 1), randn(n, k + 2, seed=2), dtype=dtype
    )


@pytest.mark.parametrize(
    "shape, dtypes, by_row", pairwise(FLOAT8_SHAPES, FLOAT8_PAIRS, [True, False]), ids=str
)
def test_float8_operands_are_what_they_stand_for(shape, dtypes, by_row):
    t, n, m, k = shape
    a, b = tokens(t, n, m)
    a, a_scale, wide_a = narrowed(a * (2 * randn(t, 1, seed=7)).exp(), dtypes[0], by_row)
    b, b_scale, wide_b = narrowed(1e-5 * b, dtypes[1], by_row)
    u, v = orthonormal(m, min(k, m), 1), randn(n, k + 2, seed=2)
    acc = F64 if F64 in dtypes else F32
    check(a, b, u, v, a_scale, b_scale, (wide_a, wide_b), acc)


@needs_native
def test_the_shapes_above_run_native_code(monkeypatch):
    without_reference(monkeypatch, "sketch", "token_chunks")
    a, b = tokens(10, 6, 5)
    ops.sketch(a, b, orthonormal(5, 2), orthonormal(6, 2))


def test_many_tokens_have_no_bias():
    a, b = randn(4096, 96), randn(4096, 200)
    u, v = orthonormal(200, 32), orthonormal(96, 32)
    truth = sketch_reference(a.double(), b.double(), u.double(), v.double())
    for x, p, true in zip(ops.sketch(a, b, u, v), sketch_reference(a, b, u, v), truth, strict=True):
        assert error(x, true) <= 1.5 * error(p, true)
        bias = ((x.double() - true) * true.sign()).mean().abs() / true.abs().mean()
        assert bias < 2e-7


@pytest.mark.parametrize("n, m", [(33, 21), (21, 33)])
def test_sums_over_chunks_are_exact(n, m):
    a, b = tokens(97, n, m, F64)
    u, v = orthonormal(m, 5, dtype=F64), orthonormal(n, 6, dtype=F64)
    y, w = torch.zeros(m, 6, dtype=F64), torch.zeros(n, 5, dtype=F64)
    for rows in torch.arange(97).split(10):
        ops.sketch_accumulate_(y, w, a[rows], b[rows], u, v)
    torch.testing.assert_close((y, w), ops.sketch(a, b, u, v), rtol=1e-12, atol=1e-12)


def test_many_layers_at_once_are_each_layer_by_itself():
    shapes = [(19, 11, 13, 4, F32), (30, 24, 9, 3, F64), (7, 9, 24, 9, BF16), (5, 11, 13, 2, F16)]
    layers = []
    for i, (t, n, m, k, dtype) in enumerate(shapes):
        a, b = tokens(t, n, m, dtype, seed=i)
        acc = F64 if dtype == F64 else F32
        sums = torch.ones(m, k, dtype=acc), torch.ones(n, k, dtype=acc)
        layers.append((*sums, a, b, randn(m, k, seed=i), randn(n, k, seed=i + 1)))
    layers.append((*layers[0][:2], *layers[0][2:]))  # once more into the same sums
    expected = [[x.clone() for x in layer[:2]] for layer in layers[:-1]]
    for sums, layer in zip([*expected, expected[0]], layers, strict=True):
        ops.sketch_accumulate_(*sums, *layer[2:])
    ops.sketch_accumulate_many_(*map(list, zip(*layers, strict=True)))
    for sums, layer in zip(expected, layers[:-1], strict=True):
        torch.testing.assert_close(layer[:2], tuple(sums))


@needs_native
def test_layouts():
    a, b = tokens(60, 24, 18)
    u, v = orthonormal(18, 4), orthonormal(24, 5)
    expected = ops.sketch(a, b, u, v)
    wide = torch.zeros(60, 50)
    wide[:, 3:27] = a
    gaps = torch.zeros(60, 48)
    gaps[:, ::2] = a
    for x, y in (
        (a.view(3, 4, 5, 24), b.view(3, 4, 5, 18)),
        (wide[:, 3:27], b.mT.contiguous().mT),
        (gaps[:, ::2], b),
    ):  # the same order of tokens: the same bits
        got = ops.sketch(x, y, u.mT.contiguous().mT, v)
        assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))
    turned = a.view(12, 5, 24).transpose(0, 1), b.view(12, 5, 18).transpose(0, 1)
    torch.testing.assert_close(ops.sketch(*turned, u, v), expected)
    row = b[:1].expand(60, 18)
    torch.testing.assert_close(ops.sketch(a, row, u, v), ops.sketch(a, row.contiguous(), u, v))


def test_layouts_of_float8():
    (a, a_scale), (b, b_scale) = (ops.quantize_rows(x) for x in tokens(60, 24, 18))
    u, v = orthonormal(18, 4), orthonormal(24, 5)
    leading = (a.view(3, 20, 24), b.view(3, 20, 18), u, v, a_scale.view(3, 20), b_scale.view(3, 20))
    strided = (a.mT.contiguous().mT, b, u, v, torch.stack([a_scale, a_scale], 1)[:, 1], b_scale)
    for args in (leading, strided):
        torch.testing.assert_close(ops.sketch(*args), ops.sketch(a, b, u, v, a_scale, b_scale))


def test_bits_repeat_at_each_number_of_threads():
    a, b = tokens(700, 60, 90)
    v, u = orthonormal(60, 20), orthonormal(90, 20)
    truth = sketch_reference(a.double(), b.double(), u.double(), v.double())
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        first, again = ((*ops.sketch(a, b, u, v), *ops.lowrank_grad(a, b, v)[:3]) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        assert error(first[0], truth[0]) < 1e-6 and error(first[1], truth[1]) < 1e-6


A, B, V, U = randn(9, 6), randn(9, 5), orthonormal(6, 2), orthonormal(5, 2)
(A8, A_SCALE), (B8, B_SCALE) = ops.quantize_rows(A), ops.quantize_rows(B, True)
Y, W = randn(5, 2), randn(6, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((A, B[:-1], U, V), r"agree in every dimension but the last, got a \(9, 6\)"),
        ((A, B.half(), U, V), "a and b of the same dtype, got torch.float32 and torch.float16"),
        ((A.int(), B, U, V), "a must be floating point, got torch.int32"),
        ((A, B, U[:-1], V), "expected u with 5 rows"),
        ((A, B, U, V[0]), "v must be a matrix"),
        ((A8, B8, U, V, A_SCALE, None), "b of torch.float8_e5m2 needs b_scale, what quantize_rows"),
        ((A8, B8, U, V, None, B_SCALE), "a of torch.float8_e4m3fn needs a_scale"),
        ((A, B8, U, V, A_SCALE, B_SCALE), "a_scale belongs to a float8 a, got a of torch.float32"),
        ((A8, B8, U, V, A_SCALE[:3], B_SCALE), r"expected a_scale in torch.float32, .*got \(3\)"),
        ((A8, B8, U, V, A_SCALE[:, None], B_SCALE), r"each token of a \(9, 6\), got \(9, 1"),
        ((A8, B8, U, V, A_SCALE, B_SCALE.double()), r"b_scale in torch.float32.*torch.float64"),
        ((A8, B8, U, V.to(E4M3), A_SCALE, B_SCALE), "v must be floating point of 16 bits or more"),
        ((A8.view(torch.int8), B8, U, V, None, B_SCALE), "a must be floating point"),
    ],
)
def test_bad_input_says_what_was_wrong(args, message):
    assert_refused("sketch", args, message)
    assert_refused("sketch_accumulate_", (Y, W, *args), message)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("sketch_accumulate_", (randn(5, 3), W, A, B, U, V), r"y contiguous of shape \(5, 2\)"),
        ("sketch_accumulate_", (Y.double(), W, A, B, U, V), "and torch.float32, got .*float64"),
        ("sketch_accumulate_", (Y, randn(2, 6).mT, A, B, U, V), r"expected w .*strides \(1, 6\)"),
        ("sketch_accumulate_many_", ([],) * 6, "expected at least one layer, got none"),
        ("sketch_accumulate_many_", ([Y], [W], [A], [B], [U], []), "got 1, 1, 1, 1, 1, 0"),
        ("sketch_accumulate_many_", ([Y] * 2, [W] * 2, [A] * 2, [B, A], [U] * 2, [V] * 2),
         "layer 1: expected u with 6 rows"),
    ],
)  # fmt: skip
def test_sums_that_do_not_fit_are_named(name, args, message):
    assert_refused(name, args, message)
