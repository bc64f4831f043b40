"""Pyro distributions that the families need."""

from pyro_gen.distributions.discretized import DiscretizedLogistic
from pyro_gen.distributions.held import Held
from pyro_gen.distributions.likelihoods import Likelihood, likelihood

__all__ = ["DiscretizedLogistic", "Held", "Likelihood", "likelihood"]
