r"""Penalties on the gradient of a critic: what keeps an adversarial game from circling.

A critic that tells data from draws perfectly is infinitely steep, and the generator learns nothing from it. With the
gradient :math:`g(x) = \nabla_x \ell(x)` of its logit,

- *R1*: :math:`\tfrac\gamma2 E_p |g|^2`, on data; *R2*: the same on draws of the model (Mescheder et al. 2018). At the
  equilibrium, where ℓ is constant, both are 0, so they do not move it; the Dirac-GAN, which circles for ever without,
  falls into it at rate γ/2.
- *gradient penalty*: :math:`\tfrac\gamma2 E(|g| - 1)^2` at points drawn uniformly between a datum and a draw (Gulrajani
  et al. 2017): the best critic of the Wasserstein distance has slope 1 there. Its paper's λ is γ/2.

Gradients are per row, so that a critic whose layers mix the rows of a batch (batch normalisation) has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["between", "refuse_batch_norm", "shares", "square", "towards_one"]


def square(gradient: Tensor) -> Tensor:
    """½ |g|² of each row: ``(rows,)``."""
    return gradient.flatten(1).square().sum(1) / 2


def towards_one(gradient: Tensor) -> Tensor:
    """½ (|g| − 1)² of each row: ``(rows,)``; smooth at g = 0, where the norm is not."""
    norm = (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()
    return (norm - 1).square() / 2


def between(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Points between the rows of two tensors, at a share of each way, ``(rows,)``."""
    return torch.lerp(one, other, share.reshape(-1, *[1] * (one.dim() - 1)))


def shares(like: Tensor) -> Tensor:
    """A uniform number for each row: ``(rows,)``; of normal ones, which draw the same compiled and eager."""
    normal = torch.normal(like.new_zeros(len(like)), 1.0)
    return (1 + torch.erf(normal / math.sqrt(2))) / 2


def refuse_batch_norm(critic: nn.Module) -> None:
    """Raise a ``ValueError`` that names a layer through which a row's logit depends on the other rows."""
    for name, layer in critic.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"r1=, r2= and gradient_penalty= need a gradient of each row, and the critic has batch normalisation "
                f"({name or type(layer).__name__}), through which rows depend on each other: use layer normalisation "
                "(torch.nn.LayerNorm), or none"
            )
