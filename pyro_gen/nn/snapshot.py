r"""A module with the weights it has now: what a distribution that is used later has to hold on to.

A distribution made from a network is scored after the program that made it has ended. By then a weight that was drawn
from a prior, or put in place by ``torch.func.functional_call``, is gone from the module; another one, or none, would be
read. A snapshot is a copy of the module tree, not of its tensors: each weight is read once, now (a ``PyroSample`` is
drawn, a ``PyroParam`` constrained), and kept as the tensor it is, with its gradient. So an optimizer's update in place
is seen, as everywhere in torch, while a substituted or drawn weight stays what it was.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from pyro.nn import PyroModule
from torch import nn

__all__ = ["snapshot"]

PYRO = ("_pyro_params", "_pyro_samples", "_pyro_context", "_pyro_name")


def snapshot(module: nn.Module) -> nn.Module:
    """A copy of the module tree that holds the tensors its parameters and buffers are at this moment.

    Args:
        module: any module; a ``PyroModule`` comes back as the plain module it was made from, its priors drawn.

    Example:
        >>> import torch
        >>> held = []
        >>> class Holds(nn.Linear):
        ...     def forward(self, x): held.append(snapshot(self))
        >>> _ = torch.func.functional_call(Holds(1, 1), {"weight": torch.ones(1, 1)}, torch.ones(1))
        >>> held[0].weight
        tensor([[1.]])
    """
    if "_is_snapshot" in module.__dict__:
        return module
    active: Any = module._pyro_context if isinstance(module, PyroModule) else nullcontext()
    with active:  # so that priors get the names they have inside the model
        return _copied(module, {})


def _copied(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    cls = _without_pyro(type(module))
    new: nn.Module = cls.__new__(cls)
    done[id(module)] = new
    state = dict(module.__dict__)
    names = [*module._parameters, *state.get("_pyro_params", ()), *state.get("_pyro_samples", ())]
    state["_parameters"] = {name: getattr(module, name) for name in names}
    state["_buffers"] = dict(module._buffers)
    state["_modules"] = {n: None if sub is None else _copied(sub, done) for n, sub in module._modules.items()}
    if not issubclass(cls, PyroModule):
        state = {name: value for name, value in state.items() if name not in PYRO}
    elif "_pyro_samples" in state:  # a class the user derived from PyroModule: nothing is left to be drawn
        state.update(_pyro_params={}, _pyro_samples={})
    new.__dict__.update(state, _is_snapshot=True)
    return new


def _without_pyro(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that ``PyroModule[cls]`` was made from."""
    if issubclass(cls, PyroModule):
        plain = [b for b in cls.__bases__ if issubclass(b, nn.Module) and not issubclass(b, PyroModule)]
        return plain[0] if plain else cls
    return cls
