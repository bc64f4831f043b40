"""``pyro-gen fit flow``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from pyro_gen.cli.families.family import PANELS, DigitsForm, Family, interval, refuse_counts, sizes

if TYPE_CHECKING:
    from pyro_gen.base import ObjectiveModule
    from pyro_gen.cli.sources import Data

__all__ = ["FlowFamily"]

_MODEL = PANELS[1]
SUPPORTS = ("real", "positive", "unit", "simplex")


@dataclass(frozen=True, kw_only=True)
class FlowFamily(Family):
    """The normalising flow: Z made tractable."""

    name: ClassVar[str] = "flow"
    about: ClassVar[str] = (
        "Normalising flow: Z is [bold]made tractable[/bold], by a change of variables; log p(x) is exact."
    )
    text: ClassVar[str] = (
        "Fit a normalising flow to data, by maximum likelihood, and keep the run in a folder.\n\n"
        "log p(x) is exact, by a change of variables: there is no guide and no bound. The weights kept are those with "
        "the best likelihood of the validation rows; the evidence is that of the test rows, exact. A flow is a density "
        "on real numbers, so whole numbers need --dequantize, uniform noise on \\[0, 1): for "
        "[cyan]--data digits[/cyan] it is implied, and densities are those of x + U\\[0, 1), on \\[0, 17]."
    )

    transform: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="[cyan]spline_autoregressive[/cyan], [cyan]spline_coupling[/cyan], "
            "[cyan]affine_autoregressive[/cyan], [cyan]affine_coupling[/cyan], [cyan]additive_coupling[/cyan], "
            "[cyan]circular_autoregressive[/cyan] or [cyan]circular_coupling[/cyan] (angles), [cyan]linear[/cyan] (a "
            "Gaussian), [cyan]sylvester[/cyan], [cyan]block_autoregressive[/cyan], [cyan]continuous[/cyan].",
            rich_help_panel=_MODEL,
        ),
    ] = "spline_autoregressive"
    layers: Annotated[int, typer.Option(help="How many of them, one after the other.", rich_help_panel=_MODEL)] = 3
    hidden: Annotated[
        str, typer.Option(metavar="SIZES", help="Hidden sizes of each layer's network.", rich_help_panel=_MODEL)
    ] = "128,128"
    mixing: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Between layers: [cyan]lu[/cyan] or [cyan]rotation[/cyan] (learnt), [cyan]permutation[/cyan] or "
            "[cyan]flip[/cyan] (fixed).",
            rich_help_panel=_MODEL,
            show_default="lu; on a box or torus flip",
        ),
    ] = None
    activation: Annotated[
        str,
        typer.Option(
            metavar="silu|relu|tanh|gelu",
            help="Of the networks; relu follows edges, the others give a smooth density.",
            rich_help_panel=_MODEL,
        ),
    ] = "silu"
    direction: Annotated[
        str,
        typer.Option(
            metavar="density|sampling",
            help="What is fast in an autoregressive layer; to fit, density.",
            rich_help_panel=_MODEL,
        ),
    ] = "density"
    base: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Noise: [cyan]normal[/cyan], [cyan]student_t[/cyan] (heavy tails), [cyan]mixture[/cyan] (learnt), "
            "[cyan]uniform[/cyan] (splines on an interval, angles).",
            rich_help_panel=_MODEL,
        ),
    ] = "normal"
    components: Annotated[int, typer.Option(help="Gaussians of --base mixture.", rich_help_panel=_MODEL)] = 10
    support: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|LOW,HIGH",
            help="Where x can lie: [cyan]real[/cyan], [cyan]positive[/cyan], [cyan]unit[/cyan] (0 to 1), "
            "[cyan]simplex[/cyan], or two ends, such as 0,17 or 1,inf.",
            rich_help_panel=_MODEL,
            show_default="real; for digits 0,17",
        ),
    ] = None
    bins: Annotated[int, typer.Option(help="Bins of a spline.", rich_help_panel=_MODEL)] = 8
    bound: Annotated[
        float,
        typer.Option(help="Splines are the identity beyond this many standard deviations.", rich_help_panel=_MODEL),
    ] = 5.0

    def digits(self, dequantize: bool) -> DigitsForm:
        return DigitsForm(dequantize=True)

    def module(self, content: Data, options: dict[str, Any]) -> ObjectiveModule:
        import pyro_gen as pg

        x, *context = content.train
        refuse_counts(x, ", or fit autoregressive with --likelihood categorical --levels N")
        named: dict[str, Any] = {"mixing": self.mixing, "activation": self.activation}  # the library says which
        direction: Any = self.direction
        program = pg.Flow(
            tuple(x.shape[1:]),
            self.transform,  # type: ignore[arg-type]  # the library says which there are
            self.layers,
            sizes(self.hidden),
            tuple(context[0].shape[1:]) if context else None,
            direction,
            base=self.base,
            support=interval(self.support or ("0,17" if options["data"] == "digits" else "real"), SUPPORTS),
            bins=self.bins,
            bound=self.bound,
            components=self.components,
            **named,
        )
        return pg.MaximumLikelihood()(program)
