r"""Linear layers: scales, mixing matrices and rotations with a determinant that can be read off.

- :class:`ActNorm`: :math:`y = e^{s}(x + b)`, a diagonal, :math:`\log|\det| = \sum_i s_i`.
- :class:`LUMixing`: :math:`y = P L U x`, with L unit lower triangular and U upper triangular with diagonal
  :math:`e^{s}`; :math:`\log|\det| = \sum_i s_i`, and the inverse is two triangular solves, not a matrix inverse.
- :class:`Rotation`: :math:`y = Q x`, :math:`Q = \prod_k (I - 2 v_k v_k^\top/\lVert v_k\rVert^2)`; an even number of
  reflections has determinant 1, and :math:`Q^{-1} = Q^\top`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_gen.checks import check_count
from pyro_gen.transforms.bijections import Bijection, Permute

__all__ = ["ActNorm", "LUMixing", "Rotation"]


class ActNorm(Bijection):
    r"""Shift and scale by weights that start from data: :math:`y = e^{s}(x + b)`.

    :meth:`initialise` sets b and s so that the features of a batch leave with mean 0 and standard deviation 1. It is
    called once, by name; ``forward`` never looks at the statistics of its batch, so one row is as good as many and the
    inverse is exact. Before, the map is the identity.

    Args:
        features: size of the vectors.

    References:
        D. P. Kingma, P. Dhariwal, "Glow: Generative flow with invertible 1×1 convolutions", 2018, arXiv:1807.03039,
        sec. 3.1.

    Example:
        >>> from pyro_gen.transforms import ActNorm
        >>> norm = ActNorm(2)
        >>> norm.initialise(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> norm(torch.tensor([2.0, 20.0]))[0].tolist()
        [0.0, 0.0]
    """

    data_dependent = True

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.bias = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Normalise by the mean and standard deviation of ``x``, ``(..., D)``, over all but the last dimension.

        A feature that is constant in the batch is only centred.

        Raises:
            ValueError: for fewer than two rows.
        """
        x, _ = self.broadcast(x, None)
        rows = x.reshape(-1, self.features)
        if rows.shape[0] < 2:
            raise ValueError(f"x must have at least two rows to start from, got {rows.shape[0]}: pass a batch of data")
        scale = rows.std(0, correction=0)
        self.bias.copy_(-rows.mean(0))
        self.log_scale.copy_(torch.where(scale > 0, -scale.log(), torch.zeros_like(scale)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, context)
        y = (x + self.bias) * self.log_scale.exp()
        return y, self.log_scale.sum().expand(y.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, context)
        x = y * (-self.log_scale).exp() - self.bias
        return x, -self.log_scale.sum().expand(x.shape[:-1])


class LUMixing(Bijection):
    r"""An invertible matrix by its PLU factors, :math:`y = P L U x`; the identity up to P at the start.

    Args:
        features: size D of the vectors.
        permutation: the fixed P; none by default.

    References:
        D. P. Kingma, P. Dhariwal, "Glow", 2018, arXiv:1807.03039, eqs. 10 and 11.
    """

    def __init__(self, features: int, permutation: Permute | None = None) -> None:
        super().__init__(features)
        if permutation is not None and permutation.features != features:
            raise ValueError(f"permutation must be of {features} features, got {permutation.features}")
        self.permutation = permutation
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))

    def _factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.features, dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + eye * self.log_diagonal.exp()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, context)
        lower, upper = self._factors()
        y = x @ upper.mT @ lower.mT
        if self.permutation is not None:
            y, _ = self.permutation(y)
        return y, self.log_diagonal.sum().expand(y.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, context)
        if self.permutation is not None:
            y, _ = self.permutation.inverse(y)
        lower, upper = self._factors()
        columns = y.reshape(-1, self.features).mT
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(upper, columns, upper=True)
        return columns.mT.reshape(y.shape), -self.log_diagonal.sum().expand(y.shape[:-1])


class Rotation(Bijection):
    r"""A rotation as a product of Householder reflections; volume is preserved, the log-determinant is 0.

    The reflections start in equal pairs, so the rotation starts as the identity.

    Args:
        features: size D of the vectors.
        reflections: how many, even; D of them (or D + 1) reach every rotation, the default.

    References:
        J. M. Tomczak, M. Welling, "Improving variational auto-encoders using Householder flow", 2016,
        arXiv:1611.09630, eq. 9.
    """

    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__(features)
        count = features + features % 2 if reflections is None else check_count(reflections, "reflections")
        if count % 2:
            raise ValueError(f"reflections must be even, as an odd number is no rotation, got {count}")
        self.vectors = nn.Parameter(torch.randn(count // 2, features).repeat_interleave(2, 0))

    def matrix(self) -> Tensor:
        """Q, ``(D, D)``."""
        q = torch.eye(self.features, dtype=self.vectors.dtype, device=self.vectors.device)
        for v in self.vectors.unbind(0):
            q = q - torch.outer(v, v @ q) * (2 / (v @ v).clamp(min=torch.finfo(v.dtype).tiny))
        return q

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, context)
        return x @ self.matrix().mT, x.new_zeros(x.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, context)
        return y @ self.matrix(), y.new_zeros(y.shape[:-1])
