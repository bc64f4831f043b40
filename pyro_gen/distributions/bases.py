"""Distributions of vectors with weights of their own: priors of latents, bases of flows. ``forward()`` gives them."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_gen.checks import check_count, describe
from pyro_gen.distributions.held import Held

__all__ = ["GaussianMixture", "StandardNormal", "StudentT", "Uniform", "base_of"]


class StandardNormal(nn.Module):
    """N(0, I) on the device and with the dtype of what it is asked beside."""

    loc: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(features), persistent=False)

    def forward(self) -> Any:
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


class StudentT(nn.Module):
    """Independent Student t, each with degrees of freedom to learn: tails as heavy as the data's, which no bijection
    with linear tails makes of a normal base.

    Args:
        features: size of the vectors.
        df: degrees of freedom to start from.
    """

    def __init__(self, features: int, df: float = 10.0) -> None:
        super().__init__()
        self.log_df = nn.Parameter(torch.full((features,), math.log(df)))

    def forward(self) -> Any:
        zero = torch.zeros_like(self.log_df)
        return dist.StudentT(self.log_df.exp(), zero, torch.ones_like(zero)).to_event(1)


class GaussianMixture(nn.Module):
    """A learnt mixture of diagonal Gaussians."""

    def __init__(self, features: int, components: int = 10) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, features))
        self.log_scale = nn.Parameter(torch.zeros(components, features))

    def forward(self) -> Any:
        parts = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts)


class Uniform(nn.Module):
    """Uniform on a cube [−bound, bound]^D: the base of flows that map a box, or a torus, onto itself."""

    low: Tensor
    high: Tensor

    def __init__(self, features: int, bound: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("low", torch.full((features,), -float(bound)), persistent=False)
        self.register_buffer("high", torch.full((features,), float(bound)), persistent=False)

    def forward(self) -> Any:
        return dist.Uniform(self.low, self.high).to_event(1)


def base_of(base: Any, features: int, *, bound: float = 1.0, components: int = 10, name: str = "base") -> nn.Module:
    """The module behind ``base=``: a name, a distribution of event shape ``(features,)``, or a module that gives one.

    Args:
        base: ``"normal"``, ``"student_t"``, ``"mixture"``, ``"uniform"``, a distribution or a module.
        features: size of the vectors.
        bound: half side of the cube of ``"uniform"``.
        components: of ``"mixture"``.
        name: of the argument, for errors.
    """
    if isinstance(base, str):
        if base == "normal":
            return StandardNormal(features)
        if base == "student_t":
            return StudentT(features)
        if base == "mixture":
            return GaussianMixture(features, check_count(components, "components"))
        if base == "uniform":
            return Uniform(features, bound)
    elif isinstance(base, Distribution):
        if tuple(base.event_shape) != (features,) or tuple(base.batch_shape):
            raise ValueError(
                f"{name} must have event shape ({features},) and no batch shape, got event {tuple(base.event_shape)}, "
                f"batch {tuple(base.batch_shape)}: .to_event(1) makes a batch of scalars one vector"
            )
        return Held(base)
    elif isinstance(base, nn.Module):
        return base
    raise ValueError(
        f"{name} must be 'normal', 'student_t', 'mixture', 'uniform', a distribution or a module that gives one, got "
        f"{describe(base)}"
    )
