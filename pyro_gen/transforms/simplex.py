r"""The simplex by stick-breaking: D parts that sum to 1, to D − 1 real numbers.

A stick of length 1 loses :math:`x_1`, then :math:`x_2`, …; with the length :math:`r_i = \sum_{j \ge i} x_j` left before
part i is broken off, the fraction taken is :math:`z_i = x_i/r_i \in (0, 1)`, and the logit of each is free:

.. math:: y_i = \log x_i - \log r_{i+1} + \log(D - i), \qquad i = 1, \dots, D - 1.

The last term puts y = 0 at the centre :math:`x_i = 1/D`. As :math:`r_{i+1} = 1 - \sum_{j \le i} x_j`, the Jacobian in
the first D − 1 parts is triangular with diagonal :math:`1/x_i + 1/r_{i+1} = r_i/(x_i r_{i+1})`, whose product
telescopes (:math:`r_1 = 1`, :math:`r_D = x_D`):

.. math:: \log|\det \partial y/\partial(x_1, \dots, x_{D-1})| = -\sum_{i=1}^{D} \log x_i.

So a density is one with respect to the Lebesgue measure of the first D − 1 parts, as that of the Dirichlet
distribution. What is left is summed up from the parts to come, never taken as a difference from 1, so that parts of any
size keep all their digits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_gen.transforms.bijections import Bijection

__all__ = ["StickBreaking"]


class StickBreaking(Bijection):
    r"""Points of the simplex to :math:`\mathbb{R}^{D-1}`, :math:`y_i = \log x_i - \log\sum_{j>i} x_j + \log(D - i)`.

    Volume is that of the first D − 1 parts. A part of 0 counts as the smallest normal number; with a negative part the
    log-determinant is −∞. That the parts sum to 1 is not looked at here: y depends on their ratios alone.

    Args:
        features: number D of parts, at least 2. Vectors y have ``out_features`` = D − 1 entries.

    References:
        M. Betancourt, "Cruising the simplex: Hamiltonian Monte Carlo and the Dirichlet distribution", 2012,
        arXiv:1010.3436, sec. 2.

    Example:
        >>> from pyro_gen.transforms import StickBreaking
        >>> StickBreaking(3).inverse(torch.zeros(2))[0]
        tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(self, features: int) -> None:
        if isinstance(features, int) and features == 1:
            raise ValueError("features must be at least 2: the simplex of one part is a point and has no density")
        super().__init__(features, out_features=max(features - 1, 1))

    def _offset(self, like: Tensor) -> Tensor:
        """log(D − i), in the dtype of the data whatever that of the module."""
        return torch.arange(self.features - 1, 0, -1, dtype=like.dtype, device=like.device).log()

    @property
    def domain(self) -> Any:
        return constraints.simplex

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, None)
        parts = x.clamp(min=torch.finfo(x.dtype).tiny)
        logs = parts.log()
        left = parts.flip(-1).cumsum(-1).flip(-1)
        y = logs[..., :-1] - left[..., 1:].log() + self._offset(x)
        return y, (-logs.sum(-1)).masked_fill((x < 0).any(-1), -math.inf)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, None, features=self.out_features)
        logits = y - self._offset(y)
        left = logsigmoid(-logits).cumsum(-1)  # log r_2, ..., log r_D
        start = torch.zeros_like(left[..., :1])
        logs = torch.cat([torch.cat([start, left[..., :-1]], -1) + logsigmoid(logits), left[..., -1:]], -1)
        return logs.softmax(-1), logs.sum(-1)  # the logs sum to 0 in exp up to rounding, softmax takes that out too
