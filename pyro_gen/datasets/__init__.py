"""Data to fit and to test on: toy densities with known log p and entropy, handwritten digits, the user's own files.

A toy knows what a model has to find out, its normalized :math:`\\log p(x)` and its entropy
:math:`H = -\\mathbb{E}_p \\log p`, so that the quality of a fit is a number with a floor: the mean negative
log-density of a model :math:`q` on data from the toy is

.. math:: -\\mathbb{E}_p \\log q(x) = H + \\mathrm{KL}(p \\,\\|\\, q) \\ge H.

Nothing here is unnormalized: every :math:`Z` is known. Draws come from generators of their own; the global ones are
never touched.
"""

from pyro_gen.datasets.densities import Estimate, GaussianMixture, Toy
from pyro_gen.datasets.files import load
from pyro_gen.datasets.images import Split, dequantize, digits
from pyro_gen.datasets.patterns import BarsAndStripes, bars_and_stripes
from pyro_gen.datasets.toys import (
    checkerboard,
    eight_gaussians,
    gaussian_mixture,
    grid_gaussians,
    moons,
    pinwheel,
    ring,
    rings,
    swiss_roll,
)

__all__ = [
    "BarsAndStripes",
    "Estimate",
    "GaussianMixture",
    "Split",
    "Toy",
    "bars_and_stripes",
    "checkerboard",
    "dequantize",
    "digits",
    "eight_gaussians",
    "gaussian_mixture",
    "grid_gaussians",
    "load",
    "moons",
    "pinwheel",
    "ring",
    "rings",
    "swiss_roll",
]
