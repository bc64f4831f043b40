"""Is it right? What is wrong with a pair before it trains, what a fitted program does, how far its guide is trusted."""

from pyro_gen.diagnostics.classifier import c2st
from pyro_gen.diagnostics.complaints import Complaint, check
from pyro_gen.diagnostics.kernels import energy_distance, mmd
from pyro_gen.diagnostics.latents import ActiveUnits, LatentKL, active_units, kl_per_dimension, posterior_means
from pyro_gen.diagnostics.modes import ModeCoverage, mode_coverage
from pyro_gen.diagnostics.transport import sliced_wasserstein, wasserstein
from pyro_gen.diagnostics.two_samples import Discrepancy, Floor, sampling_floor
from pyro_gen.diagnostics.weights import pareto_k

__all__ = [
    "ActiveUnits",
    "Complaint",
    "Discrepancy",
    "Floor",
    "LatentKL",
    "ModeCoverage",
    "active_units",
    "c2st",
    "check",
    "energy_distance",
    "kl_per_dimension",
    "mmd",
    "mode_coverage",
    "pareto_k",
    "posterior_means",
    "sampling_floor",
    "sliced_wasserstein",
    "wasserstein",
]
