"""``pyro-gen sample``: draws of a fitted model into a file of numbers or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_gen.cli.errors import BadInput, describe
from pyro_gen.cli.runs import Run
from pyro_gen.cli.sources import read_data

__all__ = ["sample"]

SUFFIXES = (".npy", ".pt", ".png")


def sample(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder written by pyro-gen fit.", show_default=False)],
    number: Annotated[int, typer.Option("--number", "-n", help="Rows to draw.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed, the same draws.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to: .npy, .pt, or .png for a picture.", show_default="RUN/samples.npy"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Draw data from a fitted model.

    A picture shows the draws beside as many test rows. A conditional model is sampled at the contexts of the test
    rows, in turn.
    """
    import numpy as np
    import torch

    run = Run(folder)
    run.read("RUN")
    out = run.file("samples.npy") if out is None else out
    if out.suffix.lower() not in SUFFIXES:
        raise BadInput(f"--out must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {out}")
    if out.is_dir():
        raise BadInput(f"--out: {out} is a folder: name a file in it")
    if out.exists() and not overwrite:
        raise BadInput(f"--out: {out} exists: name another file, or replace it by --overwrite")
    if number < 1:
        raise BadInput(f"-n must be at least 1, got {number}")
    program: Any = run.result().program
    picture = out.suffix.lower() == ".png"
    test = read_data(run.options).test if picture or program.context_shape is not None else ()
    if picture:
        number = min(number, len(test[0]))
    else:
        rows = torch.arange(number)
        context = (test[1][rows % len(test[1])],) if program.context_shape is not None else ()
        x = program.sample(number, *context, seed=seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if picture:
            from pyro_gen import plots

            plots.samples(program, *test, n=number, seed=seed).savefig(out)
        elif out.suffix.lower() == ".pt":
            torch.save(x, out)
        else:
            np.save(out, x.numpy())
    except (OSError, RuntimeError) as error:  # torch says RuntimeError of a folder that is not there
        said = describe(error) if isinstance(error, OSError) else str(error)
        raise BadInput(f"--out: {out} cannot be written ({said}): name another file") from error
    typer.echo(f"{number} rows of shape {tuple(program.event_shape)}, seed {seed}: {out}")
