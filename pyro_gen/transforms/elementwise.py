r"""Elementwise maps: monotone functions of one number, with their parameters as an argument.

Coupling and autoregressive layers differ in where the parameters of :math:`y_i = \tau(x_i; \phi_i)` come from, not in
:math:`\tau`. So :math:`\tau` is an object of its own, without weights, which any layer may take:

- ``params``: numbers in :math:`\phi`;
- ``forward(x, params)``: y and :math:`\log|\partial y/\partial x|`; ``inverse(y, params)`` likewise, elementwise;
- ``embed(x)``: what a network that conditions on x is shown, ``embedding`` numbers a feature.

At ``params = 0`` each map is the identity, so a layer whose network starts with small outputs starts near it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_gen.checks import describe
from pyro_gen.transforms.bijections import Bijection

__all__ = ["Elementwise", "ElementwiseMap"]


class ElementwiseMap:
    r"""A monotone map :math:`\tau(\cdot\,; \phi)` of numbers onto numbers, the identity at :math:`\phi = 0`.

    Shapes: x and y are ``(...)``, ``params`` ``(..., params)``; leading dimensions broadcast, and the
    log-derivative has their shape.
    """

    params: int  #: how many parameters a feature has
    embedding: int = 1  #: how many numbers `embed` gives a feature

    @property
    def support(self) -> Any:
        """Constraint on x, and on y."""
        return constraints.real

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|dy/dx|."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|dx/dy|."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def embed(self, x: Tensor) -> Tensor:
        """``(..., embedding)``: x as a network sees it, continuous on the support."""
        return x.unsqueeze(-1)


def check_map(transformer: Any) -> ElementwiseMap:
    """The argument, or a ``TypeError`` that names what is expected."""
    if not isinstance(transformer, ElementwiseMap):
        raise TypeError(
            f"transformer must be an elementwise map such as Affine() or Spline(), got {describe(transformer)}"
        )
    return transformer


class Mapped(Bijection):
    """A bijection whose features go through an elementwise map, on whose support it stands.

    Args:
        transformer: the elementwise map.
        features: size of the vectors.
        context_features: size of the context, 0 for none.
    """

    def __init__(self, transformer: ElementwiseMap, features: int, context_features: int = 0) -> None:
        super().__init__(features, context_features)
        self.transformer = check_map(transformer)

    @property
    def domain(self) -> Any:
        return constraints.independent(self.transformer.support, 1)

    @property
    def codomain(self) -> Any:
        return self.domain


class Elementwise(Mapped):
    r"""Each feature mapped by itself, :math:`y_i = \tau(x_i; \phi_i)` with the :math:`\phi_i` as weights.

    Args:
        transformer: the elementwise map.
        features: size of the vectors.

    Example:
        >>> from pyro_gen.transforms import Elementwise, Spline
        >>> y, ladj = Elementwise(Spline(), 2)(torch.tensor([0.5, -1.0]))
        >>> bool((y - torch.tensor([0.5, -1.0])).abs().max() < 1e-2)
        True
    """

    def __init__(self, transformer: ElementwiseMap, features: int) -> None:
        super().__init__(transformer, features)
        self.params = nn.Parameter(torch.zeros(features, transformer.params))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, context)
        y, ladj = self.transformer.forward(x, self.params)
        return y, ladj.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, context)
        x, ladj = self.transformer.inverse(y, self.params)
        return x, ladj.sum(-1)
