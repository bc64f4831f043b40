"""What a library's worker builds: one specification for all of them, and the three things that are asked of a model.

Every flow has standard normal noise, `layers` layers of rational-quadratic splines with `bins` bins on [-bound, bound]
and linear tails, whose parameters come from a network of `depth` hidden layers of `hidden` units. Its parallel
direction is that of the density. Between autoregressive layers the order of features is reversed; with `mixing="lu"` a
trained matrix in LU form stands before every layer (in normflows, which permutes there at random, in place of the
reversal).
Everything else is the library's own default, the activation too unless it is named (silu in pyro_gen, ReLU elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Model", "Specification", "build", "count", "with_parameters"]


@dataclass(frozen=True)
class Specification:
    form: Literal["autoregressive", "coupling"] = "autoregressive"
    mixing: Literal["flip", "lu"] = "flip"
    features: int = 16
    hidden: int = 128
    depth: int = 2
    layers: int = 3
    bins: int = 8
    bound: float = 5.0
    activation: Literal["default", "relu", "silu"] = "default"
    direction: Literal["density", "sampling"] = "density"  # "sampling" is ours alone

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the hidden layers."""
        return (self.hidden,) * self.depth

    @property
    def swaps(self) -> list[bool]:
        """Which half of the features a coupling layer maps: in turn."""
        return [bool(i % 2) for i in range(self.layers)]


class Model(Protocol):
    """An `nn.Module` with these methods; `Tensor` in nats, one value a row."""

    def log_prob(self, x: Tensor) -> Tensor: ...

    def sample(self, n: int) -> Tensor: ...

    def rsample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]: ...


def count(model: nn.Module) -> int:
    """Numbers that are trained, those under a mask (which every library stores) included."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build(library: str, specification: Specification, seed: int = 0) -> nn.Module:
    """The library's flow; `flows/build_<library>.py` says how."""
    torch.manual_seed(seed)
    model: nn.Module = import_module(f"build_{library}").build(specification)
    model.features = specification.features  # type: ignore[assignment]
    return model


def with_parameters(library: str, specification: Specification, parameters: int) -> Specification:
    """The specification with the hidden size whose number of parameters is nearest to the one wanted."""
    low, high = 8, 1024
    while high - low > 1:
        middle = (low + high) // 2
        if count(build(library, replace(specification, hidden=middle))) <= parameters:
            low = middle
        else:
            high = middle
    near = [replace(specification, hidden=h) for h in (low, high)]
    return min(near, key=lambda s: abs(count(build(library, s)) - parameters))
