"""
A diffusion as a prior, beside the exact answer
===============================================

A trained diffusion is a distribution like any other: here it is the prior of two inverse problems, one linear and one
not, under NUTS. The data it was trained on come from a mixture of normals, so that the posterior is known: in closed
form for the linear problem, by quadrature for the other. What is missing can be told apart: how much is the prior's
fault, and how much the sampler's.
"""

# %%
# The prior
# ---------
#
# Eight normals on a circle of radius 3, each with the standard deviation 0.7. The diffusion sees 20 000 draws of them.
# It predicts v, which is well-conditioned at both ends, where there is hardly any noise and hardly any datum.
import os

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"

pyro.set_rng_seed(0)
radius, scale = 3.0, 0.7
toy = pg.datasets.eight_gaussians(radius, scale)
diffusion = pg.Diffusion(2, prediction="v")
pg.fit(
    pg.DenoisingScoreMatching(weighting="v")(diffusion), toy.sample(500 if quick else 20_000, seed=0),
    steps=20 if quick else 6000, batch_size=256, lr=2e-3, schedule="cosine", seed=0,
)  # fmt: skip
diffusion.requires_grad_(False)  # a prior, from now on

# %%
# Two measurements
# ----------------
#
# One is linear, the sum of both coordinates; the other is the distance to a beacon. Both have a normal error of 1, so
# that few of the eight pieces remain possible.
beacon, sd = torch.tensor([5.0, 0.0]), 1.0
problems = {
    "linear": (lambda x: x.sum(-1), torch.tensor(3.5)),
    "distance": (lambda x: (x - beacon).square().sum(-1).sqrt(), torch.tensor(2.8)),
}


prior = diffusion.distribution()


def model(measure, y, copies):
    with pyro.plate("copies", copies):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = pyro.deterministic("x", prior.push(z), event_dim=1)
        pyro.sample("y", dist.Normal(measure(x), sd), obs=y.expand(copies))


# %%
# ``pyro.sample("x", prior)`` would do. Here the same is written out: noise, z ~ N(0, I), is carried to x by the
# probability-flow ODE. NUTS moves in z, where the prior is one normal and the eight pieces are neighbours, so that
# chains go from one to the next. A solve of the ODE costs about the same for one row as for many: a plate holds eight
# copies of the unknown, each with the same measurement, and each is a chain of its own to ArviZ. The unit of z is right
# as it is, so that only the step size is adapted.
copies, draws, warmup = (2, 6, 4) if quick else (8, 90, 30)
posteriors = {}
for name, problem in problems.items():
    pyro.set_rng_seed(1)
    nuts = NUTS(model, max_tree_depth=2 if quick else 4, adapt_mass_matrix=False)
    mcmc = MCMC(nuts, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*problem, copies)
    x = pg.to_inference_data(mcmc)["posterior"]["x"].squeeze("chain", drop=True).rename(copies="chain")
    posteriors[name] = az.convert_to_inference_data(x.transpose("chain", "draw", ...).to_dataset())
    print(name, az.summary(posteriors[name]).to_string(), sep="\n")

# %%
# The exact answers
# -----------------
#
# A mixture of normals stays one under a linear measurement: with a = (1, 1) its pieces have the covariance
# :math:`C = (I / s^2 + a a^T / \sigma^2)^{-1}`, the means :math:`C (m_k / s^2 + a y / \sigma^2)` and weights
# :math:`\propto N(y; a^T m_k, a^T a s^2 + \sigma^2)`. For the distance a grid has all of the mass. On the same grid the
# density of the diffusion, by its ODE, gives the posterior that a perfect sampler would find under *this* prior.
angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
means = radius * torch.stack([angle.cos(), angle.sin()], 1)


def closed_form(y):
    """Weights of the pieces, mean and standard deviation of x, given the sum y."""
    a = torch.ones(2, dtype=torch.float64)
    cov = torch.linalg.inv(torch.eye(2, dtype=torch.float64) / scale**2 + torch.outer(a, a) / sd**2)
    centre = (means / scale**2 + a * y / sd**2) @ cov
    weight = dist.Normal(means @ a, (2 * scale**2 + sd**2) ** 0.5).log_prob(y).softmax(0)
    mean = weight @ centre
    second = cov.diagonal() + weight @ centre.square()
    return weight, mean, (second - mean.square()).sqrt()


side = torch.linspace(-7, 7, 41 if quick else 113)
grid = torch.cartesian_prod(side, side)
inside = grid.norm(dim=1) < 7  # elsewhere there is nothing
log_prior = {"truth": toy.log_prob(grid).double(), "diffusion": torch.full((len(grid),), -torch.inf).double()}
with torch.no_grad():
    ode = pg.ProbabilityFlow(rtol=1e-3, atol=1e-3)
    log_prior["diffusion"][inside] = pg.log_evidence(diffusion, grid[inside], method=ode).value
nearest = torch.cdist(grid.double(), means).argmin(1)


def by_grid(prior, name):
    """The same three, by a sum over the grid."""
    measure, y = problems[name]
    mass = (log_prior[prior] + dist.Normal(measure(grid), sd).log_prob(y)).softmax(0)
    mean = mass @ grid.double()
    weight = torch.zeros(8, dtype=torch.float64).index_add_(0, nearest, mass)
    return weight, mean, (mass @ (grid.double() - mean).square()).sqrt()


def by_draws(name):
    x = torch.as_tensor(posteriors[name]["posterior"]["x"].values).reshape(-1, 2).double()
    weight = torch.bincount(torch.cdist(x, means).argmin(1), minlength=8) / len(x)
    return weight, x.mean(0), x.std(0)


def row(title, found):
    weight, mean, spread = found
    pieces = ", ".join(f"{float(weight[k]):.2f}" for k in (7, 0, 1, 2, 3))
    numbers = " ".join(f"{float(v):6.2f}" for v in (*mean, *spread))
    print(f"{title:24s} pieces {pieces}   mean and sd of x {numbers}")


for name in problems:
    print(name)
    if name == "linear":
        row("exact, closed form", closed_form(problems[name][1].double()))
    row("exact, grid", by_grid("truth", name))
    row("diffusion prior, grid", by_grid("diffusion", name))
    row("diffusion prior, NUTS", by_draws(name))

# %%
# Pieces are components in the closed form, and the nearest centre in the other rows, which is why the first two differ
# by a hundredth; in mean and standard deviation they say what the grid is worth. The next differs from it by what the
# diffusion has learnt, the last by what NUTS makes of it: ArviZ above says how many independent draws there are.
#
# Exact posterior and draws
# -------------------------
figure, axes = plt.subplots(1, 2, figsize=(10, 4.9), layout="constrained")
for ax, (name, (measure, y)) in zip(axes, problems.items(), strict=True):
    exact = (log_prior["truth"] + dist.Normal(measure(grid), sd).log_prob(y)).softmax(0).reshape(len(side), -1).T
    levels = [float(exact.max()) * part for part in (0.01, 0.1, 0.5)]
    x = torch.as_tensor(posteriors[name]["posterior"]["x"].values).reshape(-1, 2)
    likely = measure(grid).reshape(len(side), -1).T
    ax.contour(side, side, likely, levels=[float(y) - sd, float(y), float(y) + sd], colors="0.7", linewidths=0.8,
               linestyles=["dashed", "solid", "dashed"])  # fmt: skip
    ax.scatter(*x.T, s=6, alpha=0.4, color="#0072b2", linewidths=0, label="diffusion prior, NUTS")
    ax.contour(side, side, exact, levels=levels, colors="#d55e00", linewidths=1.2)
    ax.plot([], [], color="#d55e00", label="exact posterior")
    ax.plot([], [], color="0.7", label="measurement, ± 1 s.d.")
    ax.set(xlabel="$x_1$", ylabel="$x_2$", xlim=(-3, 5.5), ylim=(-4.5, 5), aspect="equal", title=name)
axes[0].legend(frameon=False, loc="lower left", fontsize=9)
figure

# %%
# The chains in ArviZ
# -------------------
#
# Above and below the beacon lie pieces that are equally likely: chains go to and fro.
_ = az.plot_trace(posteriors["distance"], var_names="x", compact=False, figsize=(9, 5))
plt.gcf().tight_layout()
