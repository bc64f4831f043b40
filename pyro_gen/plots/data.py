"""What the program draws, beside what it was given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Program
from pyro_gen.checks import check_count, describe
from pyro_gen.plots.figures import BLUE, GREEN, GREY, VERMILION, limits, new_figure, principal, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["reconstructions", "samples"]

INK = 0.45  # mean grey below which high values are shown dark
TILE, GREY_LINE = 48, 0.8  # pixels of a tile, at least, and the grey between tiles
SMALLEST_IMAGE = 64  # features that a flat row needs to be taken for a square image


def samples(
    program: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    image_shape: tuple[int, ...] | None = None,
    generated: Tensor | None = None,
) -> Figure:
    """Data beside what the program draws, and beside its reconstructions where it has a ``reconstruct``.

    Images (events of shape (channels, height, width) or (height, width), flat rows of 64 or more features that make a
    square) are tiled, reconstructions in the places of their originals, on the scale of the data: one channel in grey,
    dark for high where most values are low, as ink on paper. Rows of two features are scattered, of one feature
    counted; of others the first two principal components of the data are shown.

    Args:
        program: a program that can be sampled.
        x: data of shape ``(rows, *event_shape)``; the first ``n`` rows are shown.
        context: ``(rows, *context_shape)``, for a conditional program: draws are made for the contexts of those rows.
        n: rows and draws shown; None for 36 images, or up to 1000 points.
        seed: of the draws; global generators are left as they were.
        image_shape: shape of a row as an image, where that is not clear from the data.
        generated: draws of the program to show, ``(n, *event_shape)``, where they are there already: those of an
            energy-based model take chains.

    Returns:
        The figure.

    Raises:
        TypeError: for a program that cannot be sampled.

    Example:
        >>> import pyro_gen as pg, torch
        >>> figure = samples(pg.VAE(64, likelihood="bernoulli"), torch.zeros(9, 64))
        >>> [ax.get_title() for ax in figure.axes]
        ['data', 'reconstructed', 'generated']
    """
    draw = getattr(program, "sample", None)
    if draw is None and generated is None:
        raise TypeError(f"{describe(program)} cannot be sampled: plots.samples needs a program with sample(n)")
    shape = _image_shape(program, image_shape)
    rows = _first(program, x, context, n, 36 if shape is not None else 1000)
    panels = [("data", rows[0])]
    if hasattr(program, "reconstruct"):
        panels.append(("reconstructed", _reconstruct(program, rows)))
    if generated is None:
        with scopes.evaluation_mode(program):
            generated = cast(Any, draw)(len(rows[0]), *rows[1:], seed=seed)
    panels.append(("generated", generated[: len(rows[0])]))
    parts = {name: part.detach().cpu().double() for name, part in panels}
    if shape is not None:
        sheets = _sheets([part.reshape(-1, *shape) for part in parts.values()], math.ceil(math.sqrt(len(rows[0]))))
        figure = new_figure(3.1 * len(parts), 2.9 * sheets[0].shape[0] / sheets[0].shape[1] + 0.3)
        figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr, call-arg]
        for ax, name, sheet in zip(figure.subplots(1, len(parts)), parts, sheets, strict=True):
            _show_image(ax, sheet)
            ax.set_title(name, fontsize=10)
        return figure
    flat = {name: part.reshape(len(part), -1) for name, part in parts.items()}
    return _histograms(flat) if flat["data"].shape[1] == 1 else _scatters(flat)


def reconstructions(
    program: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    n: int | None = None,
    image_shape: tuple[int, ...] | None = None,
) -> Figure:
    """Rows of data above their reconstructions; for data that are no images, reconstructed against given values.

    Args:
        program: a program with a ``reconstruct``, as a VAE.
        x, context, image_shape: as for :func:`samples`.
        n: rows shown; None for 12 images, or up to 1000 rows.

    Returns:
        The figure.

    Raises:
        TypeError: for a program without ``reconstruct``.
    """
    if not hasattr(program, "reconstruct"):
        raise TypeError(f"{describe(program)} has no reconstruct(x): plots.samples shows what it generates")
    shape = _image_shape(program, image_shape)
    rows = _first(program, x, context, n, 12 if shape is not None else 1000)
    given, made = rows[0].detach().cpu().double(), _reconstruct(program, rows).detach().cpu().double()
    if shape is not None:
        sheets = _sheets([part.reshape(-1, *shape) for part in (given, made)], len(given))
        figure = new_figure(0.72 * len(given) + 0.4, 1.6 * len(given) * sheets[0].shape[0] / sheets[0].shape[1] + 0.2)
        for ax, sheet, name in zip(figure.subplots(2, 1), sheets, ("data", "reconstructed"), strict=True):
            _show_image(ax, sheet)
            ax.set_ylabel(name, fontsize=8)
        return figure
    figure = new_figure(4.0, 4.0)
    ax = figure.add_subplot()
    ax.axline((float(given.mean()),) * 2, slope=1, color=GREY, linewidth=0.8, zorder=0)
    ax.scatter(given.flatten(), made.flatten(), s=8, color=BLUE, alpha=0.5, linewidths=0)
    ax.set_xlabel("data, all features")
    ax.set_ylabel("reconstructed")
    tidy(ax)
    return figure


def _first(program: Program, x: Tensor, context: Tensor | None, n: int | None, default: int) -> tuple[Tensor, ...]:
    batch = program.check(x, context)
    count = min(len(batch[0]), default if n is None else check_count(n, "n"))
    return tuple(part[:count] for part in batch)


def _reconstruct(program: Any, rows: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad(), scopes.evaluation_mode(program):
        return cast(Tensor, program.reconstruct(*rows))


def _image_shape(program: Program, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """(height, width) or (channels, height, width) of a row, or None if a row is no image."""
    event = tuple(program.event_shape)
    if given is not None:
        if len(given) not in (2, 3) or math.prod(given) != math.prod(event):
            raise ValueError(
                f"image_shape must be (height, width) or (channels, height, width) with {math.prod(event)} values, "
                f"got {given!r}"
            )
        return tuple(given)
    if len(event) == 3 or (len(event) == 2 and min(event) > 1):
        return event
    side = math.isqrt(math.prod(event))
    return (side, side) if len(event) == 1 and side**2 == event[0] >= SMALLEST_IMAGE else None


def _sheets(parts: list[Tensor], columns: int) -> list[Tensor]:
    """Each part as one picture, (height, width, 3), from 0 to 1 on the scale of the first: its images, tiled.

    Three channels are colours; of another number the first is shown.
    """
    parts = [part.unsqueeze(1) if part.dim() == 3 else part for part in parts]
    parts = [part if part.shape[1] == 3 else part[:, :1] for part in parts]
    low, high = parts[0].min(), parts[0].max()
    parts = [((part - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) for part in parts]
    if parts[0].shape[1] == 1 and float(parts[0].mean()) < INK:
        parts = [1 - part for part in parts]
    return [_tiled(part.expand(-1, 3, -1, -1), columns) for part in parts]


def _tiled(images: Tensor, columns: int) -> Tensor:
    enlarged = math.ceil(
        TILE / min(images.shape[2:])
    )  # so that the line between tiles is thinner than a pixel of theirs
    images = images.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
    count, _, height, width = images.shape
    rows, line = math.ceil(count / columns), TILE // 16
    sheet = torch.ones(rows * (height + line) - line, columns * (width + line) - line, 3, dtype=images.dtype)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + line), (i % columns) * (width + line)
        sheet[max(0, top - line) : top + height, max(0, left - line) : left + width] = GREY_LINE
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return sheet


def _show_image(ax: Axes, sheet: Tensor) -> None:
    ax.imshow(sheet.numpy(), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


COLOURS = {"data": BLUE, "reconstructed": GREEN, "generated": VERMILION}


def _histograms(parts: dict[str, Tensor]) -> Figure:
    figure = new_figure(3.1 * len(parts), 2.8)
    bins = torch.linspace(*limits(parts["data"].flatten()), 31).tolist()
    for ax, (name, part) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        ax.hist(part.flatten().numpy(), bins=bins, color=COLOURS[name], density=True)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("x")
        tidy(ax)
    figure.axes[0].set_ylabel("density")
    figure.axes[-1].sharey(figure.axes[0])  # a reconstruction may be far narrower
    return figure


def _scatters(parts: dict[str, Tensor]) -> Figure:
    labels = ["$x_1$", "$x_2$"]
    if parts["data"].shape[1] > 2:
        centre, directions, shares = principal(parts["data"])
        labels = [f"component {i + 1} ({100 * float(share):.0f} % of variance)" for i, share in enumerate(shares)]
        parts = {name: (part - centre) @ directions for name, part in parts.items()}
    across, up = (limits(parts["data"][:, i]) for i in range(2))
    ratio = (up[1] - up[0]) / (across[1] - across[0])
    equal = 0.4 < ratio < 1.6
    figure = new_figure(3.1 * len(parts), 2.7 * ratio + 0.8 if equal else 3.2)
    for ax, (name, part) in zip(figure.subplots(1, len(parts), sharey=True), parts.items(), strict=True):
        ax.scatter(part[:, 0], part[:, 1], s=6, color=COLOURS[name], alpha=0.6, linewidths=0)
        ax.set_title(name, fontsize=10)
        ax.set_xlim(*across)
        ax.set_ylim(*up)
        ax.set_xlabel(labels[0])
        if equal:
            ax.set_aspect("equal", adjustable="box")
        tidy(ax)
    figure.axes[0].set_ylabel(labels[1])
    return figure
