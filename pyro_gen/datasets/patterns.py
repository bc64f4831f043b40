r"""Binary pictures whose probabilities are known: bars and stripes.

A picture of n × n pixels has all its rows alike (bars) or all its columns alike (stripes): :math:`2^n` patterns of
either kind, of which the empty and the full picture are both, so :math:`2^{n+1} - 2` in all. Each is equally likely, so

.. math:: p(x) = \frac{1}{2^{n+1} - 2} \text{ on the patterns}, \qquad H = \log(2^{n+1} - 2) .

No model has a mean log-likelihood above −H on the patterns. The set is small enough to enumerate, and hard enough for
Markov chains to fail on: patterns are at least n pixels apart, with nothing between them.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pyro_gen.checks import check_count
from pyro_gen.datasets.densities import CPU, Toy

__all__ = ["BarsAndStripes", "bars_and_stripes"]

LARGEST = 12  # 8190 patterns of 144 pixels


class BarsAndStripes(Toy):
    """The distribution; ``log_prob`` is the log of a probability, ``entropy`` that of a discrete x.

    Args:
        size: n, pixels along a side.

    Attributes:
        patterns: all of them, float32, ``(2 ** (n + 1) - 2, n * n)``, rows of pixels one after the other.
    """

    def __init__(self, size: int) -> None:
        if check_count(size, "size") > LARGEST or size < 2:
            raise ValueError(f"size must be from 2 to {LARGEST}, got {size}")
        super().__init__("bars_and_stripes", {"size": size}, size * size)
        with CPU:
            lines = torch.tensor(list(itertools.product((0.0, 1.0), repeat=size)))
            bars = lines.unsqueeze(2).expand(-1, size, size).reshape(len(lines), -1)
            stripes = lines.unsqueeze(1).expand(-1, size, size).reshape(len(lines), -1)
            self.patterns = torch.cat([bars, stripes[1:-1]])

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        return self.patterns[torch.randint(len(self.patterns), (n,), generator=generator)]

    def _log_prob(self, x: Tensor) -> Tensor:
        size = math.isqrt(x.shape[-1])
        picture = x.reshape(-1, size, size)
        binary = ((picture == 0) | (picture == 1)).flatten(1).all(1)
        bars = (picture == picture[:, :, :1]).flatten(1).all(1)
        stripes = (picture == picture[:, :1]).flatten(1).all(1)
        value = torch.full_like(picture[:, 0, 0], -self._entropy())
        return value.masked_fill(~(binary & (bars | stripes)), -math.inf)

    def _entropy(self) -> float:
        return math.log(len(self.patterns))


def bars_and_stripes(size: int = 3) -> BarsAndStripes:
    r"""Pictures of size × size binary pixels, all rows or all columns alike; :math:`2^{n+1} - 2` equally likely ones.

    .. math:: p(x) = 1 / (2^{n+1} - 2), \qquad H = \log(2^{n+1} - 2)

    Args:
        size: n, pixels along a side, 2 to 12.

    Returns:
        The distribution; ``patterns`` has all of them.

    Raises:
        ValueError: for another size.

    References:
        D. MacKay (2003), Information Theory, Inference, and Learning Algorithms, section 43.3 (there the empty and the
        full picture are twice as likely as the others).

    Example:
        >>> toy = bars_and_stripes(3)
        >>> toy.patterns.shape, round(toy.entropy, 4)
        (torch.Size([14, 9]), 2.6391)
    """
    return BarsAndStripes(size)
