"""Pictures of a fit: how the loss fell, what the model draws, where the latents lie, how far to trust the weights.

Every function returns a ``matplotlib.figure.Figure`` of its own: pyplot's state is neither read nor changed, so nothing
has to be closed, ``savefig`` works without a display, and a notebook shows it as the last value of a cell. Functions of
one panel take ``ax=`` to draw into another figure. Axes carry units; colours are told apart by colour-blind eyes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pyro_gen import handlers
from pyro_gen.base import PARETO_K_LIMIT, Evidence, Program, Samples, check_count, describe
from pyro_gen.diagnostics.latents import latent_distributions, posterior_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_gen.fitting import FitResult

__all__ = ["latent", "loss", "pareto_k", "reconstructions", "samples"]

# Okabe & Ito (2008); the ten of labels after P. Tol, "Colour schemes" (2021), scheme "muted"
BLUE, ORANGE, GREEN, VERMILION, GREY, LIGHT = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E", "#D9D9D9"
TEN = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#7A7A7A")
INK = 0.45  # mean grey below which high values are shown dark
TILE, GREY_LINE = 48, 0.8  # pixels of a tile, at least, and the grey between tiles
SMALLEST_IMAGE = 64  # features that a flat row needs to be taken for a square image


# --------------------------------------------------------------------------------------------------------------- loss
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
    ax = ax or _figure(6.4, 3.6).add_subplot()
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
    for step, what, style in ((result.stopped_at, "stopped", ":"), (result.best_step, "best validation", "--")):
        if step is not None and not (what == "stopped" and step == result.best_step):
            ax.axvline(step, color=GREY, linewidth=1.0, linestyle=style, label=f"{what}, step {step}")
    finite = [value for value in shown if math.isfinite(value)]
    if finite and max(finite) > min(finite):
        room = 0.06 * (max(finite) - min(finite))
        ax.set_ylim(min(finite) - room, max(finite) + room)
    ax.set_xlim(0, len(steps) * 1.01)
    ax.set_xlabel("step")
    ax.set_ylabel(_loss_label(result))
    _tidy(ax)
    ax.legend(frameon=False, fontsize=8)
    return _figure_of(ax)


def _loss_label(result: FitResult) -> str:
    in_nats = result.module.objective.loss_is in ("log-likelihood", "lower bound")
    return "loss, nats per datum" if in_nats else "loss per datum"


# ------------------------------------------------------------------------------------------------------------ samples
def samples(
    program: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    image_shape: tuple[int, ...] | None = None,
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
    if not isinstance(program, Samples):
        raise TypeError(f"{describe(program)} cannot be sampled: plots.samples needs a program with sample(n)")
    shape = _image_shape(program, image_shape)
    rows = _first(program, x, context, n, 36 if shape is not None else 1000)
    panels = [("data", rows[0])]
    if hasattr(program, "reconstruct"):
        panels.append(("reconstructed", _reconstruct(program, rows)))
    with handlers.evaluation_mode(program):
        panels.append(("generated", program.sample(len(rows[0]), *rows[1:], seed=seed)))
    parts = {name: part.detach().cpu().double() for name, part in panels}
    if shape is not None:
        sheets = _sheets([part.reshape(-1, *shape) for part in parts.values()], math.ceil(math.sqrt(len(rows[0]))))
        figure = _figure(3.1 * len(parts), 2.9 * sheets[0].shape[0] / sheets[0].shape[1] + 0.3)
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
        figure = _figure(0.72 * len(given) + 0.4, 1.6 * len(given) * sheets[0].shape[0] / sheets[0].shape[1] + 0.2)
        for ax, sheet, name in zip(figure.subplots(2, 1), sheets, ("data", "reconstructed"), strict=True):
            _show_image(ax, sheet)
            ax.set_ylabel(name, fontsize=8)
        return figure
    figure = _figure(4.0, 4.0)
    ax = figure.add_subplot()
    ax.axline((float(given.mean()),) * 2, slope=1, color=GREY, linewidth=0.8, zorder=0)
    ax.scatter(given.flatten(), made.flatten(), s=8, color=BLUE, alpha=0.5, linewidths=0)
    ax.set_xlabel("data, all features")
    ax.set_ylabel("reconstructed")
    _tidy(ax)
    return figure


def _first(program: Program, x: Tensor, context: Tensor | None, n: int | None, default: int) -> tuple[Tensor, ...]:
    batch = program.check(x, context)
    count = min(len(batch[0]), default if n is None else check_count(n, "n"))
    return tuple(part[:count] for part in batch)


def _reconstruct(program: Any, rows: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad(), handlers.evaluation_mode(program):
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
    figure = _figure(3.1 * len(parts), 2.8)
    bins = torch.linspace(*_limits(parts["data"].flatten()), 31).tolist()
    for ax, (name, part) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        ax.hist(part.flatten().numpy(), bins=bins, color=COLOURS[name], density=True)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("x")
        _tidy(ax)
    figure.axes[0].set_ylabel("density")
    figure.axes[-1].sharey(figure.axes[0])  # a reconstruction may be far narrower
    return figure


def _scatters(parts: dict[str, Tensor]) -> Figure:
    labels = ["$x_1$", "$x_2$"]
    if parts["data"].shape[1] > 2:
        centre, directions, shares = _principal(parts["data"])
        labels = [f"component {i + 1} ({100 * float(share):.0f} % of variance)" for i, share in enumerate(shares)]
        parts = {name: (part - centre) @ directions for name, part in parts.items()}
    across, up = (_limits(parts["data"][:, i]) for i in range(2))
    ratio = (up[1] - up[0]) / (across[1] - across[0])
    equal = 0.4 < ratio < 1.6
    figure = _figure(3.1 * len(parts), 2.7 * ratio + 0.8 if equal else 3.2)
    for ax, (name, part) in zip(figure.subplots(1, len(parts), sharey=True), parts.items(), strict=True):
        ax.scatter(part[:, 0], part[:, 1], s=6, color=COLOURS[name], alpha=0.6, linewidths=0)
        ax.set_title(name, fontsize=10)
        ax.set_xlim(*across)
        ax.set_ylim(*up)
        ax.set_xlabel(labels[0])
        if equal:
            ax.set_aspect("equal", adjustable="box")
        _tidy(ax)
    figure.axes[0].set_ylabel(labels[1])
    return figure


# ------------------------------------------------------------------------------------------------------------- latent
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
    with handlers.forked_generators(seed):
        draws = torch.cat([prior.sample() for _, prior in latent_distributions(program, x, context, None)])
    draws = draws.detach().cpu().double().reshape(len(draws), -1)[:2000]
    groups = _grouped(labels, len(means))
    ax = ax or _figure(5.0 + 0.6 * (len(groups) > 1), 4.6).add_subplot()
    if means.shape[1] == 1 and not groups:
        ax.scatter(means[:, 0], _listed(labels), s=12, color=BLUE, alpha=0.8, linewidths=0, label="posterior mean")
        names = ["$z$", "label"]
    elif means.shape[1] == 1:
        bins = torch.linspace(*_limits(torch.cat([means, draws]).flatten()), 41).tolist()
        weight = len(means) / len(draws)
        ax.hist(draws[:, 0].numpy(), bins=bins, weights=[weight] * len(draws), color=LIGHT, label="prior")
        classes, chosen, colours = zip(*groups, strict=True)
        stack = [means[rows, 0].numpy() for rows in chosen]
        ax.hist(stack, bins=bins, stacked=True, alpha=0.8, color=colours, label=classes)
        names = ["$z$", "rows"]
    else:
        names = ["$z_1$", "$z_2$"]
        if means.shape[1] > 2:
            centre, directions, shares = _principal(means)
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
            bar = _figure_of(ax).colorbar(marks, ax=ax, shrink=0.7)
            bar.set_label("label", fontsize=9)
            bar.ax.tick_params(labelsize=8)
            bar.outline.set_visible(False)
        ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    _tidy(ax)
    if len(groups) > 1:  # too many to stand among the points
        ax.legend(frameon=False, fontsize=8, markerscale=1.6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        ax.legend(fontsize=8, markerscale=1.6, loc="upper left", edgecolor="none")
    return _figure_of(ax)


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


# ----------------------------------------------------------------------------------------------------------- pareto k
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
    ax = ax or _figure(5.6, 3.2).add_subplot()
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
    _tidy(ax)
    return _figure_of(ax)


# ----------------------------------------------------------------------------------------------------- what all share
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


def _figure(width: float, height: float) -> Figure:
    return _picture()(figsize=(width, height), dpi=150, layout="constrained")


def _figure_of(ax: Axes) -> Figure:
    return cast("Figure", ax.get_figure(root=True))


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=GREY, labelcolor="black", labelsize=8)
    ax.xaxis.label.set_fontsize(9)
    ax.yaxis.label.set_fontsize(9)
    ax.set_axisbelow(True)


def _limits(values: Tensor) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.1 * (high - low) or 0.5
    return low - room, high + room


def _principal(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
