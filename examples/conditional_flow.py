"""
A conditional flow: posteriors for any observation
==================================================

Two sensors at known places measure their distance to a source, with noise. Where is the source? Each observation has a
posterior, and it has two modes, since distances from two points on a line cannot tell its two sides apart. A flow
p(θ | y) fitted to simulated pairs gives the posterior of every observation at once (neural posterior estimation), and
here it can be held against the truth, as two dimensions are few enough for a grid.
"""

# %%
# Simulated pairs
# ---------------
#
# θ uniform on the square [−3, 3]², y the two distances plus normal noise of sd 0.3. The joint draws are all that the
# fit sees: it needs no likelihood, only a simulator.
import os

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"
steps, rows = (20, 4000) if quick else (1500, 50_000)

sensors = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
noise = 0.3


def distances(theta):
    return (theta.unsqueeze(-2) - sensors).norm(dim=-1)


def simulate(n, seed):
    generator = torch.Generator().manual_seed(seed)
    theta = 6 * torch.rand(n, 2, generator=generator) - 3
    return theta, distances(theta) + noise * torch.randn(n, 2, generator=generator)


theta, y = simulate(rows, seed=0)

# %%
# p(θ | y)
# --------
#
# ``context_shape`` makes a flow conditional, and ``fit`` takes pairs (x, context). The prior is uniform on a square, so
# the flow gets that square as its support: no posterior mass can leak out of it.
torch.manual_seed(0)
flow = pg.Flow(2, layers=2, hidden=(64, 64), context_shape=2, base="uniform", support=(-3.0, 3.0), bins=12)
result = pg.fit(
    pg.MaximumLikelihood()(flow), (theta, y), steps=steps, batch_size=256, lr=3e-3, schedule="cosine", seed=0
)
print(result)

# %%
# Against the exact posterior
# ---------------------------
#
# By Bayes' theorem p(θ | y) = p(y | θ) p(θ) / p(y), with p(y) from a sum over cells. The expected divergence
# E KL(p(θ | y) ‖ q(θ | y)) over observations is a mean of log-ratios over fresh pairs.
cells = 120
middles = 6 * (torch.arange(cells) + 0.5) / cells - 3
grid = torch.cartesian_prod(middles, middles)
at_grid = distances(grid)


def log_likelihood(y, means):
    return dist.Normal(means, noise).log_prob(y).sum(-1)


def log_posterior(theta, y):
    log_integral = log_likelihood(y.unsqueeze(1), at_grid).logsumexp(1) + 2 * torch.log(middles[1] - middles[0])
    return log_likelihood(y, distances(theta)) - log_integral


new_theta, new_y = simulate(500 if quick else 2000, seed=1)
with torch.no_grad():
    gap = log_posterior(new_theta, new_y) - flow.log_prob(new_theta, new_y)
    gain = flow.log_prob(new_theta, new_y) + torch.log(torch.tensor(36.0))
print(f"E KL(p ‖ q): {gap.mean():.3f} ± {gap.std() / len(gap) ** 0.5:.3f} nats")
print(f"for scale, what q says beyond the prior: {gain.mean():.3f} ± {gain.std() / len(gain) ** 0.5:.3f} nats")

# %%
# Three observations, one fit
# ---------------------------
#
# Exact posterior above, flow below, on one scale of colours in each column.
true = torch.tensor([[-1.5, 1.8], [0.2, 0.9], [2.4, -1.2]])
observed = distances(true) + noise * torch.randn(3, 2, generator=torch.Generator().manual_seed(5))
figure, axes = plt.subplots(2, 3, figsize=(9.4, 6.8), layout="constrained", sharex=True, sharey=True)
for column in range(3):
    context = observed[column].expand(len(grid), 2)
    with torch.no_grad():
        exact = log_likelihood(observed[column], at_grid).softmax(0) / (middles[1] - middles[0]) ** 2
        learnt = flow.log_prob(grid, context).exp()
    top = max(float(exact.max()), float(learnt.max()))
    for axis, density in zip(axes[:, column], (exact, learnt), strict=True):
        image = axis.imshow(density.reshape(cells, cells).T, origin="lower", extent=(-3, 3, -3, 3), vmin=0.0, vmax=top)
        axis.plot(*true[column], "x", color="white", ms=8, mew=2)
        axis.plot(*sensors.T, "^", color="tab:orange", ms=6)
    first, second = observed[column].tolist()
    axes[0, column].set_title(f"exact, y = ({first:.2f}, {second:.2f}) m", fontsize=10)
    axes[1, column].set_title("flow", fontsize=10)
    axes[1, column].set_xlabel("$θ_1$, m")
    bar = figure.colorbar(image, ax=axes[:, column], location="bottom", aspect=30)
    bar.set_label("density, per m²")
figure.suptitle(
    "posterior of the place of a source (cross), given its distances y to two sensors (triangles)", fontsize=11
)
for axis in axes[:, 0]:
    axis.set_ylabel("$θ_2$, m")

# %%
# A batch of distributions
# ------------------------
#
# With a batch of contexts ``flow.distribution`` is a batch of distributions: draws, densities, or a site in a plate of
# a larger program. The two modes have half of the draws each.
posterior = flow.distribution(observed)
draws = posterior.sample((2000,))
print("batch shape", tuple(posterior.batch_shape), "event shape", tuple(posterior.event_shape))
print("share of draws above the line:", [f"{share:.2f}" for share in (draws[..., 1] > 0).float().mean(0)])
