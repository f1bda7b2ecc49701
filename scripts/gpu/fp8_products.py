"""Products of torch in bfloat16 and in float8 at the sizes of layers; the cost of float8 operands.

    python scripts/gpu/fp8_products.py --shapes=768x3072 --tokens=8192

Microseconds (medians) of a layer's forward product x Wᵀ, of the gradient of its input g W, of the
weight gradient gᵀ x, alone and added to a momentum, and of the same by torch._scaled_mm with one
scale a tensor; then of making the operands: the casts, the transposed copies and the largest value.
On a device whose torch has no float8 product its columns are empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from molegrad.bench.timing import percentiles, time_interleaved
from molegrad.memory.table import table

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def products(n: int, m: int, tokens: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Name -> what is timed, for a layer from n to m features."""
    x, g = (torch.randn(tokens, size, device=device, dtype=BF16) for size in (n, m))
    w, momentum = (torch.randn(m, n, device=device, dtype=BF16) for _ in range(2))
    x8, w8, g8 = x.to(E4M3), w.to(E4M3), g.to(E5M2)
    columns, g_rows, x_rows = w8.t().contiguous(), g8.t().contiguous(), x8.t().contiguous()
    one = torch.ones((), device=device)

    def scaled(a: Tensor, b: Tensor, dtype=BF16, fast: bool = False) -> Callable[[], Tensor]:
        return lambda: torch._scaled_mm(a, b, one, one, out_dtype=dtype, use_fast_accum=fast)

    return {
        "y": lambda: x @ w.t(),
        "dx": lambda: g @ w,
        "dw": lambda: g.t() @ x,
        "dw added": lambda: momentum.addmm_(g.t(), x),
        "y fp8": scaled(x8, w8.t(), fast=True),
        "dx fp8": scaled(g8, columns.t()),
        "dw fp8": scaled(g_rows, x_rows.t()),
        "dw fp8, float32": scaled(g_rows, x_rows.t(), torch.float32),
        "cast x": lambda: x.to(E4M3),
        "g transposed": lambda: g8.t().contiguous(),
        "x transposed": lambda: x8.t().contiguous(),
        "largest of g": lambda: g.abs().amax(),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="768x3072,1280x5120,1536x6144")
    parser.add_argument("--tokens", default="8192,32768")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    flags = parser.parse_args()
    device, rows = torch.device(flags.device), []
    for shape in flags.shapes.split(","):
        n, m = map(int, shape.split("x"))
        for tokens in map(int, flags.tokens.split(",")):
            timed = time_interleaved(products(n, m, tokens, device), flags.rounds, device)
            rows.append({"in": n, "out": m, "tokens": tokens})
            rows[-1] |= {name: percentiles(s)["us_p50"] for name, s in timed.seconds.items()}
            for name, why in timed.failed.items():
                print(f"{shape}, {tokens} tokens, {name}: {why}")
    sizes = {name: (name, "d") for name in ("in", "out", "tokens")}
    print(
        table(
            rows, sizes | {name: (name, ".1f") for row in rows for name in row if name not in sizes}
        )
    )


if __name__ == "__main__":
    main()
