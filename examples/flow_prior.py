"""
A flow as a prior, under NUTS
=============================

Earlier units have told how intercept and slope go together, along a curve that no normal distribution follows. A flow
learns that from their estimates and becomes the prior of the next unit, as one ``pyro.sample`` among others.
"""

# %%
# What is known from before
# -------------------------
#
# 4000 earlier pairs of coefficients, on a parabola: intercept and slope are uncorrelated, and far from independent.
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
intercept = torch.randn(4000)
past = torch.stack([intercept, intercept**2 / 2 + 0.3 * torch.randn(4000)], -1)
flow = pg.Flow(2, "spline_coupling", layers=2, hidden=(32, 32))
pg.fit(
    pg.MaximumLikelihood()(flow), past, steps=20 if quick else 1000, batch_size=512, lr=5e-3, schedule="cosine", seed=0
)
figure = pg.plots.density(flow, past)
for axis in figure.axes[:2]:
    axis.set_xlabel("intercept")
figure.axes[0].set_ylabel("slope")
figure

# %%
# A new unit with little data
# ---------------------------
#
# Six measurements close to t = 0: they give the intercept away, and next to nothing of the slope.
truth = torch.tensor([1.8, 1.7])
t = torch.linspace(-0.05, 0.05, 6)
y = truth[0] + truth[1] * t + 0.2 * torch.randn(6)


def model(t, y, prior):
    coef = pyro.sample("coef", prior)
    with pyro.plate("obs", len(t)):
        pyro.sample("y", dist.Normal(coef[0] + coef[1] * t, 0.2), obs=y)


# %%
# Two priors, one sampler
# -----------------------
#
# Beside the flow a normal prior with the mean and covariance of the same 4000 pairs. The program is the same but for
# one argument.
priors = {
    "normal prior": dist.MultivariateNormal(past.mean(0), past.T.cov()),
    "flow prior": flow.distribution(),
}
draws, warmup = (10, 10) if quick else (300, 150)
posteriors = {}
for name, prior in priors.items():
    chains = []
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        mcmc = MCMC(
            NUTS(model, max_tree_depth=3 if quick else 10), num_samples=draws, warmup_steps=warmup, disable_progbar=True
        )
        mcmc.run(t, y, prior)
        chains.append(mcmc)
    posteriors[name] = pg.to_inference_data(
        chains, coords={"coefficient": ["intercept", "slope"]}, dims={"coef": ["coefficient"]}
    )
    print(name, az.summary(posteriors[name], var_names="coef").to_string(), sep="\n")

# %%
# What the curve is worth
# -----------------------
#
# The intercept is known from the measurements, under both priors. What it says about the slope only the flow knows.
figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
axis.scatter(*past[:1500].T, s=4, color="0.8", label="earlier units")
colours = ["#d55e00", "#0072b2"]
for (name, idata), colour in zip(posteriors.items(), colours, strict=True):
    coef = idata["posterior"]["coef"].stack(sample=("chain", "draw")).transpose("coefficient", "sample")
    axis.scatter(*coef.values, s=6, alpha=0.5, color=colour, label=f"posterior, {name}")
axis.plot(*truth, "k*", ms=13, label="truth")
axis.set(xlabel="intercept", ylabel="slope", xlim=(-2.8, 3.2), ylim=(-2.5, 5.0))
axis.set_title("the new unit: what its intercept says about its slope", fontsize=11)
_ = axis.legend(frameon=False, loc="upper left")

# %%
# The same in ArviZ
# -----------------
#
# The mark is the true value; the bar is the interval of highest density that holds 94 %.
panels = az.plot_posterior(
    posteriors["flow prior"], var_names="coef", ref_val=truth.tolist(), figsize=(9, 4), textsize=11
)
panels[0].figure.suptitle("posterior under the flow prior")
panels[0].figure.tight_layout()

# %%
# Both posteriors side by side.
(forest,) = az.plot_forest(
    list(posteriors.values()),
    model_names=list(posteriors),
    var_names="coef",
    combined=True,
    colors=colours,
    figsize=(7, 3.4),
    textsize=11,
)
forest.axvline(float(truth[0]), ymin=0.43, color="k", lw=1, ls=":")
forest.axvline(float(truth[1]), ymax=0.43, color="k", lw=1, ls=":")
forest.set_title("intervals of 50 % and 94 %, and the truth (dotted)", fontsize=11)
forest.figure.tight_layout()
