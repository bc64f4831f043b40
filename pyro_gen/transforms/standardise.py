r"""Standardising data, with the log-Jacobian that brings the density back to the user's units.

.. math:: y = (x - m)/s, \qquad \log|\det \partial y/\partial x| = -\sum_i \log s_i.

Networks like inputs of mean 0 and standard deviation 1, but a density of y is not one of x: per row the two differ by
:math:`\sum_i \log s_i`, which is often more than the models differ among each other. Here m and s are part of the
transform, so that nats always refer to the data as the user has them. They are statistics of the training data and
neither trained nor given a prior: buffers, not parameters. (:class:`~pyro_gen.transforms.linear.ActNorm` starts from
the same numbers and goes on training them.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gen.transforms.bijections import Bijection

__all__ = ["Standardise"]


class Standardise(Bijection):
    r"""Centre and scale by fixed statistics of data, :math:`y_i = (x_i - m_i)/s_i`.

    Before :meth:`initialise` it is the identity. ``forward`` never looks at the statistics of its batch.

    Args:
        features: size D of the vectors.

    Attributes:
        loc: m, ``(D,)``, a buffer.
        scale: s, ``(D,)``, a buffer.
        initialised: whether `initialise` has been called, a boolean buffer; saved and loaded with the other two.

    Example:
        >>> from pyro_gen.transforms import Standardise
        >>> unit = Standardise(2)
        >>> unit.initialise(torch.tensor([[1.0, 50.0], [3.0, 50.0]]))
        >>> unit(torch.tensor([4.0, 51.0]))[0]  # a constant feature is only centred
        tensor([2., 1.])
    """

    data_dependent = True
    loc: Tensor
    scale: Tensor
    initialised: Tensor

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("loc", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set m and s to the mean and standard deviation of ``x``, ``(..., D)``, over all but the last dimension.

        Every call sets them anew, and with them the density of a flow behind: whoever continues a fit reads
        ``initialised`` first. A feature that is constant in ``x`` has s = 1.

        Raises:
            ValueError: for fewer than two rows, or values that are not finite.
        """
        x, _ = self.broadcast(x, None)
        rows = x.detach().reshape(-1, self.features).double()
        if rows.shape[0] < 2:
            raise ValueError(f"x must have at least two rows to start from, got {rows.shape[0]}: pass a batch of data")
        if not rows.is_meta and not bool(rows.isfinite().all()):
            raise ValueError("x must be finite to take its mean and standard deviation: drop or impute such rows")
        # Deviations from a row, not from 0: those of a constant feature are then exactly 0. And in units of their
        # largest, so that no square overflows or vanishes.
        away = rows - rows[0]
        unit = away.abs().amax(0)
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))
        away = away / unit
        scale = away.std(0, correction=0) * unit
        self.loc.copy_(rows[0] + away.mean(0) * unit)
        self.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))
        self.initialised.fill_(True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, None)
        y = (x - self.loc) / self.scale
        return y, -self.scale.log().sum().expand(y.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, None)
        x = y * self.scale + self.loc
        return x, self.scale.log().sum().expand(x.shape[:-1])
