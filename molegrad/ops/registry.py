"""Binds an op's parts and puts it under `torch.ops.molegrad`.

An op's reference (its formula in plain torch) is registered for every device; a native kernel of
the same name (csrc/cpu, csrc/cuda) takes precedence where it is built, and is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from molegrad.ops.amp import autocast_key, without_autocast


@dataclass(frozen=True)
class Op:
    schema: str
    reference: Callable
    check: Callable
    fake: Callable
    backward: Callable | None  # None: there is nothing to differentiate
    setup: Callable | None
    cast: int
    composed: bool


# By name, as far as their families have been imported; `op` alone adds to it.
OPS: dict[str, Op] = {}

# torch.library objects must stay alive as long as their registrations are wanted.
_LIBRARY = torch.library.Library("molegrad", "DEF")


def op(
    name: str,
    schema: str,
    reference: Callable,
    *,
    check: Callable,
    fake: Callable | None = None,
    backward: Callable | None = None,
    setup: Callable | None = None,
    cast: int = 0,
    composed: bool = False,
) -> None:
    """Register `torch.ops.molegrad.<name>`.

    Args:
        schema: arguments and results, as in torch's native_functions.yaml.
        reference: computes the op on every device.
        check: raises RuntimeError for arguments that do not fit; the reference and the fake kernel
            get what it let pass. A native kernel does not run it: see `call`.
        fake: results without numbers, from which torch.compile plans; None: there is no result.
        backward, setup: as in `torch.library.register_autograd`.
        cast: how many of the first arguments autocast has in its own dtype.
        composed: of other ops or of the library's products, with no kernel of its own.
    """
    entry = Op(schema, reference, check, fake or _nothing, backward, setup, cast, composed)
    OPS[name] = entry
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # The reference's products have the dtypes that it says, as those of the native kernels.
    kernel = without_autocast(_checked(entry.check, entry.reference))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    qualified = f"molegrad::{name}"
    torch.library.register_fake(qualified, _checked(entry.check, entry.fake), lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, without_autocast(backward), setup_context=setup, lib=_LIBRARY
        )
    if cast:
        _LIBRARY.impl(name, _autocast(name, cast, "cpu"), "AutocastCPU")
        _LIBRARY.impl(name, _autocast(name, cast, "cuda"), "AutocastCUDA")


def call(name: str, *args):
    """`torch.ops.molegrad.<name>`, checked in Python first: a native kernel checks only what memory
    safety depends on, and in fewer words."""
    if not torch.compiler.is_compiling():  # there the fake kernel checks
        OPS[name].check(*args)
    return getattr(torch.ops.molegrad, name)(*args)


def refuse(name: str) -> Callable:
    """A backward that says clearly that there is none."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"molegrad::{name} is not differentiable: call it under torch.no_grad() or on detached "
            "tensors"
        )

    return backward


def _nothing(*args) -> None:
    return None


def _checked(check: Callable, kernel: Callable) -> Callable:
    def run(*args, **kwargs):
        check(*args, **kwargs)
        return kernel(*args, **kwargs)

    return run


def _autocast(name: str, cast: int, device_type: str) -> Callable:
    """The first `cast` arguments (of a linear: x, weight and bias) in autocast's dtype, as torch's
    own linear has them; the others as they are."""
    key = autocast_key(device_type)

    def run(*args):
        dtype = torch.get_autocast_dtype(device_type)
        operands = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in args[:cast]
        )
        with torch._C._ExcludeDispatchKeyGuard(key):
            return getattr(torch.ops.molegrad, name)(*operands, *args[cast:])

    return run
