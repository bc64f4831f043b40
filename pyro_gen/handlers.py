r"""What can be asked of any Pyro program: its density row by row, its score, its prior, its structure.

A Pyro program is a joint density written as a sampler. Run under ``poutine.trace`` with its data observed, the sum of
the log-probabilities of its sites is :math:`\log f(x)`; sites inside the plate over rows (the *data plate*) give one
value a row, sites outside belong to all rows at once and are the program's prior. With a guide,
:math:`\log w = \log f(x, z) - \log q(z \mid x)` is the log importance weight on which every bound and estimate of
:math:`\log p(x)` stands.

Conventions: the program is called as ``model(*batch)``, the first tensor of the batch is ``x``, its first dimension
counts the rows. The data plate is the plate named ``"data"``; where a program has none, the one plate that every
observed site shares and that is as long as ``x``. Masks (``poutine.mask``) are applied, scales (``poutine.scale``,
subsampling plates) are not: a row's log-density does not depend on how many other rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.util import check_site_shape
from torch import Tensor

__all__ = [
    "Structure",
    "Unobserve",
    "log_density",
    "log_prior",
    "log_weight",
    "pair_traces",
    "row_log_prob",
    "score",
    "site_kind",
    "structure",
]

PARTICLE_PLATE = "_particles"
Site = Any  # a node of a Pyro trace: a mapping with keys name, fn, value, mask, scale, infer, …
SiteKind = Literal["subsample", "deterministic", "factor", "auxiliary", "observed", "latent"]


def site_kind(site: Site) -> SiteKind:
    """Tell what a sample site of a trace is: latent, observed, factor, deterministic, auxiliary or subsample.

    Args:
        site: a node of type ``"sample"``. Take the trace of the program as it stands: under ``poutine.condition`` a
            latent site counts as observed.
    """
    fn, infer = site["fn"], site["infer"] or {}
    if type(fn).__name__ == "_Subsample":
        return "subsample"
    if infer.get("_deterministic"):
        return "deterministic"
    masked_out = getattr(fn, "_mask", None) is False
    fn = innermost(fn)
    if (
        site["is_observed"] and masked_out and isinstance(fn, dist.Delta)
    ):  # what `poutine.reparam` puts in a site's place
        return "deterministic"
    if isinstance(fn, dist.Unit):  # before auxiliary: pyro.factor marks its site auxiliary
        return "factor"
    if infer.get("is_auxiliary"):
        return "auxiliary"
    return "observed" if site["is_observed"] else "latent"


def innermost(fn: Any) -> Any:
    """A distribution without the masks, events and plates put around it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace by name, without the index sites of subsampling plates."""
    return without_subsampling({n: s for n, s in trace.nodes.items() if s["type"] == "sample"})


def without_subsampling(sites: dict[str, Site]) -> dict[str, Site]:
    """Sites but for the index sites of subsampling plates."""
    return {name: site for name, site in sites.items() if type(site["fn"]).__name__ != "_Subsample"}


@dataclass(frozen=True)
class Structure:
    """What one plain run of a model/guide pair shows; it holds for later runs of a program of static structure.

    Attributes:
        rows: number of rows of the first tensor of the batch.
        data_plate: name of the plate over rows, or None where the program has none.
        data_dim: its batch dimension (negative), or None.
        data_size: the full size of the data plate (more than its rows where it subsamples), or None.
        plate_nesting: the number of batch dimensions that plates use.
        model_latents: latent sites of the model.
        guide_latents: sample sites of the guide that are not auxiliary.
        global_sites: latent sites of the model and sites of the guide that stand outside the data plate.
        enumerated: names of the sites that ask for enumeration (``infer={"enumerate": "parallel"}``).
        reparameterized: True if every guide site is drawn by the reparameterization trick.
        drawn_stepwise: guide sites whose draws are made feature by feature.
    """

    rows: int
    data_plate: str | None
    data_dim: int | None
    data_size: int | None
    plate_nesting: int
    model_latents: tuple[str, ...]
    guide_latents: tuple[str, ...]
    global_sites: tuple[str, ...]
    enumerated: tuple[str, ...]
    reparameterized: bool
    drawn_stepwise: tuple[str, ...] = ()

    def require_data_plate(self, purpose: str) -> str:
        """The data plate's name; a ``ValueError`` that names ``purpose`` where there is none."""
        if self.data_plate is None:
            raise ValueError(
                f"{purpose} needs one value a row, and this program has no plate over its {self.rows} rows: "
                'put the sites of a row inside `with pyro.plate("data", x.shape[0]):`'
            )
        return self.data_plate


def _frames(site: Site) -> dict[str, Any]:
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized}


def find_data_plate(sites: Iterable[Site], rows: int) -> Any | None:
    """The frame of the plate over rows: the one named ``"data"``, else the one plate that all observed sites share."""
    sites = list(sites)
    for site in sites:
        frame = _frames(site).get("data")
        if frame is not None:
            return frame
    observed = [_frames(s) for s in sites if site_kind(s) in ("observed", "factor")]
    if not observed:
        return None
    shared = [f for name, f in observed[0].items() if all(name in other for other in observed)]
    shared = [f for f in shared if f.name != PARTICLE_PLATE and rows in (f.size, f.full_size)]
    return shared[0] if len(shared) == 1 else None


def count_rows(batch: tuple[Any, ...], default: int | None = None) -> int:
    """The number of rows of a batch: the length of its first tensor, or ``default`` where there is none."""
    for part in batch:
        if isinstance(part, Tensor) and part.dim():
            return part.shape[0]
    if default is not None:
        return default
    raise ValueError("a batch needs x, a tensor with at least one dimension, as its first entry")


def structure(
    model: Callable[..., Any], guide: Callable[..., Any] | None, *batch: Any, **kwargs: Any
) -> tuple[Structure, list[Tensor]]:
    """Run a pair once, plainly, and report its structure and the unconstrained tensors behind its param sites."""
    with poutine.trace(param_only=True) as params:
        guide_trace, model_trace = pair_traces(model, guide, *batch, **kwargs)
    q, p = sample_sites(guide_trace), sample_sites(model_trace)
    if is_validation_enabled():  # says which site's shape does not fit its plates
        for site in (*q.values(), *p.values()):
            if site_kind(site) != "deterministic":
                site["log_prob"] = site["fn"].log_prob(site["value"])
                check_site_shape(site, cast(int, math.inf))
    rows = count_rows((*batch, *kwargs.values()), 0)  # 0: a script whose data is not passed
    plate = find_data_plate(p.values(), rows)
    dims = [f.dim for s in (*q.values(), *p.values()) for f in _frames(s).values()]
    latents = [n for n, s in p.items() if site_kind(s) == "latent"]
    unobserved = {**{n: p[n] for n in latents}, **q}
    outside = [n for n, s in unobserved.items() if plate is None or plate.name not in _frames(s)]
    result = Structure(
        rows=rows,
        data_plate=None if plate is None else plate.name,
        data_dim=None if plate is None else plate.dim,
        data_size=None if plate is None else plate.full_size,
        plate_nesting=-min(dims, default=0),
        model_latents=tuple(latents),
        guide_latents=tuple(n for n, s in q.items() if site_kind(s) == "latent"),
        global_sites=tuple(outside),
        enumerated=tuple(n for n, s in {**p, **q}.items() if (s["infer"] or {}).get("enumerate")),
        reparameterized=all(s["fn"].has_rsample for s in q.values() if not s["is_observed"]),
        drawn_stepwise=tuple(n for n, s in q.items() if getattr(innermost(s["fn"]), "stepwise", None) == "rsample"),
    )
    tensors: list[Tensor] = []
    for site in params.trace.nodes.values():
        value: Any = site["value"]
        tensors.append(value.unconstrained() if hasattr(value, "unconstrained") else value)
    return result, tensors


def pair_traces(
    model: Callable[..., Any], guide: Callable[..., Any] | None, *batch: Any, **kwargs: Any
) -> tuple[Trace, Trace]:
    """Trace the guide, then the model replayed on it: ``(guide_trace, model_trace)``."""
    if guide is None:
        return Trace(), poutine.trace(model).get_trace(*batch, **kwargs)
    guide_trace = poutine.trace(guide).get_trace(*batch, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch, **kwargs)
    return guide_trace, model_trace


class _Record(Messenger):
    """Keep the sample sites of a run, and give those already drawn their values: a trace and a replay at less cost."""

    def __init__(self, drawn: dict[str, Site]) -> None:
        super().__init__()
        self.drawn = drawn
        self.sites: dict[str, Site] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and (site := self.drawn.get(msg["name"])) is not None:
            msg["value"], msg["infer"], msg["done"] = site["value"], site["infer"], True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.sites[msg["name"]] = msg.copy()


def pair_sites(
    model: Callable[..., Any], guide: Callable[..., Any], *batch: Any, **kwargs: Any
) -> tuple[dict[str, Site], dict[str, Site]]:
    """The sample sites of the guide, and of the model run on its draws, without those of subsampling plates."""
    with _Record({}) as first:
        guide(*batch, **kwargs)
    with _Record(first.sites) as second:
        model(*batch, **kwargs)
    return without_subsampling(first.sites), without_subsampling(second.sites)


def row_log_prob(site: Site, dims: tuple[int, ...]) -> Tensor:
    """Masked, unscaled log-probability of a site, summed over all batch dimensions except ``dims`` (negative)."""
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    rest = [d for d in range(-log_prob.dim(), 0) if d not in dims]
    return cast(Tensor, log_prob.sum(rest) if rest else log_prob)


def free_latents(names: Iterable[str]) -> ValueError:
    names = ", ".join(repr(n) for n in names)
    return ValueError(
        f"latent site {names} is left free, so the density of a row would be random: integrate it out by a guide "
        "(`pg.Bounded(model, guide, event_shape)`) or fix it by `pyro.poutine.condition`"
    )


def log_density(model: Callable[..., Any], *batch: Any, **kwargs: Any) -> Tensor:
    r"""Log-density of each row, :math:`\log f(x_n)`, from a trace of the program; unnormalised if it has factors.

    Args:
        model: any Pyro program without free latent sites; called as ``model(*batch)``.
        batch: ``x`` of shape ``(rows, ...)`` and what else the program takes.

    Returns:
        Tensor of shape ``(rows,)``, in nats. Sites outside the data plate are left out: see :func:`log_prior`.

    Raises:
        ValueError: if a latent site is left free, or no plate runs over the rows.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)
        >>> log_density(model, torch.zeros(2))
        tensor([-0.9189, -0.9189])
    """
    with poutine.block():
        return density_rows(model, *batch, **kwargs)


def density_rows(model: Callable[..., Any], *batch: Any, **kwargs: Any) -> Tensor:
    """As :func:`log_density`, with its sites visible to the handlers around it."""
    sites = sample_sites(poutine.trace(model).get_trace(*batch, **kwargs))
    free = [n for n, s in sites.items() if site_kind(s) == "latent"]
    if free:
        raise free_latents(free)
    rows = count_rows(batch)
    plate = find_data_plate(sites.values(), rows)
    if plate is None:
        raise ValueError(
            f"log_density needs one value a row, and this program has no plate over its {rows} rows: "
            'put the sites of a row inside `with pyro.plate("data", x.shape[0]):`'
        )
    return row_total(sites, plate.name)


def log_prior(model: Callable[..., Any], *batch: Any, **kwargs: Any) -> Tensor:
    """Log-density of everything outside the data plate (weights with priors, global latents), in nats, a scalar.

    Args:
        model: a Pyro program whose global sites have values (under ``poutine.condition`` or ``substitute``).
        batch: as for :func:`log_density`.
    """
    with poutine.block():
        sites = sample_sites(poutine.trace(model).get_trace(*batch, **kwargs))
    plate = find_data_plate(sites.values(), count_rows(batch))
    outside = [s for s in sites.values() if plate is None or plate.name not in _frames(s)]
    free = [n for n, s in sites.items() if s in outside and site_kind(s) == "latent"]
    if free:
        raise free_latents(free)
    return sum((row_log_prob(s, ()) for s in outside), start=batch[0].new_zeros(()))


def row_total(sites: dict[str, Site], plate: str) -> Tensor:
    """Sum of the rows' log-probabilities over sample sites: ``(rows,)``, or ``(particles, rows)``."""
    total: Tensor | None = None
    for site in sites.values():
        frames = _frames(site)
        if plate not in frames:
            continue
        dims = tuple(frames[name].dim for name in (PARTICLE_PLATE, plate) if name in frames)
        part = row_log_prob(site, dims)
        total = part if total is None else total + part
    if total is None:
        raise ValueError(f"no sample site stands inside the plate {plate!r}")
    return total


def with_particles(particles: int, plate_nesting: int, *programs: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Put programs inside one plate of ``particles`` draws, to the left of the ``plate_nesting`` plates they use."""
    dim = -plate_nesting - 1
    return [pyro.plate(PARTICLE_PLATE, particles, dim=dim)(p) for p in programs]


def log_weight(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    *batch: Any,
    particles: int | None = None,
    shape: Structure | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Log importance weights :math:`\log p(x_n, z_n) - \log q(z_n \mid x_n)` of each row, z drawn from the guide.

    Args:
        model, guide: a Pyro pair called as ``model(*batch)``, ``guide(*batch)``.
        batch: ``x`` of shape ``(rows, ...)`` and what else the pair takes.
        particles: None for one draw; an integer for that many at once, in a plate left of the program's own.
        shape: the pair's :class:`Structure`, where it is known; saves one run.

    Returns:
        Tensor of shape ``(rows,)``, or ``(particles, rows)``, in nats. Its mean over draws is the ELBO of the row, the
        log of the mean weight estimates :math:`\log p(x_n)`.

    Raises:
        ValueError: if no plate runs over the rows, or latents stand outside it (their weight belongs to no one row),
            or the sites of model and guide do not match.
    """
    with poutine.block():
        if shape is None:
            shape, _ = structure(model, guide, *batch, **kwargs)
        check_pair(shape)
        require_local(shape, "log_weight")
        if particles is not None:
            model, guide = with_particles(particles, shape.plate_nesting, model, guide or _no_guide)
        return weigh(*pair_traces(model, guide, *batch, **kwargs), shape)


def weigh(guide_trace: Trace, model_trace: Trace, shape: Structure) -> Tensor:
    """Log weight of each row from a pair of traces: ``(rows,)``, or ``(particles, rows)``."""
    assert shape.data_plate is not None
    weight = row_total(sample_sites(model_trace), shape.data_plate)
    guided = sample_sites(guide_trace)
    return weight - row_total(guided, shape.data_plate) if guided else weight


def require_local(shape: Structure, purpose: str) -> None:
    """Raise a ``ValueError`` unless every latent stands inside a plate over rows, so that rows have weights."""
    plate = shape.require_data_plate(purpose)
    if shape.global_sites:
        raise ValueError(
            f"{purpose} needs one value a row, and site {', '.join(map(repr, shape.global_sites))} stands outside the "
            f"plate {plate!r}: its weight belongs to all rows together. Condition on it, or use an objective of the "
            "whole program (pg.ELBO, pg.IWAE)"
        )


def _no_guide(*batch: Any, **kwargs: Any) -> None:
    return None


def check_pair(shape: Structure, *, summed_out: bool = False) -> None:
    """Raise a ``ValueError`` that names the sites which only one of model and guide has.

    Args:
        shape: of the pair.
        summed_out: True where latents marked for enumeration are summed out, and so may be missing from the guide.
    """
    there = {*shape.guide_latents, *(shape.enumerated if summed_out else ())}
    missing = [n for n in shape.model_latents if n not in there]
    if missing:
        raise ValueError(
            f"latent site {', '.join(map(repr, missing))} of the model is not in the guide: nothing stands in for its "
            "integral. Add it to the guide, or mark it for enumeration (infer={'enumerate': 'parallel'}) under pg.ELBO"
        )
    foreign = [n for n in shape.guide_latents if n not in shape.model_latents]
    if foreign:
        raise ValueError(
            f"guide site {', '.join(map(repr, foreign))} is not a latent site of the model "
            f"(which has {', '.join(map(repr, shape.model_latents)) or 'none'}): rename it, drop it, or mark it "
            "infer={'is_auxiliary': True}"
        )


def score(model: Callable[..., Any], x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    r"""Score :math:`\nabla_x \log f(x)` of each row: the gradient in which Z has dropped out.

    Args:
        model: any Pyro program without free latent sites; called as ``model(x, *rest)``.
        x: data of shape ``(rows, *event_shape)``, floating point.

    Returns:
        Tensor of the shape of ``x``, differentiable once more where gradients are recorded.

    Raises:
        ValueError: as for :func:`log_density`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(x.new_zeros(()), 2.0), obs=x)
        >>> score(model, torch.tensor([4.0])).detach()
        tensor([-1.])
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        (result,) = torch.autograd.grad(log_density(model, y, *rest, **kwargs).sum(), y, create_graph=recorded)
    return result if recorded and result.requires_grad else result.detach()


class Unobserve(Messenger):
    """Draw observed sites anew; factors and deterministics stay what they are.

    ``poutine.uncondition`` also redraws deterministics, with their plates twice over.

    Args:
        names: the sites to draw; None for all that are observed.

    Attributes:
        observed: what the sites held, by name, as the program ran.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self.names = None if names is None else frozenset(names)
        self.observed: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names if self.names is not None else site_kind(msg) == "observed":
            self.observed[msg["name"]] = msg["value"]
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
