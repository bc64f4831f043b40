"""Derivatives of log f in x: the score and the Laplacian, in which Z has dropped out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen.handlers.marginal import marginal_rows
from pyro_gen.laplacians import derivatives

__all__ = ["laplacian", "score"]


def score(model: Callable[..., Any], x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    r"""Score :math:`\nabla_x \log f(x)` of each row: the gradient in which Z has dropped out.

    Args:
        model: any Pyro program without free latent sites but those it marks for parallel enumeration, which are
            summed out; called as ``model(x, *rest)``.
        x: data of shape ``(rows, *event_shape)``, floating point.

    Returns:
        Tensor of the shape of ``x``, differentiable once more where gradients are recorded.

    Raises:
        ValueError: as for :func:`log_density`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(()), 2.0), obs=x)
        >>> score(model, torch.tensor([4.0])).detach()
        tensor([-1.])
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad(), poutine.block():
        y = x if x.requires_grad else x.detach().requires_grad_()
        (result,) = torch.autograd.grad(marginal_rows(model, y, *rest, **kwargs).sum(), y, create_graph=recorded)
    return result if recorded and result.requires_grad else result.detach()


def laplacian(
    model: Callable[..., Any],
    x: Tensor,
    *rest: Any,
    method: Literal["auto", "forward", "reverse", "vmap"] = "auto",
    **kwargs: Any,
) -> Tensor:
    r"""Laplacian :math:`\sum_i \partial_i^2 \log f(x)` of each row, the trace of the score's Jacobian, without Z.

    Args:
        model: as for :func:`score`; called as ``model(x, *rest)``.
        x: data of shape ``(rows, *event_shape)``, floating point.
        method: how second derivatives are taken: ``"forward"`` (the forward Laplacian), ``"reverse"``, ``"vmap"``, or
            ``"auto"``, which takes the first wherever every operation of the program has a rule.

    Returns:
        Tensor of shape ``(rows,)``, differentiable in the weights where gradients are recorded.

    Raises:
        ValueError: as for :func:`log_density`, or for another method.
        NoRule: under ``"forward"``, where an operation has no rule.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(3), 0.5).to_event(1), obs=x)
        >>> laplacian(model, torch.zeros(2, 3))
        tensor([-12., -12.])
    """
    with poutine.block():
        return derivatives(lambda y: marginal_rows(model, y, *rest, **kwargs), x, method).laplacian
