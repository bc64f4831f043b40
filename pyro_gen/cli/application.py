"""The application: its commands, and what becomes of their errors."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pyro_gen.cli.errors import BAD_INPUT, DIVERGED, INTERRUPTED, BadInput, deliberate, describe, one_line
from pyro_gen.cli.evaluating import evaluate
from pyro_gen.cli.families import FAMILIES, named
from pyro_gen.cli.sampling import sample
from pyro_gen.cli.training import command

__all__ = ["app", "main"]

# what the parser raises for a wrong option; typer brings its own click or uses click's, by version
_ParserError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

EPILOG = """[bold]Begin here[/bold]

[cyan]pyro-gen fit vae --data digits --steps 2000 --seed 0 --out RUN[/cyan]

[cyan]pyro-gen evaluate RUN[/cyan]

[cyan]pyro-gen sample RUN -n 64 --out samples.png[/cyan]

[dim]Exit status: 0 done · 2 bad input · 3 divergence · 130 interrupted, go on with --resume[/dim]"""


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "fit")  # where one begins

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("pyro-gen: interrupted")
            raise typer.Exit(INTERRUPTED) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except (_ParserError, BadInput, OSError, ValueError, TypeError, ImportError, ArithmeticError) as error:
            status = _report(error)
        except typer.Abort:
            status = INTERRUPTED
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)


class _Families(TyperGroup):
    """``pyro-gen fit``: a command a family."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            raise BadInput(f"FAMILY is missing before {args[0]}: pyro-gen fit FAMILY, {_choice()}; {_HINT}")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in FAMILIES:
            raise BadInput(f"FAMILY must be {_choice()}, got {args[0]!r}; {_HINT}")
        return super().resolve_command(ctx, args)


class _Family(TyperCommand):
    """One family: an option that is another's is said to be so."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _ParserError as error:
            option = getattr(error, "option_name", None)
            having = [name for name, other in _commands.items() if _offers(other, option)]
            if not having or self.name in having:  # unknown, or known and without its value
                raise
            raise BadInput(f"{option} is no option of {self.name}, but of {named(having)}: leave it out") from error


_HINT = "see pyro-gen fit --help"


def _choice() -> str:
    return named(list(FAMILIES))


def _offers(function: Any, option: str | None) -> bool:
    return option is not None and option[2:].replace("-", "_") in inspect.signature(function).parameters


def _report(error: Exception) -> int:
    """One line on standard error and the exit status; bugs are raised again."""
    if isinstance(error, _ParserError):
        parser_error: Any = error
        command = parser_error.ctx.command_path if getattr(parser_error, "ctx", None) else "pyro-gen"
        said = " ".join(parser_error.format_message().split()).rstrip(".")
        _say(f"{command}: {said}; see {command} --help")
        return BAD_INPUT
    if isinstance(error, BrokenPipeError):  # as in `pyro-gen evaluate RUN | head -1`
        return 1
    if isinstance(error, (BadInput, OSError)):
        _say(f"pyro-gen: {describe(error) if isinstance(error, OSError) else error}")
        return BAD_INPUT
    if not deliberate(error):
        raise error
    _say(f"pyro-gen: {one_line(error)}")
    return DIVERGED if isinstance(error, ArithmeticError) else BAD_INPUT


def _say(line: str) -> None:
    typer.echo(line, err=True)


app = typer.Typer(
    name="pyro-gen",
    cls=_Commands,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog=EPILOG,
)


def _version(wanted: bool) -> None:
    if wanted:
        from pyro_gen import __version__

        typer.echo(f"pyro-gen {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Deep generative models as Pyro programs, told apart by how they treat their normalizing constant."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _flowing(text: str | None) -> str:
    """Lines of a docstring are no lines of the help, which is as wide as the terminal."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text or ""))


_fit = typer.Typer(
    cls=_Families,
    rich_markup_mode="rich",
    epilog="""[cyan]pyro-gen fit FAMILY --help[/cyan] shows the options of a family.""",
)


@_fit.callback(invoke_without_command=True)
def _fit_alone(context: typer.Context) -> None:
    """Fit a generative model to data, and keep the run in a folder.

    A model is p(x) = f(x) / Z, with Z = ∫ f(x) dx. Families differ in what they do about Z.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_commands = {name: command(family) for name, family in FAMILIES.items()}
for _name, _function in _commands.items():
    _fit.command(
        _name,
        cls=_Family,
        help=_flowing(_function.__doc__),
        short_help=FAMILIES[_name].about,
        rich_help_panel="Families",
    )(_function)
app.add_typer(
    _fit,
    name="fit",
    help=_flowing(_fit_alone.__doc__),
    short_help="Fit a generative model to data.",
    options_metavar="FAMILY",
    subcommand_metavar="[OPTIONS]",
)
for _command in (sample, evaluate):
    app.command(_command.__name__, help=_flowing(_command.__doc__))(_command)


def main() -> None:
    """The entry point of ``pyro-gen`` and ``python -m pyro_gen``."""
    app(prog_name="pyro-gen")
