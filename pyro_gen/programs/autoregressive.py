r"""The autoregressive model: Z is built in, one conditional at a time.

Any joint density is a product of conditionals,

.. math:: p_\theta(x) = \prod_{i=1}^{D} p_\theta(x_i \mid x_1, …, x_{i-1}) ,

and where each factor is a distribution over one value, whose sum or integral is one in closed form, so is their
product, whatever networks give their parameters: Z = 1 needs no guide. Summing the product over x_D, then x_{D-1}, …
shows it. The price is order: drawing x takes D steps, each after the one before.

One masked network gives the parameters of all conditionals at once (MADE): hidden unit j sees the values up to its
degree, output block i units of lower degree, so that block i depends on the values before i alone. The log-density of
a batch is one pass; a draw, value by value, computes each hidden unit once, also the work of one pass.

What the conditionals are is what the data are: Bernoulli for binary data, a softmax for levels without order, mixtures
of logistics for real data and, binned, for levels with an order (PixelCNN++). With a linear network and normal
conditionals of constant scale the model is every Gaussian: the rows of its weights are the regressions of the modified
Cholesky decomposition of the precision.

The order is a choice, and a model of one order treats the first values unlike the last. A mixture over several orders
of the same weights hedges: :math:`p = \frac{1}{K}\sum_k p_k`, exactly normalised, K passes a density.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from pyro_gen.base import Exact, context_error, event_names
from pyro_gen.checks import as_shape, check_count, check_sizes, describe
from pyro_gen.distributions.autoregressive import AutoregressiveDistribution, Conditionals
from pyro_gen.distributions.likelihoods import likelihood as named_likelihood

__all__ = ["Autoregressive"]

COMPONENTS = 5  # of the mixtures of logistics
MIXTURES = ("discretized_logistic", "mixture_of_logistics")


class Chain(nn.Module):
    """The model: x from the product of its conditionals."""

    def __init__(self, conditionals: Conditionals) -> None:
        super().__init__()
        self.conditionals = conditionals
        shape = conditionals.event_shape
        self.event_names = event_names(shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        given = self.distribution(context)  # before the plate: a weight with a prior is drawn once, not once a row
        with pyro.plate("data", x.shape[0]):
            names: Any = {"event_dims": self.event_names}
            return pyro.sample("x", given, obs=x, infer=names)

    def distribution(self, context: Tensor | None = None, batch_dim: int = 1) -> AutoregressiveDistribution:
        """p(x | context), its batch shape that of the context."""
        if context is not None:
            context = context.reshape(*context.shape[:batch_dim], self.conditionals.context_features)
        return AutoregressiveDistribution(self.conditionals, context)


class Autoregressive(Exact):
    r"""Autoregressive model: :math:`p(x) = \prod_i p(x_i \mid x_{<i})`, its Z built in, conditional by conditional.

    Args:
        event_shape: shape of one datum, an int or a tuple; values come in the order of the flattened datum (of an
            image, channel by channel and row by row), unless ``order`` says otherwise.
        likelihood: of a value given those before it: ``"bernoulli"`` (0 or 1), ``"categorical"`` (levels without
            order, 0 … levels − 1), ``"discretized_logistic"`` (levels with an order: a mixture of logistics, binned),
            ``"mixture_of_logistics"`` or ``"normal"`` (real data).
        hidden: hidden sizes of the masked network; ``()`` is linear.
        context_shape: shape of what a row is conditioned on.
        levels: number of levels of ``"categorical"`` and ``"discretized_logistic"``.
        components: size of the mixtures of logistics; None is 5.
        scale: of ``"normal"``: ``"predicted"`` (default) from the values before, or ``"feature"``, one for each value.
        order: which value comes first, second, …: a permutation of 0 … D − 1; None as they stand.
        orders: number K of orders in a uniform mixture; the first is ``order``, the others are drawn once and for all,
            the same for every program of D values. Density, draw and training step cost K passes.
        one_hot: how levels enter the network: as a vector of zeros and a one, or as a number in [−1, 1]; None is the
            vector for ``"categorical"``, the number for others.

    Real data and contexts are standardised inside, by mean and standard deviation of what the first `fit` sees
    (:meth:`initialise`); densities and draws are in the units of the data all the same.

    Raises:
        ValueError: for unknown names, sizes below 1, an order that is no permutation, or options that do not go
            together.

    References:
        M. Germain et al., "MADE: Masked autoencoder for distribution estimation", 2015, arXiv:1502.03509.
        T. Salimans et al., "PixelCNN++", 2017, arXiv:1701.05517, eq. 2 (binned mixtures).
        B. Uria, I. Murray, H. Larochelle, "A deep and tractable density estimator", 2014, arXiv:1310.1757 (mixtures
        over orders).

    Example:
        >>> import torch
        >>> model = Autoregressive(3, hidden=(16,))
        >>> x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
        >>> model.log_prob(x).exp().sum().round(decimals=5)
        tensor(1., grad_fn=<RoundBackward1>)
        >>> model.sample(5, seed=0).shape, model.distribution().event_shape
        (torch.Size([5, 3]), torch.Size([3]))
    """

    model: Chain

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        likelihood: str = "bernoulli",
        hidden: Sequence[int] = (128, 128),
        *,
        context_shape: int | tuple[int, ...] | None = None,
        levels: int | None = None,
        components: int | None = None,
        scale: Literal["predicted", "feature"] | None = None,
        order: Sequence[int] | None = None,
        orders: int = 1,
        one_hot: bool | None = None,
    ) -> None:
        event = as_shape(event_shape)
        context = None if context_shape is None else as_shape(context_shape, "context_shape")
        hidden = check_sizes(hidden)
        if not isinstance(likelihood, str):
            raise ValueError(f"likelihood must be a name such as 'bernoulli', got {describe(likelihood)}")
        if likelihood == "normal" and scale not in (None, "predicted", "feature"):
            raise ValueError(f"scale must be 'predicted' or 'feature' (or None), got {describe(scale)}")
        observe = named_likelihood(
            likelihood,
            torch.Size([event.numel()]),
            scale="predicted" if scale is None and likelihood == "normal" else scale,
            levels=levels,
            components=COMPONENTS if components is None and likelihood in MIXTURES else components,
        )
        if one_hot not in (None, True, False):
            raise ValueError(f"one_hot must be True, False or None, got {describe(one_hot)}")
        if one_hot and observe.levels is None:
            raise ValueError(
                f"one_hot=True belongs to data with levels, not to likelihood={likelihood!r}: leave it out"
            )
        conditionals = Conditionals(
            event,
            observe,
            hidden,
            0 if context is None else context.numel(),
            _orders(order, check_count(orders, "orders"), event.numel()),
            likelihood == "categorical" if one_hot is None else one_hot,
        )
        super().__init__(Chain(conditionals), tuple(event), None if context is None else tuple(context))
        self.config = {
            "event_shape": list(event),
            "likelihood": likelihood,
            "hidden": list(hidden),
            "context_shape": None if context is None else list(context),
            "levels": levels,
            "components": components,
            "scale": scale,
            "order": None if order is None else [int(i) for i in order],
            "orders": orders,
            "one_hot": one_hot,
        }

    def check(self, x: Any, context: Any = None) -> tuple[Tensor, ...]:
        batch = super().check(x, context)
        if torch.distributions.Distribution._validate_args:
            self.model.conditionals.likelihood.check(batch[0])
        return batch

    def check_training(self, x: Tensor) -> None:
        self.model.conditionals.likelihood.check_training(x)

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Take location and scale of real data, and of contexts, from those given: once, before training begins."""
        self.model.conditionals.initialise(*self.check(x, context))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p of each row: ``(rows,)``, in nats; one pass of the network (one an order)."""
        x, *given = self.check(x, context)
        return self.model.conditionals.log_prob(x, *(c.flatten(1) for c in given))

    def distribution(self, context: Tensor | None = None) -> AutoregressiveDistribution:
        """p(x), or p(x | context), with the weights of now, for any ``pyro.sample``.

        Args:
            context: ``(*batch, *context_shape)``, for a conditional program.

        Returns:
            A distribution of event shape ``event_shape`` and the batch shape of the context, ``()`` without one.

        Raises:
            ValueError: if a context is missing, misshapen, or given to a program without one.
        """
        if (context is None) != (self.context_shape is None):
            raise ValueError(context_error(self.context_shape))
        if context is None or self.context_shape is None:
            return self.model.distribution()
        want = tuple(self.context_shape)
        if not isinstance(context, Tensor) or tuple(context.shape[-len(want) :]) != want:
            given = f"of shape {tuple(context.shape)}" if isinstance(context, Tensor) else describe(context)
            raise ValueError(f"context must be a tensor of shape (*batch, {', '.join(map(str, want))}), got {given}")
        return self.model.distribution(context, context.dim() - len(want))


def _orders(order: Sequence[int] | None, count: int, features: int) -> list[list[int]] | None:
    """The orders of a mixture, or None for the one in which the values stand."""
    if order is None:
        first = list(range(features))
    else:
        try:
            first = [int(i) for i in order]
        except (TypeError, ValueError) as error:
            raise ValueError(f"order must be a permutation of 0 … {features - 1}, got {describe(order)}") from error
        if sorted(first) != list(range(features)):
            raise ValueError(f"order must be a permutation of 0 … {features - 1}, got {describe(order)}")
    if order is None and count == 1:
        return None
    generator = torch.Generator().manual_seed(0)  # the configuration alone says which orders
    return [first, *(torch.randperm(features, generator=generator).tolist() for _ in range(count - 1))]
