r"""Is Z finite? How fast log f falls along rays.

In polar coordinates :math:`Z = \int d\Omega \int f(c + r u)\, r^{d-1}\, dr`. If :math:`f \sim r^{-a}` along a ray u,
the inner integral is finite exactly if a > d. So on every ray :math:`a(u) = -d \log f / d \log r` must exceed d far
out; for energies that grow like a power of r it grows without bound, under a normal base too. A ray that fails is a
proof, as far as the radius goes, that Z is infinite; rays that pass prove nothing about those between them. So each ray
is turned towards where log f is largest at its radius, a few steps of ascent on the sphere, before it is judged.

On bounded supports there is nothing to check, on positive ones the rays stay positive.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gen import scopes
from pyro_gen.targets import Target, is_real

__all__ = ["centre_and_scale", "check_growth"]

RAYS = 64
TURNS = 10
RADII = (1e2, 1e3, 1e4)  # in units of the scale; the largest at which log f is finite counts
DOUBLINGS = 3  # of the radius, along each ray
DRAWS = 1024
TOLERANCE = 1e-4  # a rate of d itself makes Z infinite, by a logarithm


def check_growth(target: Target, centre: Tensor, scale: Tensor) -> None:
    """Raise where log f does not fall fast enough for Z to be finite.

    Args:
        target: the density; supports other than the real space and its positive part are not looked at.
        centre, scale: where rays start and the unit of their length, ``event_shape``.

    Raises:
        ValueError: names the radius, the rate and what is needed.
    """
    positive = _is_positive(target.support)
    if not positive and not is_real(target.support):
        return
    shape, d = target.event_shape, target.event_shape.numel()
    generator = torch.Generator().manual_seed(0)  # the same rays each time, and nobody's generator touched
    u = torch.randn(RAYS, d, generator=generator, dtype=torch.float64)
    axes = torch.eye(d, dtype=torch.float64)[: RAYS // 2]
    u = _unit(torch.cat([u, axes, -axes]).to(target.template), positive)
    flat_centre, flat_scale = centre.reshape(-1), scale.reshape(-1)

    def at(u: Tensor, r: float) -> Tensor:
        return (flat_centre + r * flat_scale * u).reshape(-1, *shape)

    for r in reversed(RADII):
        turned = u
        for turn in range(TURNS):
            _, gradient = target.value_and_score(at(turned, r))
            step = gradient.reshape(turned.shape) * flat_scale
            step = step - (step * turned).sum(1, keepdim=True) * turned
            size = step.norm(dim=1, keepdim=True)
            step = torch.where((size > 0) & torch.isfinite(size), step / size, torch.zeros_like(step))
            turned = _unit(turned + 0.5 / (1 + turn) * step, positive)
        rays = torch.cat([u, turned])
        values = torch.stack([target.log_density(at(rays, r * 2.0**i)).double() for i in range(DOUBLINGS + 1)])
        if not bool(torch.isfinite(values[:2]).all(0).any()) and r > RADII[0]:
            continue  # beyond what the numbers hold: look nearer
        near, far = values[:-1], values[1:]
        known = torch.isfinite(near) & torch.isfinite(far)
        rates = torch.where(known, (near - far) / math.log(2), math.inf)  # -inf out there falls fast enough
        rates = torch.where((near == math.inf) | (far == math.inf), -math.inf, rates)
        rate = rates.amax(0)  # a ray may cross a curved valley once: only one that never falls fast enough counts
        worst = float(rate.min())
        if worst <= d * (1 + TOLERANCE):
            raise ValueError(
                f"log f does not fall fast enough for a finite Z: at {r:g} scales from the centre, along its slowest "
                f"ray, it falls like {worst:.3g} · log r, and more than {d} (the dimension) is needed. Give the "
                "program a base (base='normal'), or an energy that grows in every direction"
            )
        return


def centre_and_scale(target: Target) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of draws of the base; 0 and 1 where there is none."""
    like = target.template.new_zeros(target.event_shape)
    if not target.has_base:
        return like, torch.ones_like(like)
    with scopes.forked_generators(0):
        x = target.sample_base(DRAWS)
    spread = x.std(0)
    return x.mean(0), torch.where((spread > 0) & torch.isfinite(spread), spread, torch.ones_like(spread))


def _unit(u: Tensor, positive: bool) -> Tensor:
    u = u.abs() if positive else u
    unit: Tensor = u / u.norm(dim=1, keepdim=True)
    return unit


def _is_positive(support: Any) -> bool:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    half_lines = type(constraints.positive), type(constraints.nonnegative)
    return isinstance(support, half_lines) and bool((torch.as_tensor(support.lower_bound) >= 0).all())
