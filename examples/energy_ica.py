"""
Independent components by score matching
========================================

Mixed signals x = A s, sources independent and of heavier tails than the normal: find the unmixing matrix W. As a
density this is log f(x) = Σ log g(w·x), and its Z is known, ``1 / |det W|``. Score matching does without it: it is
told nothing of the determinant, and finds W all the same. Beside it is maximum likelihood, which is told. And there
is a lesson in units: the one does not mind in which coordinates the data come, the other does.
"""

# %%
# An energy with a known Z
# ------------------------
#
# Sources are Laplace; the model takes the logistic density for them, log g(s) = −2 log cosh(π s / 2√3) + const, which
# is close and smooth. (The Laplace density itself has a kink at 0, and score matching needs a continuous score.)
import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"
d = 4


class Unmixing(nn.Module):
    """E(x) = Σᵢ 2 log cosh(π wᵢ·x / 2√3), one row of W for each source."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.contiguous())

    def forward(self, x):
        s = math.pi / (2 * math.sqrt(3)) * (x @ self.w.T)
        return 2 * (s + nn.functional.softplus(-2 * s) - math.log(2)).sum(-1)  # log cosh, stable


class WithDeterminant(nn.Module):
    """The same program with its normalizer: a density up to a constant that no parameter moves."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(d), 1.0).to_event(1).mask(False), obs=x)
            pg.energy("energy", self.net, x)
            pyro.factor("determinant", torch.linalg.slogdet(self.net.w)[1].expand(len(x)))


# %%
# Two losses, one optimizer
# -------------------------
#
# A loss is a module: ``loss(x)`` is a number with a gradient, so any optimizer of torch can have it. Here it is
# L-BFGS on all rows at once, from one start for all: the data whitened, and turned at random.


def minimise(loss, x):
    """Full-batch L-BFGS on a pyro_gen loss."""
    loss.prepare(x)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=20 if quick else 200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x) / len(x)
        value.backward()
        return value

    optimizer.step(closure)


def amari(p):
    """Amari's distance of W A from a scaled permutation: 0 if every source is found, up to order and scale."""
    p = p.abs()
    by_row = (p / p.amax(1, keepdim=True)).sum(1) - 1
    by_column = (p / p.amax(0)).sum(0) - 1
    return float((by_row.sum() + by_column.sum()) / (2 * d * (d - 1)))


def recovered(n, seed):
    """Unmixing matrices of n rows of another mixture, by method; the mixing matrix, the sources and the rows."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.empty(n, d, dtype=torch.float64).exponential_(generator=generator)
    sources = sources * (2 * torch.randint(2, (n, d), generator=generator) - 1) / math.sqrt(2)  # Laplace, variance 1
    mixing = torch.randn(d, d, dtype=torch.float64, generator=generator)
    x = sources @ mixing.T
    values, vectors = torch.linalg.eigh(x.T.cov())
    whitening = (vectors / values.sqrt()).T
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]

    raw = pg.EBM(d, energy=Unmixing(rotation @ whitening), base=None)
    minimise(pg.ScoreMatching()(raw), x)
    white = pg.EBM(d, energy=Unmixing(rotation), base=None)
    minimise(pg.ScoreMatching()(white), x @ whitening.T)
    net = Unmixing(rotation @ whitening)
    minimise(pg.MaximumLikelihood()(WithDeterminant(net)), x)
    found = {
        "score matching": raw.model.net.w,
        "score matching, whitened x": white.model.net.w @ whitening,
        "maximum likelihood": net.w,
    }
    return {name: w.detach() for name, w in found.items()}, mixing, sources, x


# %%
# Error against sample size
# -------------------------
#
# Our source density is not quite the true one. Maximum likelihood forgives that, and so does score matching of
# whitened data, whose mixing is a rotation: errors fall as N^−½, parallel to the dotted line. On the data as they
# come score matching stops at a plateau. It measures distances between scores in the units of x; a linear map of x
# changes what it calls near, and with a model that is a little wrong, where it ends. Whiten first. Now and then a fit
# stops in a local minimum, two sources still mixed: so what is shown is the median over data sets.
sizes = (200, 400) if quick else (500, 1000, 2000, 4000, 8000)
repeats = 2 if quick else 7
table = {"score matching": [], "score matching, whitened x": [], "maximum likelihood": []}
for n in sizes:
    runs = [recovered(n, seed) for seed in range(repeats)]
    for name, column in table.items():
        column.append(sorted(amari(found[name] @ mixing) for found, mixing, _, _ in runs))
    print(f"N = {n}: " + ", ".join(f"{name} {column[-1][repeats // 2]:.4f}" for name, column in table.items()))

figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for (name, column), colour, mark in zip(table.items(), ("#d55e00", "#009e73", "#0072b2"), "o^s", strict=True):
    middle = [errors[repeats // 2] for errors in column]
    axis.plot(sizes, middle, color=colour, marker=mark, label=name)
    axis.fill_between(sizes, [e[repeats // 4] for e in column], [e[-1 - repeats // 4] for e in column], color=colour,
                      alpha=0.15, lw=0)  # fmt: skip
guide = [table["maximum likelihood"][0][repeats // 2] * 0.75 * (sizes[0] / n) ** 0.5 for n in sizes]
axis.plot(sizes, guide, "k:", label=r"$\propto N^{-1/2}$")
axis.set(xscale="log", yscale="log", xlabel="rows N", ylabel="Amari error")
axis.set_xticks(sizes, [str(n) for n in sizes])
axis.set_yticks([0.01, 0.02, 0.05, 0.1], ["0.01", "0.02", "0.05", "0.1"])
axis.minorticks_off()
axis.set_title(f"median of {repeats} data sets, band: middle half", fontsize=10)
axis.spines[["top", "right"]].set_visible(False)
_ = axis.legend(frameon=False)

# %%
# What it looks like
# ------------------
#
# Two of the four coordinates: sources, which lie along the axes, their mixture (the two that are most alike), and
# what W makes of it.
found, mixing, sources, x = recovered(sizes[-1], 0)
unmixed = x @ found["score matching, whitened x"].T
correlation = torch.corrcoef(torch.cat([sources, unmixed], 1).T)[:d, d:]
order = correlation.abs().argmax(1)  # which component is which source, and its sign
unmixed = unmixed[:, order] * correlation.gather(1, order.unsqueeze(1)).squeeze(1).sign() / unmixed[:, order].std(0)
alike = torch.corrcoef(x.T).triu(1).abs().flatten().argmax()
x = (x / x.std(0))[:, [int(alike) // d, int(alike) % d]]
figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.4), layout="constrained")
panels = {"sources": (sources, "s"), "mixed": (x, "x"), "unmixed by score matching": (unmixed, r"\hat s")}
first, second = int(alike) // d + 1, int(alike) % d + 1
for axis, (title, (points, letter)) in zip(axes, panels.items(), strict=True):
    i, k = (first, second) if letter == "x" else (1, 2)
    axis.scatter(points[:2000, 0], points[:2000, 1], s=4, alpha=0.5, lw=0, color="#0072b2")
    axis.set(xlim=(-5, 5), ylim=(-5, 5), xlabel=f"${letter}_{i}$ / sd", ylabel=f"${letter}_{k}$ / sd", aspect="equal")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
