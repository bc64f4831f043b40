"""Checks of arguments, each an error that names the argument, what was given and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

__all__ = ["as_shape", "check_count", "check_rows", "check_sizes", "describe"]


def as_shape(shape: int | tuple[int, ...], name: str = "event_shape") -> torch.Size:
    """An int or a tuple of ints as a ``torch.Size``; a ``ValueError`` that names the argument otherwise."""
    parts = (shape,) if isinstance(shape, int) else tuple(shape) if isinstance(shape, (tuple, list)) else None
    if parts is None or any(isinstance(p, bool) or not isinstance(p, int) or p < 1 for p in parts):
        raise ValueError(f"{name} must be a positive int or a tuple of them, got {describe(shape)}")
    return torch.Size(parts)


def check_rows(x: Any, shape: torch.Size, name: str = "x") -> Tensor:
    """Check that ``x`` is a finite floating point tensor of shape ``(rows, *shape)`` with at least one row.

    Values are looked at only while Pyro's validation is on (``pyro.enable_validation``), as in its distributions.

    Raises:
        TypeError: for another type or dtype.
        ValueError: for another shape, no rows, or values that are not finite; names the first bad row.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}: use torch.as_tensor({name})")
    if not x.dtype.is_floating_point:
        what = "take its real and imaginary parts as features" if x.dtype.is_complex else f"pass {name}.float()"
        if name == "context" and not x.dtype.is_complex:
            what += ", or for labels torch.nn.functional.one_hot(context, classes).float()"
        raise TypeError(f"{name} must be floating point, got {x.dtype}: {what}")
    want = "(rows, " + ", ".join(map(str, shape)) + ")" if len(shape) else "(rows,)"
    if x.dim() != len(shape) + 1 or tuple(x.shape[1:]) != tuple(shape):
        built = "context_shape" if name == "context" else "event_shape"
        hint = f"pass such rows, or build the program with another {built}="
        if tuple(x.shape) == tuple(shape):
            hint = f"a single row is {name}.unsqueeze(0)"
        elif x.dim() == 1:
            hint = f"the first dimension counts rows; one feature a row is {name}.unsqueeze(-1)"
        elif x.dim() > 1 and x.shape[1:].numel() == shape.numel():
            hint = f"{name}.reshape(-1, {', '.join(map(str, shape))}) has it"
        raise ValueError(f"{name} must have shape {want}, got {tuple(x.shape)}: {hint}")
    if x.shape[0] == 0:
        raise ValueError(f"{name} is empty: it has no rows, and at least one is needed")
    if is_validation_enabled() and not x.is_meta:  # looks at values, so it waits for the device
        bad = ~torch.isfinite(x.reshape(x.shape[0], -1)).all(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} is not finite in {int(bad.sum())} of {x.shape[0]} rows, first in row {row}: "
                "drop or impute those rows"
            )
    return x


def check_count(value: Any, name: str) -> int:
    """A positive int; a ``ValueError`` that names the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {describe(value)}")
    return value


def check_sizes(value: Any, name: str = "hidden") -> tuple[int, ...]:
    """Sizes of layers, a tuple of positive ints; a ``ValueError`` that names the argument otherwise."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be a sequence of sizes such as (128, 128), got {describe(value)}")
    return tuple(check_count(size, name) for size in value)


def describe(thing: Any) -> str:
    """A short name of an object for error messages."""
    if isinstance(thing, type):
        return f"the class {thing.__name__} (make an instance: {thing.__name__}(...))"
    plain = thing is None or isinstance(thing, (bool, int, float, str, tuple, list))
    return repr(thing) if plain and len(repr(thing)) <= 80 else type(thing).__name__
