"""Every program that goes through the contracts: one line a case. A new family adds its lines to `CASES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_gen as pg
from pyro_gen.base import Objective, Program
from pyro_gen.objectives.adversarial import Adversarial
from pyro_gen.objectives.adversarial_bayes import AdversarialELBO
from pyro_gen.programs.gan import GAN

ROWS = 8
Data = Callable[[], Tensor]


# --------------------------------------------------------------------------------------------- programs written by hand
class Decoder(nn.Module):
    """A model as most users write it, here with parameters of its own, a frozen one and a buffer."""

    loc: Tensor

    def __init__(self, features: int = 3, latent: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(latent, 6), nn.Tanh(), nn.Linear(6, features))
        self.log_scale = nn.Parameter(torch.full((features,), -0.5))
        self.fixed = nn.Parameter(torch.full((features,), 0.3), requires_grad=False)
        self.register_buffer("loc", torch.zeros(latent))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z) + self.fixed, self.log_scale.exp()).to_event(1), obs=x)


def noisy_encoder() -> nn.Module:
    """With running statistics, and noise of its own while it trains."""
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.Dropout(0.2), nn.Linear(5, 4))


class Encoder(nn.Module):
    def __init__(self, features: int = 3, latent: int = 2) -> None:
        super().__init__()
        self.net = nn.Linear(features, 2 * latent)

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class PyroDecoder(PyroModule):  # type: ignore[misc, no-any-unimported, unused-ignore]
    def __init__(self, features: int = 3, latent: int = 2) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](latent, features)
        self.scale = PyroParam(torch.full((features,), 0.6), constraint=constraints.positive)
        self.latent = latent

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            one = x.new_ones(self.latent)
            z = pyro.sample("z", dist.Normal(0 * one, one).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.scale).to_event(1), obs=x)


class PyroEncoder(PyroModule):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """Holds an attribute named as one of the decoder's, as happens: stock SVI then trains only one of the two."""

    def __init__(self, features: int = 3, latent: int = 2) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](features, latent)
        self.spread = PyroParam(torch.full((latent,), 0.7), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(self.net(x), self.spread).to_event(1))


def model_with_params(x: Tensor) -> None:
    weight = pyro.param("weight", lambda: torch.linspace(-1, 1, 6).reshape(2, 3))
    scale = pyro.param("scale", lambda: torch.full((3,), 0.6), constraint=constraints.positive)
    with pyro.plate("data", x.shape[0]):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)


def guide_with_params(x: Tensor) -> None:
    weight = pyro.param("encode", lambda: torch.linspace(-0.5, 0.5, 6).reshape(3, 2))
    spread = pyro.param("spread", lambda: torch.full((2,), 0.7), constraint=constraints.positive)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("z", dist.Normal(x @ weight, spread).to_event(1))


class Hierarchy(nn.Module):
    """Latents that belong to all rows at once: a mean and a scale with priors."""

    zero: Tensor

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(features))

    def forward(self, x: Tensor) -> None:
        one = torch.ones_like(self.zero)
        loc = pyro.sample("loc", dist.Normal(self.zero, one).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(self.zero, one / 2).to_event(1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def global_latents() -> Program:
    model = Hierarchy()
    return pg.Bounded(model, AutoNormal(model, init_scale=0.3), event_shape=3)


class LinearGaussian(nn.Module):
    """x = b + W z + ε with z integrated out: N(b, W Wᵀ + σ² I)."""

    def __init__(self, features: int = 3, latent: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, latent))
        self.loc = nn.Parameter(torch.randn(features))
        self.log_scale = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor) -> None:
        noise = (2 * self.log_scale).exp() * torch.ones_like(self.loc)
        with pyro.plate("data", x.shape[0]):
            marginal = dist.LowRankMultivariateNormal(self.loc, self.weight, noise)
            pyro.sample("x", marginal, obs=x)


class Tilted(nn.Module):
    """A normal base times exp(−E), as users write it."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, 1, bias=False))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Normal(x.new_zeros(x.shape[1]), 1.5).to_event(1), obs=x)
            pg.energy("energy", self.net, x)


class Units(nn.Module):
    """Binary hidden units as latents that are summed out, each tied to x by a factor."""

    def __init__(self, features: int = 3, units: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, units))
        self.bias = nn.Parameter(torch.randn(units))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-2):
            pyro.sample("x", dist.Normal(x.new_zeros(1, x.shape[1]), 1.0).to_event(1), obs=x.unsqueeze(1))
            with pyro.plate("units", self.bias.shape[0], dim=-1):
                h = pyro.sample("h", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
                pyro.factor("tie", h * (x @ self.weight + self.bias))


# ----------------------------------------------------------------------------------------------------------------- data
def real(*event: int) -> Data:
    return lambda: torch.randn(ROWS, *event)


def unit(*event: int) -> Data:
    return lambda: torch.rand(ROWS, *event)


def positive(*event: int) -> Data:
    return lambda: torch.rand(ROWS, *event).exp()


def simplex(*event: int) -> Data:
    return lambda: torch.randn(ROWS, *event).softmax(-1)


def binary(*event: int) -> Data:
    return lambda: torch.randint(2, (ROWS, *event)).float()


def levels(count: int, *event: int) -> Data:
    return lambda: torch.randint(count, (ROWS, *event)).float()


# ---------------------------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """A program and data for it.

    Attributes:
        make: builds the program; called under a seed and in one of Pyro's parameter modes.
        x, context: give the data.
        objectives: names in `OBJECTIVES`; None for `USUAL` of its kind.
        store: parameters that live in Pyro's global store: ``"always"`` (``pyro.param``), or ``"in global mode"``
            (``PyroParam``, autoguides). What lives there is not compiled.
        scoreless: its density has no score: the data stand on a discrete support, or on a surface.
        enumerated: it has latents that are summed out, which are not compiled.
    """

    name: str
    make: Callable[[], Program]
    x: Data
    context: Data | None = None
    objectives: tuple[str, ...] | None = None
    store: str = "never"
    scoreless: bool = False
    enumerated: bool = False

    def build(self) -> tuple[Program, tuple[Tensor, ...]]:
        """The program and its batch, the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            program = self.make()
            parts = (self.x, *(() if self.context is None else (self.context,)))
            return program, tuple(part() for part in parts)

    def compiles(self, local: bool) -> bool:
        return not self.enumerated and (self.store == "never" or (self.store == "in global mode" and local))


SMALL: dict[str, Any] = {"latent_dim": 2, "hidden": (6,)}
ALL = ("elbo", "elbo kl", "elbo loop", "elbo at once", "iwae", "iwae loop", "dreg", "dreg loop", "stl")
SHARED = ("elbo", "elbo loop", "iwae loop")  # where latents belong to all rows at once
TINY: dict[str, Any] = {"layers": 2, "hidden": (6,)}
EXACT = ("likelihood", "elbo", "iwae")
GAMES = ("gan", "gan penalties", "gan pairs", "gan kl")
LIKELIHOOD = ("likelihood",)  # the others are the same number
ENERGIES = ("score", "sliced", "differences", "denoising", "denoising levels", "nce", "nce base", "pcd")


def made(event_shape: int, likelihood: str = "bernoulli", **options: Any) -> Program:
    return pg.Autoregressive(event_shape, likelihood, (6,), **options)


def diffused(event_shape: Any, **options: Any) -> Program:
    """A short chain, of data that are standard already: it draws without having been fitted."""
    given = {"timesteps": 4, "hidden": (6,), "standardise": False, "prediction": "v", **options}
    return pg.Diffusion(event_shape, **given)


def straight() -> Program:
    return diffused(3, schedule="rectified", prediction="velocity", timesteps=None)


def guided() -> Program:
    return diffused(3, context_shape=2, unconditional=0.3)


NOISED = ("noise", "noise elbo", "flow matching")
CHAIN = ("elbo", "elbo kl", "elbo at once", "iwae", "dreg")

CASES = [
    Case("vae", lambda: pg.VAE(3, **SMALL), real(3), objectives=ALL),
    Case("vae shared scale", lambda: pg.VAE(3, scale="shared", **SMALL), real(3)),
    Case("vae predicted scale", lambda: pg.VAE(3, scale="predicted", **SMALL), real(3)),
    Case("vae fixed scale", lambda: pg.VAE((2, 2), scale=0.5, **SMALL), real(2, 2)),
    Case("vae bernoulli", lambda: pg.VAE(4, likelihood="bernoulli", **SMALL), binary(4)),
    Case("vae categorical", lambda: pg.VAE(2, likelihood="categorical", levels=5, **SMALL), levels(5, 2)),
    Case("vae logistic", lambda: pg.VAE(2, likelihood="discretized_logistic", levels=5, **SMALL), levels(5, 2)),
    Case("vae mixture prior", lambda: pg.VAE(3, prior="mixture", components=3, **SMALL), real(3)),
    Case("vae given prior", lambda: pg.VAE(3, prior=dist.Laplace(torch.zeros(2), 1.0).to_event(1), **SMALL), real(3)),
    Case("vae full rank", lambda: pg.VAE(3, guide="full_rank", **SMALL), real(3)),
    Case("vae context", lambda: pg.VAE(3, context_shape=2, **SMALL), real(3), real(2)),
    Case("vae conv", lambda: pg.VAE((1, 5, 4), encoder="conv", decoder="conv", latent_dim=2), real(1, 5, 4)),
    Case("vae flow guide", lambda: pg.VAE(3, guide="flow", **SMALL), real(3), objectives=("elbo", "dreg")),
    Case("vae flow prior", lambda: pg.VAE(3, prior="flow", **SMALL), real(3), objectives=("elbo",)),
    Case("vae program prior", lambda: pg.VAE(3, prior=pg.Flow(2, **TINY), **SMALL), real(3), objectives=("elbo",)),
    Case(
        "vae of given networks",
        lambda: pg.VAE(3, latent_dim=2, encoder=noisy_encoder(), decoder=nn.Linear(2, 3)),
        real(3),
    ),
    Case("pair of modules", lambda: pg.Bounded(Decoder(), Encoder(), 3), real(3)),
    Case("pair of PyroModules", lambda: pg.Bounded(PyroDecoder(), PyroEncoder(), 3), real(3), store="in global mode"),
    Case("pair of functions", lambda: pg.Bounded(model_with_params, guide_with_params, 3), real(3), store="always"),
    Case(
        "global latents", global_latents, real(3), objectives=("elbo", "elbo loop", "iwae loop"), store="in global mode"
    ),
    Case("flow", lambda: pg.Flow(3, layers=2, hidden=(6,)), real(3), objectives=EXACT),
    Case("flow of images", lambda: pg.Flow((1, 2, 3), layers=2, hidden=(8,)), real(1, 2, 3), objectives=LIKELIHOOD),
    Case("flow coupling", lambda: pg.Flow(3, "spline_coupling", layers=2, hidden=(6,)), real(3), objectives=LIKELIHOOD),
    Case("flow to sample", lambda: pg.Flow(3, direction="sampling", **TINY), real(3), objectives=LIKELIHOOD),
    Case("flow affine", lambda: pg.Flow(3, "affine_autoregressive", **TINY), real(3), objectives=LIKELIHOOD),
    Case("flow RealNVP", lambda: pg.Flow(3, "affine_coupling", **TINY), real(3), objectives=LIKELIHOOD),
    Case(
        "flow NICE", lambda: pg.Flow(3, "additive_coupling", mixing="rotation", **TINY), real(3), objectives=LIKELIHOOD
    ),
    Case("flow linear", lambda: pg.Flow(3, "linear"), real(3), objectives=LIKELIHOOD),
    Case("flow Sylvester", lambda: pg.Flow(3, "sylvester", layers=2), real(3), objectives=LIKELIHOOD),
    Case("flow BNAF", lambda: pg.Flow(2, "block_autoregressive", **TINY), real(2), objectives=LIKELIHOOD),
    Case("flow context", lambda: pg.Flow(3, context_shape=2, **TINY), real(3), real(2), objectives=EXACT),
    Case("flow Student t", lambda: pg.Flow(3, base="student_t", **TINY), real(3), objectives=LIKELIHOOD),
    Case("flow mixture", lambda: pg.Flow(3, base="mixture", components=2, **TINY), real(3), objectives=LIKELIHOOD),
    Case("flow box", lambda: pg.Flow(3, base="uniform", support=(0, 1), **TINY), unit(3), objectives=LIKELIHOOD),
    Case("flow positive", lambda: pg.Flow(3, support="positive", **TINY), positive(3), objectives=LIKELIHOOD),
    Case(
        "flow simplex", lambda: pg.Flow(3, support="simplex", **TINY), simplex(3), objectives=LIKELIHOOD, scoreless=True
    ),
    Case("flow torus", lambda: pg.Flow(2, "circular_coupling", **TINY), unit(2), objectives=LIKELIHOOD),
    Case("autoregressive", lambda: pg.Autoregressive(4, hidden=(6,)), binary(4), objectives=EXACT, scoreless=True),
    Case(
        "autoregressive levels",
        lambda: made(2, "categorical", levels=5),
        levels(5, 2),
        objectives=LIKELIHOOD,
        scoreless=True,
    ),
    Case(
        "autoregressive bins",
        lambda: made(2, "discretized_logistic", levels=5),
        levels(5, 2),
        objectives=LIKELIHOOD,
        scoreless=True,
    ),
    Case("autoregressive logistics", lambda: made(3, "mixture_of_logistics"), real(3), objectives=LIKELIHOOD),
    Case("autoregressive normal", lambda: made(3, "normal"), real(3), objectives=LIKELIHOOD),
    Case("autoregressive orders", lambda: made(4, orders=3), binary(4), objectives=LIKELIHOOD, scoreless=True),
    Case(
        "autoregressive context",
        lambda: made(3, context_shape=2),
        binary(3),
        real(2),
        objectives=LIKELIHOOD,
        scoreless=True,
    ),
    Case("exact", lambda: pg.Exact(LinearGaussian(), 3), real(3), objectives=EXACT),
    Case("ebm", lambda: pg.EBM(3, hidden=(6,)), real(3), objectives=ENERGIES),
    Case(
        "ebm context",
        lambda: pg.EBM(3, context_shape=2, hidden=(6,)),
        real(3),
        real(2),
        objectives=("score", "denoising"),
    ),
    Case(
        "ebm rbm",
        lambda: pg.EBM(4, "rbm", "bernoulli", hidden=(3,)),
        binary(4),
        objectives=("pseudo", "cd", "pcd"),
        scoreless=True,
    ),
    Case(
        "ebm coins",
        lambda: pg.EBM(4, base="bernoulli", hidden=(6,)),
        binary(4),
        objectives=("pseudo", "ratio", "cd", "pcd"),
        scoreless=True,
    ),
    Case("energy by hand", lambda: pg.Unnormalized(Tilted(), 3), real(3), objectives=("score", "sliced", "nce")),
    Case(
        "energy with units",
        lambda: pg.Unnormalized(Units(), 3),
        real(3),
        objectives=("score", "differences"),
        enumerated=True,
    ),
    Case("diffusion", lambda: diffused(3), real(3), objectives=("elbo", "elbo kl", "elbo at once", *NOISED)),
    Case("diffusion continuous", lambda: diffused(3, timesteps=None), real(3), objectives=("elbo", *NOISED)),
    Case("diffusion straight", straight, real(3), objectives=("flow matching", "flow matching optimal")),
    Case(
        "diffusion exploding",
        lambda: diffused(3, schedule="exploding", prediction="edm"),
        real(3),
        objectives=("noise",),
    ),
    Case("diffusion sites", lambda: diffused(3, form="sites"), real(3), objectives=CHAIN),
    Case("diffusion forward", lambda: diffused(3, form="sites", guide="forward"), real(3), objectives=("elbo",)),
    Case("diffusion learned variance", lambda: diffused(3, variance="learned"), real(3), objectives=("elbo",)),
    Case("diffusion learned schedule", lambda: diffused(3, schedule="learned"), real(3), objectives=("elbo",)),
    Case(
        "diffusion learned continuous",
        lambda: diffused(3, schedule="learned", timesteps=None),
        real(3),
        objectives=("elbo",),
    ),
    Case("diffusion conv", lambda: diffused((1, 4, 4), network="conv"), real(1, 4, 4), objectives=("elbo", "noise")),
    Case("diffusion context", lambda: diffused(3, context_shape=2), real(3), real(2), objectives=("elbo", "noise")),
    Case("diffusion guided", guided, real(3), real(2), objectives=("elbo", "noise")),
]

CASES += [
    Case("gan", lambda: GAN(3, **SMALL), real(3), objectives=GAMES),
    Case("gan of images", lambda: GAN((1, 2, 2), spectral_norm=True, **SMALL), real(1, 2, 2), objectives=("hinge",)),
    Case("gan context", lambda: GAN(3, context_shape=2, **SMALL), real(3), real(2), objectives=GAMES[:2]),
    Case("gan encoder", lambda: GAN(3, encoder="mlp", **SMALL), real(3), objectives=GAMES),
    Case("gan prior", lambda: GAN(3, prior="uniform", **SMALL), real(3), objectives=("gan",)),
    Case(
        "gan of given networks",
        lambda: GAN(3, 2, nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1, bias=False))),
        real(3),
        objectives=GAMES[:2],
    ),
    Case("pair and critic", lambda: pg.Bounded(Decoder(), Encoder(), 3), real(3), objectives=("avb", "avb prior")),
]

OBJECTIVES: dict[str, Objective[Any]] = {
    "elbo": pg.ELBO(),
    "elbo kl": pg.ELBO(analytic_kl=True),
    "elbo loop": pg.ELBO(2),
    "elbo at once": pg.ELBO(3, vectorize_particles=True),
    "iwae": pg.IWAE(3),
    "iwae loop": pg.IWAE(2, vectorize_particles=False),
    "dreg": pg.IWAE(3, gradient="dreg"),
    "dreg loop": pg.IWAE(2, gradient="dreg", vectorize_particles=False),
    "stl": pg.IWAE(3, gradient="stl"),
    "likelihood": pg.MaximumLikelihood(),
    "score": pg.ScoreMatching(),
    "sliced": pg.SlicedScoreMatching(2),
    "differences": pg.FiniteDifferenceScoreMatching(0.2),
    "denoising": pg.DenoisingScoreMatching(0.3),
    "denoising levels": pg.DenoisingScoreMatching(sigmas=(0.1, 1.0), levels=3),
    "noise": pg.DenoisingScoreMatching(),
    "noise elbo": pg.DenoisingScoreMatching(weighting="elbo"),
    "flow matching": pg.FlowMatching(),
    "flow matching optimal": pg.FlowMatching("optimal", block=4),
    "nce": pg.NoiseContrastive(ratio=2),
    "nce base": pg.NoiseContrastive(None),
    "pseudo": pg.PseudoLikelihood(),
    "ratio": pg.RatioMatching(),
    "cd": pg.ContrastiveDivergence(),  # of continuous x all chains may stay where they are: no gradient to check
    "gan": Adversarial(),
    "gan penalties": Adversarial("wasserstein", r1=0.1, r2=0.2, gradient_penalty=5.0),
    "gan pairs": Adversarial("relativistic", r1=0.1, r2=0.1),
    "gan kl": Adversarial("kl"),
    "hinge": Adversarial("hinge"),
    "avb": AdversarialELBO(hidden=(5,)),
    "avb prior": AdversarialELBO("prior", num_particles=3, hidden=(5,)),
    "pcd": pg.ContrastiveDivergence(persistent=True, chains=ROWS, start="base"),
}


def objectives_of(case: Case) -> tuple[str, ...]:
    """Names of the objectives that a case is trained by."""
    return case.objectives or ("elbo", "iwae")
