"""Objectives: one principle a file, its derivation first."""

from pyro_gen.objectives.elbo import ELBO
from pyro_gen.objectives.importance_weighted import IWAE
from pyro_gen.objectives.likelihood import MaximumLikelihood

__all__ = ["ELBO", "IWAE", "MaximumLikelihood"]
