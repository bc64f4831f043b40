"""Where the guide puts the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Program
from pyro_gen.diagnostics.latents import latent_distributions, posterior_means
from pyro_gen.plots.figures import BLUE, LIGHT, TEN, figure_of, limits, new_figure, principal, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["latent"]


def latent(
    program: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    labels: Any = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """Posterior means of the latent, a point a row, over draws of the prior in grey; coloured by label if given.

    A latent of more than two dimensions is shown along the first two principal components of the means, one of a single
    dimension as a histogram.

    Args:
        program: a program with a guide over one latent, as a VAE.
        x: data of shape ``(rows, *event_shape)``.
        context: ``(rows, *context_shape)``, for a conditional program.
        labels: one a row: classes (integers or strings) or numbers (a colour scale).
        seed: of the prior's draws; global generators are left as they were.
        ax: axes to draw into; None makes a figure.

    Returns:
        The figure.

    Raises:
        ValueError: for another number of labels than rows.

    Example:
        >>> import pyro_gen as pg, torch
        >>> ax = latent(pg.VAE(4, latent_dim=2), torch.randn(30, 4)).axes[0]
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('$z_1$', '$z_2$')
    """
    means = posterior_means(program, x, context).detach().cpu().double()
    means = means.reshape(len(means), -1)
    with scopes.forked_generators(seed):
        draws = torch.cat([prior.sample() for _, prior in latent_distributions(program, x, context, None)])
    draws = draws.detach().cpu().double().reshape(len(draws), -1)[:2000]
    groups = _grouped(labels, len(means))
    ax = ax or new_figure(5.0 + 0.6 * (len(groups) > 1), 4.6).add_subplot()
    if means.shape[1] == 1 and not groups:
        ax.scatter(means[:, 0], _listed(labels), s=12, color=BLUE, alpha=0.8, linewidths=0, label="posterior mean")
        names = ["$z$", "label"]
    elif means.shape[1] == 1:
        bins = torch.linspace(*limits(torch.cat([means, draws]).flatten()), 41).tolist()
        weight = len(means) / len(draws)
        ax.hist(draws[:, 0].numpy(), bins=bins, weights=[weight] * len(draws), color=LIGHT, label="prior")
        classes, chosen, colours = zip(*groups, strict=True)
        stack = [means[rows, 0].numpy() for rows in chosen]
        ax.hist(stack, bins=bins, stacked=True, alpha=0.8, color=colours, label=classes)
        names = ["$z$", "rows"]
    else:
        names = ["$z_1$", "$z_2$"]
        if means.shape[1] > 2:
            centre, directions, shares = principal(means)
            means, draws = (means - centre) @ directions, (draws - centre) @ directions
            names = [
                f"component {i + 1} of the means ({100 * float(s):.0f} % of variance)" for i, s in enumerate(shares)
            ]
        ax.scatter(draws[:, 0], draws[:, 1], s=5, color=LIGHT, linewidths=0, zorder=0, label="prior")
        if groups:
            for name, rows, colour in groups:
                ax.scatter(means[rows, 0], means[rows, 1], s=12, color=colour, alpha=0.85, linewidths=0, label=name)
        else:
            marks = ax.scatter(means[:, 0], means[:, 1], c=_listed(labels), cmap="viridis", s=12, linewidths=0)
            bar = figure_of(ax).colorbar(marks, ax=ax, shrink=0.7)
            bar.set_label("label", fontsize=9)
            bar.ax.tick_params(labelsize=8)
            bar.outline.set_visible(False)
        ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    tidy(ax)
    if len(groups) > 1:  # too many to stand among the points
        ax.legend(frameon=False, fontsize=8, markerscale=1.6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        ax.legend(fontsize=8, markerscale=1.6, loc="upper left", edgecolor="none")
    return figure_of(ax)


def _listed(labels: Any) -> list[Any]:
    return list(labels.tolist() if hasattr(labels, "tolist") else labels)


Group = tuple[str, Tensor, str]  # its name, which rows are in it, its colour


def _grouped(labels: Any, rows: int) -> list[Group]:
    """Rows by class; one group where there are no labels, none where labels are numbers on a scale."""
    if labels is None:
        return [("posterior mean", torch.ones(rows, dtype=torch.bool), BLUE)]
    values = _listed(labels)
    if len(values) != rows:
        raise ValueError(f"labels must be one a row: got {len(values)} for {rows} rows")
    classes = sorted(set(values))
    if len(classes) <= len(TEN) and not any(isinstance(v, float) for v in values):
        return [(str(c), torch.tensor([v == c for v in values]), TEN[i]) for i, c in enumerate(classes)]
    if any(isinstance(v, str) for v in values):
        raise ValueError(f"labels name {len(classes)} classes, and colours tell {len(TEN)} apart: merge some")
    return []
