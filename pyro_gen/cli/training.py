"""``pyro-gen fit``: train a family on data, keep everything in a run folder."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from pyro_gen.cli.building import build, evidence_method, fit_options
from pyro_gen.cli.errors import DIVERGED, INTERRUPTED, BadInput, deliberate, one_line
from pyro_gen.cli.evaluating import report
from pyro_gen.cli.families import PANELS, Family, parameters
from pyro_gen.cli.options import Common
from pyro_gen.cli.runs import Run
from pyro_gen.cli.sources import Data, read_data

if TYPE_CHECKING:
    from pyro_gen.base import ObjectiveModule
    from pyro_gen.fitting import FitResult

__all__ = ["command", "fit"]

NOT_KEPT = ("out", "resume", "progress")  # what a run may do otherwise when it is resumed
FOLDER = (
    "The folder has config.json, checkpoint.pt, the fitted program (Python: pg.load(RUN)), history.csv, evidence.json, "
    "inference_data.nc for ArviZ, and figures."
)


def command(family: type[Family]) -> Callable[..., None]:
    """The function behind ``pyro-gen fit NAME``: its signature is the common options and the family's."""

    def run(context: typer.Context, **options: Any) -> None:
        fit(context, {"family": family.name, **options})

    offered = sorted(
        [*parameters(Common), *parameters(family)], key=lambda p: PANELS.index(_annotation(p).rich_help_panel)
    )
    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    run.__signature__ = inspect.Signature([first, *offered])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (first, *offered)}
    run.__doc__ = f"{family.text}\n\n{FOLDER}"
    return run


def _annotation(parameter: inspect.Parameter) -> Any:
    return parameter.annotation.__metadata__[0]


def fit(context: typer.Context, options: dict[str, Any]) -> None:
    """Fit the family that the options name; ``context`` says which of them were given."""
    family, out, resume, progress = (options[name] for name in ("family", *NOT_KEPT))
    if out is None:
        raise BadInput(f"--out is missing: name a folder for the run, as pyro-gen fit {family} --out RUN")
    run = Run(out)
    asked = {name: value for name, value in options.items() if name not in NOT_KEPT}
    if resume:
        run.read("--out")
        _same_options(context, asked, run)
    else:
        if asked["data"] is None:
            raise BadInput("--data is missing: digits, or a .npy, .npz, .csv or .pt file")
        run.require_new()
        run.options = asked
    content = read_data(run.options)
    if resume and content.facts["crc32"] != run.data.get("crc32"):
        raise BadInput(f"--data: {content.facts['source']} has changed since the run began: start a new one")
    module, arguments = build(run.options, content), fit_options(run.options, content)
    judged = module.objective.loss_is not in ("gradient only", "game")  # else a least loss is no best one
    if not judged and run.options["patience"] is not None:
        raise BadInput(
            "--patience waits for a better loss, and the value of this objective means nothing: leave it out"
        )
    arguments["validation"] = content.validation if judged else None
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
        result = pg.fit(module, content.train, **arguments)
        keep(run, result)
        report(run, result, content, begun)
    except KeyboardInterrupt:
        _say_interrupted(run)
        raise typer.Exit(INTERRUPTED) from None
    except pg.Divergence as error:
        keep(run, error.result)
        line = f"pyro-gen: {one_line(error)}"
        if content.rows is not None and error.rows:
            line += f". Of the file these are rows {sorted(set(content.rows[error.rows].tolist()))[:5]}"
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
    if asked["family"] != run.options.get("family"):
        raise BadInput(f"FAMILY: {run.folder} holds a run of {run.options.get('family')}, not of {asked['family']}")
    for name, value in asked.items():
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and value != run.options.get(name):
            option = "--" + name.replace("_", "-")
            raise BadInput(
                f"{option} {value} differs from {run.options.get(name)} of the run in {run.folder}: leave it out to go "
                "on with that run, or start another in a new --out"
            )
    missing = [name for name in asked if name not in run.options]
    if missing:
        raise BadInput(f"--out: {run.config} lacks {', '.join(missing)}: it was not written by this pyro-gen fit")
