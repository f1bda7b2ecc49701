"""What the ops accept, in one place: used by the reference and by the fake (shape) kernels.

Every failure is a RuntimeError that starts with "molegrad::<op>: " and names what was given.
The native kernels make the same checks in C++ (csrc/checks.h) in the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.reference import FLOAT8


def _shape(x: Tensor) -> str:
    return "(" + ", ".join(str(s) for s in x.shape) + ")"


def _require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise RuntimeError(f"molegrad::{op}: {message}")


def floating(op: str, *, float8: tuple[str, ...] = (), **tensors: Tensor | None) -> None:
    """All tensors are floating point and on one device; those named may be float8."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        _require(t.is_floating_point(), op, f"{name} must be floating point, got {t.dtype}")
        _require(
            t.dtype.itemsize >= 2 or (name in float8 and t.dtype in FLOAT8), op,
            f"{name} must be floating point of 16 bits or more, got {t.dtype}: convert it first",
        )  # fmt: skip
    first_name, first = next(iter(given.items()))
    for name, t in given.items():
        _require(
            t.device == first.device, op, f"expected {first_name} and {name} on the same device, "
            f"got {first.device} and {t.device}",
        )  # fmt: skip


def factors(op: str, a: Tensor, b: Tensor, a_scale, b_scale, **others: Tensor | None) -> None:
    """a and b of one dtype, or one or both in float8 with a scale; all on one device."""
    both = (("a", a, a_scale), ("b", b, b_scale))
    floating(op, float8=("a", "b"), a=a, b=b, **others, a_scale=a_scale, b_scale=b_scale)
    tokens(op, a, b, same_dtype=all(x.dtype not in FLOAT8 for _, x, _ in both))
    for name, x, scale in both:
        scale_of(op, name, x, scale)


def scale_of(op: str, name: str, x: Tensor, scale: Tensor | None, whole: bool = True) -> None:
    """A scale where x is float8, and none where it is not: one for each token, or where `whole` is
    allowed one for all of x."""
    if x.dtype not in FLOAT8:
        _require(
            scale is None, op, f"{name}_scale belongs to a float8 {name}, got {name} of "
            f"{x.dtype}: multiply {name} by it, or leave it out",
        )  # fmt: skip
        return
    _require(
        scale is not None, op, f"{name} of {x.dtype} needs {name}_scale, what quantize_rows "
        f"{'or quantize_tensor ' if whole else ''}returned with it",
    )  # fmt: skip
    fits = scale.shape == x.shape[:-1] or (whole and scale.dim() == 0)
    _require(
        scale.dtype == torch.float32 and fits, op,
        f"expected {name}_scale in torch.float32, {'one number or ' if whole else ''}one for each "
        f"token of {name} {_shape(x)}, got {_shape(scale)} of {scale.dtype}",
    )  # fmt: skip


def matrix(op: str, name: str, x: Tensor) -> None:
    _require(x.dim() == 2, op, f"{name} must be a matrix, got shape {_shape(x)}")


def tokens(op: str, a: Tensor, b: Tensor, same_dtype: bool = True) -> None:
    """a (…, T, n) and b (…, T, m): same leading dimensions, and dtype where that is asked for."""
    _require(
        a.dim() >= 2 and b.dim() >= 2, op,
        "a and b need at least two dimensions (…, T, features), "
        f"got a {_shape(a)} and b {_shape(b)}",
    )  # fmt: skip
    _require(
        a.shape[:-1] == b.shape[:-1], op,
        "expected a and b to agree in every dimension but the last, "
        f"got a {_shape(a)} and b {_shape(b)}",
    )  # fmt: skip
    _require(
        a.dtype == b.dtype or not same_dtype,
        op,
        f"expected a and b of the same dtype, got {a.dtype} and {b.dtype}",
    )


def in_place(op: str, name: str, x: Tensor) -> None:
    """x can be updated in place: none of its numbers share memory, as an expanded one's do."""
    _require(
        all(step != 0 or size <= 1 for size, step in zip(x.shape, x.stride(), strict=True)), op,
        f"{name} {_shape(x)} is expanded, and numbers that share memory cannot be updated in "
        "place: give a clone of it",
    )  # fmt: skip


def basis(op: str, name: str, x: Tensor, rows: int, rank_max: int | None = None) -> None:
    """x (rows, k) with k >= 1, and k <= rank_max where columns must be orthonormal."""
    matrix(op, name, x)
    _require(x.shape[0] == rows, op, f"expected {name} with {rows} rows, got shape {_shape(x)}")
    k = x.shape[1]
    _require(k >= 1, op, f"rank k={k} of {name} must be at least 1")
    if rank_max is not None:
        _require(
            k <= rank_max, op, f"rank k={k} of {name} exceeds {rank_max}: choose a smaller rank"
        )


def cond(op: str, cond_max: float) -> None:
    _require(cond_max >= 1.0, op, f"cond_max must be at least 1, got {cond_max}")


def lowrank_grad(
    a, b, v, power_iters=1, probes=None, cond_max=1e3, a_scale=None, b_scale=None
) -> None:
    op = "lowrank_grad"
    factors(op, a, b, a_scale, b_scale, v=v, probes=probes)
    n, m = a.shape[-1], b.shape[-1]
    basis(op, "v", v, n, min(m, n))
    if probes is not None:
        basis(op, "probes", probes, n)
    _require(power_iters >= 0, op, f"power_iters must be >= 0, got {power_iters}")
    cond(op, cond_max)


def sketch(a, b, u, v, a_scale=None, b_scale=None, op: str = "sketch") -> None:
    factors(op, a, b, a_scale, b_scale, u=u, v=v)
    basis(op, "u", u, b.shape[-1])
    basis(op, "v", v, a.shape[-1])


def sketch_accumulate_(
    y, w, a, b, u, v, a_scale=None, b_scale=None, op: str = "sketch_accumulate_"
) -> None:
    sketch(a, b, u, v, a_scale, b_scale, op)
    floating(op, float8=("a",), a=a, y=y, w=w)
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    for name, x, shape in (
        ("y", y, (b.shape[-1], v.shape[1])),
        ("w", w, (a.shape[-1], u.shape[1])),
    ):
        _require(
            tuple(x.shape) == shape and x.dtype == dtype and x.is_contiguous(), op,
            f"expected {name} contiguous of shape {shape} and {dtype}, "
            f"got {_shape(x)}, {x.dtype}, strides {tuple(x.stride())}",
        )  # fmt: skip


def sketch_accumulate_many_(y, w, a, b, u, v) -> None:
    op = "sketch_accumulate_many_"
    counts = [len(x) for x in (y, w, a, b, u, v)]
    _require(counts[0] >= 1, op, "expected at least one layer, got none")
    _require(
        len(set(counts)) == 1, op,
        f"expected one of y, w, a, b, u and v for each layer, got {', '.join(map(str, counts))}",
    )  # fmt: skip
    for i, layer in enumerate(zip(y, w, a, b, u, v, strict=True)):
        sketch_accumulate_(*layer, op=f"{op}: layer {i}")
        _require(
            a[i].device == a[0].device, op, f"expected all layers on one device, got {a[0].device} "
            f"and, at {i}, {a[i].device}",
        )  # fmt: skip


def orthonormalize(y, cond_max=1e3) -> None:
    op = "orthonormalize"
    floating(op, y=y)
    _require(y.dim() >= 2, op, f"y needs at least two dimensions (…, m, k), got {_shape(y)}")
    m, k = y.shape[-2:]
    _require(1 <= k <= m, op, f"rank k={k} must lie between 1 and m={m}, got y {_shape(y)}")
    cond(op, cond_max)


def tangent_factors(u, v, y, w, cond_max=1e3) -> None:
    op = "tangent_factors"
    floating(op, u=u, v=v, y=y, w=w)
    matrix(op, "u", u)
    matrix(op, "v", v)
    m, n, k = u.shape[0], v.shape[0], u.shape[1]
    _require(
        k >= 1 and 2 * k <= m, op,
        f"rank k={k} needs 1 <= 2k <= m={m}: the tangent estimate has rank 2k",
    )  # fmt: skip
    for name, x, shape in (("v", v, (n, k)), ("y", y, (m, k)), ("w", w, (n, k))):
        _require(tuple(x.shape) == shape, op, f"expected {name} {shape}, got {_shape(x)}")
    for name, x in (("v", v), ("y", y), ("w", w)):
        _require(
            x.dtype == u.dtype, op, f"expected u and {name} of the same dtype, "
            f"got {u.dtype} and {x.dtype}",
        )  # fmt: skip
    cond(op, cond_max)


def polar_factor(w) -> None:
    op = "polar_factor"
    floating(op, w=w)
    _require(w.dim() >= 2, op, f"w needs at least two dimensions (…, n, k), got {_shape(w)}")
    n, k = w.shape[-2:]
    _require(1 <= k <= n, op, f"rank k={k} must lie between 1 and n={n}, got w {_shape(w)}")


def lowrank_update_(weight, u, w, alpha=-1.0, decay=0.0) -> None:
    op = "lowrank_update_"
    floating(op, weight=weight, u=u, w=w)
    matrix(op, "weight", weight)
    in_place(op, "weight", weight)
    basis(op, "u", u, weight.shape[0])
    basis(op, "w", w, weight.shape[1])
    _require(
        u.shape[1] == w.shape[1],
        op,
        f"expected u and w of one rank k, got {_shape(u)} and {_shape(w)}",
    )


def lowrank_update_many_(
    weights, u, w, alpha=-1.0, decay=0.0, stochastic=False, counter=None, seed=0
) -> None:
    op = "lowrank_update_many_"
    _require(len(weights) >= 1, op, "expected at least one weight, got none")
    first = weights[0]
    floating(op, weights=first, u=u, w=w)
    matrix(op, "weights[0]", first)
    for i, weight in enumerate(weights):
        _require(
            weight.shape == first.shape
            and weight.dtype == first.dtype
            and weight.device == first.device,
            op,
            "expected weights of one shape, dtype and device, got "
            f"{_shape(first)} of {first.dtype} on {first.device} and, at {i}, "
            f"{_shape(weight)} of {weight.dtype} on {weight.device}",
        )
        in_place(op, f"weights[{i}]", weight)
    for name, x, rows in (("u", u, first.shape[0]), ("w", w, first.shape[1])):
        _require(
            x.dim() == 3 and x.shape[:2] == (len(weights), rows) and x.shape[2] >= 1,
            op,
            f"expected {name} ({len(weights)}, {rows}, k), got {_shape(x)}",
        )
    _require(
        u.shape[2] == w.shape[2],
        op,
        f"expected u and w of one rank k, got {_shape(u)} and {_shape(w)}",
    )
    if stochastic:
        _require(
            first.dtype == torch.bfloat16,
            op,
            f"stochastic rounding is for weights of torch.bfloat16, got {first.dtype}",
        )
        _require(counter is not None, op, "stochastic rounding needs a counter, got none")
        step_counter(op, counter)


def step_counter(op: str, counter: Tensor) -> None:
    _require(
        counter.dtype == torch.int64 and counter.dim() == 0, op,
        f"expected counter as an int64 scalar tensor, got {_shape(counter)} of {counter.dtype}",
    )  # fmt: skip


def rademacher(rows, cols, counter, seed=0) -> None:
    op = "rademacher"
    _require(rows >= 0 and cols >= 0, op, f"rows and cols must be >= 0, got {rows} and {cols}")
    step_counter(op, counter)


def sample(op: str, share: float, block: int) -> None:
    _require(share > 0, op, f"share must be positive, got {share}")
    _require(block >= 1, op, f"block must be at least 1, got {block}")


def sampled_grad_(grad, a, b, a_scale, counter, share, block=2, alpha=1.0, seed=0) -> None:
    op = "sampled_grad_"
    float8 = a.dtype == torch.float8_e4m3fn
    floating(op, b=b, grad=grad, a_scale=a_scale, a=None if float8 else a)
    tokens(op, a, b, same_dtype=not float8)
    _require(
        a.device == b.device,
        op,
        f"expected a and b on the same device, got {a.device} and {b.device}",
    )
    shape = (b.shape[-1], a.shape[-1])
    _require(tuple(grad.shape) == shape, op, f"expected grad of shape {shape}, got {_shape(grad)}")
    scale_of(op, "a", a, a_scale, whole=False)
    step_counter(op, counter)
    sample(op, share, block)


def project_tokens(a, basis_v) -> None:
    op = "project_tokens"
    floating(op, a=a, basis_v=basis_v)
    _require(a.dim() >= 1, op, "a needs at least one dimension (…, T, n), got a scalar")
    basis(op, "basis_v", basis_v, a.shape[-1], a.shape[-1])


def sample_tokens(a, counter, stride, seed=0) -> None:
    op = "sample_tokens"
    floating(op, a=a)
    _require(a.dim() >= 1, op, "a needs at least one dimension (…, T, n), got a scalar")
    step_counter(op, counter)
    _require(stride >= 1, op, f"stride must be at least 1, got {stride}")


def projected_grad_(grad, b, p, rows, rows_scale, index, v, stride, alpha=1.0) -> None:
    op = "projected_grad_"
    float8 = rows.dtype in FLOAT8
    floating(op, b=b, grad=grad, p=p, v=v, rows=None if float8 else rows)
    _require(b.dim() >= 2, op, f"b needs at least two dimensions (…, T, m), got {_shape(b)}")
    m, count = b.shape[-1], b.shape[:-1].numel()
    kept(op, count, stride, p, v, rows, rows_scale, index)
    shape = (m, v.shape[0])
    _require(tuple(grad.shape) == shape, op, f"expected grad of shape {shape}, got {_shape(grad)}")
    for name, x in (("p", p), ("v", v)):
        _require(
            x.dtype == b.dtype, op, f"expected b and {name} of the same dtype, got {b.dtype} and "
            f"{x.dtype}",
        )  # fmt: skip


def kept(op: str, count: int, stride: int, p, v, rows, rows_scale, index) -> None:
    """What the projected method keeps of an input of `count` tokens."""
    _require(stride >= 1, op, f"stride must be at least 1, got {stride}")
    matrix(op, "v", v)
    (n, k), groups = v.shape, (count + stride - 1) // stride
    for name, x, shape in (("p", p, (count, k)), ("rows", rows, (groups, n))):
        _require(tuple(x.shape) == shape, op, f"expected {name} {shape}, got {_shape(x)}")
    _require(
        (rows.dtype in FLOAT8) == (rows_scale is not None), op,
        "rows_scale belongs to float8 rows: give both, from quantize_rows, or neither",
    )  # fmt: skip
    for name, x in (("rows_scale", rows_scale), ("index", index)):
        _require(
            x is None or tuple(x.shape) == (groups,), op,
            f"expected {name} with one number for each of the {groups} rows, "
            f"got {_shape(x) if x is not None else 'none'}",
        )  # fmt: skip
    _require(index.dtype == torch.int64, op, f"expected index in int64, got {index.dtype}")


def add_quantized_(data, scale, x) -> None:
    op = "add_quantized_"
    matrix(op, "data", data)
    m, n = data.shape
    _require(data.dtype == torch.int8, op, f"expected data in int8, got {data.dtype}")
    _require(
        tuple(scale.shape) in ((m, 1), (1, n)) and scale.dtype == torch.float32,
        op,
        f"expected scale ({m}, 1) or (1, {n}) in float32, got {_shape(scale)} in {scale.dtype}",
    )
    floating(op, x=x, scale=scale)
    _require(x.shape == data.shape, op, f"expected x {_shape(data)}, got {_shape(x)}")


def quantize_rows(x, e5m2=False) -> None:
    op = "quantize_rows"
    floating(op, x=x)
    _require(
        x.dim() >= 1 and x.shape[-1] >= 1, op, f"x needs at least one feature, got {_shape(x)}"
    )


def quantize_tensor(x, e5m2=False) -> None:
    floating("quantize_tensor", x=x)


def linear_sampled(
    x, weight, bias, data, scale, momentum, momentum_scale, counter, stats, share, block, seed
) -> None:
    op = "linear_sampled"
    linear(op, x, weight, bias, data, scale)
    momentum_of(op, weight, momentum, momentum_scale)
    step_counter(op, counter)
    sample(op, share, block)


def linear_projected(
    x, weight, bias, p, v, rows, rows_scale, index, basis_v, momentum, momentum_scale, counter,
    stats, stride, explored, seed, cond_max,
) -> None:  # fmt: skip
    op = "linear_projected"
    linear(op, x, weight, bias, None, None)
    kept(op, x.shape[:-1].numel(), stride, p, v, rows, rows_scale, index)
    basis(op, "basis_v", basis_v, weight.shape[1], min(weight.shape))
    momentum_of(op, weight, momentum, momentum_scale)
    step_counter(op, counter)
    cond(op, cond_max)


def momentum_of(op: str, weight, momentum, momentum_scale) -> None:
    """None, or one of the weight's shape; int8 with a scale."""
    if momentum is None:
        return
    if momentum_scale is None:
        floating(op, weight=weight, momentum=momentum)
    _require(
        momentum.shape == weight.shape,
        op,
        f"expected momentum of the weight's shape {_shape(weight)}, got {_shape(momentum)}",
    )


def linear(op: str, x, weight, bias, data, scale) -> None:
    floating(op, x=x, weight=weight, bias=bias)
    matrix(op, "weight", weight)
    m, n = weight.shape
    _require(
        x.dim() >= 1 and x.shape[-1] == n, op,
        f"expected x with {n} features in its last dimension, got x {_shape(x)}",
    )  # fmt: skip
    _require(
        x.dtype == weight.dtype, op, f"expected x and weight of the same dtype, got {x.dtype} and "
        f"{weight.dtype}: convert one or use torch.autocast",
    )  # fmt: skip
    if bias is not None:
        _require(
            tuple(bias.shape) == (m,) and bias.dtype == weight.dtype, op,
            f"expected bias ({m},) of {weight.dtype}, got {_shape(bias)} of {bias.dtype}",
        )  # fmt: skip
    _require(
        (data is None) == (scale is None), op, "expected both data and scale of float8, or none"
    )
    if data is not None:
        _require(
            data.shape == x.shape and scale.shape == x.shape[:-1], op,
            f"expected data {_shape(x)} and scale without the last dimension, "
            f"got {_shape(data)} and {_shape(scale)}",
        )  # fmt: skip


def linear_bases(op: str, weight, basis_u, basis_v, rank_k) -> None:
    floating(op, weight=weight, basis_u=basis_u, basis_v=basis_v)
    m, n = weight.shape
    basis(op, "basis_u", basis_u, m)
    basis(op, "basis_v", basis_v, n)
    _require(
        1 <= rank_k <= min(m, n, basis_v.shape[1]), op,
        f"rank k={rank_k} must lie between 1 and {min(m, n, basis_v.shape[1])}",
    )  # fmt: skip
