r"""Base measures: what stands under an energy, :math:`f(x) = b(x)\,e^{-E(x)}`, and where its chains start.

A normalised b *tilts*: f is proper whenever E is bounded below. A flat b is the Lebesgue (or counting) measure of the
support, :math:`f = e^{-E}`, and nothing but E keeps f integrable. Pyro has ``ImproperUniform`` for the flat case, which
cannot be sampled, so that NUTS cannot start from it; a proper distribution under a mask has log-density 0 wherever it
is asked and can be sampled. `flat` makes one for a support.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_gen.checks import describe

__all__ = ["BaseMeasure", "flat", "support_named"]


def support_named(support: Any) -> Any:
    """The constraint of one number behind ``support=``.

    Args:
        support: ``"real"``, ``"positive"``, ``"unit"``, ``"binary"``, or a pair ``(low, high)`` of finite numbers.
    """
    named = {
        "real": constraints.real,
        "positive": constraints.positive,
        "unit": constraints.unit_interval,
        "binary": constraints.boolean,
    }
    if isinstance(support, str) and support in named:
        return named[support]
    if isinstance(support, (tuple, list)) and len(support) == 2:
        low, high = (float(end) for end in support)
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return constraints.interval(low, high)
    raise ValueError(
        f"support must be 'real', 'positive', 'unit', 'binary' or a pair (low, high) of finite numbers, got "
        f"{describe(support)}"
    )


def proper(support: Any, like: Tensor) -> Any:
    """A proper distribution on the support of one number, for each entry of ``like``."""
    zero, one = torch.zeros_like(like), torch.ones_like(like)
    if isinstance(support, type(constraints.real)):  # not by identity: a copied or loaded program has copies of them
        return dist.Normal(zero, one)
    if isinstance(support, type(constraints.positive)):
        return dist.Exponential(one)
    if isinstance(support, type(constraints.boolean)):
        return dist.Bernoulli(one / 2)
    return dist.Uniform(zero + support.lower_bound, zero + support.upper_bound)


def flat(support: Any, like: Tensor) -> Any:
    """The flat measure on a support: log-density 0, drawn from a proper distribution there.

    Args:
        support: constraint of one number; like: a tensor of the event's shape.
    """
    return proper(support, like).to_event(like.dim()).mask(False)


class BaseMeasure(nn.Module):
    """The base of an energy as a module; ``forward()`` gives the distribution for one datum.

    Args:
        name: ``"normal"``, ``"uniform"`` (a box), ``"bernoulli"`` (fair coins), or None (flat).
        shape: event shape.
        support: constraint of one number, of a flat base.

    ``normal`` and ``uniform`` take their place from training data (:meth:`place`): mean and standard deviation; the box
    of the data, a tenth of their range wider on each side. Until then they are N(0, 1) and [−1, 1].
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, name: str | None, shape: torch.Size, support: Any = constraints.real) -> None:
        super().__init__()
        self.name, self.support = name, support
        self.register_buffer("loc", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    @torch.no_grad()
    def place(self, x: Tensor) -> None:
        """Take location and scale from rows of data, ``(rows, *shape)``."""
        if self.name == "normal":
            loc, scale = x.mean(0), x.std(0, unbiased=False)
        elif self.name == "uniform":
            low, high = x.amin(0), x.amax(0)
            loc, scale = (low + high) / 2, 0.6 * (high - low)
        else:
            return
        self.loc.copy_(loc)
        self.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))

    def forward(self) -> Any:
        events = self.loc.dim()
        if self.name == "normal":
            return dist.Normal(self.loc, self.scale).to_event(events)
        if self.name == "uniform":
            return dist.Uniform(self.loc - self.scale, self.loc + self.scale).to_event(events)
        if self.name == "bernoulli":
            return dist.Bernoulli(torch.full_like(self.loc, 0.5)).to_event(events)
        return flat(self.support, self.loc)
