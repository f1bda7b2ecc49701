"""Whole layers, forward and backward pass, and the bases of all layers of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from molegrad import MoleGradConfig, MoleLinear
from molegrad.bench.timing import op_rows, row_of, time_interleaved
from molegrad.gpt.model.gpt import GPT, GPTConfig

ZEROS = 0.8  # of the wider operand, as relu² has them
PRESETS = ("exact", "balanced", "minimal")


def basis(rows: int, k: int, device: torch.device) -> torch.Tensor:
    """A random (rows, k) with orthonormal columns, float32."""
    return torch.linalg.qr(torch.randn(rows, k, device=device))[0]


def with_zeros(
    tokens: int, features: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A random (tokens, features), ZEROS of it zero."""
    x = torch.randn(tokens, features, device=device)
    return (x * (torch.rand_like(x) >= ZEROS)).to(dtype)


def bench_layers(
    n: int,
    m: int,
    tokens: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    limit: float,
) -> list[dict]:
    """Forward and backward pass of whole layers, the gradient of their input included."""
    if 2 * k > min(n, m):
        return []
    x = torch.randn(tokens, n, device=device).to(dtype).requires_grad_()
    grad = with_zeros(tokens, m, dtype, device)
    dense = ("nn.Linear", "")
    layers: dict[tuple[str, str], nn.Module] = {
        dense: nn.Linear(n, m, bias=False, device=device, dtype=dtype)
    }
    configs = {
        f"{method}, {mode}": MoleGradConfig.of(method, rank_k=k, gradient_mode=mode)
        for mode in ("grad", "factors")
        for method in ("power", "tangent")
    }
    configs |= {name: MoleGradConfig.preset(name) for name in PRESETS}
    for how, config in configs.items():
        layer = MoleLinear(n, m, bias=False, device=device, dtype=dtype, config=config)
        layer.steps.warned.add("steps")  # that nobody steps is meant
        layers["MoleLinear", how] = layer

    def run(layer: nn.Module) -> Callable[[], None]:
        def pass_through() -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                layer(x).backward(grad)

        return pass_through

    runs = {name: run(layer) for name, layer in layers.items()}
    timed = time_interleaved(runs, repeats, device, limit)
    labels = {"n": n, "m": m, "tokens": tokens, "k": k}
    return [row_of(timed, name, labels | {"op": name[0], "how": name[1]}, dense) for name in layers]


def layer_shapes(depth: int) -> Counter[tuple[int, int]]:
    """(m, n) -> number of the linear layers of that shape in the blocks of a GPT."""
    with torch.device("meta"):
        model = GPT(GPTConfig(depth, vocab_size=1, max_seq_len=1))
    blocks = model.transformer["h"].modules()
    return Counter(tuple(layer.weight.shape) for layer in blocks if isinstance(layer, nn.Linear))


def bench_bases(depth: int, k: int, device: torch.device, repeats: int, limit: float) -> list[dict]:
    """New bases of all layers of a GPT in one step: `orthonormalize` of Y and of W, float32.

    One call for each side of each shape of layers, as the optimizers batch them.
    """
    shapes = layer_shapes(depth)
    labels = {"depth": depth, "layers": shapes.total(), "k": k}
    if k > min(min(shape) for shape in shapes):
        return []
    blocks = [
        basis(rows, k, device) + 0.01 * torch.randn(count, rows, k, device=device)
        for shape, count in shapes.items()
        for rows in shape
    ]
    every = lambda op: [op(block) for block in blocks]  # noqa: E731
    return op_rows("orthonormalize", every, labels, device, repeats, limit)
