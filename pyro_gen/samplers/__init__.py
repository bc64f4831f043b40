"""Samplers: Markov chains over densities known up to Z, and ways back from noise to data.

`Langevin`, `MALA`, `HMC` and `Gibbs` move many chains at once; `ReverseDiffusion` and `ProbabilityFlow` take the noise
out of draws of a program with a score at every noise level.
"""

from pyro_gen.samplers.chains import Chains
from pyro_gen.samplers.draws import Draws
from pyro_gen.samplers.gibbs import Gibbs
from pyro_gen.samplers.hmc import HMC
from pyro_gen.samplers.langevin import MALA, Langevin
from pyro_gen.samplers.probability_flow import ProbabilityFlow
from pyro_gen.samplers.reverse import ReverseDiffusion

__all__ = ["HMC", "MALA", "Chains", "Draws", "Gibbs", "Langevin", "ProbabilityFlow", "ReverseDiffusion"]
