r"""A logistic distribution binned to whole numbers, for data with integer levels such as pixels.

With :math:`F(t) = \sigma((t - \mu)/s)` the mass of level k is :math:`F(k + \tfrac12) - F(k - \tfrac12)`, the first and
last level taking the tails, so the masses sum to one. With :math:`a = (k + \frac12 - \mu)/s` and
:math:`b = (k - \frac12 - \mu)/s`

.. math:: \log[\sigma(a) - \sigma(b)] = \log\sigma(a) + \log\sigma(-b) + \log(1 - e^{-1/s}),

which loses no digit far from :math:`\mu`, where the difference of two sigmoids is zero in floating point.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

__all__ = ["DiscretizedLogistic", "log_mass"]


def log_mass(value: Tensor, loc: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Log mass of a level under Logistic(loc, scale) rounded to 0 … levels − 1; all four broadcast."""
    above, below = (value + 0.5 - loc) / scale, (value - 0.5 - loc) / scale
    first, last = value <= 0, value >= levels - 1
    left = torch.where(last, torch.zeros_like(above), logsigmoid(above))
    right = torch.where(first, torch.zeros_like(below), logsigmoid(-below))
    width = torch.where(first | last, torch.zeros_like(above), torch.log(-torch.expm1(-1 / scale)))
    return left + right + width


class DiscretizedLogistic(TorchDistribution):
    """Logistic(loc, scale) rounded to the levels 0 … levels − 1.

    Args:
        loc: centre, in levels; scale: positive, in levels; both broadcast to the batch shape.
        levels: number of levels, at least 2.

    References:
        T. Salimans et al., "PixelCNN++", 2017, arXiv:1701.05517, eq. 2.

    Example:
        >>> d = DiscretizedLogistic(torch.tensor(2.0), torch.tensor(1.0), levels=5)
        >>> d.log_prob(torch.arange(5.0)).exp().sum().round(decimals=5)
        tensor(1.)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels must be an int of at least 2, got {levels!r}")
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, torch.Size(), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogistic:
        new: DiscretizedLogistic = self._get_checked_instance(DiscretizedLogistic, _instance)
        new.loc, new.scale, new.levels = self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels
        super(DiscretizedLogistic, new).__init__(torch.Size(batch_shape), torch.Size(), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return log_mass(value, self.loc, self.scale, self.levels)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
        return (self.loc + self.scale * torch.logit(u)).round().clamp(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """Σₖ P(X ≥ k), over k = 1 … levels − 1."""
        k = torch.arange(1, self.levels, dtype=self.loc.dtype, device=self.loc.device)
        return torch.sigmoid((self.loc[..., None] - k + 0.5) / self.scale[..., None]).sum(-1)

    @property
    def variance(self) -> Tensor:
        """E[X²] − E[X]², with E[X²] = Σₖ (2k − 1) P(X ≥ k)."""
        k = torch.arange(1, self.levels, dtype=self.loc.dtype, device=self.loc.device)
        tail = torch.sigmoid((self.loc[..., None] - k + 0.5) / self.scale[..., None])
        return (tail * (2 * k - 1)).sum(-1) - self.mean.square()
