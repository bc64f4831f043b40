r"""Mixtures of logistics, for real values and, binned, for whole numbers.

.. math:: p(x) = \sum_m \pi_m\, \frac{\sigma(t_m)\,\sigma(-t_m)}{s_m}, \qquad t_m = \frac{x - \mu_m}{s_m},
          \qquad F(x) = \sum_m \pi_m\, \sigma(t_m) .

The logistic has a distribution function in closed form, so its mass on the bin of a whole number k is a difference of
two sigmoids; the first and the last bin take the tails, and the masses sum to one. A mixture of a few fits what a
pixel or a coordinate looks like given others: skew, two peaks, a spike at an end of the range. Both log-densities are
sums of log-sigmoids under one logsumexp, so no digit is lost far from every component.

Draws pick a component, then invert its distribution function. They are not differentiable in the parameters: which
component is picked is discrete, so ``has_rsample`` is False for the real mixture too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from pyro_gen.distributions.discretized import log_mass

__all__ = ["MixtureOfDiscretizedLogistics", "MixtureOfLogistics"]

_REAL, _POSITIVE = constraints.independent(constraints.real, 1), constraints.independent(constraints.positive, 1)


class MixtureOfLogistics(TorchDistribution):
    """Real value from one of several logistic distributions.

    Args:
        logits: of the components, ``(*batch, components)``, up to a constant.
        loc: centres; scale: positive; both of the shape of ``logits``, or broadcast to it.

    Example:
        >>> d = MixtureOfLogistics(torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.ones(2))
        >>> d.mean, d.cdf(torch.tensor(0.0))
        (tensor(0.), tensor(0.5000))
    """

    arg_constraints = {"logits": _REAL, "loc": _REAL, "scale": _POSITIVE}  # noqa: RUF012
    support: Any = constraints.real
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        if 0 in (logits.dim(), loc.dim(), scale.dim()):
            raise ValueError("logits, loc and scale need a last dimension that counts the components")
        self.logits, self.loc, self.scale = broadcast_all(logits, loc, scale)
        super().__init__(self.logits.shape[:-1], torch.Size(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        shape = torch.Size((*batch_shape, self.logits.shape[-1]))
        new.logits, new.loc, new.scale = (t.expand(shape) for t in (self.logits, self.loc, self.scale))
        super(MixtureOfLogistics, new).__init__(torch.Size(batch_shape), torch.Size(), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return torch.logsumexp(self.logits.log_softmax(-1) + self._log_parts(value.unsqueeze(-1)), -1)

    def _log_parts(self, value: Tensor) -> Tensor:
        t = (value - self.loc) / self.scale
        return logsigmoid(t) + logsigmoid(-t) - self.scale.log()

    def cdf(self, value: Tensor) -> Tensor:
        """P(X ≤ value)."""
        if self._validate_args:
            self._validate_sample(value)
        return self._below(value)

    def _below(self, value: Tensor) -> Tensor:
        return (self.logits.softmax(-1) * torch.sigmoid((value.unsqueeze(-1) - self.loc) / self.scale)).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        picked = Categorical(logits=self.logits, validate_args=False).sample(sample_shape).unsqueeze(-1)
        loc, scale = (t.expand(*shape, t.shape[-1]).gather(-1, picked).squeeze(-1) for t in (self.loc, self.scale))
        u = torch.rand(shape, dtype=loc.dtype, device=loc.device)
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)  # both ends would be infinite
        return loc + scale * torch.logit(u)

    @property
    def mean(self) -> Tensor:
        return (self.logits.softmax(-1) * self.loc).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Σₘ πₘ (sₘ² π²/3 + (μₘ − mean)²)."""
        parts = self.scale.square() * (math.pi**2 / 3) + (self.loc - self.mean.unsqueeze(-1)).square()
        return (self.logits.softmax(-1) * parts).sum(-1)


class MixtureOfDiscretizedLogistics(MixtureOfLogistics):
    """Whole number 0 … levels − 1 from one of several logistic distributions, rounded.

    Args:
        logits: of the components, ``(*batch, components)``, up to a constant.
        loc: centres, in levels; scale: positive, in levels; both of the shape of ``logits``, or broadcast to it.
        levels: number of levels, at least 2.

    References:
        T. Salimans et al., "PixelCNN++", 2017, arXiv:1701.05517, eq. 2.

    Example:
        >>> d = MixtureOfDiscretizedLogistics(torch.zeros(2), torch.tensor([0.0, 3.0]), torch.ones(2), levels=5)
        >>> d.log_prob(torch.arange(5.0)).exp().sum().round(decimals=5)
        tensor(1.)
    """

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None
    ) -> None:
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels must be an int of at least 2, got {levels!r}")
        self.levels = levels
        super().__init__(logits, loc, scale, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        new.levels = self.levels
        return new

    def _log_parts(self, value: Tensor) -> Tensor:
        return log_mass(value, self.loc, self.scale, self.levels)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X ≤ value)."""
        if self._validate_args:
            self._validate_sample(value)
        inside = self._below(value + 0.5)
        return torch.where(value >= self.levels - 1, torch.ones_like(inside), inside)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return super().sample(sample_shape).round().clamp(0, self.levels - 1)

    def _tails(self) -> tuple[Tensor, Tensor]:
        """k = 1 … levels − 1 and P(X ≥ k)."""
        k = torch.arange(1, self.levels, dtype=self.loc.dtype, device=self.loc.device)
        above = torch.sigmoid((self.loc.unsqueeze(-2) - k.unsqueeze(-1) + 0.5) / self.scale.unsqueeze(-2))
        return k, (self.logits.softmax(-1).unsqueeze(-2) * above).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Σₖ P(X ≥ k), over k = 1 … levels − 1."""
        return self._tails()[1].sum(-1)

    @property
    def variance(self) -> Tensor:
        """E[X²] − E[X]², with E[X²] = Σₖ (2k − 1) P(X ≥ k)."""
        k, tail = self._tails()
        return (tail * (2 * k - 1)).sum(-1) - tail.sum(-1).square()
