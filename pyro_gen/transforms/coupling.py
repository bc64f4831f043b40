r"""Coupling layers: one half of the features mapped with parameters read off the other half.

.. math:: y_A = x_A, \qquad y_B = \tau(x_B; \phi(x_A, c)), \qquad
          \log|\det \partial y/\partial x| = \sum_{i \in B} \log|\tau'(x_i; \phi_i)|.

As :math:`x_A` passes unchanged, the inverse has the same parameters at hand and costs the same, one pass each way. In
turn the first and the second half (``swap``) are mapped, so that two layers reach all features. The elementwise map
names the family: ``Shift`` NICE, ``Affine`` RealNVP, ``Spline`` NSF (coupling).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_gen.nn.mlp import MLP
from pyro_gen.transforms.elementwise import ElementwiseMap, Mapped

__all__ = ["Coupling"]


class Coupling(Mapped):
    r"""Coupling layer by halves over any elementwise map.

    Args:
        transformer: the elementwise map.
        features: size D of the vectors, at least 2.
        hidden: sizes of the hidden layers of the network.
        context_features: size of the context, 0 for none.
        activation: class of the activation between the network's layers.
        swap: map the first half given the second; by default the second (the larger where D is odd) given the first.

    References:
        L. Dinh et al., "Density estimation using Real NVP", 2017, arXiv:1605.08803, eqs. 4–8; C. Durkan et al.,
        "Neural spline flows", 2019, arXiv:1906.04032, sec. 3.

    Example:
        >>> from pyro_gen.transforms import Compose, Coupling, Spline
        >>> f = Compose([Coupling(Spline(), 3, (16,), swap=bool(i % 2)) for i in range(4)]).double()
        >>> x = torch.randn(5, 3, dtype=torch.double)
        >>> torch.allclose(f.inverse(f(x)[0])[0], x)
        True
    """

    def __init__(
        self,
        transformer: ElementwiseMap,
        features: int,
        hidden: Sequence[int] = (128, 128),
        context_features: int = 0,
        *,
        activation: type[nn.Module] = nn.SiLU,
        swap: bool = False,
    ) -> None:
        super().__init__(transformer, features, context_features)
        if features < 2:
            raise ValueError(
                f"features must be at least 2, as one half is mapped given the other, got {features}: for a single "
                "feature use MaskedAutoregressive, or Elementwise without a context"
            )
        self.swap = swap
        self.split = features // 2
        given, mapped = (features - self.split, self.split) if swap else (self.split, features - self.split)
        outputs = mapped * transformer.params
        inputs = given * transformer.embedding
        self.net = MLP(inputs, outputs, hidden, context_features=context_features, activation=activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given, mapped, params = self._read(x, context)
        mapped, ladj = self.transformer.forward(mapped, params)
        return self._join(given, mapped), ladj.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given, mapped, params = self._read(y, context)
        mapped, ladj = self.transformer.inverse(mapped, params)
        return self._join(given, mapped), ladj.sum(-1)

    def _read(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x, context = self.broadcast(x, context)
        first, second = x[..., : self.split], x[..., self.split :]
        given, mapped = (second, first) if self.swap else (first, second)
        params: Tensor = self.net(self.transformer.embed(given).flatten(-2), context)
        return given, mapped, params.unflatten(-1, (-1, self.transformer.params))

    def _join(self, given: Tensor, mapped: Tensor) -> Tensor:
        return torch.cat([mapped, given] if self.swap else [given, mapped], -1)
