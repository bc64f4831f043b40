"""What a program can be run under: one scale for its rows, seeds and buffers that are put back, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

__all__ = [
    "DataScale",
    "evaluation_mode",
    "forked_generators",
    "hide_bare_parameters",
    "preserved_state",
    "total_scale",
    "without_validation",
]


def total_scale(site: Any, plate: str | None, total: int | None) -> Any:
    """The scale of a site once the data plate counts ``total`` rows; its own where ``total`` is None."""
    scale = site["scale"]
    if total is not None:
        for frame in site["cond_indep_stack"]:
            if frame.name == plate:  # its own scale, full_size / size, is in there already
                scale = scale * (total / (frame.full_size or frame.size))
    return scale


class DataScale(Messenger):
    """Scale the sites of the data plate to ``total`` rows, or only note the scale they carry.

    Pyro's plates scale by ``full_size / size`` where they subsample, to the rows of their own; ``total / full_size``
    is what is left. So a plate as long as its batch counts total / rows, and one that already stands for ``total`` rows
    is not scaled twice.
    Enter it outside the program: a handler further out sees a site last, with all its scales.

    Args:
        plate: name of the data plate.
        total: number of rows of the full data set; None leaves the program's own scales.
        apply: multiply what is left into the sites; False only notes the scales for :meth:`factor`.
    """

    def __init__(self, plate: str | None, total: int | None = None, apply: bool = True) -> None:
        super().__init__()
        self.plate, self.total, self.apply = plate, total, apply
        self.scales: dict[tuple[str, Any], Any] = {}  # a site of model and guide may carry two

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            return
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            scale = total_scale(msg, self.plate, self.total)
            if self.apply:
                msg["scale"] = scale
            self.scales[msg["name"], id(scale) if isinstance(scale, Tensor) else scale] = scale

    def factor(self, rows: int) -> Any:
        """The one scale that all sites of a row carried, to be multiplied to the row's loss."""
        if not self.scales:  # a fast path that ran no site
            return 1.0 if self.total is None else self.total / rows
        first, *others = self.scales.values()
        for other in others:
            tensors = isinstance(first, Tensor) or isinstance(other, Tensor)
            if tensors and not is_validation_enabled():  # comparing would wait for the device
                continue
            if not (torch.equal(torch.as_tensor(first), torch.as_tensor(other)) if tensors else first == other):
                names = sorted({name for name, _ in self.scales})
                raise ValueError(
                    f"the sites {names} of a row carry different scales, {first} and {other}; the logarithm of a "
                    "mean of weights is defined only under one scale a row (pg.ELBO takes several)"
                )
        return first


class _HideBare(Messenger):
    def _pyro_param(self, msg: Any) -> None:
        if not msg["done"]:
            msg["value"], msg["done"] = msg["fn"](*msg["args"], **msg["kwargs"]), True
        msg["stop"] = msg["stop"] or not hasattr(msg["value"], "unconstrained")


@contextmanager
def hide_bare_parameters() -> Iterator[None]:
    """Hide the param sites that ``SVI`` cannot read.

    Under ``module_local_params=True`` a PyroModule emits its plain ``nn.Parameter`` as they are, without the
    ``unconstrained`` attribute that ``SVI.step`` asks for; in the default mode there is nothing to hide.
    """
    if pyro.settings.get("module_local_params"):
        with _HideBare():
            yield
    else:
        yield


@contextmanager
def preserved_state(*modules: Any, seed: int | None = None) -> Iterator[None]:
    """Run something without a trace: random generators and the buffers of ``modules`` are put back afterwards.

    Args:
        modules: modules whose buffers (running statistics) are restored in place; other callables are ignored.
        seed: seeds torch's generators inside, if given.
    """
    buffers = [b for m in modules if isinstance(m, torch.nn.Module) for b in m.buffers()]
    kept = [b.clone() for b in buffers]
    try:
        with forked_generators(seed):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                if buffer.shape == value.shape:
                    buffer.copy_(value)


@contextmanager
def evaluation_mode(*modules: Any) -> Iterator[None]:
    """Run something as ``eval()`` has it (no dropout, fixed statistics), and give every submodule its mode back."""
    parts = {m for root in modules if isinstance(root, torch.nn.Module) for m in root.modules() if m.training}
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


@contextmanager
def forked_generators(seed: int | None = None) -> Iterator[None]:
    """Leave torch's global generators (CPU, and CUDA where it is in use) as they were; seed them inside if asked."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def without_validation() -> Iterator[None]:
    """Run densities without the checks of distributions, Pyro's and torch's, and put both switches back."""
    default = Distribution._validate_args  # torch's own switch: Pyro would set it to what Pyro's was
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(default)
