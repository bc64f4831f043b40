r"""Pictures of a diffusion: noise coming in and going out, the paths of draws, the score.

Levels of noise are told by time t, from the datum at 0 to the noise at 1. Panels are chosen evenly in the share of
noise, :math:`\sigma / \sqrt{\alpha^2 + \sigma^2}`, so that the eye sees as much happen from each to the next. Where
:math:`\alpha^2 + \sigma^2` is not 1 noised data are shown divided by its root (about their location), which leaves all
levels in one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Noised, Program
from pyro_gen.checks import check_count, describe
from pyro_gen.plots.data import _image_shape, _sheets, _show_image
from pyro_gen.plots.figures import BLUE, GREY, LIGHT, VERMILION, figure_of, limits, new_figure, principal, tidy
from pyro_gen.samplers.reverse import ReverseDiffusion
from pyro_gen.samplers.tables import chain_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_noised", "score_field", "strips", "trajectories"]


class Method(Protocol):
    """How draws are made level by level: `ReverseDiffusion`, or what else has its two methods."""

    def times(self, program: Noised) -> Tensor: ...

    def sample(self, program: Noised, n: int, *args: Any, **kwargs: Any) -> Tensor: ...


class Path(NamedTuple):
    """States of draws ``(levels, n, *event_shape)`` and their times, from the noise down to 0, ``(levels,)``."""

    states: Tensor
    times: Tensor


def strips(
    program: Noised,
    x: Tensor,
    context: Tensor | None = None,
    *,
    method: Method | None = None,
    trajectory: Tensor | None = None,
    times: Tensor | Sequence[float] | None = None,
    panels: int = 6,
    n: int | None = None,
    seed: int | None = 0,
    image_shape: tuple[int, ...] | None = None,
) -> Figure:
    """Data as noise comes in, above noise as it goes out again: the forward and the reverse process side by side.

    Both rows have one time a column, so that each pair of panels should look alike; the lower row is read from the
    right, where draws begin. Images are tiled on the scale of the data, rows of two features scattered, of one feature
    counted; of others the first two principal components of the data are shown.

    Args:
        program: a program with a score at every noise level, as a Diffusion.
        x: data of shape ``(rows, *event_shape)``; the first ``n`` rows are shown.
        context: of a conditional program the one context of all draws, ``(1, *context_shape)``.
        method: how draws are made; None for DPM-Solver++(2M) in 40 steps.
        trajectory: draws to show in its place, ``(steps + 1, n, *event_shape)``, as of
            ``program.sample(n, trajectory=True)``; times: of its states, ``(steps,)`` or with the 0 at the end.
        panels: number of columns.
        n: rows and draws shown; None for 9 images, or up to 1000 points.
        seed: of noise and draws.
        image_shape: shape of a row as an image, where that is not clear from the data.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: for a program without noise levels, or a trajectory that does not fit its times.

    Example:
        >>> import pyro_gen as pg
        >>> program = pg.programs.Diffusion(2, hidden=(8,), standardise=False)
        >>> figure = strips(program, torch.randn(50, 2), panels=3)
        >>> [ax.get_title() for ax in figure.axes[:3]]
        ['t = 0', 't = 0.33', 't = 1']
    """
    check_noised(program)
    if check_count(panels, "panels") < 2:
        raise ValueError("panels must be at least 2: the data and the noise")
    shape = _image_shape(program, image_shape)
    count = min(len(x), (9 if shape is not None else 1000) if n is None else check_count(n, "n"))
    x = Program.check(program, x, _for_rows(context, len(x)))[0][:count].detach()
    path = _path(program, count, context, method or _solver(program), trajectory, times, seed)
    at = _evenly(program, path.times, panels)
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    forward = [_in_frame(program, _noised(program, x, path.times[i], noise), path.times[i]) for i in at]
    reverse = [_in_frame(program, path.states[i][:count], path.times[i]) for i in at]
    names = [f"t = {float(path.times[i]):.2g}" for i in at]
    rows = (("noising  →", forward, BLUE), ("←  drawing", reverse, VERMILION))
    if shape is not None:
        figure = new_figure(1.5 * len(at) + 0.3, 3.3)
        for axes, (label, parts, _) in zip(figure.subplots(2, len(at)), rows, strict=True):
            images = [part.cpu().double().reshape(-1, *shape) for part in (forward[0], *parts)]
            for ax, name, sheet in zip(axes, names, _sheets(images, round(count**0.5))[1:], strict=True):
                _show_image(ax, sheet)
                ax.set_title(name if label == rows[0][0] else "", fontsize=9)
            axes[0].set_ylabel(label, fontsize=9)
        return figure
    flat = [[part.reshape(len(part), -1).cpu().double() for part in parts] for _, parts, _ in rows]
    labels = ["$x_1$", "$x_2$"] if program.schedule.variance_preserving else ["$x_1$, scaled", "$x_2$, scaled"]
    if flat[0][0].shape[1] > 2:
        centre, directions, shares = principal(flat[0][0])
        flat = [[(part - centre) @ directions for part in parts] for parts in flat]
        labels = [f"component {i + 1} ({100 * float(share):.0f} %)" for i, share in enumerate(shares)]
    sides = [limits(column) for column in torch.cat(flat[0]).T]
    ratio = (sides[-1][1] - sides[-1][0]) / (sides[0][1] - sides[0][0])
    equal = len(sides) == 2 and 0.4 < ratio < 1.6
    figure = new_figure(1.55 * len(at) + 0.6, 3.0 * ratio + 0.8 if equal else 3.6)
    grid = figure.subplots(2, len(at), sharex=True, sharey=True)
    for axes, parts, (label, _, colour) in zip(grid, flat, rows, strict=True):
        for ax, part, name in zip(axes, parts, names, strict=True):
            if part.shape[1] == 1:
                ax.hist(part.flatten().numpy(), bins=torch.linspace(*sides[0], 31).tolist(), color=colour, density=True)
            else:
                ax.scatter(part[:, 0], part[:, 1], s=2, color=colour, alpha=0.5, linewidths=0)
                ax.set_ylim(*sides[1])
            if equal:
                ax.set_aspect("equal", adjustable="box")
            ax.set_xlim(*sides[0])
            ax.set_title(name if label == rows[0][0] else "", fontsize=9)
            tidy(ax)
        axes[0].set_ylabel(f"{label}\n{'density' if parts[0].shape[1] == 1 else labels[1]}")
    for ax in grid[1]:
        ax.set_xlabel(labels[0])
    return figure


def trajectories(
    program: Noised,
    x: Tensor | None = None,
    context: Tensor | None = None,
    *,
    method: Method | None = None,
    trajectory: Tensor | None = None,
    times: Tensor | Sequence[float] | None = None,
    n: int = 100,
    seed: int | None = 0,
    ax: Axes | None = None,
) -> Figure:
    """Paths of draws from the noise to the data, in the plane; of one feature against time.

    Args:
        program: a program with a score at every noise level, of one or two features.
        x: data to show behind the paths, ``(rows, *event_shape)``; up to 1000 of them.
        context: of a conditional program the one context of all draws, ``(1, *context_shape)``.
        method: how draws are made; None for DDIM, Euler steps of the probability flow: without noise of their own,
            so that paths are smooth and do not cross.
        trajectory, times: draws to show in its place, as for :func:`strips`.
        n: number of paths. seed: of the draws.
        ax: axes to draw into; None makes a figure.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: for another program, or a trajectory that does not fit its times.

    Example:
        >>> import pyro_gen as pg
        >>> program = pg.programs.Diffusion(2, hidden=(8,), standardise=False)
        >>> len(trajectories(program, n=5).axes[0].lines)
        5
    """
    check_noised(program)
    features = program.event_shape.numel()
    if features > 2:
        raise ValueError(f"plots.trajectories draws in a plane, and event_shape {tuple(program.event_shape)} has more")
    path = _path(program, check_count(n, "n"), context, method or ReverseDiffusion("ddim"), trajectory, times, seed)
    framed = [_in_frame(program, state[:n], t) for state, t in zip(path.states, path.times, strict=True)]
    lines = torch.stack(framed).flatten(2).cpu().double()  # (levels, n, features)
    ax = ax or new_figure(4.6, 4.2).add_subplot()
    cloud = None if x is None else Program.check(program, x, _for_rows(context, len(x)))[0][:1000]
    if features == 1:
        ax.plot(path.times.numpy(), lines[:, :, 0].numpy(), color=BLUE, alpha=0.4, linewidth=0.7)
        if cloud is not None:
            bins, (low, high) = 40, limits(cloud)
            counts = torch.histc(cloud.flatten().double().cpu(), bins, low, high)
            middles = low + (high - low) * (torch.arange(bins) + 0.5) / bins
            width = (0.15 * counts / counts.max()).numpy()
            ax.barh(middles.numpy(), -width, height=(high - low) / bins, color=GREY, label="data")
        ax.set_xlabel("t")
        ax.set_ylabel("x")
    else:
        if cloud is not None:
            points = cloud.reshape(len(cloud), 2).detach().cpu().double()
            ax.scatter(points[:, 0], points[:, 1], s=4, color=LIGHT, linewidths=0, label="data", zorder=0)
        ax.plot(lines[:, :, 0].numpy(), lines[:, :, 1].numpy(), color=BLUE, alpha=0.4, linewidth=0.6)
        for state, name, colour in ((lines[0], "noise", GREY), (lines[-1], "draws", VERMILION)):
            ax.scatter(state[:, 0], state[:, 1], s=7, color=colour, linewidths=0, label=name, zorder=3)
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xlabel("$x_1$")
        ax.set_ylabel("$x_2$")
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    tidy(ax)
    return figure_of(ax)


def score_field(
    program: Noised,
    x: Tensor,
    t: float | Sequence[float] | None = None,
    context: Tensor | None = None,
    *,
    n: int | None = None,
    arrows: int = 16,
    seed: int | None = 0,
) -> Figure:
    r"""The score :math:`\nabla \log p_t` over the plane as arrows, with the data noised to that level.

    Lengths are compressed, :math:`|s| / (|s| + m)` with m the median of a panel: scores far from the data are many
    times those near it.

    Args:
        program: a program with a score at every noise level, of two features.
        x: data of shape ``(rows, *event_shape)``.
        t: the time, or the times of several panels, in (0, 1]; None for four that share the noise evenly.
        context: of a conditional program the one context, ``(1, *context_shape)``.
        n: rows of data shown; None for up to 1000.
        arrows: along each side. seed: of the noise.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: for a program without noise levels, or of another number of features than two.

    Example:
        >>> import pyro_gen as pg
        >>> program = pg.programs.Diffusion(2, hidden=(8,), standardise=False)
        >>> figure = score_field(program, torch.randn(50, 2), t=(0.1, 0.9), arrows=5)
        >>> [ax.get_title() for ax in figure.axes]
        ['t = 0.1', 't = 0.9']
    """
    check_noised(program)
    if program.event_shape.numel() != 2:
        raise ValueError(f"plots.score_field draws a plane, and event_shape is {tuple(program.event_shape)}")
    count = min(len(x), 1000 if n is None else check_count(n, "n"))
    x = Program.check(program, x, _for_rows(context, len(x)))[0][:count].detach()
    first, last = program.times
    if t is None:
        every = torch.linspace(first, last, 1001, dtype=torch.float64)
        shown = every[_evenly(program, every, 5)[1:]].tolist() or [last]  # a chain may have one level only
    else:
        shown = [float(t)] if isinstance(t, (int, float)) else [float(v) for v in t]
    check_count(arrows, "arrows")
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    figure = new_figure(3.0 * len(shown) + 0.4, 3.2)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, time in zip(panels, shown, strict=True):
        at = torch.tensor(time, dtype=torch.float64)
        noised = _noised(program, x, at, noise).reshape(-1, 2)
        sides = [limits(noised[:, i]) for i in range(2)]
        middles = [
            low + (high - low) * (torch.arange(arrows, dtype=x.dtype, device=x.device) + 0.5) / arrows
            for low, high in sides
        ]
        feet = torch.cartesian_prod(*middles)
        with torch.no_grad(), scopes.evaluation_mode(program):
            slope = program.score(feet.reshape(-1, *program.event_shape), time, _for_rows(context, len(feet)))
        feet, slope = feet.cpu().double(), slope.reshape(-1, 2).cpu().double()
        length = slope.norm(dim=1, keepdim=True)
        unit = slope / (length + length.median().clamp_min(torch.finfo(torch.float64).tiny))
        points = noised.cpu().double()
        ax.scatter(points[:, 0], points[:, 1], s=4, color=BLUE, alpha=0.35, linewidths=0)
        ax.quiver(
            *feet.T, *unit.T, angles="xy", scale_units="xy", color=VERMILION, pivot="middle",
            scale=arrows / 1.6 / max(high - low for low, high in sides), width=0.006, headwidth=4, headlength=4,
        )  # fmt: skip
        ax.set_xlim(*sides[0])
        ax.set_ylim(*sides[1])
        if 0.4 < (sides[1][1] - sides[1][0]) / (sides[0][1] - sides[0][0]) < 1.6:
            ax.set_aspect("equal", adjustable="box")
        ax.set_title(f"t = {time:.2g}", fontsize=10)
        ax.set_xlabel("$x_1$")
        tidy(ax)
    panels[0].set_ylabel("$x_2$")
    return figure


# ------------------------------------------------------------------------------------------------------ what they share
def check_noised(program: Any) -> None:
    """A ``TypeError`` for a program without levels of noise."""
    if not isinstance(program, Noised):
        raise TypeError(
            f"this picture is of noise levels, and {describe(program)} has none: it needs a program of kind Noised"
        )


def _solver(program: Noised) -> ReverseDiffusion:
    chain = chain_of(program)
    return ReverseDiffusion("dpm++2m", 40 if chain is None else min(40, len(chain)))


def _for_rows(context: Tensor | None, rows: int) -> Tensor | None:
    if context is None:
        return None
    if len(context) != 1:
        raise ValueError(f"context must be a single row, that of all draws, got {len(context)}")
    return context.expand(rows, *context.shape[1:])


def _noised(program: Noised, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    if float(t) == 0:
        return x
    alpha, sigma = (part.to(x) for part in (program.schedule.alpha(t), program.schedule.sigma(t)))
    with torch.no_grad():
        u = (x - program.location) / program.scale
        return program.location + program.scale * (alpha * u + sigma * noise)


def _in_frame(program: Noised, x: Tensor, t: Tensor) -> Tensor:
    """Noised data of a schedule with α² + σ² ≠ 1, as if it were 1."""
    if program.schedule.variance_preserving or float(t) == 0:
        return x
    with torch.no_grad():
        size = torch.hypot(program.schedule.alpha(t), program.schedule.sigma(t)).to(x)
        return program.location + (x - program.location) / size


def _evenly(program: Noised, times: Tensor, count: int) -> list[int]:
    """Indices of so many of the times, from the least on, that are nearest to even shares of noise; no index twice."""
    with torch.no_grad():
        ratio = torch.where(times > 0, (program.schedule.log_snr(times.clamp(min=1e-9)) / -2).exp(), 0.0)
    share = ratio / (1 + ratio.square()).sqrt()
    share = torch.where(torch.isfinite(share), share, 1.0)
    wanted = torch.linspace(float(share.min()), float(share.max()), count, dtype=torch.float64)
    found = (share - wanted.unsqueeze(1)).abs().argmin(1).tolist()
    return sorted(set(found), key=lambda i: float(times[i]))


def _path(
    program: Noised,
    n: int,
    context: Tensor | None,
    method: Method,
    trajectory: Tensor | None,
    times: Tensor | Sequence[float] | None,
    seed: int | None,
) -> Path:
    if trajectory is None:
        if times is not None:
            raise ValueError("times= belong to trajectory=: a method has its own, ReverseDiffusion(grid=times)")
        at = method.times(program)
        states = method.sample(program, n, _for_rows(context, n), seed=seed, trajectory=True, progress=False)
    else:
        if times is None:
            raise ValueError("trajectory= needs the times of its states: times=method.times(program)")
        at, states = torch.as_tensor(times, dtype=torch.float64), trajectory.detach()
        if tuple(states.shape[2:]) != tuple(program.event_shape):
            wanted = ", ".join(map(str, program.event_shape))
            raise ValueError(f"trajectory must have shape (steps + 1, n, {wanted}), got {tuple(states.shape)}")
    at = at.detach().cpu().double()
    if len(at) + 1 == len(states):
        at = torch.cat([at, at.new_zeros(1)])
    if len(at) != len(states):
        raise ValueError(f"trajectory has {len(states)} states and times has {len(at)}: one for each, or all but the 0")
    return Path(states, at)
