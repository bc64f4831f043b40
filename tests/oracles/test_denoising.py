"""Denoising score matching against closed forms: its known bias, its mixtures, the variance of its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_gen.objectives.denoising import DenoisingScoreMatching

ROWS, VARIANCE = 200_000, 0.5


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        yield
        torch.set_default_dtype(torch.float32)


class Quadratic(nn.Module):
    def __init__(self, precision: float = 1.0) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(precision))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)
            pyro.factor("energy", -0.5 * self.precision * x.square().sum(-1))


class Mixture(nn.Module):
    """log f = log Σ π_l N(0, 1 + σ_l²) + a x² + b x⁴ / 100: the mixture itself at a = b = 0."""

    def __init__(self, shares: list[float], sigmas: tuple[float, ...]) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.zeros(2))
        self.shares, self.sigmas = shares, sigmas

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            spread = (1 + torch.tensor(self.sigmas).square()).sqrt()
            parts = dist.Categorical(torch.tensor(self.shares)), dist.Normal(torch.zeros(len(spread)), spread)
            pyro.sample("x", dist.MixtureSameFamily(*parts), obs=x.squeeze(-1))
            y = x.squeeze(-1)
            pyro.factor("tilt", self.tilt[0] * y**2 + self.tilt[1] * y**4 / 100)


def slopes(module: Any, x: Tensor, parameter: Tensor, seed: int = 1) -> Tensor:
    """Gradient of each row's loss in each entry of a parameter: ``(rows, entries)``."""
    names = {id(p): n for n, p in module.named_parameters()}
    name = names[id(parameter)]
    columns = []
    module.prepare(x[:10])
    for direction in torch.eye(parameter.numel()):
        torch.manual_seed(seed)

        def along(value: Tensor) -> Tensor:
            found: Any = torch.func.functional_call(_Rows(module), {f"module.{name}": value}, (x,))
            return found

        columns.append(torch.func.jvp(along, (parameter.detach(),), (direction.reshape(parameter.shape),))[1])
    return torch.stack(columns, 1)


class _Rows(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.module.pointwise(x)
        return rows


def worst(gradients: Tensor) -> float:
    """The largest mean gradient in standard errors."""
    return float((gradients.mean(0).abs() / (gradients.std(0) / math.sqrt(len(gradients)))).max())


def test_rows_are_the_formula() -> None:
    x = torch.randn(7, 1)
    module = DenoisingScoreMatching(0.3)(Quadratic(1.7))
    module.prepare(x)
    torch.manual_seed(5)
    rows = module.pointwise(x)
    torch.manual_seed(5)
    n = torch.normal(torch.zeros(7, 1), torch.ones(7, 1))
    score = -1.7 * (x + 0.3 * n)
    torch.testing.assert_close(rows, 0.5 * 0.3**2 * (score + n / 0.3).square().sum(1))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_known_bias(sigma: float, antithetic: bool) -> None:
    x = math.sqrt(VARIANCE) * torch.randn(ROWS, 1)
    for precision, is_least in ((1 / (VARIANCE + sigma**2), True), (1.3 / (VARIANCE + sigma**2), False)):
        model = Quadratic(precision)
        found = slopes(DenoisingScoreMatching(sigma, antithetic=antithetic)(model), x, model.precision)
        assert (worst(found) < 4) is is_least


def test_data_precision_is_not_the_estimate() -> None:
    model = Quadratic(1 / VARIANCE)
    x = math.sqrt(VARIANCE) * torch.randn(ROWS, 1)
    assert worst(slopes(DenoisingScoreMatching(0.5)(model), x, model.precision)) > 4


def test_relative_sigma_counts_standard_deviations() -> None:
    x = 3 * torch.randn(ROWS, 1)
    model = Quadratic(1 / (float(x.var(unbiased=False)) * 1.25))
    module: Any = DenoisingScoreMatching(0.5, relative=True)(model)
    module.initialise(x)
    assert worst(slopes(module, x, model.precision)) < 4


@pytest.mark.parametrize("given", [None, (0.9, 0.1)])
def test_one_energy_for_all_levels_is_a_mixture(given: tuple[float, ...] | None) -> None:
    sigmas = (0.5, 2.0)
    x = torch.randn(ROWS, 1)
    shares = list(given) if given else [s**2 for s in sigmas]
    loss = DenoisingScoreMatching(sigmas=sigmas, mixture=given)
    model = Mixture(shares, sigmas)
    assert worst(slopes(loss(model), x, model.tilt)) < 4
    other = Mixture([0.5, 0.5], sigmas)
    assert worst(slopes(loss(other), x, other.tilt)) > 4


def test_each_level_of_a_conditional_energy_is_its_own_density() -> None:
    class Conditional(nn.Module):
        def __init__(self, at: float) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.tensor([at, at]))

        def forward(self, x: Tensor, level: Tensor) -> None:
            with pyro.plate("data", x.shape[0]):
                variance = VARIANCE + (2 * level).exp()
                weight = 1 / variance + torch.where(level > -0.5, self.offset[0], self.offset[1]).reshape(-1, 1)
                pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)
                pyro.factor("energy", -0.5 * (weight * x.square()).sum(-1))

    x = math.sqrt(VARIANCE) * torch.randn(ROWS, 1)
    for at, is_least in ((0.0, True), (0.1, False)):
        model = Conditional(at)
        module = DenoisingScoreMatching(sigmas=(0.3, 1.0), condition=True)(model)
        assert (worst(slopes(module, x, model.offset)) < 4) is is_least


def test_pairs_of_noise_keep_the_gradient_finite() -> None:
    """∂ρ/∂λ has variance σ² v to first order with single draws, 2 σ⁴ (1 + λ² v²) with pairs; λ = 1 / v here."""
    sigma, x = 0.01, math.sqrt(VARIANCE) * torch.randn(ROWS, 1)
    for antithetic, expected in ((False, sigma**2 * VARIANCE), (True, 4 * sigma**4)):
        model = Quadratic(1 / VARIANCE)
        found = slopes(DenoisingScoreMatching(sigma, antithetic=antithetic)(model), x, model.precision)
        # relative error of a variance: √((κ − 1) / N), κ < 20 here, and terms of relative order σ
        assert abs(float(found.var()) / expected - 1) < 4 * math.sqrt(20 / ROWS) + sigma
