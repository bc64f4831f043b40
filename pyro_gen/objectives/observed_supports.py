"""Where a program observes x, and which values x may take there: what losses that draw or change x must know."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gen import handlers, scopes
from pyro_gen.targets import is_real

__all__ = ["entry_support", "observed_among", "observing_site", "outside", "support_of", "within"]


def observing_site(model: Callable[..., Any], *batch: Any, **kwargs: Any) -> handlers.Site | None:
    """The site that observes x, from a plain run that leaves no trace; None where x only enters factors.

    Args:
        model: any Pyro program, called as ``model(*batch)``; x is the first of the batch.

    Raises:
        ValueError: if x is observed at several sites, or several sites are observed and none of them is x itself.
    """
    with torch.no_grad(), scopes.preserved_state(model), poutine.block(), scopes.hide_bare_parameters():
        sites = handlers.sample_sites(poutine.trace(model).get_trace(*batch, **kwargs))
    return observed_among(sites, batch[0])


def observed_among(sites: dict[str, handlers.Site], x: Any) -> handlers.Site | None:
    """The one of a model's sites that observes x; a ``ValueError`` where it is not clear which."""
    observed = {name: s for name, s in sites.items() if handlers.site_kind(s) == "observed"}
    if not observed:
        return None
    found = [s for s in observed.values() if s["value"] is x] or list(observed.values())
    if len(found) != 1:
        raise ValueError(f"the model's data site is not clear among {list(observed)}: observe x itself, at one site")
    return found[0]


def support_of(fn: Any, events: int) -> Any:
    """The support of one datum of so many dimensions under a distribution; the real space where there is None."""
    if fn is None:
        return constraints.independent(constraints.real, events)
    support = handlers.unmasked(fn).support
    missing = events - support.event_dim
    return constraints.independent(support, missing) if missing > 0 else support


def entry_support(support: Any) -> Any:
    """The constraint on one number behind a constraint on many."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def outside(support: Any, x: Tensor) -> Tensor:
    """Which rows of x lie outside a support: ``(rows,)``."""
    inside: Tensor = support.check(x)
    return ~inside.reshape(len(x), -1).all(1)


def within(support: Any, other: Any) -> bool:
    """Whether one support of numbers lies within another; True where either says nothing of its bounds."""
    (low, high), (other_low, other_high) = _bounds(support), _bounds(other)
    if low is None or other_low is None:
        return True
    return not bool((other_low > low).any() or (other_high < high).any())


def _bounds(support: Any) -> tuple[Any, Any]:
    entry = entry_support(support)
    if entry is constraints.boolean:
        return torch.tensor(0.0), torch.tensor(1.0)
    if not (is_real(entry) or hasattr(entry, "lower_bound") or hasattr(entry, "upper_bound")):
        return None, None
    low, high = getattr(entry, "lower_bound", -math.inf), getattr(entry, "upper_bound", math.inf)
    return torch.as_tensor(low), torch.as_tensor(high)
