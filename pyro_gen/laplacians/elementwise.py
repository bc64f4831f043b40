r"""Functions of one number: the value, f' and f'' of each, all of the size of the value.

.. math:: f(y), \qquad J_k \leftarrow f'(y) J_k, \qquad L \leftarrow f'(y) L + f''(y) \sum_k J_k^2

Formulas are written so that they can be differentiated again (for the gradient in parameters) without NaN where torch
has none, and follow torch in every option: softplus is linear where beta·x exceeds the threshold. A second derivative
of None stands for a piecewise-linear function: zero wherever it exists; see :mod:`pyro_gen.laplacians.kinks`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_gen.laplacians.lifted import Lifted
from pyro_gen.laplacians.rules import refuse, register

__all__ = ["apply", "of_one"]

Formula = tuple[Tensor, Tensor, Tensor | None]
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def apply(x: Lifted, y: Tensor, d1: Tensor, d2: Tensor | None) -> Lifted:
    """The chain rule for an elementwise function with value y and derivatives d1, d2 at x."""
    L = None if x.L is None else d1 * x.L
    if d2 is not None:
        curved = d2 * x.squares()
        L = curved if L is None else L + curved
    if x.g is not None:
        return Lifted(y, x.basis, x.row, g=d1 * x.g, L=L)
    assert x.J is not None
    return Lifted(y, x.basis, x.row, J=d1 * x.J, L=L)


def of_one(*functions: Any) -> Callable[[Callable[..., Formula]], Callable[..., Formula]]:
    """Decorate value and two derivatives of an elementwise function, with its options, as a rule."""

    def enter(formula: Callable[..., Formula]) -> Callable[..., Formula]:
        def lifted(x: Lifted, *args: Any, **kwargs: Any) -> Lifted:
            return apply(x, *formula(x.v, *args, **kwargs))

        lifted.__signature__ = inspect.signature(formula)  # type: ignore[attr-defined]
        register(lifted, functions)
        return formula

    return enter


def _normal(v: Tensor) -> Tensor:
    return torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)


# ------------------------------------------------------------------------------------------------- activations, smooth
@of_one(F.softplus)
def softplus(v: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Formula:
    s, linear = torch.sigmoid(beta * v), beta * v > threshold
    d2 = beta * s * (1 - s)
    return F.softplus(v, beta, threshold), torch.where(linear, 1.0, s), torch.where(linear, 0.0, d2)


@of_one(torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit)
def sigmoid(v: Tensor) -> Formula:
    s = torch.sigmoid(v)
    d1 = s * (1 - s)
    return s, d1, d1 * (1 - 2 * s)


@of_one(torch.tanh, Tensor.tanh, F.tanh)
def tanh(v: Tensor) -> Formula:
    t = torch.tanh(v)
    d1 = 1 - t * t
    return t, d1, -2 * t * d1


@of_one(F.silu)
def silu(v: Tensor) -> Formula:
    s = torch.sigmoid(v)
    d = s * (1 - s)
    return v * s, s + v * d, d * (2 + v * (1 - 2 * s))


@of_one(F.logsigmoid)
def logsigmoid(v: Tensor) -> Formula:
    s = torch.sigmoid(-v)
    return F.logsigmoid(v), s, -s * (1 - s)


@of_one(F.gelu)
def gelu(v: Tensor, approximate: str = "none") -> Formula:
    y = F.gelu(v, approximate=approximate)
    if approximate == "none":
        density, cdf = _normal(v), 0.5 * (1 + torch.erf(v / math.sqrt(2)))
        return y, cdf + v * density, (2 - v * v) * density
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (v + c * v**3))
    t1, u1, u2 = 1 - t * t, k * (1 + 3 * c * v * v), 6 * k * c * v
    return y, 0.5 * (1 + t) + 0.5 * v * t1 * u1, t1 * u1 + 0.5 * v * t1 * (u2 - 2 * t * u1 * u1)


@of_one(F.mish)
def mish(v: Tensor) -> Formula:
    t, s = torch.tanh(F.softplus(v)), torch.sigmoid(v)
    t1 = (1 - t * t) * s
    return v * t, t + v * t1, 2 * t1 + v * (t1 * (1 - s) - 2 * t * t1 * s)


@of_one(F.tanhshrink)
def tanhshrink(v: Tensor) -> Formula:
    t = torch.tanh(v)
    d1 = 1 - t * t
    return v - t, t * t, 2 * t * d1


@of_one(F.softsign)
def softsign(v: Tensor) -> Formula:
    r = 1 / (1 + v.abs())
    return v * r, r * r, -2 * v.sign() * r**3


def _elu(v: Tensor, alpha: float, scale: float, inner: float) -> Formula:
    e, above = torch.exp(v.clamp(max=0.0) * inner), v > 0
    d1 = torch.where(above, scale, scale * alpha * inner * e)
    return torch.where(above, scale * v, scale * alpha * (e - 1)), d1, torch.where(above, 0.0, inner * d1)


@of_one(F.elu)
def elu(v: Tensor, alpha: float = 1.0) -> Formula:
    return F.elu(v, alpha), *_elu(v, alpha, 1.0, 1.0)[1:]


@of_one(F.celu, torch.celu)
def celu(v: Tensor, alpha: float = 1.0) -> Formula:
    return F.celu(v, alpha), *_elu(v, alpha, 1.0, 1 / alpha)[1:]


@of_one(F.selu, torch.selu)
def selu(v: Tensor) -> Formula:
    return F.selu(v), *_elu(v, SELU_ALPHA, SELU_SCALE, 1.0)[1:]


# --------------------------------------------------------------------------------------- activations, piecewise linear
@of_one(F.relu, torch.relu, Tensor.relu)
def relu(v: Tensor) -> Formula:
    return torch.relu(v), (v > 0).to(v.dtype), None


@of_one(F.leaky_relu)
def leaky_relu(v: Tensor, negative_slope: float = 0.01) -> Formula:
    return F.leaky_relu(v, negative_slope), torch.where(v > 0, torch.ones_like(v), negative_slope), None


@of_one(torch.abs, torch.absolute, Tensor.abs, Tensor.absolute, Tensor.__abs__)
def absolute(v: Tensor) -> Formula:
    return v.abs(), v.sign(), None


@of_one(torch.clamp, Tensor.clamp, torch.clip, Tensor.clip)
def clamp(v: Tensor, min: Any = None, max: Any = None) -> Formula:
    y = v.clamp(min, max)
    if y.shape != v.shape:
        refuse("with bounds of a larger shape")
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        refuse("with tensors as bounds")
    inside = torch.ones_like(v, dtype=torch.bool)
    inside = inside if min is None else inside & (v >= min)
    return y, (inside if max is None else inside & (v <= max)).to(v.dtype), None


@of_one(torch.clamp_min, Tensor.clamp_min)
def clamp_min(v: Tensor, min: float) -> Formula:
    return clamp(v, min)


@of_one(torch.clamp_max, Tensor.clamp_max)
def clamp_max(v: Tensor, max: float) -> Formula:
    return clamp(v, None, max)


@of_one(F.hardtanh)
def hardtanh(v: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Formula:
    return clamp(v, min_val, max_val)


@of_one(F.relu6)
def relu6(v: Tensor) -> Formula:
    return clamp(v, 0.0, 6.0)


@of_one(F.hardswish)
def hardswish(v: Tensor) -> Formula:
    middle = v.abs() < 3
    d1 = torch.where(middle, v / 3 + 0.5, (v > 0).to(v.dtype))
    return F.hardswish(v), d1, middle.to(v.dtype) / 3


@of_one(F.threshold, torch.threshold)
def threshold(v: Tensor, threshold: float, value: float) -> Formula:
    return F.threshold(v, threshold, value), (v > threshold).to(v.dtype), None


# ---------------------------------------------------------------------------------------------- exponentials and powers
@of_one(torch.exp, Tensor.exp)
def exp(v: Tensor) -> Formula:
    y = torch.exp(v)
    return y, y, y


@of_one(torch.expm1, Tensor.expm1, torch.special.expm1)
def expm1(v: Tensor) -> Formula:
    e = torch.exp(v)
    return torch.expm1(v), e, e


@of_one(torch.exp2, Tensor.exp2, torch.special.exp2)
def exp2(v: Tensor) -> Formula:
    y, c = torch.exp2(v), math.log(2)
    return y, c * y, c * c * y


@of_one(torch.log, Tensor.log)
def log(v: Tensor) -> Formula:
    r = 1 / v
    return torch.log(v), r, -r * r


@of_one(torch.log2, Tensor.log2)
def log2(v: Tensor) -> Formula:
    r = 1 / v
    return torch.log2(v), r / math.log(2), -r * r / math.log(2)


@of_one(torch.log10, Tensor.log10)
def log10(v: Tensor) -> Formula:
    r = 1 / v
    return torch.log10(v), r / math.log(10), -r * r / math.log(10)


@of_one(torch.log1p, Tensor.log1p, torch.special.log1p)
def log1p(v: Tensor) -> Formula:
    r = 1 / (1 + v)
    return torch.log1p(v), r, -r * r


@of_one(torch.logit, Tensor.logit, torch.special.logit)
def logit(v: Tensor, eps: float | None = None) -> Formula:
    if eps is not None:
        refuse("with eps, which clamps")
    r = 1 / (v * (1 - v))
    return torch.logit(v), r, (2 * v - 1) * r * r


@of_one(torch.sqrt, Tensor.sqrt)
def sqrt(v: Tensor) -> Formula:
    y = torch.sqrt(v)
    return y, 0.5 / y, -0.25 / (y * v)


@of_one(torch.rsqrt, Tensor.rsqrt)
def rsqrt(v: Tensor) -> Formula:
    y = torch.rsqrt(v)
    return y, -0.5 * y**3, 0.75 * y**5


@of_one(torch.reciprocal, Tensor.reciprocal)
def reciprocal(v: Tensor) -> Formula:
    y = torch.reciprocal(v)
    return y, -y * y, 2 * y**3


@of_one(torch.square, Tensor.square)
def square(v: Tensor) -> Formula:
    return v * v, 2 * v, torch.full((), 2.0, dtype=v.dtype, device=v.device).expand(v.shape)


def power(v: Tensor, p: Any) -> Formula:
    """v to a constant power; a zero coefficient keeps 0·∞ at v = 0 away."""
    if isinstance(p, Tensor):
        first, second = p, p * (p - 1)
        d1 = first * v ** torch.where(first == 0, 0.0, p - 1)
        return v**p, d1, second * v ** torch.where(second == 0, 0.0, p - 2)
    if p == 2:
        return square(v)
    d1 = p * v ** (p - 1) if p else torch.zeros_like(v)
    return v**p, d1, p * (p - 1) * v ** (p - 2) if p not in (0, 1) else torch.zeros_like(v)


# ------------------------------------------------------------------------------------------------ angles and hyperbolas
@of_one(torch.sin, Tensor.sin)
def sin(v: Tensor) -> Formula:
    y = torch.sin(v)
    return y, torch.cos(v), -y


@of_one(torch.cos, Tensor.cos)
def cos(v: Tensor) -> Formula:
    y = torch.cos(v)
    return y, -torch.sin(v), -y


@of_one(torch.tan, Tensor.tan)
def tan(v: Tensor) -> Formula:
    t = torch.tan(v)
    return t, 1 + t * t, 2 * t * (1 + t * t)


@of_one(torch.sinh, Tensor.sinh)
def sinh(v: Tensor) -> Formula:
    y = torch.sinh(v)
    return y, torch.cosh(v), y


@of_one(torch.cosh, Tensor.cosh)
def cosh(v: Tensor) -> Formula:
    y = torch.cosh(v)
    return y, torch.sinh(v), y


@of_one(torch.asin, torch.arcsin, Tensor.asin, Tensor.arcsin)
def asin(v: Tensor) -> Formula:
    r = torch.rsqrt(1 - v * v)
    return torch.asin(v), r, v * r**3


@of_one(torch.acos, torch.arccos, Tensor.acos, Tensor.arccos)
def acos(v: Tensor) -> Formula:
    r = torch.rsqrt(1 - v * v)
    return torch.acos(v), -r, -v * r**3


@of_one(torch.atan, torch.arctan, Tensor.atan, Tensor.arctan)
def atan(v: Tensor) -> Formula:
    r = 1 / (1 + v * v)
    return torch.atan(v), r, -2 * v * r * r


@of_one(torch.asinh, torch.arcsinh, Tensor.asinh, Tensor.arcsinh)
def asinh(v: Tensor) -> Formula:
    r = torch.rsqrt(1 + v * v)
    return torch.asinh(v), r, -v * r**3


@of_one(torch.atanh, torch.arctanh, Tensor.atanh, Tensor.arctanh)
def atanh(v: Tensor) -> Formula:
    r = 1 / (1 - v * v)
    return torch.atanh(v), r, 2 * v * r * r


# ---------------------------------------------------------------------------------------------------- special functions
@of_one(torch.erf, Tensor.erf, torch.special.erf)
def erf(v: Tensor) -> Formula:
    d1 = 2 / math.sqrt(math.pi) * torch.exp(-v * v)
    return torch.erf(v), d1, -2 * v * d1


@of_one(torch.erfc, Tensor.erfc, torch.special.erfc)
def erfc(v: Tensor) -> Formula:
    d1 = -2 / math.sqrt(math.pi) * torch.exp(-v * v)
    return torch.erfc(v), d1, -2 * v * d1


@of_one(torch.erfinv, Tensor.erfinv, torch.special.erfinv)
def erfinv(v: Tensor) -> Formula:
    y = torch.erfinv(v)
    d1 = math.sqrt(math.pi) / 2 * torch.exp(y * y)
    return y, d1, 2 * y * d1 * d1


@of_one(torch.special.ndtr)
def ndtr(v: Tensor) -> Formula:
    d1 = _normal(v)
    return torch.special.ndtr(v), d1, -v * d1


@of_one(torch.special.log_ndtr)
def log_ndtr(v: Tensor) -> Formula:
    y = torch.special.log_ndtr(v)
    d1 = torch.exp(-0.5 * v * v - 0.5 * math.log(2 * math.pi) - y)
    return y, d1, -d1 * (v + d1)


@of_one(torch.lgamma, Tensor.lgamma, torch.special.gammaln)
def lgamma(v: Tensor) -> Formula:
    return torch.lgamma(v), torch.digamma(v), torch.polygamma(1, v)


@of_one(torch.digamma, Tensor.digamma, torch.special.digamma, torch.special.psi)
def digamma(v: Tensor) -> Formula:
    return torch.digamma(v), torch.polygamma(1, v), torch.polygamma(2, v)
