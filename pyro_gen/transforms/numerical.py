r"""The inverse of an increasing triangular map that has none in closed form, with implicit derivatives.

A map :math:`y = f(x)` whose :math:`y_i` depends on :math:`x_0 \dots x_i` only, increases in :math:`x_i` and takes every
real value is a bijection of :math:`R^D`: coordinate after coordinate, its inverse is one equation in one unknown.

**The root.** The number of steps may not depend on the values (then calls vectorise, trace and compile), so only the
worst case counts, and there no method that looks at one point a step beats bisection (K. Sikorski, "Bisection is
optimal", Numerische Mathematik 40, 1982). It runs first over :math:`t = \operatorname{arsinh} x`,
which finds the order of magnitude (what doubling a bracket does, in the logarithm of its number of steps), then over x
down to the last bit: 64 steps in double precision, 32 in single.

**The derivatives** come from :math:`f(x(\theta), \theta) = y` and not from the steps. With the root :math:`x_0` and the
Jacobian J there held fixed, the chord iteration

.. math:: x_{k+1} = x_k - J^{-1}\,(f(x_k, \theta) - y)

does not move the value, but as a function of y and θ (weights, context) it has an error :math:`e_k = x_k - x(\theta)`
with :math:`e_{k+1} = (I - J^{-1}\bar J)\, e_k`, in which both factors are :math:`O(\delta\theta)`: after n rounds
:math:`e_n = O(\delta\theta^{n+1})`, and the derivatives up to order n are exact. Each round is one pass of f and one
triangular solve; three serve the weight gradient of a score-matching loss, which is of third order. The log-determinant
is minus that of f at this x, so its derivative is the total one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_gen.checks import check_count
from pyro_gen.transforms.bijections import Bijection

__all__ = ["Triangular", "implicit", "increasing_root", "triangular_jacobian", "triangular_root"]

Map = Callable[[Tensor], Tensor]


@torch.no_grad()
def increasing_root(function: Map, target: Tensor) -> Tensor:
    """x with ``function(x) = target``, entry by entry, for an increasing elementwise function; without derivatives.

    The number of calls is fixed by the precision: 64 in float64, 32 in float32. The root is found to the spacing of
    the floating-point numbers at x, or at 1 where x is smaller, up to the square root of the largest number (about
    1e154 and 1e19).

    Args:
        function: maps a tensor of the shape of ``target`` to another, each entry increasing in its own.
        target: any shape.

    Returns:
        Tensor of the shape of ``target``; infinite for a root outside the range searched (as a function of bounded
        range has none at all), NaN where the target is.

    Example:
        >>> from pyro_gen.transforms.numerical import increasing_root
        >>> increasing_root(lambda x: x + x**3, torch.tensor([2.0, 10.0, -10.0])).round(decimals=5)
        tensor([ 1.,  2., -2.])
    """
    # detach, besides no_grad, as that holds for one level of torch.func only, and not for forward mode
    target = target.detach()
    info = torch.finfo(target.dtype)
    top = math.asinh(math.sqrt(info.max))
    low, high = torch.full_like(target, -top), torch.full_like(target, top)
    end = high.sinh()

    def halve(low: Tensor, high: Tensor, scale: Map) -> tuple[Tensor, Tensor]:
        middle = (low + high) / 2
        below = function(scale(middle)).detach() < target
        return torch.where(below, middle, low), torch.where(below, high, middle)

    for _ in range(math.ceil(math.log2(2 * top))):  # to a bracket of at most a factor of e, or sinh(1) wide
        low, high = halve(low, high, torch.sinh)
    low, high = low.sinh(), high.sinh()
    for _ in range(2 - round(math.log2(info.eps))):
        low, high = halve(low, high, lambda x: x)
    x = torch.where(high == end, math.inf, torch.where(low == -end, -math.inf, (low + high) / 2))
    return torch.where(target.isnan(), target, x)


@torch.no_grad()
def triangular_root(function: Map, y: Tensor) -> Tensor:
    """x with ``function(x) = y`` for an increasing triangular map, ``(..., D)``; without derivatives.

    Coordinate after coordinate by :func:`increasing_root`: 64 D passes of the whole function in float64, 32 D in
    float32. Where coordinate i can be evaluated without the rest, a loop of its own over :func:`increasing_root` is
    cheaper by a factor of about D.

    Args:
        function: maps ``(..., D)`` to ``(..., D)``; entry i depends on the entries up to i and increases in entry i.
        y: ``(..., D)``.

    Returns:
        ``(..., D)``.
    """
    columns = y.detach().unbind(-1)
    known: list[Tensor] = []
    for i, column in enumerate(columns):
        later = [torch.zeros_like(column)] * (len(columns) - i - 1)

        def coordinate(x: Tensor, i: int = i, later: list[Tensor] = later) -> Tensor:
            return function(torch.stack([*known, x, *later], -1))[..., i]

        known.append(increasing_root(coordinate, column))
    return torch.stack(known, -1)


@torch.no_grad()
def triangular_jacobian(function: Map, x: Tensor) -> Tensor:
    """Jacobian of a map of vectors at every row, ``(..., D)`` to ``(..., D, D)``, held fixed (without derivatives)."""
    size = x.shape[-1]
    pull = torch.func.vjp(function, x.detach())[1]
    basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *(1,) * (x.dim() - 1), size)
    rows: Tensor = torch.func.vmap(pull)(basis.expand(size, *x.shape))[0]
    return rows.movedim(0, -2).detach()


def implicit(
    function: Map, root: Tensor, y: Tensor, *, jacobian: Tensor | None = None, upper: bool = False, order: int = 3
) -> Tensor:
    r"""The root of ``function(x) = y`` as a differentiable function of y and of all that ``function`` reads.

    The value is ``root``, bit for bit. Derivatives are those of the implicit function, exact up to ``order``, in
    reverse and in forward mode; they cost the Jacobian, once, and a pass and a triangular solve for each order.

    Args:
        function: maps ``(..., D)`` to ``(..., D)``, with a triangular Jacobian; may close over weights and context.
        root: the solution, ``(..., D)``, as numbers: its own derivatives are dropped.
        y: ``(..., D)``.
        jacobian: of the function at the root, ``(..., D, D)``; found by D pulled-back vectors if not given.
        upper: whether it is upper triangular.
        order: up to which order derivatives are exact; those above come out wrong.

    Returns:
        ``(..., D)``.

    References:
        S. G. Krantz, H. R. Parks, "The implicit function theorem", 2002, ch. 3; module docstring for the orders.

    Example:
        >>> from pyro_gen.transforms.numerical import implicit
        >>> y = torch.tensor([8.0], requires_grad=True)
        >>> x = implicit(lambda x: x**3, torch.tensor([2.0]), y)  # dx/dy = 1/(3 x²)
        >>> torch.autograd.grad(x.sum(), y)[0] * 12
        tensor([1.])
    """
    x = root.detach()
    fixed = (triangular_jacobian(function, x) if jacobian is None else jacobian).detach()
    for _ in range(check_count(order, "order")):
        residual = function(x) - y
        change = residual - residual.detach()  # 0 in value: the root stays where bisection left it
        x = x - torch.linalg.solve_triangular(fixed, change.unsqueeze(-1), upper=upper).squeeze(-1)
    return x


class Triangular(Bijection):
    r"""An increasing triangular map with range :math:`R^D`, inverted numerically.

    Subclasses write ``forward``; :math:`y_i` may depend on :math:`x_0 \dots x_i`, must increase in :math:`x_i` and take
    every real value. The inverse costs the steps of :meth:`root`, which by default are 64 D passes of :meth:`value` in
    float64 and 32 D in float32, and for its derivatives (exact up to order 3, see :func:`implicit`) D pulled-back
    vectors and four passes.

    Args:
        features: size D of the vectors.
        context_features: size of the context, 0 for none.
        out_features: as ``features``: a triangular map keeps the size.

    Example:
        >>> from pyro_gen.transforms.numerical import Triangular
        >>> class Cubic(Triangular):
        ...     def forward(self, x, context=None):
        ...         return x + x**3 / 3, (1 + x**2).log().sum(-1)
        >>> Cubic(2).inverse(torch.tensor([[12.0, -12.0]]))[0]
        tensor([[ 3., -3.]])
    """

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, context = self.broadcast(y, context)
        x = implicit(lambda v: self.value(v, context), self.root(y, context), y)
        return x, -self(x, context)[1]

    def value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """y alone, ``(..., D)``; for subclasses to write where that is cheaper than ``forward``."""
        y: Tensor = self(x, context)[0]
        return y

    @torch.no_grad()
    def root(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """x with ``value(x) = y``, ``(..., D)``, without derivatives; for the inverse to add them."""
        return triangular_root(lambda v: self.value(v, context), y)
