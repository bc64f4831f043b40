r"""Shift and scale, elementwise.

:math:`y = x e^{s} + t`, :math:`x = (y - t) e^{-s}`, :math:`\log|dy/dx| = s`. The log-scale is bounded,
:math:`s = L \tanh(r/L)` for the raw parameter r: a network shown an input of :math:`10^{12}` asks for a scale of
:math:`e^{10^{12}}`, which the bound turns into :math:`e^{L}` with a finite value and gradient in both directions, while
near 0 :math:`s \approx r`. With the shift alone (:class:`Shift`) the map preserves volume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gen.checks import describe
from pyro_gen.transforms.elementwise import ElementwiseMap

__all__ = ["Affine", "Shift"]


class Affine(ElementwiseMap):
    r""":math:`y = x e^{s} + t` with :math:`s = L \tanh(r/L)`; ``params`` are (t, r).

    Args:
        bound: L, the largest absolute log-scale.

    References:
        L. Dinh et al., "Density estimation using Real NVP", 2017, arXiv:1605.08803, eqs. 4 and 5.

    Example:
        >>> from pyro_gen.transforms import Affine
        >>> Affine().forward(torch.tensor(2.0), torch.tensor([1.0, 0.0]))
        (tensor(3.), tensor(0.))
    """

    params = 2

    def __init__(self, bound: float = 5.0) -> None:
        if not 0 < bound < 80:
            raise ValueError(f"bound must be between 0 and 80 (e^80 is about float32's largest), got {describe(bound)}")
        self.bound = float(bound)

    def _read(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-1)
        return shift, self.bound * torch.tanh(raw / self.bound)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._read(params)
        y = x * log_scale.exp() + shift
        return y, log_scale.expand(y.shape)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._read(params)
        x = (y - shift) * (-log_scale).exp()
        return x, -log_scale.expand(x.shape)


class Shift(ElementwiseMap):
    r""":math:`y = x + t`; the log-derivative is 0, so volume is preserved.

    References:
        L. Dinh, D. Krueger, Y. Bengio, "NICE: Non-linear independent components estimation", 2015, arXiv:1410.8516,
        sec. 3.2.
    """

    params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = x + params.squeeze(-1)
        return y, torch.zeros_like(y)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = y - params.squeeze(-1)
        return x, torch.zeros_like(x)
