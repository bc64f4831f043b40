"""The arguments of a fit: checked, named, and made into what the loop works with."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from pyro_gen.base import ObjectiveModule
from pyro_gen.checks import check_count, describe

__all__ = ["check_numbers", "home_of", "make_optimizer", "make_scheduler", "moved", "name_of", "named_device"]


def check_numbers(
    steps: Any,
    epochs: Any,
    lr: Any,
    clip_norm: Any,
    patience: Any,
    validate_every: Any,
    checkpoint_every: Any,
    seed: Any,
) -> None:
    if (steps is None) == (epochs is None):
        raise ValueError("give steps= or epochs=, one of the two")
    counts = {
        "steps": steps,
        "epochs": epochs,
        "patience": patience,
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
    }
    for name, value in counts.items():
        if value is not None:
            check_count(value, name)
    for name, value in (("lr", lr), ("clip_norm", clip_norm)):
        if value is None and name == "clip_norm":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {describe(value)}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed must be an int, got {describe(seed)}")


def named_device(device: str | torch.device) -> torch.device:
    """The device of a name, if there is one; ``"auto"`` takes CUDA where it can."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:0', got {describe(device)}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device={str(device)!r} is not there (CUDA devices: {count}): use 'auto' or 'cpu'")
    return found


def home_of(module: ObjectiveModule, data: Any) -> torch.device:
    """Where the module is; for one without tensors, where the data are."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    x = data[0] if isinstance(data, (tuple, list)) and data else data
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def moved(data: Any, device: torch.device) -> Any:
    """Data on the CPU are taken to the module's device; data elsewhere are refused."""
    if isinstance(data, (tuple, list)):
        parts = [moved(part, device) for part in data]
        return parts if isinstance(data, list) else tuple(parts)
    if not isinstance(data, Tensor):
        return data
    if data.device.type != "cpu" and data.device.type != device.type:
        raise ValueError(
            f"data are on {data.device} and the program on {device}: move one, program.to({str(data.device)!r}) or "
            f"data.to({str(device)!r}), or give device="
        )
    return data.to(device)


def name_of(factory: Any) -> str | None:
    """A short name of an optimizer or schedule, for configurations."""
    if factory is None or isinstance(factory, str):
        return factory
    if isinstance(factory, list):
        return ", ".join(str(name_of(f)) for f in factory)
    return str(getattr(factory, "__qualname__", type(factory).__qualname__))


def make_optimizer(factory: Any, parameters: list[Tensor], lr: float) -> Optimizer:
    if factory is None:
        fused = all(p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point for p in parameters)
        return torch.optim.Adam(parameters, lr=lr, fused=fused)
    if isinstance(factory, Optimizer):
        raise TypeError(
            "optimizer must be a callable such as torch.optim.SGD: fit calls it as optimizer(parameters, lr=lr)"
        )
    if isinstance(factory, pyro.optim.PyroOptim):
        raise TypeError("optimizer is a Pyro optimizer: pass the torch one, such as torch.optim.Adam")
    if not callable(factory):
        raise TypeError(f"optimizer must be callable as optimizer(parameters, lr=lr), got {factory!r}")
    made = factory(parameters, lr=lr)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer(parameters, lr=lr) must give a torch optimizer, got {describe(made)}")
    return made


def make_scheduler(schedule: Any, optimizer: Optimizer, steps: int) -> LRScheduler:
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if not callable(schedule):
        raise ValueError(f"schedule must be 'cosine' or a callable from the optimizer to a scheduler, got {schedule!r}")
    made = schedule(optimizer)
    if not isinstance(made, LRScheduler):
        raise TypeError(f"schedule(optimizer) must give a torch LRScheduler, got {describe(made)}")
    return made
