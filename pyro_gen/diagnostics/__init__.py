"""Is it right? What is wrong with a pair before it trains, what a fitted program does, how far its guide is trusted."""

from pyro_gen.diagnostics.complaints import Complaint, check
from pyro_gen.diagnostics.latents import ActiveUnits, LatentKL, active_units, kl_per_dimension, posterior_means
from pyro_gen.diagnostics.weights import pareto_k

__all__ = [
    "ActiveUnits",
    "Complaint",
    "LatentKL",
    "active_units",
    "check",
    "kl_per_dimension",
    "pareto_k",
    "posterior_means",
]
