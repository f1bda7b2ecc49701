"""Small models with the names that real ones have."""

from __future__ import annotations

import torch
from torch import nn

from molegrad import MoleGradConfig, convert

SMALL = MoleGradConfig.of(rank_k=4, target_layers="all")


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden, bias=bias)
        self.c_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.c_proj(self.c_fc(x).relu())


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_q, self.c_k, self.c_v, self.c_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x):
        scores = self.c_q(x) @ self.c_k(x).mT / x.shape[-1] ** 0.5
        return self.c_proj(scores.softmax(-1) @ self.c_v(x))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class TinyGPT(nn.Module):
    def __init__(self, width: int = 32, hidden: int = 64, vocab: int = 50, depth: int = 2) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.h = nn.ModuleList([Block(width, hidden) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, idx):
        x = self.wte(idx)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def perceptron(config: MoleGradConfig | None = None, bias: bool = True, dtype=None) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(24, 40, bias=bias, dtype=dtype),
        nn.Tanh(),
        nn.Linear(40, 20, bias=bias, dtype=dtype),
    )
    return model if config is None else convert(model, config)
