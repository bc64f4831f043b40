r"""The probability-flow ODE of a noised program: the smooth map between noise and data, and its determinant.

A noised program says at every level what is datum and what is noise in :math:`y = \alpha u + \sigma\varepsilon`. Among
all processes with its densities p_t one is deterministic, :math:`\dot y = \alpha' \hat u + \sigma' \hat\varepsilon`. In
coordinates that keep variance 1, and with an angle for the level,

.. math:: w = \frac{y}{\sqrt{\alpha^2 + \sigma^2}}, \quad \tan\varphi = \frac\sigma\alpha, \qquad
          \frac{dw}{d\varphi} = \cos\varphi\, \hat\varepsilon - \sin\varphi\, \hat u ,

whatever the schedule: α' and σ' have dropped out, and schedules differ only in how far they go. The variable here is
:math:`\ell = \log\tan\varphi = -\tfrac12 \log \mathrm{SNR}`, with :math:`dw/d\ell = \sin\varphi \cos\varphi\,
dw/d\varphi`. The factor takes the sting out of both ends: with a network that predicts ε the right hand side is
:math:`\sin\varphi\,(\hat\varepsilon - \sin\varphi\, w)`, with one that predicts u it is :math:`\cos\varphi\,
(\cos\varphi\, w - \hat u)`, with v it is :math:`\sin\varphi \cos\varphi\, \hat v`; nothing is divided by what may be 0.

The far end is taken for noise, :math:`z = w(\ell_1) \sim N(0, I)`, which for data of mean 0 is wrong by a mean of size
α there. The near end is the datum, :math:`x = m + s\, w(\ell_0) / \cos\varphi_0 = m + s\, y / \alpha`: the density of x
is that of the data blurred by noise of standard deviation :math:`s\, \sigma/\alpha` at the least time the program is
trained at; its mean is not moved. As in `ContinuousFlow`,
:math:`d \log|\det \partial w / \partial w_0| / d\ell = \operatorname{tr} \partial_w (dw/d\ell)`, and the Jacobian J
itself obeys :math:`dJ/d\ell = \partial_w (dw/d\ell)\, J`.

References:
    Y. Song et al., "Score-based generative modeling through stochastic differential equations", 2021,
    arXiv:2011.13456, eqs. 13 and 39; T. Karras et al., 2022, arXiv:2206.00364, eq. 4.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen.base import Noised
from pyro_gen.nn.snapshot import snapshot
from pyro_gen.transforms.odes import (
    DOPRI5,
    HEUN,
    RK4,
    error_ratio,
    one_step,
    solve_adaptive,
    solve_fixed,
    solve_steps,
    stage_times,
)

__all__ = ["Accuracy", "Solved", "Transport"]

FARTHEST = math.log(1e3)  # ℓ: where a schedule goes further, to pure noise, the ODE starts here
TOGETHER = 4096  # rows that a network takes at once where it runs on copies of them
PLANNED_ON = 128  # draws of the noise, for which a plan keeps the tolerance
HALVINGS = 4
PAYS = 150  # solves of one shape, after which its step is compiled
FEW_ROWS = 64  # in one solve, up to which time goes to Python and not to arithmetic

logger = logging.getLogger("pyro_gen")

Solver = Literal["dopri5", "dopri8", "bosh3", "adaptive_heun", "rk4", "heun"]


@dataclass(frozen=True)
class Accuracy:
    """How the ODE is solved: the method and what it keeps to.

    Attributes:
        solver: one of torchdiffeq's adaptive methods, or ``"rk4"``, ``"heun"`` of so many equal ``steps`` in ℓ.
        rtol, atol: of a step's error, in w (units of the noise) and in nats.
    """

    solver: Solver
    rtol: float
    atol: float
    steps: int | None

    def tighter(self, factor: float) -> Accuracy:
        """The same by tolerances divided by a factor, or with as many more steps."""
        if self.steps is None:
            return Accuracy(self.solver, self.rtol / factor, self.atol / factor, None)
        return Accuracy(self.solver, self.rtol, self.atol, math.ceil(self.steps * factor))


class Solved(NamedTuple):
    """The end of a solve, float64.

    Attributes:
        w: ``(rows, D)``. ladj: log|det dw/dw_0|, ``(rows, columns)``, one column a probe, or one if exact; None where
            it was not asked for. jacobian: ``(rows, D, D)``, likewise.
        path: states w at the times of the path, ``(times, rows, D)``.
    """

    w: Tensor
    ladj: Tensor | None
    jacobian: Tensor | None
    path: Tensor | None = None


class Level(NamedTuple):
    """Of one ℓ: dw/dℓ = own · w + out · F(seen · w, level)."""

    own: Any
    out: Any
    seen: Any
    level: Any


class Transport:
    """The ODE of one program, with the weights of now, in evaluation mode.

    Args:
        program: a noised program. guidance: of a program trained with and without its context.
    """

    def __init__(self, program: Noised, guidance: float | None = None) -> None:
        self.program = cast(Noised, snapshot(program))
        for name, part in list(self.program.__dict__.items()):  # what a bare `Noised` holds beside its submodules
            if isinstance(part, nn.Module):
                self.program.__dict__[name] = snapshot(part).eval()
        self.program.eval()
        self.guidance, self.event_shape, self.size = guidance, program.event_shape, program.event_shape.numel()
        self._plans: dict[Any, Tensor] = {}
        self._tables: dict[Any, Tensor] = {}
        self._asked: dict[Any, int] = {}
        self._steps: dict[Any, Any] = {}

    @property
    def template(self) -> Tensor:
        return self.program.template()

    def tensors(self) -> list[Tensor]:
        """All that the map reads."""
        modules = [self.program, *(part for part in self.program.__dict__.values() if isinstance(part, nn.Module))]
        found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        return list(found.values())

    # -------------------------------------------------------------------------------------------------------- the ends
    @property
    @torch.no_grad()
    def ends(self) -> tuple[float, float]:
        """ℓ of datum and noise."""
        times = torch.tensor(self.program.times, dtype=self._clock)
        near, far = (-self.program.schedule.log_snr(times) / 2).tolist()
        return near, min(far, FARTHEST)

    @property
    def _clock(self) -> torch.dtype:
        """What times are computed in: float64, unless the schedule has weights of another type."""
        schedule = self.program.schedule
        own = next(schedule.parameters(), None) if isinstance(schedule, nn.Module) else None
        return torch.float64 if own is None else own.dtype

    def _affine(self) -> tuple[Tensor, Tensor]:
        shape, program = self.event_shape, self.program
        scale = program.scale.double().expand(shape).reshape(-1)
        near = self.ends[0]
        return program.location.double().expand(shape).reshape(-1), scale * math.sqrt(1 + math.exp(2 * near))

    def to_data(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """x = m + s w / cos φ_0 of the near end's w, ``(rows, D)``, and log|det dx/dw|, a scalar."""
        location, factor = self._affine()
        return location + factor * w, factor.log().sum()

    def from_data(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`to_data`, likewise."""
        location, factor = self._affine()
        return (x.double() - location) / factor, -factor.log().sum()

    def to_level(self, w: Tensor, at: Tensor) -> Tensor:
        """x_t = m + s y of w ``(times, rows, D)`` at ℓ ``(times,)``."""
        program = self.program
        with torch.no_grad():
            t = self._times(at)
            norm = (program.schedule.alpha(t).square() + program.schedule.sigma(t).square()).sqrt().to(w)
        location, scale = (
            part.double().expand(self.event_shape).reshape(-1) for part in (program.location, program.scale)
        )
        return location + scale * (norm[:, None, None] * w)

    # ------------------------------------------------------------------------------------------------------- the field
    def _times(self, at: Tensor) -> Tensor:
        first, last = self.program.times
        return self.program.schedule.time((-2 * at).to(self._clock)).clamp(first, last)

    @torch.no_grad()
    def levels(self, at: Tensor) -> list[Level]:
        """What the field needs to know of each ℓ, ``(n,)`` in float64 on the CPU."""
        t = self._times(at)
        c, schedule = self.program.coefficients(t), self.program.schedule
        norm = (schedule.alpha(t).square() + schedule.sigma(t).square()).sqrt()
        cos, sin = (-2 * at).sigmoid().sqrt(), (2 * at).sigmoid().sqrt()
        own = sin * cos * norm * (cos * c.noise[0] - sin * c.data[0])
        out = sin * cos * (cos * c.noise[1] - sin * c.data[1])
        return [
            Level(*row)
            for row in zip(*(part.tolist() for part in (own, out, c.scale * norm, self.program.levels(t))), strict=True)
        ]

    def field(
        self, rows: int, context: Tensor | None, vectors: Tensor | None, *, exact: bool, jacobian: bool, graph: bool
    ) -> Callable[[Level, Tensor], Tensor]:
        """d(w, ladj, J)/dℓ as a function of the level and of the state, ``(rows, D + columns + D²)``.

        Args:
            context: ``(rows, *context_shape)``. vectors: ``(K, rows, D)``, the probes or unit vectors, or None.
            exact: the vectors are the unit vectors. jacobian: J is part of the state.
            graph: derivatives are asked for.
        """
        size, columns = self.size, 0 if vectors is None else 1 if exact else len(vectors)
        copies = 1 if vectors is None or len(vectors) * rows > TOGETHER else len(vectors)
        if context is not None and copies > 1:
            context = context.repeat(copies, *[1] * (context.dim() - 1))
        network, like, shape = self.program.output(context, self.guidance), self.template, self.event_shape
        along = None if vectors is None else vectors.to(like)

        def output(y: Tensor, level: Any) -> Tensor:
            told = level.to(y).expand(len(y)) if isinstance(level, Tensor) else y.new_full((len(y),), level)
            return network(y.reshape(-1, *shape), told).reshape(len(y), size)

        def products(y: Tensor, level: Any) -> tuple[Tensor, Tensor]:
            """F and the products vᵀ ∂F/∂y, ``(K, rows, D)``."""
            assert along is not None
            with torch.enable_grad():
                many = y if copies == 1 else y.repeat(copies, 1)
                many = many if graph else many.detach()
                many = many if many.requires_grad else many.requires_grad_()
                out = output(many, level)
                if not out.requires_grad:  # a network that does not read y
                    return out[:rows], torch.zeros_like(along)
                if copies > 1:
                    (found,) = torch.autograd.grad(out, many, along.reshape(-1, size), create_graph=graph)
                    return out[:rows], found.reshape(along.shape)
                last = len(along) - 1
                parts = [
                    torch.autograd.grad(out, many, v, create_graph=graph, retain_graph=graph or i < last)[0]
                    for i, v in enumerate(along)
                ]
                return out, torch.stack(parts)

        def slope(at: Level, state: Tensor) -> Tensor:
            w = state[:, :size]
            y = (at.seen * w).to(like.dtype)
            if vectors is None:
                alone: Tensor = at.own * w + at.out * output(y, at.level).to(w.dtype)
                return alone
            out, found = products(y, at.level)
            if not graph:
                out = out.detach()
            rate = at.own * w + at.out * out.to(w.dtype)
            found, gain = found.to(w.dtype), at.out * at.seen
            if exact:
                trace = torch.diagonal(found, dim1=0, dim2=2).sum(-1, keepdim=True)
            else:
                trace = (found * vectors).sum(-1).T
            parts = [rate, gain * trace + at.own * size]
            if jacobian:
                j = state[:, size + columns :].reshape(rows, size, size)
                parts.append((at.own * j + gain * (found.transpose(0, 1) @ j)).flatten(1))
            return torch.cat(parts, 1)

        return slope

    # ------------------------------------------------------------------------------------------------------- the solve
    def solve(
        self,
        w: Tensor,
        context: Tensor | None,
        accuracy: Accuracy,
        *,
        to_noise: bool,
        vectors: Tensor | None = None,
        exact: bool = False,
        jacobian: bool = False,
        graph: bool = False,
        planned: bool = False,
        watch: bool = False,
        path: int | None = None,
    ) -> Solved:
        """Carry w from the near end to the far one or back.

        Args:
            w: ``(rows, D)``. context: of each row. vectors: probes ``(K, rows, D)`` of Hutchinson's estimate.
            exact: the exact trace. jacobian: J too. graph: so that all of it can be differentiated.
            planned: by steps found beforehand, and refined where a row asks for it; see :meth:`plan`.
            watch: these keep the tolerance for the exact log-determinant too.
            path: report w at so many steps besides.

        Raises:
            ArithmeticError: where the tolerance cannot be kept.
        """
        rows, size = w.shape
        if exact:
            eye = torch.eye(size, dtype=torch.float64, device=w.device)
            vectors = eye[:, None, :].expand(size, rows, size)
        columns = 0 if vectors is None else 1 if exact else len(vectors)
        state = torch.cat([w.double(), w.new_zeros(rows, columns, dtype=torch.float64)], 1) if columns else w.double()
        if jacobian:
            eye = torch.eye(size, dtype=torch.float64, device=w.device)
            state = torch.cat([state, eye.flatten().expand(rows, -1)], 1)
        slope = self.field(rows, context, vectors, exact=exact, jacobian=jacobian, graph=graph)
        ends = self.ends if to_noise else self.ends[::-1]
        with torch.set_grad_enabled(graph):
            if planned:
                step = None if graph else self.compiled_step(state, exact=exact, jacobian=jacobian, context=context)
                end = self._by_plan(slope, state, accuracy, context, to_noise=to_noise, watch=watch, compiled=step)
                way = None
            elif accuracy.solver in ("rk4", "heun"):
                assert accuracy.steps is not None
                grid = torch.linspace(*ends, accuracy.steps + 1, dtype=torch.float64)
                tableau = RK4 if accuracy.solver == "rk4" else HEUN
                seen: list[Tensor] = []
                levels = self.levels(stage_times(grid, tableau))
                end = solve_fixed(lambda i, s: slope(levels[i], s), state, grid, tableau, path=seen)[0]
                way = torch.stack(seen) if path is not None else None
                if not bool(torch.isfinite(end).all()):
                    raise ArithmeticError(
                        f"{accuracy.solver} with steps={accuracy.steps} left the finite numbers: take more steps, or "
                        "solver='dopri5', which keeps a tolerance"
                    )
            else:
                grid = torch.linspace(*ends, (path or 1) + 1, dtype=torch.float64)
                way = solve_adaptive(
                    lambda at, s: slope(self.levels(at.detach().cpu().double().reshape(1))[0], s),
                    state,
                    *ends,
                    solver=accuracy.solver,
                    rtol=accuracy.rtol,
                    atol=accuracy.atol,
                    norm=self.norm(columns),
                    times=grid,
                )
                end = way[-1]
        return Solved(
            end[:, :size],
            end[:, size : size + columns] if columns else None,
            end[:, size + columns :].reshape(rows, size, size) if jacobian else None,
            None if way is None or path is None else way[..., :size],
        )

    def norm(self, columns: int) -> Callable[[Tensor], Tensor]:
        """Root mean square of a row's error in w, or its error in ladj, of the row where it is largest; J's is not
        looked at, so that it is the derivative of the w that comes with it, step by step."""
        size = self.size

        def worst(error: Tensor) -> Tensor:
            largest = error[:, :size].square().mean(1).sqrt().max()
            return torch.maximum(largest, error[:, size : size + columns].abs().max()) if columns else largest

        return worst

    # -------------------------------------------------------------------------------------------------------- the plan
    def plan(self, accuracy: Accuracy, context: Tensor | None, *, watch: bool = False) -> Tensor:
        """Steps from noise to data that suit the program: those that an adaptive solve takes for draws of the noise.

        A solve over steps that are always the same is a smooth map, its gradient is exact, and what depends on the
        level is computed once. A row for which they are too long is noticed by the error that comes with each step.

        Args:
            watch: the tolerance holds for the log-determinant too.
        """
        key = (accuracy, watch, tuple(_versions(self.tensors())))
        if key in self._plans:
            return self._plans[key]
        size, like = self.size, self.template
        rows = PLANNED_ON if not watch else max(1, min(PLANNED_ON, TOGETHER // size))
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(rows, size, generator=generator, dtype=torch.float64).to(like.device)
        vectors = None
        if watch:
            eye = torch.eye(size, dtype=torch.float64, device=like.device)
            vectors = eye[:, None, :].expand(size, rows, size)
            state = torch.cat([state, state.new_zeros(rows, 1)], 1)
        if context is not None:
            context = context.detach()[torch.arange(rows, device=context.device) % len(context)]
        slope = self.field(rows, context, vectors, exact=watch, jacobian=False, graph=False)
        near, far = self.ends
        taken: list[float] = []
        with torch.no_grad():
            solve_adaptive(
                lambda at, s: slope(self.levels(at.detach().cpu().double().reshape(1))[0], s),
                state,
                far,
                near,
                solver="dopri5",
                rtol=accuracy.rtol,
                atol=accuracy.atol,
                norm=self.norm(int(watch)),
                taken=taken,
            )
        if len(self._plans) > 8:  # those of weights that are gone
            self._plans.clear()
        self._plans[key] = torch.tensor([*taken, near], dtype=torch.float64)
        return self._plans[key]

    def _by_plan(
        self,
        slope: Callable[[Level, Tensor], Tensor],
        state: Tensor,
        accuracy: Accuracy,
        context: Tensor | None,
        *,
        to_noise: bool,
        watch: bool,
        compiled: Callable[..., Any] | None,
    ) -> Tensor:
        grid = self.plan(accuracy, context, watch=watch)
        grid = grid.flip(0) if to_noise else grid
        ratio, part = math.inf, slice(0, self.size + int(watch))
        for _ in range(HALVINGS + 1):
            table = self.tables(grid)
            if compiled is None:
                levels = [Level(*row) for row in table.tolist()]
                solved = solve_fixed(lambda i, s, at=levels: slope(at[i], s), state, grid, DOPRI5)  # type: ignore[misc]
            else:
                solved = solve_steps(compiled, slope(Level(*table[0].tolist()), state), state, grid, table, DOPRI5)
            end, errors, greatest = solved
            assert errors is not None
            ratio = error_ratio(
                errors[..., part], greatest[..., part], accuracy.rtol, accuracy.atol, self.norm(int(watch))
            )
            if ratio <= 1:
                return end
            grid = torch.cat([torch.stack([grid[:-1], (grid[:-1] + grid[1:]) / 2], 1).flatten(), grid[-1:]])
        raise ArithmeticError(
            f"the ODE misses its tolerance (rtol={accuracy.rtol:g}, atol={accuracy.atol:g}) by a factor {ratio:.3g} "
            f"for a row, at {(len(grid) - 1) // 2} steps: the point lies where the network was never trained, or the "
            "weights are not finite; start closer to the data, allow a larger tolerance, "
            "method=ProbabilityFlow(rtol=1e-2, atol=1e-2), or train longer"
        )

    def tables(self, grid: Tensor) -> Tensor:
        """The levels of all stages of a grid, ``(stages, 4)`` in float64 on the CPU; kept for the grids of late."""
        key = (tuple(grid.tolist()), tuple(_versions(self.tensors())))
        if key not in self._tables:
            if len(self._tables) > 16:
                self._tables.clear()
            self._tables[key] = torch.tensor(self.levels(stage_times(grid, DOPRI5)), dtype=torch.float64)
        return self._tables[key]

    # ------------------------------------------------------------------------------------------------ compiled steps
    def compiled_step(self, state: Tensor, *, exact: bool, jacobian: bool, context: Tensor | None) -> Any:
        """One step of many rows of stages as compiled code, once so many solves of this shape have been asked for that
        compiling pays; None before, with a context, or where it cannot be compiled (which is said in the log)."""
        key = (tuple(state.shape), exact, jacobian)
        self._asked[key] = asked = self._asked.get(key, 0) + 1
        if context is not None or len(state) > FEW_ROWS or asked < PAYS or self.template.device.type != "cpu":
            return None
        if key not in self._steps:
            self._steps[key] = self._compile(state, exact=exact, jacobian=jacobian)
        return self._steps[key]

    def _compile(self, state: Tensor, *, exact: bool, jacobian: bool) -> Any:
        rows, size = len(state), self.size
        eye = torch.eye(size, dtype=torch.float64, device=state.device)
        vectors = eye[:, None, :].expand(size, rows, size) if exact else None

        def step(state: Tensor, first: Tensor, h: Tensor, table: Tensor) -> tuple[Tensor, ...]:
            slope = self.field(rows, None, vectors, exact=exact, jacobian=jacobian, graph=False)
            return one_step(lambda j, s: slope(Level(*table[j].unbind()), s), state, first, h, DOPRI5)

        near, far = self.ends
        grid = torch.tensor([far, far - (far - near) / 20], dtype=torch.float64)
        table = self.tables(grid)
        inputs = (state, torch.zeros_like(state), grid[1] - grid[0], table)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's own deprecations
                compiled = torch.compile(make_fx(step)(*inputs))
                expected, found = step(*inputs), compiled(*inputs)
            apart = max(float((a - b).abs().max() / (1 + a.abs().max())) for a, b in zip(expected, found, strict=True))
        except Exception as error:  # noqa: BLE001 - whatever tracing or the compiler meets: the steps run as they did
            logger.info(
                "the ODE is not compiled: %s", str(error).splitlines()[0] if str(error) else type(error).__name__
            )
            return None
        if apart > 100 * torch.finfo(self.template.dtype).eps:
            logger.warning("the ODE is not compiled: its compiled step is %.2g away from the step itself", apart)
            return None
        return compiled


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]
