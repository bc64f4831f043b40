"""
How tight is a bound?
=====================

A linear decoder with Gaussian noise is probabilistic PCA, so here the evidence is known in closed form, and every bound
and estimate can be held against it. The program is written by hand in Pyro: nothing of it belongs to this package.
"""

# %%
# Probabilistic PCA of the iris measurements
# ------------------------------------------
#
# With 2 latent dimensions, x = W z + noise, maximum likelihood has a closed form (Tipping & Bishop 1999). The rotation
# of W by 45 degrees changes nothing of the model, but it correlates the latents in the posterior.
import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_iris

import pyro_gen as pg

x = torch.tensor(load_iris().data)
x = (x - x.mean(0)) / x.std(0, correction=0)
n, d = x.shape
variances, axes = torch.linalg.eigh(x.T @ x / n)
variances, axes = variances.flip(0), axes.flip(1)
noise = variances[2:].mean()
c = math.sqrt(0.5)
weights = axes[:, :2] * (variances[:2] - noise).sqrt() @ torch.tensor([[c, -c], [c, c]], dtype=x.dtype)
exact = dist.MultivariateNormal(torch.zeros(d, dtype=x.dtype), weights @ weights.T + noise * torch.eye(d)).log_prob(x)
print(f"log p(x) of the {n} rows: {exact.sum():.6f} nats, in closed form")

# %%
# A model, and a guide that is too simple for it
# ----------------------------------------------
#
# The posterior of z is a normal with correlated coordinates. The guide has its mean, but independent coordinates: the
# best that a diagonal guide can do.
precision = weights.T @ weights / noise + torch.eye(2, dtype=x.dtype)
covariance = torch.linalg.inv(precision)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weights.T, noise.sqrt()).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        mean = x @ weights @ covariance / noise
        pyro.sample("z", dist.Normal(mean, precision.diagonal() ** -0.5).to_event(1))


# %%
# The bound rises with the number of draws
# ----------------------------------------
#
# K = 1 is the ELBO. Its gap to the evidence is the KL divergence of the guide to the posterior, 24 nats here, and no
# number of *averaged* draws closes it. The importance-weighted bound takes the logarithm of the mean weight and does.
repeats, draws = 100, [1, 3, 10, 30, 100, 300, 1000]
bounds = {}
for k in draws:
    loss = pg.IWAE(k)(model, guide)
    torch.manual_seed(k)
    bounds[k] = np.array([-float(loss(x)) for _ in range(repeats)])
    print(f"K = {k:4d}: ≥ {bounds[k].mean():.2f} ± {bounds[k].std() / math.sqrt(repeats):.2f}")

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
means = np.array([bounds[k].mean() for k in draws])
errors = np.array([2 * bounds[k].std() / math.sqrt(repeats) for k in draws])
axis.errorbar(draws, means, errors, fmt="o-", ms=4, capsize=2, color="#0072b2", label="bound (± 2 se)")
axis.axhline(float(exact.sum()), color="#333333", lw=1, label="exact evidence")
axis.set(xscale="log", xlabel="K, draws of the guide", ylabel="log p(x) of all rows, nats")
axis.legend(frameon=False)

# %%
# The same as an estimate, row by row
# -----------------------------------
#
# With enough draws the mean weight is an estimate of each row's evidence, with an error that can be checked here: the
# standardised differences to the exact values should scatter like a standard normal.
program = pg.Bounded(model, guide, event_shape=d)
evidence = pg.log_evidence(program, x, method=pg.ImportanceSampling(5000, seed=0))
print("estimated:", evidence.sum(), "exact:", f"{exact.sum():.2f}")
z = (evidence.value - exact) / evidence.standard_error
print(f"differences over their standard errors: mean {z.mean():.2f}, sd {z.std():.2f}")
figure
