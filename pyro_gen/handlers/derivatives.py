"""Derivatives of log f in x: the score and the Laplacian, in which Z has dropped out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_gen.handlers.densities import log_density

__all__ = ["score"]


def score(model: Callable[..., Any], x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    r"""Score :math:`\nabla_x \log f(x)` of each row: the gradient in which Z has dropped out.

    Args:
        model: any Pyro program without free latent sites; called as ``model(x, *rest)``.
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
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        (result,) = torch.autograd.grad(log_density(model, y, *rest, **kwargs).sum(), y, create_graph=recorded)
    return result if recorded and result.requires_grad else result.detach()
