r"""Langevin dynamics: noise and the gradient of log f, with and without a Metropolis correction.

The diffusion :math:`dY = \tfrac12 \nabla \log f(Y)\,dt + \sqrt T\,dW` leaves :math:`f^{1/T}` invariant. One Euler step
of length :math:`\varepsilon^2`, preconditioned by the diagonal scale s (standard deviations), is

.. math:: y' = y + \tfrac12 \varepsilon^2 s^2 \nabla \log f(y) + \varepsilon \sqrt T\, s\, n, \qquad n \sim N(0, I) .

Unadjusted, its stationary density differs from :math:`f^{1/T}` by :math:`O(\varepsilon^2)`: on a Gaussian of standard
deviation σ the variance is :math:`T \sigma^2 / (1 - \varepsilon^2 / 4 \sigma^2)`. Step and noise must belong together:
a drift of α/2 with noise of another variance than α samples another temperature, which here is an argument of its own.

MALA takes y' as a proposal. With g, g' the gradients at y, y' and :math:`u = \tfrac12 \varepsilon s (g + g')` the way
back needs the noise :math:`-(n + u)`, so that the ratio of the proposals is the difference of two squared lengths,

.. math:: \log \alpha = \log f(y') - \log f(y) + \tfrac12 |n|^2 - \tfrac12 |n + u|^2 ,

and the last two terms are :math:`-u \cdot (n + u/2)`, without cancellation. The gradient at y' serves the next step:
either sampler evaluates one gradient a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyro_gen.base import Info, State
from pyro_gen.samplers.chains import GradientChains, check_aim, check_positive, choose, metropolis, normal_like, rows
from pyro_gen.targets import Target

__all__ = ["MALA", "Langevin"]


@dataclass(frozen=True)
class Langevin(GradientChains):
    r"""Unadjusted Langevin: :math:`y' = y + \tfrac12 \varepsilon^2 \nabla \log f(y) + \varepsilon \sqrt T\, n`.

    Nothing is rejected, so the draws have the density :math:`f^{1/T}` up to :math:`O(\varepsilon^2)`; a chain that
    leaves the finite numbers raises `Divergence` at the end of the run.

    Args:
        chains: number of chains that ``run`` starts.
        step_size: ε, in units of the unconstrained coordinates; or a sequence, to anneal: the warm-up goes through it,
            each value for the same number of steps, and draws are made at the last.
        temperature: T, 1 for f itself; or a sequence, likewise.

    Raises:
        ValueError: for ``chains`` below 1, step sizes or temperatures that are not positive.

    References:
        G. Roberts, R. Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations",
        Bernoulli 2, 1996. Annealing: Y. Song, S. Ermon, "Generative modeling by estimating gradients of the data
        distribution", 2019, arXiv:1907.05600, algorithm 1.

    Example:
        >>> import pyro_gen as pg
        >>> ebm = pg.programs.ebm.EBM(2, energy=lambda x: (x**4).sum(-1) / 4, base=None)
        >>> Langevin(chains=50, step_size=0.2).run(ebm, draws=20, warmup=100, start=torch.zeros(2), seed=0).x.shape
        torch.Size([50, 20, 2])
    """

    chains: int = 100
    step_size: float | Sequence[float] = 0.1
    temperature: float | Sequence[float] = 1.0
    acceptance_aim: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("step_size", "temperature"):
            given = getattr(self, name)
            if isinstance(given, Sequence) and not isinstance(given, str):
                if not given:
                    raise ValueError(f"{name} is an empty sequence: give one number, or those to anneal through")
                object.__setattr__(self, name, tuple(check_positive(value, name) for value in given))
            else:
                check_positive(given, name)

    @property
    def final_temperature(self) -> float:
        """The temperature that draws are made at."""
        return _last(self.temperature)

    def first_guess(self, position: Tensor) -> float:
        return _last(self.step_size)

    def step(self, target: Target, state: State) -> tuple[State, Info]:
        """One step of every chain; the gradient at its end is kept for the next."""
        assert state.gradient is not None
        inner = target.unconstrained()
        y = self._moved(state.position, state.gradient, state.step_size, state.scale)
        value, gradient = inner.value_and_score(y)
        diverging = ~torch.isfinite(value)
        new = State(target.to_support(y), value, gradient, state.step_size, state.scale, y)
        return new, Info(torch.ones_like(value), diverging)

    def _moved(self, y: Tensor, gradient: Tensor, step_size: Tensor, scale: Tensor) -> Tensor:
        width, noise = step_size * scale, normal_like(y)
        if self.final_temperature != 1:
            noise = noise * math.sqrt(self.final_temperature)
        return torch.addcmul(y, width, torch.addcmul(noise, 0.5 * width, gradient))

    def advance(self, target: Target, x: Tensor, steps: int, *, step_size: Tensor | float | None = None) -> Tensor:
        with torch.no_grad():
            inner, y = target.unconstrained(), target.from_support(x)
            size = self._step_size(y, step_size)
            scale = y.new_ones(y.shape[1:])
            for _ in range(steps):  # no gradient at the last position: steps of them in all
                y = self._moved(y, inner.value_and_score(y)[1], size, scale)
            return target.to_support(y)

    def schedule(self, warmup: int) -> Iterator[tuple[Langevin, float | None]]:
        if not isinstance(self.step_size, tuple) and not isinstance(self.temperature, tuple):
            return
        for t in range(warmup):
            size, heat = (_at(given, t / warmup) for given in (self.step_size, self.temperature))
            yield replace(self, temperature=heat), size if isinstance(self.step_size, tuple) else None


def _last(given: float | Sequence[float]) -> float:
    return float(given[-1]) if isinstance(given, Sequence) else float(given)


def _at(given: float | Sequence[float], fraction: float) -> float:
    return float(given[int(fraction * len(given))]) if isinstance(given, Sequence) else float(given)


@dataclass(frozen=True)
class MALA(GradientChains):
    r"""Metropolis-adjusted Langevin: draws of f itself, one gradient a step.

    Proposal :math:`y' = y + \tfrac12 \varepsilon^2 s^2 \nabla \log f(y) + \varepsilon s\, n`, accepted with probability
    :math:`\min(1, \alpha)`; α is in the module's page. Proposals where log f is not finite are rejected.

    Args:
        chains: number of chains that ``run`` starts.
        step_size: ε; None adapts it, and the diagonal scale s with it, in warm-up.
        acceptance_aim: mean acceptance that the step size is adapted to; .574 is optimal in many dimensions.

    Raises:
        ValueError: for ``chains`` below 1, ``step_size`` not positive, ``acceptance_aim`` outside (0, 1).

    References:
        G. Roberts, J. Rosenthal, "Optimal scaling of discrete approximations to Langevin diffusions", JRSS B 60, 1998.

    Example:
        >>> import pyro_gen as pg
        >>> ebm = pg.programs.ebm.EBM(2, energy=lambda x: (x**4).sum(-1) / 4)
        >>> MALA(chains=50).run(ebm, draws=20, warmup=100, seed=0).x.shape
        torch.Size([50, 20, 2])
    """

    chains: int = 100
    step_size: float | None = None
    acceptance_aim: float | None = 0.574

    def __post_init__(self) -> None:
        super().__post_init__()
        check_aim(self.acceptance_aim)
        if self.step_size is not None:
            check_positive(self.step_size, "step_size")

    def first_guess(self, position: Tensor) -> float:
        return 1.65 * position[0].numel() ** (-1 / 6) if self.step_size is None else self.step_size

    def step(self, target: Target, state: State) -> tuple[State, Info]:
        """One proposal of every chain, accepted or not."""
        assert state.gradient is not None
        inner = target.unconstrained()
        width, y = state.step_size * state.scale, state.position
        noise, half = normal_like(y), 0.5 * width
        proposal = torch.addcmul(y, width, torch.addcmul(noise, half, state.gradient))
        value, gradient = inner.value_and_score(proposal)
        u = half * (state.gradient + gradient)
        log_ratio = value.double() - state.log_density.double() - rows(u * torch.add(noise, u, alpha=0.5))
        accepted, info = metropolis(log_ratio)
        return self._new(target, state, accepted, proposal, value, gradient), info

    def _new(
        self, target: Target, state: State, accepted: Tensor, proposal: Tensor, value: Tensor, gradient: Tensor
    ) -> State:
        assert state.gradient is not None
        y = choose(accepted, proposal, state.position)
        return State(
            target.to_support(y),
            torch.where(accepted, value, state.log_density),
            choose(accepted, gradient, state.gradient),
            state.step_size,
            state.scale,
            y,
        )
