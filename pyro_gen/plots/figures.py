"""What all pictures share: colours, a figure of one's own, axes that stay in the background."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure_of", "limits", "new_figure", "principal", "tidy"]

# Okabe & Ito (2008); the ten of classes after P. Tol, "Colour schemes" (2021), scheme "muted"
BLUE, ORANGE, GREEN, VERMILION, GREY, LIGHT = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E", "#D9D9D9"
TEN = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#7A7A7A")


@cache
def _picture() -> type[Figure]:
    import base64
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure of its own, without pyplot, that notebooks and galleries show."""

        def _repr_html_(self) -> str:
            buffer = io.BytesIO()
            FigureCanvasAgg(self).print_png(buffer)  # type: ignore[no-untyped-call]
            width = self.get_figwidth() * 96
            return (
                f'<img width="{width:.0f}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
            )

    return Picture


def new_figure(width: float, height: float) -> Figure:
    return _picture()(figsize=(width, height), dpi=150, layout="constrained")


def figure_of(ax: Axes) -> Figure:
    return cast("Figure", ax.get_figure(root=True))


def tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=GREY, labelcolor="black", labelsize=8)
    ax.xaxis.label.set_fontsize(9)
    ax.yaxis.label.set_fontsize(9)
    ax.set_axisbelow(True)


def limits(values: Tensor) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.1 * (high - low) or 0.5
    return low - room, high + room


def principal(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, first two principal axes (features, 2), and their shares of the variance."""
    centre = data.mean(0)
    _, singular, axes = torch.linalg.svd(data - centre, full_matrices=False)
    if len(singular) < 2:
        raise ValueError(f"principal components need at least two rows, got {len(data)}")
    axes = axes[:2].T
    axes = axes * torch.where(
        axes.gather(0, axes.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0
    )  # one sign for all runs
    return centre, axes, singular[:2].square() / singular.square().sum().clamp_min(1e-300)
