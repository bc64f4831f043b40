"""Averages of the iterates: an exponential moving average, or the mean over the tail of the run.

The noise of stochastic gradients keeps the last iterate at a distance from the optimum; the mean of many iterates has
less of it (Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Average"]


class Average:
    """A running average of tensors.

    Args:
        tensors: the live tensors, updated in place by the optimizer.
        kind: a decay in (0, 1) for an exponential moving average with bias correction (the weight of the start is
            divided out), or ``"tail"`` for the mean over the steps from ``start`` on.
        start: step from which ``"tail"`` averages.
    """

    def __init__(self, tensors: list[Tensor], kind: float | str, start: int = 0) -> None:
        if kind != "tail" and (isinstance(kind, (bool, str)) or not 0 < kind < 1):
            raise ValueError(f"average must be 'tail', or a decay in (0, 1) such as 0.999, got {kind!r}")
        self.tensors, self.kind, self.start = tensors, kind, start
        self.mean = [t.detach().clone() for t in tensors]
        self.count = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the live tensors after ``step`` steps."""
        if self.kind == "tail":
            if step <= self.start:
                return
            self.count += 1
            weight = 1 / self.count
        else:
            assert isinstance(self.kind, float)
            self.count += 1
            weight = (1 - self.kind) / (1 - self.kind**self.count)
        torch._foreach_lerp_(self.mean, [t.detach() for t in self.tensors], weight)

    @torch.no_grad()
    def apply(self) -> None:
        """Write the average into the live tensors; before the first update there is nothing to write."""
        if self.count:
            torch._foreach_copy_([t.detach() for t in self.tensors], self.mean)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The live tensors hold the average inside, and are as they were afterwards."""
        kept = [t.detach().clone() for t in self.tensors]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([t.detach() for t in self.tensors], kept)
