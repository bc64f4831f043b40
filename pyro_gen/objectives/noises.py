"""What noise-contrastive estimation tells data from: densities that are known, can be drawn from, and stand still.

Noise is given as a distribution, as a program of kind `Exact`, as the name of one that is fitted to the data, or not at
all, which takes the base of the program itself. Each is held as a module that follows its loss to another device and
into its checkpoints, is not trained, and does not move when what it was made of is trained on.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_gen import handlers, scopes
from pyro_gen.base import Exact, Program
from pyro_gen.checks import describe
from pyro_gen.distributions.held import Held
from pyro_gen.objectives.observed_supports import observed_among, observing_site, outside, support_of, within

__all__ = [
    "FittedNormal",
    "FrozenBase",
    "FrozenProgram",
    "GivenNoise",
    "Noise",
    "NoiseModule",
    "checked",
    "distribution_of_row",
]

ABSTRACT = [getattr(c, m) for c in (Distribution, dist.TorchDistribution) for m in ("log_prob", "sample", "rsample")]

Noise = Literal["normal", "diagonal"] | Distribution | Exact | None


class NoiseModule(nn.Module):
    """Noise of one datum: draws of it and their density. Subclasses say which distribution it is."""

    def distribution(self) -> Any:
        """The distribution, where the module is; with a batch dimension of 1 where it comes from a run on one row."""
        raise NotImplementedError

    def draw(self, n: int, like: Tensor) -> Tensor:
        """Draws of the shape, dtype and device of data: ``(n, *event_shape)``."""
        drawn: Tensor = self.distribution().sample((n,))
        return drawn.reshape(n, *like.shape[1:]).to(like)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p_n of each row: ``(rows,)``, in nats."""
        fn = self.distribution()
        value: Tensor = fn.log_prob(x.reshape(len(x), *fn.batch_shape[1:], *fn.event_shape))
        return value.reshape(len(x), -1).sum(1)

    def support(self, x: Tensor) -> Any:
        """The constraint on one datum, where it is to be compared with that of the data; None where it always fits."""
        return None

    def check_covers(self, x: Tensor, support: Any) -> None:
        """Refuse data that this noise does not cover: rows, or a part of the support of the data site."""
        covered = self.support(x)
        missed = ~torch.isfinite(self.log_prob(x)) if covered is None else None
        if covered is not None:
            if covered.is_discrete != support.is_discrete or not within(support, covered):
                raise ValueError(
                    f"noise has the support {covered}, smaller than that of the data site, {support}: where noise has "
                    "no mass Z is not learnt. Give noise that covers the data site"
                )
            missed = outside(covered, x)
            if not bool(missed.any()):
                missed = ~torch.isfinite(self.log_prob(x))
        if missed is not None and bool(missed.any()):
            raise ValueError(
                f"noise has no mass at {int(missed.sum())} of {len(missed)} rows of x, first at row "
                f"{int(missed.nonzero()[0])}: there Z is not learnt. Give noise that covers the data"
            )


class FittedNormal(NoiseModule):
    """A normal distribution with mean and covariance of data, over flat rows."""

    loc: Tensor
    factor: Tensor
    fitted: Tensor

    def __init__(self, diagonal: bool) -> None:
        super().__init__()
        self.diagonal = diagonal
        for name in ("loc", "factor"):  # without entries until there are data
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, data: Tensor) -> None:
        """Take mean and covariance of rows, ``(rows, *event_shape)``; a second call changes nothing."""
        if bool(self.fitted):
            return
        x = data.flatten(1)
        loc, double = x.mean(0), x.double()
        if self.diagonal:
            factor = double.std(0, unbiased=False)
            bad = not bool((factor > 0).all())
        else:
            centred = double - double.mean(0)
            factor, info = torch.linalg.cholesky_ex(centred.T @ centred / len(x))
            # below rounding of the data's own dtype a direction has no spread
            least = torch.finfo(x.dtype).eps * double.std(0, unbiased=False)
            bad = bool(info) or not bool((factor.diagonal() > least).all())
        if bad:
            advice = "drop constant features, or give a distribution"
            raise ValueError(
                f"noise={'diagonal' if self.diagonal else 'normal'!r} is fitted to {len(x)} rows of {x.shape[1]} "
                "features, which have no spread in some direction: "
                + (advice if self.diagonal else f"noise='diagonal' leaves out correlations; or {advice}, or more rows")
            )
        self.loc, self.factor = loc, factor.to(x)
        self.fitted.fill_(True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("loc", "factor"):
            saved = state_dict.get(prefix + name)
            if saved is not None and not bool(self.fitted):  # of data that this has not seen
                setattr(self, name, torch.empty_like(saved, device=self.loc.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def distribution(self) -> Any:
        if self.diagonal:
            return dist.Normal(self.loc, self.factor).to_event(1)
        return dist.MultivariateNormal(self.loc, scale_tril=self.factor)

    def log_prob(self, x: Tensor) -> Tensor:
        value: Tensor = self.distribution().log_prob(x.flatten(1))
        return value


class GivenNoise(NoiseModule):
    """A distribution as noise; that of the data site of a function has a batch dimension of 1."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.held = Held(distribution)

    def distribution(self) -> Any:
        return self.held()

    def support(self, x: Tensor) -> Any:
        fn = self.held()
        return None if tuple(fn.batch_shape) else fn.support

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse a distribution whose draws are no rows of x."""
        fn = self.held.distribution
        if tuple(fn.batch_shape) or tuple(fn.event_shape) != shape:
            raise ValueError(
                f"noise must have event shape {shape} and no batch shape, as a row of x; got event "
                f"{tuple(fn.event_shape)}, batch {tuple(fn.batch_shape)}: .to_event({len(shape)}) makes a batch of "
                "scalars one datum"
            )


class FrozenProgram(NoiseModule):
    """A copy of a program of kind `Exact`, so that what trains the program elsewhere leaves the noise as it is."""

    def __init__(self, program: Exact) -> None:
        super().__init__()
        self.program: Any = copy.deepcopy(program).requires_grad_(False).eval()

    def draw(self, n: int, like: Tensor) -> Tensor:
        drawn: Tensor = self.program.sample(n)
        return drawn.to(like)

    def log_prob(self, x: Tensor) -> Tensor:
        value: Tensor = self.program.log_prob(x)
        return value

    def support(self, x: Tensor) -> Any:
        site = observing_site(self.program.model, x[:1])
        return support_of(site and site["fn"], x.dim() - 1)


class FrozenBase(NoiseModule):
    """The distribution at the data site of a frozen copy of a model."""

    row: Tensor

    def __init__(self, model: nn.Module, row: Tensor) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.register_buffer("row", row.detach().clone())

    def distribution(self) -> Any:
        return distribution_of_row(self.model, self.row)


def distribution_of_row(model: Any, row: Tensor, *rest: Any, **kwargs: Any) -> Any:
    """What stands at the data site of a model now, in a run on one row that can be traced."""
    with torch.no_grad(), poutine.block(), scopes.hide_bare_parameters():
        sites = handlers.sample_sites(poutine.trace(model).get_trace(row, *rest, **kwargs))
    site: Any = observed_among(sites, row)
    return handlers.unmasked(site["fn"])


def checked(noise: Any) -> Noise:
    """What a user gave for noise, or an error that says what it can be."""
    if noise is None or noise in ("normal", "diagonal"):
        return noise  # type: ignore[no-any-return]
    if isinstance(noise, Exact):
        if noise.context_shape is not None:
            raise ValueError("noise is a program with a context: give one without, the same noise for all rows")
        if noise.stochastic:
            raise TypeError(f"noise needs its density, and {describe(noise)} has a random estimate of it")
        return noise
    if isinstance(noise, Program):
        raise TypeError(f"noise needs log_prob, so a program of kind Exact such as pg.Flow; {describe(noise)} has none")
    if isinstance(noise, Distribution):
        for method, ways in (("log_prob", ("log_prob",)), ("sample", ("sample", "rsample"))):
            if all(getattr(type(noise), way) in ABSTRACT for way in ways):
                raise TypeError(f"noise needs log_prob and sample, and {type(noise).__name__} has no {method}")
        return noise
    raise TypeError(
        "noise must be 'normal', 'diagonal', a distribution, a program of kind Exact, or None for the program's base; "
        f"got {describe(noise)}"
    )
