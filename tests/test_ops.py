"""Every op in the table: schema, fake kernel, dispatch, values, errors. Native or not alike."""

import pytest
import torch

from molegrad import ops
from molegrad.ops import OPS
from molegrad.ops.checks import FLOAT8, acc_dtype
from tests.samples import orthonormal, randn, sample_inputs, tokens

F64 = torch.float64
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [  # T, n, m, k: one token, fewer tokens than rank, primes, a multiple of every tile
    (1, 7, 5, 3), (2, 31, 37, 9), (123, 53, 61, 7), (0, 8, 6, 2), (160, 64, 96, 32), (77, 5, 5, 5),
]  # fmt: skip


def rounding(dtype: torch.dtype, terms: int) -> float:
    """Relative error allowed: inputs are exact, sums in float32 or float64, sqrt(terms) growth."""
    return 16 * torch.finfo(acc_dtype(dtype)).eps * max(terms, 1) ** 0.5


def rel(x: torch.Tensor, truth: torch.Tensor) -> float:
    scale = truth.double().norm()
    return ((x.double() - truth.double()).norm() / (scale if scale > 0 else 1)).item()


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    for args in sample_inputs(name):
        torch.library.opcheck(getattr(torch.ops.molegrad, name), args, test_utils=checks_for(args))


def checks_for(args, without=()):
    """opcheck's tests; that of the schema computes with its inputs, which float8 does not allow."""
    float8 = any(getattr(arg, "dtype", None) in FLOAT8 for arg in args)
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    names += ("test_aot_dispatch_dynamic",)
    return [n for n in names if n not in without and not (float8 and n == "test_schema")]


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.setup])
def test_opcheck_with_gradients(name):
    for args in sample_inputs(name, requires_grad=True):
        # Buffers that the backward pass moves, which opcheck refuses.
        moves = name in ("linear_dense", "linear_sampled", "linear_projected")
        checks = checks_for(args, ("test_aot_dispatch_dynamic",) if moves else ())
        torch.library.opcheck(getattr(torch.ops.molegrad, name), args, test_utils=checks)


def test_every_op_has_a_typed_wrapper_or_is_a_linear():
    assert {n for n in OPS if not n.startswith("linear")} == {
        n for n in OPS if callable(getattr(ops, n, None))
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "m", "k"), SHAPES)
def test_lowrank_grad_and_sketch_agree_with_float64(t, n, m, k, dtype):
    a, b = tokens(t, n, m, dtype)
    v = orthonormal(n, k, dtype=acc_dtype(dtype))
    u0 = orthonormal(m, k, seed=3, dtype=acc_dtype(dtype))
    g = b.double().mT @ a.double()
    scale = max(g.norm().item(), 1e-30)
    tol = rounding(dtype, max(t, n, m))

    y, w = ops.sketch(a, b, u0, v)
    assert (y.double() - g @ v.double()).norm() <= tol * scale
    assert (w.double() - g.mT @ u0.double()).norm() <= tol * scale
    assert y.dtype == w.dtype == acc_dtype(dtype)

    for power_iters in (0, 1, 2):
        u, w, norm_sq, status = ops.lowrank_grad(a, b, v, power_iters)
        eye = torch.eye(k, dtype=F64)
        assert (u.double().mT @ u.double() - eye).norm() <= rounding(dtype, m * k)
        truth = (
            g @ v.double() @ v.double().mT if power_iters == 0 else u.double() @ (u.double().mT @ g)
        )
        assert ((u.double() @ w.double().mT) - truth).norm() <= 4 * tol * scale
        assert norm_sq.item() == pytest.approx(w.square().sum().item(), rel=1e-4, abs=1e-30)
        assert status.dtype == torch.int32


def test_power_iterations_capture_more_and_the_full_rank_everything():
    a, b = tokens(200, 40, 30, F64, rank=20)
    g = b.mT @ a
    v = orthonormal(40, 6, dtype=F64)
    captured = [ops.lowrank_grad(a, b, v, p)[1].norm().item() for p in (0, 1, 2, 60)]
    assert captured == sorted(captured) and captured[0] < 0.9 * captured[-1]
    best = torch.linalg.svdvals(g)[:6].norm().item()
    assert captured[-1] == pytest.approx(best, rel=1e-3)
    u, w, *_ = ops.lowrank_grad(a, b, orthonormal(40, 30, dtype=F64))
    torch.testing.assert_close(u @ w.mT, g)


def test_norm_estimate_is_unbiased_and_exact_for_a_captured_gradient():
    a, b = tokens(300, 32, 24, F64, rank=10)
    true = (b.mT @ a).square().sum().item()
    v = orthonormal(32, 4, dtype=F64)
    counter = torch.zeros((), dtype=torch.int64)
    estimates = torch.stack(
        [
            ops.lowrank_grad(a, b, v, 1, torch.ops.molegrad.rademacher(32, 4, counter, s))[2]
            for s in range(400)
        ]
    )
    standard_error = (estimates.std() / 20).item()
    assert abs(estimates.mean().item() - true) < 4 * standard_error
    assert standard_error < 0.05 * true
    full = orthonormal(32, 24, dtype=F64)
    low = torch.zeros_like(a)
    low[:, :8] = a[:, :8]  # a gradient whose row space the basis below holds
    full = torch.eye(32, 8, dtype=F64)
    exact = ops.lowrank_grad(low, b, full, 1, torch.ops.molegrad.rademacher(32, 2, counter, 1))[2]
    assert exact.item() == pytest.approx((b.mT @ low).square().sum().item(), rel=1e-10)


def test_sketch_accumulates_exactly_over_chunks_and_micro_batches():
    a, b = tokens(97, 33, 21, F64)
    u, v = orthonormal(21, 5, dtype=F64), orthonormal(33, 6, dtype=F64)
    y, w = torch.zeros(21, 6, dtype=F64), torch.zeros(33, 5, dtype=F64)
    for rows in torch.arange(97).split(10):
        ops.sketch_accumulate_(y, w, a[rows], b[rows], u, v)
    torch.testing.assert_close((y, w), ops.sketch(a, b, u, v), rtol=1e-12, atol=1e-12)


def test_linear_gradients_with_a_full_rank_are_exact():
    """With k = min(m, n) the estimate is G itself, so gradcheck applies to the weight too."""
    x, weight, bias = randn(3, 4, 6, dtype=F64), randn(5, 6, dtype=F64), randn(5, dtype=F64)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def dense(x, weight, bias):
        basis_u, basis_v = orthonormal(5, 5, dtype=F64), orthonormal(6, 5, dtype=F64)
        counter, stats = torch.zeros((), dtype=torch.int64), torch.zeros(8)
        return torch.ops.molegrad.linear_dense(
            x,
            weight,
            bias,
            None,
            None,
            basis_u,
            basis_v,
            counter,
            stats,
            "power",
            1,
            0,
            0.0,
            0,
            0,
            1e3,
        )

    assert torch.autograd.gradcheck(dense, inputs)


def test_linear_factored_gradients_are_those_of_a_low_rank_offset():
    """basis grads are d L(W + U Vᵀ) at a point where the product is zero in one factor."""
    x, weight, bias = randn(7, 6, dtype=F64), randn(5, 6, dtype=F64), randn(5, dtype=F64)
    u, v = orthonormal(5, 2, dtype=F64), orthonormal(6, 2, dtype=F64)
    cotangent = randn(7, 5, dtype=F64)
    u_, v_ = u.clone().requires_grad_(), v.clone().requires_grad_()
    y = torch.ops.molegrad.linear_factored(
        x, weight, bias, None, None, u_, v_, torch.zeros(8), "tangent", 2, 1, 1e3
    )
    y.backward(cotangent)
    p, q = (
        torch.zeros(5, 2, dtype=F64).requires_grad_(),
        torch.zeros(6, 2, dtype=F64).requires_grad_(),
    )
    offset = p @ v.mT + u @ q.mT
    torch.nn.functional.linear(x, weight + offset, bias).backward(cotangent)
    torch.testing.assert_close(u_.grad, p.grad)
    torch.testing.assert_close(v_.grad, q.grad)
    for i in range(2):  # x and bias as nn.Linear has them
        leaf = [x, bias][i].clone().requires_grad_()
        args = [x, weight, bias]
        args[2 * i] = leaf
        assert torch.autograd.gradcheck(
            lambda t, args=args, i=i: torch.ops.molegrad.linear_factored(
                *[t if j == 2 * i else s for j, s in enumerate(args)],
                None, None, u, v, torch.zeros(8), "tangent", 2, 1, 1e3,
            ),
            [leaf],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("log_cond", [0, 2, 4, 6])
def test_orthonormalize_at_every_condition_and_scale(dtype, scale, log_cond):
    m, k = 83, 12
    singular = torch.logspace(0, -log_cond, k, dtype=F64)
    y64 = orthonormal(m, k, 1, F64) @ torch.diag(singular) @ orthonormal(k, k, 2, F64).mT
    y = (y64 * scale).to(dtype)
    q, r, status = ops.orthonormalize(y)
    assert (q.double().mT @ q.double() - torch.eye(k, dtype=F64)).norm() < rounding(dtype, m * k)
    assert rel(q.double() @ r.double() / scale, y.double() / scale) < rounding(dtype, k)
    assert torch.equal(r, r.triu()) and (r.diagonal() >= 0).all()
    assert (status.item() == 0) == (log_cond <= 2)


def test_orthonormalize_of_badly_scaled_columns_is_safe():
    y = orthonormal(40, 6) * torch.logspace(-15, 15, 6)
    q, r, status = ops.orthonormalize(y)
    assert status.item() == 0
    torch.testing.assert_close(q, orthonormal(40, 6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["zero", "zero column", "repeated", "rank 1", "square singular"])
def test_orthonormalize_completes_deficient_blocks(case):
    y = randn(20, 5)
    if case == "zero":
        y = torch.zeros(20, 5)
    elif case == "zero column":
        y[:, 2] = 0
    elif case == "repeated":
        y[:, 4] = y[:, 1]
    elif case == "rank 1":
        y = randn(20, 1) @ randn(1, 5)
    else:
        y = torch.ones(5, 5)
    q, r, status = ops.orthonormalize(y)
    assert status.item() == 2
    assert (q.mT @ q - torch.eye(5)).norm() < 1e-5
    assert (q @ r - y).norm() <= 1e-5 * max(y.norm().item(), 1.0)
    again = ops.orthonormalize(y)
    assert all(torch.equal(x, z) for x, z in zip((q, r, status), again, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_seen_and_enters_no_basis(bad):
    y = randn(3, 8, 3)
    y[1, 4, 2] = bad
    q, r, status = ops.orthonormalize(y)
    assert status.tolist() == [0, 3, 0]
    assert torch.equal(q[1], torch.eye(8, 3)) and r[1].isnan().all()
    assert r[0].isfinite().all() and r[2].isfinite().all()
    a, b = tokens(30, 8, 6)
    a[3, 2] = bad
    u, w, _, status = ops.lowrank_grad(a, b, orthonormal(8, 3))
    assert u.isfinite().all() and not w.isfinite().all() and status.item() == 3
    assert ops.polar_factor(y)[1].isnan().all() and ops.polar_factor(y)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_polar_factor_is_exact(dtype):
    for n, k in [(30, 7), (7, 7), (129, 33), (4, 1)]:
        singular = torch.logspace(0, -3, k, dtype=F64)
        w = (orthonormal(n, k, 1, F64) @ torch.diag(singular) @ orthonormal(k, k, 2, F64).mT).to(
            dtype
        )
        left, s, right = torch.linalg.svd(w.double(), full_matrices=False)
        kept = (s > 1e-5 * s[0]).double()
        truth = left @ torch.diag(kept) @ right
        p = ops.polar_factor(w)
        assert rel(p, truth) < 2e3 * rounding(dtype, n)  # condition 1e3
        u = orthonormal(50, k, 5, F64)
        assert torch.linalg.matrix_norm(u @ p.double().mT, 2).item() == pytest.approx(1, abs=1e-3)


def test_polar_factor_leaves_zero_modes_zero():
    w = randn(20, 2) @ randn(2, 5)
    values = torch.linalg.svdvals(ops.polar_factor(w))
    torch.testing.assert_close(values, torch.tensor([1.0, 1, 0, 0, 0]), atol=1e-4, rtol=0)
    assert torch.equal(ops.polar_factor(torch.zeros(2, 6, 3)), torch.zeros(2, 6, 3))
    tiny = ops.polar_factor(1e-30 * randn(9, 3))
    torch.testing.assert_close(tiny.mT @ tiny, torch.eye(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowrank_update(dtype):
    weight = randn(37, 29, dtype=dtype)
    u, w = randn(37, 5, seed=1), randn(29, 5, seed=2)
    truth = 0.9 * weight.double() - 0.3 * u.double() @ w.double().mT
    before = weight.data_ptr()
    ops.lowrank_update_(weight, u, w, -0.3, 0.1)
    assert weight.data_ptr() == before
    torch.testing.assert_close(weight, truth.to(dtype))
    view = torch.zeros(29, 37, dtype=dtype).mT  # a transposed weight
    ops.lowrank_update_(view, u, w, 1.0)
    torch.testing.assert_close(view, (u.double() @ w.double().mT).to(dtype))


def test_rademacher_is_a_pure_function_and_balanced():
    counter = torch.tensor(3)
    x = ops.rademacher(200, 64, counter, 9)
    assert torch.equal(x, ops.rademacher(200, 64, torch.tensor(3), 9))
    assert torch.equal(x.abs(), torch.ones(200, 64)) and abs(x.mean().item()) < 0.04
    for other in (
        ops.rademacher(200, 64, torch.tensor(4), 9),
        ops.rademacher(200, 64, counter, 10),
    ):
        assert abs((x * other).mean().item()) < 0.04
    assert (x.mT @ x / 200 - torch.eye(64)).abs().max() < 0.4
    # A fixed point: these very numbers are what resumed runs and other devices must draw.
    assert ops.rademacher(2, 8, torch.tensor(1), 2).flatten().tolist() == [
        1 - 2 * ((_splitmix_bits(1, 2, i) >> 40) & 1) for i in range(16)
    ]


def _splitmix_bits(counter: int, seed: int, index: int) -> int:
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30) & (2**34 - 1)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27) & (2**37 - 1)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    stream = mix((counter * 2862933555777941757 + seed) & mask)
    return mix((stream + (index + 1) * 0x9E3779B97F4A7C15) & mask)


def test_non_contiguous_and_leading_dimensions():
    a, b = tokens(60, 24, 18)
    v = orthonormal(24, 4)
    u, w, *_ = ops.lowrank_grad(a, b, v)
    wide_a, wide_b = torch.zeros(60, 48), torch.zeros(18, 60)
    wide_a[:, ::2], wide_b[:] = a, b.mT
    for x, y, basis in (
        (a.view(3, 4, 5, 24), b.view(3, 4, 5, 18), v),
        (wide_a[:, ::2], wide_b.mT, v.mT.contiguous().mT),
        (a.view(12, 5, 24).transpose(0, 1).contiguous().transpose(0, 1), b.view(12, 5, 18), v),
    ):
        u_, w_, *_ = ops.lowrank_grad(x, y, basis)
        torch.testing.assert_close(u_ @ w_.mT, u @ w.mT, rtol=1e-4, atol=1e-4)


A, B, V, U = randn(9, 6), randn(9, 5), orthonormal(6, 2), orthonormal(5, 2)
BAD_CALLS = [
    ("lowrank_grad", (A, B[:-1], V), "expected a and b to agree in every dimension but the last"),
    ("lowrank_grad", (A, B.double(), V), "same dtype"),
    ("lowrank_grad", (A.int(), B.int(), V), "a must be floating point"),
    ("lowrank_grad", (A, B, V[:-1]), "expected v with 6 rows"),
    ("lowrank_grad", (A, B, randn(6, 6)), "rank k=6"),
    ("lowrank_grad", (A, B, V[:, :0]), "rank k=0"),
    ("lowrank_grad", (A, B, V, -1), "power_iters must be >= 0, got -1"),
    ("lowrank_grad", (A, B, V, 1, randn(5, 1)), "expected probes with 6 rows"),
    ("lowrank_grad", (A[0], B[0], V), "at least two dimensions"),
    ("lowrank_grad", (A, B, V, 1, None, 0.5), "cond_max must be at least 1"),
    ("sketch", (A, B, U[:-1], V), "expected u with 5 rows"),
    ("sketch", (A, B, U, V[0]), "v must be a matrix"),
    (
        "sketch_accumulate_",
        (randn(5, 3), randn(6, 2), A, B, U, V),
        "expected y contiguous of shape",
    ),
    (
        "sketch_accumulate_",
        (randn(5, 2).double(), randn(6, 2), A, B, U, V),
        "expected y contiguous",
    ),
    ("orthonormalize", (randn(3, 4),), "rank k=4"),
    ("orthonormalize", (randn(3),), "at least two dimensions"),
    ("polar_factor", (randn(3, 4),), "rank k=4"),
    ("lowrank_update_", (randn(5, 6), U, V[:-1]), "expected w with 6 rows"),
    ("lowrank_update_", (randn(5, 6), U, V[:, :1]), "one rank k"),
    ("rademacher", (2, 2, torch.zeros(())), "expected counter as an int64 scalar"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD_CALLS)
def test_bad_input_says_what_was_wrong(name, args, message):
    with pytest.raises(RuntimeError, match=f"molegrad::{name}: .*{message}"):
        getattr(ops, name)(*args)


def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="molegrad::lowrank_grad: .*same device"):
        torch.ops.molegrad.lowrank_grad(A.to("meta"), B.to("meta"), V)


def test_what_has_no_derivative_says_so():
    q, _, _ = ops.orthonormalize(randn(6, 3).requires_grad_())
    with pytest.raises(RuntimeError, match="orthonormalize is not differentiable"):
        q.sum().backward()
