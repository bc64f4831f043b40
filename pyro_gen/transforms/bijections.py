r"""Bijections: the one contract of every transform, and the ways to put them together.

A bijection :math:`f: x \mapsto y` on vectors carries a density along by the change of variables,

.. math:: \log p_X(x) = \log p_Y(f(x)) + \log|\det \partial f/\partial x|,

so a transform is useful only as a pair, the value and the log-determinant, and each direction gives both in one pass:
``forward`` returns :math:`(y, \log|\det \partial y/\partial x|)`, ``inverse`` :math:`(x, \log|\det \partial x/\partial
y|)`. At corresponding points the two log-determinants add to zero, and along a composition they add up.

Nothing is remembered between calls. A transform that keeps its last input to look the answer up (by the identity of a
tensor) returns stale values once a weight is updated in place or drawn from a prior; here the weights at the time of
the call are the weights that count. For the same reason there is no control flow that depends on values, no boolean
indexing and no assertion on values: calls vectorise under ``torch.func.vmap``, trace under ``make_fx`` and compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_gen.checks import check_count, describe

__all__ = ["Bijection", "Compose", "Flip", "Inverse", "Permute"]


class Bijection(nn.Module):
    r"""A differentiable one-to-one map of vectors, with both log-determinants.

    .. math:: \text{forward}(x) = (y, \log|\det \partial y/\partial x|), \qquad
              \text{inverse}(y) = (x, \log|\det \partial x/\partial y|)

    Subclasses write these two methods, each in one pass over its networks, and read their input through
    :meth:`broadcast`. ``torch.func.functional_call`` reaches ``inverse`` through :class:`Inverse`.

    Args:
        features: size D of the vectors.
        context_features: size C of the context that the map depends on, 0 for none.
        out_features: size of the vectors y, where it is not that of x: a point of the simplex has D entries and D − 1
            coordinates. The volume of x is then that of its coordinates; the class says which.

    Shapes: x and y are ``(..., D)``, y ``(..., out_features)`` where that differs, the context ``(..., C)``; leading
    dimensions broadcast, and the log-determinant has their shape.
    """

    event_dim = 1
    data_dependent = False  #: whether `initialise` does anything
    stochastic: bool = False  #: whether the log-determinant is a random, unbiased estimate

    def __init__(self, features: int, context_features: int = 0, *, out_features: int | None = None) -> None:
        super().__init__()
        self.features = check_count(features, "features")
        self.out_features = self.features if out_features is None else check_count(out_features, "out_features")
        self.context_features = check_count(context_features, "context_features") if context_features else 0

    @property
    def domain(self) -> Any:
        """Constraint that x satisfies."""
        return constraints.real_vector

    @property
    def codomain(self) -> Any:
        """Constraint that y satisfies."""
        return constraints.real_vector

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and log|det dy/dx| of shape ``(...)``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and log|det dx/dy| of shape ``(...)``."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set the parameters that are to start from data (:class:`~pyro_gen.transforms.linear.ActNorm`) from ``x``."""

    def broadcast(
        self, x: Tensor, context: Tensor | None, *, features: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x and the context with their leading dimensions broadcast; a ``ValueError`` if a size does not fit.

        ``features`` is the size to expect: that of x unless given (an ``inverse`` reads ``out_features``).
        """
        size = self.features if features is None else features
        if x.dim() < 1 or x.shape[-1] != size:
            raise ValueError(
                f"{type(self).__name__} takes vectors of {size} features, shape (..., {size}), got {tuple(x.shape)}"
            )
        if context is None:
            if self.context_features:
                raise ValueError(
                    f"{type(self).__name__} was built with context_features={self.context_features}: "
                    f"pass a context of shape (..., {self.context_features})"
                )
            return x, None
        if not self.context_features:
            return x, None
        if context.dim() < 1 or context.shape[-1] != self.context_features:
            raise ValueError(
                f"context must have shape (..., {self.context_features}), got {tuple(context.shape)}: "
                "or build the transform with another context_features="
            )
        try:
            batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"the leading dimensions of x, {tuple(x.shape[:-1])}, and of the context, "
                f"{tuple(context.shape[:-1])}, do not broadcast"
            ) from None
        return x.expand(*batch, size), context.expand(*batch, self.context_features)


class Compose(Bijection):
    r"""One bijection after another: :math:`f = f_n \circ \dots \circ f_1`, log-determinants added.

    Parts that take no context leave it alone; all that take one take the same.

    Args:
        parts: the bijections, first applied first.

    Example:
        >>> from pyro_gen.transforms import ActNorm, Compose, Flip
        >>> f = Compose([ActNorm(2), Flip(2)])
        >>> f(torch.tensor([1.0, 2.0]))[0]
        tensor([2., 1.], grad_fn=<...>)
    """

    def __init__(self, parts: Sequence[Bijection]) -> None:
        for part in parts:
            if not isinstance(part, Bijection):
                raise TypeError(f"parts must be bijections, got {describe(part)}")
        if not parts:
            raise ValueError("parts is empty: give at least one bijection")
        for first, second in pairwise(parts):
            if first.out_features != second.features:
                raise ValueError(
                    f"parts that meet must have one number of features: {describe(first)} gives "
                    f"{first.out_features}, and {describe(second)} after it takes {second.features}"
                )
        if len(contexts := {part.context_features for part in parts} - {0}) > 1:
            raise ValueError(f"parts that take a context must take the same, got context_features {sorted(contexts)}")
        context_features = max(part.context_features for part in parts)
        super().__init__(parts[0].features, context_features, out_features=parts[-1].out_features)
        self.parts = nn.ModuleList(parts)
        self.stochastic = any(part.stochastic for part in parts)

    @property
    def domain(self) -> Any:
        return self._parts()[0].domain

    @property
    def codomain(self) -> Any:
        return self._parts()[-1].codomain

    def _parts(self) -> list[Bijection]:
        return [part for part in self.parts if isinstance(part, Bijection)]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, context = self.broadcast(x, context)
        total = y.new_zeros(y.shape[:-1])
        for part in self._parts():
            y, ladj = part(y, context)
            total = total + ladj
        return y, total

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context = self.broadcast(y, context, features=self.out_features)
        total = x.new_zeros(x.shape[:-1])
        for part in reversed(self._parts()):
            x, ladj = part.inverse(x, context)
            total = total + ladj
        return x, total

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        x, context = self.broadcast(x, context)
        parts = self._parts()
        starting = [i for i, part in enumerate(parts) if _starts_from_data(part)]
        for i, part in enumerate(parts[: max(starting, default=-1) + 1]):
            part.initialise(x, context)
            if i < starting[-1]:  # what comes after the last of them need not be computed
                x, _ = part(x, context)


class Inverse(Bijection):
    r"""A bijection run backwards: its ``forward`` is the other's ``inverse``. It has the other's parameters.

    Args:
        bijection: the bijection to turn round.
    """

    def __init__(self, bijection: Bijection) -> None:
        if not isinstance(bijection, Bijection):
            raise TypeError(f"bijection must be a Bijection, got {describe(bijection)}")
        super().__init__(bijection.out_features, bijection.context_features, out_features=bijection.features)
        self.bijection = bijection
        self.stochastic = bijection.stochastic

    @property
    def domain(self) -> Any:
        return self.bijection.codomain

    @property
    def codomain(self) -> Any:
        return self.bijection.domain

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.bijection(y, context)
        return result

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Nothing to do, unless a part starts from data, which it can do only in its own direction.

        Raises:
            TypeError: if a part of the bijection starts from data.
        """
        if _starts_from_data(self.bijection):
            raise TypeError(
                f"{type(self.bijection).__name__} has a part that starts from data at the input of its own forward, "
                "so it cannot do so backwards: call initialise on it before you invert it"
            )


def _starts_from_data(bijection: Bijection) -> bool:
    return any(getattr(part, "data_dependent", False) for part in bijection.modules())


class Permute(Bijection):
    r"""A fixed permutation, :math:`y_i = x_{\text{order}_i}`; the log-determinant is 0.

    Args:
        order: the numbers 0 … D − 1 in the order wanted.

    Example:
        >>> from pyro_gen.transforms import Permute
        >>> Permute([2, 0, 1])(torch.tensor([0.0, 1.0, 2.0]))[0]
        tensor([2., 0., 1.])
    """

    order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        numbers = [int(i) for i in order]
        if not numbers or sorted(numbers) != list(range(len(numbers))):
            raise ValueError(f"order must hold each of 0 ... D - 1 once, got {describe(numbers)}")
        super().__init__(len(numbers))
        self.register_buffer("order", torch.tensor(numbers))

    @classmethod
    def random(cls, features: int, seed: int = 0) -> Permute:
        """A permutation drawn from ``seed``; the global generators are left alone."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randperm(check_count(features, "features"), generator=generator).tolist())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, context)
        return x.index_select(-1, self.order), x.new_zeros(x.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, context)
        return y.index_select(-1, self.order.argsort()), y.new_zeros(y.shape[:-1])


class Flip(Bijection):
    """The features in reverse order; between autoregressive layers it gives each its turn to come last."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, context)
        return x.flip(-1), x.new_zeros(x.shape[:-1])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, _ = self.broadcast(y, context)
        return y.flip(-1), y.new_zeros(y.shape[:-1])
