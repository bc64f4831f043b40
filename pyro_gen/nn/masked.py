r"""Masked multilayer perceptron: one network whose i-th block of outputs sees only the inputs before i.

Every unit has a degree, the index of the last input it may depend on. Input i has degree i, the H units of a hidden
layer have the *sorted* degrees :math:`g_j = \lfloor j(D-1)/H \rfloor \in \{0, …, D-2\}`, and a unit is connected to the
units below of degree at most its own; output block i sees units of degree below i. The Jacobian of outputs by inputs is
then strictly lower triangular, by blocks. With a context, which all units may see, some hidden units have degree −1:
they see the context alone, and give the first block its non-linear dependence on it.

As the degrees are sorted, each mask is a staircase: what a degree needs from the layer below is a leading slice. A
sequence :math:`x_0, x_1, …` in which each entry is computed from the output block of the ones before therefore needs
every unit once (:meth:`MaskedMLP.unroll`), the work of one pass, where D passes of the network are the usual way.

The inputs may come in another order than they are stored in: weights stay with their inputs and outputs, and the masks
of the first and the last layer are permuted, so one set of weights serves any number of orders.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from pyro_gen.checks import check_count

__all__ = ["MaskedMLP"]


class _MaskedLinear(nn.Linear):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)  # follows from the sizes

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return linear(input, self.weight * (self.mask if mask is None else mask), self.bias)


class MaskedMLP(nn.Module):
    """Multilayer perceptron whose output block i depends on the inputs before i, and on the context.

    Args:
        features: number D of inputs that come in order.
        outputs: size P of each of the D blocks of outputs.
        hidden: sizes of the hidden layers; ``()`` is a linear map.
        context_features: size of the context, 0 for none.
        inputs: numbers that each input consists of (2 for the cosine and sine of an angle).
        activation: elementwise function between the layers.

    Shapes: ``(..., D * inputs)``, feature by feature, and a context ``(..., context_features)`` to ``(..., D, P)``.

    An ``order``, a permutation of 0 … D − 1 as a tensor of whole numbers, says which feature comes first, second, …;
    "before" is then meant in that order, while inputs and outputs stay where they are.

    References:
        M. Germain et al., "MADE: Masked autoencoder for distribution estimation", 2015, arXiv:1502.03509, eqs. 8, 9.

    Example:
        >>> net = MaskedMLP(3, 2, hidden=(8,))
        >>> x = torch.randn(5, 3)
        >>> y = x + torch.tensor([0.0, 0.0, 1.0])  # no output may see the last input
        >>> bool((net(x) == net(y)).all())
        True
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (128, 128),
        *,
        context_features: int = 0,
        inputs: int = 1,
        activation: Callable[[Tensor], Tensor] = silu,
    ) -> None:
        super().__init__()
        self.features = check_count(features, "features")
        self.outputs = check_count(outputs, "outputs")
        self.inputs = check_count(inputs, "inputs")
        self.context_features = check_count(context_features, "context_features") if context_features else 0
        self.activation = activation
        degrees = [[i for i in range(features) for _ in range(inputs)]]
        for size in hidden:
            check_count(size, "hidden")
            if context_features:
                degrees.append([j * features // size - 1 for j in range(size)])
            else:
                degrees.append([j * (features - 1) // size for j in range(size)])
        #: for every layer of units, how many have a degree below 0, 1, …, D
        self.below = [[bisect_left(units, i) for i in range(features + 1)] for units in degrees]
        degrees.append([i - 1 for i in range(features) for _ in range(outputs)])
        layers = []
        for units, above in pairwise(degrees):
            allowed = torch.tensor(above).unsqueeze(1) >= torch.tensor(units)
            layers.append(_MaskedLinear(allowed.to(torch.get_default_dtype())))
        self.layers = nn.ModuleList(layers)
        first = layers[0].out_features
        self.context = nn.Linear(context_features, first, bias=False) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        layers = cast(list[_MaskedLinear], list(self.layers))
        masks = [layer.mask for layer in layers]
        if order is not None:
            rank = order.argsort()
            masks[0] = self._columns(masks[0], rank)
            masks[-1] = self._rows(masks[-1], rank)
        h = layers[0](x, masks[0])
        if self.context is not None and context is not None:
            h = h + self.context(context)
        for layer, mask in zip(layers[1:], masks[1:], strict=True):
            h = layer(self.activation(h), mask)
        result: Tensor = h.unflatten(-1, (self.features, self.outputs))
        return result

    def _columns(self, matrix: Tensor, index: Tensor) -> Tensor:
        """The columns of a first layer, feature by feature."""
        taken: Tensor = matrix.unflatten(1, (self.features, self.inputs)).index_select(1, index)
        return taken.flatten(1)

    def _rows(self, matrix: Tensor, index: Tensor) -> Tensor:
        """The rows of a last layer (or its bias), feature by feature."""
        taken: Tensor = matrix.unflatten(0, (self.features, self.outputs)).index_select(0, index)
        return taken.flatten(0, 1)

    def unroll(
        self,
        step: Callable[[int, Tensor], Tensor],
        rows: int,
        context: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        """Run the network once over inputs that come to be known one by one.

        ``step(i, block)`` is called for i = 0, …, D − 1 with output block i, ``(rows, P)``, and returns input i,
        ``(rows, inputs)``; under an ``order``, with the block of feature ``order[i]``, and returns that feature. Only
        weights inside the staircase are touched, every hidden unit is computed once, and nothing is written in place:
        gradients of any order flow through.

        Args:
            step: gives the next input.
            rows: number of rows.
            context: ``(rows, context_features)``.
            order: permutation in which the features come; None as they are stored.
        """
        layers = [(layer.weight, layer.bias.unsqueeze(1)) for layer in self.layers if isinstance(layer, nn.Linear)]
        if self.context is not None and context is not None:
            layers[0] = layers[0][0], layers[0][1] + self.context.weight @ context.mT
        if order is not None:
            layers[0] = self._columns(layers[0][0], order), layers[0][1]
            layers[-1] = self._rows(layers[-1][0], order), self._rows(layers[-1][1], order)
        known: list[Tensor | None] = [None for _ in layers]  # units below each layer that are known, (count, rows)

        def apply(depth: int, start: int, stop: int) -> Tensor:
            """Units start … stop above layer ``depth``, before the activation, ``(stop - start, rows)``."""
            weight, bias = layers[depth]
            units, bias = known[depth], bias[start:stop]
            if units is None:
                return bias.expand(stop - start, rows)
            return torch.addmm(bias, weight[start:stop, : units.shape[0]], units)

        def learn(depth: int, units: Tensor) -> None:
            before = known[depth]
            known[depth] = units if before is None else torch.cat([before, units])

        last = len(layers) - 1
        for i in range(self.features):
            for depth in range(last):  # the hidden units of degree i - 1
                start, stop = self.below[depth + 1][i - 1] if i else 0, self.below[depth + 1][i]
                if stop > start:
                    learn(depth + 1, self.activation(apply(depth, start, stop)))
            x = step(i, apply(last, i * self.outputs, (i + 1) * self.outputs).mT)
            if i + 1 < self.features:
                learn(0, x.mT)
