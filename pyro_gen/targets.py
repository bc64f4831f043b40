r"""A density known up to Z, as samplers and annealing see it: chains in rows, one value a row.

`Target` is what they ask for: :math:`\log f(x)` of a batch of chains, the support, and a normalised *base* p₀ to start
from. Between the two lies a path of densities, by default the geometric one,

.. math:: \log f_\beta(x) = (1 - \beta) \log p_0(x) + \beta \log f(x), \qquad 0 \le \beta \le 1,

whose normalizer at β = 0 is known (``log_base_normalizer``, 0 here) and at β = 1 is the Z that is looked for. A family
that knows a better path, or exact conditional draws (`sweep`), says so by a target of its own.

Chains move in unconstrained space: ``target.unconstrained()`` is the density of :math:`y = T^{-1}(x)`, where T maps the
real space onto the support, with the Jacobian of T in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, biject_to, constraints

__all__ = ["BoltzmannTarget", "Target", "Tempered", "Unconstrained"]


class Target:
    """A density up to Z over one datum, evaluated for many chains at once.

    Attributes:
        event_shape: shape of one datum.
        support: constraint on one datum, of ``event_dim = len(event_shape)``.
        template: empty tensor with the dtype and device of the chains.

    Args:
        log_density: ``(chains, *event_shape)`` to log f, ``(chains,)``.
        log_base: likewise the log-density of the base, normalised; None where there is none.
        sample_base: a number n to n draws of the base; None where there is none.
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        event_shape: torch.Size,
        template: Tensor,
        support: Any = None,
        log_base: Callable[[Tensor], Tensor] | None = None,
        sample_base: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.event_shape, self.template = event_shape, template
        self.support = constraints.independent(constraints.real, len(event_shape)) if support is None else support
        self._log_density, self._log_base, self._sample_base = log_density, log_base, sample_base

    @property
    def log_base_normalizer(self) -> float:
        """log Z of the path at β = 0."""
        return 0.0

    def log_density(self, x: Tensor) -> Tensor:
        """log f of each chain: ``(chains,)``, in nats."""
        return self._log_density(x)

    def log_base(self, x: Tensor) -> Tensor:
        """log p₀ of each chain: ``(chains,)``, normalised.

        Raises:
            ValueError: if the program has no base.
        """
        if self._log_base is None:
            raise no_base()
        return self._log_base(x)

    @property
    def has_base(self) -> bool:
        """Whether there are a normalised base and draws of it."""
        return self._log_base is not None and self._sample_base is not None

    def sample_base(self, n: int) -> Tensor:
        """Exact draws of p₀: ``(n, *event_shape)``.

        Raises:
            ValueError: if the program has no base.
        """
        if self._sample_base is None:
            raise no_base()
        return self._sample_base(n)

    def log_density_at(self, x: Tensor, beta: Tensor | float) -> Tensor:
        """log f_β of each chain: ``(chains,)``."""
        base = self.log_base(x)
        return base + beta * (self.log_density(x) - base)

    def increment(self, x: Tensor, before: Tensor | float, after: Tensor | float) -> Tensor:
        """log f_after − log f_before of each chain: ``(chains,)``."""
        return (after - before) * (self.log_density(x) - self.log_base(x))

    def tempered(self, beta: Tensor | float) -> Target:
        """The density of the path at β, with the same base."""
        return Tempered(self, beta)

    def without_base(self) -> Target:
        """The same density with nothing to start from."""
        return Target(self.log_density, self.event_shape, self.template, self.support)

    def unconstrained(self) -> Target:
        """The density of the chains' unconstrained positions; itself on the real space."""
        return self if is_real(self.support) else Unconstrained(self)

    def to_support(self, y: Tensor) -> Tensor:
        """Positions of :meth:`unconstrained` as points of the support."""
        return y if is_real(self.support) else biject_to(self.support)(y)

    def from_support(self, x: Tensor) -> Tensor:
        """Points of the support as positions of :meth:`unconstrained`."""
        return x if is_real(self.support) else biject_to(self.support).inv(x)

    @property
    def has_sweep(self) -> bool:
        """Whether :meth:`sweep` is there."""
        return False

    def sweep(self, x: Tensor) -> Tensor:
        """One sweep of exact conditional draws that leaves f invariant, for families that know them."""
        raise NotImplementedError(f"{type(self).__name__} knows no conditional draws")

    def value_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log f and its gradient in x, both without a graph: ``(chains,)`` and ``(chains, *event_shape)``."""
        if torch._C._functorch.peek_interpreter_stack() is not None:  # transforms of torch.func refuse requires_grad_

            def total(y: Tensor) -> tuple[Tensor, Tensor]:
                value = self.log_density(y)
                return value.sum(), value

            slope, value = torch.func.grad(total, has_aux=True)(x.detach())
            return value.detach(), slope.detach()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.log_density(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    def check_inside(self, x: Tensor, name: str = "start") -> Tensor:
        """Chains of the right shape, finite, inside the support and where f > 0; a ``ValueError`` otherwise."""
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != tuple(self.event_shape) or not len(x):
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of shape (chains, {_shown(self.event_shape)}), got {given}")
        x = x.to(self.template)
        rows = self.support.check(x).reshape(len(x), -1).all(1)
        if not bool(rows.all()):
            row = int((~rows).nonzero()[0])
            raise ValueError(
                f"{name} lies outside the support ({self.support}) in {int((~rows).sum())} chains, the first of them "
                f"chain {row}"
            )
        value = self.log_density(x).detach()
        if not bool(torch.isfinite(value).all()):
            row = int((~torch.isfinite(value)).nonzero()[0])
            raise ValueError(f"log f of {name} is not finite in chain {row} ({float(value[row])}): start it elsewhere")
        return x


class Tempered(Target):
    """The density of a target's path at β."""

    def __init__(self, target: Target, beta: Tensor | float) -> None:
        self.target, self.beta = target, beta
        base = (target.log_base, target.sample_base) if target.has_base else (None, None)
        super().__init__(self._at, target.event_shape, target.template, target.support, *base)

    def _at(self, x: Tensor) -> Tensor:
        return self.target.log_density_at(x, self.beta)


class BoltzmannTarget(Target):
    r"""The path of a Boltzmann machine, its W grown from 0: :math:`\sum_h e^{b^\top v + c^\top h + \beta v^\top W h}`.

    Every density of the path is a Boltzmann machine again, so block Gibbs leaves it invariant. At β = 0 all units are
    independent, :math:`v_i \sim Bernoulli(\sigma(b_i))`: that is the base, and its sum is ``log_base_normalizer``.

    Args:
        net: the energy, a network with what :class:`pyro_gen.nn.RBM` has: ``log_sum``, ``log_uncoupled``, ``sweep``.
        target: the same density as any other is seen; beta: where on the path.
        flat: whether the states count one each (a flat base), else they are fair coins.
    """

    def __init__(self, net: Any, target: Target, beta: Tensor | float = 1.0, *, flat: bool = False) -> None:
        self.net, self.target, self.beta, self.flat = net, target, beta, flat
        self.log_coin = 0.0 if flat else -target.event_shape.numel() * math.log(2)  # of one state under fair coins
        coins = Independent(Bernoulli(logits=net.visible_bias.detach()), 1)
        rest = target.event_shape, target.template, target.support, coins.log_prob, lambda n: coins.sample((n,))
        super().__init__(lambda x: self.log_density_at(x, beta), *rest)

    @property
    def log_base_normalizer(self) -> float:
        return float(self.net.log_uncoupled().detach()) + self.log_coin

    def log_density_at(self, x: Tensor, beta: Tensor | float) -> Tensor:
        result: Tensor = self.log_coin + self.net.log_sum(x, beta)
        return result

    def increment(self, x: Tensor, before: Tensor | float, after: Tensor | float) -> Tensor:
        result: Tensor = self.net.log_sum(x, after) - self.net.log_sum(x, before)
        return result

    def tempered(self, beta: Tensor | float) -> Target:
        return BoltzmannTarget(self.net, self.target, beta, flat=self.flat)

    @property
    def has_sweep(self) -> bool:
        return True

    def sweep(self, x: Tensor) -> Tensor:
        moved: Tensor = self.net.sweep(x, self.beta)
        return moved


class Unconstrained(Target):
    """The density of :math:`y = T^{-1}(x)`: log f(T(y)) + log|det ∂T/∂y|, on the real space."""

    def __init__(self, target: Target) -> None:
        self.target, self.transform = target, biject_to(target.support)
        super().__init__(
            lambda y: self._pulled(target.log_density, y),
            torch.Size(self.transform.inverse_shape(target.event_shape)),
            target.template,
            None,
            (lambda y: self._pulled(target.log_base, y)) if target.has_base else None,
            (lambda n: self.transform.inv(target.sample_base(n))) if target.has_base else None,
        )

    def _pulled(self, log_density: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        x = self.transform(y)
        jacobian: Tensor = self.transform.log_abs_det_jacobian(y, x)
        return log_density(x) + jacobian.reshape(len(y), -1).sum(1)


def is_real(support: Any) -> bool:
    """Whether a constraint is all of the real space."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def no_base() -> ValueError:
    return ValueError(
        "the program has no base distribution to start from: give the chains a start (start=x), or the program a base "
        "(base='normal')"
    )


def _shown(shape: torch.Size) -> str:
    return ", ".join(map(str, shape))
