"""The density of a program of two features, beside the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Exact, Program
from pyro_gen.checks import check_count, describe
from pyro_gen.plots.figures import BLUE, limits, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["density"]

ROWS = 4096  # of the grid at a time


def density(
    program: Program, x: Tensor, context: Tensor | None = None, *, n: int | None = None, cells: int = 150
) -> Figure:
    r"""Data beside the density :math:`p(x)` on a grid over their range, for a program of two features.

    The density is that at the middle of each of ``cells`` by ``cells`` cells, zero outside the support; its sum times
    the area of a cell, the mass that lies in the picture, stands in the title.

    Args:
        program: a program with an exact density, as a Flow, of two features.
        x: data of shape ``(rows, *event_shape)``.
        context: of a conditional program the one context, ``(1, *context_shape)``, that the density is given; x are
            data at that context.
        n: rows shown; None for up to 2000.
        cells: along each side.

    Returns:
        The figure.

    Raises:
        TypeError: for a program without an exact density.
        ValueError: for another number of features than two, for a program of discrete x, for many contexts.

    Example:
        >>> import pyro_gen as pg, torch
        >>> figure = density(pg.Flow(2, transform="linear"), torch.randn(100, 2), cells=20)
        >>> [ax.get_title().split(",")[0] for ax in figure.axes[:2]]
        ['data', 'density']
    """
    if not isinstance(program, Exact):
        raise TypeError(
            f"plots.density draws p(x), which {describe(program)} does not have exactly: plots.samples shows its draws"
        )
    if program.event_shape.numel() != 2:
        raise ValueError(
            f"plots.density draws a plane, and event_shape {tuple(program.event_shape)} is one of "
            f"{program.event_shape.numel()} features: plots.samples shows the first two principal components"
        )
    if context is not None and len(context) != 1:
        raise ValueError(f"context must be a single row, that of the density to show, got {len(context)}")
    shown = min(len(x), 2000 if n is None else check_count(n, "n"))
    batch = program.check(x, None if context is None else context.expand(len(x), *context.shape[1:]))
    context = None if context is None else batch[1][:1]
    support = program.distribution(None if context is None else context[0]).support
    if support.is_discrete:
        raise ValueError(
            f"{describe(program)} has probabilities of whole numbers, no density: plots.samples shows draws"
        )
    points = batch[0].detach().reshape(len(x), 2)
    sides = [limits(points[:, i]) for i in range(2)]
    steps = [(high - low) / check_count(cells, "cells") for low, high in sides]
    middles = [
        low + step * (torch.arange(cells, dtype=points.dtype, device=points.device) + 0.5)
        for (low, _), step in zip(sides, steps, strict=True)
    ]
    grid = torch.cartesian_prod(*middles).reshape(-1, *program.event_shape)
    inside = support.check(grid)
    value = torch.zeros(len(grid), dtype=torch.float64)
    with torch.no_grad(), scopes.evaluation_mode(program):
        for rows in inside.nonzero().flatten().split(ROWS):
            given = () if context is None else (context.expand(len(rows), *context.shape[1:]),)
            value[rows.cpu()] = program.log_prob(grid[rows], *given).exp().cpu().double()
    mass = float(value.sum()) * steps[0] * steps[1]

    (left, right), (bottom, top) = sides
    ratio = (top - bottom) / (right - left)
    equal = 0.4 < ratio < 1.6
    figure = new_figure(7.4, 3.1 * ratio + 0.8 if equal else 3.4)
    data, picture = figure.subplots(1, 2, sharey=True)
    some = points[:shown].cpu().double()
    data.scatter(some[:, 0], some[:, 1], s=4, color=BLUE, alpha=0.6, linewidths=0)
    data.set_title("data", fontsize=10)
    image = picture.imshow(
        value.reshape(cells, cells).T.numpy(), origin="lower", extent=(left, right, bottom, top), cmap="viridis",
        aspect="equal" if equal else "auto",
    )  # fmt: skip
    picture.set_title(f"density, {mass:.1%} of its mass shown", fontsize=10)
    bar = figure.colorbar(image, ax=picture, shrink=0.8)
    bar.set_label("p(x)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    for ax in (data, picture):
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
        ax.set_xlabel("$x_1$")
        tidy(ax)
    if equal:
        data.set_aspect("equal", adjustable="box")
    data.set_ylabel("$x_2$")
    return figure
