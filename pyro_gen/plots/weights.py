"""How far importance weights can be trusted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from pyro_gen.base import PARETO_K_LIMIT, Evidence
from pyro_gen.checks import describe
from pyro_gen.plots.figures import BLUE, GREY, VERMILION, figure_of, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["pareto_k"]


def pareto_k(evidence: Evidence | Tensor, *, ax: Axes | None = None) -> Figure:
    """Histogram of the tail index k̂ over rows, with the line at 0.7 above which an estimate is only a lower bound.

    Args:
        evidence: from :func:`pyro_gen.log_evidence`, or the values k̂ themselves.
        ax: axes to draw into; None makes a figure.

    Returns:
        The figure. Rows whose k̂ is no finite number are told in its title.

    Raises:
        TypeError: for an evidence without importance weights.

    Example:
        >>> import torch
        >>> pareto_k(torch.tensor([0.1, 0.3, 0.9])).axes[0].get_title(loc="left")
        '1 of 3 rows above 0.7'
    """
    values = evidence.pareto_k if isinstance(evidence, Evidence) else evidence
    if not isinstance(values, Tensor):
        raise TypeError(
            f"plots.pareto_k takes an Evidence of importance weights or a tensor of k̂, got {describe(evidence)}"
        )
    values = values.detach().cpu().double().flatten()
    finite = values[values.isfinite()]
    low = min(0.0, float(finite.min()) if len(finite) else 0.0)
    high = max(1.0, float(finite.max()) if len(finite) else 0.0)
    step = 0.05 if high - low <= 3 else (high - low) / 60
    first = PARETO_K_LIMIT - step * math.ceil((PARETO_K_LIMIT - low) / step)  # so that the limit is an edge
    edges = [first + step * i for i in range(math.ceil((high - first) / step + 1e-9) + 1)]
    ax = ax or new_figure(5.6, 3.2).add_subplot()
    counts, _, bars = ax.hist(finite.numpy(), bins=edges, color=BLUE, edgecolor="white", linewidth=0.6)
    for bar in cast(Any, bars):
        if bar.get_x() > PARETO_K_LIMIT - step / 2:
            bar.set_facecolor(VERMILION)
    ax.axvline(PARETO_K_LIMIT, color=GREY, linewidth=1.0, linestyle="--")
    ax.annotate(
        f"{PARETO_K_LIMIT}", (PARETO_K_LIMIT, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -10),
        textcoords="offset points", color=GREY, fontsize=8,
    )  # fmt: skip
    above = int((values > PARETO_K_LIMIT).sum())
    notes = [f"{above} of {len(values)} rows above {PARETO_K_LIMIT}"]
    others = {"−∞ (equal weights)": values == -math.inf, "∞": values == math.inf, "nan": values.isnan()}
    notes += [f"{int(rows.sum())} at {what}" for what, rows in others.items() if bool(rows.any())]
    ax.set_title("; ".join(notes), fontsize=9, loc="left", color=VERMILION if above else "black")
    ax.set_xlabel(r"tail index $\hat k$ of a row's importance weights")
    ax.set_ylabel("rows")
    ax.set_ylim(0, max(1.0, 1.08 * float(max(counts, default=0))))
    tidy(ax)
    return figure_of(ax)
