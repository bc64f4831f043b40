r"""The statistics of the KL benchmark.

One fitted flow q is judged on fixed test rows by :math:`r_i = \log p(x_i) - \log q(x_i)`: their mean estimates
KL(p ‖ q) and its standard error is that of the rows. Two comparisons of libraries answer two questions:

- *over seeds*: each seed gives a difference of the two libraries' KLs on the same rows, with the same order of batches.
  The mean of the differences has the standard error of the five, and speaks about training again.
- *over rows*: :math:`\log q_A(x_i) - \log q_B(x_i)`, averaged over the seeds at each row, is a difference a row; the
  standard error over rows speaks about these very fits on other test rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "Fit", "paired_over_rows", "paired_over_seeds", "summarise"]

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True)
class Fit:
    """One fitted flow on the test rows: KL, and the median and 99.9 % quantile of log p − log q."""

    kl: Estimate
    median: float
    quantile: float


def mean(values: Rows) -> Estimate:
    """Mean and standard error of independent values."""
    if len(values) < 2:
        return Estimate(float(values.mean()), math.nan)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


def summarise(log_p: Rows, log_q: Rows) -> Fit:
    difference = log_p - log_q
    return Fit(mean(difference), float(np.median(difference)), float(np.quantile(difference, 0.999)))


def paired_over_seeds(ours: Rows, theirs: Rows) -> Estimate:
    """KL of ours minus KL of theirs, from one KL a seed of each."""
    if ours.shape != theirs.shape:
        raise ValueError(f"pairs need the same seeds, got {ours.shape} and {theirs.shape}")
    return mean(ours - theirs)


def paired_over_rows(ours: Rows, theirs: Rows) -> Estimate:
    """KL of ours minus KL of theirs, from log q ``(seeds, rows)`` of each on the same rows."""
    if ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(f"pairs need the same rows, got {ours.shape} and {theirs.shape}")
    return mean(theirs.mean(0) - ours.mean(0))
