r"""Adaptation in warm-up: the step size by dual averaging, the scale by the spread of the chains.

Dual averaging steers the mean acceptance :math:`\bar a_t` over the chains to its aim δ. With
:math:`\bar h_t = (1 - \tfrac1{t + t_0}) \bar h_{t-1} + \tfrac1{t + t_0} (\delta - \bar a_t)`,

.. math:: \log \varepsilon_{t+1} = \mu - \frac{\sqrt t}{\gamma} \bar h_t, \qquad
          \log \bar\varepsilon_{t+1} = t^{-\kappa} \log \varepsilon_{t+1} + (1 - t^{-\kappa}) \log \bar\varepsilon_t ,

and draws are made at :math:`\bar\varepsilon`. The scale is the standard deviation of each unconstrained coordinate over
all chains and the steps of a window; windows grow, so that the last one has forgotten where the chains started, and the
step size is sought again after each.

References:
    M. Hoffman, A. Gelman, "The no-U-turn sampler", JMLR 15, 2014, arXiv:1111.4246, section 3.2, eqs. 6 and 7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_gen.base import Info, State
from pyro_gen.targets import Target

__all__ = ["Warmup", "first_step_size", "nudge"]

# Hoffman & Gelman have γ = .05, for a first guess that may be far off; here the guess brackets the aim, and so strong a
# pull makes log ε swing about it, which biases the average of a curve that is not straight.
GAMMA, OFFSET, KAPPA = 0.3, 10.0, 0.75
WINDOWS = (0.1, 0.3, 0.75)  # of warm-up: where the scale is renewed
SHORT = 40  # steps of warm-up below which only the step size is adapted
DOUBLINGS = 40


def nudge(step_size: Tensor, acceptance: Tensor, aim: float, rate: float) -> Tensor:
    """One step of Robbins & Monro towards an acceptance: ε exp(rate · (mean acceptance − aim)).

    Args:
        step_size: scalar; acceptance: of each chain, ``(chains,)``; aim: in (0, 1); rate: of the change of log ε.
    """
    return step_size * torch.exp(rate * (acceptance.mean() - aim)).to(step_size.dtype)


def first_step_size(sampler: Any, target: Target, state: State) -> Tensor:
    """The largest step size of those 2^k times the state's, up to the first crossing, with the acceptance aimed at.

    Raises:
        ValueError: if no step is small enough for a proposal to be accepted.
    """

    def acceptance(size: Tensor) -> float:
        return float(sampler.step(target, state._replace(step_size=size))[1].acceptance.mean())

    size = state.step_size
    grow = acceptance(size) > sampler.acceptance_aim
    for _ in range(DOUBLINGS):
        before, size = size, size * (2.0 if grow else 0.5)
        if (acceptance(size) > sampler.acceptance_aim) != grow:
            return before if grow else size
    if grow:  # flat as far as the chains can see
        return size
    raise ValueError(
        f"no proposal is accepted, not even at step size {float(size):.1g}: log f has no gradient where the chains "
        "start, or jumps there"
    )


class DualAveraging:
    """The step size under adaptation; tensors throughout, so that nothing waits for the device."""

    def __init__(self, step_size: Tensor, aim: float) -> None:
        self.aim, self.count = aim, 0
        self.centre = torch.log(step_size.double())  # within a factor of two already, so not ten times it
        self.error = torch.zeros_like(self.centre)
        self.average = torch.log(step_size.double())

    def update(self, acceptance: Tensor) -> Tensor:
        """The next step size, given the acceptance of each chain at the present one."""
        self.count += 1
        t = self.count
        share = 1 / (t + OFFSET)
        self.error = (1 - share) * self.error + share * (self.aim - acceptance.double().mean())
        log_size = self.centre - math.sqrt(t) / GAMMA * self.error
        weight = t**-KAPPA
        self.average = weight * log_size + (1 - weight) * self.average
        return log_size.exp()

    @property
    def result(self) -> Tensor:
        return self.average.exp()


class Spread:
    """Mean and squared deviations of a stream of batches, by coordinate (Chan, Golub & LeVeque 1983)."""

    def __init__(self, like: Tensor) -> None:
        self.count = 0
        self.mean = torch.zeros_like(like, dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)

    def add(self, batch: Tensor) -> None:
        batch = batch.double()
        n, mean = len(batch), batch.mean(0)
        total, change = self.count + n, mean - self.mean
        self.squares = self.squares + (batch - mean).square().sum(0) + change.square() * (self.count * n / total)
        self.mean = self.mean + change * (n / total)
        self.count = total

    def scale(self, now: Tensor) -> Tensor:
        """Standard deviations, their logarithms drawn to their mean by five draws; the present where there is none."""
        variance = self.squares / max(1, self.count - 1)
        usable = torch.isfinite(variance) & (variance > 0)
        logs = torch.where(usable, variance, 1.0).log()
        centre = logs.sum() / usable.sum().clamp(min=1)
        logs = (self.count * logs + 5 * centre) / (self.count + 5)
        return torch.where(usable, (logs / 2).exp(), now.double()).to(now.dtype)


class Warmup:
    """The adaptation of one warm-up: ``update`` after each step gives the state the next step starts from."""

    def __init__(self, sampler: Any, target: Target, state: State, steps: int) -> None:
        self.sampler, self.target, self.steps, self.count = sampler, target, steps, 0
        self.ends = [round(f * steps) for f in WINDOWS] if steps >= SHORT else []
        self.spread = Spread(state.scale)
        self.state = self._seek(state)

    @classmethod
    def of(cls, sampler: Any, target: Target, state: State, steps: int) -> Warmup | None:
        """The adaptation that a sampler asks for, if any."""
        if sampler.acceptance_aim is None or getattr(sampler, "step_size", None) is not None:
            return None
        return cls(sampler, target, state, steps) if steps else None

    def _seek(self, state: State) -> State:
        """Begin anew with the step size."""
        state = state._replace(step_size=first_step_size(self.sampler, self.target, state))
        self.averaging = DualAveraging(state.step_size, self.sampler.acceptance_aim)
        return state

    def update(self, state: State, info: Info) -> State:
        self.count += 1
        size = self.averaging.update(info.acceptance)
        if self.ends and self.count <= self.ends[-1]:
            self.spread.add(state.position)
        if self.count in self.ends:
            state = state._replace(scale=self.spread.scale(state.scale))
            self.spread = Spread(state.scale)
            return self._seek(state)
        if self.count == self.steps:
            size = self.averaging.result
        return state._replace(step_size=size.to(state.step_size.dtype))
