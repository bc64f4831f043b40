r"""The variational bound as an answer: what a program says of itself, averaged over draws, row by row.

A `Bounded` program has a lower bound of each row, :math:`\mathcal L(x) = E_q[\log p(x, z) - \log q(z \mid x)] \le \log
p(x)`, as the mean of a random one. Its mean over M calls of ``program.lower_bound`` is

.. math:: \hat{\mathcal L}(x) = \frac1M \sum_{m=1}^M L_m(x), \qquad
          \mathrm{s.e.} = \mathrm{sd}(L_1, \dots, L_M) / \sqrt M ,

unbiased for the bound whatever the tails of the weights: no exponential is averaged, so that no k̂ is needed, and more
draws make the error smaller and not the bound tighter. For a diffusion this is the sum over all levels of noise with
each KL in closed form, which importance weights of single paths cannot have in any reasonable number.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Evidence, Exact, Program
from pyro_gen.checks import check_count
from pyro_gen.evidence.methods import exact_evidence, require_bounded

__all__ = ["LowerBound"]

ROWS = 1024  # at a time


@dataclass(frozen=True)
class LowerBound:
    r"""Evidence by the program's own variational bound, :math:`E_q[\log p(x, z) - \log q(z \mid x)] \le \log p(x)`.

    For programs of kind `Bounded`; of a diffusion it is the sum over all levels of noise. The result is a ``"lower
    bound"`` with the standard error of its mean over draws. Exact programs have no gap: their ``log_prob`` is the
    answer. Networks run in evaluation mode.

    Args:
        draws: M, calls of ``lower_bound``, two at least, as one says nothing of its error.
        seed: makes the result repeatable and leaves the global generators as they were.

    Raises:
        ValueError: for fewer than two draws.

    References:
        D. P. Kingma, T. Salimans, B. Poole, J. Ho, "Variational diffusion models", 2021, arXiv:2107.00630, eq. 11.

    Example:
        >>> from pyro_gen.programs import Diffusion
        >>> diffusion = Diffusion(2, timesteps=5, hidden=(8,), standardise=False)
        >>> LowerBound(4, seed=0).log_evidence(diffusion, torch.zeros(3, 2)).kind
        'lower bound'
    """

    likelihood_kind: ClassVar[str] = "elbo"

    draws: int = 8
    seed: int | None = None

    def __post_init__(self) -> None:
        if check_count(self.draws, "draws") < 2:
            raise ValueError("draws=1 says nothing of its error: take 2 or more, LowerBound(8)")

    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence:
        """The bound of each row; see :func:`pyro_gen.log_evidence`."""
        if isinstance(program, Exact):
            return exact_evidence(program, x, context)
        bounded = require_bounded(program, type(self).__name__)
        batch = bounded.check(x, context)
        with ExitStack() as stack:
            for entered in (torch.no_grad(), poutine.block(), scopes.evaluation_mode(bounded)):
                stack.enter_context(entered)
            if self.seed is not None:
                stack.enter_context(scopes.forked_generators(self.seed))
            parts = [
                torch.stack([bounded.lower_bound(*rows).to("cpu", torch.float64) for _ in range(self.draws)])
                for rows in zip(*(part.split(ROWS) for part in batch), strict=True)
            ]
        bounds = torch.cat(parts, 1)
        return Evidence(bounds.mean(0), "lower bound", bounds.std(0) / self.draws**0.5)
