"""An interval onto another by a straight line: what a flow on a box starts with."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from pyro_gen.checks import describe
from pyro_gen.transforms.bijections import Bijection

__all__ = ["Rescale"]


class Rescale(Bijection):
    r""":math:`y = b\,(2x - l - h)/(h - l)`, the interval [l, h] onto [−b, b], every feature alike.

    Args:
        features: size D of the vectors.
        low, high: ends l < h of the interval of x.
        bound: b, half side of the box of y.

    Example:
        >>> import torch
        >>> Rescale(2, 0.0, 10.0, bound=1.0)(torch.tensor([0.0, 7.5]))[0]
        tensor([-1.0000,  0.5000])
    """

    def __init__(self, features: int, low: float, high: float, bound: float = 1.0) -> None:
        super().__init__(features)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"low and high must be finite with low < high, got {describe(low)} and {describe(high)}")
        self.low, self.high, self.bound = float(low), float(high), float(bound)
        self.slope = 2 * self.bound / (self.high - self.low)

    @property
    def domain(self) -> Any:
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    @property
    def codomain(self) -> Any:
        return constraints.independent(constraints.interval(-self.bound, self.bound), 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, None)
        y = ((x - self.low) * self.slope - self.bound).clamp(-self.bound, self.bound)
        return y, x.new_full(x.shape[:-1], self.features * math.log(self.slope))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, None)
        x = ((y + self.bound) / self.slope + self.low).clamp(self.low, self.high)
        return x, y.new_full(y.shape[:-1], -self.features * math.log(self.slope))
