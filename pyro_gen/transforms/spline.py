r"""Rational-quadratic splines, elementwise: monotone, smooth, and inverted in closed form.

On :math:`[-B, B]` lie K bins with knots :math:`(X_k, Y_k)` and slopes :math:`\delta_k > 0`. In the bin that holds x, of
width W, height H and mean slope :math:`s = H/W`, with :math:`z = (x - X_k)/W` and :math:`w = (X_{k+1} - x)/W = 1 - z`,

.. math:: y = Y_k + H\,\frac{s z^2 + \delta_k z w}{D}, \quad
          \frac{dy}{dx} = s^2\,\frac{\delta_{k+1} z^2 + 2 s z w + \delta_k w^2}{D^2}, \quad
          D = s z^2 + (\delta_k + \delta_{k+1}) z w + s w^2.

With :math:`t = y - Y_k` and :math:`u = Y_{k+1} - y` the ratio :math:`r = z/w` solves :math:`s u r^2 + b r - s t = 0`,
:math:`b = \delta_k u - \delta_{k+1} t`, whose discriminant :math:`b^2 + 4 s^2 t u` is positive: it is the published
inverse in variables in which every sum has terms of one sign, so no digit cancels and there is nothing to assert.
Outside the box the map is the identity (linear tails, end slopes 1), or there is no outside (angles, end slopes equal).

The input is clamped to the box *before* the arithmetic and the tails are put in after it: a ``where`` alone would pass
the infinite derivative of the branch not taken, times zero, on as NaN. The bin is found by comparing with the inner
knots and counting: no index can leave the table. Raw parameters are softly bounded, :math:`r/(1 + |r|/L)`: what an
inverse loses is the rounding of y over the slope, and without the bound a slope of 1e-5 is a matter of luck. Slopes
are exponentials, not a softplus: maps of narrow modes are steep, and what is steep one way is flat the other way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gen.checks import check_count, describe
from pyro_gen.transforms.elementwise import ElementwiseMap

__all__ = ["CircularSpline", "Spline"]

LOGIT_BOUND = 3.45  # of widths and heights: two bins differ by at most e^6.9, a thousandfold
SLOPE_BOUND = 6.9  # of log slopes: slopes at knots lie between a thousandth and a thousand


def _bounded(raw: Tensor, bound: float) -> Tensor:
    """raw near 0, within ± bound far from it."""
    return raw / (1 + raw.abs() / bound)


class _Box:
    """The bin of each number and the six values that the spline has there."""

    def __init__(self, v: Tensor, params: Tensor, bins: int, bound: float, *, circular: bool, on_y: bool) -> None:
        batch = torch.broadcast_shapes(v.shape, params.shape[:-1])
        params, v = params.expand(*batch, params.shape[-1]), v.expand(batch).unsqueeze(-1)
        shares, slopes = params[..., : 2 * bins].unflatten(-1, (2, bins)), params[..., 2 * bins :]
        inner = self._inner_knots(shares, bound)
        with torch.no_grad():
            k = (inner[..., int(on_y), :] <= v).sum(-1, keepdim=True)
            pair = torch.cat([k - 1, k], -1)
            at = pair.clamp(0, bins - 2)
            first, last = (k == 0).squeeze(-1), (k == bins - 1).squeeze(-1)
        ends = inner.gather(-1, at.unsqueeze(-2).expand(*batch, 2, 2))
        self.left, self.bottom = ends[..., 0].masked_fill(first.unsqueeze(-1), -bound).unbind(-1)
        self.right, self.top = ends[..., 1].masked_fill(last.unsqueeze(-1), bound).unbind(-1)
        slopes = slopes.gather(-1, (pair + 1) % bins if circular else at)
        slopes = _bounded(slopes, SLOPE_BOUND).exp()
        self.slope, self.next_slope = slopes.unbind(-1)
        if not circular:
            self.slope, self.next_slope = self.slope.masked_fill(first, 1.0), self.next_slope.masked_fill(last, 1.0)
        self.width, self.height = self.right - self.left, self.top - self.bottom
        self.mean = self.height / self.width

    @staticmethod
    def _inner_knots(raw: Tensor, bound: float) -> Tensor:
        """All knots but the first and the last, by a softmax: bounded raw numbers need no largest one taken off."""
        sums = _bounded(raw, LOGIT_BOUND).exp().cumsum(-1)
        return sums[..., :-1] * (2 * bound / sums[..., -1:]) - bound

    def _at(self, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """(y - bottom) / height and log dy/dx at the place z = 1 - w of the bin; sums of positive terms throughout."""
        zz, zw, ww = z * z, z * w, w * w
        whole = (self.slope + self.next_slope) * zw + self.mean * (zz + ww)
        share = (self.mean * zz + self.slope * zw) / whole
        ratio = self.mean / whole
        return share, ((self.next_slope * zz + 2 * self.mean * zw + self.slope * ww) * ratio * ratio).log()

    def up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share, ladj = self._at((x - self.left) / self.width, (self.right - x) / self.width)
        return self.bottom + self.height * share, ladj

    def down(self, y: Tensor) -> tuple[Tensor, Tensor]:
        t, u = y - self.bottom, self.top - y
        b = self.slope * u - self.next_slope * t
        under, over = 2 * self.mean * t, 2 * self.mean * u
        size = b.abs() + (b * b + under * over).sqrt()
        rising = b >= 0
        first, second = torch.where(rising, under, size), torch.where(rising, size, over)
        both = first + second
        z = first / both
        _, ladj = self._at(z, second / both)
        return self.left + self.width * z, -ladj


class Spline(ElementwiseMap):
    r"""Monotone rational-quadratic spline on [−B, B], the identity outside.

    ``params`` are K widths and K heights before a softmax, and the logarithms of K − 1 inner slopes, softly bounded;
    no bin is a thousandfold wider or higher than another, slopes at knots lie between .001 and 1000.

    Args:
        bins: number K of bins, from 2 to 500.
        bound: half side B of the box.

    References:
        C. Durkan et al., "Neural spline flows", 2019, arXiv:1906.04032, eqs. 4, 5 and 6–8 (the inverse).

    Example:
        >>> from pyro_gen.transforms import Spline
        >>> spline, params = Spline(bins=4), torch.tensor([1.0, -1, 0, 0, 0, 1, 0, -1, 0.5, -0.5, 0])
        >>> y, ladj = spline.forward(torch.tensor(0.3), params)
        >>> spline.inverse(y, params)[0]
        tensor(0.3000)
    """

    def __init__(self, bins: int = 8, bound: float = 5.0) -> None:
        if not 2 <= check_count(bins, "bins") <= 500:
            raise ValueError(f"bins must be from 2 to 500, got {bins}")
        if not 0 < bound < 1e6:
            raise ValueError(f"bound must be positive and below 1e6, got {describe(bound)}")
        self.bins, self.bound = bins, float(bound)
        self.params = 3 * bins - 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        clamped, inside = self._clamp(x)
        y, ladj = _Box(clamped, params, self.bins, self.bound, circular=False, on_y=False).up(clamped)
        return torch.where(inside, y, x), torch.where(inside, ladj, torch.zeros_like(ladj))

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        clamped, inside = self._clamp(y)
        x, ladj = _Box(clamped, params, self.bins, self.bound, circular=False, on_y=True).down(clamped)
        return torch.where(inside, x, y), torch.where(inside, ladj, torch.zeros_like(ladj))

    def _clamp(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return v.clamp(-self.bound, self.bound), v.abs() <= self.bound


class CircularSpline(ElementwiseMap):
    r"""Monotone rational-quadratic spline of angles in [−π, π], followed by a rotation.

    The slope at the two ends is one parameter, so density and derivative are continuous across the cut. ``params`` are
    K widths, K heights, K slopes and the angle of the rotation. Angles outside are wrapped. A network that conditions
    on an angle is shown its cosine and sine.

    Args:
        bins: number K of bins, from 2 to 500.

    References:
        D. J. Rezende et al., "Normalizing flows on tori and spheres", 2020, arXiv:2002.02428, sec. 2.1.2, 2.1.3.
    """

    embedding = 2

    def __init__(self, bins: int = 8) -> None:
        if not 2 <= check_count(bins, "bins") <= 500:
            raise ValueError(f"bins must be from 2 to 500, got {bins}")
        self.bins = bins
        self.params = 3 * bins + 1

    @property
    def support(self) -> Any:
        return constraints.interval(-math.pi, math.pi)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = wrap(x)
        y, ladj = _Box(x, params[..., :-1], self.bins, math.pi, circular=True, on_y=False).up(x)
        return wrap(y + params[..., -1]), ladj

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = wrap(y - params[..., -1])
        return _Box(y, params[..., :-1], self.bins, math.pi, circular=True, on_y=True).down(y)

    def embed(self, x: Tensor) -> Tensor:
        return torch.stack([x.cos(), x.sin()], -1)


def wrap(angle: Tensor) -> Tensor:
    """The angle in [−π, π]; one that is there already is not touched, to the last digit."""
    turns = torch.floor((angle + math.pi) / (2 * math.pi))
    turns = torch.where(angle.abs() <= math.pi, torch.zeros_like(angle), turns).detach()
    return (angle - turns * (2 * math.pi)).clamp(-math.pi, math.pi)
