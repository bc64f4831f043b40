r"""Masked autoregressive layers: each feature mapped with parameters read off the features before it.

.. math:: y_i = \tau(x_i; \phi_i(x_{<i}, c)), \qquad \log|\det \partial y/\partial x| = \sum_i \log|\tau'(x_i; \phi_i)|,

as the Jacobian is triangular. A masked network gives all :math:`\phi_i` from x in one pass. The inverse solves for
:math:`x_0`, then :math:`x_1`, …: D steps one after the other, but with sorted degrees each step needs only the hidden
units of one more degree, so the work of all steps together is that of one pass (of the part of the weights inside the
masks) instead of D passes. The steps are plain functional operations: their gradient is exact, costs one such sweep
back, and is itself differentiable.

With a Gaussian base and affine maps this is MAF, run the other way round IAF; with splines NSF (AR).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from pyro_gen.checks import describe
from pyro_gen.nn.masked import MaskedMLP
from pyro_gen.transforms.elementwise import ElementwiseMap, Mapped

__all__ = ["MaskedAutoregressive"]


class MaskedAutoregressive(Mapped):
    r"""Autoregressive layer over any elementwise map.

    With ``direction="density"`` the forward direction is one parallel pass (cheap for the density of data, when
    ``forward`` maps data to noise) and the inverse goes feature by feature; ``"sampling"`` swaps the two. The slow
    direction does the arithmetic of one pass too, in D small steps.

    Args:
        transformer: the elementwise map.
        features: size D of the vectors.
        hidden: sizes of the hidden layers of the masked network.
        context_features: size of the context, 0 for none.
        direction: ``"density"`` or ``"sampling"``, the direction in which ``forward`` is parallel or step by step.
        activation: elementwise function between the layers.

    References:
        G. Papamakarios, T. Pavlakou, I. Murray, "Masked autoregressive flow for density estimation", 2017,
        arXiv:1705.07057, eqs. 3–6; D. P. Kingma et al., "Improved variational inference with inverse autoregressive
        flow", 2016, arXiv:1606.04934, eq. 10.

    Example:
        >>> from pyro_gen.transforms import Affine, MaskedAutoregressive
        >>> f = MaskedAutoregressive(Affine(), 3, hidden=(16,)).double()
        >>> x = torch.randn(5, 3, dtype=torch.double)
        >>> y, ladj = f(x)
        >>> back, back_ladj = f.inverse(y)
        >>> torch.allclose(back, x), torch.allclose(back_ladj, -ladj)
        (True, True)
    """

    def __init__(
        self,
        transformer: ElementwiseMap,
        features: int,
        hidden: Sequence[int] = (128, 128),
        context_features: int = 0,
        *,
        direction: Literal["density", "sampling"] = "density",
        activation: Callable[[Tensor], Tensor] = silu,
    ) -> None:
        super().__init__(transformer, features, context_features)
        if direction not in ("density", "sampling"):
            raise ValueError(f'direction must be "density" or "sampling", got {describe(direction)}')
        self.direction = direction
        self.net = MaskedMLP(
            features,
            transformer.params,
            hidden,
            context_features=context_features,
            inputs=transformer.embedding,
            activation=activation,
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context = self.broadcast(x, context)
        return self._parallel(x, context) if self.direction == "density" else self._stepwise(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, context = self.broadcast(y, context)
        return self._stepwise(y, context) if self.direction == "density" else self._parallel(y, context)

    def _parallel(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        params = self.net(self.transformer.embed(x).flatten(-2), context)
        y, ladj = self.transformer.forward(x, params)
        return y, ladj.sum(-1)

    def _stepwise(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = torch.Size(y.shape[:-1])  # under Pyro's provenance tracking a shape is a plain tuple
        columns = y.reshape(batch.numel(), self.features).unbind(-1)
        if context is not None:
            context = context.reshape(batch.numel(), self.context_features)
        solved: list[Tensor] = []
        ladjs: list[Tensor] = []

        def step(i: int, params: Tensor) -> Tensor:
            x, ladj = self.transformer.inverse(columns[i], params)
            solved.append(x)
            ladjs.append(ladj)
            return self.transformer.embed(x)

        self.net.unroll(step, batch.numel(), context)
        ladj = torch.stack(ladjs, -1).sum(-1)
        return torch.stack(solved, -1).reshape(*batch, self.features), ladj.reshape(batch)
