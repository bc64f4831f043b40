"""From tensors to ``xarray`` datasets: plates become dims, names are guarded, labels are put on.

ArviZ's ``from_dict`` pads two sizes of one dim with NaN and drops a variable that is named like a dim, both without a
word. Datasets are therefore built here, from ``(dims, array)`` pairs, and such clashes are renamed or refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_gen.handlers import Site

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["SAMPLE_DIMS", "Axes", "Groups", "Variable", "axes_of", "datasets", "plain", "series_of", "to_array"]

SAMPLE_DIMS = ("chain", "draw")
RESERVED = ("chain", "draw", "sample", "pred_id")  # ArviZ's own
Array = NDArray[Any]


@dataclass(frozen=True)
class Variable:
    """An array with named dims, before it meets the others.

    Attributes:
        values: the array.
        dims: a name for each of its axes, ``chain`` and ``draw`` included.
        attrs: what is said of it in the file.
        kept: dims of which only some positions are here, with the positions and the full size.
        left_out: number of event dims that were summed over, which names given for the site may still mention.
    """

    values: Array
    dims: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, tuple[Array, int]] = field(default_factory=dict)
    left_out: int = 0

    @property
    def sample_dims(self) -> int:
        return sum(d in SAMPLE_DIMS for d in self.dims[:2])


Groups = dict[str, dict[str, Variable]]


def to_array(tensor: Any) -> Array:
    """A tensor as an array on the CPU; bfloat16, which numpy has not, as float32."""
    if not isinstance(tensor, Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


# ------------------------------------------------------------------------------------------------------- names of axes
@dataclass(frozen=True)
class Axes:
    """How the axes of a site's value are called.

    Attributes:
        names: of the axes that stay; keep: their positions in the value; event: how many of them, at the end, are of
            the event.
    """

    names: tuple[str, ...]
    keep: tuple[int, ...]
    event: int

    def variable(self, tensor: Tensor, **more: Any) -> Variable:
        """A value of the site with leading sample dims (two, one, or none) as a variable."""
        return self._named(tensor, self.names, **more)

    def batch_variable(self, tensor: Tensor, **more: Any) -> Variable:
        """Something with one entry a batch element of the site, a log-probability, as a variable."""
        stay = len(self.names) - self.event
        part = Axes(self.names[:stay], self.keep[:stay], 0)
        return part._named(tensor, part.names, left_out=self.event, **more)

    def _named(self, tensor: Tensor, names: tuple[str, ...], **more: Any) -> Variable:
        lead = tensor.dim() - (max(self.keep, default=-1) + 1)
        sizes = tensor.shape[lead:]
        dropped = [k for k in range(len(sizes)) if k not in self.keep]
        # trailing axes of size 1 that no plate has are dropped too
        lead_dims = {0: (), 1: ("draw",), 2: SAMPLE_DIMS}
        while lead not in lead_dims or any(sizes[k] != 1 for k in dropped):  # the value has more trailing 1s
            lead -= 1
            sizes = tensor.shape[lead:]
            dropped = [k for k in range(len(sizes)) if k not in self.keep]
        shape = tensor.shape[:lead] + tuple(sizes[k] for k in self.keep)
        return Variable(to_array(tensor.reshape(shape)), (*lead_dims[lead], *names), **more)
