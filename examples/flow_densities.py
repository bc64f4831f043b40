"""
Densities of flows, beside the truth
====================================

Three toy densities whose truth is known, three flows fitted to draws of them by maximum likelihood. As p is known, so
is how far the fit is from it: KL(p ‖ q) in nats, estimated on fresh draws, with its standard error.
"""

# %%
# Draws, a flow, its likelihood
# -----------------------------
#
# Two masked autoregressive layers whose maps are rational-quadratic splines of 16 bins, with a learnt matrix between
# them. The box of the splines reaches 3 standard deviations to each side, no further than the data do: bins outside
# are bins lost. The checkerboard lives on a square and has edges, so there the flow gets a square of its own:
# ``base="uniform"`` with a ``support`` leaves nothing outside, where a normal base would have to pull its tails in.
import os

import matplotlib.pyplot as plt
import torch

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"
steps, rows = (20, 2000) if quick else (1200, 20_000)

toys = {
    "pinwheel": (pg.datasets.pinwheel(), {"bound": 3.0}),
    "eight Gaussians": (pg.datasets.eight_gaussians(), {"bound": 3.0}),
    "checkerboard": (pg.datasets.checkerboard(), {"base": "uniform", "support": (-4.0, 4.0)}),
}
flows = {}
for name, (toy, options) in toys.items():
    torch.manual_seed(0)
    flow = pg.Flow(2, layers=2, hidden=(64, 64), bins=16, **options)
    pg.fit(
        pg.MaximumLikelihood()(flow), toy.sample(rows, seed=0), steps=steps, batch_size=256, lr=5e-3,
        schedule="cosine", seed=0,
    )  # fmt: skip
    flows[name] = flow

# %%
# How far is q from p?
# --------------------
#
# The mean of log p − log q over draws of p that neither fit nor choice has seen. Both terms are exact, so the error is
# that of the mean alone.
distances = {}
for name, (toy, _) in toys.items():
    x = toy.sample(rows, seed=1)
    with torch.no_grad():
        gap = toy.log_prob(x) - flows[name].log_prob(x)
    distances[name] = float(gap.mean()), float(gap.std()) / len(x) ** 0.5
    print(f"{name}: KL(p ‖ q) = {distances[name][0]:.3f} ± {distances[name][1]:.3f} nats")

# %%
# And where does it differ?
# -------------------------
#
# Truth above, fit below, on one scale of colours in each column (what is denser than its end is the same yellow). What
# is left between the islands are the bridges that a continuous map has to keep: a flow cannot tear space. Edges that
# are not those of the support come out rounded.
cells = 200
figure, axes = plt.subplots(2, 3, figsize=(9.4, 6.4), layout="constrained", sharex="col", sharey="col")
for column, (name, (toy, _)) in enumerate(toys.items()):
    reach = 4.0 if name == "checkerboard" else 1.05 * float(toy.sample(5000, seed=2).abs().max())
    middles = reach * (2 * (torch.arange(cells) + 0.5) / cells - 1)
    grid = torch.cartesian_prod(middles, middles)
    with torch.no_grad():
        truth, fitted = (p.log_prob(grid).exp().reshape(cells, cells).T for p in (toy, flows[name]))
    top, bottom = axes[:, column]
    for axis, density in ((top, truth), (bottom, fitted)):
        image = axis.imshow(
            density, origin="lower", extent=(-reach, reach, -reach, reach), vmin=0.0, vmax=1.15 * float(truth.max()),
        )  # fmt: skip
    value, error = distances[name]
    top.set_title(f"{name}, the truth p", fontsize=10)
    bottom.set_title(f"flow q, KL(p ‖ q) = {value:.3f} ± {error:.3f} nats", fontsize=10)
    bottom.set_xlabel("$x_1$")
    bar = figure.colorbar(image, ax=axes[:, column], location="bottom", aspect=30, extend="max")
    bar.set_label("density per unit area")
for axis in axes[:, 0]:
    axis.set_ylabel("$x_2$")
