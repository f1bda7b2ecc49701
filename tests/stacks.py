"""A stack of checkpointed blocks whose inputs may go to host memory."""

import contextlib

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from molegrad.offload import HostOffload

WIDTH = 12


class Block(nn.Module):
    """x + f(x * table): the table is an argument beside the residual, as rotary tables are."""

    def __init__(self, number, width=WIDTH):
        super().__init__()
        self.number = number
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.before = None  # called with the number whenever the block runs

    def forward(self, x, table):
        if self.before is not None:
            self.before(self.number)
        return x + self.narrow(torch.tanh(self.wide(x * table)))


class Stack(nn.Module):
    """Blocks under checkpoint, and what they need of the outside.

    Attributes:
        offload: None leaves it off. seen: the memory of every x, weakly; None notes nothing.
    """

    def __init__(self, depth=4, keep=1, width=WIDTH, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(i, width) for i in range(depth))
        self.offload = HostOffload(keep)
        self.seen = []

    def forward(self, x, table):
        x = self.first(x)
        for left, block in zip(reversed(range(len(self.blocks))), self.blocks, strict=True):
            if self.seen is not None:
                self.seen.append(StorageWeakRef(x.untyped_storage()))
            travels = self.offload.block(x, left) if self.offload else contextlib.nullcontext()
            with travels:
                x = checkpoint(block, x, table, use_reentrant=False)
        return x

    def alive(self):
        """The numbers of the x that are in memory where they were made."""
        return [i for i, memory in enumerate(self.seen) if not memory.expired()]


def batch(rows=2, tokens=5, width=WIDTH, seed=1, device="cpu"):
    """x (rows, tokens, width) and a table (width)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, width, generator=generator)
    return x.to(device), torch.linspace(0.5, 2.0, width, device=device)


def loss_of(model, data, dtype=torch.float32):
    device = data[0].device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        return model(*data).float().square().sum()


def gradients(model):
    """Taken from the model."""
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return grads


def plain(data, dtype=torch.float32, depth=4):
    """The gradients of checkpointing alone."""
    x, _ = data
    model = Stack(depth, width=x.shape[-1]).to(x.device)
    model.offload = None
    loss_of(model, data, dtype).backward()
    return gradients(model)


def assert_same(found, wanted):
    """To the last bit."""
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)
