r"""Scores of a marginal density :math:`f(x) = \int f(x, z)\, dz`: Fisher's identity, with weighted draws of a guide.

Differentiating under the integral (Fisher's identity), with :math:`g = \nabla_x \log f(x, z)`,

.. math:: \nabla \log f(x) = E_{z \mid x}[g], \qquad
          \partial_i^2 \log f(x) = E_{z \mid x}[\partial_i^2 \log f(x, z) + g_i^2] - E_{z \mid x}[g_i]^2 ,

expectations over the posterior of z. It is known up to a constant, so they are means over draws of the guide,
:math:`z_k \sim q(z \mid x)`, under normalised weights :math:`w = \mathrm{softmax}_k(\log f(x, z_k) - \log q(z_k \mid
x))`. The draws are held fixed: neither x nor the model's weights move them, but the gradient in the weights goes
through w as well, as the posterior depends on them.

The square of a weighted mean is too large by the variance of that mean. Left out are the pairs of a draw with itself,

.. math:: \widehat{(E g_i)^2} = \frac{\sum_{k \ne l} w_k w_l\, g_{ik}\, g_{il}}{\sum_{k \ne l} w_k w_l} ,

unbiased for draws of the posterior itself. What is left is the bias of normalised weights, of order 1/K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen import handlers
from pyro_gen.checks import check_count
from pyro_gen.handlers import Structure
from pyro_gen.handlers.marginal import marginal_rows
from pyro_gen.objectives.data_sites import Repeated
from pyro_gen.objectives.elbo import with_score_function
from pyro_gen.objectives.importance_weighted import still

__all__ = ["Draws", "draw", "guide_loss", "joint", "posterior_score", "repeat", "square_of_mean"]


class Draws(NamedTuple):
    """Draws of a guide for each row, one after another: K copies of all rows.

    Attributes:
        copies: K.
        batch: the batch, each part K times over, ``(K · rows, ...)``.
        values: of each latent site, attached to the guide.
        log_guide: log q(z_k | x), ``(K · rows,)``, attached to the guide.
        trace: of the guide.
    """

    copies: int
    batch: tuple[Any, ...]
    values: dict[str, Tensor]
    log_guide: Tensor
    trace: Any


def repeat(part: Any, times: int, rows: int) -> Any:
    """What belongs to rows so many times over, one copy after another; anything else as it is."""
    if isinstance(part, Tensor) and part.dim() and part.shape[0] == rows:
        return part.repeat(times, *[1] * (part.dim() - 1))
    return part


def draw(guide: Callable[..., Any], shape: Structure, batch: tuple[Any, ...], particles: int, **kwargs: Any) -> Draws:
    """Draw z from the guide, ``particles`` times for each row."""
    rows = len(batch[0])
    copies = tuple(repeat(part, particles, rows) for part in batch)
    with Repeated(shape.data_plate, particles):
        trace = poutine.trace(guide).get_trace(*copies, **kwargs)
    sites = handlers.sample_sites(trace)
    values = {n: sites[n]["value"] for n in shape.guide_latents}
    log_guide = handlers.row_total(sites, shape.require_data_plate("a guide's draws"))
    return Draws(particles, copies, values, log_guide, trace)


def joint(
    model: Callable[..., Any], shape: Structure, drawn: Draws, *, detached: bool = True, **kwargs: Any
) -> Callable[[Tensor], Tensor]:
    """log f(x, z) of each copy of a row, ``(K · rows,)``, as a function of x; z as drawn, discrete latents summed."""
    values = {n: v.detach() if detached else v for n, v in drawn.values.items()}
    conditioned = poutine.condition(model, data=values)
    left = any(name not in values for name in shape.model_latents)

    def log_density(x: Tensor) -> Tensor:
        with Repeated(shape.data_plate, drawn.copies):
            if left:
                nesting = shape.plate_nesting
                return marginal_rows(conditioned, x, *drawn.batch[1:], plate_nesting=nesting, **kwargs)
            return handlers.marginal_rows(conditioned, x, *drawn.batch[1:], **kwargs)

    return log_density


def square_of_mean(log_w: Tensor, g: Tensor) -> Tensor:
    r"""Estimate of :math:`\sum_i (E g_i)^2` from weighted draws, pairs of a draw with itself left out.

    Sums are arranged around the largest weight, so that nothing cancels where it is all but one.

    Args:
        log_w: log weights, ``(K, rows)``, K of at least 2. g: ``(K, rows, features)``.
    """
    top = log_w.detach().argmax(0, keepdim=True)
    is_top = torch.zeros_like(log_w, dtype=torch.bool).scatter(0, top, True)
    w = log_w.softmax(0)
    largest = w.gather(0, top)[0]
    others = log_w.masked_fill(is_top, -torch.inf)
    v = others.softmax(0)  # weights of the others among themselves
    rest = (others.logsumexp(0) - log_w.logsumexp(0)).exp()
    best = g.gather(0, top.unsqueeze(-1).expand(1, *g.shape[1:]))[0]
    mean = (v.unsqueeze(-1) * g).sum(0)
    own = (v.square().unsqueeze(-1) * g.square()).sum((0, 2))
    pairs = 2 * largest * (best * mean).sum(-1) + rest * (mean.square().sum(-1) - own)
    return pairs / (2 * largest + rest * (1 - v.square().sum(0)))


def guide_loss(model: Callable[..., Any], shape: Structure, drawn: Draws, **kwargs: Any) -> Tensor:
    """−ELBO of each row with the model's weights held fixed: its gradient reaches the guide only."""
    log_joint = joint(still(model), shape, drawn, detached=False, **kwargs)(drawn.batch[0].detach())
    weight = log_joint - drawn.log_guide
    return -with_score_function(weight, weight, drawn.trace, shape).reshape(drawn.copies, -1).mean(0)


def posterior_score(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *batch: Any,
    particles: int = 16,
    shape: Structure | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Score of the marginal density by Fisher's identity: :math:`\nabla_x \log f(x) = E_{z \mid x}[\nabla_x \log f(x, z)]`.

    Posterior means are over weighted draws of the guide; Z has dropped out, as in any score.

    Args:
        model, guide: a Pyro pair called as ``model(*batch)``, ``guide(*batch)``; its latents stand inside the plate
            over rows.
        batch: ``x`` of shape ``(rows, ...)`` and what else the pair takes.
        particles: draws K of the guide a row; the bias is of order 1/K, and none where the guide is the posterior.
        shape: the pair's ``Structure``, where it is known; saves one run.

    Returns:
        Tensor of the shape of x, differentiable in the model's weights; the guide gets no gradient.

    Raises:
        ValueError: if the sites of model and guide do not match, or latents stand outside the plate over rows.

    References:
        F. Bao et al., "Bi-level score matching for learning energy-based latent variable models", 2020,
        arXiv:2010.07856.
    """  # noqa: E501
    check_count(particles, "particles")
    if shape is None:
        with torch.no_grad():
            shape, _ = handlers.structure(model, guide, *batch, **kwargs)
    handlers.check_pair(shape, summed_out=True)
    handlers.require_local(shape, "posterior_score")
    x, rows = batch[0], len(batch[0])
    with torch.no_grad():
        drawn = draw(guide, shape, batch, particles, **kwargs)
    log_joint = joint(model, shape, drawn, **kwargs)

    def total(y: Tensor) -> Tensor:
        log_w = log_joint(repeat(y, particles, rows)) - drawn.log_guide
        return log_w.reshape(particles, rows).logsumexp(0).sum()

    recorded = torch.is_grad_enabled()
    result: Tensor = torch.func.grad(total)(x.detach())
    return result if recorded else result.detach()
