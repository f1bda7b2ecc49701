"""Sampled products, whole layers, and the bases of all layers of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from molegrad import MoleGradConfig, MoleLinear, ops
from molegrad.bench.paths import has_native
from molegrad.bench.products import basis
from molegrad.bench.timing import Timed, median_ratio, percentiles, time_interleaved
from molegrad.config import PRESETS
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.ops.orth import orthonormalize_reference
from molegrad.ops.sampled import sampled_grad_reference

SHARES, BLOCKS = (0.25, 0.125), (1, 2, 4, 16)
WIDE_BLOCKS = (64, 128)  # that suit a GPU's tensor cores
ZEROS = 0.8  # of the wider operand, as relu² has them


def row_of(timed: Timed, name, labels: dict, dense=None, plain=None) -> dict:
    """A variant's row: percentiles and ratios to the variants `dense` and `plain`, or its note."""
    times = timed.seconds.get(name)
    if times is None:
        return labels | {"note": timed.failed[name]}
    row = labels | percentiles(times)
    if name in timed.host:
        row["us_host"] = timed.host[name] * 1e6
    for key, other in (("vs_dense", dense), ("vs_reference", plain)):
        if other in timed.seconds:
            row[key] = median_ratio(timed.seconds[other], times)
    return row


def with_zeros(
    tokens: int, features: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    x = torch.randn(tokens, features, device=device)
    return (x * (torch.rand_like(x) >= ZEROS)).to(dtype)


def bench_sampled(
    n: int,
    m: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    limit: float,
) -> list[dict]:
    """`sampled_grad_` by share and block, against `torch.addmm` to the same gradient.

    On a GPU the reference, which is slow there, is timed for one share and block.
    """
    a = torch.randn(tokens, n, device=device).to(dtype)
    b = with_zeros(tokens, m, dtype, device)
    if n > m:
        a, b = (
            with_zeros(tokens, n, dtype, device),
            torch.randn(tokens, m, device=device).to(dtype),
        )
    grad, step = torch.zeros(m, n, device=device, dtype=dtype), torch.tensor(0, device=device)
    dense = (1.0, 0, "torch.addmm_")
    variants: dict[tuple, Callable] = {dense: lambda: grad.addmm_(b.mT, a)}
    cuda = device.type == "cuda"
    choices = [(s, block) for s in SHARES for block in (*BLOCKS, *(WIDE_BLOCKS if cuda else ()))]
    one = [(SHARES[0], BLOCKS[-1])]
    kernels = {"reference": (sampled_grad_reference, one if cuda else choices)}
    native = has_native("sampled_grad_", device)
    if native:
        kernels["native"] = (ops.sampled_grad_, choices)
    for how, (kernel, wanted) in kernels.items():
        for share, block in wanted:
            variants[share, block, how] = lambda f=kernel, s=share, k=block: f(
                grad, a, b, None, step, s, k
            )
    timed = time_interleaved(variants, repeats, device, limit)
    rows = []
    for name in variants:
        share, block, how = name
        labels = {"n": n, "m": m, "tokens": tokens, "op": "sampled_grad_", "how": how}
        labels |= {"share": share, "block": block}
        plain = (share, block, "reference") if how == "native" else None
        rows.append(row_of(timed, name, labels, dense, plain))
    if not native:
        labels = {"n": n, "m": m, "tokens": tokens, "op": "sampled_grad_", "how": "native"}
        rows.append(labels | {"note": "not built"})
    return rows


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
        (f"linear_{mode}", method): MoleGradConfig(rank_k=k, method=method, gradient_mode=mode)
        for mode in ("dense", "factored")
        for method in ("power", "tangent")
    }
    configs |= {("preset", name): MoleGradConfig.preset(name) for name in PRESETS}
    for name, config in configs.items():
        layer = MoleLinear(n, m, bias=False, device=device, dtype=dtype, config=config)
        layer.steps.told = True  # that nobody steps is meant
        layers[name] = layer

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
    labels = {"depth": depth, "layers": shapes.total(), "k": k, "op": "orthonormalize"}
    if k > min(min(shape) for shape in shapes):
        return []
    blocks = [
        basis(rows, k, device) + 0.01 * torch.randn(count, rows, k, device=device)
        for shape, count in shapes.items()
        for rows in shape
    ]
    kernels = {"reference": orthonormalize_reference}
    native = has_native("orthonormalize", device)
    if native:
        kernels["native"] = ops.orthonormalize
    variants = {how: lambda f=f: [f(block) for block in blocks] for how, f in kernels.items()}
    timed = time_interleaved(variants, repeats, device, limit)
    rows = [
        row_of(timed, how, labels | {"how": how}, plain="reference" if how == "native" else None)
        for how in variants
    ]
    return rows if native else [*rows, labels | {"how": "native", "note": "not built"}]
