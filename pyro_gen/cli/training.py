"""``pyro-gen fit``: train a family on data, keep everything in a run folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_gen.cli.building import BATCH_SIZE, build, evidence_method, fit_options
from pyro_gen.cli.errors import DIVERGED, INTERRUPTED, BadInput, deliberate, one_line
from pyro_gen.cli.evaluating import report
from pyro_gen.cli.runs import Run
from pyro_gen.cli.sources import TEST, VALIDATION, Data, read_data

if TYPE_CHECKING:
    from pyro_gen.base import ObjectiveModule
    from pyro_gen.fitting import FitResult

__all__ = ["fit"]

FAMILIES = ("vae",)
NOT_KEPT = ("out", "resume", "progress")  # what a run may do otherwise when it is resumed
_DATA, _MODEL, _LOSS, _LOOP, _AFTER = "Data", "Model", "Objective", "Training", "Run folder and evidence"


def fit(
    context: typer.Context,
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="What to fit: [cyan]vae[/cyan].", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="digits|FILE",
            help="[cyan]digits[/cyan] (8 by 8 images, split 1200, 237, 360), or a .npy, .npz, .csv or .pt file.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Rows of a file held out to choose the weights by.",
            rich_help_panel=_DATA,
            show_default=str(VALIDATION),
        ),
    ] = None,
    test: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Rows of a file held out for the evidence.",
            rich_help_panel=_DATA,
            show_default=str(TEST),
        ),
    ] = None,
    split_seed: Annotated[
        int | None,
        typer.Option(help="Seed of a file's split.", rich_help_panel=_DATA, show_default="0"),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Add uniform noise on \\[0, 1) to whole numbers, for --likelihood normal.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    header: Annotated[
        bool, typer.Option("--header", help="Skip the first line of a .csv file.", rich_help_panel=_DATA)
    ] = False,
    delimiter: Annotated[
        str | None,
        typer.Option(help="Between the cells of a .csv file.", rich_help_panel=_DATA, show_default="comma"),
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="p(x | z): [cyan]normal[/cyan], [cyan]bernoulli[/cyan] (0 or 1), [cyan]categorical[/cyan] or "
            "[cyan]discretized_logistic[/cyan] (whole numbers 0 … levels − 1).",
            rich_help_panel=_MODEL,
            show_default="normal; for digits bernoulli (2 levels) or discretized_logistic (17)",
        ),
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(
            help="Levels of a discrete likelihood; for digits 2 (black and white) or 17 (grey).",
            rich_help_panel=_MODEL,
            show_default="for digits 17; 2 with --likelihood bernoulli",
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|NUMBER",
            help="Noise of the normal likelihood: [cyan]shared[/cyan], [cyan]feature[/cyan], [cyan]predicted[/cyan], "
            "or a number.",
            rich_help_panel=_MODEL,
            show_default="feature",
        ),
    ] = None,
    latent_dim: Annotated[int, typer.Option(help="Size of z.", rich_help_panel=_MODEL)] = 8,
    hidden: Annotated[
        str, typer.Option(metavar="SIZES", help="Hidden sizes of both networks.", rich_help_panel=_MODEL)
    ] = "128,128",
    network: Annotated[
        str,
        typer.Option(
            metavar="mlp|conv",
            help="Networks; [cyan]conv[/cyan] for images (channels, height, width).",
            rich_help_panel=_MODEL,
        ),
    ] = "mlp",
    guide: Annotated[
        str, typer.Option(metavar="diagonal|full_rank", help="Normal guide q(z | x).", rich_help_panel=_MODEL)
    ] = "diagonal",
    prior: Annotated[
        str,
        typer.Option(
            metavar="normal|mixture", help="p(z): standard normal, or a learnt mixture.", rich_help_panel=_MODEL
        ),
    ] = "normal",
    components: Annotated[int, typer.Option(help="Components of --prior mixture.", rich_help_panel=_MODEL)] = 10,
    objective: Annotated[
        str,
        typer.Option(
            metavar="elbo|iwae",
            help="Lower bound to maximise; [cyan]iwae[/cyan] is tighter the more --particles.",
            rich_help_panel=_LOSS,
        ),
    ] = "elbo",
    particles: Annotated[
        int | None,
        typer.Option(help="Draws of the guide for each row.", rich_help_panel=_LOSS, show_default="elbo 1, iwae 16"),
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option(
            metavar="iwae|dreg|stl",
            help="Gradient estimator of --objective iwae.",
            rich_help_panel=_LOSS,
            show_default="iwae",
        ),
    ] = None,
    analytic_kl: Annotated[
        bool,
        typer.Option(
            "--analytic-kl",
            help="With elbo: the KL to the prior in closed form, for less noise.",
            rich_help_panel=_LOSS,
        ),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", rich_help_panel=_LOOP, show_default="2000")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data, instead of --steps.", rich_help_panel=_LOOP)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows a step.", rich_help_panel=_LOOP, show_default=f"{BATCH_SIZE}, or all if fewer"),
    ] = None,
    lr: Annotated[
        float, typer.Option(help="Learning rate of Adam, for the loss per datum.", rich_help_panel=_LOOP)
    ] = 2e-3,
    schedule: Annotated[
        str,
        typer.Option(
            metavar="cosine|constant", help="Learning rate over the run, cosine to zero.", rich_help_panel=_LOOP
        ),
    ] = "cosine",
    clip_norm: Annotated[
        float | None, typer.Option(help="Scale gradients of a larger norm down to it.", rich_help_panel=_LOOP)
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(
            metavar="DECAY|tail",
            help="Average the weights: exponentially (0.999), or over the second half.",
            rich_help_panel=_LOOP,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many validations without a better one (there are 40 in a run).", rich_help_panel=_LOOP
        ),
    ] = None,
    compile: Annotated[
        str,
        typer.Option(
            metavar="auto|on|off", help="Compile the step; auto does from 5000 steps on.", rich_help_panel=_LOOP
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="auto takes CUDA where there is one.", rich_help_panel=_LOOP)
    ] = "auto",
    seed: Annotated[
        int, typer.Option(help="Of weights, batches and noise: the same seed, the same run.", rich_help_panel=_LOOP)
    ] = 0,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress", help="Show progress.", rich_help_panel=_LOOP, show_default="on a terminal"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Folder to write; it must not exist yet.", rich_help_panel=_AFTER, show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --out from its checkpoint, under its own options.",
            rich_help_panel=_AFTER,
        ),
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", help="Steps between checkpoints.", rich_help_panel=_AFTER, show_default="20 a run"
        ),
    ] = None,
    importance_samples: Annotated[
        int,
        typer.Option(
            metavar="K", help="Draws of the guide for each test row, for the evidence.", rich_help_panel=_AFTER
        ),
    ] = 1000,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures.", rich_help_panel=_AFTER)] = True,
) -> None:
    """Fit a generative model to data and keep the run in a folder.

    The weights kept are those with the best bound on the validation rows; the evidence is that of the test rows, by
    importance sampling. The folder has config.json, checkpoint.pt, the fitted program (Python: pg.load(RUN)),
    history.csv, evidence.json, inference_data.nc for ArviZ, and figures.
    """
    if family not in FAMILIES:
        raise BadInput(f"FAMILY must be {' or '.join(FAMILIES)}, got {family!r}")
    if out is None:
        raise BadInput(f"--out is missing: name a folder for the run, as pyro-gen fit {family} --out RUN")
    run = Run(out)
    names = [parameter.name for parameter in context.command.params if parameter.name not in NOT_KEPT]
    asked = {name: context.params[name] for name in names if name in context.params}
    if resume:
        run.read("--out")
        _same_options(context, asked, run)
    else:
        if data is None:
            raise BadInput("--data is missing: digits, or a .npy, .npz, .csv or .pt file")
        run.require_new()
        run.options = asked
    content = read_data(run.options)
    if resume and content.facts["crc32"] != run.data.get("crc32"):
        raise BadInput(f"--data: {content.facts['source']} has changed since the run began: start a new one")
    module, arguments = build(run.options, content), fit_options(run.options, len(content.train[0]))
    evidence_method(run.options)  # a wrong one is found before the training
    run.data = content.facts
    if not resume:
        run.create()
        run.write()
    arguments.update(progress=progress, checkpoint=run.checkpoint)
    _train(run, module, content, arguments, fresh=not resume)


def _train(run: Run, module: ObjectiveModule, content: Data, arguments: dict[str, Any], *, fresh: bool) -> None:
    import pyro_gen as pg
    from pyro_gen.compiled import CannotCompile

    begun = time.perf_counter()
    try:
        result = pg.fit(module, content.train, validation=content.validation, **arguments)
        keep(run, result)
        report(run, result, content, begun)
    except KeyboardInterrupt:
        _say_interrupted(run)
        raise typer.Exit(INTERRUPTED) from None
    except pg.Divergence as error:
        keep(run, error.result)
        line = f"pyro-gen: {one_line(error)}"
        if content.rows is not None and error.rows:
            line += f". Of the file these are rows {sorted(content.rows[error.rows].tolist())[:5]}"
        typer.echo(f"{line}. {run.folder} keeps that state", err=True)
        raise typer.Exit(DIVERGED) from None
    except (ValueError, TypeError, CannotCompile) as error:
        if not deliberate(error):
            raise
        if fresh:
            run.discard()
        raise BadInput(one_line(error)) from error


def _say_interrupted(run: Run) -> None:
    done = "before the first checkpoint"
    if run.checkpoint.exists():
        from pyro_gen.fitting.results import read_tensors

        done = f"after {read_tensors(run.checkpoint)['step']} steps, kept in {run.checkpoint}"
    again = f"pyro-gen fit {run.options['family']} --out {run.folder} --resume"
    typer.echo(f"pyro-gen: interrupted {done}; go on by {again}", err=True)


def keep(run: Run, result: FitResult) -> None:
    """Write the fitted program and its history."""
    import csv

    result.save(run.folder)
    columns, validation = result.history.columns, dict(result.history.validation)
    with run.file("history.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", *columns, "validation"])
        for step, row in enumerate(zip(*columns.values(), strict=True), 1):
            table.writerow([step, *row, validation.get(step, "")])


def _same_options(context: typer.Context, asked: dict[str, Any], run: Run) -> None:
    """A resumed run keeps its options; one that is given and differs is refused."""
    for name, value in asked.items():
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name != "family" and value != run.options.get(name):
            option = "--" + name.replace("_", "-")
            raise BadInput(
                f"{option} {value} differs from {run.options.get(name)} of the run in {run.folder}: leave it out to go "
                "on with that run, or start another in a new --out"
            )
    if asked["family"] != run.options.get("family"):
        raise BadInput(f"FAMILY: {run.folder} holds a {run.options.get('family')}, not a {asked['family']}")
    missing = [name for name in asked if name not in run.options]
    if missing:
        raise BadInput(f"--out: {run.config} lacks {', '.join(missing)}: it was not written by this pyro-gen fit")
