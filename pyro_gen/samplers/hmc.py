r"""Hamiltonian Monte Carlo, for many chains at once.

A momentum p ~ N(0, I) turns :math:`-\log f` into a potential, and the motion of a particle in it keeps
:math:`H = -\log f(y) + \tfrac12 |p|^2` constant. The leapfrog scheme, with a diagonal scale s (a mass of
:math:`s^{-2}`),

.. math:: p \leftarrow p + \tfrac12 \varepsilon s \nabla \log f(y), \qquad y \leftarrow y + \varepsilon s\, p, \qquad
          p \leftarrow p + \tfrac12 \varepsilon s \nabla \log f(y) ,

repeated L times, preserves volume and is undone by the sign of p: so (y', p') is a proposal whose acceptance is
:math:`\min(1, e^{H(y, p) - H(y', p')})`. With L = 1 it is MALA.

A fixed length :math:`\varepsilon L` may be a period of some coordinate, which then never mixes. Each chain draws
:math:`\varepsilon (1 + j\,U)`, U uniform on (−1, 1), for its own trajectory: a mixture of kernels, each of which leaves
f invariant. Chains share one number of steps, so that all gradients are one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_gen.base import Info, State
from pyro_gen.checks import check_count, describe
from pyro_gen.samplers.chains import GradientChains, check_aim, check_positive, choose, metropolis, normal_like, rows
from pyro_gen.targets import Target

__all__ = ["HMC"]

ENERGY_LOSS = 1000.0  # nats; as in Stan: beyond it the trajectory has nothing to do with the motion


@dataclass(frozen=True)
class HMC(GradientChains):
    r"""Hamiltonian Monte Carlo: draws of f, ``leapfrog`` gradients a step.

    Proposals where log f is not finite are rejected; they, and
    those whose energy grew by more than 1000 nats, are flagged as diverging.

    Args:
        chains: number of chains that ``run`` starts.
        step_size: ε; None adapts it, and the diagonal scale s with it, in warm-up.
        leapfrog: L, leapfrog steps of one proposal.
        jitter: j in [0, 1): how far each trajectory's ε strays from the step size.
        acceptance_aim: mean acceptance that the step size is adapted to; .651 is optimal in many independent
            dimensions, .8 more robust.

    Raises:
        ValueError: for ``chains`` or ``leapfrog`` below 1, ``step_size`` not positive, ``jitter`` outside [0, 1),
            ``acceptance_aim`` outside (0, 1).

    References:
        R. Neal, "MCMC using Hamiltonian dynamics", Handbook of Markov chain Monte Carlo, 2011, arXiv:1206.1901.
        A. Beskos et al., "Optimal tuning of the hybrid Monte Carlo algorithm", Bernoulli 19, 2013, arXiv:1001.4460.

    Example:
        >>> import pyro_gen as pg
        >>> ebm = pg.programs.ebm.EBM(2, energy=lambda x: (x**4).sum(-1) / 4)
        >>> HMC(chains=50).run(ebm, draws=20, warmup=100, seed=0).x.shape
        torch.Size([50, 20, 2])
    """

    chains: int = 100
    step_size: float | None = None
    leapfrog: int = 10
    jitter: float = 0.2
    acceptance_aim: float | None = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_aim(self.acceptance_aim)
        check_count(self.leapfrog, "leapfrog")
        if self.step_size is not None:
            check_positive(self.step_size, "step_size")
        if isinstance(self.jitter, bool) or not isinstance(self.jitter, (int, float)) or not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be a number in [0, 1), got {describe(self.jitter)}")

    def first_guess(self, position: Tensor) -> float:
        return position[0].numel() ** (-1 / 4) if self.step_size is None else self.step_size

    def step(self, target: Target, state: State) -> tuple[State, Info]:
        """One trajectory of every chain, accepted or not."""
        assert state.gradient is not None
        inner = target.unconstrained()
        start = momentum = normal_like(state.position)
        width = state.step_size * state.scale
        if self.jitter:
            u = torch.rand(len(start), dtype=start.dtype, device=start.device)
            width = width * (1 + self.jitter * (2 * u - 1)).reshape(-1, *[1] * (start.dim() - 1))
        y, gradient = state.position, state.gradient
        value = state.log_density
        half = 0.5 * width
        momentum = torch.addcmul(momentum, half, gradient)
        for i in range(self.leapfrog):
            y = torch.addcmul(y, width, momentum)
            value, gradient = inner.value_and_score(y)
            momentum = torch.addcmul(momentum, width if i + 1 < self.leapfrog else half, gradient)
        kinetic = rows(0.5 * (start - momentum) * (start + momentum))
        log_ratio = value.double() - state.log_density.double() + kinetic
        accepted, info = metropolis(log_ratio, ENERGY_LOSS)
        y = choose(accepted, y, state.position)
        new = State(
            target.to_support(y),
            torch.where(accepted, value, state.log_density),
            choose(accepted, gradient, state.gradient),
            state.step_size,
            state.scale,
            y,
        )
        return new, info
