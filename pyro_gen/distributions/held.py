"""A given distribution as a module: its tensors become buffers, which follow ``.to(device)`` and are saved with it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = ["Held", "tensors_of"]


class Held(nn.Module):
    """Holds a distribution; ``forward()`` gives it back with its tensors where the module is.

    Args:
        distribution: any torch or Pyro distribution; distributions nested in it (``Independent``, mixtures,
            transformed bases) are held with it. Tensors inside transforms stay where they are.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> Held(dist.Normal(torch.zeros(2), 1.0).to_event(1)).double()().sample().dtype
        torch.float64
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.distribution = distribution
        self.paths: dict[str, tuple[str, ...]] = {}
        for path, tensor in tensors_of(distribution):
            name = "_".join(path).lstrip("_")
            self.paths[name] = path
            self.register_buffer(name, tensor.detach().clone())

    def forward(self) -> Any:
        result = _copied(self.distribution)
        for name, path in self.paths.items():
            owner: Any = result
            for part in path[:-1]:
                owner = owner.__dict__[part]
            owner.__dict__[path[-1]] = getattr(self, name)
        return result


def tensors_of(d: Distribution) -> list[tuple[tuple[str, ...], Tensor]]:
    """The tensors that a distribution, and those nested in it, are made of, each with the names that lead to it."""
    found: list[tuple[tuple[str, ...], Tensor]] = []
    for key, value in d.__dict__.items():
        if isinstance(value, Tensor):
            found.append(((key,), value))
        elif isinstance(value, Distribution):
            found += [((key, *path), tensor) for path, tensor in tensors_of(value)]
    return found


def _copied(d: Distribution) -> Distribution:
    result = copy.copy(d)
    if not Distribution._validate_args:  # validation follows the moment, as for a distribution made now
        result._validate_args = False
    for key, value in d.__dict__.items():
        if isinstance(value, Distribution):
            result.__dict__[key] = _copied(value)
    return result
