r"""Sylvester flow: a perturbation of rank M, with the determinant of an M × M triangular matrix, both ways.

.. math:: y = x + Q R\, h(z), \qquad h(z) = \tanh(\tilde R z + b), \qquad z = Q^\top x,

with Q of M orthonormal columns (a product of Householder reflections) and :math:`R, \tilde R` upper triangular. By
Sylvester's identity :math:`\det(I_D + A B) = \det(I_M + B A)` with :math:`A = Q R,\ B = \operatorname{diag}(h')
\tilde R Q^\top`, and :math:`Q^\top Q = I_M`,

.. math:: \det \partial y/\partial x = \det(I_M + \operatorname{diag}(h') \tilde R R) = \prod_i (1 + h'_i\, r_{ii}
          \tilde r_{ii}),

for the three factors are upper triangular. (The order matters: with Q between diag(h') and R, as in the code this
family is often copied from, nothing is triangular and the product is not the determinant.)

As :math:`0 < h' \le 1`, the map increases if :math:`r_{ii} \tilde r_{ii} > -1`. The parametrisation
:math:`\tilde r_{ii} = e^{s_i}`, :math:`r_{ii} = (e^{p_i} - 1) e^{-s_i}` has :math:`r_{ii} \tilde r_{ii} = e^{p_i} - 1`,
loses nothing (a sign of :math:`\tilde r_{ii}` is absorbed, tanh being odd), and makes each factor a mean of positive
terms, :math:`(1 - h'_i) + h'_i e^{p_i}`, so that no rounding can make its logarithm fail.

**Inverse.** With :math:`w = Q^\top y` the map is :math:`w = g(z) = z + R h(z)` in M dimensions, upper triangular and
increasing, and what is orthogonal to Q's columns stays. From the last coordinate up, the equation of :math:`z_i` is
:math:`z_i + r_{ii} \tanh(\tilde r_{ii} z_i + c) = w_i - \sum_{j>i} r_{ij} h_j` with known c: one scalar root, whose
steps do not touch the other coordinates. Then :math:`x = Q z + (I - Q Q^\top) y`, where :math:`y - Q R h(z)` would
subtract large numbers from each other wherever the map is steep.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_gen.checks import check_count
from pyro_gen.transforms.bijections import Bijection
from pyro_gen.transforms.numerical import implicit, increasing_root

__all__ = ["Sylvester"]

START = 0.1  # spread of the triangular matrices at the start: near the identity, yet every weight has a gradient


class Sylvester(Bijection):
    r""":math:`y = x + Q R \tanh(\tilde R Q^\top x + b(c))`, invertible at all parameter values.

    A context c shifts b linearly. ``forward`` is closed-form; ``inverse`` solves M scalar equations by bisection (64
    steps each in float64, 32 in float32, of a handful of elementwise operations), and its derivatives, exact up to
    order 3, are implicit. For the density of data by ``forward`` alone use this class as it is, for fast draws
    :class:`~pyro_gen.transforms.bijections.Inverse` of it.

    Args:
        features: size D of the vectors.
        rank: number M of columns of Q, at most D; D by default.
        context_features: size of the context, 0 for none.
        reflections: number of Householder vectors; M by default, which reach every Q but for the sign of a column.

    Raises:
        ValueError: if ``rank`` is larger than ``features``.

    References:
        R. van den Berg, L. Hasenclever, J. M. Tomczak, M. Welling, "Sylvester normalizing flows for variational
        inference", 2018, arXiv:1803.05649.

    Example:
        >>> from pyro_gen.transforms.sylvester import Sylvester
        >>> f = Sylvester(4, rank=2).double()
        >>> x = torch.randn(5, 4, dtype=torch.double)
        >>> y, ladj = f(x)
        >>> back, back_ladj = f.inverse(y)
        >>> torch.allclose(back, x), torch.allclose(back_ladj, -ladj)
        (True, True)
    """

    def __init__(
        self, features: int, rank: int | None = None, context_features: int = 0, *, reflections: int | None = None
    ) -> None:
        super().__init__(features, context_features)
        self.rank = self.features if rank is None else check_count(rank, "rank")
        if self.rank > self.features:
            raise ValueError(f"rank must be at most features={features}, got {rank}: Q has orthonormal columns")
        count = self.rank if reflections is None else check_count(reflections, "reflections")
        size = self.rank
        self.vectors = nn.Parameter(torch.randn(count, features))
        self.left = nn.Parameter(START * torch.randn(size, size))  # R above its diagonal
        self.right = nn.Parameter(START * torch.randn(size, size))  # R~ above its diagonal
        self.log_slope = nn.Parameter(START * torch.randn(size))  # p
        self.log_scale = nn.Parameter(torch.zeros(size))  # s
        self.bias = nn.Parameter(START * torch.randn(size))
        self.context = nn.Linear(context_features, size, bias=False) if context_features else None

    def basis(self) -> Tensor:
        """Q, ``(D, M)``, with orthonormal columns."""
        q = torch.eye(self.features, self.rank, dtype=self.vectors.dtype, device=self.vectors.device)
        for v in self.vectors.unbind(0):
            q = q - torch.outer(v, v @ q) * (2 / (v @ v).clamp(min=torch.finfo(v.dtype).tiny))
        return q

    def factors(self) -> tuple[Tensor, Tensor]:
        """R and R~, upper triangular, ``(M, M)``, with the product of each pair of diagonal entries above −1."""
        scale = self.log_scale.exp()
        left = self.left.triu(1) + torch.diag_embed(torch.expm1(self.log_slope) / scale)
        return left, self.right.triu(1) + torch.diag_embed(scale)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context = self.broadcast(x, context)
        q, (left, right), bias = self.basis(), self.factors(), self._bias(context)
        h = torch.tanh((x @ q) @ right.mT + bias)
        return x + h @ (q @ left).mT, self._ladj(h)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, context = self.broadcast(y, context)
        q, (left, right), bias = self.basis(), self.factors(), self._bias(context)

        def hidden(z: Tensor) -> Tensor:
            return torch.tanh(z @ right.mT + bias)

        w = y @ q
        root = _root(w, left, right, bias)
        slope = 1 - hidden(root).square()
        eye = torch.eye(self.rank, dtype=w.dtype, device=w.device)
        jacobian = eye + (left * slope.unsqueeze(-2)) @ right
        z = implicit(lambda v: v + hidden(v) @ left.mT, root, w, jacobian=jacobian, upper=True)
        outside = y - w @ q.mT
        outside = outside - (outside @ q) @ q.mT  # once more, for what the rounding of large y leaves along Q
        return outside + z @ q.mT, -self._ladj(hidden(z))

    def _bias(self, context: Tensor | None) -> Tensor:
        if self.context is None or context is None:
            return self.bias
        shift: Tensor = self.context(context)
        return self.bias + shift

    def _ladj(self, h: Tensor) -> Tensor:
        square = h.square()
        return (square + (1 - square) * self.log_slope.exp()).log().sum(-1)


@torch.no_grad()
def _root(w: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
    """z with z + R tanh(R~ z + b) = w, from the last coordinate up; without derivatives."""
    size = w.shape[-1]
    bias = bias.expand(w.shape)
    roots: list[Tensor] = []  # z_{i+1}, …, z_{M-1}
    hidden: list[Tensor] = []  # and their tanh
    for i in reversed(range(size)):
        target, offset = w[..., i], bias[..., i]
        if roots:
            target = target - torch.stack(hidden, -1) @ left[i, i + 1 :]
            offset = offset + torch.stack(roots, -1) @ right[i, i + 1 :]
        r, s = left[i, i], right[i, i]

        def coordinate(z: Tensor, r: Tensor = r, s: Tensor = s, offset: Tensor = offset) -> Tensor:
            return z + r * torch.tanh(s * z + offset)

        z = increasing_root(coordinate, target)
        roots.insert(0, z)
        hidden.insert(0, torch.tanh(s * z + offset))
    return torch.stack(roots, -1)
