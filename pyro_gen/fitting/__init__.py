"""Fitting: the one training loop, what goes into it and what comes out."""

from pyro_gen.fitting.loop import fit
from pyro_gen.fitting.results import FitResult, History, load
from pyro_gen.fitting.run import COMPILE_FROM
from pyro_gen.fitting.sandwich import StandardErrors, sandwich

__all__ = ["COMPILE_FROM", "FitResult", "History", "StandardErrors", "fit", "load", "sandwich"]
