"""Fitting: the one training loop, what goes into it and what comes out."""

from pyro_gen.fitting.loop import COMPILE_FROM, fit
from pyro_gen.fitting.results import FitResult, History, load

__all__ = ["COMPILE_FROM", "FitResult", "History", "fit", "load"]
