r"""From a base to a target in many small steps: where the steps lie, and the transitions between them.

Along a path of densities :math:`f_\beta` the log weight of annealing is a sum of increments
:math:`\log f_{\beta_k}(x) - \log f_{\beta_{k-1}}(x)`. If the chains keep up with the path, its variance is

.. math:: \sum_k (\beta_k - \beta_{k-1})^2\, I(\beta_k), \qquad
          I(\beta) = \mathrm{Var}_\beta\Big[\frac{\partial}{\partial\beta} \log f_\beta(x)\Big] ,

which for a given number of steps is least where each has the same thermodynamic length
:math:`\sqrt{I(\beta)}\,\Delta\beta` (Cauchy & Schwarz): a ladder dense where the densities change fast. A short *pilot*
run over a fixed ladder estimates I, and adapts the transitions on the way: step size by Robbins & Monro towards the
sampler's acceptance, scale from the spread of the chains. All that is then held fixed. The weights that count come from
chains of their own, so tuning does not bias them.

References:
    A. Gelman, X.-L. Meng, "Simulating normalizing constants: from importance sampling to bridge sampling to path
    sampling", Statistical Science 13, 1998, section 4. R. Neal, "Annealed importance sampling", 2001.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyro_gen.base import Sampler, State
from pyro_gen.checks import check_count, describe
from pyro_gen.samplers.adaptation import nudge
from pyro_gen.targets import Target

__all__ = ["SCHEDULES", "Ladder", "check_schedule", "fixed_ladder", "tuned_ladder"]

SCHEDULES = ("adaptive", "linear", "sigmoid")
STEEPNESS = 4.0  # of the sigmoid ladder, from -4 to 4
PILOT_CHAINS = 64
PILOT_STEPS = 3  # transitions at each temperature of the pilot
SEEK_STEPS = 16  # before it, at the base, to find the first step size
UNIFORM_SHARE = 0.2  # of an adaptive ladder: what the pilot did not see gets steps too
DIFFERENCE = 1e-3  # in beta, for a derivative


class Ladder:
    """A path cut into steps, with transitions that leave its densities invariant.

    Attributes:
        betas: 0 = β₀ < … < β_K = 1.

    Args:
        sampler: of the transitions; target: whose path it is.
        step_sizes, scales: of the transition at each β; None where the sampler's own stay.
    """

    def __init__(
        self,
        sampler: Sampler,
        target: Target,
        betas: list[float],
        step_sizes: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        self.sampler, self.target, self.betas = sampler, target, betas
        self.step_sizes, self.scales = step_sizes, scales

    def __len__(self) -> int:
        return len(self.betas) - 1

    def move(self, x: Tensor, k: int) -> Tensor:
        """One transition of all chains that leaves the k-th density of the path invariant."""
        there, sampler = self.target.tempered(self.betas[k]), self.sampler
        if self.step_sizes is None:
            advance = getattr(sampler, "advance", None)  # ours skip what only a next step would need
            if advance is not None:
                moved: Tensor = advance(there, x, 1)
                return moved
            return sampler.step(there, sampler.init(there, x))[0].x
        state = sampler.init(there, x, step_size=self.step_sizes[k])
        if self.scales is not None:
            state = state._replace(scale=self.scales[k])
        return sampler.step(there, state)[0].x

    def increment(self, x: Tensor, before: int, after: int) -> Tensor:
        """log f at one step less log f at another, of each chain: ``(chains,)``, float64 on the CPU."""
        change = self.target.increment(x, self.betas[before], self.betas[after]).to("cpu", torch.float64)
        wrong = torch.isnan(change) | (change == math.inf)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"log f or the base is not finite in {int(wrong.sum())} of {len(x)} chains between β = "
                f"{self.betas[before]:.3g} and {self.betas[after]:.3g}; the first stands at {_shown(x[row])}. The base "
                "must cover the support of f, and the energy be finite there"
            )
        return change


def check_schedule(schedule: Any, temperatures: int) -> None:
    """A name, or numbers from 0 to 1 that grow; a ``ValueError`` otherwise."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))} or numbers, got {schedule!r}")
        return
    if not isinstance(schedule, (Sequence, Tensor)):
        raise ValueError(f"schedule must be a name or numbers from 0 to 1, got {describe(schedule)}")
    numbers = [float(value) for value in schedule]
    rises = all(a < b for a, b in pairwise(numbers))
    if len(numbers) < 3 or numbers[0] != 0 or numbers[-1] != 1 or not rises:
        raise ValueError(
            "schedule must increase from 0 to 1 in two steps or more, both ends among its numbers; got "
            f"{len(numbers)} numbers"
            + (f" from {numbers[0]:g} to {numbers[-1]:g}" if numbers else "")
            + ("" if rises else ", which do not increase")
        )
    if temperatures != len(numbers) - 1:
        raise ValueError(
            f"schedule has {len(numbers) - 1} steps and temperatures is {temperatures}: give temperatures="
            f"{len(numbers) - 1}"
        )


def fixed_ladder(schedule: str | Sequence[float], temperatures: int) -> list[float]:
    """The βs of a ladder that needs no pilot; ``"adaptive"`` starts from the sigmoid one."""
    check_count(temperatures, "temperatures")
    if not isinstance(schedule, str):
        return [float(value) for value in schedule]
    t = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64)
    if schedule != "linear":
        t = torch.sigmoid(STEEPNESS * (2 * t - 1))
        t = (t - t[0]) / (t[-1] - t[0])
    betas: list[float] = t.tolist()
    return [0.0, *betas[1:-1], 1.0]


def tuned_ladder(
    sampler: Sampler, target: Target, schedule: str | Sequence[float], temperatures: int, *, adapt: bool
) -> Ladder:
    """The ladder after a pilot run from the base, where there is anything to tune.

    Args:
        sampler, target: as for `Ladder`. schedule: a name of `SCHEDULES`, or numbers.
        temperatures: K, steps of the ladder.
        adapt: the sampler's step size and scale too; False leaves them as the sampler has them.
    """
    betas = fixed_ladder(schedule, temperatures)
    if not adapt and schedule != "adaptive":
        return Ladder(sampler, target, betas)
    grid, spreads, log_sizes, scales = _pilot(sampler, target, temperatures, adapt)
    if schedule == "adaptive":
        betas = _equal_lengths(grid, spreads, temperatures)
    if log_sizes is None or scales is None:
        return Ladder(sampler, target, betas)
    at = torch.tensor(betas, dtype=torch.float64)
    sizes = _interpolate(at, grid, log_sizes.unsqueeze(1)).squeeze(1).exp()
    logs = _interpolate(at, grid, scales.flatten(1).log()).exp()
    like = target.template
    return Ladder(sampler, target, betas, sizes.to(like), logs.reshape(-1, *scales.shape[1:]).to(like))


def _pilot(
    sampler: Sampler, target: Target, temperatures: int, adapt: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A short run from the base: βs, the spread of d log f/dβ there, log step sizes, scales; float64 on the CPU."""
    points = max(8, min(40, temperatures // 16))
    betas = [0.0, 1e-4, 1e-3, *fixed_ladder("sigmoid", points)[1:]]
    betas = sorted(set(betas))
    x = target.sample_base(PILOT_CHAINS)
    state, aim = sampler.init(target.tempered(0.0), x), sampler.acceptance_aim
    spreads, sizes, scales = [], [], []
    for i, beta in enumerate(betas):
        there, logs, widths = target.tempered(beta), [], []
        kept = state
        state = sampler.init(there, state.x, step_size=state.step_size if adapt else None)
        if adapt:
            state = state._replace(scale=kept.scale)
        for step in range(PILOT_STEPS + (SEEK_STEPS if i == 0 and adapt else 0)):
            state, info = sampler.step(there, state)
            if adapt and aim is not None:
                rate = 2.0 if i == 0 and step < SEEK_STEPS // 2 else 0.7
                state = state._replace(step_size=nudge(state.step_size, info.acceptance, aim, rate))
            logs.append(state.step_size.log())
            widths.append(state.position)
        spreads.append(_spread(target, state.x, beta))
        before = state.step_size.log()
        if adapt:
            state = _rescaled(state, torch.cat(widths[-PILOT_STEPS:]))
        sizes.append((torch.stack(logs[-PILOT_STEPS:]).mean() + state.step_size.log() - before).double().cpu())
        scales.append(state.scale.double().cpu())
    grid = torch.tensor(betas, dtype=torch.float64)
    if not adapt:
        return grid, torch.stack(spreads), None, None
    return grid, torch.stack(spreads), _smoothed(torch.stack(sizes)), torch.stack(scales)


def _spread(target: Target, x: Tensor, beta: float) -> Tensor:
    """Standard deviation of d log f/dβ over the chains, from quartiles: a few chains far out do not count."""
    near, far = (beta, beta + DIFFERENCE) if beta + DIFFERENCE <= 1 else (beta - DIFFERENCE, beta)
    change = target.increment(x, near, far).to("cpu", torch.float64) / DIFFERENCE
    change = change[torch.isfinite(change)]
    if len(change) < 4:
        return torch.zeros((), dtype=torch.float64)
    low, high = torch.quantile(change, torch.tensor([0.16, 0.84], dtype=torch.float64))
    spread: Tensor = (high - low) / 2
    return spread


def _rescaled(state: State, positions: Tensor) -> State:
    """The scale drawn half way (in logs) to the spread of the chains; the step keeps its length on the whole."""
    spread = positions.std(0)
    usable = torch.isfinite(spread) & (spread > 0)
    scale = torch.where(usable, (state.scale * spread).sqrt(), state.scale)
    ratio = (state.scale.log() - scale.log()).mean().exp()
    return state._replace(scale=scale, step_size=state.step_size * ratio)


def _smoothed(values: Tensor) -> Tensor:
    """Each of a row of values averaged with its neighbours."""
    padded = torch.cat([values[:1], values, values[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def _equal_lengths(grid: Tensor, spreads: Tensor, steps: int) -> list[float]:
    """The ladder whose steps have equal thermodynamic length, a share of them spread evenly."""
    fine = torch.cat([torch.linspace(a, b, 65, dtype=torch.float64)[:-1] for a, b in _pairs(grid)] + [grid[-1:]])
    spread = _interpolate(fine, grid, _smoothed(spreads).unsqueeze(1)).squeeze(1)
    length = torch.cat([fine.new_zeros(1), (0.5 * (spread[1:] + spread[:-1]) * fine.diff()).cumsum(0)])
    if not bool(length[-1] > 0):
        return fixed_ladder("linear", steps)
    share = (1 - UNIFORM_SHARE) * length / length[-1] + UNIFORM_SHARE * fine
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    betas: list[float] = _interpolate(t, share, fine.unsqueeze(1)).squeeze(1).tolist()
    return [0.0, *betas[1:-1], 1.0]


def _pairs(grid: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(grid.tolist()))


def _interpolate(at: Tensor, grid: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear, ``values`` of shape (grid, columns): ``(at, columns)``."""
    right = torch.searchsorted(grid, at).clamp(1, len(grid) - 1)
    left = right - 1
    share = ((at - grid[left]) / (grid[right] - grid[left])).clamp(0, 1).unsqueeze(1)
    return values[left] * (1 - share) + values[right] * share


def _shown(x: Tensor) -> str:
    values = [round(v, 4) for v in x.flatten().tolist()]
    return str(values) if len(values) <= 6 else f"{values[:6]}…"
