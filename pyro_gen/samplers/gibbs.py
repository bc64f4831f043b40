r"""Gibbs sampling of discrete data: exact conditionals, one entry at a time, or moves the gradient points to.

Given all other entries, entry i of a datum with K levels has the distribution :math:`p(x_i = l \mid x_{-i}) \propto
f(x_{-i}, l)`: K evaluations of log f, of which one is known already. A draw from it leaves f invariant, and so does a
sweep over all entries in any order that does not depend on x. A family that knows its conditionals in blocks (an RBM)
brings a sweep of its own, ``target.sweep``.

Where log f continues to real x, one gradient estimates all its changes at once: setting entry i to l changes log f by
about :math:`\Delta_{il} = (l - x_i)\, \partial_i \log f(x)`. The informed sampler proposes one change of one entry with

.. math:: q(i, l \mid x) \propto e^{\Delta_{il} / 2}, \qquad
          \log \alpha = \log f(x') - \log f(x) + \log q(i, x_i \mid x') - \log q(i, l \mid x) ,

one gradient a proposal, and finds the entries that want to change however many do not. For binary x and quadratic log f
the Δ are exact up to the diagonal; otherwise α takes care of their error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gen.base import Info, State
from pyro_gen.checks import check_count, describe
from pyro_gen.samplers.chains import Chains, choose, metropolis
from pyro_gen.targets import Target

__all__ = ["Gibbs"]


@dataclass(frozen=True)
class Gibbs(Chains):
    r"""Gibbs sampling of binary or integer data: exact conditional draws, or informed proposals.

    Args:
        chains: number of chains that ``run`` starts.
        sweeps: sweeps over all entries in one step; of the informed sampler, proposals in one step.
        informed: propose changes by the gradient of log f, with a Metropolis correction; log f must be differentiable
            in x, as the energy of a network is.
        scan: of single entries: ``"random"``, a new order in each sweep, each chain its own, or ``"fixed"``.

    Without ``informed`` a family's own block sweep is used where it has one; else a sweep over D entries of K levels
    evaluates log f :math:`D (K - 1)` times, each for all chains.

    Raises:
        ValueError: for ``chains`` or ``sweeps`` below 1, or an unknown scan.

    References:
        S. Geman, D. Geman, "Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images",
        IEEE PAMI 6, 1984. W. Grathwohl et al., "Oops I took a gradient: scalable sampling for discrete distributions",
        2021, arXiv:2102.04509, algorithm 1, eqs. 3 and 5.

    Example:
        >>> import pyro_gen as pg
        >>> ebm = pg.programs.ebm.EBM(9, "rbm", "bernoulli", hidden=(4,))
        >>> Gibbs(chains=50).run(ebm, draws=20, warmup=10, seed=0).x.shape
        torch.Size([50, 20, 9])
    """

    chains: int = 100
    sweeps: int = 1
    informed: bool = False
    scan: Literal["random", "fixed"] = "random"
    acceptance_aim: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.sweeps, "sweeps")
        if self.scan not in ("random", "fixed"):
            raise ValueError(f"scan must be 'random' or 'fixed', got {describe(self.scan)}")
        if not isinstance(self.informed, bool):
            raise ValueError(f"informed must be True or False, got {describe(self.informed)}")

    def check_target(self, target: Target) -> None:
        if not target.support.is_discrete:
            raise TypeError(
                f"Gibbs draws discrete data, and the support is {target.support}: use HMC(), MALA() or Langevin() for "
                "continuous data"
            )
        if self.informed or not target.has_sweep:
            levels_of(target.support)

    def init(self, target: Target, x: Tensor, *, step_size: Tensor | float | None = None) -> State:
        """Evaluate the density (and its gradient, if informed) where the chains start; there is no step size."""
        with torch.no_grad():
            value, gradient = target.value_and_score(x) if self.informed else (target.log_density(x), None)
        return State(x, value, gradient, value.new_ones(()), x.new_ones(x.shape[1:]), x)

    def step(self, target: Target, state: State) -> tuple[State, Info]:
        """``sweeps`` sweeps (or proposals) of every chain."""
        with torch.no_grad():
            if self.informed:
                return self._informed(target, state)
            x, value = self._swept(target, state.x, state.log_density)
            if value is None:
                value = target.log_density(x)
            info = Info(torch.ones_like(value), ~torch.isfinite(value))
            return State(x, value, None, state.step_size, state.scale, x), info

    def advance(self, target: Target, x: Tensor, steps: int, *, step_size: Tensor | float | None = None) -> Tensor:
        if self.informed or not target.has_sweep:
            return super().advance(target, x, steps, step_size=step_size)
        with torch.no_grad():  # block sweeps need no density
            for _ in range(steps * self.sweeps):
                x = target.sweep(x)
            return x

    def _swept(self, target: Target, x: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        if target.has_sweep:
            for _ in range(self.sweeps):
                x = target.sweep(x)
            return x, None
        low, count = levels_of(target.support)
        chains, size = len(x), x[0].numel()
        flat = x.reshape(chains, size)
        for _ in range(self.sweeps):
            order = self._order(flat)
            for k in range(size):
                flat, value = self._redraw(target, x.shape, flat, value, order[:, k : k + 1], low, count)
        return flat.reshape(x.shape), value

    def _order(self, flat: Tensor) -> Tensor:
        """The entries in the order of a sweep: ``(chains, entries)``."""
        if self.scan == "fixed":
            return torch.arange(flat.shape[1], device=flat.device).expand(flat.shape)
        return torch.rand(flat.shape, device=flat.device).argsort(1)

    def _redraw(
        self, target: Target, shape: torch.Size, flat: Tensor, value: Tensor, entry: Tensor, low: int, count: int
    ) -> tuple[Tensor, Tensor]:
        """Draw one entry of each chain given the others."""
        now = flat.gather(1, entry)
        levels, values, states = [now], [value], [flat]
        for j in range(1, count):  # one evaluation each: contexts may belong to chains
            levels.append(low + torch.remainder(now - low + j, count))
            states.append(flat.scatter(1, entry, levels[-1]))
            values.append(target.log_density(states[-1].reshape(shape)))
        found = torch.stack(values)
        logits = torch.where(torch.isnan(found) | (found == torch.inf), -torch.inf, found.double())
        race = -torch.empty_like(logits).exponential_().log()  # Gumbel noise: its argmax is a draw
        pick = (logits + race).argmax(0, keepdim=True)
        level = torch.stack(levels).gather(0, pick.unsqueeze(-1)).squeeze(0)
        return flat.scatter(1, entry, level), found.gather(0, pick).squeeze(0)

    def _informed(self, target: Target, state: State) -> tuple[State, Info]:
        low, count = levels_of(target.support)
        acceptance, diverging = [], []
        for _ in range(self.sweeps):
            state, info = self._propose(target, state, low, count)
            acceptance.append(info.acceptance)
            diverging.append(info.diverging)
        return state, Info(torch.stack(acceptance).mean(0), torch.stack(diverging).any(0))

    def _propose(self, target: Target, state: State, low: int, count: int) -> tuple[State, Info]:
        """One informed change of one entry of each chain, accepted or not."""
        assert state.gradient is not None
        x, chains = state.x, len(state.x)
        flat, gradient = x.reshape(chains, -1), state.gradient.reshape(chains, -1)
        forward = self._log_moves(flat, gradient, low, count)
        race = -torch.empty_like(forward).exponential_().log()
        pick = (forward + race).argmax(1, keepdim=True)
        entry, level = pick // count, low + pick % count
        now = flat.gather(1, entry)
        moved = flat.scatter(1, entry, level.to(flat.dtype))
        value, slope = target.value_and_score(moved.reshape(x.shape))
        backward = self._log_moves(moved, slope.reshape(chains, -1), low, count)
        back = entry * count + (now - low).round().long()
        log_ratio = value.double() - state.log_density.double()
        log_ratio = log_ratio + (backward.gather(1, back) - forward.gather(1, pick)).squeeze(1)
        accepted, info = metropolis(log_ratio)
        x = choose(accepted, moved.reshape(x.shape), x)
        value = torch.where(accepted, value, state.log_density)
        return State(x, value, choose(accepted, slope, state.gradient), state.step_size, state.scale, x), info

    def _log_moves(self, flat: Tensor, gradient: Tensor, low: int, count: int) -> Tensor:
        """log q(i, l | x) over all changes of one entry, −inf for none: ``(chains, entries * levels)``."""
        levels = low + torch.arange(count, dtype=flat.dtype, device=flat.device)
        change = levels - flat.unsqueeze(-1)
        logits = (0.5 * change * gradient.unsqueeze(-1)).double()
        logits = torch.where(change == 0, -torch.inf, logits)
        return torch.log_softmax(logits.flatten(1), 1)


def levels_of(support: Any) -> tuple[int, int]:
    """The lowest level of an entry and the number of its levels; a ``TypeError`` for supports without them."""
    shown = support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.boolean:
        return 0, 2
    if isinstance(support, type(constraints.integer_interval(0, 1))):
        low, high = torch.as_tensor(support.lower_bound), torch.as_tensor(support.upper_bound)
        if bool((low == low.flatten()[0]).all() and (high == high.flatten()[0]).all()):
            first, last = int(low.flatten()[0]), int(high.flatten()[0])
            return first, last - first + 1
    raise TypeError(
        f"Gibbs draws entries with the same finite set of levels each, binary or integers, and the support is {shown}"
    )
