r"""How far mass has to be moved to make one sample of the other: Wasserstein distances, whole and sliced.

.. math:: W_p^p(x, y) = \min_\pi \sum_{ij} \pi_{ij}\, |x_i - y_j|^p

over plans π that leave each :math:`x_i` with 1/n and bring each :math:`y_j` to 1/m. Of n rows each a best plan is a
permutation, found exactly by an assignment in about :math:`n^3` operations. On a line it is the one that keeps the
order, so with sorted rows and quantile functions

.. math:: W_p^p(x, y) = \int_0^1 |F_x^{-1}(u) - F_y^{-1}(u)|^p\, du,

a sum over the n + m − 1 intervals on which both are constant. The *sliced* distance takes that along directions θ
uniform on the sphere and averages, :math:`SW_p^p = E_\theta W_p^p(\theta \cdot x, \theta \cdot y)`: it is a metric too,
costs n log n a direction, and the sampling floor of :math:`SW_1` falls as :math:`n^{-1/2}` in any dimension, where
that of :math:`W_1` falls as :math:`n^{-1/d}`.

References:
    G. Peyré, M. Cuturi, "Computational optimal transport", 2019, arXiv:1803.00567, sections 2.6 and 10.4.
    N. Bonneel, J. Rabin, G. Peyré, H. Pfister, "Sliced and Radon Wasserstein barycenters of measures", 2015,
    doi:10.1007/s10851-014-0506-3.
    K. Nadjahi et al., "Statistical and topological properties of sliced probability divergences", 2020,
    arXiv:2003.05783 (the floor does not depend on the dimension).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyro_gen.checks import check_count, describe
from pyro_gen.diagnostics.two_samples import (
    CPU,
    Discrepancy,
    check_samples,
    compare_with_relabelled,
    relabellings,
)

__all__ = ["sliced_wasserstein", "wasserstein"]

ASSIGNED = 10_000  # rows whose matrix of costs is still made: 800 MB


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    projections: int = 100,
    order: Literal[1, 2] = 1,
    seed: int = 0,
    *,
    permutations: int = 100,
) -> Discrepancy:
    r"""Wasserstein distance along random directions, beside what relabelled rows give.

    :math:`SW_1 = \frac1P \sum_k W_1(\theta_k \cdot x, \theta_k \cdot y)`, or
    :math:`SW_2 = \big(\frac1P \sum_k W_2^2(\theta_k \cdot x, \theta_k \cdot y)\big)^{1/2}`, in units of x. It costs
    about half a second for 2000 rows each with 100 directions and relabellings.

    Args:
        x, y: ``(rows, *event_shape)``, of any numbers of rows.
        projections: number P of directions; of one feature there is only one.
        order: 1 or 2.
        seed: of directions and relabellings; the same directions for the same seed, so that values compare.
        permutations: relabellings for the floor and the p-value; 0 for none.

    Returns:
        :class:`Discrepancy`; its standard error is that of the directions, and says nothing of the rows.

    Raises:
        TypeError, ValueError: for events of different shapes, fewer than 2 rows, numbers that are not finite.

    References:
        N. Bonneel et al., 2015, doi:10.1007/s10851-014-0506-3.

    Example:
        >>> from pyro_gen import datasets
        >>> truth = datasets.moons()
        >>> print(sliced_wasserstein(truth.sample(500, seed=0), truth.sample(500, seed=1)))
        ≈ 0.02789 ± 0.00039 (floor 0.049 ± 0.016, p = 0.96)
    """
    _check_order(order)
    x, y = check_samples(x, y)
    pooled, features = torch.cat([x, y]), x.shape[1]
    if check_count(projections, "projections") and features > 1:
        generator = torch.Generator(CPU).manual_seed(seed)
        directions = torch.randn(projections, features, dtype=torch.float64, generator=generator, device=CPU)
        pooled = pooled @ (directions / directions.norm(dim=1, keepdim=True)).T
    line = _Lines(pooled, (len(x), len(y)), order)
    labels = relabellings((len(x), len(y)), permutations, seed)
    own = line.costs(labels[0])
    means = torch.stack([own.mean(), *(line.costs(label).mean() for label in labels[1:])])
    values = means ** (1 / order)
    error = None
    if features > 1:
        error = float(own.std()) / math.sqrt(projections) if projections > 1 else math.nan
        error = error / order / float(values[0]) ** (order - 1) if values[0] > 0 else error
    return Discrepancy(
        f"sliced Wasserstein-{order}",
        float(values[0]),
        "exact" if features == 1 else "estimate",
        error,
        (len(x), len(y)),
        **compare_with_relabelled(values, float(values.max())),
    )


def wasserstein(x: Tensor, y: Tensor, order: Literal[1, 2] = 2, *, permutations: int = 0, seed: int = 0) -> Discrepancy:
    r"""Wasserstein distance of two samples, exactly, by a best assignment of their rows.

    :math:`W_p = \big(\min_\pi \frac1n \sum_i |x_i - y_{\pi(i)}|^p\big)^{1/p}`, in units of x. Time grows as
    :math:`n^3` and memory as :math:`n^2`: a fraction of a second for 1000 rows, seconds for 4000. On one feature rows
    are sorted instead. As an estimate of the distance of the distributions it is too large, by about the floor:
    read it beside :func:`sampling_floor`, or give permutations.

    Args:
        x, y: ``(rows, *event_shape)``, of as many rows each (of one feature any numbers).
        order: 1 or 2.
        permutations: relabellings for the floor and the p-value, each an assignment of its own. seed: of them.

    Returns:
        :class:`Discrepancy` of kind ``"exact"``.

    Raises:
        TypeError, ValueError: for events of different shapes, different numbers of rows or more than 10 000, fewer than
            2, numbers that are not finite.

    References:
        D. F. Crouse, "On implementing 2D rectangular assignment algorithms", 2016, doi:10.1109/TAES.2016.140952.

    Example:
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> print(wasserstein(x, x + torch.tensor([3.0, 4.0])))
        = 5
    """
    _check_order(order)
    x, y = check_samples(x, y)
    rows = len(x), len(y)
    labels = relabellings(rows, permutations, seed)
    pooled = torch.cat([x, y])
    if x.shape[1] == 1:
        line = _Lines(pooled, rows, order)
        means = torch.stack([line.costs(label).mean() for label in labels])
    else:
        if rows[0] != rows[1]:
            raise ValueError(
                f"x has {rows[0]} rows and y has {rows[1]}, and an assignment needs as many of each: pass "
                f"x[:{min(rows)}] and y[:{min(rows)}], or take sliced_wasserstein"
            )
        if rows[0] > ASSIGNED:
            raise ValueError(
                f"an assignment of {rows[0]} rows takes {8e-9 * rows[0] ** 2:.1f} GB and time as their cube, and "
                f"{ASSIGNED} is the most that is tried: pass fewer rows, or take sliced_wasserstein"
            )
        means = torch.tensor(
            [_assignment(pooled[label], pooled[~label], order) for label in labels], dtype=torch.float64, device=CPU
        )
    values = means ** (1 / order)
    return Discrepancy(
        f"Wasserstein-{order}",
        float(values[0]),
        "exact",
        None,
        rows,
        **compare_with_relabelled(values, float(values.max())),
    )


def _check_order(order: int) -> None:
    if isinstance(order, bool) or order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {describe(order)}")


def _assignment(x: Tensor, y: Tensor, order: int) -> float:
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").pow_(order).numpy()
    from scipy.optimize import linear_sum_assignment  # slow to import, and few need it

    chosen = linear_sum_assignment(cost)
    return float(cost[chosen].mean())


class _Lines:
    """Pooled values along many lines, sorted once, whatever the labels; in numpy, whose masks are twice as fast."""

    def __init__(self, pooled: Tensor, rows: tuple[int, int], order: int) -> None:
        n, m = rows
        values, places = pooled.T.contiguous().sort(dim=1)  # (lines, rows)
        self.values, self.places, self.order = values.numpy(), places.numpy(), order
        # quantile functions of n and m rows step at i / n and j / m: in units of 1 / nm, in whole numbers
        steps = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
        self.widths = np.diff(steps, prepend=0) / (n * m)
        self.of_x, self.of_y = (steps - 1) // m, (steps - 1) // n  # which row is the quantile in each interval
        self.paired = n == m

    def costs(self, label: Tensor) -> Tensor:
        """W_p^p along each line, of the rows called x to the others: ``(lines,)``."""
        mine = label.numpy().take(self.places)
        x, y = (self.values[chosen].reshape(len(self.values), -1) for chosen in (mine, ~mine))  # still sorted
        apart = np.abs(x - y if self.paired else x[:, self.of_x] - y[:, self.of_y])
        return torch.from_numpy((apart if self.order == 1 else apart * apart) @ self.widths)
