r"""The toys by name, each with the formula that defines it.

They keep the customary look and size (radius about 1 to 5), but are defined by a generative process whose density is
exact, where the customary scripts often have none. ``scale`` is always the standard deviation of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_gen.datasets.densities import CPU, GaussianMixture, Toy, make_generator, require_positive
from pyro_gen.datasets.shapes import Checkerboard, Curve, Pinwheel, Rings

__all__ = [
    "checkerboard",
    "eight_gaussians",
    "gaussian_mixture",
    "grid_gaussians",
    "moons",
    "pinwheel",
    "ring",
    "rings",
    "swiss_roll",
]


def eight_gaussians(radius: float = 5.0, scale: float = math.sqrt(0.1)) -> GaussianMixture:
    r"""Eight Gaussians on a circle, of variance 0.1 and radius 5; no two overlap.

    .. math:: p(x) = \frac18 \sum_{k=0}^{7} N\big(x; R(\cos\tfrac{\pi k}{4}, \sin\tfrac{\pi k}{4}), \sigma^2 I\big),
              \quad H = \log 8 + 1 + \log 2\pi\sigma^2 \text{ up to the overlap}

    ``eight_gaussians(radius=1.0, scale=0.01)`` is the ring of eight modes on which GANs are tested for lost modes.

    Args:
        radius: the distance R of the means from the origin.
        scale: the standard deviation :math:`\sigma` of each component.

    Returns:
        The mixture; its ``means`` and ``weights`` are attributes.

    References:
        Srivastava, Valkov, Russell, Gutmann, Sutton (2017), VEEGAN, arXiv:1705.07761 (radius 1, scale .01).
        Tong et al. (2023), Improving and generalizing flow-based generative models with minibatch optimal transport,
        arXiv:2302.00482 (radius 5, variance .1).

    Example:
        >>> toy = eight_gaussians()
        >>> round(toy.entropy, 4)
        2.6147
    """
    require_positive(radius=radius)
    angle = math.pi / 4 * torch.arange(8, dtype=torch.float64, device=CPU)
    means = radius * torch.stack([angle.cos(), angle.sin()], -1)
    return GaussianMixture(means, scale, name="eight_gaussians", settings={"radius": radius, "scale": scale})


def grid_gaussians(scale: float = 0.05) -> GaussianMixture:
    r"""Twenty-five narrow Gaussians on a grid.

    .. math:: p(x) = \frac1{25} \sum_{i, j \in \{-4, -2, 0, 2, 4\}} N\big(x; (i, j), \sigma^2 I\big), \quad
              H = \log 25 + 1 + \log 2\pi\sigma^2 \text{ up to the overlap}

    Args:
        scale: the standard deviation :math:`\sigma` of each component.

    Returns:
        The mixture; its ``means`` and ``weights`` are attributes.

    References:
        Srivastava, Valkov, Russell, Gutmann, Sutton (2017), VEEGAN, arXiv:1705.07761.

    Example:
        >>> grid_gaussians().means.shape
        torch.Size([25, 2])
    """
    steps = torch.arange(-4, 5, 2, dtype=torch.float64, device=CPU)
    return GaussianMixture(torch.cartesian_prod(steps, steps), scale, name="grid_gaussians", settings={"scale": scale})


def gaussian_mixture(
    dim: int, components: int = 8, separation: float = 6.0, seed: int = 0, *, scale: float = 1.0
) -> GaussianMixture:
    r"""A mixture of equally likely spherical Gaussians in any dimension.

    .. math:: p(x) = \frac1K \sum_k N(x; \mu_k, \sigma^2 I), \quad \min_{j \ne k} |\mu_j - \mu_k| = s\,\sigma

    The means are draws from N(0, I) that keep apart (each is the one of sixteen draws that is farthest from those
    already placed), centred, then scaled until the closest pair is ``separation`` standard deviations apart.

    The entropy is exact for ``dim`` up to 2, and in any dimension for up to three components. Otherwise it has no
    closed form: ``.entropy`` is a ``NotImplementedError``, and ``.entropy_estimate(n, seed)`` gives a Monte Carlo
    value with its standard error.

    Args:
        dim: number of coordinates of x.
        components: their number K.
        separation: the distance s of the closest two means, in standard deviations. At 6 and more the components hardly
            overlap; at 2 and less the closest two have a single mode.
        seed: which means.
        scale: the standard deviation :math:`\sigma` of each component.

    Returns:
        The mixture; its ``means`` and ``weights`` are attributes.

    References:
        Mitchell (1991), Spectrally optimal sampling for distribution ray tracing, SIGGRAPH 25(4), 157-164 (the
        best-candidate rule).

    Example:
        >>> toy = gaussian_mixture(8, components=5, seed=1)
        >>> value, error = toy.entropy_estimate(20_000)
        >>> abs(value - 12.95) < 0.1
        True
    """
    for name, count in (("dim", dim), ("components", components)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    require_positive(separation=separation, scale=scale)
    generator = make_generator(seed)
    means = torch.randn(1, dim, dtype=torch.float64, generator=generator, device=CPU)
    closest = math.inf
    while len(means) < components:
        candidates = torch.randn(16, dim, dtype=torch.float64, generator=generator, device=CPU)
        distance = torch.linalg.vector_norm(candidates[:, None] - means, dim=-1).amin(-1)
        best = int(distance.argmax())
        closest = min(closest, float(distance[best]))
        means = torch.cat([means, candidates[best : best + 1]])
    means = (means - means.mean(0)) * (separation * scale / closest)
    settings = {"dim": dim, "components": components, "separation": separation, "seed": seed, "scale": scale}
    return GaussianMixture(means, scale, settings=settings)


def ring(radius: float = 1.0, scale: float = 0.01) -> Toy:
    r"""A thin circle.

    .. math:: x = R(\cos t, \sin t) + \sigma\varepsilon, \quad t \sim U[0, 2\pi), \quad
              p(x) = \frac{1}{2\pi\sigma^2} e^{-(r^2 + R^2)/2\sigma^2} I_0(rR/\sigma^2), \quad r = |x|

    with :math:`\varepsilon \sim N(0, I)` and :math:`I_0` the modified Bessel function.

    Args:
        radius: the radius R.
        scale: the standard deviation :math:`\sigma` of the noise.

    Returns:
        The toy.

    Example:
        >>> ring().sample(2, seed=0).norm(dim=-1).round(decimals=1)
        tensor([1., 1.])
    """
    return Rings("ring", (radius,), scale, {"radius": radius, "scale": scale})


def rings(radii: Sequence[float] = (1.0, 2.0, 3.0), scale: float = 0.1) -> Toy:
    r"""Circles about one centre, equally likely whatever their lengths.

    .. math:: x = R_j(\cos t, \sin t) + \sigma\varepsilon, \quad t \sim U[0, 2\pi), \quad
              p(x) = \frac1J \sum_j \frac{1}{2\pi\sigma^2} e^{-(r^2 + R_j^2)/2\sigma^2} I_0(rR_j/\sigma^2)

    with :math:`\varepsilon \sim N(0, I)`, :math:`r = |x|` and :math:`I_0` the modified Bessel function.

    Args:
        radii: the radii :math:`R_j`.
        scale: the standard deviation :math:`\sigma` of the noise.

    Returns:
        The toy.

    Example:
        >>> rings(radii=(1.0, 2.0))
        rings(radii=(1, 2), scale=0.1)
    """
    return Rings("rings", radii, scale, {"radii": tuple(radii), "scale": scale})


def _upper_moon(t: Tensor) -> Tensor:
    return torch.stack([t.cos(), t.sin()], -1)


def _lower_moon(t: Tensor) -> Tensor:
    return torch.stack([1 - t.cos(), 0.5 - t.sin()], -1)


def moons(scale: float = 0.1) -> Toy:
    r"""Two half circles that reach into each other, where scikit-learn's ``make_moons`` puts them.

    .. math:: x = c_k(t) + \sigma\varepsilon, \quad c_0 = (\cos t, \sin t), \quad
              c_1 = (1 - \cos t, \tfrac12 - \sin t), \quad t \sim U[0, \pi], \quad
              p(x) = \frac{1}{2\pi} \sum_k \int_0^\pi N(x; c_k(t), \sigma^2 I)\, dt

    with :math:`\varepsilon \sim N(0, I)` and k uniform on {0, 1}. The integral is a Gauss–Legendre sum: log p is good
    to 1e-8 while :math:`|x| \le 8`, and to 1e-5 of its own size farther out.

    Args:
        scale: the standard deviation :math:`\sigma` of the noise.

    Returns:
        The toy.

    Example:
        >>> toy = moons()
        >>> bool((toy.log_prob(toy.sample(100, seed=0)) > -6).all())
        True
    """
    return Curve("moons", (_upper_moon, _lower_moon), (0.0, math.pi), speed=1.0, scale=scale)


def _spiral(t: Tensor) -> Tensor:
    return t[:, None] / 5 * torch.stack([t.cos(), t.sin()], -1)


def swiss_roll(scale: float = 0.1) -> Toy:
    r"""A spiral of one turn and a half, as scikit-learn's ``make_swiss_roll`` seen from its end, divided by five.

    .. math:: x = \tfrac{t}{5}(\cos t, \sin t) + \sigma\varepsilon, \quad t \sim U[\tfrac32\pi, \tfrac92\pi], \quad
              p(x) = \frac{1}{3\pi} \int_{3\pi/2}^{9\pi/2} N\big(x; \tfrac{t}{5}(\cos t, \sin t), \sigma^2 I\big)\, dt

    with :math:`\varepsilon \sim N(0, I)`. The integral is a Gauss–Legendre sum: log p is good to 1e-8 while
    :math:`|x| \le 8`, and to 1e-5 of its own size farther out.

    Args:
        scale: the standard deviation :math:`\sigma` of the noise.

    Returns:
        The toy.

    Example:
        >>> swiss_roll().sample(1000, seed=0).norm(dim=-1).max() < 3.3
        tensor(True)
    """
    stop = 4.5 * math.pi
    return Curve("swiss_roll", (_spiral,), (1.5 * math.pi, stop), speed=math.hypot(1, stop) / 5, scale=scale)


def pinwheel(
    arms: int = 5,
    radius: float = 2.0,
    radial_scale: float = 0.6,
    tangential_scale: float = 0.2,
    twist: float = 0.5,
) -> Toy:
    r"""Gaussian arms about the origin, twisted by an angle that grows with the square of the radius.

    .. math:: x = \mathrm{Rot}\big(\tfrac{2\pi k}{K} + \tau\tfrac{|u|^2}{R^2}\big)\, u, \quad
              u \sim N\big((R, 0), \mathrm{diag}(\sigma_r^2, \sigma_t^2)\big), \quad
              p(x) = \frac1K \sum_k p_u\big(\mathrm{Rot}(-\tfrac{2\pi k}{K} - \tau\tfrac{|x|^2}{R^2})\, x\big)

    with k uniform on {0, …, K - 1}: a twist keeps :math:`|u|` and areas, its Jacobian is one.

    Args:
        arms: their number K.
        radius: the distance R of their centres from the origin.
        radial_scale: the standard deviation :math:`\sigma_r` along an arm.
        tangential_scale: the standard deviation :math:`\sigma_t` across an arm.
        twist: the angle :math:`\tau` at radius R, in radians; negative turns clockwise.

    Returns:
        The toy.

    References:
        After Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), Composing graphical models with neural networks,
        arXiv:1603.06277, whose twist depends on one coordinate of u and has no inverse in closed form.

    Example:
        >>> pinwheel(arms=3).sample(4, seed=0).shape
        torch.Size([4, 2])
    """
    return Pinwheel(arms, radius, radial_scale, tangential_scale, twist)


def checkerboard() -> Toy:
    r"""Uniform on eight squares of side 2 in :math:`[-4, 4)^2`.

    .. math:: p(x) = \tfrac1{32} \text{ where } \lfloor x_1/2 \rfloor + \lfloor x_2/2 \rfloor \text{ is even, }
              0 \text{ elsewhere}; \quad H = \log 32 = 3.4657

    The log-density is ``-inf`` off the board and on the white squares.

    Returns:
        The toy.

    Example:
        >>> toy = checkerboard()
        >>> bool(toy.log_prob(toy.sample(1000, seed=0)).isfinite().all())
        True
    """
    return Checkerboard()
