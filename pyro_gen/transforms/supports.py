r"""Bounded supports, elementwise: data on an interval or a half-line to the real line.

A flow on :math:`\mathbb{R}^D` becomes a flow on an interval if a fixed map takes the interval there first; the density
it then has refers to the user's own data, for the log-Jacobian of the map is counted with all others. By feature,

- :math:`(a, b)`: the logit :math:`y = \log u - \log v` with :math:`u = (x - a)/(b - a)`, :math:`v = (b - x)/(b - a)`;
  :math:`\log|dy/dx| = -\log(b - a) - \log u - \log v`, and backwards
  :math:`\log|dx/dy| = \log(b - a) + \log\sigma(y) + \log\sigma(-y)`;
- :math:`(a, \infty)`: the inverse softplus :math:`y = d + \log(1 - e^{-d})`, :math:`d = x - a`;
  :math:`\log|dy/dx| = -\log(1 - e^{-d})`, backwards :math:`\log\sigma(y)`. Far from a it is the identity, so that large
  values stay as large as they are; :math:`(-\infty, b)` is its mirror image;
- :math:`(-\infty, \infty)`: the identity.

Distances are taken to both ends, and logarithms of each of them: :math:`1 - u` from a rounded u has no digits left near
b. A distance below the smallest normal number counts as that number. So at an end itself, value and log-Jacobian are
finite and their sum with a base log-density is the limit as nearly as the dtype can say it (that of the uniform density
for a logistic base; −3000 and below for a normal one). Beyond an end the log-Jacobian is −∞, the density 0. Gradients
are finite in every place.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.nn.functional import logsigmoid

from pyro_gen.checks import describe
from pyro_gen.transforms.bijections import Bijection

__all__ = ["Interval"]

KINDS = "interval", "above", "below", "real"


class Interval(Bijection):
    r"""Features between two ends, each finite or not, to the real line: :math:`(a_i, b_i) \to \mathbb{R}`.

    Logit between two finite ends, inverse softplus from a single one, the identity where there is none. Put it first:
    ``Compose([Interval(0.0, 17.0, features=64), Standardise(64), ...])``.

    Args:
        low: lower ends a, a number or ``(D,)``; ``-inf`` for none.
        high: upper ends b, a number or ``(D,)``; ``inf`` for none.
        features: size D of the vectors; may be left out where ``low`` or ``high`` is a tensor.

    Numbers become tensors of the default dtype; for ends that float32 rounds, such as 0.1, give float64 tensors if the
    data are float64.

    Raises:
        TypeError: if an end is neither a number nor a tensor.
        ValueError: if sizes do not fit, ``features`` is missing, or an end is not below the other.

    Example:
        >>> from pyro_gen.transforms import Interval
        >>> y, ladj = Interval(0.0, 17.0, features=2)(torch.tensor([8.5, 8.5]))
        >>> y.tolist(), round(ladj.exp().item() * 17**2, 3)  # (1 / u v)² = 4²
        ([0.0, 0.0], 16.0)
    """

    low: Tensor
    high: Tensor
    order: Tensor

    def __init__(self, low: float | Tensor = 0.0, high: float | Tensor = 1.0, features: int | None = None) -> None:
        low, high = _end(low, "low"), _end(high, "high")
        if features is None:
            features = max(low.numel(), high.numel())
            if low.dim() == high.dim() == 0:
                raise ValueError("features must be given where low and high are numbers: Interval(low, high, features)")
        super().__init__(features)
        for name, end in (("low", low), ("high", high)):
            if end.dim() and end.shape != (self.features,):
                raise ValueError(f"{name} must be a number or of shape ({self.features},), got {tuple(end.shape)}")
        dtype = torch.promote_types(low.dtype, high.dtype)
        self.register_buffer("low", low.detach().to(dtype).expand(self.features).clone())
        self.register_buffer("high", high.detach().to(dtype).expand(self.features).clone())
        pairs = list(zip(self.low.tolist(), self.high.tolist(), strict=True))
        for i, (a, b) in enumerate(pairs):
            if not a < b or a == math.inf or b == -math.inf:
                raise ValueError(f"low must be below high in every feature, got low {a} and high {b} in feature {i}")
            if math.isfinite(a) and math.isfinite(b) and not math.isfinite(float(self.high[i] - self.low[i])):
                raise ValueError(f"high - low overflows {dtype} in feature {i}: use infinite ends there")
        self.kinds = tuple(KINDS[2 * math.isinf(a) + math.isinf(b)] for a, b in pairs)
        self.groups = tuple(kind for kind in KINDS if kind in self.kinds)
        places = {kind: [i for i, k in enumerate(self.kinds) if k == kind] for kind in self.groups}
        for kind, where in places.items():
            self.register_buffer(f"at_{kind}", torch.tensor(where), persistent=False)
        grouped = torch.tensor([i for where in places.values() for i in where])
        self.register_buffer("order", grouped.argsort(), persistent=False)

    @property
    def domain(self) -> Any:
        """A constraint of event dimension 1 for which ``biject_to`` has a transform: NUTS runs on it.

        The ends belong to it: where a sampler's own transform rounds to one, the density is the limit there.
        """
        pieces: list[Any] = []
        lengths, start = [], 0
        for kind, run in groupby(self.kinds):
            length = len(list(run))
            low, high = self.low[start : start + length], self.high[start : start + length]
            if kind == "interval":
                pieces.append(constraints.interval(low, high))
            elif kind == "above":
                pieces.append(constraints.greater_than_eq(low))
            elif kind == "below":
                pieces.append(_LessThanEq(high))
            else:
                pieces.append(constraints.real)
            lengths.append(length)
            start += length
        elementwise = pieces[0] if len(pieces) == 1 else constraints.cat(pieces, dim=-1, lengths=lengths)
        return constraints.independent(elementwise, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _ = self.broadcast(x, None)
        return self._map(x, _FORWARD)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and log|det dx/dy|; x lies strictly between the ends, if need be by one unit of rounding."""
        y, _ = self.broadcast(y, None)
        return self._map(y, _INVERSE)

    def _map(self, x: Tensor, maps: dict[str, Any]) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, self.low.dtype)  # what is next to an end depends on it
        x, low, high = x.to(dtype), self.low.to(dtype), self.high.to(dtype)
        if len(self.groups) == 1:
            y, ladj = maps[self.groups[0]](x, low, high)
            return y, ladj.sum(-1)
        values, total = [], x.new_zeros(x.shape[:-1])
        for kind in self.groups:
            at = self.get_buffer(f"at_{kind}")
            y, ladj = maps[kind](x.index_select(-1, at), low.index_select(-1, at), high.index_select(-1, at))
            values.append(y)
            total = total + ladj.sum(-1)
        return torch.cat(values, -1).index_select(-1, self.order), total


class _LessThanEq(constraints.less_than):
    """Up to an end, included; torch has this for lower ends only."""

    def check(self, value: Tensor) -> Tensor:
        result: Tensor = value <= self.upper_bound
        return result


def _to_less_than_eq(constraint: Any) -> Transform:
    result: Transform = biject_to(constraints.less_than(constraint.upper_bound))
    return result


biject_to.register(_LessThanEq, _to_less_than_eq)
transform_to.register(_LessThanEq, _to_less_than_eq)


def _end(value: float | Tensor, name: str) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} must be a number or a tensor, got {describe(value)}")
    end = torch.as_tensor(value)
    return end if end.is_floating_point() else end.to(torch.get_default_dtype())


def _from_interval(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    width = high - low
    tiny = torch.finfo(x.dtype).tiny
    log_u, log_v = ((distance / width).clamp(tiny, 1.0).log() for distance in (x - low, high - x))
    ladj = -width.log() - log_u - log_v
    return log_u - log_v, ladj.masked_fill((x < low) | (x > high), -math.inf)


def _to_interval(y: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    width = high - low
    x = torch.where(y < 0, low + width * y.sigmoid(), high - width * (-y).sigmoid())  # from the nearer end
    x = x.clamp(torch.nextafter(low, high), torch.nextafter(high, low))
    return x, width.log() + logsigmoid(y) + logsigmoid(-y)


def _from_above(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    distance = (x - low).clamp(min=torch.finfo(x.dtype).tiny)
    gap = (-torch.expm1(-distance)).log()
    return distance + gap, (-gap).masked_fill(x < low, -math.inf)


def _to_above(y: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    x = low - logsigmoid(-y)  # torch's softplus is the identity from 20 on, which is 2e-9 off in float64
    return x.clamp(torch.nextafter(low, high)), logsigmoid(y)


def _from_below(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    y, ladj = _from_above(-x, -high, -low)
    return -y, ladj


def _to_below(y: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    x, ladj = _to_above(-y, -high, -low)
    return -x, ladj


def _same(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.zeros_like(x)


_FORWARD = {"interval": _from_interval, "above": _from_above, "below": _from_below, "real": _same}
_INVERSE = {"interval": _to_interval, "above": _to_above, "below": _to_below, "real": _same}
