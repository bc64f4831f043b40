r"""Annealed importance sampling: log Z from chains that follow a path from a known density to the one in question.

A path :math:`f_0, \dots, f_1` leads from the base, with known :math:`Z_0`, to f; a ladder
:math:`0 = \beta_0 < \dots < \beta_K = 1` cuts it into steps, and :math:`T_k` is a transition that leaves
:math:`f_{\beta_k}` invariant. *Forward*, chains start at exact draws of the base and for k = 1, …, K

.. math:: w \leftarrow w + \log f_{\beta_k}(x) - \log f_{\beta_{k-1}}(x), \qquad\text{then}\quad x \sim T_k(x) .

The weight is evaluated before the move. The pair (ladder up, ladder down with reversed transitions) makes
:math:`e^w` an importance weight on the whole trajectory, so that :math:`E[e^w] = Z / Z_0` however badly the chains mix
(Neal 2001), and

.. math:: \log\hat Z = \log Z_0 + \log \tfrac1M \textstyle\sum_m e^{w_m} .

Its logarithm is too low on average (Jensen), by half the squared standard error where that is small. *In reverse*,
chains start at draws of f and go down, the move first and the weight after it; then :math:`E[e^w] = Z_0 / Z` and
:math:`\log\hat Z = \log Z_0 - \log \frac1M \sum_m e^{w_m}` is too high on average: an upper bound, if the draws are
exact. From a chain that may have missed a mode it is an estimate. Forward and reverse together bracket log Z
(bidirectional Monte Carlo); a gap of more than their errors says that chains do not keep up with the path.

What the weights show, they cannot show of modes that no chain visited: the base has to be broad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_gen import scopes
from pyro_gen.base import PARETO_K_LIMIT, Evidence, EvidenceKind, Sampler, Unnormalized
from pyro_gen.checks import check_count, describe
from pyro_gen.evidence.chunks import even_parts
from pyro_gen.evidence.growth import centre_and_scale, check_growth
from pyro_gen.evidence.normalizers import Normalizes, check_seed, estimating, one_target, rows_at_once
from pyro_gen.evidence.paths import Ladder, check_schedule, tuned_ladder
from pyro_gen.samplers import HMC, Gibbs, Langevin
from pyro_gen.statistics import effective_sample_size, log_mean_exp, pareto_k
from pyro_gen.targets import Target

__all__ = ["AnnealedImportanceSampling"]

LEAPFROG = 3  # of the default transition: gradients are better spent on more temperatures than on longer trajectories


@dataclass(frozen=True, repr=False)
class AnnealedImportanceSampling(Normalizes):
    r"""log Z by annealing from the base: :math:`\log Z_0 + \log \frac1M \sum_m e^{w_m}` over M chains.

    The result is an ``"estimate"`` with its standard error (delta method), effective sample size and k̂; where k̂ is
    above 0.7 it is relabelled a ``"lower bound"``. In reverse from exact draws it is an ``"upper bound"``, from a chain
    an ``"estimate"``. For log p(x) of rows one log Ẑ serves all of them: its error is shared. Networks run in
    evaluation mode; weights are summed in float64.

    Args:
        temperatures: K, steps from the base to the target; the error falls as their inverse root.
        chains: M; below 21 no tail can be fitted, and a forward result is a lower bound.
        sampler: of the transitions; default ``HMC(leapfrog=3)`` for continuous data, ``Gibbs()`` for discrete. A step
            size that it leaves open is adapted at each temperature, and its scale, by a short pilot run of other
            chains, then held fixed.
        schedule: ``"adaptive"``: steps of equal thermodynamic length, as the pilot run measures it; ``"linear"``;
            ``"sigmoid"``: dense at both ends; or the numbers themselves, from 0 to 1.
        reverse: go from draws of f down to the base.
        start: draws of f, ``(chains, *event_shape)``, for ``reverse``; default: chains annealed forward, resampled by
            their weights and run on for ``warmup`` steps.
        exact: says that ``start`` are exact draws of f (as of ``Enumeration().draw``), which makes the result a bound.
        base: a distribution of event shape ``event_shape`` to start from, for programs without one, or in place of it.
        warmup: steps of the chains at the target, where they are to make a start.
        memory: bytes that the chains moved at once may take, on the program's device.
        seed: makes the result repeatable and leaves the global generators as they were.
        max_contexts: how many distinct contexts ``log_evidence`` may meet; each takes a run of its own.

    Raises:
        ValueError: for counts below 1 (2 temperatures), a schedule that does not increase from 0 to 1, a start without
            ``reverse``; when asked, for a program without base, or an energy that does not grow.
        TypeError: for a sampler that is none or does not leave its target invariant.

    References:
        R. Neal, "Annealed importance sampling", Statistics and Computing 11, 2001, arXiv:physics/9803008, eqs. 2-6.
        R. Grosse, Z. Ghahramani, R. Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015,
        arXiv:1511.02543.

    Example:
        >>> AnnealedImportanceSampling(500, chains=200, seed=0)
        AnnealedImportanceSampling(temperatures=500, chains=200, seed=0)
    """

    temperatures: int = 1000
    chains: int = 100
    _: KW_ONLY
    sampler: Sampler | None = None
    schedule: Literal["adaptive", "linear", "sigmoid"] | Sequence[float] = "adaptive"
    reverse: bool = False
    start: Tensor | None = None
    exact: bool = False
    base: Distribution | None = None
    warmup: int = 200
    memory: int = 2**28
    seed: int | None = None
    max_contexts: int = 100

    def __post_init__(self) -> None:
        for name in ("temperatures", "chains", "warmup", "memory", "max_contexts"):
            check_count(getattr(self, name), name)
        if self.temperatures < 2:
            raise ValueError("temperatures must be at least 2: with one step it is importance sampling from the base")
        check_schedule(self.schedule, self.temperatures)
        check_seed(self.seed)
        if self.sampler is not None and (isinstance(self.sampler, type) or not isinstance(self.sampler, Sampler)):
            raise TypeError(f"sampler must be a sampler, as pg.HMC(), or None; got {describe(self.sampler)}")
        if isinstance(self.sampler, Langevin):
            raise TypeError(
                "sampler: unadjusted Langevin does not leave the densities of the path invariant, and its error would "
                "go into log Z unseen: take pg.MALA() or pg.HMC()"
            )
        if self.base is not None and not isinstance(self.base, Distribution):
            raise TypeError(f"base must be a distribution or None, got {describe(self.base)}")
        if self.start is not None and not isinstance(self.start, Tensor):
            raise TypeError(f"start must be a tensor of draws or None, got {describe(self.start)}")
        if self.start is not None and not self.reverse:
            raise ValueError("start belongs to reverse=True: forward chains start at draws of the base")
        if self.exact and self.start is None:
            raise ValueError("exact=True says what start= is: give the exact draws, as Enumeration().draw(program, n)")
        if self.start is not None and len(self.start) != self.chains:
            raise ValueError(f"start has {len(self.start)} rows and chains is {self.chains}: one draw for each chain")

    def log_normalizer(self, program: Unnormalized, context: Tensor | None = None) -> Evidence:
        """log Z of the program; see :func:`pyro_gen.log_normalizer`."""
        with estimating(program, self.seed):
            weights, log_base, dtype = self._run(program, context)
        value, error = log_mean_exp(weights)
        size, tail = effective_sample_size(weights), pareto_k(weights, dtype=dtype)
        kind: EvidenceKind = "estimate"
        if self.reverse:
            value, kind = log_base - value, "upper bound" if self.exact else "estimate"
        else:
            value, kind = log_base + value, "lower bound" if bool(tail > PARETO_K_LIMIT) else "estimate"
        return Evidence(value, kind, error, effective_sample_size=size, pareto_k=tail, label="log Z")

    def log_weights(self, program: Unnormalized, context: Tensor | None = None) -> Tensor:
        """The log weights themselves, without log Z₀: ``(chains,)``, in nats, float64 on the CPU."""
        with estimating(program, self.seed):
            return self._run(program, context)[0]

    def _run(self, program: Unnormalized, context: Tensor | None) -> tuple[Tensor, float, torch.dtype]:
        """Log weights of all chains, log Z₀, and the dtype of the program."""
        target = self._target(one_target(program, context))
        start = None
        if self.start is not None:
            start = target.check_inside(self.start.to(target.template), "start")
        target.check_inside(target.sample_base(min(self.chains, 32)), "a draw of the base")
        check_growth(target, *centre_and_scale(target))
        if type(target) is Target and not target.support.is_discrete:  # chains in the support would be rounded to it
            start = None if start is None else target.from_support(start)
            target = target.unconstrained()
        with scopes.without_validation():
            ladder = self._ladder(target)
            most = rows_at_once(target.tempered(0.5).log_density, target.sample_base(1), self.memory)
            weights, done = [], 0
            for n in even_parts(self.chains, most):
                if self.reverse:
                    x = self._started(ladder, n) if start is None else start[done : done + n]
                    weights.append(_down(ladder, x))
                else:
                    weights.append(_up(ladder, target.sample_base(n))[0])
                done += n
        return torch.cat(weights), target.log_base_normalizer, target.template.dtype

    def _target(self, target: Target) -> Target:
        """The density with the base that annealing starts from."""
        base: Any = self.base
        if base is None:
            if not target.has_base:
                raise ValueError(
                    "annealing starts from a base with known normalizer, and the program has none: give the method one "
                    "that covers the mass of f, AnnealedImportanceSampling(base=dist.Normal(loc, scale).to_event(1)), "
                    "or the program (base='normal')"
                )
            return target
        shape, like = target.event_shape, target.template
        if tuple(base.event_shape) != tuple(shape) or tuple(base.batch_shape):
            raise ValueError(
                f"base must have event shape {tuple(shape)} and no batch shape, got event {tuple(base.event_shape)}, "
                f"batch {tuple(base.batch_shape)}: .to_event({len(shape)}) makes a batch of scalars one datum"
            )
        return Target(
            target.log_density,
            shape,
            like,
            target.support,
            lambda x: base.log_prob(x),
            lambda n: base.sample((n,)).to(like),
        )

    def _ladder(self, target: Target) -> Ladder:
        discrete = target.support.is_discrete
        sampler: Any = self.sampler or (Gibbs() if discrete else HMC(leapfrog=LEAPFROG))
        check_target = getattr(sampler, "check_target", None)
        if check_target is not None:
            check_target(target)
        adapt = sampler.acceptance_aim is not None and getattr(sampler, "step_size", None) is None
        return tuned_ladder(sampler, target, self.schedule, self.temperatures, adapt=adapt)

    def _started(self, ladder: Ladder, n: int) -> Tensor:
        """Chains at the target, to go down from: annealed, resampled by their weights, run on."""
        weights, x = _up(ladder, ladder.target.sample_base(n))
        x = ladder.move(x, len(ladder))
        offset = torch.rand((), dtype=torch.float64)
        points = (torch.arange(n, dtype=torch.float64) + offset) / n  # systematic: each weight's share to within one
        picked = torch.searchsorted(torch.softmax(weights, 0).cumsum(0), points).clamp(max=n - 1)
        x = x[picked.to(x.device)]
        for _ in range(self.warmup):
            x = ladder.move(x, len(ladder))
        return x


def _up(ladder: Ladder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Log weights of chains from the base, and where they stand before a last move: the weight, then the move."""
    weights = torch.zeros(len(x), dtype=torch.float64)
    for k in range(1, len(ladder) + 1):
        weights += ladder.increment(x, k - 1, k)
        if k < len(ladder):  # the move at β = 1 would weigh nothing
            x = ladder.move(x, k)
    return weights, x


def _down(ladder: Ladder, x: Tensor) -> Tensor:
    """Log weights of chains from the target: the move, then the weight."""
    weights = torch.zeros(len(x), dtype=torch.float64)
    for k in range(len(ladder), 0, -1):
        x = ladder.move(x, k)
        weights += ladder.increment(x, k, k - 1)
    return weights
