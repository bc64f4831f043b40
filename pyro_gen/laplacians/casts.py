"""Changes of dtype and device, and conversions: a lifted tensor is moved with its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_gen.laplacians.lifted import Lifted
from pyro_gen.laplacians.rules import refuse, rule

__all__: list[str] = []


@rule(Tensor.to, lifted=None)  # also of parameter.to(x), for the dtype and device of x
def to(x: Any, *args: Any, dtype: Any = None, device: Any = None, copy: bool = False, **options: Any) -> Any:
    given: tuple[Any, ...] = tuple(a.v if isinstance(a, Lifted) else a for a in args)
    options |= {k: v for k, v in (("dtype", dtype), ("device", device)) if v is not None}
    if not isinstance(x, Lifted):
        return x.to(*given, copy=copy, **options)
    y = x.v.to(*given, **options)
    return x if y is x.v else cast_to(x, y)


@rule(Tensor.type)
def type_(x: Lifted, dtype: Any = None) -> Any:
    return x.v.type() if dtype is None else x if (y := x.v.type(dtype)) is x.v else cast_to(x, y)


def cast_to(x: Lifted, y: Tensor) -> Lifted:
    if not y.dtype.is_floating_point:
        refuse("to a dtype without derivatives")

    def move(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(dtype=y.dtype, device=y.device)

    x = x.densely()
    basis = x.in_root()
    return Lifted(y, basis.basis, x.row, J=move(basis.J), L=move(x.L))


@rule(Tensor.float)
def float_(x: Lifted) -> Any:
    return to(x, torch.float32)


@rule(Tensor.double)
def double(x: Lifted) -> Any:
    return to(x, torch.float64)


@rule(Tensor.type_as, lifted=2)
def type_as(x: Any, other: Tensor) -> Any:
    return to(x, other.dtype) if isinstance(x, Lifted) else x.to(other.dtype)


@rule(torch.as_tensor, torch.asarray, lifted=None)  # met by way of `Conversions`
def as_tensor(data: Lifted, dtype: Any = None, device: Any = None) -> Any:
    return to(data, dtype=dtype, device=device)
