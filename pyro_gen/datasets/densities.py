r"""What a toy is, and the first of them: a mixture of Gaussians.

A toy has draws, a normalized log-density and an entropy :math:`H = -\int p \log p`. Where the entropy has no closed
form it is an integral over the plane, and the trapezoidal rule does it to rounding: for an analytic integrand its error
falls as :math:`e^{-2\pi a/h}`, with :math:`h` the spacing and :math:`a` the distance from the real axis to the nearest
singularity, weighted with the integrand there. :math:`p` itself has none, and its sum with :math:`h = \sigma/8` is
exact. :math:`\log p` is singular where components cancel, between two means :math:`\Delta` apart at
:math:`a = \pi\sigma^2/\Delta`, where :math:`p` has fallen by :math:`e^{-\Delta^2/8\sigma^2}`: of the product
:math:`e^{-16\pi^2\sigma/\Delta - \Delta^2/8\sigma^2}` the largest value, at :math:`\Delta \approx 9\sigma`, is 1e-12.
Tails are cut at nine standard deviations, :math:`e^{-40}`.

Computation is in float64 whatever the dtype of x, and differentiable in x.

References:
    L. N. Trefethen, J. A. C. Weideman (2014), The exponentially convergent trapezoidal rule, SIAM Review 56(3),
    385-458, doi:10.1137/130932132.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Estimate", "GaussianMixture", "Toy"]

LOG_2PI = math.log(2 * math.pi)
REACH = 9.0  # standard deviations after which a Gaussian tail is cut in an entropy
PER_SCALE = 8  # quadrature nodes to a standard deviation
CPU = torch.device("cpu")  # entered where tensors are made: draws do not depend on torch.set_default_device
CHUNK = 2**18  # (row, component) pairs taken at once: 2 MiB stay in the cache, which is three times faster


class Estimate(NamedTuple):
    """A Monte Carlo mean and its standard error."""

    value: float
    standard_error: float


def make_generator(seed: int | None) -> torch.Generator:
    """A CPU generator of its own: from ``seed``, or from the operating system's entropy where that is None."""
    generator = torch.Generator(CPU)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(seed))
    return generator


def require_positive(**arguments: float) -> None:
    """Raise a ``ValueError`` that names the first argument that is not a positive finite number."""
    for name, value in arguments.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_show, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


class Toy(ABC):
    r"""A distribution whose draws, normalized log-density and entropy are all known.

    Subclasses give ``_draw``, ``_log_prob`` and ``_entropy``, all in float64.

    Args:
        name: the name it is shown under.
        dim: number of coordinates of x.
        settings: what it was made from, which its ``repr`` shows.

    Attributes:
        name: the name it is shown under.
        event_shape: shape of one x, ``(dim,)``.
    """

    def __init__(self, name: str, settings: Mapping[str, object], dim: int = 2) -> None:
        self.name = name
        self.event_shape: tuple[int, ...] = (dim,)
        self._settings = dict(settings)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={_show(value)}' for key, value in self._settings.items())})"

    def sample(self, n: int, seed: int | None = None) -> Tensor:
        """Draw n points with a generator of their own; the global ones are left alone.

        Args:
            n: number of points.
            seed: the same seed gives the same points; None gives new ones each time.

        Returns:
            float32 tensor (n, dim) on the CPU.

        Example:
            >>> from pyro_gen import datasets
            >>> datasets.moons().sample(3, seed=0).shape
            torch.Size([3, 2])
        """
        with CPU:
            return self._draw(self._count(n), make_generator(seed)).to(torch.float32)

    def log_prob(self, x: Tensor) -> Tensor:
        r"""The exact log-density :math:`\log p(x)` in nats; normalized, Z = 1.

        Args:
            x: points (..., dim), any floating dtype and device.

        Returns:
            (...), in the dtype and on the device of x; computed in float64, differentiable. Infinite coordinates give
            ``-inf``, NaN gives NaN.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if the last dimension of x is not ``dim``.

        Example:
            >>> import torch
            >>> from pyro_gen import datasets
            >>> datasets.checkerboard().log_prob(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
            tensor([-3.4657,    -inf])
        """
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"log_prob of {self.name} takes a floating-point tensor, got {given}: convert it first")
        if x.shape[-1:] != self.event_shape:
            raise ValueError(
                f"log_prob of {self.name} takes x of shape (..., {self.event_shape[0]}), got {tuple(x.shape)}"
            )
        rows = x.reshape(-1, *self.event_shape).double()
        value = self._log_prob(rows)
        value = value.masked_fill(rows.isinf().any(-1), -math.inf).masked_fill(rows.isnan().any(-1), math.nan)
        return value.reshape(x.shape[:-1]).to(x.dtype)

    @cached_property
    def entropy(self) -> float:
        r"""The differential entropy :math:`-\mathbb{E}_p \log p(x)` in nats, computed when first asked for.

        A closed form where there is one, else a quadrature with an error below 1e-8.

        Raises:
            NotImplementedError: for a mixture whose means span more than two dimensions, where neither exists;
                `entropy_estimate` states its error.

        Example:
            >>> from pyro_gen import datasets
            >>> round(datasets.eight_gaussians().entropy, 4)
            2.6147
        """
        with CPU:
            return self._entropy()

    def entropy_estimate(self, n: int = 100_000, seed: int | None = 0) -> Estimate:
        r"""A Monte Carlo estimate of the entropy, :math:`-\frac1n \sum_i \log p(x_i)`, with its standard error.

        Args:
            n: number of draws, at least 2.
            seed: seed of the draws.

        Returns:
            ``(value, standard_error)`` in nats.

        Example:
            >>> from pyro_gen import datasets
            >>> toy = datasets.moons()
            >>> value, error = toy.entropy_estimate(10_000)
            >>> abs(value - toy.entropy) < 4 * error
            True
        """
        if n < 2:
            raise ValueError(f"entropy_estimate needs n of at least 2 to state an error, got {n}")
        with CPU:
            surprise = -self._log_prob(self._draw(n, make_generator(seed)))
        return Estimate(surprise.mean().item(), surprise.std().item() / math.sqrt(n))

    def _count(self, n: int) -> int:
        if n < 0:
            raise ValueError(f"n, the number of points of {self.name}, must not be negative, got {n}")
        return n

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator) -> Tensor: ...

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _entropy(self) -> float: ...


class GaussianMixture(Toy):
    r"""A mixture of Gaussians that share one spherical covariance, :math:`\sum_k w_k\, N(x; \mu_k, \sigma^2 I)`.

    The entropy splits into that of the plane (or line) of the means and that of the Gaussian noise at right angles to
    it, so it is known to quadrature accuracy in any dimension as long as the means span no more than a plane.

    Args:
        means: (components, dim).
        scale: the standard deviation :math:`\sigma`.
        weights: (components,), positive, divided by their sum; None for equal ones.
        name: the name it is shown under.
        settings: what its ``repr`` shows; the number of components and the scale if None.

    Attributes:
        means, weights: float64 tensors (components, dim) and (components,).
        scale: the standard deviation.

    Raises:
        ValueError: if a shape is wrong, or a number is not positive or not finite.

    Example:
        >>> import torch
        >>> toy = GaussianMixture(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), scale=1.0, weights=[0.2, 0.8])
        >>> toy.log_prob(torch.tensor([3.0, 0.0]))
        tensor(-2.0610)
    """

    def __init__(
        self,
        means: Tensor,
        scale: float,
        weights: Sequence[float] | Tensor | None = None,
        name: str = "gaussian_mixture",
        settings: Mapping[str, object] | None = None,
    ) -> None:
        if means.dim() != 2 or 0 in means.shape:
            raise ValueError(f"means must have shape (components, dim), got {tuple(means.shape)}")
        require_positive(scale=scale)
        self.means = means.detach().to("cpu", torch.float64)
        self.scale = float(scale)
        given = [1.0] * len(means) if weights is None else weights
        self.weights = torch.as_tensor(given, dtype=torch.float64, device=CPU).detach()
        if self.weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights must have shape ({len(means)},), one for each mean, got {tuple(self.weights.shape)}"
            )
        if not bool((self.weights > 0).all() and self.weights.isfinite().all() and self.means.isfinite().all()):
            raise ValueError("weights must be positive and finite, and means finite: leave out components of no weight")
        self.weights = self.weights / self.weights.sum()
        super().__init__(name, settings or {"components": len(means), "scale": self.scale}, means.shape[1])

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        dim = self.event_shape[0]
        if n == 0:  # torch.multinomial refuses to draw nothing
            return torch.empty(0, dim, dtype=torch.float64)
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, dim, dtype=torch.float64, generator=generator)
        return self.means[component] + self.scale * noise

    def _log_prob(self, x: Tensor) -> Tensor:
        dim = self.event_shape[0]
        means = (self.means / self.scale).to(x.device)
        log_weights = (self.weights.log() - dim * (LOG_2PI / 2 + math.log(self.scale))).to(x.device)
        parts = []
        for rows in (x / self.scale).split(max(1, CHUNK // len(means))):
            # Differences first, then squares: the expanded |x|^2 - 2xm + |m|^2 cancels for small scales.
            squares = torch.zeros(len(rows), len(means), dtype=rows.dtype, device=rows.device)
            for i in range(dim):
                squares = squares + (rows[:, i, None] - means[:, i]).square()
            parts.append(torch.logsumexp(log_weights - squares / 2, -1))
        return torch.cat(parts)

    def _entropy(self) -> float:
        dim = self.event_shape[0]
        centred = (self.means - self.means.mean(0)) / self.scale
        _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
        rank = int((lengths > 1e-10 * lengths[0]).sum())
        if rank > 2:
            raise NotImplementedError(
                f"the entropy of {self!r} has no closed form, and its means span {rank} dimensions, where quadrature "
                "stops at 2: use entropy_estimate(n, seed), which states its standard error"
            )
        plane = torch.zeros(len(centred), 2, dtype=torch.float64)
        plane[:, :rank] = centred @ axes[:rank].T
        return _plane_entropy(plane, self.weights) + dim * math.log(self.scale) + (dim - 2) * (1 + LOG_2PI) / 2


def _plane_entropy(means: Tensor, weights: Tensor) -> float:
    """Entropy of a mixture of unit Gaussians in the plane: trapezoidal rule on the square tiles where it has mass."""
    side = 8.0
    ticks = torch.arange(side * PER_SCALE, dtype=torch.float64) / PER_SCALE
    low, high = torch.floor((means - REACH) / side).long(), torch.floor((means + REACH) / side).long()
    tiles = {
        (i, j)
        for (a, b), (c, d) in zip(low.tolist(), high.tolist(), strict=True)
        for i in range(a, c + 1)
        for j in range(b, d + 1)
    }
    total = 0.0
    for tile in sorted(tiles):
        corner = side * torch.tensor(tile, dtype=torch.float64)
        near = ((means > corner - REACH) & (means < corner + side + REACH)).all(-1)
        grid = corner[:, None, None] + ticks - means[near].T[:, :, None]  # (2, components, ticks)
        kernel = torch.exp(-grid.square() / 2 - LOG_2PI / 2)
        density = (weights[near, None] * kernel[0]).T @ kernel[1]  # a spherical Gaussian factorizes
        total += torch.special.entr(density).sum().item()
    return total / PER_SCALE**2
