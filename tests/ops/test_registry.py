"""Every op in the registry: schema, fake kernel, derivative, wrapper, compiled and not."""

import inspect

import pytest
import torch

from molegrad import ops
from molegrad.ops import OPS
from tests.ops.samples import opchecks, sample_inputs
from tests.samples import orthonormal, randn, tokens

# Those of layers are estimators': tests/estimators/test_ops.py.
FAMILIES = [name for name in OPS if not name.startswith("linear")]


@pytest.mark.parametrize("name", FAMILIES)
def test_opcheck(name):
    for args in sample_inputs(name):
        torch.library.opcheck(getattr(torch.ops.molegrad, name), args, test_utils=opchecks(args))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_op_has_a_wrapper_with_the_arguments_of_its_schema(name):
    schema = getattr(torch.ops.molegrad, name).default._schema
    wrapper = inspect.signature(getattr(ops, name)).parameters
    assert list(wrapper) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        default = wrapper[argument.name].default
        assert default == (argument.default_value if argument.has_default_value() else default)
        assert argument.has_default_value() == (default is not inspect.Parameter.empty)
    assert getattr(ops, name).__doc__ and OPS[name].reference.__doc__


@pytest.mark.parametrize("name", [n for n in FAMILIES if OPS[n].backward])
def test_what_has_no_derivative_says_so(name):
    args = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in sample_inputs(name)[0]
    ]
    results = getattr(ops, name)(*args)
    first = results[0] if isinstance(results, tuple) else results
    with pytest.raises(RuntimeError, match=f"molegrad::{name} is not differentiable"):
        first.float().sum().backward()


A, B, U, V = randn(9, 6), randn(9, 5), orthonormal(5, 2), orthonormal(6, 2)
INT8 = torch.zeros(5, 6, dtype=torch.int8)
UNSAFE = [  # a call of each op that would leave its tensors' memory
    ("lowrank_grad", (A, B, V[:-1])),
    ("sketch", (A, B[:-1], U, V)),
    ("sketch_accumulate_", (randn(5, 1), randn(6, 2), A, B, U, V)),
    ("sketch_accumulate_many_", ([randn(5, 2)], [randn(6, 1)], [A], [B], [U], [V])),
    ("orthonormalize", (randn(3, 4),)),
    ("polar_factor", (randn(3, 4),)),
    ("lowrank_update_", (randn(5, 6), U, V[:-1])),
    ("lowrank_update_many_", ([randn(5, 6)], U[None], V[None, :-1])),
    ("sampled_grad_", (randn(5, 5), A, B, None, torch.tensor(0), 0.5)),
    ("rademacher", (-1, 2, torch.tensor(0))),
    ("quantize_rows", (torch.zeros(3, 0),)),
    ("quantize_tensor", (torch.zeros(3, dtype=torch.int64),)),
    ("add_quantized_", (INT8, torch.ones(4, 1), randn(5, 6))),
]


def test_every_op_is_called_unsafely_below():
    assert {name for name, _ in UNSAFE} == set(FAMILIES)


@pytest.mark.parametrize("name, args", UNSAFE)
def test_the_op_itself_refuses_what_would_leave_memory(name, args):
    """Native code too, which the wrappers' checks do not protect."""
    with pytest.raises(RuntimeError, match=f"molegrad::{name}"):
        getattr(torch.ops.molegrad, name)(*args)


def test_compiled_wrappers_compute_the_same_and_refuse_the_same(compiler):
    a, b = tokens(40, 12, 10)
    u, v = orthonormal(10, 3), orthonormal(12, 3)

    def both(a, b):
        return ops.orthonormalize(ops.sketch(a, b, u, v)[0])

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(a, b), both(a, b), strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(RuntimeError, match="expected u with .* rows"):
        compiled(a, randn(40, 9))
