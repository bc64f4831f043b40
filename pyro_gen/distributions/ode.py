r"""The distribution of what an ODE makes of noise, :math:`x = T(z)` with :math:`z \sim N(0, I)`, as one Pyro site.

.. math:: \log p(x) = \log N(T^{-1}(x); 0, I) + \log|\det \partial z / \partial x| .

A sampler should not move in x, whose modes lie apart, but in z, where the prior is N(0, I). So the support of this
distribution is a constraint with T for its bijection: ``biject_to(support)`` is what Pyro's NUTS, HMC and autoguides
ask for, and they then work in z without being told. Their potential is

.. math:: -\log p(x) - \log p(y \mid x) - \log|\det \partial x / \partial z| ,

in which the log-determinant L stands twice, with opposite signs: what is left is :math:`-\log N(z) - \log p(y \mid x)`,
and the gradient of L, a second derivative of the network along the whole solve, is not needed. Two things see to it:

- L is computed once, with x, and the density of that very tensor x is :math:`\log N(z) - L` with the same L, as long as
  neither x nor z nor a weight has been written to;
- x and L are one node of the graph, with the Jacobian of the solve beside it. Its backward is a product with that
  Jacobian; only where a gradient of L arrives that is not 0 is the solve run again and differentiated. In the potential
  +1 and -1 have met before they arrive; whoever differentiates log p alone gets its gradient.

The density of a draw made by the bijection depends on z in the graph, as with the cached transforms of torch: for its
gradient in x ask at ``x.detach().requires_grad_()``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_gen.distributions.transport import Accuracy, Transport

__all__ = ["Course", "ODEDistribution"]


@dataclass(frozen=True, eq=False)
class Course:
    """The way of some rows along a transport: from noise to data, or back, with exact log-determinants.

    Attributes:
        transport, accuracy: the ODE and how it is solved; planned: by the plan of the transport.
        context: of each row, or None. to_noise: the direction. watch: the plan keeps the tolerance for the
            log-determinant too, where it is asked for.
    """

    transport: Transport
    accuracy: Accuracy
    context: Tensor | None
    to_noise: bool
    planned: bool = True
    watch: bool = False

    def go(self, w: Tensor, *, trace: bool = True, jacobian: bool = False, graph: bool = False) -> tuple[Any, ...]:
        """w at the other end, and as they are asked for log|det| ``(rows,)`` and the Jacobian ``(rows, D, D)``."""
        solved = self.transport.solve(
            w,
            self.context,
            self.accuracy,
            to_noise=self.to_noise,
            exact=trace,
            jacobian=jacobian,
            graph=graph,
            planned=self.planned,
            watch=self.watch and trace,
        )
        return solved.w, None if solved.ladj is None else solved.ladj[:, 0], solved.jacobian

    def weights(self) -> list[Tensor]:
        """What has a gradient beside w."""
        held = [*self.transport.tensors(), *([] if self.context is None else [self.context])]
        return [t for t in held if t.requires_grad]

    def carry(self, w: Tensor, *, weights: bool = True) -> tuple[Tensor, Tensor]:
        """w at the other end and log|det|, differentiable in w, and in weights and context if ``weights``."""
        others = self.weights() if weights and torch.is_grad_enabled() else []
        if not (torch.is_grad_enabled() and (w.requires_grad or others)):
            with torch.no_grad():
                return self.go(w)[:2]
        end, ladj = cast(tuple[Tensor, Tensor], _Carried.apply(self, w))
        if others:  # a node of its own: autograd visits it only where a weight's gradient is asked for
            more, extra = cast(tuple[Tensor, Tensor], _Weighed.apply(self, w.detach(), *others))
            end, ladj = end + more, ladj + extra
        return end, ladj


class _Carried(torch.autograd.Function):
    """(w', L) of w: the backward of w' by the Jacobian, of L by running the solve again, where it is not 0."""

    @staticmethod
    def forward(ctx: Any, course: Course, w: Tensor) -> tuple[Tensor, Tensor]:
        end, ladj, jacobian = course.go(w.detach(), jacobian=True)
        ctx.course = course
        ctx.save_for_backward(w, jacobian)
        return end, ladj

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        w, jacobian = ctx.saved_tensors
        again = torch.is_grad_enabled()  # derivatives of the gradient are asked for
        if not again and not bool(gradients[1].any()):
            return None, torch.einsum("ri,rij->rj", gradients[0].to(jacobian), jacobian).to(w)
        with torch.enable_grad():
            source = w if again else w.detach().requires_grad_()
            end, ladj, _ = ctx.course.go(source, graph=True)
            (found,) = torch.autograd.grad((end, ladj), (source,), gradients, create_graph=again)
        return None, found


class _Weighed(torch.autograd.Function):
    """Zeros with the derivative of (w', L) in weights and context."""

    @staticmethod
    def forward(ctx: Any, course: Course, w: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        ctx.course, ctx.others = course, others
        ctx.save_for_backward(w, *others)
        return torch.zeros_like(w, dtype=torch.float64), w.new_zeros(len(w), dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        w = ctx.saved_tensors[0]  # reading them is what notices a weight written to in between
        others = ctx.others
        with torch.enable_grad():
            end, ladj, _ = ctx.course.go(w, graph=True)
            found = torch.autograd.grad((end, ladj), others, gradients, allow_unused=True)
        return None, None, *(torch.zeros_like(t) if g is None else g for t, g in zip(others, found, strict=True))


# ------------------------------------------------------------------------------------------- the support and its map
class _Drawn(NamedTuple):
    """What was found with a draw x: z, L, and of what it was found."""

    z: Tensor
    ladj: Tensor
    x_version: int
    settings: tuple[Any, ...]
    held: list[Tensor]
    versions: list[int]


_DRAWN: Any = WeakTensorKeyDictionary()  # x to what is known of it, as long as x lives


class _Reached(constraints.Constraint):
    """The reals, which an ODE reaches from noise; `biject_to` and `transform_to` give the ODE."""

    is_discrete = False

    def __init__(self, distribution: ODEDistribution) -> None:
        self.distribution, self.event_dim = distribution, len(distribution.event_shape)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return cast(Tensor, constraints.independent(constraints.real, self.event_dim).check(value))


class _FromNoise(Transform):
    """x = T(z) as a transform; the weights are as they are, and not differentiated."""

    bijective = True

    def __init__(self, distribution: ODEDistribution) -> None:
        super().__init__()
        self.distribution = distribution
        self.domain = constraints.independent(constraints.real, len(distribution.event_shape))
        self.codomain = _Reached(distribution)

    def _call(self, x: Tensor) -> Tensor:
        return self.distribution.decode(x, weights=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        known = self.distribution.known(y)
        return self.distribution.encode(y, weights=False)[0] if known is None else known.z

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        known = self.distribution.known(y)
        if known is not None and known.z is x:
            return known.ladj
        return self.distribution.decode(x, weights=False)[1]


def _from_noise(constraint: _Reached) -> _FromNoise:
    return _FromNoise(constraint.distribution)


for registry in (biject_to, transform_to):
    registry.register(_Reached, _from_noise)


# --------------------------------------------------------------------------------------------------- the distribution
class ODEDistribution(TorchDistribution):
    r"""The distribution of x = T(z), z ~ N(0, I) and T the solution of an ODE: a trained diffusion as a Pyro site.

    Draws are differentiable, in weights and context too; ``log_prob`` has the exact trace and is differentiable. NUTS
    and HMC move in z by themselves: ``biject_to(support)`` is T.

    Args:
        transport: the ODE.
        accuracy: of draws and of the bijection. density: of ``log_prob``, and there in nats too.
        context: ``(*batch_shape, *context_shape)``, which makes a batch of distributions.
        exact: whether the trace may be computed exactly, as densities need.

    Raises:
        ArithmeticError: at any use, where the ODE misses its tolerance.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        transport: Transport,
        accuracy: Accuracy,
        context: Tensor | None = None,
        *,
        density: Accuracy | None = None,
        exact: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        self.transport, self.accuracy, self.context, self.exact = transport, accuracy, context, exact
        self.density = accuracy if density is None else density
        shape = transport.program.context_shape
        batch = torch.Size() if context is None or shape is None else context.shape[: context.dim() - len(shape)]
        super().__init__(batch, transport.event_shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        return _Reached(self)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ODEDistribution:
        new: ODEDistribution = self._get_checked_instance(ODEDistribution, _instance)
        new.__dict__.update(self.__dict__)
        batch = torch.Size(batch_shape)
        if self.context is not None:
            new.context = self.context.expand(batch + cast(torch.Size, self.transport.program.context_shape))
        super(ODEDistribution, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    # ---------------------------------------------------------------------------------------------------- both ways
    def _rows(self, value: Tensor) -> tuple[torch.Size, Tensor, Tensor | None]:
        batch = torch.broadcast_shapes(value.shape[: value.dim() - len(self.event_shape)], self.batch_shape)
        rows = value.expand(batch + self.event_shape).reshape(-1, self.transport.size)
        if self.context is None:
            return batch, rows, None
        shape = cast(torch.Size, self.transport.program.context_shape)
        return batch, rows, self.context.expand(batch + shape).reshape(-1, *shape)

    def decode(self, z: Tensor, *, weights: bool = True) -> tuple[Tensor, Tensor]:
        """x = T(z) and log|det dx/dz|: ``(*batch, *event_shape)`` and ``(*batch,)``; both are kept for `log_prob`."""
        self._check_exact()
        batch, rows, context = self._rows(z)
        w, ladj = Course(self.transport, self.accuracy, context, to_noise=False).carry(rows, weights=weights)
        x, more = self.transport.to_data(w)
        x, ladj = x.to(z.dtype).reshape(batch + self.event_shape), (ladj + more).to(z.dtype).reshape(batch)
        held = self._held()
        if not weights:
            _DRAWN[x] = _Drawn(z, ladj, x._version, self._settings(), [z, *held], _versions([z, *held]))
        return x, ladj

    def encode(self, x: Tensor, *, weights: bool = True) -> tuple[Tensor, Tensor]:
        """z = T⁻¹(x) and log|det dz/dx|, likewise."""
        self._check_exact()
        batch, rows, context = self._rows(x)
        w, more = self.transport.from_data(rows)
        z, ladj = self._back(context).carry(w, weights=weights)
        return z.to(x.dtype).reshape(batch + self.event_shape), (ladj + more).to(x.dtype).reshape(batch)

    def _back(self, context: Tensor | None) -> Course:
        return Course(self.transport, self.density, context, to_noise=True, watch=True)

    def _check_exact(self) -> None:
        if not self.exact:
            raise ValueError(
                f"the density of {self.transport.size} features needs as many products with the network at every step: "
                "use its draws as diffusion.noncentered(name), which needs no density, or force it, "
                "method=ProbabilityFlow(force=True)"
            )

    def _held(self) -> list[Tensor]:
        return [*self.transport.tensors(), *([] if self.context is None else [self.context])]

    def _settings(self) -> tuple[Any, ...]:
        return self.accuracy, self.transport.guidance, self.transport.event_shape

    def known(self, x: Tensor) -> _Drawn | None:
        """What was found with x, if it still holds: x, z and all weights are the same tensors, and as they were."""
        drawn: _Drawn | None = _DRAWN.get(x)
        if drawn is None or drawn.x_version != x._version or drawn.settings != self._settings():
            return None
        now = [drawn.z, *self._held()]
        if len(now) != len(drawn.held) or any(a is not b for a, b in zip(now, drawn.held, strict=True)):
            return None
        wanted = torch.is_grad_enabled() and (x.requires_grad or drawn.z.requires_grad)
        return drawn if _versions(now) == drawn.versions and (drawn.ladj.requires_grad or not wanted) else None

    # ---------------------------------------------------------------------------------------- as a distribution
    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, differentiable in weights and context."""
        like = self.transport.template
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        return self.push(torch.normal(like.new_zeros(shape), like.new_ones(shape)))

    def push(self, z: Tensor) -> Tensor:
        """T(z), without its determinant: differentiable in z, weights and context through the steps of the solver."""
        batch, rows, context = self._rows(z)
        course = Course(self.transport, self.accuracy, context, to_noise=False)
        graph = torch.is_grad_enabled() and (z.requires_grad or bool(course.weights()))
        x, _ = self.transport.to_data(course.go(rows, trace=False, graph=graph)[0])
        return x.to(z.dtype).reshape(batch + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x), one value a row; by the exact trace."""
        if self._validate_args:
            self._validate_sample(value)
        known = self.known(value)
        if known is not None:
            z, ladj = known.z, -known.ladj
            # no weight's gradient is in there: those come from a solve of their own, should they be asked for
            ladj = ladj + self._by_weights(value) if torch.is_grad_enabled() else ladj
        else:
            z, ladj = self.encode(value)
        events = len(self.event_shape)
        square = z.square().flatten(z.dim() - events).sum(-1) if events else z.square()
        return ladj - square / 2 - self.transport.size * math.log(2 * math.pi) / 2

    def _by_weights(self, value: Tensor) -> Tensor:
        """0, with the gradient of log p(x) in weights and context at a fixed x."""
        batch, rows, context = self._rows(value.detach())
        course = self._back(context)
        others = course.weights()
        if not others:
            return value.new_zeros(())
        zero = cast(Tensor, _Density.apply(course, self.transport.from_data(rows)[0], *others))
        return zero.to(value.dtype).reshape(batch)


class _Density(torch.autograd.Function):
    """Zeros with the derivative of log N(z) + L in weights and context, for z = T⁻¹(x)."""

    @staticmethod
    def forward(ctx: Any, course: Course, w: Tensor, *others: Tensor) -> Tensor:
        ctx.course, ctx.others = course, others
        ctx.save_for_backward(w, *others)
        return w.new_zeros(len(w), dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        w, others = ctx.saved_tensors[0], ctx.others
        with torch.enable_grad():
            z, ladj, _ = ctx.course.go(w, graph=True)
            value = ladj - z.square().sum(1) / 2
            found = torch.autograd.grad(value, others, gradient, allow_unused=True)
        return None, None, *(torch.zeros_like(t) if g is None else g for t, g in zip(others, found, strict=True))


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]
