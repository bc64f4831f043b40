"""The options that all families share: data, training, run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pyro_gen.cli.building import BATCH_SIZE
from pyro_gen.cli.families import PANELS
from pyro_gen.cli.sources import TEST, VALIDATION

__all__ = ["Common"]

_DATA, _, _, _LOOP, _AFTER = PANELS


@dataclass(frozen=True, kw_only=True)
class Common:
    """What can be asked of every fit; a field is an option."""

    data: Annotated[
        str | None,
        typer.Option(
            metavar="digits|FILE",
            help="[cyan]digits[/cyan] (8 by 8 images, split 1200, 237, 360), or a .npy, .npz, .csv or .pt file.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None
    validation: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Rows of a file held out to choose the weights by.",
            rich_help_panel=_DATA,
            show_default=str(VALIDATION),
        ),
    ] = None
    test: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Rows of a file held out for the evidence.",
            rich_help_panel=_DATA,
            show_default=str(TEST),
        ),
    ] = None
    split_seed: Annotated[
        int | None,
        typer.Option(help="Seed of a file's split.", rich_help_panel=_DATA, show_default="0"),
    ] = None
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Add uniform noise on \\[0, 1) to whole numbers (for training up to 20 draws of it a row): densities "
            "are then those of x + U\\[0, 1).",
            rich_help_panel=_DATA,
        ),
    ] = False
    header: Annotated[
        bool, typer.Option("--header", help="Skip the first line of a .csv file.", rich_help_panel=_DATA)
    ] = False
    delimiter: Annotated[
        str | None,
        typer.Option(help="Between the cells of a .csv file.", rich_help_panel=_DATA, show_default="comma"),
    ] = None
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=_LOOP, show_default="2000")] = (
        None
    )
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data, instead of --steps.", rich_help_panel=_LOOP)
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows a step.", rich_help_panel=_LOOP, show_default=f"{BATCH_SIZE}, or all if fewer"),
    ] = None
    lr: Annotated[float, typer.Option(help="Learning rate of Adam, for the loss per datum.", rich_help_panel=_LOOP)] = (
        2e-3
    )
    schedule: Annotated[
        str,
        typer.Option(
            metavar="cosine|constant", help="Learning rate over the run, cosine to zero.", rich_help_panel=_LOOP
        ),
    ] = "cosine"
    clip_norm: Annotated[
        float | None, typer.Option(help="Scale gradients of a larger norm down to it.", rich_help_panel=_LOOP)
    ] = None
    average: Annotated[
        str | None,
        typer.Option(
            metavar="DECAY|tail",
            help="Average the weights: exponentially (0.999), or over the second half.",
            rich_help_panel=_LOOP,
        ),
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many validations without a better one (there are 40 in a run).", rich_help_panel=_LOOP
        ),
    ] = None
    compile: Annotated[
        str,
        typer.Option(
            metavar="auto|on|off", help="Compile the step; auto does from 5000 steps on.", rich_help_panel=_LOOP
        ),
    ] = "auto"
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="auto takes CUDA where there is one.", rich_help_panel=_LOOP)
    ] = "auto"
    seed: Annotated[
        int, typer.Option(help="Of weights, batches and noise: the same seed, the same run.", rich_help_panel=_LOOP)
    ] = 0
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress", help="Show progress.", rich_help_panel=_LOOP, show_default="on a terminal"
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Folder to write; it must not exist yet.", rich_help_panel=_AFTER, show_default=False
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --out from its checkpoint, under its own options.",
            rich_help_panel=_AFTER,
        ),
    ] = False
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", help="Steps between checkpoints.", rich_help_panel=_AFTER, show_default="20 a run"
        ),
    ] = None
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures.", rich_help_panel=_AFTER)] = True
