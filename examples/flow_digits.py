"""
A flow on digits: nats and bits of an image
===========================================

A density needs continuous data, and pixels are whole numbers. Uniform noise on [0, 1) makes them continuous without
losing which number it was, and the density of the sum is a number that can be compared between models: nats per image,
or bits per pixel.
"""

# %%
# Dequantised images
# ------------------
#
# scikit-learn's digits, 8 × 8 pixels of 17 grey levels. x + u with u uniform lies in [0, 17), and the probability of an
# image is the integral of the density over the cube of x, so by Jensen's inequality E log p(x + u) ≤ log P(x). The
# noise is drawn many times for each training image, or the flow would learn the noise by heart.
import math
import os

import torch

import pyro_gen as pg

quick = os.environ.get("PYRO_GEN_SMOKE") == "1"

train, validation, test = pg.datasets.digits(levels=17)
noisy = pg.datasets.dequantize(train.repeat(20, 1), seed=0)
held_out = pg.datasets.dequantize(validation, seed=1)

# %%
# A flow from pixels to noise
# ---------------------------
#
# A logit takes the interval [0, 17] to the real line, so that no mass lies outside; two autoregressive layers of
# splines follow, in the order of reading and back. With 1200 images the danger is to learn them by heart: small batches
# and averaged weights help, and ``fit`` keeps the weights of the best validation.
torch.manual_seed(0)
flow = pg.Flow(64, layers=2, hidden=(256,), support=(0.0, 17.0), mixing="flip")
result = pg.fit(
    pg.MaximumLikelihood()(flow), noisy, steps=10 if quick else 700, batch_size=32, lr=4e-3, schedule="cosine",
    average=0.99, validation=held_out, validate_every=5 if quick else 50, seed=0,
)  # fmt: skip
print(result)

# %%
# Nats and bits
# -------------
#
# Nats refer to the pixels as they are given, 0 … 17: the logit is a part of the flow, its Jacobian of the density. The
# sign is ``=``, as nothing is estimated. The error is that of having 360 test images.
evidence = pg.log_evidence(flow, pg.datasets.dequantize(test, seed=2))
nats, bits = evidence.mean(), evidence.mean().bits_per_dimension(64)
print(f"test images: {nats} nats each, {bits} bits per pixel")

# %%
# For scale: a density that knows nothing but the range of the pixels is uniform on the box.
print(f"uniform on [0, 17]^64: {-64 * math.log(17):.1f} nats each, {math.log2(17):.2f} bits per pixel")

# %%
# Draws
# -----
#
# A draw goes pixel by pixel in each layer. After the full run most draws have strokes, and many are digits.
figure = pg.plots.samples(flow, pg.datasets.dequantize(test, seed=2), seed=0)
