"""``pyro-gen fit vae``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import typer

from pyro_gen.cli.errors import BadInput
from pyro_gen.cli.families.family import PANELS, DigitsForm, Family, number, sizes

if TYPE_CHECKING:
    from pyro_gen.base import EvidenceMethod, ObjectiveModule, Program
    from pyro_gen.cli.sources import Data

__all__ = ["VAEFamily"]

_, _MODEL, _LOSS, _, _AFTER = PANELS


@dataclass(frozen=True, kw_only=True)
class VAEFamily(Family):
    """The variational autoencoder: Z bounded from below."""

    name: ClassVar[str] = "vae"
    about: ClassVar[str] = "Variational autoencoder: Z is [bold]bounded[/bold] from below, by a guide q(z | x)."
    text: ClassVar[str] = (
        "Fit a variational autoencoder to data and keep the run in a folder.\n\n"
        "log p(x) is bounded from below by a guide, an encoder, that is fitted along with the model. The weights kept "
        "are those with the best bound on the validation rows; the evidence is that of the test rows, by importance "
        "sampling."
    )

    likelihood: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="p(x | z): [cyan]normal[/cyan], [cyan]bernoulli[/cyan] (0 or 1), [cyan]categorical[/cyan] or "
            "[cyan]discretized_logistic[/cyan] (whole numbers 0 … levels − 1).",
            rich_help_panel=_MODEL,
            show_default="normal; for digits bernoulli (2 levels) or discretized_logistic (17)",
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
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|NUMBER",
            help="Noise of the normal likelihood: [cyan]shared[/cyan], [cyan]feature[/cyan], [cyan]predicted[/cyan], "
            "or a number.",
            rich_help_panel=_MODEL,
            show_default="feature",
        ),
    ] = None
    latent_dim: Annotated[int, typer.Option(help="Size of z.", rich_help_panel=_MODEL)] = 8
    hidden: Annotated[
        str, typer.Option(metavar="SIZES", help="Hidden sizes of both networks.", rich_help_panel=_MODEL)
    ] = "128,128"
    network: Annotated[
        str,
        typer.Option(
            metavar="mlp|conv",
            help="Networks; [cyan]conv[/cyan] for images (channels, height, width).",
            rich_help_panel=_MODEL,
        ),
    ] = "mlp"
    guide: Annotated[
        str,
        typer.Option(
            metavar="diagonal|full_rank|flow", help="Guide q(z | x): a normal, or a flow.", rich_help_panel=_MODEL
        ),
    ] = "diagonal"
    prior: Annotated[
        str,
        typer.Option(
            metavar="normal|mixture|flow",
            help="p(z): standard normal, a learnt mixture, or a learnt flow.",
            rich_help_panel=_MODEL,
        ),
    ] = "normal"
    components: Annotated[int, typer.Option(help="Components of --prior mixture.", rich_help_panel=_MODEL)] = 10
    objective: Annotated[
        str,
        typer.Option(
            metavar="elbo|iwae",
            help="Lower bound to maximise; [cyan]iwae[/cyan] is tighter the more --particles.",
            rich_help_panel=_LOSS,
        ),
    ] = "elbo"
    particles: Annotated[
        int | None,
        typer.Option(help="Draws of the guide for each row.", rich_help_panel=_LOSS, show_default="elbo 1, iwae 16"),
    ] = None
    gradient: Annotated[
        str | None,
        typer.Option(
            metavar="iwae|dreg|stl",
            help="Gradient estimator of --objective iwae.",
            rich_help_panel=_LOSS,
            show_default="iwae",
        ),
    ] = None
    analytic_kl: Annotated[
        bool,
        typer.Option(
            "--analytic-kl",
            help="With elbo: the KL to the prior in closed form, for less noise.",
            rich_help_panel=_LOSS,
        ),
    ] = False
    importance_samples: Annotated[
        int,
        typer.Option(
            metavar="K", help="Draws of the guide for each test row, for the evidence.", rich_help_panel=_AFTER
        ),
    ] = 1000

    def digits(self, dequantize: bool) -> DigitsForm:
        levels = self.levels or (2 if self.likelihood == "bernoulli" else 17)
        if levels not in (2, 17):
            raise BadInput(f"--levels must be 2 (black and white) or 17 (grey) for --data digits, got {levels}")
        return DigitsForm(cast(Literal[2, 17], levels), flat=self.network != "conv", dequantize=dequantize)

    def module(self, content: Data, options: dict[str, Any]) -> ObjectiveModule:
        import pyro_gen as pg

        if self.objective not in ("elbo", "iwae"):
            raise BadInput(f"--objective must be elbo or iwae, got {self.objective!r}")
        if self.objective == "elbo" and self.gradient is not None:
            raise BadInput("--gradient belongs to --objective iwae: leave it out")
        if self.objective == "iwae" and self.analytic_kl:
            raise BadInput("--analytic-kl belongs to --objective elbo: leave it out")
        program = pg.VAE(**self._program(content, options))
        if self.objective == "elbo":
            many = self.particles is not None and self.particles > 1
            count = 1 if self.particles is None else self.particles
            objective: Any = pg.ELBO(count, analytic_kl=self.analytic_kl, vectorize_particles=many)
        else:
            count = 16 if self.particles is None else self.particles
            gradient: Any = self.gradient or "iwae"
            objective = pg.IWAE(count, gradient=gradient)
        module: ObjectiveModule = objective(program)
        return module

    def evidence(self, seed: int, program: Program | None = None) -> EvidenceMethod:
        from pyro_gen import ImportanceSampling

        return ImportanceSampling(self.importance_samples, seed=seed)

    def _program(self, content: Data, options: dict[str, Any]) -> dict[str, Any]:
        x, *context = content.train
        levels, likelihood = self.levels, self.likelihood
        if options["data"] == "digits":
            levels = self.digits(options["dequantize"]).levels
            if likelihood is None and not options["dequantize"]:
                likelihood = "bernoulli" if levels == 2 else "discretized_logistic"
            if likelihood not in ("categorical", "discretized_logistic"):
                levels = None
        if self.prior not in ("normal", "mixture", "flow"):
            raise BadInput(f"--prior must be normal, mixture or flow, got {self.prior!r}")
        if self.network not in ("mlp", "conv"):
            raise BadInput(f"--network must be mlp or conv, got {self.network!r}")
        if self.network == "conv" and x.dim() != 4:
            raise BadInput(
                f"--network conv needs images, rows of shape (channels, height, width); a row is {tuple(x.shape[1:])}"
            )
        return {
            "event_shape": tuple(x.shape[1:]),
            "latent_dim": self.latent_dim,
            "likelihood": likelihood or "normal",
            "levels": levels,
            "scale": number(self.scale),
            "hidden": sizes(self.hidden),
            "encoder": self.network,
            "decoder": self.network,
            "guide": self.guide,
            "prior": None if self.prior == "normal" else self.prior,
            "components": self.components,
            "context_shape": tuple(context[0].shape[1:]) if context else None,
        }
