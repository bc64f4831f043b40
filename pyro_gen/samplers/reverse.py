r"""Reverse diffusion: from noise to data down a grid of levels, one small linear step after another.

A `Noised` program says at every level what is datum and what is noise in :math:`y = \alpha u + \sigma \varepsilon`. A
sampler starts at :math:`y_N \sim N(0, (\alpha^2 + \sigma^2) I)`, the noise that data of variance 1 have become at the
grid's first time, and goes down an explicit grid :math:`t_N > \dots > t_1 > 0`, at last to the datum itself: N steps.
It keeps no state between calls; which levels it visits can be read from `ReverseDiffusion.times` and given.

============== ============================================================= ================= =====
method         the step                                                      evaluations       order
============== ============================================================= ================= =====
``ancestral``  draws from the reverse chain, with the program's variances    N                 —
``ddim``       the same with :math:`\eta` of its noise; none: Euler's step   N                 1
``heun``       Heun's rule in σ/α, after some noise is added again (churn)   2 N − 1           2
``dpm++2m``    :math:`\hat u` extrapolated from two levels                   N                 2
============== ============================================================= ================= =====

Any schedule and any prediction will do: a step is linear in y, the network's output, and noise, and its few numbers are
worked out before the loop, in float64 (`tables.py`). The loop evaluates the network and does three or four in-place
operations; noise comes in blocks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, get_args

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Divergence, Noised, Output, Program
from pyro_gen.checks import check_count, check_rows, describe
from pyro_gen.samplers.chains import bar_of
from pyro_gen.samplers.tables import (
    Heun,
    Levels,
    Linear,
    Spacing,
    chain_of,
    check_times,
    heun,
    levels_of,
    linear,
    multistep,
    span_of,
    times_of,
)

__all__ = ["Method", "ReverseDiffusion"]

Method = Literal["ancestral", "ddim", "heun", "dpm++2m"]
Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
STEPS: dict[str, int] = {"ancestral": 1000, "ddim": 50, "heun": 18, "dpm++2m": 20}
BLOCK = 2**20  # numbers of noise, or of levels, that are made at once


@dataclass(frozen=True)
class ReverseDiffusion:
    r"""Draws of a diffusion model, level by level: DDPM, DDIM, EDM's Heun, DPM-Solver++(2M).

    With :math:`\hat u, \hat\varepsilon` from the network at level t, a step to level s is :math:`y_s = \alpha_s \hat u
    + \sqrt{\sigma_s^2 - \nu^2}\, \hat\varepsilon + \nu z`, with the noise :math:`\nu` of the method; the draws have the
    density of the program's reverse chain (ancestral), or of its probability-flow ODE as the steps get small. Z is
    needed nowhere.

    Args:
        method: ``"ancestral"``, ``"ddim"``, ``"heun"`` or ``"dpm++2m"``.
        steps: number of levels that are visited; default all of a program in discrete time for ``"ancestral"`` (1000 in
            continuous time), else 50, 18 and 20.
        eta: of ``"ddim"``, between 0, no noise (the default), and 1, the ancestral noise.
        grid: the times to visit, decreasing, all above 0, in place of ``steps``: a tensor or a sequence.
        spacing: how ``steps`` times are chosen between the program's ends, both of which are visited: evenly in
            ``"index"``, the number of the level (default in discrete time), in ``"time"`` (default in continuous time),
            in ``"log_snr"``, or in :math:`(\sigma/\alpha)^{1/7}`, ``"karras"`` (default of ``"heun"``, which needs the
            steps of σ/α to be small beside it). In discrete time the nearest trained levels are taken, none twice.
        s_churn: of ``"heun"``: noise that is added before each step, in units of σ/α spread over all steps; 0 for none.
        s_min, s_max: the σ/α between which it is added; s_noise: its standard deviation.

    What a program may say beside the contract of `Noised`. In discrete time its levels are its attribute ``grid``,
    ``(T + 1,)`` with 0 first. The variances of its reverse chain are its method ``reverse_variance(t, s)``, of
    :math:`y_s` given :math:`y_t` for times of shape ``(steps,)``, to ``(steps,)`` or ``(steps, *event_shape)``; where
    the network gives them, ``output_and_variance(context, guidance)`` is a function like that of ``output`` that
    returns F and w, which is -1 at the least variance, the posterior's, and 1 at that of standard normal data, linear
    in logs; else it is None. Without either the ancestral method uses the posterior variance (Ho et al.'s
    :math:`\tilde\beta`). The last step, to the datum, adds no noise.

    Raises:
        ValueError: for an unknown method or spacing, ``steps`` below 1, a grid that does not decrease to above 0,
            ``eta`` outside [0, 1], and options of another method.

    References:
        J. Ho et al., 2020, arXiv:2006.11239, algorithm 2; J. Song et al., 2021, arXiv:2010.02502, eq. 12; T. Karras et
        al., 2022, arXiv:2206.00364, algorithm 2; C. Lu et al., 2022, arXiv:2211.01095, algorithm 2.

    Example:
        >>> from pyro_gen.distributions.noise import RectifiedSchedule
        >>> normal = Noised(  # of standard normal data: the mean of the datum given y_t, with α = 1 - t and σ = t
        ...     lambda x: None, None, 2, schedule=RectifiedSchedule(),
        ...     denoiser=lambda y, t: ((1 - t) / ((1 - t) ** 2 + t**2)).unsqueeze(-1) * y,
        ... )
        >>> ReverseDiffusion("ddim", 100).sample(normal, 20_000, seed=0).std(0)
        tensor([...])
    """

    method: Method = "ancestral"
    steps: int | None = None
    _: KW_ONLY
    eta: float | None = None
    grid: Sequence[float] | Tensor | None = None
    spacing: Spacing | None = None
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            names = ", ".join(map(repr, get_args(Method)))
            raise ValueError(f"method must be one of {names}, got {describe(self.method)}")
        if self.steps is not None:
            check_count(self.steps, "steps")
        if self.spacing is not None and self.spacing not in get_args(Spacing):
            names = ", ".join(map(repr, get_args(Spacing)))
            raise ValueError(f"spacing must be one of {names}, got {describe(self.spacing)}")
        if self.grid is not None:
            if self.steps is not None or self.spacing is not None:
                raise ValueError("grid has its own steps and spacing: give steps= and spacing=, or grid= alone")
            object.__setattr__(self, "grid", _decreasing(self.grid))
        self._check_noise()

    def _check_noise(self) -> None:
        if self.eta is not None:
            if self.method != "ddim":
                other = "has eta 1" if self.method == "ancestral" else "has none"
                raise ValueError(f"eta belongs to method='ddim', and method={self.method!r} {other}: leave it out")
            if not _number(self.eta) or not 0 <= self.eta <= 1:
                raise ValueError(
                    f"eta must be a number in [0, 1], from no noise to the ancestral one, got {describe(self.eta)}"
                )
        for name, least in (("s_churn", 0.0), ("s_min", 0.0), ("s_max", 0.0), ("s_noise", 0.0)):
            value = getattr(self, name)
            if not _number(value) or not value >= least:
                raise ValueError(f"{name} must be a number of at least 0, got {describe(value)}")
        if not math.isfinite(self.s_churn) or not math.isfinite(self.s_noise):
            raise ValueError(f"s_churn and s_noise must be finite, got {self.s_churn:g} and {self.s_noise:g}")
        if self.s_churn and self.method != "heun":
            raise ValueError(f"s_churn belongs to method='heun', and method={self.method!r} has none: leave it out")

    def times(self, program: Noised) -> Tensor:
        """The times that are visited, ``(steps,)`` in float64, decreasing; the datum comes after the last.

        Raises:
            TypeError: for a program without a score at every noise level.
            ValueError: for more steps than the program has levels, or times at which it is not trained.
        """
        if not isinstance(program, Noised):
            raise TypeError(
                f"ReverseDiffusion needs a program with a score at every noise level (Noised, pg.Diffusion), got "
                f"{describe(program)}: program.sample(n) draws from a program of any other kind with a normalised model"
            )
        with torch.no_grad():
            if self.grid is not None:
                return check_times(program, torch.as_tensor(self.grid, dtype=torch.float64))
            steps, chain = self.steps, chain_of(program)
            if steps is None:
                steps = STEPS[self.method]
                if chain is not None:
                    steps = len(chain) if self.method == "ancestral" else min(steps, len(chain))
            return times_of(
                program, steps, "karras" if self.spacing is None and self.method == "heun" else self.spacing
            )

    def sample(
        self,
        program: Noised,
        n: int,
        context: Tensor | None = None,
        *,
        guidance: float | None = None,
        start: Tensor | None = None,
        seed: int | None = None,
        trajectory: bool = False,
        progress: bool | None = None,
    ) -> Tensor:
        """Draw data, with the weights of now; the network runs in evaluation mode, without gradients.

        Args:
            program: a program with a score at every noise level.
            n: number of rows.
            context: of each row, ``(n, *context_shape)``, for a conditional program.
            guidance: weight of classifier-free guidance, for a program trained for it.
            start: where the rows begin at the first time, ``(n, *event_shape)`` in units of the data; default noise.
            seed: makes the draw repeatable and leaves the global generators as they were.
            trajectory: return the rows at every time of the grid as well.
            progress: show a progress bar; None shows it if standard error is a terminal.

        Returns:
            Draws in units of the data, ``(n, *event_shape)``; with ``trajectory`` all :math:`x_t`, from the noise to
            the draws, ``(steps + 1, n, *event_shape)``.

        Raises:
            TypeError, ValueError: for arguments that do not fit the program, as the message says.
            Divergence: if rows end at numbers that are not finite.
        """
        plan = self._planned(program)
        check_count(n, "n")
        location, scale = program.location, program.scale
        like = location.new_zeros((n, *program.event_shape))
        if context is not None or program.context_shape is not None:
            context = Program.check(program, like, context)[1]
        with ExitStack() as stack:
            for entered in (torch.no_grad(), poutine.block(), scopes.evaluation_mode(program)):
                stack.enter_context(entered)
            if seed is not None:
                stack.enter_context(scopes.forked_generators(seed))
            net = program.output(context, guidance)
            times, levels = plan.times, plan.levels
            y = _begin(program, levels, like, start)
            pair = _learned_output(program, context, guidance) if self.method == "ancestral" else None
            states = _states(plan.table, net, y) if pair is None else _learned(levels, pair, y)
            bar = stack.enter_context(bar_of(len(times), progress))
            path = None
            if trajectory:
                path = y.new_empty((len(times) + 1, *y.shape))
                torch.addcmul(location, y, scale, out=path[0])
            for i, state in enumerate(states, 1):
                if path is not None:
                    torch.addcmul(location, state, scale, out=path[i])
                bar()
                y = state
            x = torch.addcmul(location, y, scale) if path is None else path[-1]
            _refuse_lost(x, len(times), path)
            return x if path is None else path

    def _planned(self, program: Noised) -> Plan:
        """The numbers of all steps: those of the last call, where the program says that they cannot have changed."""
        fixed = program.fixed if isinstance(program, Noised) else None
        kept: Plan | None = None if fixed is None else program.__dict__.get("_plan")
        if kept is not None and kept.sampler == self and kept.holds(fixed):
            return kept
        times = self.times(program)
        with torch.no_grad():
            levels = levels_of(program, times)
            plan = Plan(self, times, levels, self._table(program, times, levels), fixed or (), _versions(fixed or ()))
        if fixed is not None:
            program.__dict__["_plan"] = plan
        return plan

    def _table(self, program: Noised, times: Tensor, levels: Levels) -> Linear | Heun:
        if self.method == "heun":
            return heun(program, times, levels, self.s_churn, (self.s_min, self.s_max), self.s_noise)
        if self.method == "dpm++2m":
            return multistep(levels)
        if self.method == "ancestral":
            return linear(levels, 1.0, _variances(program, times))
        return linear(levels, 0.0 if self.eta is None else float(self.eta))


class Plan(NamedTuple):
    """The numbers of all steps of a sampler, and the tensors that they hang on, as those were."""

    sampler: ReverseDiffusion
    times: Tensor
    levels: Levels
    table: Linear | Heun
    of: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def holds(self, of: tuple[Tensor, ...] | None) -> bool:
        """Whether these tensors are the same ones, with nothing written into them since."""
        return of is not None and all(map(operator.is_, self.of, of)) and self.versions == _versions(of)


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _states(table: Linear | Heun, net: Output, y: Tensor) -> Iterator[Tensor]:
    """The rows after each step, in standard units."""
    return _heun(table, net, y) if isinstance(table, Heun) else _linear(table, net, y)


# -------------------------------------------------------------------------------------------------------------- loops
def _begin(program: Noised, levels: Levels, like: Tensor, start: Tensor | None) -> Tensor:
    """The rows at the first time, in standard units."""
    if start is None:
        spread = math.hypot(float(levels.alpha[0]), float(levels.sigma[0]))  # of data of variance 1
        return torch.randn_like(like) * spread
    given: Tensor = check_rows(start, program.event_shape, "start")
    if given.shape != like.shape or given.dtype != like.dtype or given.device != like.device:
        raise ValueError(
            f"start must be {like.dtype} of shape {tuple(like.shape)} on {like.device}, a row for each of n; "
            f"got {given.dtype} of shape {tuple(given.shape)} on {given.device}"
        )
    return (given - program.location) / program.scale


def _linear(table: Linear, net: Output, y: Tensor) -> Iterator[Tensor]:
    """Steps of one evaluation. Nothing is written into y or the output: a network may return what it was given."""
    noise, noisy = _noise(table, y), table.noise is not None
    told = _told(table.level, y)
    last, old = len(table.scale) - 1, y
    past = [*table.past, 0.0]
    for i, (scale, state, output) in enumerate(zip(table.scale, table.state, table.output, strict=True)):
        out = _evaluated(net, y if scale == 1 else y * scale, next(told))
        new = torch.mul(y, state).add_(out, alpha=output)
        if past[i]:
            new.add_(old, alpha=past[i])
        if past[i + 1]:
            a, b = table.datum[i]
            old = torch.mul(y, a).add_(out, alpha=b)
        if noisy and i < last:
            new.add_(next(noise))
        y = new
        yield y


def _learned(levels: Levels, net: Pair, y: Tensor) -> Iterator[Tensor]:
    """Ancestral steps whose variances the network gives, between two ends."""
    table, span = linear(levels, 1.0), span_of(levels)
    steps = enumerate(zip(table.scale, _told(table.level, y), table.state, table.output, strict=True))
    noise = _noise(table, y)
    for i, (scale, level, state, output) in steps:
        out, where = net(y if scale == 1 else y * scale, level)
        new = torch.mul(y, state).add_(out, alpha=output)
        if i < len(span):
            new.addcmul_(next(noise), ((where + 1) * (float(span[i]) / 4)).exp())
        y = new
        yield y


def _heun(table: Heun, net: Output, y: Tensor) -> Iterator[Tensor]:
    noise = _blocks(sum(kick > 0 for kick in table.kick), y)
    told = _told(table.level.flatten(), y)
    for keep, kick, scale, state, output, twice, scale_next, near, far, first, second in zip(
        table.keep, table.kick, table.scale, table.state, table.output, table.twice, table.scale_next, table.near,
        table.far, table.first, table.second, strict=True,
    ):  # fmt: skip
        if kick:
            y = torch.mul(y, keep).add_(next(noise), alpha=kick)
        level, level_next = next(told), next(told)
        out = _evaluated(net, y if scale == 1 else y * scale, level)
        new = torch.mul(y, state).add_(out, alpha=output)
        if twice:
            again = _evaluated(net, new if scale_next == 1 else new * scale_next, level_next)
            new = torch.mul(new, near).add_(y, alpha=far).add_(out, alpha=first).add_(again, alpha=second)
        y = new
        yield y


def _evaluated(net: Output, y: Tensor, level: Tensor) -> Tensor:
    out = net(y, level)
    if out.shape != y.shape:
        raise ValueError(
            f"the network gives a tensor of shape {tuple(out.shape)} for rows of shape {tuple(y.shape)}: it must give "
            "one number for each of theirs"
        )
    return out


def _told(levels: Tensor, y: Tensor) -> Iterator[Tensor]:
    """What the network is told of each level in turn, one number a row."""
    rows = levels.to(y)
    for part in rows.split(max(1, BLOCK // len(y))):
        yield from part.unsqueeze(1).repeat(1, len(y)).unbind()


def _noise(table: Linear, y: Tensor) -> Iterator[Tensor]:
    """The noise that each step adds, in turn."""
    return iter(()) if table.noise is None else _blocks(len(table.noise), y, table.noise.to(y))


def _blocks(count: int, y: Tensor, deviations: Tensor | None = None) -> Iterator[Tensor]:
    """Normal noise of the shape of y, so many times, drawn and scaled in blocks.

    Args:
        deviations: ``(count,)`` or ``(count, *event_shape)``; default 1.
    """
    size = max(1, BLOCK // y.numel())
    for begin in range(0, count, size):
        rows = min(size, count - begin)
        block = torch.randn((rows, *y.shape), dtype=y.dtype, device=y.device)
        if deviations is not None:
            part = deviations[begin : begin + rows].unsqueeze(1)
            block *= part.reshape(*part.shape, *[1] * (block.dim() - part.dim()))
        yield from block.unbind()


# ---------------------------------------------------------------------------------------------------------- arguments
def _variances(program: Noised, times: Tensor) -> Tensor | None:
    """The variances of the program's own chain, for all steps but the one to the datum."""
    own: Any = getattr(program, "reverse_variance", None)
    if own is None or len(times) < 2 or program.location.is_meta:
        return None
    at = times.to(program.location.device)
    found: Tensor = own(at[:-1], at[1:]).detach().to("cpu", torch.float64)
    shape = (len(times) - 1, *program.event_shape)
    if tuple(found.shape) not in (shape[:1], shape):
        raise ValueError(
            f"reverse_variance of {describe(program)} gives shape {tuple(found.shape)}: it must be {shape[:1]} or "
            f"{shape}"
        )
    return found


def _learned_output(program: Noised, context: Tensor | None, guidance: float | None) -> Pair | None:
    """The network with its variances, where it gives them."""
    own: Any = getattr(program, "output_and_variance", None)
    return None if own is None else own(context, guidance)


def _decreasing(grid: Any) -> tuple[float, ...]:
    try:
        times = torch.as_tensor(grid, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"grid must be a tensor or a sequence of times, got {describe(grid)}") from error
    if times.dim() != 1 or not len(times):
        raise ValueError(f"grid must be a row of at least one time, got shape {tuple(times.shape)}")
    if bool((times.diff() >= 0).any()) or not bool(torch.isfinite(times).all()):
        given = ", ".join(f"{float(t):g}" for t in times[:4]) + (", …" if len(times) > 4 else "")
        raise ValueError(
            f"grid must decrease, from the noisiest time to the least noisy one; got {given}: grid.flip(0) if it rises"
        )
    if float(times[-1]) <= 0:
        raise ValueError(
            f"grid must end above 0, got {float(times[-1]):g}: the step to the datum at 0 is added to it, leave it out"
        )
    return tuple(times.tolist())


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse_lost(x: Tensor, steps: int, path: Tensor | None) -> None:
    if x.is_meta or math.isfinite(float(x.sum())):
        return
    lost = ~torch.isfinite(x.flatten(1)).all(1)
    rows = lost.nonzero().flatten().tolist()
    if rows:  # else the sum alone was too large
        raise Divergence(
            f"{len(rows)} of {len(x)} rows end at numbers that are not finite, first row {rows[0]}: train longer, "
            "lower guidance=, or begin at less noise (grid=)",
            steps - 1,
            [],
            rows,
            path,
        )
