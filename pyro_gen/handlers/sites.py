"""Sites of a Pyro program: what each is, and which plate runs over the rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

__all__ = [
    "PARTICLE_PLATE",
    "Site",
    "SiteKind",
    "Unobserve",
    "count_rows",
    "find_data_plate",
    "free_latents",
    "innermost",
    "plates_of",
    "sample_sites",
    "site_kind",
    "unmasked",
    "without_subsampling",
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


def unmasked(fn: Any) -> Any:
    """A distribution without the masks around and inside it; other layers stay."""
    if isinstance(fn, dist.MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, dist.Independent):
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The sample sites of a trace by name, without the index sites of subsampling plates."""
    return without_subsampling({n: s for n, s in trace.nodes.items() if s["type"] == "sample"})


def without_subsampling(sites: dict[str, Site]) -> dict[str, Site]:
    """Sites but for the index sites of subsampling plates."""
    return {name: site for name, site in sites.items() if type(site["fn"]).__name__ != "_Subsample"}


def plates_of(site: Site) -> dict[str, Any]:
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized}


def find_data_plate(sites: Iterable[Site], rows: int) -> Any | None:
    """The frame of the plate over rows: the one named ``"data"``, else the one plate that all observed sites share."""
    sites = list(sites)
    for site in sites:
        frame = plates_of(site).get("data")
        if frame is not None:
            return frame
    observed = [plates_of(s) for s in sites if site_kind(s) in ("observed", "factor")]
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


def free_latents(names: Iterable[str]) -> ValueError:
    names = ", ".join(repr(n) for n in names)
    return ValueError(
        f"latent site {names} is left free, so the density of a row would be random: integrate it out by a guide "
        "(`pg.Bounded(model, guide, event_shape)`) or fix it by `pyro.poutine.condition`"
    )


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
