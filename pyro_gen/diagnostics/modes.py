r"""Which modes does a sample have? The protocol by which samplers and adversarial networks are tested for lost modes.

The truth is a mixture of K narrow Gaussians whose means are known. Each row belongs to its nearest mean; it is of *high
quality* if it lies within three standard deviations of it; a mode is *hit* if it has a row of high quality. How evenly
the modes are served is the reverse Kullback-Leibler divergence of the shares :math:`\hat p_k` of rows that belong to
each, of any quality, from the weights,

.. math:: KL(\hat p \,\|\, w) = \sum_k \hat p_k \log \frac{\hat p_k}{w_k},

at most :math:`-\log \min_k w_k`, and of N rows of the truth about :math:`(K - 1) / 2N` (it is the likelihood-ratio
statistic over 2N, which is χ² of K − 1 degrees of freedom). Of a Gaussian in the plane a share
:math:`1 - e^{-9/2} = .9889` is of high quality.

References:
    A. Srivastava, L. Valkov, C. Russell, M. Gutmann, C. Sutton, "VEEGAN: reducing mode collapse in GANs using implicit
    variational learning", 2017, arXiv:1705.07761, section 4.1.
    Z. Lin, A. Khetan, G. Fanti, S. Oh, "PacGAN: the power of two samples in generative adversarial networks", 2018,
    arXiv:1712.04086, section 4.1 (the reverse KL).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_gen.checks import describe
from pyro_gen.datasets import GaussianMixture
from pyro_gen.diagnostics.two_samples import check_samples

__all__ = ["ModeCoverage", "mode_coverage"]


@dataclass(frozen=True, eq=False)
class ModeCoverage:
    """Result of :func:`mode_coverage`; ``float(...)`` gives the number of modes hit.

    Attributes:
        hit: number of modes with a row of high quality. modes: how many there are.
        quality: share of rows of high quality, and ``quality_error`` its standard error.
        reverse_kl: of the shares of modes from their weights, nats.
        reverse_kl_floor: its mean for as many rows of the truth, about (K − 1) / 2N.
        counts: rows that belong to each mode, of any quality, ``(modes,)``; ``good`` those of high quality.
    """

    hit: int
    modes: int
    quality: float
    quality_error: float
    reverse_kl: float
    reverse_kl_floor: float
    counts: Tensor
    good: Tensor

    def __float__(self) -> float:
        return float(self.hit)

    def __str__(self) -> str:
        return (
            f"{self.hit} of {self.modes} modes, {100 * self.quality:.1f} ± {100 * self.quality_error:.1f} % of rows "
            f"near one, reverse KL {self.reverse_kl:.3f} (floor {self.reverse_kl_floor:.3f})"
        )


def mode_coverage(
    x: Tensor,
    means: Tensor | GaussianMixture,
    scale: float | None = None,
    *,
    radius: float = 3.0,
    weights: Sequence[float] | Tensor | None = None,
) -> ModeCoverage:
    r"""Modes that a sample hits, the share of its rows near a mode, and how evenly it serves them.

    Args:
        x: ``(rows, *event_shape)``.
        means: of the modes, ``(modes, *event_shape)``; or a toy mixture, which brings its scale and weights.
        scale: standard deviation of a mode, in units of x.
        radius: within so many standard deviations of its mean a row is of high quality.
        weights: of the modes; None for equal ones.

    Returns:
        :class:`ModeCoverage`.

    Raises:
        TypeError, ValueError: for events of different shapes, no scale, a radius or weights that are not positive.

    References:
        A. Srivastava et al., 2017, arXiv:1705.07761, section 4.1; Z. Lin et al., 2018, arXiv:1712.04086, section 4.1.

    Example:
        >>> from pyro_gen import datasets
        >>> truth = datasets.grid_gaussians()
        >>> print(mode_coverage(truth.sample(2500, seed=0), truth))
        25 of 25 modes, 99.0 ± 0.2 % of rows near one, reverse KL 0.005 (floor 0.005)
    """
    centres: Tensor | GaussianMixture = means
    if isinstance(means, GaussianMixture):
        if scale is not None or weights is not None:
            raise ValueError("a mixture brings its own scale and weights: pass it alone, or its means")
        centres, scale, weights = means.means, means.scale, means.weights
    for name, number in (("scale", scale), ("radius", radius)):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            hint = ": the standard deviation of a mode, in units of x" if name == "scale" else ""
            raise ValueError(f"{name} must be a positive number, got {describe(number)}{hint}")
    assert scale is not None
    rows, centres = check_samples(x, centres, least=1)
    share = torch.full((len(centres),), 1 / len(centres), dtype=torch.float64)
    if weights is not None:
        share = _normalised(weights, len(centres))
    distance, nearest = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    near = distance <= radius * scale
    counts = torch.bincount(nearest, minlength=len(centres))
    good = torch.bincount(nearest[near], minlength=len(centres))
    found, quality = counts.double() / len(rows), float(near.double().mean())
    return ModeCoverage(
        int((good > 0).sum()),
        len(centres),
        quality,
        math.sqrt(quality * (1 - quality) / len(rows)),
        float(torch.special.xlogy(found, found / share).sum()),
        (len(centres) - 1) / (2 * len(rows)),
        counts,
        good,
    )


def _normalised(weights: Any, modes: int) -> Tensor:
    share = torch.as_tensor(weights, dtype=torch.float64).cpu()
    if share.shape != (modes,) or not bool(((share > 0) & share.isfinite()).all()):
        raise ValueError(f"weights must be {modes} positive numbers, one for each mode, got {describe(weights)}")
    return share / share.sum()
