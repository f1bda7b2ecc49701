"""Quick trials of estimators on a byte-level GPT (depth 4, width 128, one thread, one seed).

    python -m molegrad.lab.trials '{"est": "tangent", "k": 16, "momentum": 0.9}'

Kept only in history, with what lost: docs/experiments.md names this commit.
"""

import json, sys, time, math, os
import torch, torch.nn as nn
from molegrad.gpt.model import GPT, GPTConfig
from molegrad.gpt import paths
from molegrad.gpt.corpus import open_corpus
from molegrad.optim import Muon, matrix_param_groups
from molegrad.optim.newton_schulz import newton_schulz
from molegrad.optim.muon import lr_scale
import molegrad

torch.set_num_threads(1)
D = dict(
    depth=4,
    width=128,
    seq=128,
    batch=16,
    accum=1,
    steps=400,
    lr=0.02,
    seed=0,
    momentum=0.95,
    nesterov=True,
    est="dense",
    k=16,
    p=8,
    vsrc="power",
    explored=0.0,
    polar="ns",
    mdtype="float32",
    rk_mom=0,
    target="ffn",
    every=0,
    warm=0,
    scheme="strat",
    opt="muon",
    k2=-1,
    p2=-1,
    sides="v",
    shrink=1.0,
    blk=16,
    bits=0,
    sched="",
    q=0,
)


def load():
    path = str(paths.home() / "trial-bytes.pt")
    if not os.path.exists(path):
        c = open_corpus("embedded", "", 0)
        import inspect

        tr = "\n\n".join(c.texts("train"))
        va = "\n\n".join(c.texts("val"))
        torch.save(
            (
                torch.frombuffer(bytearray(tr.encode()), dtype=torch.uint8),
                torch.frombuffer(bytearray(va.encode()), dtype=torch.uint8),
            ),
            path,
        )
    return torch.load(path)


def k_of(o):
    return o["k"]


def orth(y):
    return torch.linalg.qr(y)[0]


class F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, layer):
        ctx.save_for_backward(x, w)
        ctx.layer = layer
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        a = x.reshape(-1, x.shape[-1])
        b = g.reshape(-1, g.shape[-1])
        return g @ w, ctx.layer.estimate(a, b), None


class L(nn.Module):
    def __init__(self, lin, o, idx):
        super().__init__()
        self.weight = lin.weight
        self.o = o
        m, n = self.weight.shape
        gen = torch.Generator().manual_seed(o["seed"] * 1000 + idx)
        self.gen = gen
        k = o["k"]
        o = dict(o)
        if m < n:
            if o["k2"] >= 0:
                k = o["k2"]
            if o["p2"] > 0:
                o["p"] = o["p2"]
        o["k"] = k
        self.o = o
        self.U = orth(torch.randn(m, k, generator=gen))
        self.V = orth(torch.randn(n, k, generator=gen))
        self.newU = self.newV = None
        self.idx = idx
        self.step = 0
        self.err = []
        self.acc = {}

    def forward(self, x):
        return F.apply(x, self.weight, self)

    def sample(self, T, p):
        if self.o["scheme"] == "strat":
            return torch.arange(int(torch.randint(p, (1,), generator=self.gen)), T, p)
        if self.o["scheme"] == "jit":  # jittered strata
            return torch.arange(0, T, p) + torch.randint(p, (T // p,), generator=self.gen)
        return torch.randint(T, (T // p,), generator=self.gen)

    def add(self, name, x):
        self.acc[name] = self.acc[name] + x if name in self.acc else x

    def estimate(self, a, b):
        o = self.o
        est = o["est"]
        U, V, p = self.U, self.V, o["p"]
        if (
            est == "dense"
            or self.step < o["warm"]
            or (o["every"] and (self.step + self.idx) % o["every"] == 0)
        ):
            G = b.T @ a
            if est != "dense":
                self.add("Y", G @ V)
                self.add("W", G.T @ U)
                self.add("C", None or 0)
            return G
        if est == "sampled":
            s = self.sample(len(a), p)
            return p * b[s].T @ a[s]
        if est == "signsum":
            T = len(a) // p * p
            sg = torch.randint(2, (T, 1), generator=self.gen) * 2.0 - 1
            aa = (a[:T] * sg).view(T // p, p, -1).sum(1)
            bb = (b[:T] * sg).view(T // p, p, -1).sum(1)
            return bb.T @ aa
        if est == "tangent":
            if o["sched"]:
                kk = getattr(self, "kk", int(o["sched"].split("-")[0]))
                Y = b.T @ (a @ V)
                W = a.T @ (b @ U)
                self.add("Y", Y)
                self.add("W", W)
                U = U[:, :kk]
                V = V[:, :kk]
                W = W[:, :kk]
                Y = Y[:, :kk]
                return U @ W.T + (Y - U @ (U.T @ Y)) @ V.T
            Y = b.T @ (a @ V)
            W = a.T @ (b @ U)
            self.add("Y", Y)
            self.add("W", W)
            return U @ W.T + (Y - U @ (U.T @ Y)) @ V.T
        if est == "onesided":
            Y = b.T @ (a @ V)
            s = self.sample(len(a), p)
            As, Bs = a[s], b[s]
            self.add("Y", Y)
            self.upd(As, Bs, p, U)
            return Y @ V.T + p * (Bs.T @ (As - (As @ V) @ V.T))
        if est == "onesided_only":  # Y V' only, V from sampled tokens
            Y = b.T @ (a @ V)
            s = self.sample(len(a), p)
            self.add("Y", Y)
            self.upd(a[s], b[s], p, U)
            return Y @ V.T
        if est == "twosided":
            Y = b.T @ (a @ V)
            W = a.T @ (b @ U)
            s = self.sample(len(a), p)
            self.add("Y", Y)
            self.add("W", W)
            Gs = p * (b[s].T @ a[s])
            Gs = Gs - U @ (U.T @ Gs)
            Gs = Gs - (Gs @ V) @ V.T
            return U @ W.T + (Y - U @ (U.T @ Y)) @ V.T + Gs
        if est == "leftsided":
            W = a.T @ (b @ U)
            s = self.sample(len(a), p)
            self.add("W", W)
            self.upd(a[s], b[s], p, U)
            Gs = p * (b[s].T @ a[s])
            return U @ W.T + Gs - U @ (U.T @ Gs)
        if est == "randc":  # U Ut G + (m-k)/q O Ot G, O random in U's complement
            qn = o["q"] or k_of(o)
            O = torch.randn(len(U), qn, generator=self.gen)
            O = orth(O - U @ (U.T @ O))
            W = a.T @ (b @ U)
            Y = b.T @ (a @ V)
            self.add("Y", Y)
            self.add("W", W)
            WO = a.T @ (b @ O)
            return U @ W.T + (len(U) - o["k"]) / qn * O @ WO.T
        if est == "ef":  # error feedback around the tangent estimate
            G = b.T @ a
            E = getattr(self, "E", None)
            G = G if E is None else G + E
            Y = G @ V
            W = G.T @ U
            self.add("Y", Y)
            self.add("W", W)
            H = U @ W.T + (Y - U @ (U.T @ Y)) @ V.T
            E = G - H
            if o["bits"] == 8:
                s_ = E.abs().amax(1, keepdim=True) / 127 + 1e-30
                E = (E / s_).round() * s_
            if o["bits"] == 16:
                E = E.bfloat16().float()
            self.E = E * o["shrink"]
            return H
        if (
            est == "normres"
        ):  # norm-scaled residual, as Fira: residual columns scaled by what the kept part keeps
            G = b.T @ a
            Y = G @ V
            W = G.T @ U
            self.add("Y", Y)
            self.add("W", W)
            H = U @ W.T + (Y - U @ (U.T @ Y)) @ V.T
            R = G - H
            return H + R * (H.norm(dim=0) / (G.norm(dim=0) + 1e-20))
        if est == "sp":
            T = len(a)
            k = o["k"]
            wideA = a.shape[1] > b.shape[1]
            X, Z = (a, b) if wideA else (b, a)
            Q = U if wideA else V
            z2 = Z.square().sum(1)
            if k:
                ZQ = Z @ Q
                z2 = (z2 - ZQ.square().sum(1)).clamp(min=0)
            blk = o["blk"]
            nb = X.shape[1] // blk
            w = (X.view(T, nb, blk).square().sum(2) * z2[:, None]).sqrt()
            tau = w.mean() * 1.0 + 1e-30
            share = 1 / p
            for _ in range(8):
                tau = tau * ((w / tau).clamp(max=1).mean() / share).clamp(0.1, 10)
            q = (w / tau).clamp(max=1)
            keep = torch.rand(w.shape, generator=self.gen) < q
            self.dens = float(keep.float().mean())
            sc = torch.where(keep, 1 / q.clamp(min=1e-20), torch.zeros(()))
            Xs = (X.view(T, nb, blk) * sc[:, :, None]).reshape(T, -1)
            Zr = Z - ZQ @ Q.T if k else Z
            H = Xs.T @ Zr
            if k:
                H = H + (X.T @ ZQ) @ Q.T
                i = torch.arange(int(torch.randint(8, (1,), generator=self.gen)), T, 8)
                self.add(
                    "Y" if wideA else "W",
                    Z[i].T @ ((Z[i] @ Q) * X[i].square().sum(1, keepdim=True)),
                )
            return H.T if wideA else H
        if est == "cv":
            T = len(a)
            k = o["k"]
            sides = o["sides"] if k else ""
            if sides == "narrow":
                sides = "v" if a.shape[1] <= b.shape[1] else "u"
            ar2 = a.square().sum(1)
            br2 = b.square().sum(1)
            Ghat = 0
            if "v" in sides:
                aV = a @ V
                ar2 = (ar2 - aV.square().sum(1)).clamp(min=0)
            if "u" in sides:
                bU = b @ U
                br2 = (br2 - bU.square().sum(1)).clamp(min=0)
            if o["scheme"] == "norm":
                w = (ar2 * br2).sqrt()
                w = w / (w.sum() + 1e-30)
                w = 0.95 * w + 0.05 / T
                w = w / w.sum() * (T // p)
                c = w.cumsum(0)
                pts = torch.arange(T // p) + float(torch.rand((), generator=self.gen))
                s = torch.searchsorted(c, pts).clamp(max=T - 1)
                wt = 1 / w[s]
            else:
                s = self.sample(T, p)
                wt = torch.full((len(s),), float(T / len(s)))
            As, Bs = a[s], b[s] * wt[:, None]
            Ar = As
            if "v" in sides:
                Ar = As - aV[s] @ V.T
            Br = Bs
            if "u" in sides:
                Br = Bs - (Bs @ U) @ U.T
            Ghat = o["shrink"] * (Br.T @ Ar)
            if "v" in sides:
                Y = b.T @ aV
                if "u" in sides:
                    W = a.T @ bU
                    Ghat = Ghat + U @ W.T + (Y - U @ (U.T @ Y)) @ V.T
                else:
                    Ghat = Ghat + Y @ V.T
            elif "u" in sides:
                Ghat = Ghat + U @ (a.T @ bU).T
            if "v" in sides:
                self.add("W", As.T @ ((As @ V) * (b[s].square().sum(1) * wt)[:, None]))
            if "u" in sides:
                self.add("Y", Bs.T @ ((b[s] @ U) * (a[s].square().sum(1))[:, None]))
            return Ghat
        if est == "oja_sampledW":  # tangent with W from sampled tokens
            Y = b.T @ (a @ V)
            s = self.sample(len(a), p)
            W = p * (a[s].T @ (b[s] @ U))
            self.add("Y", Y)
            self.add("W", W)
            return U @ W.T + (Y - U @ (U.T @ Y)) @ V.T
        if est == "modes":  # k modes of the exact G on average, drawn in proportion to sigma
            u, sv, v = torch.linalg.svd(b.T @ a, full_matrices=False)
            tau = sv.sum() / o["k"] + 1e-30
            for _ in range(20):
                tau = tau * ((sv / tau).clamp(max=1).sum() / o["k"]).clamp(0.1, 10)
            q = (sv / tau).clamp(max=1)
            keep = torch.rand(q.shape, generator=self.gen) < q
            return (u * torch.where(keep, sv / q.clamp(min=1e-20), torch.zeros(()))) @ v
        raise ValueError(est)

    def upd(self, As, Bs, p, U):
        v = self.o["vsrc"]
        if v == "power":
            self.add("W", p * (As.T @ (Bs @ U)))
        elif v == "cov":
            self.add("W", As.T @ (As @ self.V))
        elif v == "wcov":
            self.add("W", As.T @ ((As @ self.V) * Bs.square().sum(1, keepdim=True)))

    def turn(self, M):
        self.step += 1
        o = self.o
        k = o["k"]
        if o["est"] in ("dense", "sampled", "signsum"):
            return
        if o["sched"]:
            k1, k2 = map(int, o["sched"].split("-"))
            k = k1 + (k2 - k1) * self.step // o["steps"]
            k = max(2, min(k, o["k"]))
            self.kk = k
        if o["vsrc"] == "mom":
            self.U = orth(M @ self.V)
            self.V = orth(M.T @ self.U)
            self.acc = {}
            return
        e = math.ceil(o["explored"] * k)
        for n, B in (("Y", "U"), ("W", "V")):
            if n in self.acc:
                q = self.acc[n]
                if o["vsrc"] != "frozen":
                    if float(q.norm()) < 1e-20:
                        continue
                    q = orth(q + 1e-7 * q.norm() * getattr(self, B))
                    if e:
                        q = orth(
                            torch.cat(
                                [q[:, : k - e], torch.randn(len(q), e, generator=self.gen)], 1
                            )
                        )
                    setattr(self, B, q)
            elif n == "Y":
                pass
        self.acc = {}


def exact_polar(g):
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    return u @ v


class MuonX:
    def __init__(s, layers, o):
        s.L = layers
        s.o = o
        s.M = [torch.zeros_like(l.weight) for l in layers]

    @torch.no_grad()
    def step(s, lr, mu):
        o = s.o
        for l, M in zip(s.L, s.M):
            g = l.weight.grad
            if o["mdtype"] == "bfloat16":
                M.copy_((M * mu + (1 - mu) * g).bfloat16().float())
            else:
                M.lerp_(g, 1 - mu)
            d = g.lerp(M, mu) if o["nesterov"] else M
            if o["rk_mom"]:
                u, sv, v = torch.linalg.svd(M, full_matrices=False)
                r = o["rk_mom"]
                M.copy_(u[:, :r] * sv[:r] @ v[:r])
            if o["polar"] == "ns":
                x = newton_schulz(d)
            elif o["polar"] == "exact":
                x = exact_polar(d)
            elif o["polar"].startswith("top"):  # exact polar of rank r
                r = int(o["polar"][3:])
                u, sv, v = torch.linalg.svd(d, full_matrices=False)
                x = u[:, :r] @ v[:r]
            elif o["polar"] == "lowrank":  # exact polar of rank-deficient matrix
                u, sv, v = torch.linalg.svd(d, full_matrices=False)
                x = (u * (sv > 1e-5 * sv[0])) @ v
            l.weight.add_(x, alpha=-lr * lr_scale("original", *l.weight.shape))
            l.turn(M)
            l.weight.grad = None


def run(o):
    tr, va = load()
    torch.manual_seed(o["seed"])
    w = o["width"]
    model = GPT(
        GPTConfig(
            depth=o["depth"],
            aspect_ratio=-(-w // o["depth"]),
            head_dim=32,
            vocab_size=256,
            max_seq_len=o["seq"],
        ),
        seed=o["seed"],
    )
    model = GPT(
        GPTConfig(
            depth=o["depth"],
            aspect_ratio=w // o["depth"] if w % o["depth"] == 0 else -(-w // o["depth"]),
            head_dim=32,
            vocab_size=256,
            max_seq_len=o["seq"],
        ),
        seed=o["seed"],
    )
    assert model.config.width == w, model.config.width
    layers = []
    mole = []
    if o["est"].startswith("mole"):
        # molegrad's own: est = mole-factored / mole-dense
        molegrad.convert(
            model,
            molegrad.MoleGradConfig(
                rank_k=o["k"],
                gradient_mode=o["est"].split("-")[1],
                method="tangent",
                warm_start_decay=1 - o["explored"],
                min_layer_utilization=0.0,
                target_layers="ffn_only" if o["target"] == "ffn" else "all",
            ),
        )
        groups = matrix_param_groups(model.transformer["h"])
    else:
        for i, b in enumerate(model.transformer["h"]):
            mods = [(b.mlp, "c_fc"), (b.mlp, "c_proj")]
            if o["target"] == "all":
                mods += [(b.attn, x) for x in ("c_q", "c_k", "c_v", "c_proj")]
            for mod, name in mods:
                l = L(getattr(mod, name), o, len(layers))
                setattr(mod, name, l)
                layers.append(l)
        groups = [
            {
                "kind": "dense",
                "params": [
                    p.weight
                    for b in model.transformer["h"]
                    for p in (b.attn.c_q, b.attn.c_k, b.attn.c_v, b.attn.c_proj)
                    if isinstance(p, nn.Linear)
                ],
            }
        ]
        groups = [g for g in groups if g["params"]]
    mu_ = Muon(groups, lr=o["lr"], momentum=o["momentum"], adjust_lr="original") if groups else None
    mx = MuonX(layers, o) if layers else None
    sc = (w / 768) ** -0.5
    ad = torch.optim.AdamW(
        [
            dict(params=[model.transformer["wte"].weight], lr=0.2 * sc),
            dict(params=[model.lm_head.weight], lr=0.004 * sc),
        ],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.0,
    )
    base = [g["lr"] for g in ad.param_groups]
    gen = torch.Generator().manual_seed(o["seed"] + 17)

    def batch(g, src):
        i = torch.randint(len(src) - o["seq"] - 1, (o["batch"],), generator=g)
        x = torch.stack([src[j : j + o["seq"] + 1] for j in i]).long()
        return x[:, :-1], x[:, 1:]

    t0 = time.time()
    tl = 0
    for s in range(o["steps"]):
        left = min(1.0, (o["steps"] - s) / (0.4 * o["steps"]))
        mu = min(1, s / 200) * (o["momentum"] - 0.85) + 0.85
        for _ in range(o["accum"]):
            x, y = batch(gen, tr)
            loss = model(x, y)
            (loss / o["accum"]).backward()
        tl = 0.95 * tl + 0.05 * float(loss)
        if mx:
            mx.step(o["lr"] * left, mu)
        if mu_:
            for g in mu_.param_groups:
                g["lr"] = o["lr"] * left
                g["momentum"] = mu
            mu_.step()
            mu_.zero_grad()
        for g, b in zip(ad.param_groups, base):
            g["lr"] = b * left
        ad.step()
        ad.zero_grad()
    dt = time.time() - t0
    with torch.no_grad():
        g = torch.Generator().manual_seed(5)
        tot = 0
        n = max(1, (131072) // (o["batch"] * o["seq"]))
        for _ in range(n):
            tot += float(model(*batch(g, va)))
    return dict(bpb=tot / n / math.log(2), time=dt)


if __name__ == "__main__":
    print(run({**D, **json.loads(sys.argv[1])}))
