"""``pyro-gen fit diffusion``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from pyro_gen.cli.errors import BadInput
from pyro_gen.cli.families.family import PANELS, DigitsForm, Family, refuse_counts, sizes

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_gen.base import EvidenceMethod, ObjectiveModule, Program
    from pyro_gen.cli.sources import Data

__all__ = ["METHODS", "DiffusionFamily", "draw_by", "figures_of", "is_noised"]

_, _MODEL, _LOSS, _, _AFTER = PANELS

SCHEDULES = ("linear", "cosine", "sigmoid", "learned", "karras", "exploding", "rectified")
PREDICTIONS = ("epsilon", "x0", "v", "score", "velocity", "edm")
VARIANCES = ("optimal", "small", "large", "learned")
OBJECTIVES = ("denoising", "flow_matching", "elbo")
WEIGHTINGS = ("epsilon", "x0", "v", "edm", "truncated_snr", "min_snr", "velocity", "elbo", "sigmoid")
TIMES = ("uniform", "logit_normal", "lognormal")
NO_SIGNAL = ("sigmoid", "rectified")  # schedules that end at α = 0; that of cosine steps stops before
LOG_P = ("ode", "bound")
METHODS = ("ancestral", "ddim", "heun", "dpm++2m", "ode")
# options that are not of every objective, and those they belong to
OWNERS = {
    "weighting": ("denoising", "flow_matching"),
    "times": ("denoising", "flow_matching"),
    "coupling": ("flow_matching",),
}
SHOWN, PRICED = 1000, 256  # draws in a figure of points, and rows whose bound is told level by level


@dataclass(frozen=True, kw_only=True)
class DiffusionFamily(Family):
    """The diffusion: Z bounded by fixed noise."""

    name: ClassVar[str] = "diffusion"
    about: ClassVar[str] = "Diffusion: Z is [bold]bounded by fixed noise[/bold]; the score is learnt at every level."
    text: ClassVar[str] = (
        "Fit a diffusion model to data, and keep the run in a folder.\n\n"
        "Noise takes the data away step by step, and a network learns each step back, by denoising. Afterwards the "
        "evidence of the test rows is that of the probability-flow ODE, with an exact trace to 16 numbers a row, "
        "estimated with an error above, or the chain's variational bound: two models of one network. The weights are "
        "averages over steps, unless --average says otherwise. A diffusion is a density on real numbers, so whole "
        "numbers need --dequantize, uniform noise on \\[0, 1): for [cyan]--data digits[/cyan] it is implied, and "
        "densities are those of x + U\\[0, 1)."
    )

    network: Annotated[
        str,
        typer.Option(
            metavar="mlp|conv",
            help="A perceptron, or a small convolutional network for images (channels, height, width).",
            rich_help_panel=_MODEL,
        ),
    ] = "mlp"
    hidden: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES", help="Hidden sizes of the perceptron.", rich_help_panel=_MODEL, show_default="128,128,128"
        ),
    ] = None
    noise_schedule: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How noise comes in: [cyan]linear[/cyan], [cyan]cosine[/cyan], [cyan]sigmoid[/cyan], "
            "[cyan]learned[/cyan] (with --objective elbo), [cyan]karras[/cyan], [cyan]exploding[/cyan] or "
            "[cyan]rectified[/cyan], a straight line.",
            rich_help_panel=_MODEL,
        ),
    ] = "cosine"
    timesteps: Annotated[
        int, typer.Option(metavar="T", help="Steps of the chain; 0 for continuous time.", rich_help_panel=_MODEL)
    ] = 1000
    prediction: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the network gives: the noise ([cyan]epsilon[/cyan]), the datum ([cyan]x0[/cyan]), "
            "[cyan]v[/cyan], the [cyan]score[/cyan], the [cyan]velocity[/cyan] or [cyan]edm[/cyan].",
            rich_help_panel=_MODEL,
            show_default="epsilon; of flow_matching velocity",
        ),
    ] = None
    variance: Annotated[
        str,
        typer.Option(
            metavar="optimal|small|large|learned",
            help="Of the reverse steps: measured after the fit, a fixed one, or the network's (with --objective elbo).",
            rich_help_panel=_MODEL,
        ),
    ] = "optimal"
    unconditional: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Of the rows, trained without their context, which sample --guidance needs.",
            rich_help_panel=_MODEL,
        ),
    ] = 0.0
    objective: Annotated[
        str,
        typer.Option(
            metavar="denoising|flow_matching|elbo",
            help="Find the noise, the velocity from noise to data, or raise the variational bound itself.",
            rich_help_panel=_LOSS,
        ),
    ] = "denoising"
    weighting: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the levels, on squared errors of the noise: [cyan]epsilon[/cyan] (1), [cyan]x0[/cyan], "
            "[cyan]v[/cyan], [cyan]edm[/cyan], [cyan]truncated_snr[/cyan], [cyan]min_snr[/cyan], "
            "[cyan]velocity[/cyan], [cyan]sigmoid[/cyan] or [cyan]elbo[/cyan], that of the bound.",
            rich_help_panel=_LOSS,
            show_default="epsilon; of flow_matching velocity",
        ),
    ] = None
    times: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|logit_normal|lognormal",
            help="Which levels are trained how often.",
            rich_help_panel=_LOSS,
            show_default="uniform",
        ),
    ] = None
    coupling: Annotated[
        str | None,
        typer.Option(
            metavar="independent|optimal",
            help="Of data and noise in flow_matching; [cyan]optimal[/cyan] makes straighter paths, for the ODE alone.",
            rich_help_panel=_LOSS,
            show_default="independent",
        ),
    ] = None
    log_p: Annotated[
        str,
        typer.Option(
            metavar="ode|bound",
            help="How log p(x) is had: by the probability-flow ODE, or the variational bound of the chain.",
            rich_help_panel=_AFTER,
        ),
    ] = "ode"
    probes: Annotated[
        int,
        typer.Option(
            metavar="M",
            help="Random directions a row for the trace of the ODE above 16 numbers; draws of the noise of the bound.",
            rich_help_panel=_AFTER,
        ),
    ] = 8

    def digits(self, dequantize: bool) -> DigitsForm:
        return DigitsForm(flat=self.network != "conv", dequantize=True)

    def module(self, content: Data, options: dict[str, Any]) -> ObjectiveModule:
        import pyro_gen as pg

        if options["schedule"] in SCHEDULES and options["schedule"] != "cosine":
            raise BadInput(
                f"--schedule is that of the learning rate, cosine or constant: for the noise --noise-schedule "
                f"{options['schedule']}"
            )
        x, *context = content.train
        self._check(x, bool(context))
        refuse_counts(x, "")
        given: dict[str, Any] = {
            "network": self.network,
            "schedule": self.noise_schedule,
            "prediction": self._prediction(),
            "variance": self.variance,
        }
        program = pg.Diffusion(
            tuple(x.shape[1:]),
            timesteps=self.timesteps or None,
            context_shape=tuple(context[0].shape[1:]) if context else None,
            hidden=sizes(self.hidden or "128,128,128"),
            unconditional=self.unconditional,
            **given,
        )
        module: ObjectiveModule = self._objective()(program)
        return module

    def evidence(self, seed: int, program: Program | None = None) -> EvidenceMethod:
        import pyro_gen as pg
        from pyro_gen.evidence import LowerBound

        if self.log_p not in LOG_P:
            raise BadInput(f"--log-p must be ode or bound, got {self.log_p!r}")
        if self.probes < 2:
            raise BadInput(f"--probes must be at least 2, as one says nothing of its error, got {self.probes}")
        if self.log_p == "ode":
            return pg.ProbabilityFlow(probes=self.probes, seed=seed)
        if self.coupling == "optimal":
            raise BadInput(
                "--log-p bound is of the reverse chain, which --coupling optimal does not train: take --log-p ode"
            )
        return LowerBound(self.probes, seed)

    # ------------------------------------------------------------------------------------------------------ choices
    def _check(self, x: Tensor, conditional: bool) -> None:
        """Refuse names that are none, and options that do not go together."""
        for name, among in (
            ("network", ("mlp", "conv")),
            ("noise_schedule", SCHEDULES),
            ("prediction", PREDICTIONS),
            ("variance", VARIANCES),
            ("objective", OBJECTIVES),
            ("weighting", WEIGHTINGS),
            ("times", TIMES),
            ("coupling", ("independent", "optimal")),
        ):
            value = getattr(self, name)
            if value is not None and value not in among:
                option = "--" + name.replace("_", "-")
                raise BadInput(f"{option} must be {', '.join(among[:-1])} or {among[-1]}, got {value!r}")
        for name, owners in OWNERS.items():
            if getattr(self, name) is not None and self.objective not in owners:
                belongs = f"--{name} belongs to --objective {' or '.join(owners)}"
                raise BadInput(f"{belongs}, not {self.objective}: leave it out")
        if self.timesteps < 0:
            raise BadInput(f"--timesteps must be at least 1, or 0 for continuous time, got {self.timesteps}")
        if self.network == "conv":
            if x.dim() != 4:
                raise BadInput(
                    "--network conv needs images, rows of shape (channels, height, width); a row is "
                    f"{tuple(x.shape[1:])}"
                )
            if self.hidden is not None:
                raise BadInput("--hidden belongs to --network mlp: leave it out")
        if "learned" in (self.noise_schedule, self.variance) and self.objective != "elbo":
            option = "--noise-schedule" if self.noise_schedule == "learned" else "--variance"
            raise BadInput(f"{option} learned is learnt by the bound: add --objective elbo")
        if self.variance == "learned" and self.timesteps < 2:
            raise BadInput(
                "--variance learned is that of steps of a chain: give --timesteps 2 or more, or take optimal"
            )
        if self.prediction == "v" and self.noise_schedule in ("karras", "exploding", "rectified"):
            raise BadInput(
                f"--prediction v needs α² + σ² = 1, which --noise-schedule {self.noise_schedule} has not: take edm, "
                "which is v for any schedule"
            )
        prediction = self._prediction()
        if self.timesteps and self.noise_schedule in NO_SIGNAL and prediction in ("epsilon", "score"):
            raise BadInput(
                f"--prediction {prediction} divides by α, which is 0 at the last of the steps of --noise-schedule "
                f"{self.noise_schedule}: take edm, or continuous time, --timesteps 0"
            )
        if self.weighting in ("elbo", "sigmoid") and self.times not in (None, "uniform"):
            raise BadInput(f"--weighting {self.weighting} is an integral over all levels: leave --times out")
        if not 0 <= self.unconditional < 1:
            raise BadInput(f"--unconditional must be a share of the rows, from 0 to below 1, got {self.unconditional}")
        if self.unconditional and not conditional:
            raise BadInput("--unconditional leaves the context out, and --data has none: leave --unconditional out")
        if self.coupling == "optimal" and conditional:
            raise BadInput("--coupling optimal pairs by x alone, and --data has a context: take independent")

    def _prediction(self) -> str:
        return self.prediction or ("velocity" if self.objective == "flow_matching" else "epsilon")

    def _objective(self) -> Any:
        import pyro_gen as pg

        if self.objective == "elbo":
            return pg.ELBO()
        weighting: Any = self.weighting
        time: Any = self.times or "uniform"
        if self.objective == "denoising":
            return pg.DenoisingScoreMatching(weighting=weighting or "epsilon", time=time)
        coupling: Any = self.coupling or "independent"
        return pg.FlowMatching(coupling, weighting=weighting or "velocity", time=time)


# ------------------------------------------------------------------------------------------- what commands do with it
def is_noised(program: Program) -> bool:
    """Whether draws come down levels of noise."""
    from pyro_gen.base import Noised

    return isinstance(program, Noised)


def draw_by(method: str | None, steps: int | None, eta: float | None) -> Any:
    """The sampler that the options of ``pyro-gen sample`` name; None where they name none."""
    import pyro_gen as pg

    if method is not None and method not in METHODS:
        raise BadInput(f"--method must be {', '.join(METHODS[:-1])} or {METHODS[-1]}, got {method!r}")
    if steps is not None and steps < 1:
        raise BadInput(f"--steps must be at least 1, got {steps}")
    if eta is not None and method != "ddim":
        raise BadInput("--eta belongs to --method ddim: leave it out")
    if eta is not None and not 0 <= eta <= 1:
        raise BadInput(f"--eta must lie between 0, no noise, and 1, that of ancestral, got {eta}")
    if method == "ode":
        if steps is not None:
            raise BadInput("--steps: the steps of --method ode keep a tolerance: leave it out, or take heun or dpm++2m")
        return pg.ProbabilityFlow()
    if method is None and steps is None:
        return None
    named: Any = method or "ancestral"
    return pg.ReverseDiffusion(named, steps, eta=eta)


def figures_of(program: Any, test: tuple[Tensor, ...], seed: int) -> dict[str, Any]:
    """The figures of a diffusion, by name: what its levels cost, and where there is no context its draws on their way.

    Draws are those of a solver of the ODE, few steps of which are enough.
    """
    import pyro_gen as pg
    from pyro_gen import plots

    steps = 40 if program.timesteps is None else min(40, program.timesteps)
    quick = pg.ReverseDiffusion("dpm++2m", steps)
    few = tuple(part[:SHOWN] for part in test)
    generated = program.sample(len(few[0]), *few[1:], method=quick, seed=seed)
    figures = {"samples": plots.samples(program, *few, n=None, seed=seed, generated=generated)}
    if program.timesteps is None or program.timesteps > 1:
        figures["loss_by_level"] = plots.loss_by_level(program, *(part[:PRICED] for part in test), seed=seed)
    if len(test) > 1:
        return figures
    figures["strips"] = plots.strips(program, test[0], method=quick, seed=seed)
    if program.event_shape.numel() == 2 and len(program.event_shape) == 1:
        figures["trajectories"] = plots.trajectories(program, test[0], seed=seed)
        figures["score_field"] = plots.score_field(program, test[0], seed=seed)
    return figures
