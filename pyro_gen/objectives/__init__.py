"""Objectives: one principle a file, its derivation first."""

from pyro_gen.objectives.adversarial import Adversarial
from pyro_gen.objectives.adversarial_bayes import AdversarialELBO
from pyro_gen.objectives.contrastive import ContrastiveDivergence
from pyro_gen.objectives.denoising import DenoisingScoreMatching
from pyro_gen.objectives.elbo import ELBO
from pyro_gen.objectives.flow_matching import FlowMatching
from pyro_gen.objectives.importance_weighted import IWAE
from pyro_gen.objectives.likelihood import MaximumLikelihood
from pyro_gen.objectives.noise_contrastive import NoiseContrastive
from pyro_gen.objectives.pseudo_likelihood import PseudoLikelihood, RatioMatching
from pyro_gen.objectives.score_matching import ScoreMatching
from pyro_gen.objectives.sliced_score_matching import FiniteDifferenceScoreMatching, SlicedScoreMatching

__all__ = [
    "ELBO",
    "IWAE",
    "Adversarial",
    "AdversarialELBO",
    "ContrastiveDivergence",
    "DenoisingScoreMatching",
    "FiniteDifferenceScoreMatching",
    "FlowMatching",
    "MaximumLikelihood",
    "NoiseContrastive",
    "PseudoLikelihood",
    "RatioMatching",
    "ScoreMatching",
    "SlicedScoreMatching",
]
