"""What every op needs: the dtype that it computes in, its operands' tokens, checks of arguments.

Every failed check is a RuntimeError that starts with "molegrad::<op>: ", names what was given and,
where it is not plain, the remedy.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Read as they are, with scales, by the ops that say so.
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Tokens that references convert and multiply at once, so that a conversion stays small.
TOKEN_CHUNK = 8192


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """dtype of sums and results: float64 where one is float64, float32 for everything narrower."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def flat(x: Tensor) -> Tensor:
    """(…, T, features) as (T, features), with T the tokens of all leading dimensions."""
    return x.reshape(-1, x.shape[-1])


def text(x: Tensor) -> str:
    """The shape of x, as messages have it."""
    return "(" + ", ".join(str(s) for s in x.shape) + ")"


def require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise RuntimeError(f"molegrad::{op}: {message}")


def floating(op: str, *, float8: tuple[str, ...] = (), **tensors: Tensor | None) -> None:
    """All tensors are floating point and on one device; those named may be float8."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        require(t.is_floating_point(), op, f"{name} must be floating point, got {t.dtype}")
        require(
            t.dtype.itemsize >= 2 or (name in float8 and t.dtype in FLOAT8), op,
            f"{name} must be floating point of 16 bits or more, got {t.dtype}: convert it first",
        )  # fmt: skip
    first_name, first = next(iter(given.items()))
    for name, t in given.items():
        same_device(op, first_name, first, name, t)


def same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    require(
        x.device == other.device, op, f"expected {name} and {other_name} on the same device, "
        f"got {x.device} and {other.device}",
    )  # fmt: skip


def same_dtype(
    op: str, name: str, x: Tensor, other_name: str, other: Tensor, remedy: str = ""
) -> None:
    require(
        x.dtype == other.dtype, op, f"expected {name} and {other_name} of the same dtype, got "
        f"{x.dtype} and {other.dtype}{remedy}",
    )  # fmt: skip


def operands(op: str, a: Tensor, b: Tensor, a_scale, b_scale, **others: Tensor | None) -> None:
    """a and b of one dtype, or one or both in float8 with a scale; all on one device."""
    floating(op, float8=("a", "b"), a=a, b=b, **others, a_scale=a_scale, b_scale=b_scale)
    same_tokens(op, a, b)
    if a.dtype not in FLOAT8 and b.dtype not in FLOAT8:
        same_dtype(op, "a", a, "b", b)
    scale_of(op, "a", a, a_scale)
    scale_of(op, "b", b, b_scale)


def same_tokens(op: str, a: Tensor, b: Tensor) -> None:
    """a (…, T, n) and b (…, T, m) agree in their leading dimensions."""
    require(
        a.dim() >= 2 and b.dim() >= 2, op,
        "a and b need at least two dimensions (…, T, features), "
        f"got a {text(a)} and b {text(b)}",
    )  # fmt: skip
    require(
        a.shape[:-1] == b.shape[:-1], op,
        "expected a and b to agree in every dimension but the last, "
        f"got a {text(a)} and b {text(b)}",
    )  # fmt: skip


def scale_of(op: str, name: str, x: Tensor, scale: Tensor | None, whole: bool = True) -> None:
    """A scale where x is float8, and none where it is not: one for each token, or where `whole` is
    allowed one for all of x."""
    if x.dtype not in FLOAT8:
        require(
            scale is None, op, f"{name}_scale belongs to a float8 {name}, got {name} of "
            f"{x.dtype}: multiply {name} by it, or leave it out",
        )  # fmt: skip
        return
    require(
        scale is not None, op, f"{name} of {x.dtype} needs {name}_scale, what quantize_rows "
        f"{'or quantize_tensor ' if whole else ''}returned with it",
    )  # fmt: skip
    fits = scale.shape == x.shape[:-1] or (whole and scale.dim() == 0)
    require(
        scale.dtype == torch.float32 and fits, op,
        f"expected {name}_scale in torch.float32, {'one number or ' if whole else ''}one for each "
        f"token of {name} {text(x)}, got {text(scale)} of {scale.dtype}",
    )  # fmt: skip


def matrix(op: str, name: str, x: Tensor) -> None:
    require(x.dim() == 2, op, f"{name} must be a matrix, got shape {text(x)}")


def in_place(op: str, name: str, x: Tensor) -> None:
    """x can be updated in place: none of its numbers share memory, as an expanded one's do."""
    require(
        all(step != 0 or size <= 1 for size, step in zip(x.shape, x.stride(), strict=True)), op,
        f"{name} {text(x)} is expanded, and numbers that share memory cannot be updated in "
        "place: give a clone of it",
    )  # fmt: skip


def basis(op: str, name: str, x: Tensor, rows: int, rank_max: int | None = None) -> None:
    """x (rows, k) with k >= 1, and k <= rank_max where columns must be orthonormal."""
    matrix(op, name, x)
    require(x.shape[0] == rows, op, f"expected {name} with {rows} rows, got shape {text(x)}")
    k = x.shape[1]
    require(k >= 1, op, f"rank k={k} of {name} must be at least 1")
    if rank_max is not None:
        require(
            k <= rank_max, op, f"rank k={k} of {name} exceeds {rank_max}: choose a smaller rank"
        )


def block(op: str, name: str, x: Tensor, rows: str) -> None:
    """x (…, rows, k) with 1 <= k <= rows, for its columns to be independent."""
    floating(op, **{name: x})
    require(x.dim() >= 2, op, f"{name} needs at least two dimensions (…, {rows}, k), got {text(x)}")
    size, k = x.shape[-2:]
    require(
        1 <= k <= size, op, f"rank k={k} must lie between 1 and {rows}={size}, got {name} {text(x)}"
    )


def one_rank(op: str, u: Tensor, w: Tensor) -> None:
    require(
        u.shape[-1] == w.shape[-1], op,
        f"expected u and w of one rank k, got {text(u)} and {text(w)}",
    )  # fmt: skip


def condition(op: str, cond_max: float) -> None:
    require(cond_max >= 1.0, op, f"cond_max must be at least 1, got {cond_max}")


def step_counter(op: str, counter: Tensor) -> None:
    require(
        counter.dtype == torch.int64 and counter.dim() == 0, op,
        f"expected counter as an int64 scalar tensor, got {text(counter)} of {counter.dtype}",
    )  # fmt: skip
