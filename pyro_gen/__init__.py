"""pyro_gen: deep generative models as Pyro programs, told apart by how they treat their normalizing constant."""

from pyro_gen import datasets, diagnostics, plots, testing, transforms
from pyro_gen.base import Bounded, Divergence, Evidence, Exact, Implicit, Noised, Unnormalized
from pyro_gen.comparison import compare, to_elpd
from pyro_gen.diagnostics import check
from pyro_gen.evidence import (
    AnnealedImportanceSampling,
    Enumeration,
    ImportanceSampling,
    LowerBound,
    Quadrature,
    log_evidence,
    log_normalizer,
)
from pyro_gen.fitting import FitResult, fit, load, sandwich
from pyro_gen.guides import AmortizedFlow, NeuTra
from pyro_gen.handlers import energy, laplacian, log_density, log_prior, score
from pyro_gen.inference_data import to_inference_data
from pyro_gen.objectives import (
    ELBO,
    IWAE,
    Adversarial,
    AdversarialELBO,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    FiniteDifferenceScoreMatching,
    FlowMatching,
    MaximumLikelihood,
    NoiseContrastive,
    PseudoLikelihood,
    RatioMatching,
    ScoreMatching,
    SlicedScoreMatching,
)
from pyro_gen.programs import EBM, GAN, VAE, Autoregressive, Diffusion, Flow
from pyro_gen.samplers import HMC, MALA, Gibbs, Langevin, ProbabilityFlow, ReverseDiffusion

__version__ = "0.1.0"

__all__ = [
    "EBM",
    "ELBO",
    "GAN",
    "HMC",
    "IWAE",
    "MALA",
    "VAE",
    "Adversarial",
    "AdversarialELBO",
    "AmortizedFlow",
    "AnnealedImportanceSampling",
    "Autoregressive",
    "Bounded",
    "ContrastiveDivergence",
    "DenoisingScoreMatching",
    "Diffusion",
    "Divergence",
    "Enumeration",
    "Evidence",
    "Exact",
    "FiniteDifferenceScoreMatching",
    "FitResult",
    "Flow",
    "FlowMatching",
    "Gibbs",
    "Implicit",
    "ImportanceSampling",
    "Langevin",
    "LowerBound",
    "MaximumLikelihood",
    "NeuTra",
    "NoiseContrastive",
    "Noised",
    "ProbabilityFlow",
    "PseudoLikelihood",
    "Quadrature",
    "RatioMatching",
    "ReverseDiffusion",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Unnormalized",
    "check",
    "compare",
    "datasets",
    "diagnostics",
    "energy",
    "fit",
    "laplacian",
    "load",
    "log_density",
    "log_evidence",
    "log_normalizer",
    "log_prior",
    "plots",
    "sandwich",
    "score",
    "testing",
    "to_elpd",
    "to_inference_data",
    "transforms",
]
