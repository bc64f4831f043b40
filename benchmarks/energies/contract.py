r"""What is asked of a library: energies, the same torch modules for all, and what a *case* does with them.

A training case is a loss, the mean over the rows of a batch, whose gradient an optimizer follows; a chain case moves
512 chains and returns where they end. Conventions differ, and nothing is converted in what is timed:

- Langevin's step η is torchebm's, :math:`x' = x - \eta \nabla E + \sqrt{2\eta}\,n`; in ours :math:`\varepsilon =
  \sqrt{2\eta}`. HMC's step is the leapfrog's in both.
- The denoising loss of torchebm is :math:`\frac12 |s + n/\sigma|^2`; ours carries :math:`\sigma^2` (`UNITS`).

Both libraries draw noise by torch's generator in the same order and shape, but for HMC's uniforms and Rademacher's
signs: after one seed they meet the same noise, and results may be compared number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "CHAINS",
    "SIGMA",
    "TRAINING",
    "UNITS",
    "Answers",
    "Case",
    "Moves",
    "answers",
    "energy",
    "optimizer_of",
    "parts",
    "step",
]

Case = Literal["exact", "sliced", "denoising", "cd", "langevin", "hmc"]
Kind = Literal["mlp", "quadratic", "correlated", "semicircle", "overflow"]
TRAINING: tuple[Case, ...] = ("exact", "sliced", "denoising", "cd")
CHAINS: tuple[Case, ...] = ("langevin", "hmc")
SIGMA = 0.3  # of denoising score matching
UNITS = {"denoising": SIGMA**2}  # our loss in units of torchebm's
HIDDEN = 128
RATE = 1e-6  # of the optimizer that is timed: a free network on one batch would run away under more


@dataclass(frozen=True)
class Moves:
    """How chains are moved: Langevin's η or HMC's ε, transitions, and leapfrog steps of one."""

    step_size: float = 0.005
    steps: int = 100
    leapfrog: int = 10


class Answers(Protocol):
    """A library's module, `build_<library>.py`; both return functions without arguments, set up once."""

    def loss(self, case: Case, net: nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[[], Tensor]:
        """The mean loss of the rows."""

    def chains(self, case: Case, net: nn.Module, start: Tensor, moves: Moves) -> Callable[[], Tensor]:
        """Where chains from `start` end."""


def answers(library: str) -> Any:
    """The module of a library."""
    return import_module(f"energies.build_{library}")


# ------------------------------------------------------------------------------------------------------------ energies
class Quadratic(nn.Module):
    """λ|x|²/2."""

    def __init__(self, precision: float) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(precision))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.precision * x.square().sum(-1, keepdim=True)


class Correlated(nn.Module):
    """A normal of two numbers, sd 1 and 2, correlation .8."""

    covariance: Tensor
    precision: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("covariance", torch.tensor([[1.0, 1.6], [1.6, 4.0]]))
        self.register_buffer("precision", torch.linalg.inv(self.covariance.double()).to(self.covariance))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((x @ self.precision) * x).sum(-1, keepdim=True)


class Semicircle(nn.Module):
    """E = −½ log(1 − x²) on (−1, 1), not a number outside; variance 1/4."""

    def forward(self, x: Tensor) -> Tensor:
        return -torch.log(torch.sqrt(1 - x.square())).sum(-1, keepdim=True)


class Overflow(nn.Module):
    """An energy that is infinite in float32 for rows beyond |x| = 90."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.rate * x.abs()).sum(-1, keepdim=True)


def energy(kind: Kind, features: int, seed: int = 0, precision: float = 1.0) -> nn.Module:
    """The module behind a case: a network with smooth units and no output bias, or a closed form.

    Returns:
        A module from ``(rows, features)`` to ``(rows, 1)``; the same weights for all libraries, as torch is the same.
    """
    torch.manual_seed(seed)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(features, HIDDEN),
            nn.Softplus(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.Softplus(),
            nn.Linear(HIDDEN, 1, bias=False),
        )
    closed: dict[str, Callable[[], nn.Module]] = {
        "quadratic": lambda: Quadratic(precision),
        "correlated": Correlated,
        "semicircle": Semicircle,
        "overflow": Overflow,
    }
    return closed[kind]()


def parts(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """Torch's fused Adam, for everybody."""
    return torch.optim.Adam(parts(net), lr=RATE, fused=True)


def step(evaluate: Callable[[], Tensor], net: nn.Module) -> Callable[[], None]:
    """A training step: loss, gradients, one step of the optimizer."""
    optimizer = optimizer_of(net)

    def run() -> None:
        optimizer.zero_grad()
        evaluate().backward()
        optimizer.step()

    return run
