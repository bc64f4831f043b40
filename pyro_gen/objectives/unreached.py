"""Parameters that a loss of derivatives in x does not reach, such as the output bias of an energy.

Nothing in the data determines them, and their gradient would be None, on which distributed training waits for ever: so
they are given a gradient of zero.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, nn

__all__ = ["reaching", "unreached"]


def unreached(module: nn.Module, rows: Tensor) -> tuple[str, ...]:
    """Names of the trainable parameters of a module that the losses of its rows do not depend on."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named or not rows.requires_grad:
        return ()
    gradients = torch.autograd.grad(rows.sum(), list(named.values()), allow_unused=True)
    return tuple(name for name, g in zip(named, gradients, strict=True) if g is None)


def reaching(module: nn.Module, rows: Tensor, names: tuple[str, ...]) -> Tensor:
    """The same losses, with a gradient of zero for these parameters."""
    for name in names:
        parameter: Tensor = attrgetter(name)(module)  # which may stand in for it (torch.func.functional_call)
        rows = rows + 0 * parameter.sum()
    return rows
