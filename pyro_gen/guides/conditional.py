r"""A flow that a network's output places, scales and bends: the family of amortised guides.

.. math:: z = \mu + \sigma \odot g^{-1}(\epsilon; h), \quad \epsilon \sim N(0, I), \qquad
          \log q(z) = \log N(\epsilon; 0, I) - \sum \log \sigma - \log\left|\det \frac{\partial g^{-1}}{\partial
          \epsilon}\right| ,

with :math:`(\mu, \log \sigma, h)` the output of one network for one row. With g the identity this is the diagonal
normal of a plain guide; what g learns comes on top, and always sees numbers of the size of
:math:`\epsilon`, whatever the scale of z, so that the knots of a spline are where they are needed.

The gradient of a bound goes through draws, and a draw is asked for its own density: the flow is built so that noise to
value is the direction of one pass (for masked layers, an inverse autoregressive flow), and value and density come
together. The density of *another* value, a draw replayed under other weights, goes the other way: feature by feature,
the arithmetic of a pass in as many small steps as there are features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_gen.checks import check_count
from pyro_gen.distributions.bases import StandardNormal
from pyro_gen.distributions.flow import FlowDistribution
from pyro_gen.transforms.bijections import Bijection
from pyro_gen.transforms.stacks import TransformName, stack

__all__ = ["ConditionalFlow", "Located", "centre"]


class Located(Bijection):
    r"""A bijection after a location and a scale that are given with its context.

    .. math:: f(x; \mu, \log\sigma, h) = g\big((x - \mu) / \sigma; h\big)

    Args:
        core: g, of D features and a context h of H numbers (none for H = 0).

    The context is :math:`(\mu, \log\sigma, h)`, of shape ``(..., 2 D + H)``.

    Example:
        >>> import torch
        >>> from pyro_gen.transforms import Flip
        >>> Located(Flip(2)).inverse(torch.zeros(2), torch.tensor([3.0, 4.0, 0.0, 0.0]))
        (tensor([3., 4.]), tensor(0.))
    """

    def __init__(self, core: Bijection) -> None:
        super().__init__(core.features, 2 * core.features + core.context_features)
        self.core = core

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context = self.broadcast(x, context)
        loc, log_scale, rest = self._parts(context)
        y, ladj = self.core((x - loc) * (-log_scale).exp(), rest)
        return y, ladj - log_scale.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, context = self.broadcast(y, context)
        loc, log_scale, rest = self._parts(context)
        x, ladj = self.core.inverse(y, rest)
        return loc + log_scale.exp() * x, ladj + log_scale.sum(-1)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        assert context is not None  # `broadcast` has asked for it
        loc, log_scale, rest = context.split([self.features, self.features, self.core.context_features], -1)
        return loc, log_scale, rest if self.core.context_features else None


class ConditionalFlow(nn.Module):
    """q(z | raw), the flow that a network's output ``raw`` stands for; ``forward(raw)`` gives the distribution.

    Args:
        features: size D of z.
        transform: a name that :func:`~pyro_gen.transforms.stacks.stack` takes; ``"linear"`` is a normal whose
            correlations are the same for every row.
        layers, hidden: of the stack.
        context_features: size H of what the layers see; 0 for a flow that is located and scaled only.
        bins: of splines.

    Attributes:
        outputs: how many numbers ``raw`` has: D of the location, D of the log scale, H of the context.

    Example:
        >>> import torch
        >>> q = ConditionalFlow(2, context_features=3)(torch.randn(5, 7))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    def __init__(
        self,
        features: int,
        transform: TransformName | str = "spline_autoregressive",
        layers: int = 2,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 64,
        *,
        bins: int = 8,
    ) -> None:
        super().__init__()
        if transform == "linear" or not context_features:
            context_features = 0
        else:
            check_count(context_features, "context_features")
        core = stack(transform, features, layers, hidden, context_features, "sampling", bins=bins)
        self.bijection, self.base = Located(core), StandardNormal(features)

    @property
    def features(self) -> int:
        """Size of z."""
        return self.bijection.features

    @property
    def outputs(self) -> int:
        """How many numbers ``raw`` has."""
        return self.bijection.context_features

    def forward(self, raw: Tensor) -> FlowDistribution:
        return FlowDistribution(self.bijection, self.base(), raw)


def centre(q: FlowDistribution) -> Tensor:
    """Where a flow takes the mean of its noise, ``(*batch, *event)``: the median of a single feature, a mean of none.

    A flow has no mean in closed form. This point does not depend on a draw, and is the mean where the flow is affine.
    """
    base = q.noise.expand(q.batch_shape)
    value, _ = q.bijection.inverse(base.mean, q.context)
    return value.reshape(q.batch_shape + q.event_shape)


def quiet_start(layer: nn.Linear, features: int, loc: Tensor, log_scale: float, factor: float = 0.1) -> None:
    """Let a head that gives (location, log scale, context) start near ``loc`` and ``log_scale`` for every row."""
    with torch.no_grad():
        layer.weight[: 2 * features].mul_(factor)
        layer.bias[:features].copy_(loc)
        layer.bias[features : 2 * features].fill_(log_scale)
