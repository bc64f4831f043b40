"""
A diffusion on digits: three numbers for one network
====================================================

What is log p(x) of an image under a diffusion? The chain has a bound, which is a sum over levels of noise; weights of
whole paths make it tighter; the ODE has a density, another one. All three on the same test images, in nats and in bits
per pixel, each with its kind and its error.
"""

# %%
# Dequantised images
# ------------------
#
# scikit-learn's digits, 8 × 8 pixels of 17 grey levels, with uniform noise on [0, 1): a density needs continuous data.
# Each training image comes twenty times, with noise of its own, or the noise would be learnt by heart.
import os

import torch

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"

train, validation, test = pg.datasets.digits(levels=17)
noisy = pg.datasets.dequantize(train.repeat(20, 1), seed=0)
held_out = pg.datasets.dequantize(validation, seed=1)
x = pg.datasets.dequantize(test, seed=2)[: 20 if quick else 360]

# %%
# A network for all levels
# ------------------------
#
# Continuous time has no number of steps to choose. The weights of the loss are those of the bound, so that the network
# is best where nats are at stake; averaged weights are those of the program once ``fit`` is done, which at its end also
# measures what the network does not know at each level, for the variances of the reverse steps.
torch.manual_seed(0)
diffusion = pg.Diffusion(64, timesteps=None, prediction="v", hidden=(32, 32) if quick else (256, 256, 256))
result = pg.fit(
    pg.DenoisingScoreMatching(weighting="elbo")(diffusion), noisy, steps=10 if quick else 5000, batch_size=128,
    lr=2e-3, schedule="cosine", validation=held_out, validate_every=5 if quick else 500, seed=0,
)  # fmt: skip
print(result)

# %%
# Bound, tighter bound, ODE
# -------------------------
#
# - *The bound* of a row is a sum over levels, each a divergence in closed form, averaged over draws of the noise.
# - *Weighted paths*: ``chain(T)`` is the same network as T sample sites, and a path of the noising has a weight. The
#   log of their mean is a bound for any number of paths, tighter the more there are. Its chain has 50 steps, the sum is
#   over all levels of continuous time, so that the comparison is also one of 50 steps with infinitely many.
# - *The ODE* has a density of its own, with a trace estimated by random directions: an estimate, with an error.
rows = 5 if quick else 60
methods = {
    "weighted paths, 50 steps": pg.log_evidence(
        diffusion.chain(5 if quick else 50), x[:rows], method=pg.ImportanceSampling(21 if quick else 200, seed=0)
    ),
    "ODE": pg.log_evidence(
        diffusion, x[:rows], method=pg.ProbabilityFlow(rtol=1e-3, atol=1e-3, probes=2 if quick else 4, seed=0)
    ),
}
draws = 2 if quick else 8
with torch.no_grad():
    bounds = torch.stack([diffusion.lower_bound(x[:rows]).double() for _ in range(draws)])
methods["sum over levels"] = pg.Evidence(bounds.mean(0), "lower bound", bounds.std(0) / draws**0.5)
for name, evidence in methods.items():
    mean = evidence.mean()
    print(f"{name}: {mean} nats, {mean.bits_per_dimension(64)} bits per pixel, {mean.kind}")

# %%
# Weights say how far to trust them. Small misses at each of 50 steps of 64 pixels add up in the weight of a path, so
# that a few of the 200 have nearly all of it: with a k̂ above 0.7 the number is a bound and no estimate.
paths = methods["weighted paths, 50 steps"]
print(f"medians: effective sample size {paths.effective_sample_size.median():.1f}, k̂ {paths.pareto_k.median():.1f}")

# %%
# Where the nats are
# ------------------
#
# Where little noise is left nobody can guess it, and each unit of log SNR costs half a nat a pixel, 32 in all: there
# the uniform noise on the pixels is what is described. What the network knows of digits is missing further right.
figure = pg.plots.loss_by_level(diffusion, x[:rows])

# %%
# Draws
# -----
#
# From 20 steps of a solver of second order, beside test images.
method = pg.ReverseDiffusion("dpm++2m", 20)
drawn = diffusion.sample(36, method=method, seed=0)
figure = pg.plots.samples(diffusion, x, n=None if len(x) > 35 else len(x), generated=drawn[: len(x)])

# %%
# The same, on their way. Noise is in standard deviations of each pixel, about its mean, so that the mean of all digits
# stays when everything else is gone. What is decided first is large; what comes last are edges.
figure = pg.plots.strips(diffusion, x, method=method)

# %%
# Are they right?
# ---------------
#
# A classifier that tries to tell 360 draws from 360 test images is right half of the time if it cannot. Its floor is
# what it does on two sets of images.
drawn = diffusion.sample(len(x), method=method, seed=1)
print("classifier, draws against test images:", pg.diagnostics.c2st(drawn, x))
print("classifier, images against test images:", pg.diagnostics.c2st(held_out[: len(x)], x[: len(held_out)]))

# %%
# For ArviZ
# ---------
#
# The bound of each image, and the price of each level.
idata = pg.to_inference_data(result, x[:rows], seed=0)
print(idata["log_evidence"])
