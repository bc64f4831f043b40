"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with an activation between them, over a vector and an optional context vector beside it.

    Args:
        features: size of the input vector.
        outputs: size of the output.
        hidden: sizes of the hidden layers; ``()`` is a linear map.
        context_features: size of the context vector, 0 for none.
        activation: class of the activation between the layers.
        output_bias: whether the last layer has a bias.

    Shapes: ``(..., features)`` and a context ``(..., context_features)``, expanded over the leading dimensions, to
    ``(..., outputs)``.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (128, 128),
        *,
        context_features: int = 0,
        activation: type[nn.Module] = nn.SiLU,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = [features + context_features, *hidden]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs, bias=output_bias))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = torch.cat([x, context.expand(*x.shape[:-1], context.shape[-1])], -1)
        result: Tensor = self.layers(x)
        return result
