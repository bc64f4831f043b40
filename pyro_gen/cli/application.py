"""The application: its commands, and what becomes of their errors."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pyro_gen.cli.errors import BAD_INPUT, DIVERGED, INTERRUPTED, BadInput, deliberate, describe, one_line
from pyro_gen.cli.evaluating import evaluate
from pyro_gen.cli.sampling import sample
from pyro_gen.cli.training import fit

__all__ = ["app", "main"]

# what the parser raises for a wrong option; typer brings its own click or uses click's, by version
_ParserError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

EPILOG = """[bold]Begin here[/bold]

[cyan]pyro-gen fit vae --data digits --steps 2000 --seed 0 --out RUN[/cyan]

[cyan]pyro-gen evaluate RUN[/cyan]

[cyan]pyro-gen sample RUN -n 64 --out samples.png[/cyan]

[dim]Exit status: 0 done · 2 bad input · 3 divergence · 130 interrupted, go on with --resume[/dim]"""


class _Commands(TyperGroup):
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


for _command in (fit, sample, evaluate):
    # lines of a docstring are no lines of the help, which is as wide as the terminal
    app.command(_command.__name__, help=re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(_command.__doc__ or "")))(
        _command
    )


def main() -> None:
    """The entry point of ``pyro-gen`` and ``python -m pyro_gen``."""
    app(prog_name="pyro-gen")
