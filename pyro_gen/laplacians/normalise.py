r"""Log-sum-exp, softmax, norms and normalisations over features.

With :math:`p = \mathrm{softmax}(y)`, :math:`\mathrm{lse}(y)` has :math:`J = \sum_i p_i J_i` and
:math:`L = \sum_i p_i (L_i + \sum_k J_{ki}^2) - \sum_k J_k^2`. The others are put together from lifted operations. What
normalises over rows makes a row's density depend on the other rows, and has no derivatives row by row.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_gen.laplacians.lifted import Lifted, contract
from pyro_gen.laplacians.rules import refuse, rule
from pyro_gen.laplacians.views import negative, total

__all__ = ["logsumexp"]


@rule(torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)
def logsumexp(x: Lifted, dim: Any, keepdim: bool = False) -> Any:
    dims = negative(x, dim)
    if x.row in dims:
        refuse("that mixes rows")
    y = torch.logsumexp(x.v, dims, keepdim=True)
    p = torch.exp(x.v - torch.where(y.isinf(), 0.0, y))  # all at −∞: no weight anywhere, instead of NaN
    x = x.densely()
    assert x.J is not None
    J = (x.J * p).sum(dims, keepdim=True)
    mean = Lifted(y, x.basis, x.row, J=J)
    inner = contract(x, x) if x.L is None else contract(x, x) + x.L
    L = ((p * inner).sum(dims, keepdim=True) - contract(mean, mean)).expand(y.shape)
    lse = Lifted(y, x.basis, x.row, J=J, L=L)
    return lse if keepdim else lse.squeeze(dims)


@rule(torch.log_softmax, F.log_softmax, Tensor.log_softmax, torch.special.log_softmax)
def log_softmax(x: Lifted, dim: int, dtype: Any = None) -> Any:
    if dtype not in (None, x.v.dtype):
        refuse("with another dtype")
    return x - logsumexp(x, dim, keepdim=True)


@rule(torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)
def softmax(x: Lifted, dim: int, dtype: Any = None) -> Any:
    return torch.exp(log_softmax(x, dim, dtype))


@rule(torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm, torch.functional.norm)
def norm(x: Lifted, p: Any = 2, dim: Any = None, keepdim: bool = False, *, ord: Any = None, dtype: Any = None) -> Any:
    order = p if ord is None else ord
    if order not in (2, 2.0, "fro") or dtype is not None:
        refuse(f"of order {order!r}")
    if dim is None:
        refuse("without dim=, which mixes rows")
    return torch.sqrt((x * x).sum(dim, keepdim))


@rule(F.normalize)
def normalize(x: Lifted, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Any:
    return x / norm(x, p, dim, True).clamp_min(eps)


@rule(torch.var, Tensor.var)
def var(x: Lifted, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None) -> Any:
    dims = negative(x, dim)
    less = correction if correction is not None else int(unbiased is not False)
    centred = x - x.mean(dims, True)
    return (centred * centred).sum(dims, keepdim) / max(0, math.prod(x.v.shape[d] for d in dims) - less)


@rule(torch.std, Tensor.std)
def std(x: Lifted, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None) -> Any:
    return torch.sqrt(var(x, dim, unbiased, keepdim, correction=correction))


def _standardise(x: Lifted, dims: tuple[int, ...], eps: float) -> Any:
    centred = x - x.mean(dims, True)
    return centred * torch.rsqrt((centred * centred).mean(dims, True) + eps)


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    x: Lifted, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    y = _standardise(x, tuple(range(-len(normalized_shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(x: Lifted, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    dims = tuple(range(-len(normalized_shape), 0))
    y = x * torch.rsqrt((x * x).mean(dims, True) + (torch.finfo(x.v.dtype).eps if eps is None else eps))
    return y if weight is None else y * weight


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    shape = (-1, *(1,) * (x.dim() - 2))
    y = x if weight is None else x * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _images(x: Lifted) -> None:
    if x.row != -x.v.dim():
        refuse("unless rows come first")


@rule(F.group_norm)
def group_norm(
    x: Lifted, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    _images(x)
    shape = x.v.shape
    y = _standardise(cast(Lifted, x.reshape(shape[0], num_groups, -1)), (-1,), eps)
    return _by_channel(y.reshape(shape), weight, bias)


@rule(F.batch_norm)
def batch_norm(
    x: Lifted,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None:
        refuse("in training mode: its rows are not independent, so no row has a density of its own")
    _images(x)
    shape = (-1, *(1,) * (x.v.dim() - 2))
    y = (x - running_mean.reshape(shape)) * torch.rsqrt(running_var + eps).reshape(shape)
    return _by_channel(y, weight, bias)


@rule(F.avg_pool1d, F.avg_pool2d, torch.avg_pool1d)
def _pool(x: Lifted, kernel_size: Any, stride: Any = None) -> Any:
    """Averages of windows without overhang."""
    _images(x)
    dims = x.v.dim() - 2
    sizes = (kernel_size,) * dims if isinstance(kernel_size, int) else tuple(kernel_size)
    if stride is not None and ((stride,) * dims if isinstance(stride, int) else tuple(stride)) != sizes:
        refuse("with a stride other than the window")
    if any(n % k for n, k in zip(x.v.shape[2:], sizes, strict=True)):
        refuse("of an image that its windows do not divide")
    shape = [part for n, k in zip(x.v.shape[2:], sizes, strict=True) for part in (n // k, k)]
    y = x.reshape(*x.v.shape[:2], *shape)
    return total(cast(Lifted, y), tuple(range(-2 * dims + 1, 0, 2))) / math.prod(sizes)
