r"""Networks of a vector at a noise level.

The level :math:`\ell = \log \sigma/\alpha` runs over some fourteen nats, and what to do changes with each. Three
things make a small network good at all of them.

*The level multiplies.* Its sines and cosines at several frequencies scale every hidden layer before the activation:
the slopes of the answer grow with :math:`1/\sigma`, which a sum of layer and level learns slowly.

*Waves.* A vector of few features is given as sines in random directions too, of trained frequencies from half the
spread of the data down to a fiftieth: without them the fine structure of low noise is learnt last (Tancik et al. 2020).

*The ends are known.* Let y be a unit-variance mixture of datum and noise with the shares :math:`\bar\alpha =
\alpha/r, \bar\sigma = \sigma/r, r^2 = \alpha^2 + \sigma^2`. All that can be predicted of standard normal data is a
multiple of y: :math:`\bar\sigma y` for the noise, :math:`\bar\alpha y` for the datum, 0 for v, their difference for a
velocity. What data that are not normal add to it vanishes at both ends: towards pure noise nothing is known of them,
and towards none a smooth density is flat on the scale of the noise. So a network N answers

.. math:: F = g(\ell)\, N(y, \ell) + (p\, \bar\sigma + q\, \bar\alpha)\, y, \qquad
          g(\ell) = s(\ell + 4)\; s(2 - \ell)

with the sigmoid s, and p and q by what F is. Without this most of the error of a small network sits at the ends,
where the weight of the likelihood is greatest.

References:
    M. Tancik et al., "Fourier features let networks learn high frequency functions in low dimensional domains", 2020,
    arXiv:2006.10739; E. Perez et al., "FiLM: visual reasoning with a general conditioning layer", 2018,
    arXiv:1709.07871.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_gen.checks import check_count, check_sizes

__all__ = ["LevelFeatures", "LevelGate", "TimeMLP"]


class LevelFeatures(nn.Module):
    """A noise level as sines and cosines at frequencies half an octave apart, the slowest monotone over 32 nats.

    Args:
        frequencies: their number.

    Shapes: ``(...)`` to ``(..., outputs)``, with ``outputs = 2 * frequencies``.
    """

    bands: Tensor
    phases: Tensor

    def __init__(self, frequencies: int = 12) -> None:
        super().__init__()
        bands = math.pi / 32 * 2.0 ** (torch.arange(check_count(frequencies, "frequencies")) / 2)
        self.register_buffer("bands", torch.cat([bands, bands]))
        self.register_buffer("phases", math.pi / 2 * (torch.arange(2 * frequencies) >= frequencies))  # cosines
        self.outputs = 2 * frequencies

    def forward(self, level: Tensor) -> Tensor:
        return torch.addcmul(self.phases, level.unsqueeze(-1), self.bands).sin()


class LevelGate(nn.Module):
    r"""The known ends of a prediction, :math:`g(\ell)\, N + (p\, \bar\sigma + q\, \bar\alpha)\, y`: see the module.

    Args:
        linear: p and q: (1, 0) for a prediction of ε, (0, 1) of the datum, (0, 0) of v, (1, −1) of a straight velocity.

    Shapes: a network's output and y with the same dimensions, level of those before ``dim``, to the shape of the
    output. Where the output has more entries along ``dim`` than y, those after the first are left as they are.
    """

    def __init__(self, linear: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.linear = float(linear[0]), float(linear[1])

    def forward(self, out: Tensor, y: Tensor, level: Tensor, dim: int = -1) -> Tensor:
        level = level.reshape(*level.shape, *[1] * -dim)
        gate = (level + 4).sigmoid() * (2 - level).sigmoid()
        first, rest = out, None
        if out.shape[dim] > y.shape[dim]:
            first, rest = out.split([y.shape[dim], out.shape[dim] - y.shape[dim]], dim)
        first = gate * first
        for share, sign in zip(self.linear, (2, -2), strict=True):
            if share:
                first = torch.addcmul(first, y, (sign * level).sigmoid().sqrt(), value=share)
        return first if rest is None else torch.cat([first, rest], dim)

    def extra_repr(self) -> str:
        return f"linear={self.linear}"


class TimeMLP(nn.Module):
    """Multilayer perceptron over a vector, its noise level and a context.

    Args:
        features: size of the vector, of variance about 1.
        outputs: of the result; where it is more than ``features``, those after the first are not gated.
        hidden: sizes of the hidden layers.
        context_features: size of the context vector, 0 for none.
        frequencies: sines and cosines of the level.
        waves: octaves of sines of the vector, 16 in random directions for each, 0 for none: for few features.
        activation: class of the activation between the layers.
        gated: whether the result has the ends of `LevelGate`, which needs as many outputs as features, or more.
        linear: p and q of the gate: what F is for standard normal data.

    Shapes: y ``(..., features)``, level ``(...)``, context ``(..., context_features)``, to ``(..., outputs)``.

    Example:
        >>> import torch
        >>> TimeMLP(2, 2)(torch.zeros(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (128, 128, 128),
        *,
        context_features: int = 0,
        frequencies: int = 12,
        waves: int = 0,
        activation: type[nn.Module] = nn.SiLU,
        gated: bool = True,
        linear: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        sizes = check_sizes(hidden)
        if not sizes:
            raise ValueError("hidden must have one size at least: the level scales hidden layers; got ()")
        if gated and outputs < features:
            raise ValueError(f"gated=True needs an output for each of {features} features, got outputs={outputs}")
        self.level = LevelFeatures(frequencies)
        count = 16 * waves
        directions = torch.nn.functional.normalize(torch.randn(count, features), dim=-1)
        octaves = (torch.arange(count) + 0.5) / 16  # upwards from a period of 4 standard deviations
        self.waves = nn.Linear(features, count) if waves else None
        if self.waves is not None:
            with torch.no_grad():
                self.waves.weight.copy_(directions * (math.pi / 2 * 2.0**octaves).unsqueeze(-1))
                self.waves.bias.uniform_(0, 2 * math.pi)
        inputs = [features + count + context_features, *sizes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(inputs))
        self.activations = nn.ModuleList(activation() for _ in sizes)
        self.sizes = list(sizes)
        self.scales = nn.Linear(self.level.outputs + context_features, sum(sizes))
        self.out = nn.Linear(sizes[-1], outputs)
        self.gate = LevelGate(linear) if gated else None

    def forward(self, y: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        parts, given = [y], [self.level(level)]
        if self.waves is not None:
            parts.append(self.waves(y).sin())
        if context is not None:
            context = context.expand(*y.shape[:-1], context.shape[-1])
            parts.append(context)
            given.append(context)
        h = torch.cat(parts, -1) if len(parts) > 1 else y
        scales = self.scales(torch.cat(given, -1) if len(given) > 1 else given[0]).split(self.sizes, -1)
        for layer, scale, activation in zip(self.layers, scales, self.activations, strict=True):
            h = layer(h)
            h = activation(torch.addcmul(h, h, scale))
        result: Tensor = self.out(h)
        return result if self.gate is None else self.gate(result, y, level)
