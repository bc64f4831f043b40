"""Markov chains over densities known up to Z, many at once: Langevin, MALA, HMC, Gibbs."""

from pyro_gen.samplers.chains import Chains
from pyro_gen.samplers.draws import Draws
from pyro_gen.samplers.gibbs import Gibbs
from pyro_gen.samplers.hmc import HMC
from pyro_gen.samplers.langevin import MALA, Langevin

__all__ = ["HMC", "MALA", "Chains", "Draws", "Gibbs", "Langevin"]
