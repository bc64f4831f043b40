r"""What the latents carry: how many are used, and how many nats each.

Averaged over data, the bound pays for its latents :math:`E_x\, KL[q(z \mid x) \,\|\, p(z)]`. A *collapsed* dimension
costs nothing and says nothing: its posterior is the prior whatever x is. Two views tell which they are. The posterior
mean of a used dimension moves with x (Burda et al. 2016): :math:`A_d = \mathrm{Var}_x\, E_{q(z \mid x)}[z_d]`. And its
own share of the price is not zero; for a prior that factorizes,

.. math:: KL[q(z \mid x) \,\|\, p(z)] = \sum_d KL[q(z_d \mid x) \,\|\, p(z_d)]
          + KL\Big[q(z \mid x) \,\Big\|\, \prod_d q(z_d \mid x)\Big],

the last term zero for a diagonal guide. So dimensions are priced by their marginals, and the joint KL is given beside
them: what the sum leaves over is dependence, which belongs to no one dimension.

Everything is read off the traces of model and guide, so it holds for any pair with a latent inside the plate over rows.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from pyro_gen import handlers, scopes
from pyro_gen.base import SIGNS, Bounded, Program
from pyro_gen.checks import check_count, describe

__all__ = ["ActiveUnits", "LatentKL", "active_units", "kl_per_dimension", "posterior_means"]

ROWS = 1024  # at a time


@dataclass(frozen=True, eq=False)
class ActiveUnits:
    """Result of :func:`active_units`.

    Attributes:
        count: number of active dimensions.
        variance: of the posterior mean over rows, of the shape of one latent.
    """

    count: int
    variance: Tensor

    def __str__(self) -> str:
        return f"{self.count} of {self.variance.numel()}"


@dataclass(frozen=True, eq=False)
class LatentKL:
    """Result of :func:`kl_per_dimension`; nats a row, means over rows.

    Attributes:
        value: KL of each dimension's marginal to its prior, of the shape of one latent.
        standard_error: Monte Carlo error of ``value``; zero where it is closed form.
        joint: KL of all dimensions together, a scalar; ``joint - value.sum()`` is what dependence adds.
        joint_error: Monte Carlo error of ``joint``; zero where it is closed form.
        kind: ``"exact"`` if both are closed forms, else ``"estimate"``.
    """

    value: Tensor
    standard_error: Tensor
    joint: Tensor
    joint_error: Tensor
    kind: Literal["exact", "estimate"]

    def __str__(self) -> str:
        each = ", ".join(f"{float(v):.2f}" for v in self.value.flatten())
        return f"{SIGNS[self.kind]} {float(self.joint):.2f} nats a row; by dimension {each}"


def posterior_means(program: Program, x: Tensor, context: Tensor | None = None, *, site: str | None = None) -> Tensor:
    r"""Mean of the guide's latent for each row, :math:`E_{q(z \mid x_n)}[z]`.

    Args:
        program: a `Bounded` program with one latent inside the plate over rows, or several and ``site``.
        x: data of shape ``(rows, *event_shape)``.
        context: ``(rows, *context_shape)``, for a conditional program.
        site: name of the latent, where there are several; given one draw of those it depends on.

    Returns:
        Tensor of shape ``(rows, *latent_shape)``.

    Raises:
        TypeError: for a program without latents, or a guide whose mean is not known.

    Example:
        >>> from pyro_gen import VAE
        >>> vae = VAE(event_shape=3, latent_dim=2)
        >>> posterior_means(vae, vae.sample(5, seed=0)).shape
        torch.Size([5, 2])
    """
    means = []
    for q, _ in latent_distributions(program, x, context, site):
        try:
            means.append(q.mean)
        except NotImplementedError as error:
            raise TypeError(
                f"the guide gives a {type(_inner(q)).__name__}, whose mean has no closed form: active units and latent "
                "plots need one, as a normal guide has"
            ) from error
    return torch.cat(means)


def active_units(
    program: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    threshold: float = 0.01,
    site: str | None = None,
) -> ActiveUnits:
    r"""Number of latent dimensions in use: those whose posterior mean varies over the data by more than a threshold.

    :math:`A_d = \mathrm{Var}_x\, E_{q(z \mid x)}[z_d]`, in squared units of z; the prior's own variance is the scale,
    so the default is meant for priors of unit variance.

    Args:
        program, x, context, site: as for :func:`posterior_means`; x needs at least two rows.
        threshold: variance above which a dimension counts.

    Returns:
        :class:`ActiveUnits`: ``count``, and ``variance`` of each dimension.

    Raises:
        ValueError: for fewer than two rows, or a negative threshold.

    References:
        Y. Burda, R. Grosse, R. Salakhutdinov, "Importance weighted autoencoders", 2016, arXiv:1509.00519, section 5.2.

    Example:
        >>> from pyro_gen import VAE
        >>> vae = VAE(event_shape=3, latent_dim=2)
        >>> vae.guide.network = torch.nn.Linear(3, 4).requires_grad_(False)
        >>> _ = vae.guide.network.weight.zero_()   # an encoder that does not look at x
        >>> active_units(vae, vae.sample(5, seed=0)).count
        0
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
        raise ValueError(f"threshold must be a number of at least 0, got {threshold!r}")
    means = posterior_means(program, x, context, site=site)
    if len(means) < 2:
        raise ValueError("active_units looks at how posterior means vary over x, and one row does not vary: give more")
    variance = means.double().var(0)
    return ActiveUnits(int((variance > threshold).sum()), variance)


def kl_per_dimension(
    program: Program,
    x: Tensor,
    context: Tensor | None = None,
    *,
    num_samples: int = 100,
    seed: int | None = None,
    site: str | None = None,
) -> LatentKL:
    r"""Nats that each latent dimension carries: :math:`\frac1N \sum_n KL[q(z_d \mid x_n) \,\|\, p(z_d)]`.

    Closed form for pairs of marginals that have one (a normal guide, diagonal or full rank, and a prior of independent
    normals); else Monte Carlo over draws of the guide, with its error. Marginals are known for independent
    dimensions, multivariate normals, and mixtures of either.

    Args:
        program, x, context, site: as for :func:`posterior_means`.
        num_samples: draws a row, where there is no closed form.
        seed: makes those repeatable and leaves the global generators as they were.

    Returns:
        :class:`LatentKL`: ``value`` for each dimension, ``joint`` for all together, and their errors.

    Raises:
        TypeError: for a guide or a prior whose marginals are not known.

    Example:
        >>> from pyro_gen import VAE
        >>> vae = VAE(event_shape=3, latent_dim=2)
        >>> kl = kl_per_dimension(vae, vae.sample(5, seed=0))
        >>> kl.kind, kl.value.shape, torch.allclose(kl.value.sum(), kl.joint)   # a diagonal guide: no dependence
        ('exact', torch.Size([2]), True)
    """
    check_count(num_samples, "num_samples")
    each, joint, rows = _Mean(num_samples), _Mean(num_samples), 0
    with torch.no_grad(), scopes.forked_generators(seed) if seed is not None else nullcontext():
        for q, p in latent_distributions(program, x, context, site):
            rows += q.batch_shape[0]
            each.add(_marginals(q, "guide"), _marginals(p, "prior"))
            joint.add(q, _as_multivariate(p) if isinstance(_inner(q), MultivariateNormal) else p)
    value, error = each.result(rows)
    total, total_error = joint.result(rows)
    return LatentKL(value, error, total, total_error, "exact" if each.exact and joint.exact else "estimate")


class _Mean:
    """Adds up KL divergences over rows, in closed form or along the same number of draws for every row."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.exact = num_samples, True
        self.sums: list[Tensor] = []

    def add(self, q: Distribution, p: Distribution) -> None:
        try:
            self.sums.append(kl_divergence(q, p).double().sum(0, keepdim=True))
        except NotImplementedError:
            self.exact = False
            z = q.sample(torch.Size((self.num_samples,)))
            self.sums.append((q.log_prob(z) - p.log_prob(z)).double().sum(1))

    def result(self, rows: int) -> tuple[Tensor, Tensor]:
        draws = torch.stack(self.sums).sum(0) / rows  # (1 or num_samples, ...)
        if self.exact:
            return draws[0], torch.zeros_like(draws[0])
        return draws.mean(0), draws.std(0) / math.sqrt(len(draws))


def latent_distributions(
    program: Program, x: Tensor, context: Tensor | None, site: str | None
) -> list[tuple[Any, Any]]:
    """The guide's and the model's distribution of the latent, for ``ROWS`` rows at a time; leaves no trace."""
    if not isinstance(program, Bounded):
        raise TypeError(f"latents are looked at through a guide, and {describe(program)} has none: it is not Bounded")
    batch = program.check(x, context)
    parts = [tuple(part[start : start + ROWS] for part in batch) for start in range(0, len(x), ROWS)]
    pair = program.model, program.guide
    with torch.no_grad(), poutine.block(), scopes.evaluation_mode(program), scopes.preserved_state(*pair):
        shape, _ = handlers.structure(*pair, *parts[0])
        name = _choose(shape, site, describe(program))
        found = []
        for rows in parts:
            guided, modelled = (
                handlers.sample_sites(trace)[name]["fn"] for trace in handlers.pair_traces(*pair, *rows)
            )
            found.append((guided, modelled))
        return found


def _choose(shape: handlers.Structure, site: str | None, program: str) -> str:
    local = [name for name in shape.guide_latents if name not in shape.global_sites and name in shape.model_latents]
    if shape.data_plate is None or shape.data_dim != -1 or not local:
        raise TypeError(f"{program} has no latent inside a plate over its rows, so no row has a posterior of its own")
    if site is None and len(local) == 1:
        return local[0]
    if site not in local:
        given = "" if site is None else f", got {site!r}"
        raise ValueError(f"site must name one of the latents {', '.join(map(repr, local))}{given}")
    return site


def _inner(d: Any) -> Any:
    while isinstance(d, Independent):
        d = d.base_dist
    return d


def _marginals(d: Any, role: str) -> Any:
    """The distribution of every single dimension: of batch shape (rows, ...), one latent's shape behind the rows."""
    if isinstance(d, MixtureSameFamily):
        parts = _marginals(d.component_distribution, role)
        if not isinstance(parts, Normal):
            raise _unknown_marginals(d, role)
        last = d.event_shape.numel() and len(d.event_shape)
        components = parts.batch_shape[d.mixture_distribution.logits.dim() - 1]
        loc, scale = (t.movedim(-1 - last, -1) for t in (parts.loc, parts.scale))
        logits = d.mixture_distribution.logits.reshape(*d.batch_shape, *[1] * last, components)
        return MixtureSameFamily(Categorical(logits=logits.expand(loc.shape)), Normal(loc, scale))
    base = _inner(d)
    if isinstance(base, (MultivariateNormal, LowRankMultivariateNormal)):
        return Normal(base.mean, base.variance.sqrt())
    if base.event_shape:
        raise _unknown_marginals(d, role)
    return base


def _unknown_marginals(d: Any, role: str) -> TypeError:
    return TypeError(
        f"the {role} is a {type(_inner(d)).__name__}, whose single dimensions have no density that is known; "
        "known are independent dimensions, multivariate normals and mixtures of normals"
    )


def _as_multivariate(d: Any) -> Any:
    """Independent normals as one multivariate normal, whose KL from another is a closed form; others as they are."""
    base = _inner(d)
    if isinstance(base, Normal) and len(d.event_shape) == 1:
        return MultivariateNormal(base.loc, scale_tril=torch.diag_embed(base.scale))
    return d
