"""The energy of a program of two features as a surface, its score as arrows, beside data and draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Program, Unnormalized
from pyro_gen.checks import check_count, describe
from pyro_gen.plots.figures import BLUE, GREEN, VERMILION, limits, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["energy"]

ROWS = 4096  # of the grid at a time
SHOWN = 2000  # points of data and of draws
SPARE = 1.5  # the scale of colours ends at this many times what the highest of the data needs


def energy(
    program: Unnormalized,
    x: Tensor,
    context: Tensor | None = None,
    *,
    draws: Tensor | None = None,
    n: int | None = None,
    cells: int = 150,
    arrows: int = 20,
) -> Figure:
    r"""Data beside the energy :math:`-\log f(x)` with the score as arrows, and draws, for a program of two features.

    The energy is shown from its least value up, as Z, which would fix the zero, is not known; what is higher than the
    scale is cut off. Arrows point up the density, along :math:`\nabla_x \log f`; their lengths are compressed,
    :math:`|s| / (|s| + m)` with m the median, as scores of the far field are many times those near the data.

    Args:
        program: a program whose density is known up to Z, of two features.
        x: data of shape ``(rows, *event_shape)``.
        context: of a conditional program the one context, ``(1, *context_shape)``.
        draws: of a sampler, ``(rows, *event_shape)``: a panel of their own, in the frame of the data.
        n: rows of data and draws shown; None for up to 2000.
        cells: of the surface along each side. arrows: likewise.

    Returns:
        The figure.

    Raises:
        TypeError: for a program whose density cannot be evaluated.
        ValueError: for another number of features than two, discrete x, many contexts, draws of another shape.

    Example:
        >>> import pyro_gen as pg, torch
        >>> ebm = pg.EBM(2, energy=lambda x: x.square().sum(-1) / 2, base=None)
        >>> figure = energy(ebm, torch.randn(100, 2), draws=torch.randn(50, 2), cells=20, arrows=5)
        >>> [ax.get_title() for ax in figure.axes[:3]]
        ['data', 'energy and score', 'draws']
    """
    if not isinstance(program, Unnormalized):
        what = describe(program) if isinstance(program, Program) else f"{describe(program)}, which is no program"
        raise TypeError(
            f"plots.energy draws −log f(x), so it needs a program of kind Unnormalized or Exact, got {what}"
        )
    if program.event_shape.numel() != 2:
        raise ValueError(
            f"plots.energy draws a plane, and event_shape {tuple(program.event_shape)} is one of "
            f"{program.event_shape.numel()} features"
        )
    if context is not None and len(context) != 1:
        raise ValueError(f"context must be a single row, that of the density to show, got {len(context)}")
    if draws is not None and tuple(draws.shape[1:]) != tuple(program.event_shape):
        raise ValueError(
            f"draws must have the shape (rows, {', '.join(map(str, program.event_shape))}), got {tuple(draws.shape)}: "
            "of a sampler's run pass draws.flat"
        )
    shown = SHOWN if n is None else check_count(n, "n")
    target = program.target(None if context is None else context[0])
    if target.support.is_discrete:
        raise ValueError(f"{describe(program)} has discrete x, and no surface over the plane")
    program.check(x, None if context is None else context.expand(len(x), *context.shape[1:]))
    points = x.detach().reshape(len(x), 2)
    (left, right), (bottom, top) = sides = [limits(points[:, i]) for i in range(2)]

    def on_grid(count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Middles of so many cells a side, and log f and its gradient there; nan outside the support."""
        steps = [(high - low) / count for low, high in sides]
        middles = [
            low + step * (torch.arange(count, dtype=points.dtype, device=points.device) + 0.5)
            for (low, _), step in zip(sides, steps, strict=True)
        ]
        grid = torch.cartesian_prod(*middles).reshape(-1, *program.event_shape)
        value = torch.full((len(grid),), torch.nan, dtype=torch.float64)
        slope = torch.full((len(grid), 2), torch.nan, dtype=torch.float64)
        for rows in target.support.check(grid).reshape(-1).nonzero().flatten().split(ROWS):
            there = target.value_and_score(grid[rows])
            value[rows.cpu()] = there[0].cpu().double()
            slope[rows.cpu()] = there[1].reshape(-1, 2).cpu().double()
        return grid.reshape(-1, 2).cpu().double(), value, slope

    with scopes.evaluation_mode(program):
        _, value, _ = on_grid(check_count(cells, "cells"))
        feet, _, slope = on_grid(check_count(arrows, "arrows"))
        given = points[:shown].reshape(-1, *program.event_shape)
        highest = -float(target.value_and_score(given)[0].double().min())
    surface = -value
    least = float(surface[torch.isfinite(surface)].min())
    scale = SPARE * max(highest - least, 1e-6)

    ratio = (top - bottom) / (right - left)
    equal = 0.4 < ratio < 1.6
    panels = 2 if draws is None else 3
    figure = new_figure(3.2 * panels + 0.8, 3.0 * ratio + 0.9 if equal else 3.4)
    axes = figure.subplots(1, panels, sharey=True)
    data, picture = axes[0], axes[1]
    image = picture.imshow(
        (surface - least).reshape(cells, cells).T.numpy(), origin="lower", extent=(left, right, bottom, top),
        cmap="Blues_r", vmin=0.0, vmax=scale, aspect="equal" if equal else "auto",
    )  # fmt: skip
    length = slope.norm(dim=1, keepdim=True)
    known = torch.isfinite(length) & (length > 0)
    middle = length[known].median() if bool(known.any()) else torch.tensor(1.0, dtype=torch.float64)
    unit = slope / length * length / (length + middle)
    kept = known.squeeze(1)
    picture.quiver(
        *feet[kept].T, *unit[kept].T, angles="xy", scale_units="xy", color=VERMILION, pivot="middle",
        scale=arrows / max(right - left, top - bottom), width=0.004,
    )  # fmt: skip
    bar = figure.colorbar(image, ax=picture, shrink=0.8, extend="max")
    bar.set_label("−log f − least, nats", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    scatters = [(data, "data", points, BLUE)]
    if draws is not None:
        scatters.append((axes[2], "draws", draws.detach().reshape(len(draws), 2), GREEN))
    for ax, title, cloud, colour in scatters:
        some = cloud[:shown].cpu().double()
        ax.scatter(some[:, 0], some[:, 1], s=4, color=colour, alpha=0.6, linewidths=0)
        ax.set_title(title, fontsize=10)
        if equal:
            ax.set_aspect("equal", adjustable="box")
    picture.set_title("energy and score", fontsize=10)
    for ax in axes:
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
        ax.set_xlabel("$x_1$")
        tidy(ax)
    data.set_ylabel("$x_2$")
    return figure
