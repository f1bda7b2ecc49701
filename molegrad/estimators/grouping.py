"""Sketches of several layers at once: what `LowRank.group_mib` asks for.

In mode "factors" the backward pass of a layer ends in its sketch, of its input A and its output's
gradient B, as the gradient of its two bases. Here A and B wait in a `SketchGroup` that the layers
of a model share, until those that wait reach a limit or the backward pass ends; then one op,
`sketch_accumulate_many_`, adds the sketches of all of them to the bases' `.grad`. After backward()
the gradients are the same to rounding, and so is all that follows: accumulation over
micro-batches, clipping, the optimizers.

What waits belongs to one backward pass: autograd holds it, with the function that it calls at the
pass's end, and lets it go when the pass ends or fails. So an exception leaves nothing behind for
the next pass; sketches that were added before it stay, as gradients do without groups.

Computed at once, as without a group: sketches of bases with hooks of their own (autograd calls
these before a group is done), those that torch.autograd.grad or backward(inputs=...) ask for or
leave out, and those of bases that are not parameters (torch.func.functional_call). Refused with an
error: torch.compile, whose backward pass is a graph of its own; several processes, whose hooks
would send gradients that are not there yet; a second derivative.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from molegrad.ops import checks
from molegrad.ops.amp import without_autocast
from molegrad.ops.float8 import dequantize_rows
from molegrad.ops.linear import check_linear, gradients_of_input_and_bias, setup


class _Waiting(NamedTuple):
    """One use of a layer: its bases (parameters), A (T, n), B (T, m) and all their versions."""

    basis_u: Tensor
    basis_v: Tensor
    a: Tensor
    b: Tensor
    versions: tuple[int, ...]


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(x._version for x in tensors)


class SketchGroup:
    """Sketches of the layers that share it are computed together, see above.

    Args:
        mib: limit of the inputs and output gradients that wait, in MiB.
    """

    def __init__(self, mib: int) -> None:
        self.mib = mib
        self._passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()

    def __reduce__(self):  # a copy of a model has a group of its own
        return SketchGroup, (self.mib,)

    def add(self, basis_u: Tensor, basis_v: Tensor, a: Tensor, b: Tensor) -> None:
        """Let a sketch wait; called in the backward pass that it belongs to."""
        number = torch._C._current_graph_task_id()
        current = self._passes.get(number)
        if current is None:
            current = self._passes[number] = _Pass(self.mib * 2**20)
            torch.autograd.Variable._execution_engine.queue_callback(current.finish)
        versions = _versions(a, b, basis_u, basis_v)
        current.add(_Waiting(basis_u, basis_v, a, b, versions))


class _Pass:
    """What waits in one backward pass, for each stream that works on it (None on a CPU)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: dict[torch.cuda.Stream | None, list[_Waiting]] = {}
        self._held: dict[torch.cuda.Stream | None, dict[int, int]] = {}  # bytes by address
        self._streams: set[torch.cuda.Stream] = set()

    def add(self, layer: _Waiting) -> None:
        stream = torch.cuda.current_stream(layer.a.device) if layer.a.is_cuda else None
        self._waiting.setdefault(stream, []).append(layer)
        held = self._held.setdefault(stream, {})  # what several layers share counts once
        held.update((x.data_ptr(), x.nbytes) for x in (layer.a, layer.b))
        if sum(held.values()) >= self.limit:
            self._compute(stream)

    def finish(self) -> None:
        """The end of the backward pass."""
        for stream in list(self._waiting):
            self._compute(stream)
        for stream in self._streams:
            current = torch.cuda.current_stream(stream.device)
            if current != stream:
                current.wait_stream(stream)

    def _compute(self, stream: torch.cuda.Stream | None) -> None:
        layers, _ = self._waiting.pop(stream), self._held.pop(stream)
        if stream is None:
            return _accumulate(layers)
        self._streams.add(stream)
        with torch.cuda.stream(stream):
            _accumulate(layers)


@torch.no_grad()
def _accumulate(layers: list[_Waiting]) -> None:
    """Add the sketches to the bases' gradients, which begin with zeros where there are none."""
    for layer in layers:
        if layer.versions != _versions(layer.a, layer.b, layer.basis_u, layer.basis_v):
            raise RuntimeError(
                "the input, the output's gradient or a basis of a layer was changed in place while "
                "its sketch waited for others: leave them as they are until the backward pass has "
                "ended, or set group_mib=0"
            )
    sums: dict[int, Tensor] = {}
    fresh: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        for basis in (layer.basis_u, layer.basis_v):
            if id(basis) in sums:
                continue
            grad = basis.grad
            if grad is None or grad.dtype != basis.dtype or not grad.is_contiguous():
                grad = torch.empty_like(basis, memory_format=torch.contiguous_format)
                fresh.append((basis, grad))
            sums[id(basis)] = grad
    if fresh:
        torch._foreach_zero_([grad for _, grad in fresh])
    torch.ops.molegrad.sketch_accumulate_many_(
        [sums[id(layer.basis_u)] for layer in layers],
        [sums[id(layer.basis_v)] for layer in layers],
        [layer.a for layer in layers],
        [layer.b for layer in layers],
        [layer.basis_u.detach() for layer in layers],
        [layer.basis_v.detach() for layer in layers],
    )
    for basis, grad in fresh:
        if basis.grad is None:
            basis.grad = grad
        else:
            basis.grad.add_(grad)


class _GroupedLinear(torch.autograd.Function):
    """`linear_lowrank` with method "tangent" and factors for layers of a group."""

    @staticmethod
    def forward(x, weight, bias, data, scale, basis_u, basis_v, group):
        return F.linear(x, weight, bias)

    setup_context = staticmethod(setup)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: Tensor):
        basis_u, basis_v, group = ctx.own
        weight, a, *scale = ctx.saved_tensors  # once: activation checkpointing insists on it
        grad_x, grad_bias = gradients_of_input_and_bias(ctx, grad, weight)
        grad_u = grad_v = None
        if ctx.needs_input_grad[5] or ctx.needs_input_grad[6]:
            a = checks.flat(dequantize_rows(a, scale[0], grad.dtype) if scale else a)
            b = checks.flat(grad)
            nodes = (node for node, _ in ctx.next_functions[-2:])  # of the last two tensors given
            if all(map(_may_wait, nodes, (basis_u, basis_v))):
                group.add(basis_u, basis_v, a, b)
            else:
                grad_u, grad_v = torch.ops.molegrad.sketch(a, b, basis_u.detach(), basis_v.detach())
        return grad_x, None, grad_bias, None, None, grad_u, grad_v, None


def _may_wait(node, basis: Tensor) -> bool:
    """Whether all that this backward pass does with the gradient of `basis` is to add it to
    `basis.grad`; `node` is where autograd would send it."""
    if getattr(node, "variable", None) is not basis:
        return False
    if basis._backward_hooks or basis._post_accumulate_grad_hooks:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad with this parameter among its inputs
        return False


def grouped_linear(
    group: SketchGroup,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    data: Tensor | None,
    scale: Tensor | None,
    basis_u: Tensor,
    basis_v: Tensor,
) -> Tensor:
    """x (…, n) to (…, m) as `linear_lowrank` with method "tangent" and factors; its sketch waits in
    `group`.

    Raises:
        RuntimeError: torch.compile, several processes, or arguments that do not fit.
    """
    if torch.compiler.is_compiling():
        _refuse_compiled()
    _refuse_processes()
    device, autocast = x.device.type, contextlib.nullcontext()
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):  # as the ops have it
        dtype, autocast = torch.get_autocast_dtype(device), torch.autocast(device, enabled=False)
        x, weight, bias = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias)
        )
    check_linear("linear_lowrank", x, weight, bias, data, scale)
    for name, basis, rows in (("basis_u", basis_u, 0), ("basis_v", basis_v, 1)):
        checks.basis("linear_lowrank", name, basis, weight.shape[rows])
    with autocast:
        return _GroupedLinear.apply(x, weight, bias, data, scale, basis_u, basis_v, group)


_NOT_COMPILED = (
    "group_mib is not for torch.compile, which makes each layer's sketch a part of the compiled "
    "backward pass: set group_mib=0, or do not compile the model"
)


# Not compiled, so that it is raised when the model runs and not taken for a reason to give up
# compiling a part of it.
@torch.compiler.disable(reason=_NOT_COMPILED)
def _refuse_compiled() -> None:
    raise RuntimeError(_NOT_COMPILED)


def _refuse_processes() -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = distributed and torch.distributed.get_world_size() > 1
    wrapper = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if several or wrapper is not None:
        raise RuntimeError(
            "group_mib is not for data parallelism over several processes, which sends each "
            "gradient when autograd has it, before the group's sketches are there: set group_mib=0"
        )
