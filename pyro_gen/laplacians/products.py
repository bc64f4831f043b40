r"""Sums, products and linear maps of lifted tensors and constants.

A product is linear in each factor, so with :math:`m(y, z)` for any of them (`*`, ``matmul``, ``einsum``)

.. math:: J_k = m(J_k^y, z) + m(y, J_k^z), \qquad
          L = m(L^y, z) + m(y, L^z) + 2 \sum_k m(J_k^y, J_k^z) .

Rows must stay apart: two lifted tensors meet only with their rows in the same place, and rows are never summed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_gen.laplacians.elementwise import apply, power
from pyro_gen.laplacians.lifted import FACTOR, Basis, Lifted, common, contract
from pyro_gen.laplacians.rules import refuse, rule

__all__ = ["broadcast", "mask"]


def broadcast(x: Lifted, shape: torch.Size) -> Lifted:
    """Expand to a shape, its rows staying what they are."""
    if x.v.shape == shape:
        return x
    if shape[x.row] != x.rows:
        refuse("that repeats rows")
    J = x.dense()
    new = (1,) * (len(shape) - x.v.dim())
    sizes = list(shape)
    sizes[x.row] = J.shape[x.row]
    J = J.reshape(J.shape[0], *new, *J.shape[1:]).expand(J.shape[0], *sizes)
    L = None if x.L is None else x.L.expand(shape)
    return Lifted(x.v.expand(shape), x.basis, x.row, J=J, L=L)


def shape_of(*values: Any) -> torch.Size:
    """The shape that tensors (and numbers) broadcast to."""
    shapes = [x.v.shape if isinstance(x, Lifted) else x.shape for x in values if isinstance(x, Tensor)]
    return cast(torch.Size, torch.broadcast_shapes(*shapes))


def together(a: Lifted, b: Lifted) -> tuple[Lifted, Lifted]:
    """Two lifted tensors in one basis and one shape."""
    if a.row != b.row:
        refuse("that pairs rows with rows")
    x, y = common(a, b)
    shape = shape_of(x, y)
    return broadcast(x, shape), broadcast(y, shape)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def scale(x: Lifted, v: Tensor, factor: Any) -> Lifted:
    """The value v = x · factor, for a constant factor that does not enlarge x."""
    L = None if x.L is None else x.L * factor
    if x.g is not None:
        return Lifted(v, x.basis, x.row, g=x.g * factor, L=L)
    assert x.J is not None
    return Lifted(v, x.basis, x.row, J=x.J * factor, L=L)


def shift(x: Lifted, constant: Any) -> Lifted:
    x = broadcast(x, shape_of(x, constant))
    return Lifted(x.v + constant, x.basis, x.row, g=x.g, J=x.J, L=x.L)


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, lifted=2)
def add(a: Any, b: Any, alpha: float = 1) -> Lifted:
    if alpha != 1:
        b = b * alpha
    if not isinstance(b, Lifted):
        return shift(a, b)
    if not isinstance(a, Lifted):
        return shift(b, a)
    x, y = together(a, b)
    v, L = x.v + y.v, plus(x.L, y.L)
    if x.g is not None and y.g is not None:
        return Lifted(v, x.basis, x.row, g=x.g + y.g, L=L)
    return Lifted(v, x.basis, x.row, J=x.dense() + y.dense(), L=L)


@rule(torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__)
def neg(x: Lifted) -> Lifted:
    return scale(x, -x.v, -1)


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__, lifted=2)
def sub(a: Any, b: Any, alpha: float = 1) -> Lifted:
    return add(a, -b, alpha)


@rule(torch.rsub, Tensor.__rsub__, lifted=2)
def rsub(a: Any, b: Any, alpha: float = 1) -> Lifted:
    return add(b, -a, alpha)


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, lifted=2)
def mul(a: Any, b: Any) -> Lifted:
    if not isinstance(a, Lifted):
        a, b = b, a
    if not isinstance(b, Lifted):
        x = broadcast(a, shape_of(a, b))
        return scale(x, x.v * b, b)
    x, y = together(a, b)
    L = 2 * contract(x, y)
    for one, other in ((x, y), (y, x)):
        if one.L is not None:
            L = L + one.L * other.v
    v = x.v * y.v
    if x.g is not None and y.g is not None:
        return Lifted(v, x.basis, x.row, g=x.g * y.v + y.g * x.v, L=L.expand(v.shape))
    return Lifted(v, x.basis, x.row, J=x.dense() * y.v + y.dense() * x.v, L=L.expand(v.shape))


@rule(
    *(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__),
    lifted=2,
)
def div(a: Any, b: Any, rounding_mode: None = None) -> Lifted:
    if rounding_mode is not None:
        refuse("with a rounding mode")
    if isinstance(b, Lifted):
        return cast(Lifted, a * torch.reciprocal(b))
    x = broadcast(a, shape_of(a, b))
    return scale(x, x.v / b, 1 / b)


@rule(Tensor.__rtruediv__, Tensor.__rdiv__)
def rdiv(x: Lifted, constant: Any) -> Any:
    return torch.reciprocal(x) * constant


@rule(torch.pow, torch.float_power, Tensor.pow, Tensor.float_power, Tensor.__pow__, lifted=2)
def pow(a: Any, b: Any) -> Any:
    if not isinstance(b, Lifted):
        x = broadcast(a, shape_of(a, b))
        return apply(x, *power(x.v, b))
    return torch.exp(b * (torch.log(a) if isinstance(a, Tensor) else math.log(a)))


@rule(Tensor.__rpow__)
def rpow(x: Lifted, base: Any) -> Any:
    return pow(base, x)


@rule(torch.addcmul, Tensor.addcmul, lifted=3)
def addcmul(start: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    return start + value * (a * b)


@rule(torch.addcdiv, Tensor.addcdiv, lifted=3)
def addcdiv(start: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    return start + value * (a / b)


@rule(torch.lerp, Tensor.lerp, lifted=3)
def lerp(start: Any, end: Any, weight: Any) -> Any:
    return start + (end - start) * weight


@rule(torch.xlogy, Tensor.xlogy, torch.special.xlogy, lifted=2)
def xlogy(a: Any, b: Any) -> Any:
    if isinstance(a, Lifted):
        return a * torch.log(b)
    if isinstance(a, Tensor):
        return torch.log(torch.where(a == 0, 1.0, b)) * a
    return torch.log(b) * a if a else torch.zeros_like(b)


@rule(torch.logaddexp, Tensor.logaddexp, lifted=2)
def logaddexp(a: Any, b: Any) -> Any:
    if not isinstance(a, Lifted):
        a, b = b, a
    return a + F.softplus(b - a)


@rule(F.mse_loss, lifted=2)
def mse_loss(input: Any, target: Any, reduction: str = "mean") -> Any:
    if reduction != "none":
        refuse("that adds rows")
    return torch.square(input - target)


@rule(F.binary_cross_entropy_with_logits, lifted=2)
def binary_cross_entropy_with_logits(input: Any, target: Any, reduction: str = "mean") -> Any:
    if reduction != "none":
        refuse("that adds rows")
    return F.softplus(input) - input * target


# --------------------------------------------------------------------------------------------------------------- choice
def mask(keep: Any, x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.where(keep, x, 0.0)


@rule(torch.where, lifted=3)
def where(condition: Tensor, a: Any, b: Any) -> Lifted:
    if isinstance(condition, Lifted):
        refuse("with a condition that is differentiated")
    shape = shape_of(condition, a, b)
    values = [x.v if isinstance(x, Lifted) else x for x in (a, b)]
    v = torch.where(condition, *values)
    if not (isinstance(a, Lifted) and isinstance(b, Lifted)):
        keep, x = (condition, a) if isinstance(a, Lifted) else (~condition, b)
        x = broadcast(x, shape)
        return Lifted(v, x.basis, x.row, g=mask(keep, x.g), J=mask(keep, x.J), L=mask(keep, x.L))
    x, y = together(broadcast(a, shape), broadcast(b, shape))
    L = None if x.L is None and y.L is None else torch.where(condition, x.zero(), y.zero())
    if x.g is not None and y.g is not None:
        return Lifted(v, x.basis, x.row, g=torch.where(condition, x.g, y.g), L=L)
    return Lifted(v, x.basis, x.row, J=torch.where(condition, x.dense(), y.dense()), L=L)


@rule(Tensor.where, lifted=3)
def where_method(a: Any, condition: Tensor, b: Any) -> Lifted:
    return where(condition, a, b)


@rule(torch.masked_fill, Tensor.masked_fill)
def masked_fill(x: Lifted, mask: Tensor, value: Any) -> Lifted:
    return where(mask, torch.as_tensor(value, dtype=x.v.dtype, device=x.v.device), x)


@rule(torch.maximum, Tensor.maximum, lifted=2)
def maximum(a: Any, b: Any) -> Lifted:
    return where(a >= b, a, b)


@rule(torch.minimum, Tensor.minimum, lifted=2)
def minimum(a: Any, b: Any) -> Lifted:
    return where(a <= b, a, b)


# ---------------------------------------------------------------------------------------------------------- linear maps
@rule(F.linear)
def linear(x: Lifted, weight: Tensor, bias: Tensor | None = None) -> Lifted:
    if x.row == -1:
        refuse("that sums over rows")
    v = F.linear(x.v, weight, bias)
    L = None if x.L is None else F.linear(x.L, weight)
    if x.g is None or x.v.dim() != 2 or x.row != -2:
        return Lifted(v, x.basis, x.row, J=F.linear(x.dense(), weight), L=L)
    basis, outputs = x.basis, weight.shape[0]
    if x.g.shape[0] == 1:
        matrix = basis.select(weight * x.g)
        if basis.root is basis and 1 < outputs * FACTOR <= basis.features and outputs > 1:
            new = Basis(outputs, (0, outputs), root=basis, matrix=matrix)
            return Lifted(v, new, -2, g=v.new_ones(()).expand(1, outputs), L=L)
        return Lifted(v, basis, -2, J=matrix.t().unsqueeze(1), L=L)
    J = basis.select(weight).t().unsqueeze(1) * basis.select(x.g).t().unsqueeze(-1)
    return Lifted(v, basis, -2, J=J, L=L)


@rule(torch.matmul, torch.mm, torch.bmm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, lifted=2)
def matmul(a: Any, b: Any) -> Any:
    if isinstance(a, Lifted) and isinstance(b, Lifted):
        return product(a, b)
    if isinstance(a, Lifted):
        if a.row == -1:
            refuse("that sums over rows")
        if b.dim() == 1:
            return linear(a, b.unsqueeze(0)).squeeze(-1)
        if b.dim() == 2:
            return linear(a, b.t())
        a = broadcast(a, torch.Size((1,) * max(0, b.dim() - a.v.dim()) + a.v.shape))
        return a.linear(lambda t: t @ b)
    if b.v.dim() == 1 or b.row == -2:
        refuse("that sums over rows")
    if a.dim() == 1:
        return (a.unsqueeze(0) @ b).squeeze(-2)
    b = broadcast(b, torch.Size((1,) * max(0, a.dim() - b.v.dim()) + b.v.shape))
    return b.linear(lambda t: a @ t)


def product(a: Lifted, b: Lifted) -> Lifted:
    if a.row != b.row or a.row > -3:
        refuse("that pairs rows with rows")
    x, y = common(a, b)
    dims = max(x.v.dim(), y.v.dim())
    x, y = (broadcast(t, torch.Size((1,) * (dims - t.v.dim()) + t.v.shape)).densely() for t in (x, y))
    assert x.J is not None
    assert y.J is not None
    L = 2 * (x.J @ y.basis.metric(y.J)).sum(0)
    L = L if x.L is None else L + x.L @ y.v
    L = L if y.L is None else L + x.v @ y.L
    v = x.v @ y.v
    return Lifted(v, x.basis, x.row, J=x.J @ y.v + x.v @ y.J, L=L.expand(v.shape))


@rule(torch.addmm, torch.baddbmm, torch.addmv, Tensor.addmm, Tensor.baddbmm, Tensor.addmv, lifted=3)
def addmm(start: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return beta * start + alpha * (a @ b)


def by_image(x: Lifted, function: Callable[[Tensor, Tensor | None], Tensor], bias: Tensor | None, dims: int) -> Lifted:
    """A linear map of images of so many dimensions: directions and rows go through it as one batch."""
    if x.v.dim() != dims + 2 or x.row != -x.v.dim():
        refuse("unless rows come first")

    def each(t: Tensor, bias: Tensor | None = None) -> Tensor:
        y = function(t.reshape(-1, *t.shape[-dims - 1 :]), bias)
        return y.reshape(*t.shape[: -dims - 1], *y.shape[1:])

    y = x.linear(each)
    return y if bias is None else Lifted(each(x.v, bias), y.basis, y.row, J=y.J, L=y.L)


def _enter_convolution(dims: int, plain: Any, transposed: Any) -> None:
    @rule(plain)
    def convolution(
        x: Lifted,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Lifted:
        return by_image(x, lambda t, b: plain(t, weight, b, stride, padding, dilation, groups), bias, dims)

    @rule(transposed)
    def convolution_transposed(
        x: Lifted,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Lifted:
        options = stride, padding, output_padding, groups, dilation
        return by_image(x, lambda t, b: transposed(t, weight, b, *options), bias, dims)


_enter_convolution(1, torch.conv1d, torch.conv_transpose1d)
_enter_convolution(2, torch.conv2d, torch.conv_transpose2d)
_enter_convolution(3, torch.conv3d, torch.conv_transpose3d)


@rule(torch.linalg.solve_triangular, lifted=2)
def solve_triangular(A: Any, B: Any, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Lifted:
    if isinstance(A, Lifted):
        refuse("with a matrix that depends on x")
    if B.row == (-2 if left else -1):
        refuse("that mixes rows")
    if A.dim() > B.v.dim():
        refuse("with more batch dimensions than the right hand side")

    def solve(t: Tensor) -> Tensor:
        y: Tensor = torch.linalg.solve_triangular(A, t, upper=upper, left=left, unitriangular=unitriangular)
        return y

    return cast(Lifted, B.linear(solve))
