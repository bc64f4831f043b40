"""A complaint about a pair: what is wrong, where, and what to do; and which losses it matters for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyro.infer

from pyro_gen.base import Objective
from pyro_gen.checks import describe

__all__ = ["BOUNDS", "DENSITIES", "LIKELIHOODS", "SCORES", "SMOOTH", "Complaint", "name_of_objective"]

BOUNDS = ("ELBO", "IWAE")
LIKELIHOODS = (*BOUNDS, "MaximumLikelihood")  # these take the program for normalised
SMOOTH = ("ScoreMatching", "SlicedScoreMatching")  # made of second derivatives in x
SCORES = (*SMOOTH, "DenoisingScoreMatching")
DENSITIES = (
    *(*SCORES, "FiniteDifferenceScoreMatching", "ContrastiveDivergence"),
    *("NoiseContrastive", "PseudoLikelihood", "RatioMatching"),
)  # these ask for log f(x) of a row


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong with a model and its guide; its ``str`` is a sentence that says what to do.

    Attributes:
        code: a short name that stays, to select by.
        site: the site or parameter it is about, or None.
        problem: what is wrong.
        remedy: what to do.
        objectives: the names of the objectives for which it matters; empty for all.
        error: what the program raised, where it did.
    """

    code: str
    site: str | None
    problem: str
    remedy: str
    objectives: tuple[str, ...] = ()
    error: Exception | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        whom = f" (matters for {', '.join(f'pg.{name}' for name in self.objectives)})" if self.objectives else ""
        return f"{self.code}: {self.problem}: {self.remedy}{whom}"

    def concerns(self, objective: str | None) -> bool:
        """Whether it matters for an objective of this name; None stands for any."""
        return objective is None or not self.objectives or objective in self.objectives


def name_of_objective(objective: Any) -> str | None:
    """The name under which complaints know an objective, a class or an instance; None for None and for strangers.

    Raises:
        TypeError: for what is no objective.
    """
    if objective is None:
        return None
    cls = objective if isinstance(objective, type) else type(objective)
    if not issubclass(cls, pyro.infer.ELBO):
        raise TypeError(
            f"objective must be an objective such as pg.ELBO(), its class, or None; got {describe(objective)}"
        )
    if not issubclass(cls, Objective):
        return "ELBO"  # one of Pyro's own
    names = [c.__name__ for c in cls.__mro__[: cls.__mro__.index(Objective)]]
    return next((name for name in names if name in (*LIKELIHOODS, *DENSITIES)), None)
