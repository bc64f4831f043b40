"""``pyro-gen fit autoregressive``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import typer

from pyro_gen.cli.errors import BadInput
from pyro_gen.cli.families.family import PANELS, DigitsForm, Family, refuse_counts, sizes

if TYPE_CHECKING:
    from pyro_gen.base import ObjectiveModule
    from pyro_gen.cli.sources import Data

__all__ = ["AutoregressiveFamily"]

_MODEL = PANELS[1]
REAL = ("normal", "mixture_of_logistics")
LEVELS = ("categorical", "discretized_logistic")


@dataclass(frozen=True, kw_only=True)
class AutoregressiveFamily(Family):
    """The autoregressive model: Z built in."""

    name: ClassVar[str] = "autoregressive"
    about: ClassVar[str] = (
        "One value given those before it: Z is [bold]built in[/bold], per conditional; log p(x) is exact."
    )
    text: ClassVar[str] = (
        "Fit an autoregressive model to data, by maximum likelihood, and keep the run in a folder.\n\n"
        "log p(x) is exact, the sum of log p(x_i | values before it), each of which is normalised: there is no guide "
        "and no bound. The weights kept are those with the best likelihood of the validation rows; the evidence is "
        "that of the test rows, exact. With a likelihood for real numbers, whole numbers need --dequantize; for "
        "[cyan]--data digits[/cyan] it is then implied."
    )

    likelihood: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of a value given those before it: [cyan]bernoulli[/cyan] (0 or 1), [cyan]categorical[/cyan] or "
            "[cyan]discretized_logistic[/cyan] (whole numbers 0 … levels − 1), [cyan]mixture_of_logistics[/cyan] or "
            "[cyan]normal[/cyan] (real numbers).",
            rich_help_panel=_MODEL,
            show_default="mixture_of_logistics; for digits bernoulli (2 levels) or discretized_logistic (17)",
        ),
    ] = None
    levels: Annotated[
        int | None,
        typer.Option(
            help="Levels of a discrete likelihood; for digits 2 (black and white) or 17 (grey).",
            rich_help_panel=_MODEL,
            show_default="for digits 17; 2 with --likelihood bernoulli",
        ),
    ] = None
    components: Annotated[
        int | None, typer.Option(help="Logistics in a mixture.", rich_help_panel=_MODEL, show_default="5")
    ] = None
    orders: Annotated[
        int,
        typer.Option(
            help="Orders of the values that are mixed over; densities and draws cost as many passes.",
            rich_help_panel=_MODEL,
        ),
    ] = 1
    hidden: Annotated[
        str, typer.Option(metavar="SIZES", help="Hidden sizes of the masked network.", rich_help_panel=_MODEL)
    ] = "128,128"

    def digits(self, dequantize: bool) -> DigitsForm:
        levels = self.levels or (2 if self.likelihood == "bernoulli" else 17)
        if levels not in (2, 17):
            raise BadInput(f"--levels must be 2 (black and white) or 17 (grey) for --data digits, got {levels}")
        return DigitsForm(cast(Literal[2, 17], levels), dequantize=dequantize or self.likelihood in REAL)

    def module(self, content: Data, options: dict[str, Any]) -> ObjectiveModule:
        import pyro_gen as pg

        x, *context = content.train
        levels, likelihood = self.levels, self.likelihood
        if options["data"] == "digits":
            levels = self.digits(options["dequantize"]).levels
            if likelihood is None and not options["dequantize"]:
                likelihood = "bernoulli" if levels == 2 else "discretized_logistic"
            if likelihood not in LEVELS:
                levels = None
        likelihood = likelihood or "mixture_of_logistics"
        if likelihood in REAL:
            refuse_counts(x, ", or take --likelihood categorical or discretized_logistic with --levels N")
        program = pg.Autoregressive(
            tuple(x.shape[1:]),
            likelihood,
            sizes(self.hidden),
            context_shape=tuple(context[0].shape[1:]) if context else None,
            levels=levels,
            components=self.components,
            orders=self.orders,
        )
        return pg.MaximumLikelihood()(program)
