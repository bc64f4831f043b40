"""
Energies in the plane
=====================

One energy network, one data set, three ways to train it without Z: match the score, match the score of noisy data,
tell data from noise. The pictures show the energy, its score field and what chains draw; a grid gives Z afterwards,
and with it the distance from the truth.
"""

# %%
# Three objectives
# ----------------
#
# ``pg.EBM`` without an energy of your own is a multilayer perceptron over a normal base, both placed by the training
# data. The fits differ in the loss alone.
#
# - *Score matching*, ½|∇E|² − ΔE, looks at the data and nowhere else.
# - *Denoising* at several levels of noise, one energy for all: its minimum is the score of a mixture of noisy
#   densities, here with most of the weight on the least noise. The broad levels lay data between the moons.
# - *Noise contrast* is a logistic regression of data against draws of a normal with their mean and covariance. log Z
#   is one of its parameters.
import os

import torch

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"
steps, rows = (20, 1000) if quick else (1500, 10_000)

toy = pg.datasets.moons()
x = toy.sample(rows, seed=0)
objectives = {
    "score matching": pg.ScoreMatching(),
    "denoising": pg.DenoisingScoreMatching(sigmas=(0.05, 0.2, 0.8), mixture=(0.9, 0.08, 0.02), antithetic=True),
    "noise contrast": pg.NoiseContrastive("normal", ratio=2),
}
fitted = {}
for name, objective in objectives.items():
    torch.manual_seed(0)
    ebm = pg.EBM(2, hidden=(64, 64))
    loss = objective(ebm)
    pg.fit(loss, x, steps=steps, batch_size=256, lr=5e-3, schedule="cosine", seed=0)
    fitted[name] = ebm
print("log Z, as noise contrast learnt it:", loss.log_normalizer())

# %%
# How far is the model from the truth?
# ------------------------------------
#
# In the plane a grid gives Z to all digits that matter, so log p(x) of new rows is known, and with it KL(truth ‖
# model).
#
# A second number is what score matching cannot see. Between the moons there are next to no data, and the score on the
# one moon does not know of the other: how heavy each is, is left to what the network makes of the gap. Half of the
# mass lies on the upper moon in truth.
arc = torch.linspace(0, torch.pi, 200)
upper = torch.stack([arc.cos(), arc.sin()], 1)
lower = torch.stack([1 - arc.cos(), 0.5 - arc.sin()], 1)


def share_of_upper(ebm, log_z, cells=300):
    """Mass nearer to the upper half circle than to the lower, by a sum over a grid."""
    side = torch.linspace(-4, 5, cells)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = (ebm.log_density(grid).double() - log_z).exp() * (side[1] - side[0]) ** 2
    return float(mass[torch.cdist(grid, upper).amin(1) < torch.cdist(grid, lower).amin(1)].sum())


fresh = toy.sample(rows, seed=1)
for name, ebm in fitted.items():
    log_z = pg.log_normalizer(ebm, method=pg.Quadrature())
    with torch.no_grad():
        gap = toy.log_prob(fresh).double() - (ebm.log_density(fresh).double() - log_z.value)
    kl, error = float(gap.mean()), float(gap.std()) / len(gap) ** 0.5
    share = share_of_upper(ebm, log_z.value)
    print(f"{name}: log Z {log_z}, KL(truth ‖ model) = {kl:.3f} ± {error:.3f} nats, upper moon {share:.2f}")

# %%
# Energy, score, draws
# --------------------
#
# The chains are Hamiltonian, two hundred at once, from draws of the base; their last states are shown. R-hat says
# whether they agree. Well above 1.01, as here, it says that few chains have crossed from one moon to the other: the
# draws know the shape of each moon, and how many lie on which is a matter of the start.


def picture(name):
    """The energy and score of a fit, beside data and draws."""
    chains = pg.HMC(chains=20 if quick else 200).run(
        fitted[name], draws=10 if quick else 50, warmup=20 if quick else 150, seed=0
    )
    print(f"{name}: {chains}")
    figure = pg.plots.energy(fitted[name], x, draws=chains.x[:, -10:].flatten(0, 1), n=2000)
    figure.axes[1].set_title(f"{name}: energy and score", fontsize=10)
    return figure


picture("score matching")

# %%
# Noise in the data rounds the ridges and fills the gap a little, by what ``mixture=`` says.
picture("denoising")

# %%
# Far from data and noise alike the energy of the classifier is its base's and nobody else's.
picture("noise contrast")
