"""Variance that sampling adds to a weight gradient, relative to that of its tokens, by block size.

    python -m molegrad.lab.noise RUN      a run of base_train; columns: blocks of 1 2 4 8 16 32 64

Kept only in history: docs/experiments.md names this commit.
"""

import sys
import torch, math
from molegrad.gpt.stages import open_stage
from molegrad.gpt.loader import PackedLoader
from molegrad.gpt.corpus import open_corpus
from molegrad.gpt.tokens import CorpusTokens

torch.set_num_threads(1)
st = open_stage(sys.argv[1], "base")
model = st.model
model.train()
print(st.name, model.config)
c = open_corpus("embedded", "", 0)
ld = PackedLoader(CorpusTokens(c, "train", st.tokenizer), 8, 256, torch.device("cpu"), 0, 1, 123)
cap = {}


def hook(name):
    def f(mod, inp, out):
        a = inp[0].detach().reshape(-1, inp[0].shape[-1])
        out.register_hook(
            lambda g: cap.setdefault(name, []).append(
                (a, g.detach().reshape(-1, g.shape[-1]).clone())
            )
        )

    return f


names = []
for n, m in model.named_modules():
    if isinstance(m, torch.nn.Linear) and "transformer" in n:
        m.register_forward_hook(hook(n))
        names.append(n)
N = 12
for i in range(N):
    x, y = ld.next_batch()
    model(x, y).backward()


def pps(w2, budget):
    w = w2.sqrt()
    tau = w.mean() + 1e-30
    share = budget / w.numel()
    for _ in range(30):
        tau = tau * ((w / tau).clamp(max=1).mean() / share).clamp(0.1, 10)
    q = (w / tau).clamp(max=1)
    return (w2 * (1 / q.clamp(min=1e-12) - 1)).nan_to_num().sum()


for name in names:
    data = cap[name]
    T = len(data[0][0])
    Gs = [b.T @ a for a, b in data]
    Gbar = sum(Gs) / N
    inh = sum((x - Gbar).square().sum() for x in Gs) / (N - 1)
    m, n = Gbar.shape
    wideA = n > m
    X0 = data[0][0] if wideA else data[0][1]
    print(
        name,
        f"{m}x{n} zeros {float((X0 == 0).float().mean()):.3f} noise/signal {float(inh / (Gbar.square().sum() - inh / N)):.1f}",
    )
    Zc = torch.cat([(b if wideA else a) for a, b in data[:6]])
    Xc = torch.cat([(a if wideA else b) for a, b in data[:6]])
    C = Zc.T @ (Zc * Xc.square().sum(1, keepdim=True))
    Q = torch.linalg.eigh(C)[1]
    for kk in (0, 16, 32):
        for p in (3, 4, 6):
            row = []
            for blk in (1, 2, 4, 8, 16, 32, 64):
                e = 0
                for a, b in data[6:9]:
                    X, Z = (a, b) if wideA else (b, a)
                    if kk:
                        q = Q[:, -kk:]
                        Z = Z - (Z @ q) @ q.T
                    w = X.square().view(T, -1, blk).sum(2) * Z.square().sum(1)[:, None]
                    e += pps(w.reshape(-1), w.numel() / p) / 3
                row.append(1 + float(e / inh))
            print("   k", kk, "p", p, " ".join(f"{x:.3f}" for x in row))
