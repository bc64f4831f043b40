"""
Positive data: score matching with an edge
==========================================

Waiting times, concentrations, intensities have no values below 0, and many values close to it. Plain score matching
assumes that p(x) s(x) vanishes at the boundary; where it does not, the estimate is wrong, however many data there
are. A weight that vanishes at the edge mends it.
"""

# %%
# A density on (0, ∞)
# -------------------
#
# An exponential family, f(x) = exp(η x − λ x² / 2) on x > 0: a normal distribution of which only the positive part is
# seen. Its Z(η, λ) is an integral. At the edge f(0) = 1 and the score is η: their product does not vanish.
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"
truth = torch.tensor([0.5, 1.0])  # η, λ: the positive part of N(.5, 1)


class Quadratic(nn.Module):
    """E(x) = λ x² / 2 − η x."""

    def __init__(self):
        super().__init__()
        self.eta = nn.Parameter(torch.tensor(0.0))
        self.precision = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return (self.precision * x.square() / 2 - self.eta * x).sum(-1)


def program():
    return pg.EBM(1, energy=Quadratic(), base=None, support="positive").double()


def data(n, seed):
    """Draws of N(η/λ, 1/λ), the negative ones left out."""
    generator = torch.Generator().manual_seed(seed)
    x = truth[0] / truth[1] + torch.randn(10 * n, 1, generator=generator, dtype=torch.float64) / truth[1].sqrt()
    return x[x > 0][:n].unsqueeze(1)


# %%
# The guard
# ---------
#
# The data site knows its support, and plain score matching refuses it.
x = data(1000, seed=0)
try:
    pg.ScoreMatching()(program())(x)
except ValueError as error:
    print(error)

# %%
# With and without a weight
# -------------------------
#
# The weighted loss is E[½ h s² + h s′ + h′ s] with h(0) = 0; ``weight="auto"`` takes h = x² on a half-line. A weight
# of 1 for every x is plain score matching, and says that we know better than the guard, which here we do not. For
# this family all of them have closed-form minima; L-BFGS finds them. The plain one is mean and variance of the
# *truncated* data.
weights = {"plain": torch.ones_like, "h = x²": "auto", "h = x": lambda x: x.clone()}


def estimate(weight, x):
    """The loss at its minimum."""
    loss = pg.ScoreMatching(weight=weight)(program())
    loss.prepare(x)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x) / len(x)
        value.backward()
        return value

    optimizer.step(closure)
    return loss


for name, weight in weights.items():
    print(f"{name}: {pg.sandwich(estimate(weight, x), x)}")

# %%
# The truth is η = 0.5, λ = 1. The standard errors are those of the sandwich, as the loss is no likelihood; they speak
# of the spread of an estimate, and never of its bias. On more and more data the weighted estimates close in, and the
# plain one stays where it is. h = x has the smaller error here: the score stays finite at the edge, so that a weight
# of order x suffices, and it keeps more of the data near 0.
sizes = (300, 1000) if quick else (300, 1000, 3000, 10_000, 30_000)
repeats = 3 if quick else 20
figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
colours = dict(zip(weights, ("#d55e00", "#0072b2", "#009e73"), strict=True))
for (name, weight), mark in zip(weights.items(), "os^", strict=True):
    rmse = []
    for n in sizes:
        found = torch.stack([
            torch.stack(list(estimate(weight, data(n, seed)).program.parameters())).detach() for seed in range(repeats)
        ])  # fmt: skip
        rmse.append(float((found[:, 0] - truth[0]).square().mean().sqrt()))
    axes[1].plot(sizes, rmse, color=colours[name], marker=mark, label=name)
axes[1].set(xscale="log", yscale="log", xlabel="rows N", ylabel="root mean square error of η")
axes[1].set_title(f"{repeats} data sets of each size", fontsize=10)

# %%
# The densities
# -------------
#
# In one dimension Z is a sum over a grid, so each fit can be drawn as a density beside the histogram.
x = data(2000 if quick else 30_000, seed=1)
at = torch.linspace(0.0, 4.0, 400, dtype=torch.float64)[1:].unsqueeze(1)
axes[0].hist(x.squeeze(1).numpy(), bins=60, range=(0, 4), density=True, color="0.85", label="data")
for (name, weight), style in zip(weights.items(), ("--", "-", ":"), strict=True):
    fitted = estimate(weight, x).program
    log_z = pg.log_normalizer(fitted, method=pg.Quadrature())
    with torch.no_grad():
        density = (fitted.log_density(at) - log_z.value).exp()
    axes[0].plot(at, density, style, color=colours[name], lw=2, label=name)
axes[0].set(xlabel="x", ylabel="density per unit of x", xlim=(0, 4))
axes[0].set_title(f"fits to {len(x)} rows", fontsize=10)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
figure
