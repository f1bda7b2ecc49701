"""One table of all ops, from which everything under `torch.ops.molegrad` is registered.

Each entry names, in this order, an op's schema, its reference (`molegrad.reference`, or
`molegrad.projected`), its argument check (`molegrad.checks`), its fake kernel (`molegrad.fake`) and
its autograd formula (`molegrad.autograd`). The reference is registered for every device; native
kernels of the same name (csrc/cpu, csrc/cuda) take precedence where they are built. To add an op,
add a row here, its functions of the same name in those modules, a documented wrapper in
`molegrad.ops`, a native kernel if it pays, and its samples in tests/samples.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from molegrad import _native, autograd, checks, fake, projected, reference
from molegrad.amp import autocast_key, without_autocast
from molegrad.reference import acc_dtype

# data and scale are x in float8, to be kept for the backward pass in place of x, or None.
_LINEAR = "Tensor x, Tensor weight, Tensor? bias, Tensor? data, Tensor? scale, "
# Of float8 operands.
_SCALES = "Tensor? a_scale=None, Tensor? b_scale=None"


@dataclass(frozen=True)
class Op:
    schema: str
    reference: Callable
    check: Callable
    fake: Callable
    backward: Callable | None = None  # None: there is nothing to differentiate
    setup: Callable | None = None
    cast: int = 0  # how many of the first arguments autocast has in its own dtype
    composed: bool = False  # of other ops or of the library's products: no kernel of its own


def _linear(x, weight, bias, *rest):
    # With a bias and more than two dimensions torch returns a view, which autograd would not let
    # anybody change in place.
    y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))


def _check_linear_dense(x, weight, bias, data, scale, basis_u, basis_v, *rest):
    checks.linear("linear_dense", x, weight, bias, data, scale)
    checks.linear_bases("linear_dense", weight, basis_u, basis_v, basis_v.shape[1])


def _check_linear_factored(
    x, weight, bias, data, scale, basis_u, basis_v, stats, method, rank_k, *rest
):
    checks.linear("linear_factored", x, weight, bias, data, scale)
    checks.linear_bases("linear_factored", weight, basis_u, basis_v, rank_k)


def _nothing(*args):
    return None


OPS: dict[str, Op] = {
    "lowrank_grad": Op(
        "(Tensor a, Tensor b, Tensor v, int power_iters=1, Tensor? probes=None, "
        f"float cond_max=1e3, {_SCALES}) -> (Tensor u, Tensor w, Tensor norm_sq, Tensor status)",
        reference.lowrank_grad,
        checks.lowrank_grad,
        fake.lowrank_grad,
        autograd.refuse("lowrank_grad"),
    ),
    "sketch": Op(
        f"(Tensor a, Tensor b, Tensor u, Tensor v, {_SCALES}) -> (Tensor y, Tensor w)",
        reference.sketch,
        checks.sketch,
        fake.sketch,
        autograd.sketch_backward,
        autograd.sketch_setup,
    ),
    "sketch_accumulate_": Op(
        f"(Tensor(a!) y, Tensor(b!) w, Tensor a, Tensor b, Tensor u, Tensor v, {_SCALES}) -> ()",
        reference.sketch_accumulate_,
        checks.sketch_accumulate_,
        _nothing,
    ),
    "sketch_accumulate_many_": Op(
        "(Tensor(a!)[] y, Tensor(b!)[] w, Tensor[] a, Tensor[] b, Tensor[] u, Tensor[] v) -> ()",
        reference.sketch_accumulate_many_,
        checks.sketch_accumulate_many_,
        _nothing,
    ),
    "tangent_factors": Op(
        "(Tensor u, Tensor v, Tensor y, Tensor w, float cond_max=1e3) "
        "-> (Tensor left, Tensor right)",
        reference.tangent_factors,
        checks.tangent_factors,
        fake.tangent_factors,
        autograd.refuse("tangent_factors"),
    ),
    "orthonormalize": Op(
        "(Tensor y, float cond_max=1e3) -> (Tensor q, Tensor r, Tensor status)",
        reference.orthonormalize,
        checks.orthonormalize,
        fake.orthonormalize,
        autograd.refuse("orthonormalize"),
    ),
    "polar_factor": Op(
        "(Tensor w) -> Tensor",
        reference.polar_factor,
        checks.polar_factor,
        lambda w: w.new_empty(w.shape, dtype=acc_dtype(w.dtype)),
        autograd.refuse("polar_factor"),
    ),
    "lowrank_update_": Op(
        "(Tensor(a!) weight, Tensor u, Tensor w, float alpha=-1.0, float decay=0.0) -> ()",
        reference.lowrank_update_,
        checks.lowrank_update_,
        _nothing,
    ),
    "lowrank_update_many_": Op(
        "(Tensor(a!)[] weights, Tensor u, Tensor w, float alpha=-1.0, float decay=0.0, "
        "bool stochastic=False, Tensor? counter=None, int seed=0) -> ()",
        reference.lowrank_update_many_,
        checks.lowrank_update_many_,
        _nothing,
    ),
    "sampled_grad_": Op(
        "(Tensor(a!) grad, Tensor a, Tensor b, Tensor? a_scale, Tensor counter, "
        "float share, int block=2, float alpha=1.0, int seed=0) -> Tensor",
        reference.sampled_grad_,
        checks.sampled_grad_,
        fake.sampled_grad_,
    ),
    "project_tokens": Op(
        "(Tensor a, Tensor basis_v) -> (Tensor p, Tensor v)",
        projected.project_tokens,
        checks.project_tokens,
        fake.project_tokens,
        autograd.refuse("project_tokens"),
        cast=1,
        composed=True,
    ),
    "sample_tokens": Op(
        "(Tensor a, Tensor counter, int stride, int seed=0) -> (Tensor rows, Tensor index)",
        projected.sample_tokens,
        checks.sample_tokens,
        fake.sample_tokens,
        autograd.refuse("sample_tokens"),
        cast=1,
        composed=True,
    ),
    "projected_grad_": Op(
        "(Tensor(a!) grad, Tensor b, Tensor p, Tensor rows, Tensor? rows_scale, Tensor index, "
        "Tensor v, int stride, float alpha=1.0) -> (Tensor block, Tensor stats)",
        projected.projected_grad_,
        checks.projected_grad_,
        fake.projected_grad_,
        composed=True,
    ),
    "rademacher": Op(
        "(SymInt rows, SymInt cols, Tensor counter, int seed=0) -> Tensor",
        reference.rademacher,
        checks.rademacher,
        lambda rows, cols, counter, seed=0: counter.new_empty((rows, cols), dtype=torch.float32),
    ),
    "quantize_rows": Op(
        "(Tensor x, bool e5m2=False) -> (Tensor data, Tensor scale)",
        reference.quantize_rows,
        checks.quantize_rows,
        fake.quantize_rows,
        autograd.refuse("quantize_rows"),
    ),
    "quantize_tensor": Op(
        "(Tensor x, bool e5m2=False) -> (Tensor data, Tensor scale)",
        reference.quantize_tensor,
        checks.quantize_tensor,
        fake.quantize_tensor,
        autograd.refuse("quantize_tensor"),
    ),
    "add_quantized_": Op(
        "(Tensor(a!) data, Tensor(b!) scale, Tensor x) -> ()",
        reference.add_quantized_,
        checks.add_quantized_,
        _nothing,
    ),
    "linear_dense": Op(
        f"({_LINEAR} Tensor basis_u, Tensor basis_v, Tensor counter, Tensor stats, str method, "
        "int power_iters, int probes, float trust_max, int explored, int seed, float cond_max, "
        "bool fp8=False) -> Tensor",
        _linear,
        _check_linear_dense,
        fake.linear,
        autograd.linear_dense_backward,
        autograd.linear_setup,
        cast=3,
        composed=True,
    ),
    "linear_factored": Op(
        f"({_LINEAR} Tensor basis_u, Tensor basis_v, Tensor stats, str method, int rank_k, "
        "int power_iters, float cond_max, bool fp8=False) -> Tensor",
        _linear,
        _check_linear_factored,
        fake.linear,
        autograd.linear_factored_backward,
        autograd.linear_setup,
        cast=3,
        composed=True,
    ),
    "linear_sampled": Op(
        f"({_LINEAR} Tensor? momentum, Tensor? momentum_scale, Tensor counter, Tensor stats, "
        "float share, int block, int seed) -> Tensor",
        _linear,
        checks.linear_sampled,
        fake.linear,
        autograd.linear_sampled_backward,
        autograd.linear_setup,
        cast=3,
        composed=True,
    ),
    "linear_projected": Op(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor p, Tensor v, Tensor rows, "
        "Tensor? rows_scale, Tensor index, Tensor basis_v, Tensor? momentum, "
        "Tensor? momentum_scale, Tensor counter, Tensor stats, int stride, int explored, int seed, "
        "float cond_max) -> Tensor",
        _linear,
        checks.linear_projected,
        fake.linear,
        autograd.linear_projected_backward,
        autograd.linear_projected_setup,
        cast=3,
        composed=True,
    ),
}

# torch.library objects must stay alive as long as their registrations are wanted.
_LIBRARY = torch.library.Library("molegrad", "DEF")


def _checked(op: Op, kernel: Callable) -> Callable:
    def run(*args, **kwargs):
        op.check(*args, **kwargs)
        return kernel(*args, **kwargs)

    return run


def _autocast(name: str, cast: int, device_type: str) -> Callable:
    """The first `cast` arguments (of a linear: x, weight and bias) in autocast's dtype, as torch's
    own linear has them; bases in float32."""
    key = autocast_key(device_type)

    def run(*args):
        dtype = torch.get_autocast_dtype(device_type)
        operands = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in args[:cast]
        )
        with torch._C._ExcludeDispatchKeyGuard(key):
            return getattr(torch.ops.molegrad, name)(*operands, *args[cast:])

    return run


def _register(name: str, op: Op) -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(name + op.schema, tags=tags)
    # The reference's products have the dtypes that it says, as those of the native kernels.
    kernel = without_autocast(_checked(op, op.reference))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    qualified = f"molegrad::{name}"
    torch.library.register_fake(qualified, _checked(op, op.fake), lib=_LIBRARY)
    if op.backward is not None:
        torch.library.register_autograd(
            qualified, without_autocast(op.backward), setup_context=op.setup, lib=_LIBRARY
        )
    if op.cast:
        _LIBRARY.impl(name, _autocast(name, op.cast, "cpu"), "AutocastCPU")
        _LIBRARY.impl(name, _autocast(name, op.cast, "cuda"), "AutocastCUDA")


for _name, _op in OPS.items():
    _register(_name, _op)
_native.load()
