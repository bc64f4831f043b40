"""How the loss fell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pyro_gen.plots.figures import BLUE, GREEN, GREY, ORANGE, VERMILION, figure_of, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_gen.fitting import FitResult

__all__ = ["loss"]


def loss(result: FitResult, *, ax: Axes | None = None) -> Figure:
    """Training and validation loss over the steps, with marks at the least validation loss and at a stop.

    The training loss of a step is noisy (batches, draws), so its running mean stands over it. The first steps, before
    the loss comes near to where it ends, run out at the top.

    Args:
        result: what :func:`pyro_gen.fit` returned.
        ax: axes to draw into; None makes a figure.

    Returns:
        The figure.

    Example:
        >>> import pyro_gen as pg, torch
        >>> result = pg.fit(pg.ELBO()(pg.VAE(4)), torch.randn(100, 4), steps=20, seed=0, progress=False)
        >>> loss(result).axes[0].get_ylabel()
        'loss, nats per datum'
    """
    columns = result.history.columns
    names = sorted(name for name in columns if name == "loss" or name.startswith("loss."))
    if not names or not columns[names[0]]:
        raise ValueError("the result has no history of a loss: it has run no step")
    ax = ax or new_figure(6.4, 3.6).add_subplot()
    shown: list[float] = []
    for name, colour in zip(names, (BLUE, ORANGE, GREEN, VERMILION, GREY), strict=False):
        values = torch.tensor(columns[name], dtype=torch.float64)
        steps = torch.arange(1, len(values) + 1)
        window = max(1, len(values) // 50)
        ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
        mean = values.unfold(0, window, 1).mean(1)
        label = "training" if name == "loss" else f"player {name.removeprefix('loss.')}"
        ax.plot(steps[window - 1 :], mean, color=colour, linewidth=1.6, label=label)
        late = values[len(values) // 10 :]
        shown += [float(q) for q in torch.quantile(late, torch.tensor([0.001, 0.999], dtype=torch.float64))]
        shown += mean[len(mean) // 20 :].tolist()
    validation = [(step, value) for step, value in result.validation if math.isfinite(value)]
    if validation:
        ax.plot(
            *zip(*validation, strict=True),
            color=VERMILION,
            linewidth=1.2,
            marker="o",
            markersize=2.5,
            label="validation",
        )
        shown += [value for step, value in validation if step > len(steps) / 20]
    marks = [(result.stopped_at, "stopped", ":"), (result.best_step, "best validation", "--")]
    if result.stopped_at == result.best_step:
        marks = [(result.best_step, "best validation, stopped", "--")]
    for step, what, style in marks:
        if step is not None:
            ax.axvline(step, color=GREY, linewidth=1.0, linestyle=style, label=f"{what}, step {step}")
    finite = [value for value in shown if math.isfinite(value)]
    if finite and max(finite) > min(finite):
        room = 0.06 * (max(finite) - min(finite))
        ax.set_ylim(min(finite) - room, max(finite) + room)
    ax.set_xlim(0, len(steps) * 1.01)
    ax.set_xlabel("step")
    ax.set_ylabel(_loss_label(result))
    tidy(ax)
    ax.legend(frameon=False, fontsize=8)
    return figure_of(ax)


def _loss_label(result: FitResult) -> str:
    in_nats = result.module.objective.loss_is in ("log-likelihood", "lower bound")
    return "loss, nats per datum" if in_nats else "loss per datum"
