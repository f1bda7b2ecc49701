"""A training step on tensors without memory: what is alive when, and what it is for.

What: `simulate(config, sizes)` builds the model and the optimizers that a configuration
describes, and runs a step of the very code that trains, on fake tensors, which have shapes and no
data. A record of every storage, from birth to death, gives the peak and its parts:

| part | what it is, by the code that makes it |
|---|---|
| weights, weight casts | parameters; their copies in autocast's dtype |
| optimizer, bases, gradients | state and momenta; bases, sketches, statistics; of parameters |
| inputs | tokens, targets, rotary tables |
| stream | the residual stream (B, T, C) between and within blocks, its first and last norm |
| norms, attention, feed-forward | what else the forward pass, or a recomputed part, makes there |
| keys and values | what attention is called with |
| logits | all that the loss makes: logits, their gradient, the gradients of its operands |
| workspace | the rest: temporaries of the backward pass and of the optimizers |

How: blocks of a model are alike, so the passes of a deep model are those of one with two blocks,
and for every further one what a model with four has more; the optimizers' step is that of the whole
model. The tensors say that they are the CPU's on every device, as autograd refuses those of a
device that this torch was not built for. For a CUDA device two functions are replaced while a step
runs, root mean square norms and the dtype of Muon's polar factors, and what CUDA's kernels allocate
for themselves is added (`molegrad.memory.cuda`).

Not simulated: torch.compile, whose graphs keep less, data parallelism's buffers, temporaries of the
reference formulas where no native kernels are built, and what is done now and then (evaluation,
samples, instruments, checkpoints).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from molegrad import MoleLinear, chunked, clip_grad_norm_, ignored_by_ddp, offload
from molegrad.gpt.model import gpt as model_module
from molegrad.gpt.model import loss as loss_module
from molegrad.gpt.model.gpt import GPT, MLP, Attention, Block, GPTConfig
from molegrad.gpt.model.loss import default_chunk
from molegrad.gpt.train import setup
from molegrad.gpt.train.config import compute_dtype
from molegrad.memory.cuda import FunctionalOnCuda, scratch
from molegrad.optim import muon
from molegrad.optim.muon import working_dtype

PARTS = (
    "weights", "weight casts", "optimizer", "bases", "gradients", "inputs", "stream", "norms",
    "attention", "keys and values", "feed-forward", "logits", "workspace",
)  # fmt: skip
PHASES = ("forward", "backward", "optimizer")
PASSES = PHASES[:2]
HOST = "host"
# Of a sequence's own size by necessity: what remains besides should hardly grow with it.
PER_TOKEN = ("stream", "keys and values")
FEW, MORE = 2, 4  # blocks of the models that stand for a deeper one


@dataclass(frozen=True)
class Simulation:
    """What a training step holds.

    Attributes:
        phases: for each of PHASES the bytes of each of PARTS when most are alive in it.
        held: bytes of each part between two steps.
        host: most bytes of pinned host memory, which a GPU's own leaves out.
    """

    phases: dict[str, dict[str, int]]
    held: dict[str, int]
    host: int = 0

    @property
    def phase(self) -> str:
        """In which the peak is."""
        return max(self.phases, key=self.of)

    @property
    def peak(self) -> int:
        return self.of(self.phase)

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part at the peak."""
        return self.phases[self.phase]

    @property
    def passes(self) -> str:
        """The phase of the two passes that holds more."""
        return max(PASSES, key=self.of)

    def of(self, phase: str) -> int:
        """Most bytes alive in a phase."""
        return sum(self.phases[phase].values())


def simulate(config, sizes: GPTConfig) -> Simulation:
    """A step of a training run on one process that has made a step before; nothing of its size is
    allocated.

    Args:
        config: a resolved training configuration (`molegrad.gpt.train.config.resolve`). Where its
            device_type is not cuda the step is the CPU's.
        sizes: of the model.
    """
    if sizes.depth <= MORE:
        return _simulated(config, sizes)
    few, more = (
        _simulated(config, replace(sizes, depth=depth, aspect_ratio=sizes.width // depth), PASSES)
        for depth in (FEW, MORE)  # of the same width, which is a multiple of 32
    )
    whole = _simulated(config, sizes, PHASES[2:])

    def of_all(small: int, large: int) -> int:
        return small + (large - small) * (sizes.depth - FEW) // (MORE - FEW)

    phases = {
        phase: {part: of_all(few.phases[phase][part], more.phases[phase][part]) for part in PARTS}
        for phase in PASSES
    }
    phases |= {phase: dict(whole.phases[phase]) for phase in PHASES[2:]}
    offloaded = of_all(few.held["stream"], more.held["stream"])  # on the CPU, whose memory it is
    for amounts in (phases[PHASES[2]], whole.held):
        amounts["stream"] += offloaded
    return Simulation(phases, whole.held, of_all(few.host, more.host))


def planned_memory(config, sizes: GPTConfig) -> dict[str, int]:
    """Bytes that a training step is expected to hold: each part at the peak, and "total", the peak.
    Parts that there is nothing of are left out. Arguments: as `simulate` takes them."""
    found = simulate(config, sizes)
    return {**{part: size for part, size in found.parts.items() if size}, "total": found.peak}


def _simulated(config, sizes: GPTConfig, phases: tuple[str, ...] = PHASES) -> Simulation:
    """These phases of a step of a model of these sizes, block by block."""
    gpu = config.device_type == "cuda"
    if not sizes.loss_chunk:
        sizes = replace(sizes, loss_chunk=default_chunk(sizes.vocab_size, config.device_type))
    with torch.device("meta"):  # once its parameters are fake they would refuse another dtype
        model = setup.place(GPT(sizes), config, torch.device("meta"))
        setup.equip(model, config)
    with _no_memory(scratch if gpu else None) as ledger, contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Asked for its address a fake tensor warns, and says 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        if gpu:  # no TorchFunctionMode: it is off in the backward pass, where blocks are recomputed
            stack.enter_context(_replaced(model_module, "F", FunctionalOnCuda()))
            stack.enter_context(_replaced(muon, "working_dtype", lambda _: working_dtype("cuda")))
        run = _Run(ledger, config, model)
        run.make_state()
        start = ledger.now
        run.step(phases)
        return ledger.summary(start, host_counts=not gpu)


@contextlib.contextmanager
def _no_memory(scratch: Callable | None) -> Iterator[_Ledger]:
    """Tensors that are made inside are fake, and in the ledger that it gives."""
    with (
        torch.autograd.set_multithreading_enabled(False),  # the modes are this thread's
        FakeTensorMode(),
        _Ledger(scratch) as ledger,
    ):
        yield ledger


@dataclass
class _Storage:
    size: int
    birth: int
    part: str | None
    death: int | None = None


@dataclass
class _Ledger(TorchDispatchMode):
    """Every storage that operations make, by the moments of its birth and death."""

    scratch: Callable | None = None  # (op, arguments) -> bytes that its kernel takes while it runs
    now: int = 0
    storages: list[_Storage] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[_Storage, weakref.ref]] = {}
        self._sites = _birth_sites()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        size = 0 if self.scratch is None else self.scratch(func, args)
        taken = self._born(size, "workspace") if size else None
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._enter(func, out, args)
        elif isinstance(out, (tuple, list)):
            for each in out:
                if isinstance(each, Tensor):
                    self._enter(func, each, args)
        if taken is not None:
            self._dies(taken)
        if func in _ATTENTION:
            self.label([args[1], args[2]], "keys and values", over=_ACTIVATIONS)
        return out

    def _born(self, size: int, part: str | None) -> _Storage:
        entry = _Storage(size, self.now, part)
        self.storages.append(entry)
        self.now += 1
        return entry

    def _dies(self, entry: _Storage) -> None:
        entry.death = self.now
        self.now += 1

    def _enter(self, func, tensor: Tensor, args) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and known[1]() is not None:
            return
        part = None
        if func is torch.ops.aten._to_copy.default:
            source = self._alive.get(args[0].untyped_storage()._cdata)
            if source is not None and source[0].part == "weights":
                part = "weight casts"
        entry = self._born(storage.nbytes(), part or self._site(func, tensor))

        def gone(_) -> None:
            self._dies(entry)
            alive = self._alive.get(key)
            if alive is not None and alive[0] is entry:
                del self._alive[key]

        self._alive[key] = entry, weakref.ref(storage, gone)

    def _site(self, func, tensor: Tensor) -> str | None:
        """The part that a tensor belongs to by the code that makes it."""
        frame = sys._getframe(3)
        while frame is not None:
            part = self._sites.get(frame.f_code)
            if part is not None:
                if part == "norms" and func is torch.ops.aten.add.Tensor:
                    return "stream"
                return part(tensor) if callable(part) else part
            frame = frame.f_back
        return None

    def label(self, tensors, part: str, over: tuple[str | None, ...] | None = None) -> None:
        """Say what tensors are for; with `over`, of those alone that were for one of these."""
        for tensor in tensors:
            known = self._alive.get(tensor.untyped_storage()._cdata)
            if known is not None and (over is None or known[0].part in over):
                known[0].part = part

    def phase(self, name: str) -> None:
        self.phases.append((self.now, name))

    def summary(self, start: int, host_counts: bool) -> Simulation:
        """The peaks from the moment `start` on."""
        changes: dict[int, tuple[int, int, _Storage]] = {}
        for entry in self.storages:
            changes[entry.birth] = (1, entry.size, entry)
            if entry.death is not None:
                changes[entry.death] = (-1, entry.size, entry)
        alive: dict[str, int] = defaultdict(int)
        total = host = 0
        peaks = dict.fromkeys(PHASES, 0)
        parts: dict[str, dict[str, int]] = {name: {} for name in PHASES}
        phase, coming = PHASES[0], deque(self.phases)
        for when in sorted(changes):
            while coming and coming[0][0] <= when:
                phase = coming.popleft()[1]
            sign, size, entry = changes[when]
            part = entry.part or "workspace"
            alive[part] += sign * size
            if part == HOST and not host_counts:
                host = max(host, alive[HOST])
                continue
            total += sign * size
            if when >= start and total > peaks[phase]:
                peaks[phase], parts[phase] = total, dict(alive)
        if not host_counts:
            for amounts in (alive, *parts.values()):
                amounts.pop(HOST, None)
        complete = {name: _complete(amounts) for name, amounts in parts.items()}
        return Simulation(complete, _complete(alive), host)


def _complete(amounts: dict[str, int]) -> dict[str, int]:
    """Of every part; what there is of the host's memory on a CPU is of the stream."""
    amounts = {**amounts, "stream": amounts.get("stream", 0) + amounts.get(HOST, 0)}
    return {part: amounts.get(part, 0) for part in PARTS}


_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
)
_ACTIVATIONS = (None, "stream", "norms", "attention", "feed-forward")


def _birth_sites() -> dict[CodeType, object]:
    """Code -> the part that what it makes belongs to; of nested calls the innermost decides."""
    sites: dict[CodeType, object] = {}

    def add(owner, part) -> None:
        module = getattr(owner, "__module__", owner.__name__)
        for value in vars(owner).values():
            value = getattr(value, "__func__", value)
            if isinstance(value, property):
                value = value.fget
            # torch.compile leaves functions of torch's own in the classes that it has seen.
            if isinstance(value, FunctionType) and value.__module__ == module:
                sites[inspect.unwrap(value).__code__] = part

    add(GPT, "stream")
    add(Block, "norms")
    add(Attention, "attention")
    add(MLP, "feed-forward")
    add(loss_module, "logits")
    add(loss_module._LinearCrossEntropy, "logits")
    # What a streamed part gives: q, k and v (B, T, H, D), or the stream (B, T, C).
    whole = lambda tensor: "stream" if tensor.dim() == 3 else "attention"  # noqa: E731
    sites[chunked._Chunks.forward.__code__] = whole
    sites[offload._Lane._allocate.__code__] = HOST
    sites[offload._Saved.fetch.__code__] = "stream"
    return sites


class _Run:
    """A model and its optimizers, and steps as `molegrad.gpt.train.loop` makes them."""

    def __init__(self, ledger: _Ledger, config, model: GPT) -> None:
        self.ledger, self.config, self.model = ledger, config, model
        _materialise(self.model)
        self.optimizers = setup.build_optimizers(self.model, config)
        named = dict(self.model.named_parameters())
        self.without_gradient = {id(named[name]) for name in ignored_by_ddp(self.model)}
        ledger.label([*self.model.parameters()], "weights")
        ledger.label([*self.model.buffers()], "inputs")
        for layer in self.model.modules():
            if isinstance(layer, MoleLinear):
                for name, tensor in layer.state.tensors.items():
                    ledger.label([tensor], "optimizer" if "momentum" in name else "bases")

    def make_state(self) -> None:
        """The optimizers' state, by a step on gradients that no pass has made."""
        self._fill_gradients()
        self._optimize()
        self.ledger.label(self._state(), "optimizer")

    def step(self, phases: tuple[str, ...]) -> None:
        """These phases of a step: of several micro-batches the last, which finds the others'
        gradients."""
        config, ledger = self.config, self.ledger
        shape = config.device_batch_size, config.max_seq_len
        text = [torch.empty(shape, dtype=torch.int64) for _ in range(2)]
        ledger.label(text, "inputs")
        passes = PASSES[0] in phases
        if not passes or config.total_batch_size > shape[0] * shape[1]:
            self._fill_gradients()
        if passes:
            dtype = compute_dtype(config)
            ledger.phase("forward")
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = self.model(*text)
            ledger.phase("backward")
            loss.backward()
            del loss
            self._label_gradients()
        if PHASES[2] in phases:
            ledger.phase("optimizer")
            if config.grad_clip > 0:
                clip_grad_norm_(self.model, config.grad_clip)
            self._optimize()

    def _fill_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in self.without_gradient:
                parameter.grad = torch.empty_like(parameter)
        self._label_gradients()

    def _optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _label_gradients(self) -> None:
        layers = [m for m in self.model.modules() if isinstance(m, MoleLinear)]
        sketches = {id(p) for layer in layers for p in layer.sketches}
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                part = "bases" if id(parameter) in sketches else "gradients"
                self.ledger.label([parameter.grad], part)

    def _state(self) -> list[Tensor]:
        """Tensors of the optimizers' own, those that they share with the model left out."""
        known = {p.untyped_storage()._cdata for p in self.model.parameters()}
        return [
            value
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in known
        ]


def _materialise(model: nn.Module) -> None:
    """Fake tensors in the place of meta ones, the same one wherever the same one was."""
    made: dict[int, Tensor] = {}

    def new(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fake
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = new(tensor)


@contextlib.contextmanager
def _replaced(owner, name: str, function) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)
