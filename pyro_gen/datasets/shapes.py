r"""Toys that are not mixtures: curves and circles with Gaussian noise, twisted arms, a board.

*Gaussian noise.* With :math:`x = c + \sigma\varepsilon`, :math:`\varepsilon \sim N(0, I)` and c spread as
:math:`\pi`,

.. math:: p(x) = \int N(x; c, \sigma^2 I)\, \pi(dc).

For a circle the integral is a Bessel function. For another curve it is a Gauss–Legendre sum over the parameter, in
other words a mixture with the nodes as its means. Along the curve the integrand has the width :math:`\sigma` where x is
near, and :math:`\sigma/\sqrt{1 + D/\rho}` at a distance D from the outside of a bend of radius :math:`\rho`: twelve
nodes to :math:`\sigma` are exact to rounding near the curve, and good to 1e-8 until D is some ten :math:`\rho`, where
:math:`\log p` is in the minus thousands.

*Change of variables.* :math:`p(x) = p_u(f^{-1}(x))\,|\det \partial f^{-1}/\partial x|`. A twist, a rotation by an angle
that depends on the radius alone, turns each circle about the origin in itself: its determinant is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_gen.datasets.densities import CPU, LOG_2PI, PER_SCALE, REACH, GaussianMixture, Toy, require_positive

__all__ = ["Checkerboard", "Curve", "Pinwheel", "Rings"]

ORDER = 32  # nodes of one Gauss–Legendre panel
NODES = 12  # nodes to a standard deviation, along a curve


def _gauss_legendre(start: float, stop: float, panels: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the composite Gauss–Legendre rule on an interval."""
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(ORDER))
    width = (stop - start) / panels
    starts = start + width * torch.arange(panels, dtype=torch.float64)
    return (starts[:, None] + width * (nodes + 1) / 2).flatten(), (weights * width / 2).repeat(panels)


class Curve(Toy):
    r"""Curves with Gaussian noise: :math:`x = c_k(t) + \sigma\varepsilon`, t uniform on [a, b], k uniform.

    .. math:: p(x) = \frac{1}{K} \sum_k \frac{1}{b - a} \int_a^b N(x; c_k(t), \sigma^2 I)\, dt

    Args:
        name: the name it is shown under.
        curves: functions from t (n,) to points (n, 2).
        interval: the ends a and b.
        speed: a bound on :math:`|dc_k/dt|`, which fixes the number of nodes.
        scale: the standard deviation :math:`\sigma` of the noise.
    """

    def __init__(
        self,
        name: str,
        curves: Sequence[Callable[[Tensor], Tensor]],
        interval: tuple[float, float],
        speed: float,
        scale: float,
    ) -> None:
        require_positive(scale=scale)
        super().__init__(name, {"scale": scale})
        self.scale = scale
        self._curves, self._interval = tuple(curves), interval
        panels = math.ceil(speed * (interval[1] - interval[0]) * NODES / (scale * ORDER))
        with CPU:
            nodes, weights = _gauss_legendre(*interval, panels)
            means = torch.cat([curve(nodes) for curve in self._curves])
            self._quadrature = GaussianMixture(means, scale, weights.repeat(len(self._curves)))

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        start, stop = self._interval
        t = start + (stop - start) * torch.rand(n, dtype=torch.float64, generator=generator)
        which = torch.randint(len(self._curves), (n,), generator=generator)
        points = torch.stack([curve(t) for curve in self._curves])[which, torch.arange(n)]
        return points + self.scale * torch.randn(n, 2, dtype=torch.float64, generator=generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        return self._quadrature._log_prob(x)

    def _entropy(self) -> float:
        return self._quadrature._entropy()


class Rings(Toy):
    r"""Circles with Gaussian noise: :math:`x = R_j (\cos t, \sin t) + \sigma\varepsilon`, t and j uniform.

    The angle integrates to a Bessel function; with :math:`r = |x|`,

    .. math:: p(x) = \frac1J \sum_j \frac{1}{2\pi\sigma^2} e^{-(r^2 + R_j^2)/2\sigma^2} I_0(r R_j/\sigma^2).

    Args:
        name: the name it is shown under.
        radii: the radii :math:`R_j`.
        scale: the standard deviation :math:`\sigma` of the noise.
        settings: what its ``repr`` shows.
    """

    def __init__(self, name: str, radii: Sequence[float], scale: float, settings: Mapping[str, object]) -> None:
        if not len(radii):
            raise ValueError("radii must hold at least one radius, got none")
        for radius in radii:
            require_positive(radius=radius)
        require_positive(scale=scale)
        super().__init__(name, settings)
        self.radii = torch.tensor(radii, dtype=torch.float64, device=CPU)
        self.scale = scale

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        angle = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
        radius = self.radii[torch.randint(len(self.radii), (n,), generator=generator)]
        noise = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        return radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1) + self.scale * noise

    def _log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob_at_radius(torch.linalg.vector_norm(x, dim=-1))

    def _log_prob_at_radius(self, r: Tensor) -> Tensor:
        # i0e(y) = e^{-y} I0(y) completes the square: the exponent is -(r - R)^2 / 2 sigma^2, and nothing overflows.
        r, radii = r[:, None] / self.scale, (self.radii / self.scale).to(r.device)
        terms = torch.special.i0e(r * radii).log() - (r - radii).square() / 2
        return torch.logsumexp(terms, -1) - math.log(len(self.radii)) - LOG_2PI - 2 * math.log(self.scale)

    def _entropy(self) -> float:
        # In polar coordinates, by panels of two standard deviations wherever there is mass.
        width = 2 * self.scale
        panels = {
            panel
            for radius in self.radii.tolist()
            for panel in range(
                max(0, math.floor((radius - REACH * self.scale) / width)),
                math.floor((radius + REACH * self.scale) / width) + 1,
            )
        }
        total = 0.0
        for panel in sorted(panels):
            r, weights = _gauss_legendre(panel * width, (panel + 1) * width, 1)
            log_p = self._log_prob_at_radius(r)
            total -= (weights * 2 * math.pi * r * log_p.exp() * log_p).sum().item()
        return total


class Pinwheel(Toy):
    r"""Gaussian arms about the origin, twisted by an angle that grows with the radius.

    .. math:: x = \mathrm{Rot}\big(2\pi k/K + \tau |u|^2/R^2\big)\, u, \quad
              u \sim N\big((R, 0), \mathrm{diag}(\sigma_r^2, \sigma_t^2)\big), \quad k \text{ uniform}

    A twist turns every circle in itself: it keeps :math:`|u|` and areas, so that u is the inverse rotation of x, by an
    angle known from :math:`|x| = |u|`, the Jacobian is one, and the entropy is that of the arms before the twist.

    Args:
        arms: their number K.
        radius: the distance R of their centres from the origin.
        radial_scale, tangential_scale: the standard deviations :math:`\sigma_r, \sigma_t` along and across an arm.
        twist: the angle :math:`\tau` at radius R, in radians.
    """

    def __init__(self, arms: int, radius: float, radial_scale: float, tangential_scale: float, twist: float) -> None:
        if arms < 1:
            raise ValueError(f"arms must be at least 1, got {arms}")
        require_positive(radius=radius, radial_scale=radial_scale, tangential_scale=tangential_scale)
        settings = {"arms": arms, "radius": radius, "radial_scale": radial_scale}
        super().__init__("pinwheel", settings | {"tangential_scale": tangential_scale, "twist": twist})
        self.arms, self.radius, self.twist = arms, radius, twist
        self.scales = (radial_scale, tangential_scale)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        u = noise * torch.tensor(self.scales, dtype=torch.float64)
        u[:, 0] += self.radius
        arm = torch.randint(self.arms, (n,), generator=generator)
        angle = 2 * math.pi / self.arms * arm.double() + self.twist * u.square().sum(-1) / self.radius**2
        return _rotate(u, angle)

    def _log_prob(self, x: Tensor) -> Tensor:
        return self._log_prob_before_twist(_rotate(x, -self.twist * x.square().sum(-1) / self.radius**2))

    def _log_prob_before_twist(self, u: Tensor) -> Tensor:
        angles = 2 * math.pi / self.arms * torch.arange(self.arms, dtype=torch.float64, device=u.device)
        radial, tangential = _rotate(u[:, None], -angles).unbind(-1)
        terms = -((radial - self.radius) / self.scales[0]).square() / 2 - (tangential / self.scales[1]).square() / 2
        constant = math.log(self.arms) + LOG_2PI + math.log(self.scales[0]) + math.log(self.scales[1])
        return torch.logsumexp(terms, -1) - constant

    def _entropy(self) -> float:
        # All arms are alike: the mean of -log p over one of them.
        step = min(self.scales) / PER_SCALE
        radial, tangential = (
            step * torch.arange(-math.ceil(REACH * s / step), math.ceil(REACH * s / step) + 1, dtype=torch.float64)
            for s in self.scales
        )
        u = torch.cartesian_prod(radial, tangential)
        exponent = (u / torch.tensor(self.scales, dtype=torch.float64)).square().sum(-1) / 2
        u[:, 0] += self.radius
        weights = torch.exp(-exponent) * step**2 / (2 * math.pi * self.scales[0] * self.scales[1])
        return -(weights * self._log_prob_before_twist(u)).sum().item()


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Points (..., 2) turned anticlockwise about the origin."""
    first, second = x.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * first - sin * second, sin * first + cos * second], -1)


class Checkerboard(Toy):
    r"""Uniform on the eight squares of side 2 of :math:`[-4, 4)^2` with i + j even, i and j counted from the corner.

    .. math:: \log p(x) = -\log 32 \text{ on them, } -\infty \text{ elsewhere}; \quad H = \log 32.
    """

    def __init__(self) -> None:
        super().__init__("checkerboard", {})

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        column = torch.randint(4, (n,), generator=generator)
        row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
        corner = 2.0 * torch.stack([column, row], -1).float() - 4.0
        x = corner + 2 * torch.rand(n, 2, dtype=torch.float32, generator=generator)
        # In float32 a draw may round up to the open end, into the next square, where the density is zero.
        return torch.minimum(x, torch.nextafter(corner + 2, corner)).double()

    def _log_prob(self, x: Tensor) -> Tensor:
        column, row = torch.floor(x / 2 + 2).unbind(-1)
        inside = ((x >= -4) & (x < 4)).all(-1) & ((column + row) % 2 == 0)
        flat = (0 * x).sum(-1)  # keeps x in the graph: the score exists, and is zero
        return torch.where(inside, flat - math.log(32), flat - math.inf)

    def _entropy(self) -> float:
        return math.log(32)
