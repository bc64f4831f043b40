"""A Pyro distribution from a log-density and a sampler: how a whole program becomes one site of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Density"]


class Density(TorchDistribution):
    r"""The distribution with a given :math:`\log p(x \mid c)` and a given way to draw from it.

    Args:
        log_prob: ``(x, context)`` to one value a row, for x ``(rows, *event_shape)``; context None or ``(rows, …)``.
        sample: ``(rows, context)`` to x.
        event_shape: shape of one x.
        support: constraint on x, of the event dimension of ``event_shape``.
        context: ``(*batch_shape, *context_shape)``, or None.
        context_dim: number of dimensions of one row of the context.

    Draws are not differentiated: there is ``sample``, and no ``rsample``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(
        self,
        log_prob: Callable[[Tensor, Tensor | None], Tensor],
        sample: Callable[[int, Tensor | None], Tensor],
        event_shape: torch.Size,
        support: Any,
        context: Tensor | None = None,
        context_dim: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        self._rows_log_prob, self._rows_sample = log_prob, sample
        self._support, self._context, self._context_dim = support, context, context_dim
        batch = torch.Size() if context is None else context.shape[: context.dim() - context_dim]
        super().__init__(batch, torch.Size(event_shape), validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Density:
        new: Density = self._get_checked_instance(Density, _instance)
        new.__dict__.update(self.__dict__)
        batch = torch.Size(batch_shape)
        if self._context is not None:
            new._context = self._context.expand(batch + self._context_shape)
        super(Density, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _context_shape(self) -> torch.Size:
        assert self._context is not None
        return self._context.shape[self._context.dim() - self._context_dim :]

    def _contexts(self, batch: torch.Size) -> Tensor | None:
        if self._context is None:
            return None
        return self._context.expand(batch + self._context_shape).reshape(-1, *self._context_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        events = len(self.event_shape)
        batch = torch.broadcast_shapes(value.shape[: value.dim() - events], self.batch_shape)
        rows = value.expand(batch + self.event_shape).reshape(-1, *self.event_shape)
        return self._rows_log_prob(rows, self._contexts(batch)).reshape(batch)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        batch = torch.Size(sample_shape) + self.batch_shape
        return self._rows_sample(batch.numel(), self._contexts(batch)).reshape(batch + self.event_shape)
