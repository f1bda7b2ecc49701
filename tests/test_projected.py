"""The projected estimate: the right mean for every basis, as exact as it says, and exact where it
must be."""

import math

import pytest
import torch

from molegrad import ops, projected
from tests.samples import layouts, orthonormal, projection, randn, tokens

F64 = torch.float64


def counter(step: int = 0) -> torch.Tensor:
    return torch.tensor(step)


def estimate(a, b, v, stride, step=0, wrong=None):
    """Ĝ, and the statistics, from a sample of its own; `wrong` spoils the weights."""
    p, rows, scale, index, own_v, _ = projection(a, v, counter(step), stride)
    grad = torch.zeros(b.shape[-1], a.shape[-1], dtype=torch.promote_types(b.dtype, torch.float32))
    right = projected._groups
    with pytest.MonkeyPatch.context() as patch:
        if wrong is not None:
            patch.setattr(projected, "_groups", lambda *given: (None, wrong(right(*given)[1])))
        _, stats = ops.projected_grad_(grad, b, p, rows, scale, index, own_v, stride)
    return grad, stats


def is_unbiased(a, b, v, stride, draws=400, **options) -> bool:
    """The mean of N estimates is off by the error of one over √N, or twice that by chance."""
    g = b.mT @ a
    estimates = torch.stack([estimate(a, b, v, stride, i, **options)[0] for i in range(draws)])
    error_sq = (estimates - g).square().sum((1, 2)).mean()
    return bool((estimates.mean(0) - g).square().sum() < 4 * error_sq / draws)


# The sample


@pytest.mark.parametrize("total", [0, 1, 3, 4, 24, 27])
def test_one_token_of_each_group(total):
    a = randn(total, 5)
    rows, index = ops.sample_tokens(a, counter(), 4, 1)
    assert torch.equal(index // 4, torch.arange(-(-total // 4)))
    assert (index < total).all() and torch.equal(rows, a[index])
    assert torch.equal(index, ops.sample_tokens(a.view(1, total, 5), counter(), 4, 1)[1])


def test_every_token_of_a_group_is_as_likely():
    times, draws = torch.zeros(10), 1500
    for step in range(draws):
        times[ops.sample_tokens(torch.zeros(10, 1), counter(step), 4)[1]] += 1 / draws
    wanted = torch.tensor([0.25] * 8 + [0.5] * 2)
    assert (times - wanted).abs().max() < 4 * 0.5 / draws**0.5


def test_samples_differ_by_seed_step_and_group():
    a = torch.zeros(400, 1)
    first = ops.sample_tokens(a, counter(), 8)[1]
    for other in ((counter(1), 8, 0), (counter(), 8, 1)):
        assert not torch.equal(ops.sample_tokens(a, *other)[1], first)
    assert len((first % 8).unique()) == 8


# The estimate


@pytest.mark.parametrize(("t", "stride"), [(60, 4), (50, 8), (7, 3)])
@pytest.mark.parametrize("k", [1, 6])
def test_unbiased_with_the_variance_it_reports(t, stride, k):
    a, b = tokens(t, 12, 20, F64)
    b *= randn(t, 1, seed=1, dtype=F64)
    v = orthonormal(12, k, dtype=F64)
    assert is_unbiased(a, b, v, stride)
    g, terms = b.mT @ a, (a.square().sum(1) * b.square().sum(1)).sum()
    found = [estimate(a, b, v, stride, i) for i in range(200)]
    error_sq = torch.stack([(e - g).square().sum() for e, _ in found]).mean()
    # Its ratio is taken of a sample, and leaves out what tokens of a group have in common.
    claimed = torch.stack([stats[1] for _, stats in found]).mean()
    if t > 10:
        assert 0.5 < error_sq / (claimed * terms) < 1.2
    assert all(stats[0] == pytest.approx(math.ceil(t / stride) / t) for _, stats in found)


@pytest.mark.parametrize(
    "wrong",
    [lambda size: 1.2 * size, torch.ones_like, lambda size: torch.full_like(size, size[0])],
    ids=["too large", "one", "the last group's as of a full one"],
)
def test_a_wrong_weight_is_a_bias_that_the_test_above_sees(wrong):
    a, b = tokens(17, 12, 20, F64)
    v = orthonormal(12, 2, dtype=F64)
    assert is_unbiased(a, b, v, 8)
    assert not is_unbiased(a, b, v, 8, wrong=wrong)


def test_unbiased_where_p_and_v_are_rounded():
    """As the same P and V are in both terms, their rounding is none of the mean's."""
    a, b = tokens(64, 12, 20, torch.bfloat16)
    v = orthonormal(12, 4)
    truth = b.double().mT @ a.double()
    estimates = [estimate(a, b, v, 4, i)[0] for i in range(600)]
    error = (torch.stack(estimates).double() - truth).square().sum((1, 2)).mean()
    mean = torch.stack(estimates).double().mean(0)
    own = (b.double().mT @ (a @ v.bfloat16()).double()) @ v.bfloat16().double().mT
    off = own @ (torch.eye(12, dtype=F64) - v.double() @ v.double().mT)  # what rounding adds
    assert (mean - truth).square().sum() < 4 * error / 600
    assert off.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_exact_with_every_token_and_where_the_basis_holds_all(dtype):
    a, b = tokens(50, 12, 20, dtype)
    eps = 200 * torch.finfo(dtype).eps
    truth = b.mT @ a
    grad, stats = estimate(a, b, orthonormal(12, 3, dtype=dtype), 1)
    assert (grad - truth).norm() < eps * truth.norm() and stats.tolist() == [1.0, 0.0]
    v = orthonormal(12, 3, dtype=dtype)
    low = randn(50, 3, dtype=dtype) @ v.mT  # rank(A) = k, and V spans it
    truth = b.mT @ low
    for step in range(5):
        grad, stats = estimate(low, b, v, 7, step)
        assert (grad - truth).norm() < eps * truth.norm() and stats[1] < 1e-9


def test_adds_in_place_with_alpha_in_every_layout_and_dtype():
    a, b = tokens(30, 8, 12)
    parts = projection(a, orthonormal(8, 2), counter(), 4)
    truth = ops.projected_grad_(plain := torch.zeros(12, 8), b, *parts) and plain
    for dtype in (torch.float32, torch.bfloat16, F64):
        views, untouched = layouts(12, 8, dtype)
        for grad in views:
            grad.fill_(1.0)
            ops.projected_grad_(grad, b, *parts, alpha=-2.0)
            rounding = 0.02 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(
                grad.float(), 1 - 2 * truth, rtol=rounding, atol=rounding * truth.abs().max()
            )
        assert untouched()
    half = projection(a.bfloat16(), orthonormal(8, 2), counter(), 4)
    for dtype in (torch.float32, torch.bfloat16):  # the momentum's
        grad = torch.zeros(12, 8, dtype=dtype)
        ops.projected_grad_(grad, b.bfloat16().view(1, 30, 12), *half)
        assert (grad - truth).norm() < 0.02 * truth.norm()


def test_float8_rows_are_what_quantize_rows_left_of_them():
    a, b = tokens(64, 16, 24)
    p, rows, _, index, v, stride = projection(a, orthonormal(16, 4), counter(), 4)
    data, scale = ops.quantize_rows(rows)
    grad, plain = torch.zeros(24, 16), torch.zeros(24, 16)
    ops.projected_grad_(grad, b, p, data, scale, index, v, stride)
    left = data.float() * scale[:, None]
    ops.projected_grad_(plain, b, p, left, None, index, v, stride)
    torch.testing.assert_close(grad, plain)
    assert 0 < (left - rows).norm() < 0.05 * rows.norm()


@pytest.mark.parametrize("t", [0, 1, 3])
@pytest.mark.parametrize("zero", ["a", "b", "neither"])
def test_few_tokens_and_zeros_stay_finite(t, zero):
    a, b = tokens(t, 8, 12)
    (a if zero == "a" else b if zero == "b" else a[:0]).zero_()
    grad, stats = estimate(a, b, orthonormal(8, 2), 8)
    assert grad.isfinite().all() and stats.isfinite().all()
    if zero != "neither" or t == 0:
        assert not grad.any() and not stats.any()


def test_nan_reaches_the_gradient():
    a, b = tokens(30, 8, 12)
    for x in (a, b):
        spoiled = x.clone()
        spoiled[3, 2] = float("nan")
        given = (spoiled, b) if x is a else (a, spoiled)
        assert estimate(*given, orthonormal(8, 2), 4)[0].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(3, 3)}, r"expected grad of shape \(12, 8\), got \(3, 3\)"),
        ({"p": torch.zeros(30, 3)}, r"expected p \(30, 2\), got \(30, 3\)"),
        ({"p": torch.zeros(30, 2).double()}, "expected b and p of the same dtype"),
        ({"rows": torch.zeros(8, 9)}, r"expected rows \(8, 8\), got \(8, 9\)"),
        ({"stride": 5}, r"expected rows \(6, 8\), got \(8, 8\)"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"rows_scale": torch.ones(8)}, "rows_scale belongs to float8 rows"),
        ({"rows": torch.zeros(8, 8, dtype=torch.float8_e4m3fn)}, "rows_scale belongs to float8"),
        ({"index": torch.zeros(3)}, r"expected index with one number for each of the 8 rows"),
        ({"index": torch.zeros(8)}, "expected index in int64"),
        ({"b": torch.zeros(12)}, "b needs at least two dimensions"),
    ],
)
def test_bad_arguments_are_named(change, message):
    a, b = tokens(30, 8, 12)
    names = ("p", "rows", "rows_scale", "index", "v", "stride")
    parts = dict(zip(names, projection(a, orthonormal(8, 2), counter(), 4), strict=True))
    given = {"grad": torch.zeros(12, 8), "b": b, **parts, **change}
    with pytest.raises(RuntimeError, match=f"molegrad::projected_grad_: .*{message}"):
        torch.ops.molegrad.projected_grad_(**given)


def test_bad_arguments_of_the_forward_ops_are_named():
    a = randn(30, 8)
    with pytest.raises(RuntimeError, match="project_tokens: expected basis_v with 8 rows"):
        ops.project_tokens(a, randn(7, 2))
    with pytest.raises(RuntimeError, match="project_tokens: rank k=9 of basis_v exceeds 8"):
        ops.project_tokens(a, randn(8, 9))
    with pytest.raises(RuntimeError, match="sample_tokens: stride must be at least 1, got 0"):
        ops.sample_tokens(a, counter(), 0)
    with pytest.raises(RuntimeError, match="project_tokens is not differentiable"):
        ops.project_tokens(a.requires_grad_(), randn(8, 2))[0].sum().backward()
