r"""The distribution of a bijection of noise: a change of variables as one Pyro site.

With z of a known density p_Z and x = f⁻¹(z),

.. math:: \log p_X(x) = \log p_Z(f(x)) + \log|\det \partial f/\partial x| ,

so Z = 1 whatever the weights of f. torch has the same formula in ``TransformedDistribution``, at two costs: it visits a
transform once for the value and once for the determinant, and it remembers, by the identity of a tensor, answers
computed with weights that may have changed since. Here a bijection gives value and determinant in one pass, and

- a distribution holds the weights of the moment it was made (`snapshot`), one drawn from a prior too;
- the density of a draw made by ``pyro.sample`` comes with the draw, in the same pass. It is used for that very tensor,
  and computed afresh once the tensor or a weight has been written to, or a gradient is asked for that it cannot give.

Batch dimensions come from the context (and from ``expand``), the event is the shape of the data, of any rank.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_gen.checks import as_shape, describe
from pyro_gen.distributions.held import tensors_of
from pyro_gen.nn.snapshot import snapshot
from pyro_gen.transforms.bijections import Bijection

__all__ = ["FlowDistribution", "support_of"]


class FlowDistribution(TorchDistribution):
    r"""The distribution of x = f⁻¹(z), z of a base distribution; Z = 1.

    Args:
        bijection: f, from data to noise, of D features (events of a higher rank are flattened to it).
        base: distribution of z, of event shape ``(D,)``.
        context: ``(*batch_shape, C)`` for a bijection with a context, which makes a batch of distributions.
        event_shape: shape of x; ``(D,)`` by default.
        stepwise: the call that goes feature by feature, ``"log_prob"`` or ``"rsample"``, if one does: training through
            it is slow, which is said once.

    References:
        D. J. Rezende, S. Mohamed, "Variational inference with normalizing flows", 2015, arXiv:1505.05770, eq. 5.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_gen.transforms import Coupling, Spline
        >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> d = FlowDistribution(Coupling(Spline(), 3, (8,)), base)
        >>> x, log_prob = d.rsample_and_log_prob((5,))
        >>> x.shape, torch.allclose(log_prob, d.log_prob(x), atol=1e-4)
        (torch.Size([5, 3]), True)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        bijection: Bijection,
        base: Distribution,
        context: Tensor | None = None,
        event_shape: int | tuple[int, ...] | None = None,
        *,
        stepwise: Literal["log_prob", "rsample"] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(bijection, Bijection):
            raise TypeError(f"bijection must be a Bijection, got {describe(bijection)}")
        event = torch.Size((bijection.features,)) if event_shape is None else as_shape(event_shape)
        if event.numel() != bijection.features or not (
            len(event) == 1 or isinstance(bijection.domain, constraints.independent)
        ):
            raise ValueError(
                f"event_shape must be ({bijection.features},), or a shape of as many numbers where each number has a "
                f"support of its own; got {tuple(event)} and the domain {bijection.domain}"
            )
        noise = bijection.out_features
        if tuple(base.event_shape) != (noise,):
            raise ValueError(
                f"base must have event shape ({noise},), the vectors that bijection gives; got event "
                f"{tuple(base.event_shape)}, batch {tuple(base.batch_shape)}"
            )
        if bijection.context_features and context is None:
            raise ValueError(
                f"bijection needs a context of {bijection.context_features} features: pass context, "
                f"(*batch_shape, {bijection.context_features})"
            )
        if context is not None and context.shape[-1:] != (bijection.context_features,):
            raise ValueError(
                f"context must have shape (*batch_shape, {bijection.context_features}), got {tuple(context.shape)}"
            )
        self.bijection = cast(Bijection, snapshot(bijection))
        self.noise, self.context, self.stepwise = base, context, stepwise
        batch = base.batch_shape
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
        self._drawn: tuple[Tensor, Tensor, list[Tensor], list[int]] | None = None
        super().__init__(batch, event, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws are differentiable: those of the base are."""
        return self.noise.has_rsample

    @constraints.dependent_property
    def support(self) -> Any:
        """The domain of the bijection, in the shape of the data."""
        return support_of(self.bijection, self.event_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        new: FlowDistribution = self._get_checked_instance(FlowDistribution, _instance)
        new.__dict__.update(self.__dict__)
        new._drawn = None
        batch = torch.Size(batch_shape)
        if self.context is not None:
            new.context = self.context.expand(batch + self.context.shape[-1:])
        super(FlowDistribution, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    # ---------------------------------------------------------------------------------------------------- both at once
    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Draws and their log-densities from one pass: ``(*sample, *batch, *event)`` and ``(*sample, *batch)``."""
        base = self.noise.expand(self.batch_shape)
        z = base.rsample(sample_shape) if base.has_rsample else base.sample(sample_shape)
        x, ladj = self.bijection.inverse(z, self.context)
        return x.reshape(x.shape[:-1] + self.event_shape), base.log_prob(z) - ladj

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, differentiable in the weights and the context."""
        if not self.has_rsample:
            raise NotImplementedError(f"the base, {describe(self.noise)}, has no differentiable draws: use sample")
        return self.rsample_and_log_prob(sample_shape)[0]

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws without a gradient."""
        return self.rsample_and_log_prob(sample_shape)[0]

    def __call__(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """What ``pyro.sample`` calls: a draw, whose log-density is kept with it."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.has_rsample):
            x, log_prob = self.rsample_and_log_prob(sample_shape)
        held = [x, *self._weights(), *([] if self.context is None else [self.context])]
        self._drawn = (x, log_prob, held, _versions(held))
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        if (kept := self._density_of_draw(value)) is not None:
            return kept
        if self._validate_args:
            self._validate_sample(value)
        if self.stepwise == "log_prob" and _is_trained(self.bijection):
            warnings.warn(
                "the density of data is had feature by feature here, as the flow was built with direction='sampling': "
                "training it this way is slow. Build it with direction='density'",
                UserWarning,
                stacklevel=2,
            )
        batch = value.shape[: value.dim() - len(self.event_shape)]
        z, ladj = self.bijection(value.reshape(*batch, self.bijection.features), self.context)
        result: Tensor = self.noise.log_prob(z) + ladj
        return result.expand(torch.broadcast_shapes(batch, self.batch_shape))

    def _weights(self) -> list[Tensor]:
        own = [*self.bijection.parameters(), *self.bijection.buffers()]
        return [*own, *(tensor for _, tensor in tensors_of(self.noise))]

    def _density_of_draw(self, value: Tensor) -> Tensor | None:
        """What was kept with a draw, if this is the draw and what was kept is still so."""
        if self._drawn is None or self._drawn[0] is not value:
            return None
        _, log_prob, held, versions = self._drawn
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in held)
        return log_prob if versions == _versions(held) and (log_prob.requires_grad or not wanted) else None


def _is_trained(bijection: Bijection) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in bijection.parameters())


def support_of(bijection: Bijection, event_shape: torch.Size) -> Any:
    """The domain of a bijection as a constraint on events of another shape."""
    domain = bijection.domain
    if len(event_shape) == 1:
        return domain
    return constraints.independent(domain.base_constraint, len(event_shape) - domain.base_constraint.event_dim)


def _versions(tensors: list[Tensor]) -> list[int]:
    """How often each tensor has been written to."""
    return [0 if t.is_inference() else t._version for t in tensors]
