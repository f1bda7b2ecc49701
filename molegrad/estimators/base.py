"""What an estimator of the weight gradient is: its options, and all that others may ask of it.

An estimator is a frozen dataclass, its options, whose methods work on tensors: it knows no layers.
A layer (`molegrad.linear.MoleLinear`) gives it a `State`. To write one:

    class MySum:                    # what the backward pass does: molegrad.ops.linear.Accumulator
        def __init__(self, weight): ...
        def add(self, a, b, a_scale=None): ...
        def finish(self): return (gradient_of_the_weight,)

    linear_op("linear_mine", "", check=lambda name, weight: None, accumulator=MySum)

    @dataclass(frozen=True)
    class Mine(Estimator):
        METHODS = {"mine": {}}
        MODES = ("grad",)
        OP, ACCUMULATOR = "linear_mine", MySum

`MoleGradConfig(estimator=Mine())` then trains with it; it is logged, saved, run in chunks of tokens
and by several processes as the others are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from molegrad.options import Options

Mode = str  # "grad", "momentum" or "factors"


class State(NamedTuple):
    """What an estimator knows of a layer.

    weight (m, n); mode: where the gradient goes, "grad", "momentum" or "factors"; seed: of this
    layer's random numbers; name: the layer's dotted name; tensors: the estimator's own by name
    (`Estimator.new_tensors`), and in mode "momentum" "momentum" (m, n) and, of an int8 momentum,
    "momentum_scale"; setting: what `Estimator.setting` said of the layer; shared: what the layers
    of a model share (`Estimator.shared`).
    """

    weight: Tensor
    mode: Mode
    seed: int
    name: str
    tensors: dict[str, Tensor]
    setting: Any = None
    shared: Any = None

    @property
    def title(self) -> str:
        return f"layer {self.name or 'MoleLinear'}"


class Estimate(NamedTuple):
    """The estimate Ĝ of a layer as a matrix; of the norms what training knows, nan without it."""

    matrix: Tensor  # Ĝ (m, n), trust factor included
    rank: int  # that Ĝ of a single backward pass may have; 0 for full rank
    norm_sq: Tensor  # the estimate of ‖G‖²_F without G
    captured_sq: Tensor  # ‖Ĝ‖²_F without trust factor


@dataclass(frozen=True)
class Estimator(Options):
    """The base class; what a subclass need not say is said here."""

    # Method names, as --streaming_method has them, with the options that each stands for.
    METHODS: ClassVar[dict[str, dict[str, Any]]] = {}
    # Where its gradient may go.
    MODES: ClassVar[tuple[Mode, ...]] = ()
    # What its "stats" tensor (float32) holds, in this order; () for none.
    STATS: ClassVar[tuple[str, ...]] = ()
    # The layer's op, torch.ops.molegrad.<OP>, and what its backward pass works with.
    OP: ClassVar[str] = ""
    ACCUMULATOR: ClassVar[type] = object

    # Facts

    @property
    def title(self) -> str:
        """The method's name."""
        for name, options in self.METHODS.items():
            if all(getattr(self, key) == value for key, value in options.items()):
                return name
        return type(self).__name__

    @property
    def unbiased(self) -> bool:
        """Whether the estimate's mean is the gradient itself, of full rank, so that a momentum can
        be built of it as it arises."""
        return False

    @property
    def adds_up(self) -> bool:
        """Whether the estimates of micro-batches, chunks and processes add up to an estimate of the
        whole step that is as good as one made at once."""
        return True

    @property
    def needs_all_tokens(self) -> str | None:
        """Why chunks of tokens cannot be added one after the other; None where they can."""
        return None

    @property
    def one_pass(self) -> bool:
        return self.needs_all_tokens is None

    @property
    def reads_float8(self) -> bool:
        """Whether its products read float8 operands, so that inputs are saved in float8."""
        return False

    @property
    def adaptive(self) -> bool:
        """Whether its ranks follow an energy target (`molegrad.optim.rank`)."""
        return False

    def refuses_mode(self, mode: Mode) -> str | None:
        """Why these options do not go with a gradient that goes there; None where they do."""
        return None

    # Questions about a layer (m, n) of a dotted name

    def refusal(self, m: int, n: int, name: str = "") -> str | None:
        """Why the layer cannot or should not be converted; None where it can."""
        return None

    def describe(self, m: int, n: int, name: str = "") -> str:
        """What the layer gets, and from which option."""
        return self.title

    def setting(self, name: str) -> Any:
        """What the options say of this one layer, found once when it is made."""
        return None

    def overrides(self) -> tuple[str, ...]:
        """PATTERN=VALUE options for single layers."""
        return ()

    def rank_of(self, m: int, n: int, name: str = "") -> int:
        """The layer's rank k at the start; 0 where the estimate has full rank."""
        return 0

    def estimate_rank(self, rank: int) -> int:
        """The rank of an estimate with `rank` kept directions a side; 0 for full rank."""
        return 0

    def cost(self, m: int, n: int, name: str = "", rank: int | None = None) -> float:
        """FLOPs a token of the weight gradient; the dense product takes 2mn."""
        return 2.0 * m * n

    # A layer's state

    def new_tensors(self, weight: Tensor, mode: Mode, name: str) -> dict[str, Tensor]:
        """The layer's own tensors, uninitialised but for what never changes; `reset` fills them."""
        return {}

    def reset(self, state: State, draw: int = 0) -> None:
        """Fill the tensors as for a fresh layer; another `draw` takes other random numbers."""

    def sketches(self, mode: Mode) -> tuple[str, ...]:
        """Names of the tensors that are parameters and get the gradient in place of the weight, in
        the order of the op's own arguments; () where the weight or momentum gets it."""
        return ()

    def dtypes(self, weight: Tensor) -> dict[str, torch.dtype]:
        """Dtypes that the tensors keep when the weight (m, n) changes its own."""
        return {}

    def shared(self) -> Any:
        """An object that the layers of a model share; a copy of the model gets its own."""
        return None

    def rank(self, state: State) -> int:
        """The layer's rank now."""
        return 0

    # The passes

    def arguments(self, state: State) -> tuple:
        """The op's own arguments."""
        return ()

    def forward(
        self, x: Tensor, bias: Tensor | None, saved: tuple[Tensor | None, ...], state: State
    ) -> Tensor:
        """y = x Wᵀ + bias, with this estimator's backward pass.

        Args:
            saved: float8 rows of x and their scales, kept in place of x, or (None, None).
        """
        op = getattr(torch.ops.molegrad, self.OP)
        return op(x, state.weight, bias, *saved, *self.arguments(state))

    def accumulator(self, state: State):
        """An accumulator for A and B that come in several chunks of tokens."""
        return self.ACCUMULATOR(state.weight, *self.arguments(state))

    def watch(self, state: State) -> None:
        """Called once for a new or copied layer, to put hooks on its tensors."""

    # What can be read of it

    def stats(self, state: State) -> Tensor | None:
        """The last backward pass in numbers (len(STATS),), on the device."""
        return state.tensors.get("stats")

    def metrics(self, values: dict[str, float]) -> dict[str, float]:
        """Metrics by name from the values of `STATS`; nan where one is not known."""
        return dict(values)

    def remedy(self, kind: str, state: State) -> str:
        """What a user can change where a health check (`molegrad.monitor.rules`) finds something;
        "" where no option helps.

        Args:
            kind: "degenerate" (a basis with more directions than the gradient, or too much
                sampling noise), "low energy", "frozen" or "orthogonality".
        """
        return ""

    def bases(self, state: State) -> list[Tensor]:
        """The orthonormal bases that move with the gradient, each (features, k)."""
        return []

    def explored(self, state: State) -> int:
        """How many of the k directions of each basis are random ones, the last ones."""
        return 0

    def accumulated(self, state: State) -> tuple[Tensor, ...] | None:
        """What backward passes add to: weight.grad, or the momentum and its scale. None where there
        is nothing yet."""
        if state.mode == "momentum":
            scale = state.tensors.get("momentum_scale")
            momentum = state.tensors["momentum"].detach()
            return (momentum,) if scale is None else (momentum, scale.detach())
        return None if state.weight.grad is None else (state.weight.grad,)

    def norm_sq(self, state: State) -> Tensor | None:
        """‖Ĝ‖²_F (scalar) of what has been accumulated, for clipping; None where nothing has."""
        now = self.accumulated(state)
        return None if now is None else self.matrix(state, now).matrix.square().sum()

    def matrix(
        self,
        state: State,
        now: tuple[Tensor, ...],
        before: tuple[Tensor, ...] | None = None,
        trust_max: float = 0.0,
    ) -> Estimate:
        """Ĝ as a matrix, from `accumulated` now and before the step's first backward pass (None:
        zeros).

        Args:
            trust_max: limit of the trust factor where an optimizer applies it; 0 for none.
        """
        from_now = _times_scale(now)
        matrix = from_now if before is None else from_now - _times_scale(before)
        unknown = torch.full((), float("nan"), dtype=torch.float64, device=matrix.device)
        return Estimate(matrix, 0, unknown, unknown)

    def spectrum(self, states: list[State]):
        """The spectra of the estimates of layers of one shape, rank, mode and device, as long as
        their gradients are there.

        Returns:
            small matrices (layers, …) on the device, and a function from them on the host, in
            float64, to the effective rank of each layer; or None.
        """
        return None

    def optimizer_options(self, seed: int) -> dict[str, Any]:
        """Options of a parameter group of kind "factors"; `seed` is the configuration's."""
        return {}


def _times_scale(value: tuple[Tensor, ...]) -> Tensor:
    matrix, *scale = value
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return matrix.to(dtype) * scale[0].to(dtype) if scale else matrix.to(dtype)
