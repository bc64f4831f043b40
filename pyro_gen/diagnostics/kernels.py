r"""Distances that average a kernel over pairs of rows: the maximum mean discrepancy and the energy distance.

For a kernel k, with x, x' from one distribution and y, y' from the other,

.. math:: D = E\,k(x, x') + E\,k(y, y') - 2\, E\,k(x, y).

With a Gaussian kernel D is MMD², the squared distance of the means of features that determine a distribution; with
:math:`k(a, b) = -|a - b|` it is the energy distance, :math:`2 E|x - y| - E|x - x'| - E|y - y'|`. Both are zero only for
equal distributions. The means over pairs of *different* rows,

.. math:: \hat D = \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
                   - \frac{2}{nm} \sum_{ij} k(x_i, y_j),

are a U-statistic, unbiased: under equality it scatters about zero and is negative half of the time. (With the pairs
i = j it would be a V-statistic, never negative, and too large by about :math:`(1/n + 1/m)(k(x, x) - E\,k(x, x'))`.)

Its standard error is the jackknife's: leaving a row out changes sums of the kernel's rows, which are there already. It
is too large on average rather than too small (Efron & Stein 1981): about right for distributions that differ, larger
by :math:`\sqrt 2` where they are equal, and where the relabelled rows say it better. With s the 0-1 labels of the
pooled rows, :math:`s^\top K s` and :math:`s^\top K 1` are all that a labelling needs, so relabelling is one matrix
product.

References:
    A. Gretton, K. Borgwardt, M. Rasch, B. Schölkopf, A. Smola, "A kernel two-sample test", JMLR 13, 2012, eq. 3.
    G. Székely, M. Rizzo, "Energy statistics", 2013, doi:10.1016/j.jspi.2013.03.018, section 2.
    D. Sejdinovic et al., "Equivalence of distance-based and RKHS-based statistics", 2013, arXiv:1207.6076.
    B. Efron, C. Stein, "The jackknife estimate of variance", 1981, doi:10.1214/aos/1176345462.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_gen.checks import describe
from pyro_gen.diagnostics.two_samples import (
    CPU,
    Discrepancy,
    check_samples,
    compare_with_relabelled,
    relabellings,
)

__all__ = ["energy_distance", "mmd"]

BLOCK = 2**22  # numbers of the kernel matrix at a time: 32 MB
MEDIAN_ROWS = 2000  # of the pooled rows whose distances give the bandwidth


def energy_distance(x: Tensor, y: Tensor, *, permutations: int = 100, seed: int = 0) -> Discrepancy:
    r"""Energy distance, unbiased: :math:`2 E|x - y| - E|x - x'| - E|y - y'|`, in units of x.

    Zero on average for equal distributions. Time grows as the square of the number of rows: about a second for 2000
    each.

    Args:
        x, y: ``(rows, *event_shape)``, of any numbers of rows from three.
        permutations: relabellings for the floor and the p-value; 0 for none. seed: of them.

    Returns:
        :class:`Discrepancy`, with the jackknife's standard error.

    Raises:
        TypeError, ValueError: for events of different shapes, fewer than 3 rows, numbers that are not finite.

    References:
        G. Székely, M. Rizzo, "Energy statistics", 2013, doi:10.1016/j.jspi.2013.03.018, section 2.

    Example:
        >>> from pyro_gen import datasets
        >>> truth = datasets.moons()
        >>> print(energy_distance(truth.sample(500, seed=0), truth.sample(500, seed=1)))
        ≈ -0.0035 ± 0.0014 (floor 0.0001 ± 0.0035, p = 0.98)
    """
    x, y = check_samples(x, y, least=3)
    return _discrepancy("energy distance", x, y, lambda squares: -squares.sqrt(), permutations, seed)


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None, permutations: int = 100, *, seed: int = 0) -> Discrepancy:
    r"""Squared maximum mean discrepancy with a Gaussian kernel, :math:`e^{-|a - b|^2 / 2h^2}`, unbiased.

    Zero on average for equal distributions, 2 at most; no units. Time grows as the square of the number of rows: about
    a second for 2000 each.

    Args:
        x, y: ``(rows, *event_shape)``, of any numbers of rows from three.
        bandwidth: h, in units of x; None for the median distance of pooled rows (of a random 2000 of them). Of
            distributions with structure far below the distance of their modes a smaller one sees more.
        permutations: relabellings for the floor and the p-value; 0 for none. seed: of them.

    Returns:
        :class:`Discrepancy` of MMD², with the jackknife's standard error.

    Raises:
        TypeError, ValueError: for events of different shapes, fewer than 3 rows, numbers that are not finite, a
            bandwidth that is not positive, rows more than half of whose distances are zero.

    References:
        A. Gretton et al., JMLR 13, 2012, lemma 6 (the estimate) and section 8 (the median).

    Example:
        >>> from pyro_gen import datasets
        >>> truth = datasets.moons()
        >>> print(mmd(truth.sample(500, seed=0), truth.sample(500, seed=1)))
        ≈ -0.00146 ± 0.00052 (floor 0.0000 ± 0.0015, p = 0.97)
    """
    x, y = check_samples(x, y, least=3)
    if bandwidth is None:
        bandwidth = _median_distance(torch.cat([x, y]), seed)
    elif isinstance(bandwidth, bool) or not 0 < float(bandwidth) < math.inf:
        raise ValueError(f"bandwidth must be a positive number or None, got {describe(bandwidth)}")
    factor = -0.5 / float(bandwidth) ** 2
    return _discrepancy("MMD²", x, y, lambda squares: (factor * squares).exp(), permutations, seed)


def _median_distance(pooled: Tensor, seed: int) -> float:
    if len(pooled) > MEDIAN_ROWS:  # chosen without a look at labels, or relabelling would not be a fair test
        generator = torch.Generator(CPU).manual_seed(seed)
        pooled = pooled[torch.randperm(len(pooled), generator=generator, device=CPU)[:MEDIAN_ROWS]]
    median = float(torch.nn.functional.pdist(pooled).median())
    if median == 0:
        raise ValueError("the median distance of rows is zero, most of them are equal: pass bandwidth=, in units of x")
    return median


def _discrepancy(
    name: str, x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor], permutations: int, seed: int
) -> Discrepancy:
    """The U-statistic of a kernel, given as a function of squared distances."""
    n, m = len(x), len(y)
    pooled = torch.cat([x, y])
    pooled = pooled - pooled.mean(0)  # so that what is the same in all rows rounds nothing away
    labels = relabellings((n, m), permutations, seed).double().T  # (rows, 1 + R)
    norms = pooled.square().sum(1)
    to_x, to_all = torch.empty_like(norms), torch.empty_like(norms)
    inside = torch.zeros(labels.shape[1], dtype=torch.float64, device=CPU)
    inside_all = torch.zeros_like(inside)
    for block in torch.arange(n + m, device=CPU).split(max(1, BLOCK // (n + m))):
        squares = norms[block, None] + norms - 2 * pooled[block] @ pooled.T
        matrix = kernel(squares.clamp_(min=0))
        matrix[torch.arange(len(block), device=CPU), block] = 0  # only pairs of different rows
        towards = matrix @ labels  # (block, 1 + R): sums of the kernel to what is called x
        to_x[block], to_all[block] = towards[:, 0], matrix.sum(1)
        inside += (labels[block] * towards).sum(0)
        inside_all += (labels[block] * to_all[block, None]).sum(0)
    across = inside_all - inside
    rest = to_all.sum() - inside - 2 * across
    values = inside / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * across / (n * m)
    to_y = to_all - to_x
    error = _jackknife(to_x, to_y, n, m)
    scale = float(to_all.abs().mean()) / (n + m - 1)
    return Discrepancy(name, float(values[0]), "estimate", error, (n, m), **compare_with_relabelled(values, scale))


def _jackknife(to_x: Tensor, to_y: Tensor, n: int, m: int) -> float:
    """Standard error from leaving out each row in turn, given each row's sums of the kernel."""
    in_x, in_y, across = to_x[:n].sum(), to_y[n:].sum(), to_y[:n].sum()
    without_x = (in_x - 2 * to_x[:n]) / ((n - 1) * (n - 2)) - 2 * (across - to_y[:n]) / ((n - 1) * m)
    without_y = (in_y - 2 * to_y[n:]) / ((m - 1) * (m - 2)) - 2 * (across - to_x[n:]) / (n * (m - 1))
    variance = without_x.var(unbiased=False) * (n - 1) + without_y.var(unbiased=False) * (m - 1)
    return float(variance.sqrt())
