"""``pyro-gen fit ebm``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from pyro_gen.cli.errors import BadInput, about
from pyro_gen.cli.families.family import PANELS, DigitsForm, Family, interval, refuse_counts, sizes

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_gen.base import EvidenceMethod, ObjectiveModule, Program
    from pyro_gen.cli.sources import Data

__all__ = ["EBMFamily"]

_, _MODEL, _LOSS, _, _AFTER = PANELS

# What each objective can train on, and the options that are its own.
CONTINUOUS = ("score_matching", "sliced", "finite_difference", "denoising")
BINARY = ("pseudo_likelihood",)
EITHER = ("nce", "cd", "pcd")
OWNERS = {
    "sigma": ("denoising",),
    "eps": ("finite_difference",),
    "projections": ("sliced", "finite_difference"),
    "noise": ("nce",),
    "ratio": ("nce",),
    "cd_steps": ("cd", "pcd"),
    "negatives": ("pcd",),
}
BASES = ("normal", "uniform", "bernoulli", "flat")
SUPPORTS = ("real", "positive", "unit")
LOG_Z = ("auto", "annealed", "quadrature", "enumeration")
RELATIVE_EPS = 0.05  # of the scale of the data: far above rounding, and little bias
FEW_DIMENSIONS, FEW_UNITS = 2, 16  # up to which log Z is integrated, or summed, by itself


@dataclass(frozen=True, kw_only=True)
class EBMFamily(Family):
    """The energy-based model: Z left open."""

    name: ClassVar[str] = "ebm"
    about: ClassVar[str] = "Energy-based model: Z is [bold]left open[/bold]; afterwards it is estimated, with an error."
    text: ClassVar[str] = (
        "Fit an energy-based model to data, p(x) = base(x) exp(−E(x)) / Z, and keep the run in a folder.\n\n"
        "Training does without Z: real numbers by score matching, with uniform noise by denoising, zeros and ones by a "
        "restricted Boltzmann machine and persistent chains. Afterwards log Z is estimated, one number for all test "
        "rows, and with it their evidence: its first error is that of log Z. Samples are those of Markov chains. "
        "[cyan]--data digits[/cyan] are black and white, grey with --dequantize; other whole numbers need --dequantize."
    )

    energy: Annotated[
        str | None,
        typer.Option(
            metavar="mlp|rbm",
            help="E(x): a perceptron, or the free energy of a restricted Boltzmann machine (zeros and ones).",
            rich_help_panel=_MODEL,
            show_default="mlp; for zeros and ones rbm",
        ),
    ] = None
    hidden: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Hidden sizes of the perceptron, or the hidden units of rbm.",
            rich_help_panel=_MODEL,
            show_default="128,128; rbm 64",
        ),
    ] = None
    activation: Annotated[
        str | None,
        typer.Option(
            metavar="silu|softplus|tanh|gelu|relu",
            help="Of the perceptron; relu has no second derivative to match.",
            rich_help_panel=_MODEL,
            show_default="silu",
        ),
    ] = None
    base: Annotated[
        str | None,
        typer.Option(
            metavar="normal|uniform|bernoulli|flat",
            help="What the energy tilts: [cyan]normal[/cyan] or [cyan]uniform[/cyan] (placed by the data), "
            "[cyan]bernoulli[/cyan] (fair coins), or [cyan]flat[/cyan], the energy alone.",
            rich_help_panel=_MODEL,
            show_default="normal; for zeros and ones bernoulli",
        ),
    ] = None
    support: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|LOW,HIGH",
            help="Of --base flat: [cyan]real[/cyan], [cyan]positive[/cyan], [cyan]unit[/cyan] (0 to 1), or two ends.",
            rich_help_panel=_MODEL,
            show_default="real",
        ),
    ] = None
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="[cyan]score_matching[/cyan] (exact), [cyan]sliced[/cyan], [cyan]finite_difference[/cyan], "
            "[cyan]denoising[/cyan], [cyan]nce[/cyan] (against noise, log Z learnt along), [cyan]cd[/cyan], "
            "[cyan]pcd[/cyan] (chains, persistent ones), [cyan]pseudo_likelihood[/cyan] (zeros and ones).",
            rich_help_panel=_LOSS,
            show_default="score_matching; with --dequantize denoising; for zeros and ones pcd (rbm) or "
            "pseudo_likelihood (mlp)",
        ),
    ] = None
    sigma: Annotated[
        str | None,
        typer.Option(
            metavar="SIGMA[,SIGMA]",
            help="Noise of denoising, in standard deviations of each value; of several levels the first has nine "
            "tenths of the data, the others are a bridge between far modes.",
            rich_help_panel=_LOSS,
            show_default="0.2",
        ),
    ] = None
    eps: Annotated[
        float | None,
        typer.Option(
            help="Step of finite_difference, in the units of x.",
            rich_help_panel=_LOSS,
            show_default=f"{RELATIVE_EPS} standard deviations",
        ),
    ] = None
    projections: Annotated[
        int | None,
        typer.Option(
            help="Random directions a row, of sliced and finite_difference.", rich_help_panel=_LOSS, show_default="1"
        ),
    ] = None
    noise: Annotated[
        str | None,
        typer.Option(
            metavar="normal|diagonal|base",
            help="What nce tells the data from: a normal distribution fitted to them, one without correlations, or "
            "the base.",
            rich_help_panel=_LOSS,
            show_default="normal; for zeros and ones base",
        ),
    ] = None
    ratio: Annotated[
        int | None,
        typer.Option(help="Draws of that noise for each row.", rich_help_panel=_LOSS, show_default="8"),
    ] = None
    cd_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the chains of cd and pcd for each step of the optimizer: block Gibbs of rbm, Gibbs, MALA.",
            rich_help_panel=_LOSS,
            show_default="10",
        ),
    ] = None
    negatives: Annotated[
        int | None, typer.Option(help="Persistent chains of pcd.", rich_help_panel=_LOSS, show_default="128")
    ] = None
    log_z: Annotated[
        str,
        typer.Option(
            metavar="auto|annealed|quadrature|enumeration",
            help="How log Z is had: annealed importance sampling, an integral (to 3 numbers a row), a sum of states. "
            f"auto: an integral to {FEW_DIMENSIONS} numbers a row, a sum to {FEW_UNITS} binary values or hidden units, "
            "else annealed.",
            rich_help_panel=_AFTER,
        ),
    ] = "auto"
    temperatures: Annotated[
        int, typer.Option(metavar="K", help="Of annealing, from the base to the model.", rich_help_panel=_AFTER)
    ] = 1000
    chains: Annotated[int, typer.Option(metavar="M", help="Of annealing.", rich_help_panel=_AFTER)] = 100
    contexts: Annotated[
        int,
        typer.Option(
            help="Distinct contexts of test rows that get a log Z each; rows of others are left out of the evidence.",
            rich_help_panel=_AFTER,
        ),
    ] = 10

    def digits(self, dequantize: bool) -> DigitsForm:
        return DigitsForm(17 if dequantize else 2, dequantize=dequantize)

    def module(self, content: Data, options: dict[str, Any]) -> ObjectiveModule:
        import pyro_gen as pg

        x, *context = content.train
        binary = not options["dequantize"] and _is_binary(content)
        if not binary:
            refuse_counts(x, "")
        energy = self._choice("energy", ("mlp", "rbm"), "rbm" if binary and not context and x.dim() == 2 else "mlp")
        objective = self._objective_name(binary, options["dequantize"], energy, bool(context))
        self._check(binary, energy, objective)
        base = self._choice("base", BASES, "bernoulli" if binary else "normal")
        program = pg.EBM(
            tuple(x.shape[1:]),
            None if energy == "mlp" else energy,
            None if base == "flat" else base,  # type: ignore[arg-type]  # the library says which there are
            tuple(context[0].shape[1:]) if context else None,
            hidden=sizes(self.hidden or ("64" if energy == "rbm" else "128,128")),
            activation=self.activation or "silu",  # type: ignore[arg-type]
            support="binary" if binary and base == "flat" else self._support(),
        )
        program.initialise(*content.train)
        with about("--data"):  # all rows, so that none is found outside the base after the training
            for part in (content.train, content.validation, content.test):
                program.check(*part)
        module: ObjectiveModule = self._objective(objective, binary, x)(program)
        if hasattr(module, "initialise"):  # what a loss takes from the data, from all of them and not the first batch
            module.initialise(*content.train)
        return module

    def evidence(self, seed: int, program: Program | None = None) -> EvidenceMethod:
        import pyro_gen as pg

        if self.log_z not in LOG_Z:
            raise BadInput(f"--log-z must be {', '.join(LOG_Z[:-1])} or {LOG_Z[-1]}, got {self.log_z!r}")
        if self.contexts < 1:
            raise BadInput(f"--contexts must be at least 1, got {self.contexts}")
        annealed = pg.AnnealedImportanceSampling(
            self.temperatures, self.chains, base=None if program is None else broad_start(program), seed=seed
        )
        if program is None or self.log_z == "annealed":
            return annealed
        if self.log_z == "quadrature" or (self.log_z == "auto" and _is_plane(program)):
            return pg.Quadrature()
        if self.log_z == "enumeration" or (self.log_z == "auto" and _is_small(program)):
            return pg.Enumeration()
        return annealed

    # ------------------------------------------------------------------------------------------------------ choices
    def _choice(self, name: str, among: tuple[str, ...], default: str) -> str:
        value: str | None = getattr(self, name)
        if value is not None and value not in among:
            option = "--" + name.replace("_", "-")
            raise BadInput(f"{option} must be {', '.join(among[:-1])} or {among[-1]}, got {value!r}")
        return default if value is None else value

    def _objective_name(self, binary: bool, noisy: bool, energy: str, conditional: bool) -> str:
        if binary:
            default = "pcd" if energy == "rbm" else "pseudo_likelihood"
        else:  # uniform noise has edges, at which the score of x is none; that of x with more noise is
            default = "denoising" if noisy and not self._bounded() else "score_matching"
        objective = self._choice("objective", (*CONTINUOUS, *EITHER, *BINARY), default)
        if binary and objective in CONTINUOUS:
            raise BadInput(
                f"--objective {objective} differentiates in x, and --data holds zeros and ones: take pcd, cd, "
                "pseudo_likelihood or nce"
            )
        if not binary and objective in BINARY:
            raise BadInput(
                f"--objective {objective} is for zeros and ones, and --data holds other numbers: take nce or "
                "score_matching"
            )
        if conditional and objective in ("nce", "pcd"):
            raise BadInput(
                f"--objective {objective} is for one density, and --data has a context, with a Z for each: take "
                + ("pseudo_likelihood or cd" if binary else "score_matching, denoising or cd")
            )
        return objective

    def _check(self, binary: bool, energy: str, objective: str) -> None:
        """Refuse options that do not go together, rather than leave one of them without effect."""
        for name, owners in OWNERS.items():
            if getattr(self, name) is not None and objective not in owners:
                option = "--" + name.replace("_", "-")
                raise BadInput(f"{option} belongs to --objective {' or '.join(owners)}, not {objective}: leave it out")
        for name in ("cd_steps", "negatives"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if energy == "rbm":
            if not binary:
                raise BadInput("--energy rbm takes zeros and ones, and --data holds other numbers: take mlp")
            if self.activation is not None:
                raise BadInput("--activation belongs to --energy mlp: leave it out")
        if self.activation == "relu" and objective in ("score_matching", "sliced"):
            raise BadInput(
                f"--activation relu has second derivative 0 almost everywhere, and --objective {objective} would make "
                "the energy flat: take silu, or --objective finite_difference, denoising or nce"
            )
        if binary and self.base in ("normal", "uniform"):
            raise BadInput(f"--base {self.base} is for real numbers, and --data holds zeros and ones: take bernoulli")
        if not binary and self.base == "bernoulli":
            raise BadInput("--base bernoulli is for zeros and ones, and --data holds other numbers: take normal")
        if self.support is not None and (self.base != "flat" or binary):
            raise BadInput("--support belongs to --base flat of real numbers: leave it out")
        bounded = self._bounded()
        if bounded and objective in ("sliced", "finite_difference", "denoising"):
            raise BadInput(
                f"--objective {objective} needs all of the real line, and the base has an edge: take score_matching, "
                "whose weighted form does not, or --base normal"
            )
        if objective == "nce" and self.base == "flat" and (bounded or binary or self.noise == "base"):
            better = "--base bernoulli" if binary else "--base uniform --noise base" if bounded else "--noise normal"
            raise BadInput(
                f"--objective nce takes draws of the base for noise, and --base flat has none: take {better}"
            )
        if bounded and objective == "nce" and self.noise != "base":
            raise BadInput("--objective nce on a base with an edge needs noise inside it: add --noise base")

    def _bounded(self) -> bool:
        return self.base == "uniform" or self.support not in (None, "real")

    def _support(self) -> Any:
        return interval(self.support, SUPPORTS) if self.support is not None else "real"

    def _objective(self, name: str, binary: bool, x: Tensor) -> Any:
        import pyro_gen as pg

        count = 1 if self.projections is None else self.projections
        if name == "score_matching":
            return pg.ScoreMatching(weight="auto")
        if name == "sliced":
            return pg.SlicedScoreMatching(count)
        if name == "finite_difference":
            scale = float(x.std(0, unbiased=False).square().mean().sqrt())
            eps = RELATIVE_EPS * scale if self.eps is None else self.eps
            return pg.FiniteDifferenceScoreMatching(float(f"{eps:.3g}"), projections=count)
        if name == "denoising":
            return self._denoising()
        if name == "nce":
            noise: Any = self._choice("noise", ("normal", "diagonal", "base"), "base" if binary else "normal")
            if binary and noise != "base":
                raise BadInput(f"--noise {noise} is for real numbers, and --data holds zeros and ones: take base")
            return pg.NoiseContrastive(None if noise == "base" else noise, 8 if self.ratio is None else self.ratio)
        if name == "pseudo_likelihood":
            return pg.PseudoLikelihood()
        persistent = name == "pcd"
        return pg.ContrastiveDivergence(
            steps=self.cd_steps or 10, persistent=persistent, chains=(self.negatives or 128) if persistent else None
        )

    def _denoising(self) -> Any:
        import pyro_gen as pg

        try:
            levels = [float(level) for level in (self.sigma or "0.2").split(",")]
        except ValueError:
            levels = []
        if not levels or not all(0 < level < math.inf for level in levels):
            raise BadInput(f"--sigma must be positive numbers such as 0.1 or 0.1,1, got {self.sigma!r}")
        if len(levels) == 1:
            return pg.DenoisingScoreMatching(levels[0], relative=True, antithetic=True)
        shares = [0.9] + [0.1 / (len(levels) - 1)] * (len(levels) - 1)
        return pg.DenoisingScoreMatching(sigmas=levels, relative=True, mixture=shares, antithetic=True)


def broad_start(program: Program) -> Any:
    """A distribution to start chains from, for a program whose base is flat; None where its own serves.

    On the real line that of the training data as the energy's network standardises them, else one on the support.
    """
    from pyro_gen.distributions.unnormalized import BaseMeasure, proper
    from pyro_gen.nn import RBM
    from pyro_gen.targets import is_real

    model: Any = program.model
    base = model.base
    if not isinstance(base, BaseMeasure) or base.name is not None or isinstance(model.net, RBM):
        return None
    if not is_real(base.support):
        return proper(base.support, base.loc).to_event(base.loc.dim())
    import pyro.distributions as dist

    mlp = model.net.mlp
    loc, scale = (part[: base.loc.numel()].reshape(base.loc.shape) for part in (mlp.loc, mlp.scale))
    return dist.Normal(loc, 2 * scale).to_event(loc.dim())


def _is_binary(content: Data) -> bool:
    return all(
        bool(((part[0] == 0) | (part[0] == 1)).all()) for part in (content.train, content.validation, content.test)
    )


def _is_plane(program: Program) -> bool:
    """Continuous data of so few numbers that an integral over them is quick."""
    discrete: bool = _target(program).support.is_discrete
    return not discrete and program.event_shape.numel() <= FEW_DIMENSIONS


def _is_small(program: Program) -> bool:
    """Binary data of so few values or hidden units that a sum over them is quick."""
    from pyro_gen.nn import RBM

    if not _target(program).support.is_discrete:
        return False
    net: Any = program.model.net
    units = [program.event_shape.numel(), *([net.weight.shape[1]] if isinstance(net, RBM) else [])]
    return min(units) <= FEW_UNITS


def _target(program: Any) -> Any:
    shape = program.context_shape
    return program.target(None if shape is None else program.template().new_zeros(shape))
