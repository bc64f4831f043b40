r"""Weights that make score matching right on a bounded support: h(x), zero at its boundary.

The integration by parts behind score matching leaves the boundary term :math:`p_d(x)\, s(x)`, which does not vanish
where the data have mass up to an edge. With :math:`\tfrac12 \sum_i h_i(x_i) (s_i - \partial_i \log p_d)^2` as what is
minimised the boundary term is :math:`h_i p_d s_i`, and

.. math:: J_h = E \sum_i \big[\tfrac12 h_i s_i^2 + h_i\, \partial_i s_i + h_i'\, s_i\big] + \mathrm{const}

(Hyvärinen 2007 has :math:`h = x^2` for positive data; Yu, Drton & Shojaie 2019 general h). Near an edge at distance t a
density that goes as :math:`t^{a-1}` has a score of order 1/t, so h of order t is right for a > 1 (or a score that stays
finite), of order t² for every a > 0. The weights chosen here are of order t²: :math:`t^2` for a half-line, and
:math:`(t_1 t_2 / (t_1 + t_2))^2` for an interval, a smooth form of the distance to the nearer edge, squared. A user who
knows that the score stays finite at the edge gets a smaller variance from h of order t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from pyro_gen.objectives.data_sites import DataSite

__all__ = ["Edges", "edges_of", "is_bounded", "quadratic", "weight_and_slope"]

Weight = Callable[[Tensor], Tensor]
UNBOUNDED = (type(constraints.real), type(constraints.real_vector))


class Edges(NamedTuple):
    """The ends of the support of each number of a datum; None where there is none, a number where all share it."""

    low: float | Tensor | None
    high: float | Tensor | None


def is_bounded(site: DataSite) -> bool:
    """Whether the support of a data site has an edge."""
    return site.support is not None and not isinstance(site.support, UNBOUNDED)


def edges_of(site: DataSite, x: Tensor) -> Edges:
    """The edges of a bounded support.

    Raises:
        ValueError: for a support that is no product of half-lines and intervals, or another one for each row.
    """
    support = site.support
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is None and high is None:
        raise ValueError(
            f"weight='auto' knows half-lines and intervals, and site {site.name!r} has support {support}: map x to a "
            "real space first, or give weight= a function that vanishes at the boundary"
        )
    return Edges(_edge(low, site, x), _edge(high, site, x))


def _edge(edge: Any, site: DataSite, x: Tensor) -> float | Tensor | None:
    if edge is None or not isinstance(edge, Tensor):
        return None if edge is None else float(edge)
    if x.is_meta:
        return edge.detach() if edge.dim() else None
    edge = edge.detach()
    if bool((edge == edge.reshape(-1)[0]).all()):
        return float(edge.reshape(-1)[0])
    assert site.value is not None
    full = edge.expand(site.value.shape).reshape(x.shape)
    if not bool((full == full[:1]).all()):
        raise ValueError(
            f"the support of site {site.name!r} is another one for each row: give weight= a function of x that "
            "vanishes at its boundary"
        )
    first: Tensor = full[0].clone()
    return first


def quadratic(edges: Edges) -> Weight:
    """The weight of a support with these edges: of order t² at distance t from an edge."""

    def weight(x: Tensor) -> Tensor:
        distances = [(x - (e.to(x) if isinstance(e, Tensor) else e)).abs() for e in edges if e is not None]
        one, two = distances[0], distances[-1]
        return torch.square(one if len(distances) == 1 else one * two / (one + two))

    return weight


def weight_and_slope(weight: Weight, x: Tensor) -> tuple[Tensor, Tensor]:
    """h and ∂h_i/∂x_i at x, both of x's shape and without a graph, in eager code and under ``torch.func``."""

    def total(y: Tensor) -> tuple[Tensor, Tensor]:
        h = weight(y)
        return h.sum(), h

    slope, h = torch.func.grad(total, has_aux=True)(x.detach())
    return h.detach(), slope.detach()


def check_weight(weight: Weight, x: Tensor) -> None:
    """Raise a ``ValueError`` unless h has x's shape, is finite and not negative, and acts on each number by itself."""
    h = weight(x)
    if not isinstance(h, Tensor) or h.shape != x.shape:
        given = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"weight(x) must have the shape of x, {tuple(x.shape)}, one weight a number; got {given}")
    if x.is_meta or not is_validation_enabled():
        return
    if not bool((torch.isfinite(h) & (h >= 0)).all()):
        raise ValueError("weight(x) must be finite and not negative at all data")
    flat = x.reshape(len(x), -1)
    if flat.shape[1] > 1 and len(x) > 1:
        moved = flat.clone()
        moved[:, 0] = flat[:, 0].roll(1)
        again = weight(moved.reshape(x.shape)).reshape(flat.shape)
        if not torch.equal(again[:, 1:], h.reshape(flat.shape)[:, 1:]):
            raise ValueError(
                "weight(x) must act on each number of x by itself, h_i(x_i): the loss has no mixed derivatives of h"
            )
