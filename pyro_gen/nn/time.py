r"""Networks of a vector at a noise level.

The level :math:`\ell = \log \sigma/\alpha` runs over some twenty nats, and what the network must do changes with each:
its embedding is sines and cosines of ℓ at several frequencies. A vector of few features gets the same treatment, sines
and cosines of each feature, without which a multilayer perceptron learns the fine structure of low noise slowly.

References:
    M. Tancik et al., "Fourier features let networks learn high frequency functions in low dimensional domains", 2020,
    arXiv:2006.10739.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_gen.nn.mlp import MLP

__all__ = ["TimeMLP"]


class TimeMLP(nn.Module):
    """Multilayer perceptron over a vector, its noise level and a context.

    Args:
        features: size of the vector; outputs: of the result; hidden: sizes of the hidden layers.
        context_features: size of the context vector, 0 for none.
        frequencies: sines and cosines of the level; waves: of each feature, 0 for none.

    Shapes: y ``(rows, features)``, level ``(rows,)``, context ``(rows, context_features)``, to ``(rows, outputs)``.
    """

    bands: Tensor
    waves: Tensor

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (128, 128, 128),
        *,
        context_features: int = 0,
        frequencies: int = 8,
        waves: int = 0,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.register_buffer("bands", math.pi / 8 * 2.0 ** (torch.arange(frequencies) / 2))
        self.register_buffer("waves", math.pi / 2 * 2.0 ** torch.arange(waves))
        inputs = features * (1 + 2 * waves) + 1 + 2 * frequencies
        self.mlp = MLP(inputs, outputs, hidden, context_features=context_features, activation=activation)

    def forward(self, y: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        level = level.unsqueeze(-1)
        angles = level * self.bands
        parts = [y, level / 4, angles.sin(), angles.cos()]
        if len(self.waves):
            turned = (y.unsqueeze(-1) * self.waves).flatten(-2)
            parts += [turned.sin(), turned.cos()]
        result: Tensor = self.mlp(torch.cat(parts, -1), context)
        return result
