"""What each level of noise costs a diffusion: the terms of its bound, or how far its network misses, over log SNR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Noised
from pyro_gen.checks import check_count, describe
from pyro_gen.plots.diffusion import check_noised
from pyro_gen.plots.figures import BLUE, GREY, figure_of, new_figure, tidy
from pyro_gen.programs import Diffusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["loss_by_level"]

ROWS = 2**14  # of the network at a time
LEVELS = 64  # at which an error is measured
Measure = Literal["bound", "noise", "data"]


def loss_by_level(
    program: Noised,
    x: Tensor,
    context: Tensor | None = None,
    *,
    measure: Measure | None = None,
    particles: int = 1,
    seed: int | None = 0,
    ax: Axes | None = None,
) -> Figure:
    r"""What each level of noise costs, over log SNR, with a band of two standard errors over rows and draws.

    ``"bound"`` shows the terms of the negative bound per unit of log SNR, so that the area under the curve is their sum
    whatever the number of steps; the two ends, reconstruction and prior, stand in the title. ``"noise"`` and ``"data"``
    show the mean squares :math:`|\varepsilon - \hat\varepsilon|^2` and :math:`|u - \hat u|^2` a feature beside those of
    the best answer for standard normal data, :math:`\alpha^2 / r^2` and :math:`\sigma^2 / r^2` with
    :math:`r^2 = \alpha^2 + \sigma^2`: data with structure lie below it.

    Args:
        program: a Diffusion for ``"bound"``, else any program with a score at every noise level.
        x: data of shape ``(rows, *event_shape)``. context: of each row, for a conditional program.
        measure: ``"bound"``, ``"noise"`` or ``"data"``; None for the first that the program has.
        particles: draws of the noise a row and level.
        seed: of those draws; the global generators are left as they were.
        ax: axes to draw into; None makes a figure.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: for a program without noise levels, an unknown measure.

    Example:
        >>> import pyro_gen as pg
        >>> program = pg.programs.Diffusion(2, hidden=(8,), timesteps=20, standardise=False)
        >>> loss_by_level(program, torch.randn(50, 2)).axes[0].get_ylabel()
        'nats per unit of log SNR'
    """
    check_noised(program)
    kind: str = measure or ("bound" if isinstance(program, Diffusion) else "noise")
    if kind not in get_args(Measure):
        raise ValueError(f"measure must be 'bound', 'noise' or 'data', got {describe(measure)}")
    if kind == "bound" and not isinstance(program, Diffusion):
        raise TypeError(f"the terms of the bound are those of a Diffusion, got {describe(program)}: measure='noise'")
    if len(x) < 2:
        raise ValueError("plots.loss_by_level shows a mean over rows and its error: give at least two rows")
    check_count(particles, "particles")
    batch = program.check(x, context)
    ax = ax or new_figure(5.6, 3.6).add_subplot()
    with torch.no_grad(), scopes.evaluation_mode(program), scopes.forked_generators(seed):
        if isinstance(program, Diffusion) and kind == "bound":
            level, values, title = _bound_by_level(program, batch, particles)
            ax.set_title(title, fontsize=9)
            ax.set_ylabel("nats per unit of log SNR")
        else:
            level, values, best = _error_by_level(program, batch, kind, particles)
            ax.plot(
                level.numpy(), best.numpy(), color=GREY, linestyle="--", linewidth=1.0, label="standard normal data"
            )
            ax.set_ylabel(f"mean square error of the {kind}, a feature")
    mean, error = values.mean(0), values.std(0) / len(values) ** 0.5
    ax.fill_between(level.numpy(), (mean - 2 * error).numpy(), (mean + 2 * error).numpy(), color=BLUE, alpha=0.25,
                    linewidth=0)  # fmt: skip
    ax.plot(level.numpy(), mean.numpy(), color=BLUE, linewidth=1.4, label="mean ± 2 s.e.")
    ax.invert_xaxis()  # time runs to the right
    ax.set_xlabel("log SNR, from the data to the noise")
    ax.legend(frameon=False, fontsize=8)
    tidy(ax)
    return figure_of(ax)


def _bound_by_level(program: Diffusion, batch: tuple[Tensor, ...], particles: int) -> tuple[Tensor, Tensor, str]:
    """Middles of steps in log SNR, their terms a unit of it ``(rows, steps)``, and what the ends cost."""
    context = batch[1] if len(batch) > 1 else None
    terms = program.terms(batch[0], context, particles).cpu().double()
    if program.timesteps is None:
        ends = program.schedule.log_snr(torch.tensor(program.times, dtype=torch.float64))
        knots = torch.linspace(float(ends[0]), float(ends[1]), terms.shape[1] - 1, dtype=torch.float64)
    else:
        knots = program.schedule.log_snr(program.model.grid[1:].double()).cpu()
    if len(knots) < 2:
        raise ValueError("a chain of one step has no levels between its ends: its bound is two numbers, program.terms")
    total = (-terms.sum(1)).mean()
    title = (
        f"bound ≥ {float(total):.2f} nats: reconstruction {float(-terms[:, 0].mean()):.2f}, steps "
        f"{float(-terms[:, 1:-1].sum(1).mean()):.2f}, prior {float(-terms[:, -1].mean()):.2g}"
    )
    return (knots[1:] + knots[:-1]) / 2, terms[:, 1:-1] / (knots[:-1] - knots[1:]), title


def _error_by_level(
    program: Noised, batch: tuple[Tensor, ...], kind: str, particles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels in log SNR, the error a feature ``(rows, levels)``, and that of standard normal data."""
    x, context = batch[0], batch[1] if len(batch) > 1 else None
    u = (x - program.location) / program.scale
    ends = program.schedule.log_snr(torch.tensor(program.times, dtype=torch.float64))
    level = torch.linspace(float(ends[0]), float(ends[1]), LEVELS, dtype=torch.float64)
    times = program.schedule.time(level).clamp(*program.times)
    if isinstance(program, Diffusion) and program.timesteps is not None:  # only where it is trained
        grid = program.model.grid[1:].double().cpu()
        times = grid[torch.unique((times.unsqueeze(1) - grid).abs().argmin(1))]
        level = program.schedule.log_snr(times)
    alpha, sigma = program.schedule.alpha(times), program.schedule.sigma(times)
    values = torch.zeros(len(x), len(times), dtype=torch.float64)
    for i, t in enumerate(times.to(x)):
        for _ in range(particles):
            noise = torch.randn_like(u)
            y = alpha[i].to(u) * u + sigma[i].to(u) * noise
            for rows in torch.arange(len(x), device=x.device).split(ROWS):
                given = None if context is None else context[rows]
                found = program.split(y[rows], t.expand(len(rows)), given)[kind == "noise"]
                miss = (found - (noise if kind == "noise" else u)[rows]).square().flatten(1).mean(1)
                values[rows.cpu(), i] += miss.cpu().double() / particles
    best = (alpha if kind == "noise" else sigma).square() / (alpha.square() + sigma.square())
    return level, values, best
