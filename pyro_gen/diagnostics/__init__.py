"""Is it right? What a fitted program does with its latents, and how far its guide can be trusted."""

from pyro_gen.diagnostics.latents import ActiveUnits, LatentKL, active_units, kl_per_dimension, posterior_means
from pyro_gen.diagnostics.weights import pareto_k

__all__ = ["ActiveUnits", "LatentKL", "active_units", "kl_per_dimension", "pareto_k", "posterior_means"]
