"""
A restricted Boltzmann machine on digits
========================================

Binary images, an energy with hidden units summed out in closed form, and no gradient in x: trained by persistent
chains and by pseudo-likelihood, sampled by Gibbs, its log Z estimated by annealing and checked by a sum over all 2^16
hidden states.
"""

# %%
# Two ways to train
# -----------------
#
# ``energy="rbm"`` is E(v) = −b·v − Σⱼ log(1 + exp(cⱼ + v·Wⱼ)). Two losses for it:
#
# - *Persistent contrastive divergence*: the gradient of log Z is an expectation under the model, and chains that go
#   on from step to step draw from it. The value of this loss means nothing; only its gradient does.
# - *Pseudo-likelihood*: the product of the probabilities of each pixel given all others, whose sums have two terms.
#
# Sixteen hidden units are few enough for the sum over all their states, so here log p(x) can be had exactly.
import os

import matplotlib.pyplot as plt
import torch

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"
train, _, test = pg.datasets.digits(levels=2)


def machine(hidden):
    """A Boltzmann machine whose visible biases start at the log odds of the pixels."""
    torch.manual_seed(0)
    rbm = pg.EBM(64, "rbm", base="bernoulli", hidden=(hidden,))
    share = (train.mean(0) * len(train) + 0.5) / (len(train) + 1)
    with torch.no_grad():
        rbm.model.net.visible_bias.copy_(share.logit())
    return rbm


objectives = {
    "persistent chains": pg.ContrastiveDivergence(pg.Gibbs(), steps=5, persistent=True, chains=100),
    "pseudo-likelihood": pg.PseudoLikelihood(),
}
machines = {}
for name, objective in objectives.items():
    rbm = machine(16)
    steps = 20 if quick else 3000 if name == "persistent chains" else 1000
    pg.fit(objective(rbm), train, steps=steps, batch_size=100, lr=1e-2, schedule="cosine", seed=0)
    machines[name] = rbm

# %%
# log Z twice
# -----------
#
# Enumeration sums over the 2^16 hidden states. Annealing leads chains from fair coins to the machine, through
# machines whose whole energy is heated; each of them has its own block Gibbs sweep.
temperatures = 20 if quick else 1000
for name, rbm in machines.items():
    exact = pg.log_normalizer(rbm, method=pg.Enumeration())
    annealed = pg.log_normalizer(rbm, method=pg.AnnealedImportanceSampling(temperatures, chains=100, seed=0))
    print(f"{name}: log Z {exact} by enumeration, {annealed} by annealing")

# %%
# With log Z comes log p(x) of images that neither has seen. One log Ẑ serves all of them.
for name, rbm in machines.items():
    print(f"{name}: {pg.log_evidence(rbm, test, method=pg.Enumeration()).mean()} nats per test image")

# %%
# Where enumeration ends
# ----------------------
#
# With 100 hidden units the smaller layer has 64 pixels, and 2^64 terms. Annealing still answers, from both sides:
# forward from the base, too low on average, and backward from the chains' ends, too high if those were draws of the
# model. A gap between the two that is more than their errors would say that the chains do not keep up.
large = machine(100)
pg.fit(
    pg.ContrastiveDivergence(pg.Gibbs(), steps=5, persistent=True, chains=100)(large), train,
    steps=20 if quick else 3000, batch_size=100, lr=5e-3, schedule="cosine", seed=0,
)  # fmt: skip
forward = pg.AnnealedImportanceSampling(temperatures, chains=100, seed=0)
backward = pg.AnnealedImportanceSampling(temperatures, chains=100, reverse=True, seed=0)
print("log Z forward: ", pg.log_normalizer(large, method=forward))
print("log Z backward:", pg.log_normalizer(large, method=backward))
evidence = pg.log_evidence(large, test, method=forward)
print(f"100 hidden units: {evidence.mean()} nats per test image, of which log Z's error {evidence.shared_error:.2f}")

# %%
# Draws, and what the hidden units look for
# -----------------------------------------
#
# Chains from fair coins, by block Gibbs: all hidden units given the image, then the image given them. R-hat over
# pixels says whether the chains agree (a pixel that never changes has none), and the draws are the last state of
# each.
chains = pg.Gibbs(chains=36).run(large, draws=20 if quick else 500, warmup=20 if quick else 1000, seed=0)
print(f"{len(chains)} draws of 36 chains, worst R-hat {float(chains.r_hat.nan_to_num(1.0).max()):.3f}")


def sheet(axis, tiles, title, **colours):
    """Images in rows of six or ten, a thin line between them."""
    across = 6 if len(tiles) == 36 else 10
    image = torch.full((9 * (len(tiles) // across) + 1, 9 * across + 1), torch.nan)
    for k, tile in enumerate(tiles):
        row, column = divmod(k, across)
        image[9 * row + 1 : 9 * row + 9, 9 * column + 1 : 9 * column + 9] = tile.reshape(8, 8)
    shown = axis.imshow(image, **colours)
    axis.set_title(title, fontsize=10)
    axis.set_facecolor("0.8")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return shown


figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.7), layout="constrained")
sheet(axes[0], test[:36], "data", cmap="gray_r", vmin=0, vmax=1)
sheet(axes[1], chains.x[:, -1], "draws of the machine", cmap="gray_r", vmin=0, vmax=1)
filters = large.model.net.weight.detach().T
filters = filters[filters.norm(dim=1).argsort(descending=True)]
bound = float(filters.abs().quantile(0.995))
shown = sheet(axes[2], filters, "weights of the 100 hidden units", cmap="RdBu_r", vmin=-bound, vmax=bound)
bar = figure.colorbar(shown, ax=axes[2], shrink=0.8, extend="both")
bar.set_label("weight, nats", fontsize=9)
