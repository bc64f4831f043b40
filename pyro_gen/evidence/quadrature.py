r"""log Z by quadrature, to three dimensions: the trapezoidal rule where it converges faster than any power.

For an integrand that is analytic and falls off at both ends, the error of the trapezoidal rule over the real line falls
exponentially in the number of points (Trefethen & Weideman 2014). Any support is brought there: by
``target.unconstrained()`` (whose Jacobian makes the integrand fall off at the ends of intervals), and by

.. math:: y = c + s \sinh u, \qquad dy = s \cosh u \, du ,

which resolves what is near c at the scale s and reaches far tails in few points. Centre c and scale s are weighted
quantiles of the integrand, found together with the box of all u where it is above its largest value less 45 nats: by a
first look at draws of the base, then from grid to grid. Then the number of points a dimension is doubled until log Z
stops changing. The last change, which bounds the error of the grid before the last, is the stated error.

References:
    L. N. Trefethen, J. A. C. Weideman, "The exponentially convergent trapezoidal rule", SIAM Review 56, 2014.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from pyro_gen import scopes
from pyro_gen.base import Evidence, EvidenceKind, Unnormalized
from pyro_gen.checks import check_count, describe
from pyro_gen.evidence.growth import centre_and_scale, check_growth
from pyro_gen.evidence.normalizers import Normalizes, estimating, one_target, rows_at_once
from pyro_gen.targets import Target

__all__ = ["Quadrature"]

DIMENSIONS = 3
NEGLIGIBLE = 45.0  # nats below the largest value: e^-45 is 3e-20
LOOKS = {1: 4097, 2: 257, 3: 65}  # points a dimension, of the grids that find the box
FIRST = {1: 257, 2: 65, 3: 33}  # of the first grid that counts
NEAR, FAR = 10.0, 45.0  # reach in u: sinh(10) is 1e4 scales, sinh(45) 2e19


@dataclass(frozen=True, repr=False)
class Quadrature(Normalizes):
    r"""log Z by the trapezoidal rule after a transform, in one, two or three dimensions; of kind ``"exact"``.

    :math:`\log Z = \log \sum_j h^d f(y(u_j))\, |\partial y / \partial u|_j`, grids refined until nothing changes. The
    ``standard_error`` is the last change plus what rounding does: a numerical error. Where the grids do not agree
    within the tolerance before the points run out (kinks, narrow modes) the kind is ``"estimate"``.

    Args:
        max_points: of the finest grid.
        tolerance: nats; refinement ends when log Z changes by less.
        memory: bytes that the points evaluated at once may take, on the program's device.
        max_contexts: how many distinct contexts ``log_evidence`` may meet; each is an integral of its own.

    Raises:
        ValueError: for counts below 1 or a tolerance that is not positive; when asked, for more than three dimensions,
            discrete data, or an energy that does not grow.

    Example:
        >>> Quadrature(tolerance=1e-8)
        Quadrature(tolerance=1e-08)
    """

    _: KW_ONLY
    max_points: int = 2**22
    tolerance: float = 1e-6
    memory: int = 2**28
    max_contexts: int = 1000

    def __post_init__(self) -> None:
        for name in ("max_points", "memory", "max_contexts"):
            check_count(getattr(self, name), name)
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, (int, float)) or not self.tolerance > 0:
            raise ValueError(f"tolerance must be a positive number of nats, got {describe(self.tolerance)}")

    def log_normalizer(self, program: Unnormalized, context: Tensor | None = None) -> Evidence:
        """log Z of the program; see :func:`pyro_gen.log_normalizer`."""
        with estimating(program):
            target = one_target(program, context)
            if target.support.is_discrete:
                raise ValueError(
                    f"Quadrature integrates continuous data, and the support is discrete ({target.support}): "
                    "pg.Enumeration() sums it"
                )
            d = target.unconstrained().event_shape.numel()
            if d > DIMENSIONS:
                raise ValueError(
                    f"Quadrature takes up to {DIMENSIONS} dimensions, the data have {d}: a grid over them has too many "
                    "points; pg.AnnealedImportanceSampling() estimates log Z"
                )
            check_growth(target, *centre_and_scale(target))
            with scopes.without_validation():
                return self._refined(_Grid(target, self.memory))

    def _refined(self, grid: _Grid) -> Evidence:
        grid.find()
        n, value, change = FIRST[grid.d], math.nan, math.inf
        while n**grid.d <= self.max_points or math.isnan(value):
            before, value = value, grid.integral(n)
            change = abs(value - before) if math.isfinite(before) else math.inf
            if change <= self.tolerance:
                break
            n = 2 * n - 1
        if math.isinf(change):
            raise ValueError(f"max_points={self.max_points} is less than two grids take: at least {n**grid.d}")
        error = change + torch.finfo(grid.target.template.dtype).eps * grid.largest
        kind: EvidenceKind = "exact" if change <= self.tolerance else "estimate"
        tensors = (torch.tensor(number, dtype=torch.float64) for number in (value, error))
        return Evidence(next(tensors), kind, next(tensors), label="log Z")


class _Grid:
    """The integrand in u, the box it lives in, and its sum over grids."""

    def __init__(self, target: Target, memory: int) -> None:
        self.given, self.target = target, target.unconstrained()
        self.d = self.target.event_shape.numel()
        centre, scale = centre_and_scale(self.target)
        self.centre, self.scale = centre.reshape(-1).double(), scale.reshape(-1).double()
        self.low = -NEAR * torch.ones(self.d, dtype=torch.float64, device=centre.device)
        self.high = -self.low
        self.largest = 0.0  # |log f| of points that count, for its rounding
        self.rows = rows_at_once(self.values, torch.zeros_like(self.low).unsqueeze(0), memory)

    def values(self, u: Tensor) -> Tensor:
        """Log of the integrand at points u: ``(points, d)`` to ``(points,)``, float64."""
        y = self.centre + self.scale * torch.sinh(u)
        at = y.to(self.given.template).reshape(-1, *self.target.event_shape)
        x = self.given.to_support(at)
        # points that rounding puts on the edge of the support, or beyond the largest number, weigh nothing
        inside = (torch.isfinite(x) & self.given.support.check(x).reshape(-1, *[1] * (x.dim() - 1))).flatten(1).all(1)
        log_f = torch.where(inside, self.target.log_density(at), -math.inf).double()
        if bool((torch.isnan(log_f) | (log_f == math.inf)).any()):
            row = int((torch.isnan(log_f) | (log_f == math.inf)).nonzero()[0])
            raise ValueError(f"log f is {float(log_f[row])} at {y[row].tolist()} (in unconstrained space)")
        return log_f + (self.scale.log() + u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2)).sum(1)

    def chunks(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The points of the grid with n a dimension, and the log integrand there, some at a time."""
        for index in torch.arange(n**self.d, device=self.low.device).split(self.rows):
            at = torch.stack([index // n**i % n for i in range(self.d)], 1)
            u = self.low + (self.high - self.low) * (at / (n - 1))
            yield u, self.values(u)

    def integral(self, n: int) -> float:
        """Log of the trapezoidal sum over the box with n points a dimension."""
        total = torch.full((), -math.inf, dtype=torch.float64, device=self.low.device)
        for _, value in self.chunks(n):
            total = torch.logaddexp(total, torch.logsumexp(value, 0))
        return float(total + ((self.high - self.low) / (n - 1)).log().sum())

    def find(self) -> None:
        """Place the box around all that is not negligible, centre and scale at the middle of the mass."""
        n = LOOKS[self.d]
        for look in range(8):
            parts = list(self.chunks(n))
            u, value = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            top = value.max()
            if not bool(torch.isfinite(top)):
                raise ValueError(
                    "f is zero wherever it was looked at: give the program a base that lies where its mass is"
                )
            u, value = u[value > top - NEGLIGIBLE], value[value > top - NEGLIGIBLE]
            step = (self.high - self.low) / (n - 1)
            low, high = u.amin(0), u.amax(0)
            reached = (low < self.low + 0.5 * step) | (high > self.high - 0.5 * step)
            self.largest = float((value.abs()).max())
            if look and not bool(reached.any()) and bool(((high - low) > 0.5 * (self.high - self.low)).all()):
                return  # the box is tight: nothing at its faces
            if look and bool((reached & (self.high - self.low > 2 * FAR)).any()):
                raise ValueError(
                    "the integrand does not fall off: log f falls too slowly for a finite Z, or the support is wider "
                    "than the program says"
                )
            wider = torch.where(reached, 0.75 * (high - low), 2 * step)
            self._move(u, value, low - wider, high + wider)
        raise ValueError("no box holds the mass of f: its modes are too narrow or too far apart for a grid")

    def _move(self, u: Tensor, value: Tensor, low: Tensor, high: Tensor) -> None:
        """Take centre and scale from the weighted quantiles of each coordinate, and the box in the new u."""
        weight = (value - value.max()).exp()
        y, ends = self._y(u), (self._y(low), self._y(high))
        gap = (self._y(u + (self.high - self.low) / (LOOKS[self.d] - 1)) - y).abs()  # to the next point of the grid
        for i in range(self.d):
            order = y[:, i].argsort()
            below = weight[order].cumsum(0) / weight.sum()
            at = [order[int((below < q).sum().clamp(max=len(order) - 1))] for q in (0.16, 0.5, 0.84)]
            self.centre[i] = y[at[1], i]
            self.scale[i] = torch.maximum((y[at[2], i] - y[at[0], i]) / 2, gap[at[1], i])
        self.low, self.high = (torch.asinh((end - self.centre) / self.scale) for end in ends)

    def _y(self, u: Tensor) -> Tensor:
        return self.centre + self.scale * torch.sinh(u)
