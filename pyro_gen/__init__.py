"""pyro_gen: deep generative models as Pyro programs, told apart by how they treat their normalizing constant."""

from pyro_gen import datasets, diagnostics, plots, testing, transforms
from pyro_gen.base import Bounded, Divergence, Evidence, Exact, Implicit, Unnormalized
from pyro_gen.comparison import compare, to_elpd
from pyro_gen.evidence import ImportanceSampling, log_evidence
from pyro_gen.fitting import FitResult, fit, load
from pyro_gen.guides import AmortizedFlow, NeuTra
from pyro_gen.handlers import log_density, log_prior, score
from pyro_gen.inference_data import to_inference_data
from pyro_gen.objectives import ELBO, IWAE, MaximumLikelihood
from pyro_gen.programs import VAE, Autoregressive, Flow

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "VAE",
    "AmortizedFlow",
    "Autoregressive",
    "Bounded",
    "Divergence",
    "Evidence",
    "Exact",
    "FitResult",
    "Flow",
    "Implicit",
    "ImportanceSampling",
    "MaximumLikelihood",
    "NeuTra",
    "Unnormalized",
    "compare",
    "datasets",
    "diagnostics",
    "fit",
    "load",
    "log_density",
    "log_evidence",
    "log_prior",
    "plots",
    "score",
    "testing",
    "to_elpd",
    "to_inference_data",
    "transforms",
]
