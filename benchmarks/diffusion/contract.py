"""What is asked of a library: draws by one network, in so many steps, as fast as it can.

The network is one torch module with the same weights for all, two hidden layers of 64 over (y, t), trained for a moment
to predict the noise of the linear schedule of 1000 steps: draws then stay of the size that data have, at which its
activations take their usual time. A library's module, `build_<library>.py`, has

- ``draws(case, net, steps, rows)``: a function without arguments that draws rows, from fresh noise;
- where its levels can be chosen, ``ends(case, net, times, start)``: where rows end that start as given, without noise.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["FEATURES", "TRAINED", "Case", "Network", "Still", "answers", "network", "signal", "visited"]

Case = Literal["ddpm", "ddim", "dpm++2m"]
FEATURES = 2
TRAINED = 1000  # levels


class Network(nn.Module):
    """The noise in y at level t: an MLP that has t as another feature."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES + 1, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, FEATURES),
        )

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([y, t.unsqueeze(-1)], -1))
        return out


class Still(nn.Module):
    """A network that does not look at t, for comparing libraries that count it differently."""

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(y)


def signal() -> Tensor:
    """The product of 1 − β, from 1e-4 to .02 in 1000 steps."""
    return (1 - torch.linspace(1e-4, 0.02, TRAINED, dtype=torch.float64)).cumprod(0)


def visited(steps: int) -> list[int]:
    """Levels, counted from 0, that both libraries go through where they are compared: even, from the last down."""
    return [round(i * (TRAINED - 1) / (steps - 1)) for i in range(steps - 1, -1, -1)]


def network(seed: int = 0, steps: int = 400) -> Network:
    """The network after that many steps on eight normals around a circle."""
    torch.manual_seed(seed)
    net, level = Network(), signal()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, fused=True)
    for _ in range(steps):
        angle = torch.randint(8, (512,)) * (2 * torch.pi / 8)
        x = 1.4 * torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(512, FEATURES)
        k, noise = torch.randint(TRAINED, (512,)), torch.randn(512, FEATURES)
        a = level[k].float().unsqueeze(-1)
        loss = (net(a.sqrt() * x + (1 - a).sqrt() * noise, (k + 1) / TRAINED) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def answers(library: str) -> Any:
    """The module of a library."""
    return import_module(f"diffusion.build_{library}")
