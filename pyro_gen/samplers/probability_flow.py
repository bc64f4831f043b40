r"""The probability flow: one ODE that draws from a noised program, encodes data as noise, and has their log-density.

`Transport` has the equation, in coordinates in which it is the same for all schedules and regular at both ends. From
noise to data it is a sampler without randomness of its own; from data to noise, with the trace of its right hand side
added up, it is the density

.. math:: \log p(x) = \log N(z; 0, I) + \log|\det \partial z/\partial x| , \qquad z = T^{-1}(x),

of what the sampler draws: of the data *blurred* by noise of standard deviation :math:`s\,\sigma/\alpha` at the least
time the program is trained at, as far as the network has learnt the score. It is another model than the reverse chain
of the same network (the two are one for the exact score only), so the bound of the chain may lie on either side of it.

The trace is exact by D products with the network's Jacobian at every stage, or Hutchinson's estimate of it, with an
error measured between probes of the same row. The numerical error of the exact one is measured too: the solve is run
again with tolerances ten times tighter, and the difference is what is reported; it mostly belongs to the looser solve,
and the value given is the tighter one's.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Evidence, Noised, Program
from pyro_gen.checks import check_count, describe
from pyro_gen.distributions.ode import Course, ODEDistribution
from pyro_gen.distributions.transport import Accuracy, Solver, Transport
from pyro_gen.samplers.chains import check_positive

__all__ = ["ProbabilityFlow"]

EXACT_UP_TO = 50  # features of an exact trace that need not be forced
AUTO_UP_TO = 16  # features for which trace="auto" is exact, as in `ContinuousFlow`
NUMBERS = 2**18  # of one chunk of rows
FOR_NUTS = 1e-3  # tolerance of the steps of a distribution, in standard deviations of the noise
WAYPOINTS = 50  # of a trajectory by an adaptive solver

Trace = Literal["auto", "exact", "hutchinson"]


@dataclass(frozen=True, repr=False)
class ProbabilityFlow:
    r"""Draws, encodings and log-densities of a noised program by its probability-flow ODE.

    .. math:: \frac{dw}{d\varphi} = \cos\varphi\, \hat\varepsilon - \sin\varphi\, \hat u, \qquad
              \log p(x) = \log N(z) + \log|\det \partial z / \partial x|

    Args:
        solver: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"adaptive_heun"``, which keep a tolerance; or ``"rk4"``,
            ``"heun"`` with ``steps``, which have none.
        rtol, atol: relative and absolute tolerance of a step, in standard deviations of the noise and in nats; the row
            with the largest error keeps it.
        steps: of ``"rk4"`` and ``"heun"``, equal in log SNR; with another solver the number of parts of a trajectory.
        trace: ``"exact"``, ``"hutchinson"``, or ``"auto"``: exact for up to 16 features.
        probes: of Hutchinson's estimate, ±1 each, for a row.
        force: allow the exact trace for more than 50 features.
        seed: of the probes.

    References:
        Y. Song et al., "Score-based generative modeling through stochastic differential equations", 2021,
        arXiv:2011.13456, eqs. 13, 39 and 40; W. Grathwohl et al., "FFJORD", 2019, arXiv:1810.01367, eq. 8.

    Example:
        >>> from pyro_gen.base import Noised
        >>> from pyro_gen.distributions.noise import CosineSchedule
        >>> schedule = CosineSchedule()
        >>> def denoiser(y, t):  # of standard normal data
        ...     return schedule.alpha(t).unsqueeze(-1) * y
        >>> program = Noised(lambda x: None, None, 2, schedule=schedule, denoiser=denoiser)
        >>> ProbabilityFlow().log_evidence(program, torch.zeros(1, 2)).value
        tensor([-1.8379], dtype=torch.float64)
    """

    likelihood_kind: ClassVar[str] = "pf_ode"

    solver: Solver = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    trace: Trace = "auto"
    probes: int = 8
    force: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        for value, name, kind in ((self.solver, "solver", Solver), (self.trace, "trace", Trace)):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, got {describe(value)}")
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")
        check_count(self.probes, "probes")
        if self.steps is not None:
            check_count(self.steps, "steps")
        elif self._fixed:
            raise ValueError(
                f"solver={self.solver!r} takes equal steps: say how many, steps=50, or use 'dopri5', which keeps a "
                "tolerance"
            )

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"ProbabilityFlow({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    @property
    def _fixed(self) -> bool:
        return self.solver in ("rk4", "heun")

    @property
    def accuracy(self) -> Accuracy:
        """Method and tolerances of the solve."""
        return Accuracy(self.solver, self.rtol, self.atol, self.steps if self._fixed else None)

    # ----------------------------------------------------------------------------------------------------------- draws
    @torch.no_grad()
    def sample(
        self,
        program: Program,
        n: int,
        context: Tensor | None = None,
        *,
        guidance: float | None = None,
        seed: int | None = None,
        trajectory: bool = False,
    ) -> Tensor:
        """Draw data: noise, carried to the near end.

        Args:
            program: of kind `Noised`. n: number of rows. context: of each row, ``(n, *context_shape)``.
            guidance: weight of classifier-free guidance. seed: makes the draw repeatable.
            trajectory: all states instead, from noise to data.

        Returns:
            ``(n, *event_shape)``, or ``(steps + 1, n, *event_shape)`` (51 states where ``steps`` is not given).

        Raises:
            ArithmeticError: where the tolerance cannot be kept.
        """
        transport = self._transport(program, guidance)
        check_count(n, "n")
        like = transport.template
        context = _context_of(program, context, n)
        with nullcontext() if seed is None else scopes.forked_generators(seed):
            z = torch.normal(like.new_zeros(n, transport.size), like.new_ones(n, transport.size))
        parts: list[Tensor] = []
        points = (self.steps or WAYPOINTS) if trajectory else None
        for rows in _chunks(n, transport.size):
            given = None if context is None else context[rows]
            solved = transport.solve(z[rows], given, self.accuracy, to_noise=False, path=points)
            x, _ = transport.to_data(solved.w)
            if points is not None and solved.path is not None:
                near, far = transport.ends
                way = transport.to_level(solved.path, torch.linspace(far, near, points + 1, dtype=torch.float64))
                x = torch.cat([way[:-1], x.unsqueeze(0)])  # the last is the datum, y / α at the least noise
            parts.append(x.to(like.dtype))
        drawn = torch.cat(parts, 1 if trajectory else 0)
        return drawn.reshape(*drawn.shape[:-1], *transport.event_shape)

    def encode(self, program: Program, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise z of data and log|det dz/dx|: ``(rows, *event_shape)`` and ``(rows,)``; differentiable.

        The log-determinant is exact, or the mean of Hutchinson's estimates.

        Raises:
            ArithmeticError: where the tolerance cannot be kept. ValueError: for an exact trace of too many features.
        """
        return self._both(program, x, context, to_noise=True)

    def decode(self, program: Program, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The data x of noise and log|det dx/dz|, likewise."""
        return self._both(program, z, context, to_noise=False)

    def _both(
        self, program: Program, value: Tensor, context: Tensor | None, *, to_noise: bool
    ) -> tuple[Tensor, Tensor]:
        transport = self._transport(program, None)
        value, *rest = Program.check(program, value, context)
        exact = self._exact(transport)
        generator = self._generator(value.device)
        ends, ladjs = [], []
        size = transport.size
        for rows in _chunks(len(value), size * size if exact and torch.is_grad_enabled() else size):
            flat, given = value[rows].reshape(-1, size), rest[0][rows] if rest else None
            w, before = transport.from_data(flat) if to_noise else (flat, flat.new_zeros((), dtype=torch.float64))
            course = Course(transport, self.accuracy, given, to_noise, planned=False)
            if exact:
                w, ladj = course.carry(w)
            else:
                graph = torch.is_grad_enabled() and (w.requires_grad or bool(course.weights()))
                vectors = _signs(self.probes, w, generator)
                solved = transport.solve(w, given, self.accuracy, to_noise=to_noise, vectors=vectors, graph=graph)
                assert solved.ladj is not None
                w, ladj = solved.w, solved.ladj.mean(1)
            w, after = (w, before) if to_noise else transport.to_data(w)
            ends.append(w.to(value.dtype))
            ladjs.append((ladj + after).to(value.dtype))
        return torch.cat(ends).reshape(value.shape), torch.cat(ladjs)

    # -------------------------------------------------------------------------------------------------------- densities
    @torch.no_grad()
    def log_evidence(self, program: Program, x: Tensor, context: Tensor | None = None) -> Evidence:
        """log p(x) of each row; in nats, float64 on the CPU.

        Returns:
            Of kind ``"exact"`` for the exact trace: its ``standard_error`` is the numerical error, the difference
            between two solves of which the tighter one's value is given. Of kind ``"estimate"`` for Hutchinson's, with
            the standard error of the mean over probes; the numerical error is then not measured.

        Raises:
            TypeError: for a program that is not `Noised`.
            ValueError: for an exact trace of more than 50 features, or a single probe, which has no error.
            ArithmeticError: where the tolerance cannot be kept.
        """
        transport = self._transport(program, None)
        x, *rest = program.check(x, context)
        exact = self._exact(transport)
        if not exact and self.probes < 2:
            raise ValueError(
                "probes=1 says nothing of its error: take 2 or more, ProbabilityFlow(probes=8), or trace='exact'"
            )
        generator = self._generator(x.device)
        values, errors = [], []
        for rows in _chunks(len(x), transport.size):
            w, scale = transport.from_data(x[rows].reshape(-1, transport.size))
            given = rest[0][rows] if rest else None
            found: Any = []
            if exact:
                for accuracy in (self.accuracy, self.accuracy.tighter(10.0)):
                    solved = transport.solve(w, given, accuracy, to_noise=True, exact=True)
                    assert solved.ladj is not None
                    found.append(_log_normal(solved.w) + solved.ladj[:, 0] + scale)
                values.append(found[1])
                errors.append((found[1] - found[0]).abs())
            else:
                vectors = _signs(self.probes, w, generator)
                solved = transport.solve(w, given, self.accuracy, to_noise=True, vectors=vectors)
                assert solved.ladj is not None
                values.append(_log_normal(solved.w) + solved.ladj.mean(1) + scale)
                errors.append(solved.ladj.std(1) / math.sqrt(self.probes))
        return Evidence(torch.cat(values).cpu(), "exact" if exact else "estimate", torch.cat(errors).cpu())

    def distribution(self, program: Program, context: Tensor | None = None) -> ODEDistribution:
        """The program as a Pyro distribution, with the weights of now.

        Its steps are planned once and then always the same, checked by the error that comes with each: what NUTS moves
        on must be smooth. Draws, and the map from noise that NUTS moves along, keep the solver's tolerances but 1e-3 at
        least, of the noise's standard deviation; ``log_prob`` of data keeps the solver's.

        Raises:
            ValueError: for ``"rk4"`` and ``"heun"``, which cannot tell that they miss a tolerance.
        """
        if self.solver != "dopri5":
            raise ValueError(
                f"a distribution needs solver='dopri5', whose steps bring their error with them, got {self.solver!r}"
            )
        transport = self._transport(program, None)
        accuracy = Accuracy("dopri5", max(self.rtol, FOR_NUTS), max(self.atol, FOR_NUTS), None)
        may = self.force or transport.size <= EXACT_UP_TO
        return ODEDistribution(transport, accuracy, context, density=self.accuracy, exact=may)

    # -------------------------------------------------------------------------------------------------------- arguments
    def _transport(self, program: Program, guidance: float | None) -> Transport:
        if not isinstance(program, Noised):
            raise TypeError(
                f"ProbabilityFlow follows the score at every noise level, which {describe(program)} does not have: it "
                "takes a program of kind Noised (pg.Diffusion); for others see pg.ImportanceSampling, or log_prob"
            )
        return Transport(program, guidance)

    def _exact(self, transport: Transport) -> bool:
        exact = self.trace == "exact" or (self.trace == "auto" and transport.size <= AUTO_UP_TO)
        if exact and transport.size > EXACT_UP_TO and not self.force:
            raise ValueError(
                f"the exact trace of {transport.size} features takes as many products with the network at every stage: "
                "use trace='hutchinson', or force=True if it is worth it"
            )
        return exact

    def _generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def _chunks(rows: int, numbers: int) -> list[slice]:
    most = max(1, min(4096, NUMBERS // numbers))
    return [slice(i, min(rows, i + most)) for i in range(0, rows, most)]


def _signs(probes: int, w: Tensor, generator: torch.Generator | None) -> Tensor:
    """Probes ``(probes, rows, D)`` of ±1."""
    bits = torch.randint(0, 2, (probes, *w.shape), generator=generator, device=w.device)
    return 2.0 * bits.double() - 1.0


def _log_normal(z: Tensor) -> Tensor:
    return -z.square().sum(1) / 2 - z.shape[1] * math.log(2 * math.pi) / 2


def _context_of(program: Program, context: Tensor | None, n: int) -> Tensor | None:
    """The context of each of n rows, checked."""
    if (
        context is not None
        and program.context_shape is not None
        and tuple(context.shape) == tuple(program.context_shape)
    ):
        context = context.expand(n, *context.shape)
    zeros = program.template().new_zeros((n, *program.event_shape))
    checked = Program.check(program, zeros, context)
    return checked[1] if len(checked) > 1 else None
