"""What does not depend on x to first order, or only tells about a tensor: answered from the value, as a plain result.

Comparisons, roundings, shapes and the like have derivative zero wherever they have one, so the answer is a constant,
exactly as for autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_gen.laplacians.lifted import Lifted
from pyro_gen.laplacians.rules import register, rule

__all__: list[str] = []

ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "layout", "is_sparse", "is_cuda", "is_cpu", "is_meta", "is_quantized"),
    *("is_nested", "is_mps", "itemsize", "nbytes", "names", "is_mkldnn", "is_sparse_csr"),
)
METHODS = (
    *("dim", "size", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "is_signed", "element_size"),
    *("is_contiguous", "get_device", "stride", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
    *("__len__", "__bool__", "detach", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "has_names"),
)
BOTH = (
    *("eq", "ne", "lt", "le", "gt", "ge", "greater", "less", "greater_equal", "less_equal", "not_equal"),
    *("isfinite", "isinf", "isnan", "isneginf", "isposinf", "isreal", "isclose", "allclose", "equal"),
    *("sign", "sgn", "signbit", "floor", "ceil", "round", "trunc", "fix"),
    *("argmax", "argmin", "argsort", "all", "any", "is_nonzero", "logical_not", "logical_and", "logical_or"),
)
FUNCTIONS = (
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "is_tensor"),
    *("result_type", "numel", "is_floating_point", "is_complex"),
)


def _bare(value: Any) -> Any:
    return value.v.detach() if isinstance(value, Lifted) else value


def _enter(function: Any) -> None:
    def constant(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_bare, args), **{k: _bare(v) for k, v in kwargs.items()})

    register(constant, [function], None)


for _name in ATTRIBUTES:
    if hasattr(Tensor, _name):
        _enter(getattr(Tensor, _name).__get__)
for _name in (*METHODS, *BOTH):
    if hasattr(Tensor, _name):
        _enter(getattr(Tensor, _name))
for _name in (*FUNCTIONS, *BOTH):
    if hasattr(torch, _name):
        _enter(getattr(torch, _name))
_enter(torch.detach)


@rule(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
def requires_grad(x: Lifted) -> bool:
    return True


@rule(Tensor.is_leaf.__get__)  # type: ignore[attr-defined]
def is_leaf(x: Lifted) -> bool:
    return False


@rule(Tensor.grad.__get__, Tensor.grad_fn.__get__)  # type: ignore[union-attr]
def grad(x: Lifted) -> None:
    return None


@rule(Tensor.__repr__, Tensor.__format__)
def text(x: Lifted, *args: Any, **kwargs: Any) -> str:
    kind = "diagonal" if x.g is not None else "dense"
    return f"Lifted(shape={tuple(x.v.shape)}, directions={x.basis.size}, {kind})"
