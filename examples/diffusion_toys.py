"""
Diffusion in the plane
======================

Noise takes data away step by step; a network learns each step back. The pictures show both directions, the paths that
draws take, the score that moves them, and what each level of noise costs. A density comes with it: a bound of the
chain, and an equality of the ODE that goes the same way without noise.
"""

# %%
# Two data sets, one fit
# ----------------------
#
# ``pg.Diffusion`` without a network of your own has a multilayer perceptron, with Fourier features of x in the plane.
# The chain has 1000 steps. Denoising costs the same however many there are: a row is trained at one of them at a time.
# The network predicts v = α ε − σ u, of which both noise and datum can be had at all levels. From a prediction of the
# noise (the default, ``"epsilon"``) the datum comes divided by α, which is next to nothing at the last level: a chain
# of many small steps forgives that, a solver that begins with a large one does not.
import os

import matplotlib.pyplot as plt
import torch

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"
steps, rows = (20, 500) if quick else (6000, 20_000)

toys = {"eight Gaussians": pg.datasets.eight_gaussians(), "swiss roll": pg.datasets.swiss_roll()}
fitted = {}
for name, toy in toys.items():
    torch.manual_seed(0)
    diffusion = pg.Diffusion(2, timesteps=100 if quick else 1000, prediction="v")
    result = pg.fit(
        pg.DenoisingScoreMatching(weighting="v")(diffusion), toy.sample(rows, seed=0), steps=steps, batch_size=256,
        lr=2e-3, schedule="cosine", seed=0,
    )  # fmt: skip
    fitted[name] = diffusion
    print(f"{name}: {result}")

# %%
# Noise in, noise out
# -------------------
#
# Above, data as noise comes in; below, draws as it goes out, to be read from the right. Both rows have one time a
# column, so that each pair of panels should look alike.
x = {name: toy.sample(1000, seed=1) for name, toy in toys.items()}
figure = pg.plots.strips(fitted["eight Gaussians"], x["eight Gaussians"])

# %%
# The spiral is lost from the outside in, and found again from the inside out.
figure = pg.plots.strips(fitted["swiss roll"], x["swiss roll"])

# %%
# Where draws come from
# ---------------------
#
# Without noise on the way a draw follows the probability-flow ODE: paths do not cross, so that each piece of the noise
# goes to a piece of the data of the same mass.
figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
for ax, (name, diffusion) in zip(axes, fitted.items(), strict=True):
    pg.plots.trajectories(diffusion, x[name], n=150, ax=ax)
    ax.set_title(name)

# %%
# What moves them
# ---------------
#
# The score of the noisy data, from little noise to all of it: at first it points to the nearest piece of the data, at
# last to their mean.
figure = pg.plots.score_field(fitted["swiss roll"], x["swiss roll"])

# %%
# What it knows, in nats
# ----------------------
#
# Two numbers for one network. The bound is of the reverse chain, whose every step is a normal distribution with a mean
# of the network's; the equality is of the ODE, with the error of its numerical solution. They are two models, so
# neither has to lie above the other. Beside both, what the truth has.
for name, diffusion in fitted.items():
    test = toys[name].sample(100 if quick else 1000, seed=2)
    truth = toys[name].log_prob(test).double()
    ode = pg.log_evidence(diffusion, test, method=pg.ProbabilityFlow(rtol=1e-4, atol=1e-4))
    with torch.no_grad():
        bound = diffusion.lower_bound(test, particles=4).double()
    for what, values in (("bound of the chain", bound), ("ODE", ode.value)):
        gap = truth - values
        error = gap.std() / len(gap) ** 0.5
        print(f"{name}, {what}: {values.mean():.3f} nats, {gap.mean():.3f} ± {error:.3f} below the truth")

# %%
# The bound is a sum over levels of noise, and this is where it is spent. With little noise left, on the left, all that
# a step can do is to find where in a narrow density the datum is; the hump is where it is decided on which piece.
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for ax, (name, diffusion) in zip(axes, fitted.items(), strict=True):
    pg.plots.loss_by_level(diffusion, x[name][:200], ax=ax)
    ax.set_title(f"{name}\n{ax.get_title()}", fontsize=9)

# %%
# Fewer steps
# -----------
#
# The network does not care how it is used. The chain takes as many steps as it has; solvers of second order get the
# same draws from few. The distance is between 2000 draws and 2000 data, over random directions. Its floor is that of
# two sets of one distribution, by exchanging rows between them, and p is the share of exchanges that are as far apart.
n = 200 if quick else 2000
toy, diffusion = toys["eight Gaussians"], fitted["eight Gaussians"]
for method in (
    pg.ReverseDiffusion("ancestral"), pg.ReverseDiffusion("ddim", 20), pg.ReverseDiffusion("dpm++2m", 20),
    pg.ReverseDiffusion("heun", 20, spacing="log_snr"), pg.ProbabilityFlow(rtol=1e-3, atol=1e-3),
):  # fmt: skip
    draws = diffusion.sample(n, method=method, seed=3)
    taken = len(method.times(diffusion)) if isinstance(method, pg.ReverseDiffusion) else "as many as it takes"
    name = getattr(method, "method", "ODE")
    print(f"{name}, steps: {taken}: {pg.diagnostics.sliced_wasserstein(draws, toy.sample(n, seed=4))}")

# %%
# For ArviZ
# ---------
#
# The bound of each row with its kind and error, and the price of each level averaged over rows, in group
# ``noise_levels``.
idata = pg.to_inference_data(diffusion, x["eight Gaussians"][:100], seed=0)
print(idata["noise_levels"])
