"""
A VAE on handwritten digits
===========================

From images to a model with an evidence, a posterior in ArviZ and pictures, in half a minute. The images are
scikit-learn's digits, 8 × 8 pixels of 17 grey levels, so a pixel is a whole number 0 … 16 and the model gives each
image a probability.
"""

# %%
# Data, program, fit
# ------------------
#
# A program is a pair of Pyro programs: the model draws a latent z and an image from it, the guide (the encoder) stands
# in for the posterior of z. The objective is the evidence lower bound; the weights kept are those of the best
# validation bound. Numbers are nats per image.
import os
from pathlib import Path

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"
out = Path("demo_run")
out.mkdir(exist_ok=True)

train, validation, test = pg.datasets.digits(levels=17)
vae = pg.VAE(64, latent_dim=8, likelihood="discretized_logistic", levels=17)
result = pg.fit(
    pg.ELBO()(vae), train, steps=200 if quick else 2000, batch_size=128, lr=2e-3, schedule="cosine",
    validation=validation, seed=0,
)  # fmt: skip
print(result)

# %%
# How good is it?
# ---------------
#
# log p(x) of images that the model has not seen, by importance sampling. The sign says what the number is: ``≈`` an
# estimate, ``≥`` a lower bound, where the weights of some images have too heavy a tail (k̂ > 0.7) to be trusted further.
# The first error is that of the Monte Carlo draws, the second that of having 360 images and not all there are.
evidence = pg.log_evidence(vae, test, method=pg.ImportanceSampling(200 if quick else 2000, seed=0))
print("log p(x) per test image:", evidence.mean())

# %%
# What has it learnt?
# -------------------
#
# The posterior of z for some test images, as ArviZ keeps it: named dimensions, a netCDF file, every plot and summary.
idata = pg.to_inference_data(result, test[:50], seed=0, coords={"latent": [f"z{i}" for i in range(8)]})
idata.to_netcdf(out / "vae.nc")
print(idata)
active = pg.diagnostics.active_units(vae, test)
print("active latent dimensions:", active)

# %%
# And what does it look like?
# ---------------------------
loss = pg.plots.loss(result)
loss.savefig(out / "loss.png", dpi=120)
loss

# %%
# Real images, images drawn from the model, and reconstructions.
samples = pg.plots.samples(vae, test, seed=0)
samples.savefig(out / "samples.png", dpi=120)
samples

# %%
# Where the encoder puts the test images.
labels = pg.datasets.digits(levels=17, labels=True).test[1]
latent = pg.plots.latent(vae, test, labels=labels)
latent.savefig(out / "latent.png", dpi=120)
latent

# %%
# Whether the importance weights can be trusted, image by image.
weights = pg.plots.pareto_k(evidence)
weights.savefig(out / "pareto_k.png", dpi=120)
weights

# %%
# The fit is kept as tensors and JSON: ``pg.load("demo_run")`` brings the program back without running any code of it.
result.save(out)
print(f"pictures: {', '.join(str(p) for p in sorted(out.glob('*.png')))}")
print(f"latent posterior (netCDF, for ArviZ): {out / 'vae.nc'}")
