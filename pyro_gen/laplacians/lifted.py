r"""A tensor that carries its first derivatives and its Laplacian with respect to x.

For y(x) with rows that depend on their own row of x only, write :math:`J_k = \partial y / \partial x_k` for the
d coordinates of a row and :math:`L = \sum_k \partial^2 y / \partial x_k^2`. Both follow from the same quantities of the
operands (the *forward Laplacian*): a linear map A gives (A y, A J, A L); an elementwise f gives

.. math:: f(y), \qquad f'(y) J_k, \qquad f'(y) L + f''(y) \sum_k J_k^2 ,

and a product (y z, J_k z + y K_k, L z + y M + 2 \sum_k J_k K_k). One pass through a network gives gradient and
Laplacian at once, by ordinary differentiable operations: the gradient in the network's parameters comes from torch.

J is the expensive part, d times the size of y; three representations keep it small. *Diagonal*: x itself, and all that
acts on it feature by feature, has :math:`J_{k} = g_k e_k`, and only g is kept, so the identity of x is never made.
*Shared*: the Jacobian of a linear map of x is its weight, one for all rows, until the first nonlinearity.
*Change of basis*: after a linear map a = W x to h < d features, J = Wᵀ R with R the derivatives in a, where again
R of a is the identity; sums over k become :math:`\sum_k J_k K_k = \sum_{ab} R_a (W W^T)_{ab} S_b`, so that everything
costs h instead of d (a network with 128 units on 784 pixels: a sixth).

References:
    Li, Ye, Ren, Chen, Wang (2024), A computational framework for neural network-based variational Monte Carlo with
    forward Laplacian, arXiv 2307.08214, equations 4-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_gen.laplacians.rules import NoRule, look_up, name_of, refuse

__all__ = ["Basis", "Conversions", "Lifted", "lift"]

FACTOR = 1.5  # a change of basis pays where d is that much larger than h: its sums over k cost h more


class Basis:
    """The directions in which derivatives are taken: coordinates of x, or of a linear map of x.

    Args:
        features: number of features of the tensor whose Jacobian is the identity.
        window: first coordinate and number of coordinates, for derivatives in some of them only.
        root: the basis of x, where this is one of a linear map of x.
        matrix: that linear map, ``(features, coordinates of root)``.

    Attributes:
        bytes: of all dense Jacobians that were made in coordinates of x.
        refusal: what code below Python met, or None.
        recorded: whether the graph is recorded. The program itself runs with gradients enabled, so that where it
            disables them, and autograd would take a result for a constant, it is seen.
        inside: True while a rule runs.
    """

    def __init__(
        self,
        features: int,
        window: tuple[int, int],
        root: Basis | None = None,
        matrix: Tensor | None = None,
    ) -> None:
        self.features, (self.start, self.size) = features, window
        self.root = self if root is None else root
        self.matrix = matrix
        self.gram = None if matrix is None else matrix @ matrix.t()
        self.bytes = 0
        self.refusal: NoRule | None = None
        self.recorded, self.inside = torch.is_grad_enabled(), False

    @property
    def whole(self) -> bool:
        return self.size == self.features

    def column(self, like: Tensor) -> Tensor | None:
        """The squared length of each direction, ``(features,)``; None where all are one."""
        if self.gram is not None:
            return self.gram.diagonal()
        if self.whole:
            return None
        index = torch.arange(self.features, device=like.device)
        return ((index >= self.start) & (index < self.start + self.size)).to(like.dtype)

    def select(self, features: Tensor) -> Tensor:
        """Of a tensor with the features last, those in the window."""
        return features if self.whole else features.narrow(-1, self.start, self.size)

    def metric(self, jacobian: Tensor) -> Tensor:
        """What to multiply with, and sum over directions, for a sum over coordinates of x."""
        if self.gram is None:
            return jacobian
        return (self.gram @ jacobian.reshape(self.size, -1)).view(jacobian.shape)

    def down(self, jacobian: Tensor) -> Tensor:
        """A Jacobian in these directions as one in coordinates of x."""
        if self.matrix is None:
            return jacobian
        flat = self.matrix.t() @ jacobian.reshape(self.size, -1)
        return flat.view(-1, *jacobian.shape[1:])


def _root(values: Any) -> Basis | None:
    """The basis of x, of the first lifted tensor among arguments."""
    for value in values:
        if isinstance(value, Lifted):
            return value.basis.root
        if isinstance(value, (tuple, list)) and (found := _root(value)) is not None:
            return found
    return None


class Lifted(Tensor):
    """A tensor with its Jacobian and Laplacian with respect to x, to be passed through unmodified torch code.

    A subclass of ``Tensor`` over ``__torch_function__``, above autograd: ``isinstance(x, Tensor)`` holds, so Pyro takes
    it for data, while its parts are ordinary tensors with an ordinary graph.
    The subclass itself has no storage: code that gets at it by another road ends in :class:`NoRule`, never in numbers.

    Attributes:
        v: the value.
        g: diagonal of the Jacobian, with as many dimensions as v and 1 instead of rows where it is the same for all; or
            None where the Jacobian is dense.
        J: the dense Jacobian, ``(directions, *v.shape)``, with 1 instead of rows where it is the same for all; or None.
        L: the Laplacian, of v's shape, or None for zero.
        basis: the directions.
        row: the dimension that counts rows, negative.
    """

    v: Tensor
    g: Tensor | None
    J: Tensor | None
    L: Tensor | None
    basis: Basis
    row: int

    @staticmethod
    def __new__(
        cls,
        v: Tensor,
        basis: Basis,
        row: int,
        *,
        g: Tensor | None = None,
        J: Tensor | None = None,
        L: Tensor | None = None,
    ) -> Lifted:
        new: Lifted = Tensor._make_wrapper_subclass(cls, v.shape, dtype=v.dtype, device=v.device)
        new.v, new.basis, new.row, new.g, new.J, new.L = v, basis, row, g, J, L
        if J is not None and basis.matrix is None:
            basis.bytes += J.numel() * J.element_size()
        return new

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        root = _root(args) or _root(tuple((kwargs or {}).values()))
        if root is None or root.inside:
            return look_up(func, Lifted, args, kwargs or {})
        constant = not torch.is_grad_enabled()
        root.inside = True
        try:
            with torch.set_grad_enabled(root.recorded and not constant):
                result = look_up(func, Lifted, args, kwargs or {})
        finally:
            root.inside = False
        if constant and any(isinstance(r, Tensor) for r in (result if isinstance(result, tuple) else (result,))):
            raise NoRule(name_of(func), "under torch.no_grad(), or inside an autograd.Function with its own backward")
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        refusal = NoRule(str(func), "reached below Python")
        for part in args:
            if isinstance(part, Lifted):
                part.basis.root.refusal = refusal  # compiled code may turn it into an error of its own
        raise refusal

    def dense(self) -> Tensor:
        """The Jacobian as ``(directions, *v.shape)``, rows 1 where shared."""
        if self.J is not None:
            return self.J
        assert self.g is not None
        eye = torch.eye(self.basis.features, dtype=self.v.dtype, device=self.v.device)
        eye = self.basis.select(eye).t().reshape(self.basis.size, 1, *self.v.shape[1:])
        return eye * self.g

    def densely(self) -> Lifted:
        """The same with a dense Jacobian."""
        return self if self.J is not None else Lifted(self.v, self.basis, self.row, J=self.dense(), L=self.L)

    def in_root(self) -> Lifted:
        """The same in coordinates of x."""
        basis = self.basis
        if basis.matrix is None:
            return self
        if self.J is not None:
            J = basis.down(self.J)
        else:
            assert self.g is not None
            J = basis.matrix.t().reshape(basis.root.size, 1, *self.v.shape[1:]) * self.g
        return Lifted(self.v, basis.root, self.row, J=J, L=self.L)

    def zero(self) -> Tensor:
        """A Laplacian that can be added to."""
        return torch.zeros_like(self.v) if self.L is None else self.L

    def squares(self) -> Tensor:
        """The sum of J² over coordinates, of v's shape or with 1 instead of rows."""
        return contract(self, self)

    def linear(self, function: Callable[[Tensor], Tensor], row: int | None = None) -> Lifted:
        """Apply a linear map that leaves leading dimensions alone, rows and directions among them."""
        x = self.densely()
        assert x.J is not None
        row = self.row if row is None else row
        L = None if x.L is None else function(x.L)
        return Lifted(function(x.v), x.basis, row, J=function(x.J), L=L)

    def spread(self) -> Tensor:
        """The dense Jacobian with all rows, as a view where they are shared."""
        J = self.dense()
        return J.expand(J.shape[0], *self.v.shape)

    @property
    def rows(self) -> int:
        return self.v.shape[self.row]

    def gradient(self) -> Tensor:
        """For a value a row: the gradient, ``(rows, coordinates)``."""
        x = self.densely().in_root()
        assert x.J is not None
        return x.J.expand(x.J.shape[0], *self.v.shape).t()


class Conversions(TorchFunctionMode):
    """Lets lifted tensors through ``torch.as_tensor`` while a program runs.

    That function asks no argument for an override, but modes. By itself it returns a lifted tensor as it is in plain
    code only: under ``torch.func`` it wraps it into a tensor of another type, and Pyro's factors call it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONVERSIONS and isinstance(args[0] if args else kwargs.get("data", kwargs.get("obj")), Lifted):
            return Lifted.__torch_function__(func, types, args, kwargs)
        return func(*args, **kwargs)


CONVERSIONS = (torch.as_tensor, torch.asarray, torch.tensor)  # the last has no rule, and is refused by name


def contract(a: Lifted, b: Lifted) -> Tensor:
    """Sum over coordinates of the product of two Jacobians of one shape, in one basis."""
    basis = a.basis
    if a.g is not None and b.g is not None:
        length = basis.column(a.v)
        product = a.g * b.g
        return product if length is None else product * length.reshape(1, *a.v.shape[1:])
    if a.g is not None:
        a, b = b, a
    assert a.J is not None
    if b.g is None:
        assert b.J is not None
        return (a.J * basis.metric(b.J)).sum(0)
    flat = basis.metric(a.J).flatten(2).diagonal(offset=basis.start, dim1=0, dim2=2)  # (rows or 1, window)
    if not basis.whole:
        flat = torch.nn.functional.pad(flat, (basis.start, basis.features - basis.start - basis.size))
    return flat.reshape(-1, *a.v.shape[1:]) * b.g


def common(*tensors: Lifted) -> tuple[Lifted, ...]:
    """The same in one basis: that of x where they differ. Refuses tensors of different calls."""
    first = tensors[0]
    if any(t.basis.root is not first.basis.root for t in tensors):
        refuse("of tensors lifted apart")
    if all(t.basis is first.basis for t in tensors):
        return tensors
    return tuple(t.in_root() for t in tensors)


def lift(x: Tensor, window: tuple[int, int] | None = None) -> Lifted:
    """Make x the tensor that derivatives are taken in: its Jacobian is the identity, which is not made.

    Args:
        x: ``(rows, *event_shape)``, floating point.
        window: first coordinate of a row and number of coordinates to differentiate in; all by default.
    """
    features = x.shape[1:].numel()
    basis = Basis(features, (0, features) if window is None else window)
    return Lifted(x, basis, -x.dim(), g=x.new_ones(()).expand(1, *x.shape[1:]))
