"""Which noise for denoising score matching? Programs trained under several σ, compared on clean rows held out.

The denoising loss has another least value at each σ, so it does not rank them. A criterion of the clean data does, as
its unknown constant has no σ in it: exact score matching, or the likelihood of a normalised program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Objective, Unnormalized
from pyro_gen.checks import describe
from pyro_gen.objectives.denoising import DenoisingScoreMatching, positive

__all__ = ["SigmaChoice", "choose_sigma"]


class SigmaChoice(NamedTuple):
    """What `choose_sigma` found.

    Attributes:
        sigma: of the least criterion.
        sigmas: all that were tried.
        values: mean of the criterion over the held-out rows, for each.
        differences: how far each is above the least.
        standard_errors: of those differences, paired row by row.
    """

    sigma: float
    sigmas: tuple[float, ...]
    values: tuple[float, ...]
    differences: tuple[float, ...]
    standard_errors: tuple[float, ...]


def choose_sigma(
    train: Callable[[float], Unnormalized], held_out: Tensor, sigmas: Sequence[float], criterion: Objective[Any]
) -> SigmaChoice:
    r"""Choose the noise of denoising score matching by what its programs say of clean rows held out.

    Denoising losses at different σ have different least values, so they do not rank σ. A loss of the clean data does:
    exact score matching is :math:`\frac12 E|s_\theta - \nabla \log p_{data}|^2` plus a constant of the data alone, the
    negative log-likelihood of a normalised program is its KL plus another. Small σ has less bias, large σ less variance
    (and a bridge between modes, which score matching on clean data cannot see): the criterion weighs the first two.

    Args:
        train: from σ to a trained program, on rows other than ``held_out``.
        held_out: clean rows, ``(rows, *event_shape)``, two at least.
        sigmas: the values to try.
        criterion: a loss that is a sum over rows and not random: ``pg.ScoreMatching()``, or ``pg.MaximumLikelihood()``
            for programs of kind `Exact`.

    Returns:
        SigmaChoice: the best σ, and how clearly it is the best.

    Raises:
        ValueError: for no or bad ``sigmas``, a random criterion, too few rows, or a criterion that is not finite.

    Example:
        >>> import torch, pyro_gen as pg
        >>> def train(sigma):
        ...     flow = pg.Flow(1, "linear")
        ...     _ = pg.fit(DenoisingScoreMatching(sigma)(flow), x[:400], steps=200, lr=0.05, seed=0, progress=False)
        ...     return flow
        >>> x = torch.randn(800, 1, generator=torch.Generator().manual_seed(0))
        >>> choose_sigma(train, x[400:], (0.3, 3.0), pg.MaximumLikelihood()).sigma
        0.3
    """
    tried = tuple(positive(value, "sigmas") for value in sigmas)
    if not tried:
        raise ValueError("sigmas is empty: give the values to try")
    if not isinstance(criterion, Objective) or isinstance(criterion, DenoisingScoreMatching):
        raise TypeError(
            "criterion must be a loss of clean rows, pg.ScoreMatching() or pg.MaximumLikelihood(): the denoising loss "
            f"has another least value at each σ; got {describe(criterion)}"
        )
    if not criterion.deterministic:
        raise ValueError(f"criterion must not be random, and {criterion!r} is: its noise would do the choosing")
    if len(held_out) < 2:
        raise ValueError(f"held_out must have two rows at least, for a standard error; got {len(held_out)}")
    found = []
    for sigma in tried:
        program = train(sigma)
        module = criterion(program)
        with torch.no_grad(), scopes.evaluation_mode(program):
            rows = module.pointwise(*program.check(held_out)).double()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the criterion is not finite on a held-out row at sigma={sigma}: look at that program")
        found.append(rows)
    best = min(range(len(tried)), key=lambda i: float(found[i].mean()))
    apart = [rows - found[best] for rows in found]
    return SigmaChoice(
        tried[best],
        tried,
        tuple(float(rows.mean()) for rows in found),
        tuple(float(gap.mean()) for gap in apart),
        tuple(float(gap.std()) / math.sqrt(len(held_out)) for gap in apart),
    )
