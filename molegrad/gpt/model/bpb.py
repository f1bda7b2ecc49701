"""Bits per byte: the loss in a unit that does not depend on the tokenizer.

bits per byte = nats / (ln 2 · bytes), where nats and bytes are summed over the targets that stand
for text: special tokens have no bytes and are left out, as are targets of -1.

How to run: `bits_per_byte(model, batches, tokenizer.token_bytes())`.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def bits_per_byte(
    model,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    dtype: torch.dtype = torch.float32,
    world_size: int = 1,
) -> float:
    """Bits per byte of `model` on `batches` of (inputs, targets), each (B, T) int64.

    Args:
        token_bytes: (vocab_size,) integers, the bytes of each token; 0 leaves it out.
        dtype: of the matrix products (autocast where it is not float32).
        world_size: processes over which nats and bytes are summed; each has its own batches.

    Returns:
        nan where no target has bytes.
    """
    device = model.device
    token_bytes = token_bytes.to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    was_training = model.training
    model.eval()
    for inputs, targets in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            nats = model(inputs, targets, loss_reduction="none")  # (B, T)
        size = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        sums[0] += (nats * (size > 0)).sum().to(sums.device, sums.dtype)
        sums[1] += size.sum().to(sums.device)
    model.train(was_training)
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    nats, size = sums.tolist()
    return nats / (math.log(2) * size) if size else math.nan
