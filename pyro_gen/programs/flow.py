r"""The normalising flow: Z is made tractable, by a change of variables.

.. math:: x = f^{-1}(z),\quad z \sim p_Z, \qquad
          \log p(x) = \log p_Z(f(x)) + \log\left|\det \frac{\partial f}{\partial x}\right| .

Volume is conserved whatever the weights of f, so the density is normalised by construction, Z = 1, and no guide is
needed: the likelihood itself is maximised. The price is in f, which has to be invertible with a determinant that is
cheap: triangular Jacobians (autoregressive, coupling), low rank (Sylvester), or the trace of a vector field
(continuous). Sampling pushes noise through the inverse.

One direction of an autoregressive layer is a single pass of its network, the other goes feature by feature:
``direction`` says which is to be fast, the density of data (to fit them, and as a prior or likelihood) or the draws and
their own density (as a guide).

The flow begins at the user's data, in their units and on their support: an end (logit, softplus, stick-breaking) from
the support to the real line, then standardisation by the training data. Both are parts of f, so their Jacobians are in
log p(x): nats refer to x as it was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_gen.base import Exact, context_error, event_names
from pyro_gen.checks import as_shape, check_sizes, describe
from pyro_gen.distributions.bases import base_of
from pyro_gen.distributions.flow import FlowDistribution, support_of
from pyro_gen.distributions.likelihoods import refuse_constant
from pyro_gen.nn.snapshot import snapshot
from pyro_gen.transforms import Bijection, Compose, Interval, Rescale, Standardise, StickBreaking
from pyro_gen.transforms.stacks import ActivationName, Mixing, TransformName, check_transform, stack

__all__ = ["Flow"]

Support = Literal["real", "positive", "unit", "simplex"] | tuple[Any, Any]


class FlowModel(nn.Module):
    """The model: x, the inverse image of noise."""

    started: Tensor

    def __init__(
        self,
        bijection: Bijection,
        base: nn.Module,
        event_shape: torch.Size,
        context_shape: torch.Size | None,
        stepwise: Literal["log_prob", "rsample"] | None,
    ) -> None:
        super().__init__()
        self.bijection, self.base, self.stepwise = bijection, base, stepwise
        self.event_shape, self.context_shape = event_shape, context_shape
        self.context = None if context_shape is None else Standardise(context_shape.numel())
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        distribution = self.distribution(context)
        with pyro.plate("data", x.shape[0]):
            names: Any = {"event_dims": event_names(self.event_shape)}
            return pyro.sample("x", distribution, obs=x, infer=names)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """p(x | context), with the weights of now."""
        held = cast(FlowModel, snapshot(self))
        if context is not None and held.context is not None:
            context, _ = held.context(self.flat(context))
        return FlowDistribution(held.bijection, held.base(), context, self.event_shape, stepwise=self.stepwise)

    def flat(self, context: Tensor) -> Tensor:
        """The context as vectors, ``(*batch_shape, C)``."""
        assert self.context_shape is not None
        return context.reshape(*context.shape[: context.dim() - len(self.context_shape)], self.context_shape.numel())


class Flow(Exact):
    r"""Normalising flow: :math:`\log p(x) = \log p_Z(f(x)) + \log|\det \partial f/\partial x|`, so Z = 1.

    Args:
        event_shape: shape of one datum, an int or a tuple; events of a higher rank are taken in raster order.
        transform: ``"spline_autoregressive"`` (NSF-AR), ``"spline_coupling"`` (NSF-C), ``"affine_autoregressive"``
            (MAF; IAF for ``direction="sampling"``), ``"affine_coupling"`` (RealNVP), ``"additive_coupling"`` (NICE),
            ``"circular_autoregressive"`` or ``"circular_coupling"`` (angles in [−π, π]), ``"linear"`` (a Gaussian),
            ``"sylvester"``, ``"block_autoregressive"`` (BNAF), ``"continuous"`` (FFJORD); or a `Bijection` from data to
            noise.
        layers: number of layers; hidden: sizes of the hidden layers of each layer's network.
        context_shape: shape of what a row is conditioned on.
        direction: what is fast: ``"density"`` of data, or ``"sampling"`` and the density of own draws.
        base: ``"normal"``, ``"student_t"`` (learnt degrees of freedom: heavy tails), ``"mixture"`` (learnt,
            ``components`` Gaussians), ``"uniform"`` (on a box; on a torus, where ``"normal"`` means it too), a
            distribution of event shape ``(D,)``, or a module that gives one.
        support: where the data lie: ``"real"``, ``"positive"``, ``"unit"`` (0 to 1), ``"simplex"``, or a pair of ends
            ``(low, high)``, numbers or one for each feature, infinite ones allowed.
        standardise: centre and scale by the training data, inside the density: ``fit`` does it, or call `initialise`.
        mixing: what stands between layers: ``"lu"``, ``"rotation"``, ``"permutation"`` or ``"flip"``.
        bins, bound: of the splines: bins on [−bound, bound].
        activation: of the networks: ``"silu"``, ``"gelu"``, ``"tanh"`` (smooth densities, with a score everywhere), or
            ``"relu"`` (kinks; nearer to data with edges).

    Raises:
        ValueError: for unknown names, or options that do not go together.

    References:
        G. Papamakarios et al., "Normalizing flows for probabilistic modeling and inference", 2021, arXiv:1912.02762,
        eq. 6; C. Durkan et al., "Neural spline flows", 2019, arXiv:1906.04032.

    Example:
        >>> flow = Flow(2, layers=2, hidden=(16,))
        >>> x = flow.sample(5, seed=0)
        >>> flow.log_prob(x).shape, flow.distribution().event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    model: FlowModel

    def __init__(
        self,
        event_shape: int | tuple[int, ...],
        transform: TransformName | Bijection = "spline_autoregressive",
        layers: int = 3,
        hidden: Sequence[int] = (128, 128),
        context_shape: int | tuple[int, ...] | None = None,
        direction: Literal["density", "sampling"] = "density",
        *,
        base: str | Distribution | nn.Module = "normal",
        support: Support = "real",
        standardise: bool = True,
        mixing: Mixing | None = None,
        bins: int = 8,
        bound: float = 5.0,
        components: int = 10,
        activation: ActivationName = "silu",
    ) -> None:
        event = as_shape(event_shape)
        if not len(event):
            raise ValueError("event_shape must have at least one dimension: a flow of numbers is one of vectors of 1")
        context = None if context_shape is None else as_shape(context_shape, "context_shape")
        hidden = check_sizes(hidden)
        name = transform if isinstance(transform, Bijection) else check_transform(transform)
        torus = isinstance(name, str) and name.startswith("circular")
        box = base == "uniform" and not torus
        if box and not (isinstance(name, str) and name.startswith("spline")):
            raise ValueError("base='uniform' is for flows that stay in a box or on a torus: splines, or circular ones")
        if torus and base in ("student_t", "mixture"):
            raise ValueError(f"base={base!r} has mass beyond the angles in [−π, π]: on a torus use base='uniform'")
        if isinstance(name, Bijection) and standardise and not _on_reals(name):
            raise ValueError(f"transform stands on {name.domain}, and standardising leaves it: pass standardise=False")
        ends = _ends(support, event, torus, bound if box else None)
        features = ends[-1].out_features if ends else event.numel()
        if standardise and not torus and not box:
            ends.append(Standardise(features))
        core = _core(
            name, features, layers, hidden, 0 if context is None else context.numel(), direction,
            bins=bins, bound=bound, mixing="flip" if box and mixing is None else mixing,
            activation=activation,
        )  # fmt: skip
        if box and mixing in ("lu", "rotation"):
            raise ValueError(f"mixing={mixing!r} would leave the box of base='uniform': use 'flip' or 'permutation'")
        noise = base_of(
            "uniform" if torus and base == "normal" else base,
            core.out_features,
            bound=math.pi if torus else bound,
            components=components,
        )
        bijection = Compose([*ends, core]) if ends else core
        super().__init__(
            FlowModel(bijection, noise, event, context, _stepwise(name, direction)),
            tuple(event),
            None if context is None else tuple(context),
        )
        self.support = "angles in [−π, π]" if torus else _named(support)
        if isinstance(name, str) and isinstance(base, str):
            self.config = {
                "event_shape": list(event),
                "transform": name,
                "layers": layers,
                "hidden": list(hidden),
                "context_shape": None if context is None else list(context),
                "direction": direction,
                "base": base,
                "support": support if isinstance(support, str) else [_listed(end) for end in support],
                "standardise": standardise,
                "mixing": mixing,
                "bins": bins,
                "bound": bound,
                "components": components,
                "activation": activation,
            }

    def check(self, x: Any, context: Any = None) -> tuple[Tensor, ...]:
        batch = super().check(x, context)
        if is_validation_enabled() and not batch[0].is_meta:
            inside = support_of(self.model.bijection, self.event_shape).check(batch[0])
            if not bool(inside.all()):
                row = int((~inside).nonzero()[0])
                raise ValueError(
                    f"x lies outside the support of this flow ({self.support}) in {int((~inside).sum())} of "
                    f"{len(inside)} rows, first in row {row}: build it with another support=, or drop those rows"
                )
        return batch

    def check_training(self, x: Tensor) -> None:
        refuse_constant(x, "dequantise whole numbers (pg.datasets.dequantize)", "a density rises without end, and")

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Standardise by the rows of x (and of the context), and start every layer that starts from data; once."""
        if bool(self.model.started):
            return
        x, *rest = self.check(x, context)
        if self.model.context is not None:
            flat = self.model.flat(rest[0])
            self.model.context.initialise(flat)
            rest = [self.model.context(flat)[0]]
        self.model.bijection.initialise(x.reshape(x.shape[0], -1), *rest)
        self.model.started.fill_(True)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p of each row: ``(rows,)``, in nats of the data as they are given."""
        x, *rest = self.check(x, context)
        return self.model.distribution(*rest).log_prob(x)

    @property
    def stochastic(self) -> bool:
        """Whether log p is estimated: the trace of a continuous flow of many features is."""
        return self.model.bijection.stochastic

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """p(x), or p(x | context), as a Pyro distribution with differentiable draws.

        Args:
            context: ``(*batch_shape, *context_shape)``; the distribution then has that batch shape.
        """
        if (context is None) != (self.context_shape is None):
            raise ValueError(context_error(self.context_shape))
        if context is not None and self.context_shape is not None:
            ndim = len(self.context_shape)
            if context.shape[context.dim() - ndim :] != self.context_shape or context.dim() < ndim:
                wanted = ", ".join(("*batch_shape", *map(str, self.context_shape)))
                raise ValueError(f"context must have shape ({wanted}), got {tuple(context.shape)}")
        return self.model.distribution(context)


def _ends(support: Any, event: torch.Size, torus: bool, box: float | None) -> list[Bijection]:
    """From the support of the data to the real line, or to the box [−box, box]."""
    features = event.numel()
    named = {"real": None, "positive": (0.0, math.inf), "unit": (0.0, 1.0), "simplex": "simplex"}
    if isinstance(support, str):
        if support not in named:
            raise ValueError(f"support must be one of {', '.join(named)}, or a pair (low, high); got {support!r}")
        ends: Any = named[support]
    else:
        ends = tuple(support) if isinstance(support, (tuple, list)) else ()
        if len(ends) != 2:
            raise ValueError(
                f"support must be one of {', '.join(named)}, or a pair (low, high); got {describe(support)}"
            )
    if torus:
        if ends is not None:
            raise ValueError("a circular transform has a support of its own, the angles in [−π, π]: leave support= out")
        return []
    if box is not None:
        if ends is None or ends == "simplex" or not all(isinstance(e, (int, float)) and math.isfinite(e) for e in ends):
            raise ValueError(
                f"base='uniform' needs data on an interval, support=(low, high) with finite numbers, got "
                f"{describe(support)}"
            )
        return [Rescale(features, ends[0], ends[1], box)]
    if ends is None:
        return []
    if ends == "simplex":
        if len(event) != 1:
            raise ValueError(f"support='simplex' is for events of one dimension, got event_shape {tuple(event)}")
        return [StickBreaking(features)]
    low, high = (torch.as_tensor(e, dtype=torch.get_default_dtype()) if isinstance(e, list) else e for e in ends)
    return [Interval(low, high, features)]


def _core(
    transform: str | Bijection,
    features: int,
    layers: int,
    hidden: tuple[int, ...],
    context_features: int,
    direction: Any,
    **options: Any,
) -> Bijection:
    if not isinstance(transform, str) and direction != "density":
        raise ValueError(
            "direction= belongs to transforms by name: a Bijection is what it is, Inverse(...) turns it round"
        )
    if isinstance(transform, str):
        return stack(transform, features, layers, hidden, context_features, direction, **options)
    if (transform.features, transform.context_features) != (features, context_features):
        raise ValueError(
            f"transform is of {transform.features} features and {transform.context_features} of context, and "
            f"event_shape, support and context_shape ask for {features} and {context_features}"
        )
    return transform


def _stepwise(transform: str | Bijection, direction: str) -> Literal["log_prob", "rsample"] | None:
    if not (isinstance(transform, str) and transform.endswith("autoregressive")):
        return None
    return "rsample" if direction == "density" else "log_prob"


def _on_reals(bijection: Bijection) -> bool:
    domain = bijection.domain
    return isinstance(domain, constraints.independent) and domain.base_constraint is constraints.real


def _named(support: Any) -> str:
    """A support in a few words."""
    if isinstance(support, str):
        return support
    low, high = (f"{e:g}" if isinstance(e, (int, float)) else "one for each feature" for e in support)
    return f"from {low} to {high}"


def _listed(end: Any) -> Any:
    return end.tolist() if isinstance(end, Tensor) else list(end) if isinstance(end, tuple) else end
