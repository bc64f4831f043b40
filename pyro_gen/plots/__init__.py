"""Pictures of a fit: how the loss fell, the draws, the density or energy, the latents, the noise, how far to trust.

Every function returns a ``matplotlib.figure.Figure`` of its own: pyplot's state is neither read nor changed, so nothing
has to be closed, ``savefig`` works without a display, and a notebook shows it as the last value of a cell. Functions of
one panel take ``ax=`` to draw into another figure. Axes carry units; colours are told apart by colour-blind eyes.
"""

from pyro_gen.plots.data import reconstructions, samples
from pyro_gen.plots.densities import density
from pyro_gen.plots.diffusion import score_field, strips, trajectories
from pyro_gen.plots.energies import energy
from pyro_gen.plots.fits import loss
from pyro_gen.plots.latents import latent
from pyro_gen.plots.noise_levels import loss_by_level
from pyro_gen.plots.weights import pareto_k

__all__ = [
    "density",
    "energy",
    "latent",
    "loss",
    "loss_by_level",
    "pareto_k",
    "reconstructions",
    "samples",
    "score_field",
    "strips",
    "trajectories",
]
