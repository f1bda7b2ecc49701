"""Column-row sampling: an unbiased estimate of G = BᵀA from a fraction of its products.

G is a sum over tokens t and blocks β of neighbouring features of the wider operand X of A and B,
with Z the other. Each pair (t, β) is taken with probability min(1, ‖x_tβ‖ ‖z_t‖ / τ) and weighted
by its inverse: Poisson sampling with probability proportional to size, which has the least variance
for its expected number of terms. τ follows from the fraction.

Source: Drineas, Kannan, Mahoney, "Fast Monte Carlo algorithms for matrices" (2006).
"""

from __future__ import annotations

import torch
from torch import Tensor

from molegrad.ops import checks
from molegrad.ops.checks import TOKEN_CHUNK, acc_dtype, flat
from molegrad.ops.float8 import dequantize_rows
from molegrad.ops.random import random_bits
from molegrad.ops.registry import call, op

# Tokens whose scores decide the threshold, and the steps of the fixed-point iteration for it.
THRESHOLD_TOKENS, THRESHOLD_STEPS = 512, 8


def sampled_grad_reference(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    counter: Tensor,
    fraction: float,
    block: int = 2,
    alpha: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """grad += alpha Ĝ with E Ĝ = G = BᵀA from a sample X̃ of the wider of A and B."""
    dtype = acc_dtype(b.dtype)
    a, b = flat(a), flat(b)
    a_scale = None if a_scale is None else a_scale.reshape(-1)
    wide_a = a.shape[1] > b.shape[1]
    total = a.shape[0]
    if fraction >= 1.0 and grad.dtype == b.dtype:  # the library's product adds to grad by itself
        if a_scale is not None:
            a = dequantize_rows(a, a_scale, b.dtype)
        grad.addmm_(b.mT, a, alpha=alpha)
        return torch.tensor([1.0, 0.0], device=grad.device)
    out = grad if grad.dtype == dtype else torch.zeros_like(grad, dtype=dtype)
    factor = alpha if out is grad else 1.0

    def part(rows: slice) -> tuple[Tensor, Tensor]:
        """X (·, F) and Z (·, d), the wide and the narrow operand."""
        x = a[rows].to(dtype) if a_scale is None else dequantize_rows(a[rows], a_scale[rows], dtype)
        return (x, b[rows].to(dtype)) if wide_a else (b[rows].to(dtype), x)

    sampling = fraction < 1.0 and total > 0
    taken, noise, energy = torch.zeros(3, dtype=dtype, device=a.device).unbind()
    if sampling:
        stride = max(1, total // THRESHOLD_TOKENS)
        threshold = _threshold(_scores(*part(slice(None, None, stride)), block), fraction)
    for start in range(0, total, TOKEN_CHUNK):
        x, z = part(slice(start, start + TOKEN_CHUNK))
        if sampling:
            scores = _scores(x, z, block)
            first, pairs = start * scores.shape[1] + 1, scores.shape[1]
            index = torch.arange(first, first + scores.numel(), device=a.device).view_as(scores)
            inclusion = (scores / threshold).clamp(max=1.0)
            chosen = random_bits(index, counter, seed).to(dtype) * 2.0**-24 < inclusion
            inverse = torch.where(inclusion > 0, 1.0 / inclusion, 1.0)
            weight = torch.where(chosen, inverse, 0.0).repeat_interleave(block, dim=1)
            x = x * weight[:, : x.shape[1]]
            taken += chosen.sum() / (total * pairs)
            noise += (scores.square() * (inverse - 1.0)).sum()
            energy += scores.square().sum()
        product = z.mT @ x if wide_a else x.mT @ z
        out.add_(product, alpha=factor)
    if out is not grad:
        grad.add_(out, alpha=alpha)
    relative = torch.where(energy > 0, noise / energy, 0.0)
    return torch.stack([taken if sampling else taken + 1.0, relative]).to(torch.float32)


def _scores(x: Tensor, z: Tensor, block: int) -> Tensor:
    """‖x_tβ‖ ‖z_t‖ of every token t and block β of features of X: (T, ⌈F / block⌉)."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).view(x.shape[0], -1, block)
    return (blocks.square().sum(2) * z.square().sum(1, keepdim=True)).sqrt()


def _threshold(scores: Tensor, fraction: float) -> Tensor:
    """τ with mean(min(1, score / τ)) ≈ fraction; small where fewer scores than that are not 0."""
    threshold = scores.mean() + torch.finfo(scores.dtype).tiny
    for _ in range(THRESHOLD_STEPS):
        expected = (scores / threshold).clamp(max=1.0).mean()
        threshold = threshold * (expected / fraction).clamp(0.1, 10.0)
    return threshold.clamp_min(torch.finfo(scores.dtype).tiny)


def sample_of(name: str, fraction: float, block: int) -> None:
    """Checks what decides the size of a sample."""
    checks.require(fraction > 0, name, f"fraction must be positive, got {fraction}")
    checks.require(block >= 1, name, f"block must be at least 1, got {block}")


def _check(grad, a, b, a_scale, counter, fraction, block=2, alpha=1.0, seed=0) -> None:
    name = "sampled_grad_"
    float8 = a.dtype == torch.float8_e4m3fn
    checks.floating(name, b=b, grad=grad, a_scale=a_scale, a=None if float8 else a)
    checks.same_tokens(name, a, b)
    if not float8:
        checks.same_dtype(name, "a", a, "b", b)
    checks.same_device(name, "a", a, "b", b)
    shape = (b.shape[-1], a.shape[-1])
    checks.require(
        tuple(grad.shape) == shape, name,
        f"expected grad of shape {shape}, got {checks.text(grad)}",
    )  # fmt: skip
    checks.scale_of(name, "a", a, a_scale, whole=False)
    checks.step_counter(name, counter)
    sample_of(name, fraction, block)


op(
    "sampled_grad_",
    "(Tensor(a!) grad, Tensor a, Tensor b, Tensor? a_scale, Tensor counter, "
    "float fraction, int block=2, float alpha=1.0, int seed=0) -> Tensor",
    sampled_grad_reference,
    check=_check,
    fake=lambda grad, a, b, *rest: b.new_empty((2,), dtype=torch.float32),
)


def sampled_grad_(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    counter: Tensor,
    fraction: float,
    block: int = 2,
    alpha: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """grad += alpha Ĝ in place, Ĝ an unbiased estimate of G = BᵀA for about `fraction` of its cost.

    Zeros of the wider of A and B (B where they are equally wide), of which activations such as
    relu² and their gradients have many, cost nothing and lose nothing: where no more than
    `fraction` of its blocks hold anything else, the estimate is G itself.

    Args:
        grad: (m, n), any floating dtype, the gradient or the momentum that is added to.
        a, b: as in `lowrank_grad`; `a` may be float8_e4m3fn, from `quantize_rows`.
        a_scale: (…, T) float32, the factor of each token's row of a float8 `a`; None for others.
        counter, seed: decide the sample, as in `rademacher`.
        fraction: of the pairs of a token and a block to take, > 0; from 1 on G itself is added.
        block: neighbouring features per block, >= 1; the smaller, the smaller the variance.

    Returns:
        (2,) float32: the fraction of the pairs that was taken, and
        E‖Ĝ − G‖²_F / Σ_t ‖a_t‖² ‖b_t‖², the variance that the sample adds relative to what a
        gradient of as many independent tokens has anyway (0.25: as noisy as the exact gradient of a
        batch 1.25 times smaller).

    Raises:
        RuntimeError: shapes, dtypes, devices, fraction or block do not fit.
    """
    return call("sampled_grad_", grad, a, b, a_scale, counter, fraction, block, alpha, seed)
