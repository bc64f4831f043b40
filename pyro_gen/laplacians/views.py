"""Sums over features, changes of shape, and what is plain: the functions that move numbers without bending them.

Each is linear and treats all directions alike, so it applies to the value, the Jacobian (whose leading dimension,
counted from the left, is why dimensions are made negative first) and the Laplacian. The one thing to follow is where
the rows go: no function here may sum over rows, reorder them or merge them with another dimension.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_gen.laplacians.lifted import Lifted, common
from pyro_gen.laplacians.products import broadcast
from pyro_gen.laplacians.rules import refuse, register, rule

__all__ = ["negative", "total"]


def negative(x: Lifted, dim: Any) -> tuple[int, ...]:
    """Dimensions counted from the right; all of them for None or an empty tuple."""
    count = x.v.dim()
    given = (dim,) if isinstance(dim, int) else tuple(dim) if dim is not None and tuple(dim) else tuple(range(count))
    if any(not -count <= d < count for d in given):
        raise IndexError(f"dimension out of range: {dim} of a tensor with {count} dimensions")
    return tuple(d - count if d >= 0 else d for d in given)


def apart(x: Lifted, *dims: int) -> None:
    """Refuse to touch the rows."""
    if x.row in dims:
        refuse("that mixes rows")


def flat_sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


# ----------------------------------------------------------------------------------------------------------------- sums
def total(x: Lifted, dims: tuple[int, ...], keepdim: bool = False) -> Lifted:
    """Sum over negative dimensions; of a diagonal Jacobian over all features, without making it."""
    apart(x, *dims)
    row = x.row if keepdim else x.row + sum(d > x.row for d in dims)
    if x.g is not None and not keepdim and len(set(dims)) == x.v.dim() - 1:
        J = x.basis.select(x.g.flatten(1)).t() if x.v.dim() > 1 else x.g.unsqueeze(0)
        return Lifted(x.v.sum(dims), x.basis, -1, J=J, L=None if x.L is None else x.L.sum(dims))
    return x.linear(lambda t: t.sum(dims, keepdim=keepdim), row)


@rule(torch.sum, Tensor.sum)
def sum_(x: Lifted, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Lifted:
    if dtype not in (None, x.v.dtype):
        refuse("with another dtype")
    dims = negative(x, dim)
    return total(x, dims, keepdim) if x.v.dim() > 1 else refuse("that mixes rows")


@rule(torch.mean, Tensor.mean)
def mean(x: Lifted, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if dtype not in (None, x.v.dtype):
        refuse("with another dtype")
    dims = negative(x, dim)
    return sum_(x, dims, keepdim) / math.prod(x.v.shape[d] for d in dims)


@rule(torch.prod, Tensor.prod)
def prod(x: Lifted, dim: Any = None, keepdim: bool = False) -> Any:
    (d,) = negative(x, dim)
    if not x.v.shape[d]:
        refuse("of no factors")
    y = functools.reduce(operator.mul, unbind(x, d))
    return y.unsqueeze(d) if keepdim else y


@rule(torch.cumsum, Tensor.cumsum)
def cumsum(x: Lifted, dim: int, dtype: Any = None) -> Lifted:
    (d,) = negative(x, dim)
    apart(x, d)
    return x.linear(lambda t: t.cumsum(d, dtype=dtype))


@rule(torch.flip, Tensor.flip)
def flip(x: Lifted, *dims: Any) -> Lifted:
    each = negative(x, flat_sizes(dims))
    apart(x, *each)
    return x.linear(lambda t: t.flip(each))


def _enter_triangle(function: Callable[..., Tensor], *functions: Any) -> None:
    def triangle(x: Lifted, diagonal: int = 0) -> Lifted:
        apart(x, -1, -2)
        return x.linear(lambda t: function(t, diagonal))

    register(triangle, functions)


_enter_triangle(torch.tril, torch.tril, Tensor.tril)
_enter_triangle(torch.triu, torch.triu, Tensor.triu)


# --------------------------------------------------------------------------------------------------------------- shapes
@rule(torch.reshape, Tensor.reshape, Tensor.view)
def reshape(x: Lifted, *shape: Any) -> Lifted:
    sizes = flat_sizes(shape)
    if any(isinstance(s, torch.dtype) for s in sizes):
        refuse("with a dtype")
    v = x.v.reshape(sizes)
    before, position = math.prod(x.v.shape[: x.row]), x.v.dim() + x.row
    found = [i for i in range(v.dim()) if v.shape[i] == x.rows and math.prod(v.shape[:i]) == before]
    if not found:
        refuse("that merges rows with another dimension")
    at = found[0] if position not in found else position
    L = None if x.L is None else x.L.reshape(v.shape)
    if x.g is not None and x.row == -x.v.dim() and at == 0:
        g = x.g.reshape(x.g.shape[0], *v.shape[1:])
        return Lifted(v, x.basis, -v.dim(), g=g, L=L)
    J = x.dense()
    new = list(v.shape)
    new[at] = J.shape[x.row]
    return Lifted(v, x.basis, at - v.dim(), J=J.reshape(J.shape[0], *new), L=L)


@rule(Tensor.view_as, Tensor.reshape_as)
def reshape_as(x: Lifted, other: Tensor) -> Lifted:
    return reshape(x, tuple(other.shape))


@rule(torch.flatten, Tensor.flatten)
def flatten(x: Lifted, start_dim: int = 0, end_dim: int = -1) -> Lifted:
    start, end = (d % max(1, x.v.dim()) for d in (start_dim, end_dim))
    shape = x.v.shape
    return reshape(x, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


@rule(torch.unflatten, Tensor.unflatten)
def unflatten(x: Lifted, dim: int, sizes: Any) -> Lifted:
    (d,) = negative(x, dim)
    apart(x, d)
    shape, at = x.v.shape, x.v.dim() + d
    return reshape(x, (*shape[:at], *sizes, *shape[at + 1 :]))


@rule(torch.unsqueeze, Tensor.unsqueeze)
def unsqueeze(x: Lifted, dim: int) -> Lifted:
    at = dim if dim >= 0 else dim + x.v.dim() + 1
    v = x.v.unsqueeze(at)
    row = x.row if at <= x.v.dim() + x.row else x.row - 1
    L = None if x.L is None else x.L.unsqueeze(at)
    if x.g is not None and row == -v.dim():
        return Lifted(v, x.basis, row, g=x.g.unsqueeze(at), L=L)
    return Lifted(v, x.basis, row, J=x.dense().unsqueeze(at + 1), L=L)


@rule(torch.squeeze, Tensor.squeeze)
def squeeze(x: Lifted, dim: Any = None) -> Lifted:
    if dim is None and x.rows == 1:
        refuse("of one row without dim=")
    dims = [d for d in negative(x, dim) if x.v.shape[d] == 1]
    apart(x, *dims)
    for d in sorted(dims):
        row = x.row + (d > x.row)
        L = None if x.L is None else x.L.squeeze(d)
        if x.g is not None and x.row == -x.v.dim():
            x = Lifted(x.v.squeeze(d), x.basis, row, g=x.g.squeeze(d), L=L)
        else:
            x = Lifted(x.v.squeeze(d), x.basis, row, J=x.dense().squeeze(d), L=L)
    return x


@rule(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to)
def expand(x: Lifted, *shape: Any) -> Lifted:
    sizes = list(flat_sizes(shape))
    sizes = [x.v.shape[i - len(sizes)] if s == -1 else s for i, s in enumerate(sizes)]
    return broadcast(x, torch.Size(sizes))


@rule(Tensor.expand_as)
def expand_as(x: Lifted, other: Tensor) -> Lifted:
    return broadcast(x, other.shape)


@rule(torch.broadcast_tensors, lifted=None)
def broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    each = flat_sizes(tensors)
    shape = torch.broadcast_shapes(*(t.v.shape if isinstance(t, Lifted) else t.shape for t in each))  # type: ignore[attr-defined]
    return tuple(broadcast(t, shape) if isinstance(t, Lifted) else t.expand(shape) for t in each)  # type: ignore[attr-defined]


@rule(torch.permute, Tensor.permute)
def permute(x: Lifted, *dims: Any) -> Lifted:
    order = negative(x, flat_sizes(dims))
    row = order.index(x.row) - x.v.dim()
    count = x.v.dim()

    def move(t: Tensor) -> Tensor:
        lead = t.dim() - count
        return t.permute(*range(lead), *(d + t.dim() for d in order))

    return x.linear(move, row)


def swapped(x: Lifted, a: int, b: int) -> Lifted:
    order = list(range(-x.v.dim(), 0))
    order[a], order[b] = order[b], order[a]
    return permute(x, tuple(order))


@rule(*(torch.transpose, torch.swapaxes, torch.swapdims, Tensor.transpose, Tensor.swapaxes, Tensor.swapdims))
def transpose(x: Lifted, dim0: int, dim1: int) -> Lifted:
    return swapped(x, *negative(x, (dim0,)), *negative(x, (dim1,)))


@rule(torch.t, Tensor.t, Tensor.T.__get__)  # type: ignore[attr-defined]
def t(x: Lifted) -> Lifted:
    return x if x.v.dim() < 2 else swapped(x, 0, 1) if x.v.dim() == 2 else refuse("unless it is a matrix")


@rule(Tensor.mT.__get__)  # type: ignore[attr-defined]
def mT(x: Lifted) -> Lifted:
    return swapped(x, -2, -1)


@rule(torch.movedim, torch.moveaxis, Tensor.movedim, Tensor.moveaxis)
def movedim(x: Lifted, source: int, destination: int) -> Lifted:
    (a,), (b,) = negative(x, source), negative(x, destination)
    order = [d for d in range(-x.v.dim(), 0) if d != a]
    order.insert(b + x.v.dim(), a)
    return permute(x, tuple(order))


@rule(Tensor.repeat, torch.tile, Tensor.tile)
def repeat(x: Lifted, *sizes: Any) -> Lifted:
    times = flat_sizes(sizes)
    times = (1,) * (x.v.dim() - len(times)) + tuple(times)
    if times[x.row] != 1:
        refuse("that repeats rows")
    x = broadcast(x, torch.Size((1,) * (len(times) - x.v.dim()) + x.v.shape))
    return x.linear(lambda t: t.repeat(*(1,) * (t.dim() - len(times)), *times))


@rule(F.pad)
def pad(x: Lifted, pad: Any, mode: str = "constant", value: float | None = None) -> Lifted:
    sizes = list(pad)
    reach = {-1 - i // 2 for i, s in enumerate(sizes) if s}
    if mode != "constant" or x.row in reach:
        refuse(f"with mode={mode!r} or that pads rows")
    y = x.linear(lambda t: F.pad(t, sizes))
    return Lifted(F.pad(x.v, sizes, value=value), y.basis, y.row, J=y.J, L=y.L)


# -------------------------------------------------------------------------------------------------------------- indices
@rule(Tensor.__getitem__)
def getitem(x: Lifted, index: Any) -> Lifted:
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(i is not None and i is not Ellipsis for i in items)
    fill = [slice(None)] * (x.v.dim() - used)
    at = next((n for n, i in enumerate(items) if i is Ellipsis), len(items))
    items = items[:at] + fill + items[at + 1 :]
    advanced = [i for i in items if isinstance(i, (Tensor, list))]
    if len(advanced) > 1 or any(isinstance(i, Tensor) and i.dtype == torch.bool for i in advanced):
        refuse("with masks or several tensors as indices")
    old, new, row = 0, 0, None
    for item in items:
        if item is None:
            new += 1
            continue
        if old - x.v.dim() == x.row:
            if not (isinstance(item, slice) and item == slice(None)):
                refuse("that picks rows")
            row = new
        old += 1
        new += 1 if isinstance(item, slice) else torch.as_tensor(item).dim() if not isinstance(item, int) else 0
    assert row is not None
    if all(isinstance(i, slice) and i == slice(None) for i in items):
        return x
    key = tuple(items)
    return x.linear(lambda t: t[key] if t.dim() == x.v.dim() else t[(slice(None), *key)], row - new)


@rule(torch.select, Tensor.select)
def select(x: Lifted, dim: int, index: int) -> Lifted:
    (d,) = negative(x, dim)
    apart(x, d)
    return x.linear(lambda t: t.select(d, index), x.row + (d > x.row))


@rule(torch.narrow, Tensor.narrow)
def narrow(x: Lifted, dim: int, start: int, length: int) -> Lifted:
    (d,) = negative(x, dim)
    apart(x, d)
    return x.linear(lambda t: t.narrow(d, start, length))


@rule(torch.index_select, Tensor.index_select)
def index_select(x: Lifted, dim: int, index: Tensor) -> Lifted:
    (d,) = negative(x, dim)
    apart(x, d)
    return x.linear(lambda t: t.index_select(d, index))


@rule(torch.gather, Tensor.gather)
def gather(x: Lifted, dim: int, index: Tensor) -> Lifted:
    (d,) = negative(x, dim)
    apart(x, d)
    if index.shape[x.row] != x.rows:
        refuse("that drops rows")
    J = x.spread().gather(d, index.expand(x.dense().shape[0], *index.shape))
    return Lifted(x.v.gather(d, index), x.basis, x.row, J=J, L=None if x.L is None else x.L.gather(d, index))


@rule(torch.unbind, Tensor.unbind)
def unbind(x: Lifted, dim: int = 0) -> tuple[Lifted, ...]:
    (d,) = negative(x, dim)
    apart(x, d)
    return tuple(select(x, d, i) for i in range(x.v.shape[d]))


@rule(torch.split, Tensor.split, torch.functional.split)
def split(x: Lifted, split_size_or_sections: Any, dim: int = 0) -> tuple[Lifted, ...]:
    (d,) = negative(x, dim)
    apart(x, d)
    sizes = [part.shape[d] for part in x.v.split(split_size_or_sections, d)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(x, d, start, size) for start, size in zip(starts, sizes, strict=True))


@rule(torch.chunk, Tensor.chunk)
def chunk(x: Lifted, chunks: int, dim: int = 0) -> tuple[Lifted, ...]:
    (d,) = negative(x, dim)
    apart(x, d)
    return split(x, [part.shape[d] for part in x.v.chunk(chunks, d)], d)


def joined(tensors: Any) -> tuple[Lifted, ...]:
    """Lifted and plain tensors as dense ones in one basis, all rows spread if any are."""
    parts = list(tensors)
    some = common(*(p for p in parts if isinstance(p, Lifted)))
    first = some[0]
    if any(p.row != first.row for p in some):
        refuse("that pairs rows with rows")
    rest = iter(some)
    each = []
    for part in parts:
        if isinstance(part, Lifted):
            each.append(next(rest).densely())
            continue
        size = list(part.shape)
        size[first.row] = 1
        J = part.new_zeros(()).expand(first.basis.size, *size)
        each.append(Lifted(part, first.basis, first.row, J=J))
    return tuple(each)


def join(function: Any, tensors: Any, d: int, row: int) -> Lifted:
    each = joined(tensors)
    shared = all(p.J is not None and p.J.shape[p.row] == 1 for p in each)
    J = function([p.J if shared else p.spread() for p in each], d)
    L = None if all(p.L is None for p in each) else function([p.zero() for p in each], d)
    return Lifted(function([p.v for p in each], d), each[0].basis, row, J=J, L=L)


@rule(torch.cat, torch.concat, torch.concatenate, lifted=None)
def cat(tensors: Any, dim: int = 0) -> Lifted:
    first = next(t for t in tensors if isinstance(t, Lifted))
    (d,) = negative(first, dim)
    apart(first, d)
    return join(torch.cat, tensors, d, first.row)


@rule(torch.stack, lifted=None)
def stack(tensors: Any, dim: int = 0) -> Lifted:
    first = next(t for t in tensors if isinstance(t, Lifted))
    d = dim if dim < 0 else dim - first.v.dim() - 1
    return join(torch.stack, tensors, d, first.row if d < first.row else first.row - 1)


# ------------------------------------------------------------------------------------------------------------ the same
@rule(*(torch.clone, Tensor.clone, Tensor.contiguous, torch.positive, Tensor.positive, Tensor.__pos__))
def same(x: Lifted, *, memory_format: Any = None) -> Lifted:
    return x


@rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
def dropout(x: Lifted, p: float = 0.5, training: bool = True) -> Lifted:
    return refuse("in training mode, where it is random") if training and p else x
