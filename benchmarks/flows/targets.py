r"""The targets of the KL benchmark: densities known in closed form, and draws.

*Funnel* (R. M. Neal, "Slice sampling", Annals of Statistics 31, 2003, sec. 8, with sd(v) = 1 for his 3):
:math:`v \sim N(0, 1)`, :math:`x_i | v \sim N(0, e^v)`, i = 1 … 9, so

.. math:: \log p(v, x) = \log N(v; 0, 1) + \sum_i \log N(x_i; 0, e^v).

*Rotated mixture of two StudentT*: :math:`x = Q u`, Q a fixed rotation, and u from one of two components, equally
likely, with independent coordinates :math:`u_i = m_{ki} + s_{ki} t_i`, :math:`t_i \sim \text{StudentT}(\nu = 8)`:

.. math:: \log p(x) = \log \tfrac12 \sum_k \prod_i
          \frac{1}{s_{ki}}\, t_8\!\left(\frac{(Q^\top x)_i - m_{ki}}{s_{ki}}\right),

as rotations preserve volume. The means are m_1 = (−1, 1, −1, …) and m_2 = −m_1; the scales are 1 and 0.5 in turn, those
of the second component the other way round. Draws and densities are in float64.

The toys in the plane are those of `pyro_gen.datasets`, whose densities are exact too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_gen import datasets

__all__ = ["TARGETS", "Funnel", "StudentTMixture", "Target", "write_rows"]

LOG_2PI = math.log(2 * math.pi)


class Target(Protocol):
    """Draws by seed, ``(n, d)``, and log p, ``(n,)``."""

    def sample(self, n: int, seed: int) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


class Funnel:
    """Neal's funnel; the first coordinate is v."""

    def __init__(self, dim: int = 10, scale: float = 1.0) -> None:
        self.dim, self.scale = dim, scale

    def sample(self, n: int, seed: int) -> Tensor:
        noise = torch.randn(n, self.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        v = self.scale * noise[:, :1]
        return torch.cat([v, noise[:, 1:] * (v / 2).exp()], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        v, rest = x[..., 0].double(), x[..., 1:].double()
        of_v = -0.5 * (v / self.scale).square() - math.log(self.scale) - 0.5 * LOG_2PI
        of_rest = -0.5 * (rest.square().sum(-1) * (-v).exp() + (self.dim - 1) * (v + LOG_2PI))
        return of_v + of_rest


class StudentTMixture:
    """Two components of independent StudentT coordinates, rotated."""

    def __init__(self, dim: int = 10, nu: float = 8.0, seed: int = 0) -> None:
        self.dim, self.nu = dim, nu
        generator = torch.Generator().manual_seed(seed)
        q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
        self.rotation = q * r.diagonal().sign()
        if torch.linalg.det(self.rotation) < 0:
            self.rotation[:, 0] *= -1
        odd = torch.arange(dim) % 2 == 1
        mean = torch.where(odd, 1.0, -1.0).double()
        scale = torch.where(odd, 0.5, 1.0).double()
        self.means = torch.stack([mean, -mean])
        self.scales = torch.stack([scale, 1.5 - scale])

    def sample(self, n: int, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)  # torch's StudentT draws from the global generator
        which = torch.from_numpy(rng.integers(0, 2, n))
        t = torch.from_numpy(rng.standard_t(self.nu, (n, self.dim)))
        return (self.means[which] + self.scales[which] * t) @ self.rotation.mT

    def log_prob(self, x: Tensor) -> Tensor:
        nu = self.nu
        u = (x.double() @ self.rotation).unsqueeze(-2)
        t = (u - self.means) / self.scales
        constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
        parts = (constant - self.scales.log() - (nu + 1) / 2 * torch.log1p(t.square() / nu)).sum(-1)
        return parts.logsumexp(-1) - math.log(2)


@dataclass(frozen=True)
class Named:
    make: Callable[[], Target]
    dim: int
    label: str


TARGETS: dict[str, Named] = {
    "checkerboard": Named(datasets.checkerboard, 2, "checkerboard, d = 2"),
    "eight_gaussians": Named(datasets.eight_gaussians, 2, "eight Gaussians, d = 2"),
    "moons": Named(datasets.moons, 2, "moons, d = 2"),
    "pinwheel": Named(datasets.pinwheel, 2, "pinwheel, d = 2"),
    "funnel": Named(Funnel, 10, "funnel, sd(v) = 1, d = 10"),
    "student_t": Named(StudentTMixture, 10, "rotated StudentT mixture, ν = 8, d = 10"),
}
SEEDS = {"train": 1, "validation": 2, "test": 3}


def write_rows(name: str, folder: Path, sizes: dict[str, int]) -> None:
    """`train.npy`, `validation.npy`, `test.npy` (float32) and `log_p.npy`, log p of the test rows as written.

    Rows that rounding to float32 has put outside of a support with edges are drawn again, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = TARGETS[name].make()
    for part, size in sizes.items():
        rows = target.sample(size + size // 100 + 10, SEEDS[part]).float()
        log_p = target.log_prob(rows.double())
        inside = log_p.isfinite()
        rows, log_p = rows[inside][:size], log_p[inside][:size]
        assert len(rows) == size
        np.save(folder / f"{part}.npy", rows.numpy())
        if part == "test":
            np.save(folder / "log_p.npy", log_p.numpy())
