"""``pyro-gen sample``: draws of a fitted model into a file of numbers or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_gen.cli.chains import Walk, is_unnormalized
from pyro_gen.cli.errors import BadInput, describe
from pyro_gen.cli.families.diffusion import draw_by, is_noised
from pyro_gen.cli.runs import Run
from pyro_gen.cli.sources import read_data

__all__ = ["sample"]

SUFFIXES = (".npy", ".pt", ".png")
CHAINS = "Chains, of an energy-based model"
NOISE = "From noise to data, of a diffusion"


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
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="hmc|mala|langevin|gibbs",
            help="What moves the chains.",
            rich_help_panel=CHAINS,
            show_default="hmc; gibbs for zeros and ones",
        ),
    ] = None,
    chains: Annotated[
        int | None,
        typer.Option(help="How many of them.", rich_help_panel=CHAINS, show_default="one a row, up to 256"),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(help="Steps before the first draw.", rich_help_panel=CHAINS, show_default=str(Walk.warmup)),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Of each chain, for R-hat and effective sizes; rows are the last, or at even distances.",
            rich_help_panel=CHAINS,
            show_default=str(Walk.draws),
        ),
    ] = None,
    step_size: Annotated[
        float | None,
        typer.Option(
            help="Of hmc, mala, langevin.", rich_help_panel=CHAINS, show_default="found in warm-up; langevin 0.1"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="ancestral|ddim|heun|dpm++2m|ode",
            help="The chain itself; DDIM; solvers of the ODE of second order; the ODE to a tolerance.",
            rich_help_panel=NOISE,
            show_default="ancestral",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Levels that are visited; not of ode.",
            rich_help_panel=NOISE,
            show_default="ancestral all; ddim 50, heun 18, dpm++2m 20",
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Noise of ddim, 0 to 1.", rich_help_panel=NOISE, show_default="0")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="W",
            help="Weight of classifier-free guidance, after a fit with --unconditional.",
            rich_help_panel=NOISE,
            show_default="none",
        ),
    ] = None,
) -> None:
    """Draw data from a fitted model.

    A picture shows the draws beside as many test rows. A conditional model is sampled at the contexts of the test
    rows, in turn. An energy is sampled by Markov chains, and a line on standard error says whether they have mixed. A
    diffusion runs its noise backwards, step by step (--method).
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
    asked = {"sampler": sampler, "chains": chains, "warmup": warmup, "draws": draws, "step_size": step_size}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for name in ("chains", "warmup", "draws"):
        least = 0 if name == "warmup" else 1
        if given.get(name, least) < least:
            raise BadInput(f"--{name} must be at least {least}, got {given[name]}")
    noise = {"method": method, "steps": steps, "eta": eta, "guidance": guidance}
    solver = draw_by(method, steps, eta)
    program: Any = run.result().program
    walked = is_unnormalized(program)
    if given and not walked:
        option = "--" + next(iter(given)).replace("_", "-")
        raise BadInput(f"{option} has no use here: {run.options['family']} is sampled without chains: leave it out")
    for name, value in noise.items():
        if value is not None and not is_noised(program):
            raise BadInput(f"--{name} has no use here: {run.options['family']} has no levels of noise: leave it out")
    if guidance is not None and not run.options["unconditional"]:
        raise BadInput("--guidance needs a run fitted with a context and --unconditional, such as 0.1: leave it out")
    picture = out.suffix.lower() == ".png"
    test = read_data(run.options).test if picture or program.context_shape is not None else ()
    said = None
    if picture:
        number = min(number, len(test[0]))
    rows = torch.arange(number)
    context = (test[1][rows % len(test[1])],) if program.context_shape is not None else ()
    x: Any = None
    if walked:
        x, said = Walk(progress=None, **given).rows(program, number, context[0] if context else None, seed)
    elif is_noised(program):
        x = program.sample(number, *context, method=solver, guidance=guidance, seed=seed)
    elif not picture:
        x = program.sample(number, *context, seed=seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if picture:
            from pyro_gen import plots

            plots.samples(program, *test, n=number, seed=seed, generated=x).savefig(out)
        elif out.suffix.lower() == ".pt":
            torch.save(x, out)
        else:
            np.save(out, x.numpy())
    except (OSError, RuntimeError) as error:  # torch says RuntimeError of a folder that is not there
        said = describe(error) if isinstance(error, OSError) else str(error)
        raise BadInput(f"--out: {out} cannot be written ({said}): name another file") from error
    if said is not None:
        typer.echo(said, err=True)
    typer.echo(f"{number} rows of shape {tuple(program.event_shape)}, seed {seed}: {out}")
