"""Gaussian data with an exact denoiser in any prediction, and what the tests of noise regression measure with it."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_gen.base import Coefficients, Noised, Output
from pyro_gen.distributions.noise import make_schedule
from pyro_gen.distributions.parameterisations import Prediction, coefficients_of

VARIANCES = (2.0, 0.5, 0.1)


class Rows(nn.Module):
    def __init__(self, net: nn.Module | None, full: int | None = None) -> None:
        super().__init__()
        self.net, self.full = net, full

    def forward(self, x: Tensor, context: Tensor | None = None) -> None:
        with pyro.plate("data", self.full or len(x), subsample_size=len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1), obs=x)


class Gaussian(Noised):
    """N(0, diag(l)) with its exact denoiser, said in any prediction; ``wrong`` is added to what it says of ε."""

    def __init__(
        self,
        schedule: Any = "cosine",
        prediction: Prediction = "epsilon",
        timesteps: int | None = None,
        wrong: float = 0.0,
        full: int | None = None,
    ) -> None:
        super().__init__(Rows(None, full), None, len(VARIANCES), schedule=make_schedule(schedule))
        self.prediction, self.timesteps, self.wrong = prediction, timesteps, wrong
        self.register_buffer("variances", torch.tensor(VARIANCES))
        self.double()
        if timesteps is not None:
            self.grid = self.schedule.grid(timesteps)

    def training_times(self, u: Tensor) -> Tensor:
        if self.timesteps is None:
            return super().training_times(u)
        return self.grid[1 + (u * self.timesteps).long().clamp(max=self.timesteps - 1)].to(u.dtype)

    def coefficients(self, t: Tensor) -> Coefficients:
        return coefficients_of(self.prediction, self.schedule, t)

    def output(self, context: Tensor | None = None, guidance: float | None = None) -> Output:
        def network(y: Tensor, t: Tensor) -> Tensor:
            t = t.unsqueeze(1)
            alpha, sigma, c = self.schedule.alpha(t), self.schedule.sigma(t), self.coefficients(t)
            y, kept = y / c.scale, alpha**2 * self.variances  # type: ignore[operator]
            noise = sigma * y / (kept + sigma**2) + self.wrong
            data = (y - sigma * noise) / alpha
            (a, b), (k, d) = c.data, c.noise
            return torch.where(b.abs() > d.abs(), (data - a * y) / b, (noise - k * y) / d)

        return network


def data(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, len(VARIANCES), dtype=torch.float64, generator=generator) * torch.tensor(VARIANCES).sqrt()


def floor(snr: Tensor) -> Tensor:
    """E |ε − E[ε|y]|² at each signal-to-noise ratio: Σ l SNR / (l SNR + 1)."""
    gain = snr.unsqueeze(-1) * torch.tensor(VARIANCES, dtype=snr.dtype)
    return (gain / (gain + 1)).sum(-1)


def draws(program: Noised, objective: Any, count: int, rows: int = 500) -> Tensor:
    """The loss per row of fresh data, many times: its mean is the expectation."""
    module = objective(program)
    torch.manual_seed(1)
    spread = torch.tensor(VARIANCES, dtype=torch.float64).sqrt()
    with torch.no_grad():
        return torch.stack([module(torch.randn(rows, 3, dtype=torch.float64) * spread) / rows for _ in range(count)])


def off(values: Tensor, expected: float) -> float:
    """Distance from the expectation, in standard errors."""
    return abs(float(values.mean()) - expected) / (float(values.std()) / math.sqrt(len(values)))
