r"""Do two samples come from one distribution? What every distance between samples has to say beside its value.

A distance between two finite samples is not zero where their distributions are equal: 1000 draws from eight Gaussians
lie .7 away from 1000 others in Wasserstein-2. So a value is read beside its *floor*, what it is for samples that do
share a distribution, and there are two ways to have that. Pool the rows and *relabel* them at random, as many x and as
many y as there were: under equality all labellings are equally likely, so the rank of the value among R relabelled ones
is an exact p-value for any sample sizes,

.. math:: p = \frac{1 + \#\{r : d_r \ge d\}}{1 + R},

and their mean and spread are a floor made of the rows at hand (of the mixture of both distributions, where they
differ). Or draw pairs of samples from the truth, if it is a toy or has rows to spare: :func:`sampling_floor`.

Wasserstein distances (``transport.py``) are biased upwards by the floor; the U-statistics of a kernel (``kernels.py``)
are not, and scatter about zero; a classifier (``classifier.py``) has the floor 1/2. All distances flatten an event,
compute in float64 on the CPU and leave the global generators alone.

References:
    E. L. Lehmann, J. P. Romano, "Testing statistical hypotheses", 3rd edition, 2005, section 15.2 (relabelling).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor

from pyro_gen.base import SIGNS
from pyro_gen.checks import check_count, describe

__all__ = ["Discrepancy", "Floor", "check_samples", "compare_with_relabelled", "relabellings", "sampling_floor"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Discrepancy:
    """How far two samples are apart; ``float(...)`` gives the value.

    Attributes:
        name: of the distance.
        value: the distance.
        kind: ``"exact"`` if it is that of the two samples itself; ``"estimate"`` if it is random for given samples, or
            estimates the distance of the two distributions.
        standard_error: of the value; None where the kind is exact.
        rows: numbers of rows of x and y.
        floor: what the distance is for samples of one distribution: mean of the relabelled samples', or a constant;
            None where it was not asked for.
        floor_spread: standard deviation of a value at the floor.
        p_value: of equal distributions against a larger distance; None where it was not asked for.
    """

    name: str
    value: float
    kind: Literal["exact", "estimate"]
    standard_error: float | None
    rows: tuple[int, int]
    floor: float | None = None
    floor_spread: float | None = None
    p_value: float | None = None

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        text = f"{SIGNS[self.kind]} {_with_error(self.value, self.standard_error)}"
        if self.floor is not None:
            text += f" (floor {_with_error(self.floor, self.floor_spread)}"
            if self.p_value is not None:
                text += f", p = {self.p_value:.2g}" if self.p_value > 1e-16 else ", p < 1e-16"
            text += ")"
        return text

    def __repr__(self) -> str:
        return f"Discrepancy({self.name} {self})"


@dataclass(frozen=True)
class Floor:
    """What a distance is between two samples of one distribution; ``float(...)`` gives the mean.

    Attributes:
        value: mean over pairs of samples.
        spread: standard deviation of one value.
        standard_error: of the mean.
        rows: of each sample. repeats: number of pairs.
    """

    value: float
    spread: float
    standard_error: float
    rows: int
    repeats: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{_with_error(self.value, self.spread)} between {self.repeats} pairs of {self.rows} rows"

    def __repr__(self) -> str:
        return f"Floor({self})"


def _with_error(value: float, error: float | None) -> str:
    if error is None:
        return f"{value:.4g}"
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}" if 0 <= digits <= 6 else f"{value:.3g} ± {error:.2g}"


def check_samples(x: Any, y: Any, least: int = 2) -> tuple[Tensor, Tensor]:
    """Two samples as float64 matrices ``(rows, features)`` on the CPU.

    Args:
        x, y: tensors ``(rows, *event_shape)`` of any real dtype. least: how many rows each has to have.

    Raises:
        TypeError, ValueError: for other types, different events, too few rows, numbers that are not finite.
    """
    for name, part in (("x", x), ("y", y)):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a tensor of rows, got {type(part).__name__}: use torch.as_tensor({name})")
        if part.is_complex():
            raise TypeError(f"{name} must be real, got {part.dtype}: take its real and imaginary parts as features")
        if part.dim() < 2 or part.shape[1:].numel() == 0:
            raise ValueError(
                f"{name} must have shape (rows, *event_shape), got {tuple(part.shape)}: one number a row is "
                f"{name}.unsqueeze(-1)"
            )
        if len(part) < least:
            raise ValueError(f"{name} has {len(part)} rows, and a distance between samples needs {least} of each")
        finite = torch.isfinite(part.reshape(len(part), -1)).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"{name} is not finite in {int((~finite).sum())} of {len(part)} rows, first in row {row}: a sampler "
                "that ran away shows here; count such rows on their own, they have no distance"
            )
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"x and y must have events of one shape, got {tuple(x.shape[1:])} and {tuple(y.shape[1:])}: reshape one"
        )
    x, y = (part.detach().to(CPU, torch.float64).flatten(1) for part in (x, y))
    return x, y


def relabellings(rows: tuple[int, int], permutations: int, seed: int) -> Tensor:
    """Which of the pooled rows are called x: the labels as they are, then random ones; bool, ``(1 + R, n + m)``.

    Raises:
        ValueError: for a negative number of permutations.
    """
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 0:
        raise ValueError(f"permutations must be an int of at least 0, got {describe(permutations)}")
    generator = torch.Generator(CPU).manual_seed(seed)
    order = torch.rand(permutations, sum(rows), dtype=torch.float64, generator=generator, device=CPU).argsort(1)
    own = torch.arange(sum(rows), device=CPU).unsqueeze(0)
    return torch.cat([own, order]) < rows[0]


def compare_with_relabelled(values: Tensor, scale: float) -> dict[str, float]:
    """Floor, spread and p-value from the values of :func:`relabellings`, the first of which is the samples' own.

    Args:
        values: ``(1 + R,)``; with R = 0 nothing is said. scale: size of the numbers they are differences of, whose
            rounding must not break a tie.
    """
    own, others = values[0], values[1:]
    if len(others) == 0:
        return {}
    above = int((others >= own - 1e-12 * scale).sum())
    spread = float(others.std()) if len(others) > 1 else math.nan
    return {"floor": float(others.mean()), "floor_spread": spread, "p_value": (1 + above) / (1 + len(others))}


def sampling_floor(
    metric: Callable[..., SupportsFloat], truth: Any, n: int = 2000, repeats: int = 20, seed: int = 0, **settings: Any
) -> Floor:
    r"""What a distance is between two samples of the truth, and how it scatters: what no model can be told from.

    Args:
        metric: called as ``metric(x, y, **settings)``, as :func:`sliced_wasserstein`.
        truth: what has ``sample(n, seed=)``, a toy or a program; or rows ``(rows, *event_shape)``, of which each
            repeat takes two times n, no row twice.
        n: rows of each of the two samples, as many as the number it stands beside was made of.
        repeats: number of pairs. seed: of the draws.
        settings: passed on to the metric; ``permutations=0`` spares the relabelling of each pair.

    Returns:
        :class:`Floor`: mean, standard deviation of one value, standard error of the mean.

    Raises:
        TypeError, ValueError: for a truth that gives no samples, or has fewer than 2 n rows; fewer than 2 repeats.

    Example:
        >>> from pyro_gen import datasets, diagnostics
        >>> truth = datasets.eight_gaussians()
        >>> print(sampling_floor(diagnostics.sliced_wasserstein, truth, 500, 10, permutations=0))
        0.296 ± 0.092 between 10 pairs of 500 rows
    """
    check_count(n, "n")
    if check_count(repeats, "repeats") < 2:
        raise ValueError("repeats must be at least 2: one value has no spread")
    generator = torch.Generator(CPU).manual_seed(seed)
    if isinstance(truth, Tensor):
        if len(truth) < 2 * n:
            raise ValueError(f"truth has {len(truth)} rows and two samples of n = {n} need {2 * n}: take a smaller n")
    elif not callable(getattr(truth, "sample", None)):
        raise TypeError(f"truth must be rows, or have sample(n, seed=) as a toy or a program; got {describe(truth)}")
    values = []
    for _ in range(repeats):
        if isinstance(truth, Tensor):
            pair = truth[torch.randperm(len(truth), generator=generator, device=CPU)[: 2 * n].to(truth.device)]
        else:
            pair = truth.sample(2 * n, seed=int(torch.randint(2**62, (), generator=generator, device=CPU)))
        values.append(float(metric(pair[:n], pair[n:], **settings)))
    found = torch.tensor(values, dtype=torch.float64, device=CPU)
    spread = float(found.std())
    return Floor(float(found.mean()), spread, spread / math.sqrt(repeats), n, repeats)
