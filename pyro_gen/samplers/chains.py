"""What all samplers share: where chains start, the run over warm-up and draws, and the parts of a transition.

A run moves all chains at once: warm-up first, in which step size and scale are adapted to the chains, then draws under
a transition that no longer changes. Chains live in unconstrained space (``target.unconstrained()``), so a transition
never leaves the support; their draws are mapped back at the end.

A transition is pure, ``(target, state)`` to ``(state, info)``, and never waits for the device. What it takes from the
random generators are the global ones of torch; a seeded run forks them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_gen import scopes
from pyro_gen.base import Bounded, Divergence, Implicit, Info, State, Unnormalized
from pyro_gen.checks import check_count, describe
from pyro_gen.samplers.adaptation import Warmup
from pyro_gen.samplers.draws import Draws
from pyro_gen.targets import Target

__all__ = [
    "Chains",
    "GradientChains",
    "check_aim",
    "check_positive",
    "choose",
    "metropolis",
    "normal_like",
    "rows",
]

WARMUP = 500


@dataclass(frozen=True)
class Chains:
    """Base of the samplers: a frozen dataclass with ``init``, ``step`` and what is here.

    Attributes:
        chains: number of chains that ``run`` starts.
        acceptance_aim: what warm-up adapts the mean acceptance to; None where nothing is adapted.
    """

    chains: int = 100

    if TYPE_CHECKING:  # a field of some samplers, a constant of others

        @property
        def acceptance_aim(self) -> float | None: ...

    def __post_init__(self) -> None:
        check_count(self.chains, "chains")

    def check_target(self, target: Target) -> None:
        """Refuse a target that the sampler cannot move on."""

    def init(self, target: Target, x: Tensor, *, step_size: Tensor | float | None = None) -> State:
        """The state of chains at x.

        Args:
            target: the density; x: where the chains stand, in its support, ``(chains, *event_shape)``.
            step_size: of the transitions; default the sampler's own, or a guess from the dimension.
        """
        raise NotImplementedError

    def step(self, target: Target, state: State) -> tuple[State, Info]:
        """One transition of all chains: pure, without waiting for the device."""
        raise NotImplementedError

    def renew(self, target: Target, state: State) -> State:
        """The same chains, step size and scale under another density (new weights, another temperature)."""
        return self.init(target, state.x, step_size=state.step_size)._replace(scale=state.scale)

    def advance(self, target: Target, x: Tensor, steps: int, *, step_size: Tensor | float | None = None) -> Tensor:
        """Where chains at x stand after so many steps: ``(chains, *event_shape)``, without a graph.

        The same as ``init`` and ``step``, for those who ask for nothing else: what only the next step would need is
        not computed.
        """
        state = self.init(target, x, step_size=step_size)
        for _ in range(steps):
            state, _info = self.step(target, state)
        return state.x

    def from_positions(self, target: Target, y: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the chains as points of the support, and what the density of a position has beside log f."""
        return y, y.new_zeros(len(y))

    def schedule(self, warmup: int) -> Iterator[tuple[Chains, float | None]]:
        """What warm-up goes through: the sampler and its step size at each step; nothing where they stay."""
        return iter(())

    def run(
        self,
        program: Unnormalized | Target,
        *,
        draws: int = 1000,
        warmup: int | None = None,
        start: Tensor | Draws | None = None,
        context: Tensor | None = None,
        seed: int | None = None,
        thin: int = 1,
        progress: bool | None = None,
    ) -> Draws:
        """Run the chains: warm-up, then draws.

        Networks run in evaluation mode, and their weights get no gradient. Z is not needed: chains only compare.

        Args:
            program: a program whose density is known up to Z, or a `Target`.
            draws: kept draws of each chain.
            warmup: steps before the first draw, in which the sampler is adapted; default 500, or none for chains that
                go on.
            start: where the chains start: one datum, ``event_shape``, or one for each chain, ``(chains,
                *event_shape)``; or the `Draws` of an earlier run, to go on from its state. Default draws of the base.
            context: of a conditional program: ``context_shape``, or one for each chain.
            seed: makes the run repeatable and leaves the global generators as they were.
            thin: steps from one kept draw to the next.
            progress: show a progress bar; None shows it if standard error is a terminal.

        Returns:
            The draws, with what is needed to judge them and to go on.

        Raises:
            TypeError: for a program without a density, or a support the sampler cannot move on.
            ValueError: for counts below 1, a start outside the support or where log f is not finite, no start and no
                base.
            Divergence: if chains of a sampler that rejects nothing leave the finite numbers.
        """
        check_count(draws, "draws")
        check_count(thin, "thin")
        if warmup is None:
            warmup = 0 if isinstance(start, Draws) else WARMUP
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup must be a number of steps, 0 for none, got {describe(warmup)}")
        adapts = self.acceptance_aim is not None and getattr(self, "step_size", None) is None
        if adapts and not warmup and not isinstance(start, Draws):
            raise ValueError(
                f"warmup=0 leaves no steps to find the step size in: give some hundred, or {type(self).__name__}"
                "(step_size=...)"
            )
        with ExitStack() as stack:
            modules = (program,) if isinstance(program, torch.nn.Module) else ()
            for entered in (torch.no_grad(), poutine.block(), scopes.evaluation_mode(*modules)):
                stack.enter_context(entered)
            if seed is not None:
                stack.enter_context(scopes.forked_generators(seed))
            target = as_target(program, context)
            self.check_target(target)
            state = self._begin(target, start, warmup)
            stack.enter_context(scopes.without_validation())
            bar = stack.enter_context(bar_of(warmup + draws * thin, progress))
            state = self._warm_up(target, state, warmup, bar)
            return self._draw(target, state, draws, thin, warmup, bar)

    def _begin(self, target: Target, start: Tensor | Draws | None, warmup: int) -> State:
        """The state the run starts in."""
        if isinstance(start, Draws):
            if type(start.sampler) is not type(self):
                raise TypeError(
                    f"start is a run of {type(start.sampler).__name__}, and {type(self).__name__} cannot go on in its "
                    "state: start=draws.x[:, -1] starts at its last positions"
                )
            self._check_chains(len(start.x), "start")
            target.check_inside(start.state.x)
            return self.renew(target, start.state)
        if start is None:
            x = target.sample_base(self.chains)
        elif isinstance(start, Tensor) and tuple(start.shape) == tuple(target.event_shape):
            x = start.expand(self.chains, *start.shape)
        else:
            x = start
        x = target.check_inside(x).contiguous()
        self._check_chains(len(x), "start")
        return self.init(target, x)

    def _check_chains(self, given: int, name: str) -> None:
        if given != self.chains:
            raise ValueError(
                f"{name} has {given} chains and the sampler {self.chains}: make the sampler with chains={given}, or "
                "give one datum for all"
            )

    def _warm_up(self, target: Target, state: State, warmup: int, bar: Any) -> State:
        plan = self.schedule(warmup)
        adapting = Warmup.of(self, target, state, warmup)
        if adapting is not None:
            state = adapting.state
        for _ in range(warmup):
            sampler, size = next(plan, (self, None))
            if size is not None:
                state = state._replace(step_size=torch.full_like(state.step_size, size))
            state, info = sampler.step(target, state)
            if adapting is not None:
                state = adapting.update(state, info)
            bar()
        return state

    def _draw(self, target: Target, state: State, draws: int, thin: int, warmup: int, bar: Any) -> Draws:
        positions = state.position.new_empty((draws, *state.position.shape))
        values = state.log_density.new_empty((draws, len(state.x)))
        acceptance = torch.zeros_like(values)
        diverging = torch.zeros_like(values, dtype=torch.bool)
        for t in range(draws):
            for _ in range(thin):
                state, info = self.step(target, state)
                acceptance[t] += info.acceptance / thin
                diverging[t] |= info.diverging
                bar()
            positions[t], values[t] = state.position, state.log_density
        x, log_jacobian = self.from_positions(target, positions.flatten(0, 1))
        x, values = x.reshape(draws, *state.x.shape), values - log_jacobian.reshape(-1, len(state.x))
        result = Draws(
            x.transpose(0, 1),
            values.T,
            acceptance.T,
            diverging.T,
            float(state.step_size),
            warmup,
            self,
            state,
        )
        if self.acceptance_aim is None:
            _refuse_lost(result)
        return result


def as_target(program: Any, context: Tensor | None) -> Target:
    """The density behind what ``run`` is given."""
    if isinstance(program, Unnormalized):
        return program.target(context)
    if isinstance(program, Target):
        if context is not None:
            raise ValueError("context was given beside a target, which has its own: program.target(context)")
        return program
    if isinstance(program, (Bounded, Implicit)):
        why = "is known only as a bound" if isinstance(program, Bounded) else "is never written down"
        raise TypeError(f"{describe(program)}: its density of x {why}; program.sample(n) draws from it")
    raise TypeError(
        f"program must be a program of kind Unnormalized or Exact, or a Target, got {describe(program)}: of a fit pass "
        "result.program, of a Pyro program pg.Unnormalized(model, event_shape)"
    )


def _refuse_lost(draws: Draws) -> None:
    lost = ~torch.isfinite(draws.log_density)
    if bool(lost.any()):
        chains = lost.any(1).nonzero().flatten().tolist()
        step = int(lost.any(0).nonzero()[0])
        raise Divergence(
            f"log f is not finite in {len(chains)} of {len(lost)} chains, first at draw {step} of chain {chains[0]}: "
            "take a smaller step size, or a sampler that rejects such steps (MALA, HMC)",
            step,
            [],
            chains,
            draws,
        )


@dataclass(frozen=True)
class GradientChains(Chains):
    """Base of the samplers that follow the gradient of log f, in unconstrained space."""

    def first_guess(self, position: Tensor) -> float:
        """The step size where none is given, from the number of coordinates."""
        raise NotImplementedError

    def check_target(self, target: Target) -> None:
        if target.support.is_discrete:
            raise TypeError(
                f"{type(self).__name__} follows the gradient of log f in continuous data, and the support is discrete "
                f"({target.support}): use Gibbs(), or Gibbs(informed=True) for many entries"
            )

    def _step_size(self, y: Tensor, step_size: Tensor | float | None) -> Tensor:
        if isinstance(step_size, Tensor):
            return step_size.to(y)
        return torch.full((), self.first_guess(y) if step_size is None else step_size, dtype=y.dtype, device=y.device)

    def init(self, target: Target, x: Tensor, *, step_size: Tensor | float | None = None) -> State:
        with torch.no_grad():
            y = target.from_support(x.detach())
            value, gradient = target.unconstrained().value_and_score(y)
            return State(x.detach(), value, gradient, self._step_size(y, step_size), y.new_ones(y.shape[1:]), y)

    def from_positions(self, target: Target, y: Tensor) -> tuple[Tensor, Tensor]:
        if target.unconstrained() is target:
            return y, y.new_zeros(len(y))
        transform = biject_to(target.support)
        x = transform(y)
        return x, transform.log_abs_det_jacobian(y, x).reshape(len(y), -1).sum(1)

    def renew(self, target: Target, state: State) -> State:
        with torch.no_grad():  # positions as they are: there and back through the support would round them
            value, gradient = target.unconstrained().value_and_score(state.position)
            return state._replace(log_density=value, gradient=gradient)


# ------------------------------------------------------------------------------------------------ parts of a transition
def normal_like(y: Tensor) -> Tensor:
    """Standard normal noise of the shape of y."""
    return torch.normal(0.0, 1.0, y.shape, dtype=y.dtype, device=y.device)


def rows(terms: Tensor) -> Tensor:
    """Sum of each chain's terms, in float64: ``(chains,)``."""
    return terms.flatten(1).sum(1, dtype=torch.float64)


def metropolis(log_ratio: Tensor, energy_loss: float = math.inf) -> tuple[Tensor, Info]:
    """Which proposals are accepted, with probability min(1, ratio); none whose ratio is not finite.

    Args:
        log_ratio: ``(chains,)``, float64; energy_loss: nats beyond which a rejected proposal is flagged.
    """
    finite = torch.isfinite(log_ratio)
    acceptance = torch.where(finite, log_ratio.clamp(max=0.0).exp(), 0.0)
    accepted = torch.rand(acceptance.shape, dtype=acceptance.dtype, device=acceptance.device) < acceptance
    return accepted, Info(acceptance, ~finite if math.isinf(energy_loss) else ~(finite & (log_ratio > -energy_loss)))


def choose(accepted: Tensor, proposal: Tensor, now: Tensor) -> Tensor:
    """The proposal of the chains that accepted it, the present of the others."""
    return torch.where(accepted.reshape(-1, *[1] * (now.dim() - 1)), proposal, now)


# ----------------------------------------------------------------------------------------------------------- arguments
def check_positive(value: Any, name: str) -> float:
    """A positive finite number; a ``ValueError`` that names the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {describe(value)}")
    return float(value)


def check_aim(value: Any) -> None:
    """An acceptance in (0, 1); a ``ValueError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"acceptance_aim must be a number in (0, 1), got {describe(value)}")


@contextmanager
def bar_of(steps: int, shown: bool | None) -> Iterator[Any]:
    """Shows how many of the steps are done; called once a step."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("sample", total=steps)
        yield lambda: bar.advance(task)
