r"""The chain rule as a distribution: each value given those before it, all of them from one masked network.

.. math:: \log p(x \mid c) = \sum_i \log p\big(x_{o_i} \mid x_{o_1}, …, x_{o_{i-1}}, c\big)

for an order o of the values. Scoring is one parallel pass; drawing goes value by value, yet computes every hidden unit
once (`MaskedMLP.unroll`), the work of one pass. A uniform mixture over K orders of one set of weights,
:math:`\log p = \operatorname{logsumexp}_k \log p_k - \log K`, is a density too, of K passes; a draw picks an order for
each row, and is made in all K of them, so that no shape depends on what is picked.

Real values, and contexts, are standardised first, :math:`u = (x - m)/s` by fixed numbers m and s. The density carries
the Jacobian :math:`-\sum_i \log s_i`: it is that of x in its own units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_gen.distributions.likelihoods import Likelihood
from pyro_gen.nn.masked import MaskedMLP
from pyro_gen.nn.snapshot import snapshot
from pyro_gen.transforms.standardise import Standardise

__all__ = ["AutoregressiveDistribution", "Conditionals"]

START = 0.1  # the last layer's weights start this much smaller: near independence, yet every weight has a gradient


class Conditionals(nn.Module):
    """The masked network and what its numbers mean: p(x_i | the values before, context) for all i.

    Args:
        event_shape: shape of one datum; its D values are taken flattened.
        likelihood: of D single values, of event shape ``(D,)``.
        hidden: sizes of the hidden layers.
        context_features: size of the flattened context, 0 for none.
        orders: permutations of 0 … D − 1, which value comes first, second, …; None for the order they are stored in.
        one_hot: whether the network gets a level as a vector of zeros and a one, instead of a number.
    """

    level: Tensor
    _orders: Tensor

    def __init__(
        self,
        event_shape: torch.Size,
        likelihood: Likelihood,
        hidden: Sequence[int],
        context_features: int = 0,
        orders: Sequence[Sequence[int]] | None = None,
        one_hot: bool = False,
    ) -> None:
        super().__init__()
        d = event_shape.numel()
        self.event_shape, self.event_dim, self.features = event_shape, len(event_shape), d
        self.context_features = context_features
        self.likelihood = likelihood
        inputs = cast(int, likelihood.levels) if one_hot else 1
        self.net = MaskedMLP(d, likelihood.maps, hidden, context_features=context_features, inputs=inputs)
        with torch.no_grad():
            self.net.layers[-1].weight.mul_(START)  # type: ignore[operator]
        self.one_hot, self.standardised = one_hot, likelihood.levels is None
        self.orders = [tuple(order) for order in orders] if orders is not None else None
        # follow from the configuration, so they are not part of the state
        self.register_buffer("_orders", torch.tensor(self.orders or [[0]]), persistent=False)
        self.register_buffer("level", torch.arange(float(inputs)), persistent=False)
        self.units = Standardise(d) if self.standardised else None
        self.given = Standardise(context_features) if context_features else None

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Standardise real data and contexts by those given, the first time; trained weights stay what they are."""
        for part, value in ((self.units, x), (self.given, context)):
            if part is not None and value is not None and not bool(part.initialised):
                part.initialise(value.reshape(x.shape[0], part.features))

    def embed(self, u: Tensor) -> Tensor:
        """Values ``(...)`` as the network takes them, ``(..., inputs)``."""
        if self.one_hot:
            return (u.unsqueeze(-1) == self.level).to(u.dtype)
        return self.likelihood.centre(u).unsqueeze(-1)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p of ``(..., *event_shape)`` given ``(..., context_features)``: leading dimensions are broadcast."""
        u, ladj = x.flatten(-self.event_dim), None
        if self.units is not None:
            u, ladj = self.units(u)
        given, context = self.embed(u).flatten(-2), self._seen(context)
        orders = (None,) if self.orders is None else self._orders.unbind()
        found = [self.likelihood.each(self.net(given, context, order)).log_prob(u).sum(-1) for order in orders]
        log_p = found[0] if len(found) == 1 else torch.stack(found).logsumexp(0) - math.log(len(found))
        return log_p if ladj is None else log_p + ladj

    def _seen(self, context: Tensor | None) -> Tensor | None:
        return context if self.given is None or context is None else self.given(context)[0]

    @torch.no_grad()
    def sample(self, rows: int, context: Tensor | None = None) -> Tensor:
        """Draws ``(rows, *event_shape)``, given ``(rows, context_features)``."""
        count, context = 1 if self.orders is None else len(self.orders), self._seen(context)
        if count == 1:
            x = self._draw(rows, context, 0)
        else:
            like = cast(Tensor, self.net.layers[0].weight)
            picked = torch.randint(count, (rows, 1), device=like.device)
            x = like.new_zeros(rows, self.features)
            for k in range(count):  # every row under every order: no size of a tensor depends on what is drawn
                x = torch.where(picked == k, self._draw(rows, context, k), x)
        if self.units is not None:
            x, _ = self.units.inverse(x)
        shaped: Tensor = x.unflatten(-1, self.event_shape)
        return shaped

    def _draw(self, rows: int, context: Tensor | None, k: int) -> Tensor:
        order = None if self.orders is None else self._orders[k]
        positions = range(self.features) if self.orders is None else self.orders[k]
        drawn: dict[int, Tensor] = {}

        def step(i: int, numbers: Tensor) -> Tensor:
            value: Tensor = self.likelihood.each(numbers, positions[i]).sample()
            drawn[positions[i]] = value
            return self.embed(value)

        self.net.unroll(step, rows, context, order)
        return torch.stack([drawn[i] for i in range(self.features)], -1)


class AutoregressiveDistribution(TorchDistribution):
    """Joint distribution of values that each depend on those before them.

    It holds the weights that the network has when it is made (`snapshot`). Draws are not differentiable in the weights
    (``has_rsample`` is False): for discrete values there is no such derivative, and mixtures pick a component.

    Args:
        conditionals: the network and its likelihood.
        context: ``(*batch, context_features)``, where the network takes one; the batch shape is ``()`` without.
    """

    arg_constraints = {}  # noqa: RUF012
    has_rsample = False

    def __init__(
        self, conditionals: Conditionals, context: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        self.conditionals = cast(Conditionals, snapshot(conditionals))
        self.context = context
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, conditionals.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        return constraints.independent(self.conditionals.likelihood.support, self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressiveDistribution:
        new: AutoregressiveDistribution = self._get_checked_instance(AutoregressiveDistribution, _instance)
        new.conditionals, new.context = self.conditionals, self.context  # broadcast where it is used
        torch.empty(self.batch_shape, device="meta").expand(batch_shape)  # torch's own error if it cannot be
        super(AutoregressiveDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_p = self.conditionals.log_prob(value, self.context)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        batch = torch.Size((*sample_shape, *self.batch_shape))
        context = self.context
        if context is not None:
            context = context.expand(*batch, context.shape[-1]).reshape(batch.numel(), context.shape[-1])
        return self.conditionals.sample(batch.numel(), context).reshape(*batch, *self.event_shape)
