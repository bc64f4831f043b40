"""Densities of a Pyro program row by row: log f(x), the prior beside it, and log importance weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.poutine as poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_gen.handlers.sites import (
    PARTICLE_PLATE,
    Site,
    count_rows,
    find_data_plate,
    free_latents,
    plates_of,
    sample_sites,
    site_kind,
)
from pyro_gen.handlers.structure import Structure, check_pair, pair_traces, require_local, structure

__all__ = [
    "log_prior",
    "log_weight",
    "row_log_prob",
    "row_total",
    "weigh",
    "with_particles",
]


def row_log_prob(site: Site, dims: tuple[int, ...]) -> Tensor:
    """Masked, unscaled log-probability of a site, summed over all batch dimensions except ``dims`` (negative)."""
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    rest = [d for d in range(-log_prob.dim(), 0) if d not in dims]
    return cast(Tensor, log_prob.sum(rest) if rest else log_prob)


def log_prior(model: Callable[..., Any], *batch: Any, **kwargs: Any) -> Tensor:
    """Log-density of everything outside the data plate (weights with priors, global latents), in nats, a scalar.

    Args:
        model: a Pyro program whose global sites have values (under ``poutine.condition`` or ``substitute``).
        batch: as for :func:`log_density`.
    """
    with poutine.block():
        sites = sample_sites(poutine.trace(model).get_trace(*batch, **kwargs))
    plate = find_data_plate(sites.values(), count_rows(batch))
    outside = [s for s in sites.values() if plate is None or plate.name not in plates_of(s)]
    free = [n for n, s in sites.items() if s in outside and site_kind(s) == "latent"]
    if free:
        raise free_latents(free)
    return sum((row_log_prob(s, ()) for s in outside), start=batch[0].new_zeros(()))


def row_total(sites: dict[str, Site], plate: str) -> Tensor:
    """Sum of the rows' log-probabilities over sample sites: ``(rows,)``, or ``(particles, rows)``."""
    total: Tensor | None = None
    for site in sites.values():
        frames = plates_of(site)
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


def _no_guide(*batch: Any, **kwargs: Any) -> None:
    return None
