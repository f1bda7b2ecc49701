"""Fake kernels: shapes and dtypes of the ops' results, from which torch.compile plans.

One function an op, of the op's own name, where `molegrad.registry` does not say it in a line.
"""

from __future__ import annotations

import torch

from molegrad import reference
from molegrad.reference import acc_dtype


def lowrank_grad(a, b, v, power_iters=1, probes=None, cond_max=1e3, a_scale=None, b_scale=None):
    dtype = acc_dtype(a.dtype, b.dtype)
    k = v.shape[1]
    return (
        a.new_empty((b.shape[-1], k), dtype=dtype),
        a.new_empty((a.shape[-1], k), dtype=dtype),
        a.new_empty((), dtype=dtype),
        a.new_empty((), dtype=torch.int32),
    )


def sketch(a, b, u, v, a_scale=None, b_scale=None):
    dtype = acc_dtype(a.dtype, b.dtype)
    return (
        a.new_empty((b.shape[-1], v.shape[1]), dtype=dtype),
        a.new_empty((a.shape[-1], u.shape[1]), dtype=dtype),
    )


def orthonormalize(y, cond_max=1e3):
    dtype, batch, (m, k) = acc_dtype(y.dtype), y.shape[:-2], y.shape[-2:]
    return (
        y.new_empty((*batch, m, k), dtype=dtype),
        y.new_empty((*batch, k, k), dtype=dtype),
        y.new_empty(batch, dtype=torch.int32),
    )


def tangent_factors(u, v, y, w, cond_max=1e3):
    (m, k), n = u.shape, v.shape[0]
    dtype = acc_dtype(y.dtype)
    return u.new_empty((m, 2 * k), dtype=dtype), u.new_empty((n, 2 * k), dtype=dtype)


def sampled_grad_(grad, a, b, a_scale, counter, share, block=2, alpha=1.0, seed=0):
    return b.new_empty((len(reference.SAMPLING),), dtype=torch.float32)


def project_tokens(a, basis_v):
    return a.new_empty((_count(a), basis_v.shape[1])), a.new_empty(basis_v.shape)


def sample_tokens(a, counter, stride, seed=0):
    count = (_count(a) + stride - 1) // stride
    return a.new_empty((count, a.shape[-1])), a.new_empty((count,), dtype=torch.int64)


def projected_grad_(grad, b, p, rows, rows_scale, index, v, stride, alpha=1.0):
    return (
        b.new_empty(v.shape, dtype=acc_dtype(b.dtype)),
        b.new_empty((len(reference.SAMPLING),), dtype=torch.float32),
    )


def _count(x):
    """T of x (…, T, features)."""
    return x.reshape(-1, x.shape[-1]).shape[0]


def quantize_rows(x, e5m2=False):
    data = x.new_empty(x.shape, dtype=reference.float8_dtype(e5m2))
    return data, x.new_empty(x.shape[:-1], dtype=torch.float32)


def quantize_tensor(x, e5m2=False):
    data = x.new_empty(x.shape, dtype=reference.float8_dtype(e5m2))
    return data, x.new_empty((), dtype=torch.float32)


def linear(x, weight, bias, *rest):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
