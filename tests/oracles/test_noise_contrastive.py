"""Noise-contrastive estimation against its asymptotic covariance by quadrature, over thousands of replicates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

import pyro_gen as pg
from pyro_gen.objectives.noise_contrastive import NoiseContrastive, NoiseContrastiveModule

TRUTH = torch.tensor([2.0, 0.5 * math.log(math.pi)], dtype=torch.float64)  # λ, and log Z = ½ log(2π / λ)
REPLICATES, ROWS, CHUNK = 4000, 2000, 500


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        yield
        torch.set_default_dtype(torch.float32)


class Quadratic(nn.Module):
    """f = exp(−λ x² / 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)
            pyro.factor("energy", -0.5 * self.precision * x.square().sum(-1))


def covariance(ratio: float) -> Tensor:
    """N · covariance of (λ, log Z) with noise N(0, 1): theorem 3 of Gutmann & Hyvärinen, by quadrature."""
    x = torch.linspace(-12, 12, 40001)
    data, noise = (dist.Normal(0.0, s).log_prob(x).exp() for s in (math.sqrt(0.5), 1.0))
    g = torch.stack([-x.square() / 2, -torch.ones_like(x)])
    weight = ratio * noise / (data + ratio * noise) * data
    information = torch.linalg.inv(torch.trapezoid(g.unsqueeze(1) * g * weight, x))
    m = information @ torch.trapezoid(g * weight, x)
    return information - (1 + 1 / ratio) * torch.outer(m, m)


def estimates(module: NoiseContrastiveModule, ratio: int) -> Tensor:
    """(λ, log Z) of all replicates, by Newton steps on our loss at fixed draws: ``(replicates, 2)``."""
    with pyro.validation_enabled(False):
        module.prepare(torch.randn(10, 1))

        def loss(at: Tensor, x: Tensor, noise: Tensor) -> Tensor:
            module._draw = lambda n, like: noise  # type: ignore[method-assign]  # Newton needs one draw for all steps
            found: Any = functional_call(module, {"model.precision": at[0], "log_z": at[1]}, (x,))
            return found

        def newton(at: Tensor, x: Tensor, noise: Tensor) -> Tensor:
            slope = torch.func.grad(loss)(at, x, noise)
            step: Tensor = torch.linalg.solve(hessian(loss)(at, x, noise), slope)
            return at - step

        found = []
        for _ in range(REPLICATES // CHUNK):
            x, noise = math.sqrt(0.5) * torch.randn(CHUNK, ROWS, 1), torch.randn(CHUNK, ratio * ROWS, 1)
            at = TRUTH.expand(CHUNK, 2)
            for _ in range(3):
                at = vmap(newton)(at, x, noise)
            found.append(at)
    return torch.cat(found).detach()


def deviations(found: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """How far means and N · variances are from the theory, in standard errors."""
    apart, root = found - TRUTH, math.sqrt(len(found))
    # the bias of the estimate is of order 1/N, of its standard deviation √(v/N): a few hundredths of it at N = 2000
    bias = 5.0 / ROWS
    mean = (apart.mean(0).abs() - bias).clamp_min(0) / (apart.std(0) / root)
    square = ROWS * (found - found.mean(0)).square()
    return mean, (square.mean(0) - covariance(ratio).diagonal()).abs() / (square.std(0) / root)


def test_the_theory_is_that_of_the_reference() -> None:
    torch.testing.assert_close(covariance(1).diagonal(), torch.tensor([12.02, 1.261]), rtol=1e-3, atol=0.0)
    # with much noise λ is estimated as by maximum likelihood, 2 λ² = 8; what is left is of order 1/ν
    torch.testing.assert_close(covariance(1e6)[0, 0], torch.tensor(8.0), rtol=1e-4, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 2])
def test_variances_over_replicates(ratio: int) -> None:
    module: Any = NoiseContrastive(dist.Normal(torch.zeros(1), 1.0).to_event(1), ratio)(Quadratic())
    found = estimates(module, ratio)
    mean, spread = deviations(found, ratio)
    assert float(mean.max()) < 4
    assert float(spread.max()) < 4
    assert float(deviations(found, 2 * ratio)[1].max()) > 4  # the theory of another ratio is rejected


@pytest.mark.slow
def test_forgetting_the_ratio_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = NoiseContrastive(dist.Normal(torch.zeros(1), 1.0).to_event(1), 3)(Quadratic())
    real = module._log_odds

    def forgetful(*batch: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        odds_x, odds_y = real(*batch, **kwargs)
        return odds_x + math.log(3), odds_y + math.log(3)

    module._log_odds = forgetful
    monkeypatch.setattr(f"{__name__}.REPLICATES", CHUNK)
    assert float(deviations(estimates(module, 3), 3)[0].max()) > 4


@pytest.mark.slow
def test_log_z_of_a_gaussian_within_its_error() -> None:
    """Full covariance, two features: c − log Z(θ̂) over replicates, each against the error that it states."""

    class Gaussian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diagonal = nn.Parameter(torch.ones(2))
            self.below = nn.Parameter(torch.zeros(()))
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", x.shape[0]):
                pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1).mask(False), obs=x)
                a, b = (x - self.loc).unbind(-1)
                white = torch.stack([self.diagonal[0] * a + self.below * b, self.diagonal[1] * b], -1)
                pyro.factor("energy", -0.5 * white.square().sum(-1))

    scores = []
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randn(500, 2) @ torch.tensor([[1.0, 0.6], [0.0, 0.7]]) + torch.tensor([0.5, -1.0])
        model = Gaussian()
        module: Any = NoiseContrastive(ratio=4)(model)
        module.prepare(x)
        fixed = module._draw(4 * len(x), x)
        module._draw = lambda n, like, fixed=fixed: fixed
        optimizer = torch.optim.LBFGS(module.trainable(), max_iter=300, line_search_fn="strong_wolfe")

        def closure(module: Any = module, x: Tensor = x, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = module(x) / len(x)
            loss.backward()
            return loss

        optimizer.step(closure)
        evidence = module.log_normalizer(x)
        log_z = math.log(2 * math.pi) - model.diagonal.detach().abs().log().sum()
        assert evidence.kind == "estimate"
        assert evidence.standard_error is not None
        scores.append(float((evidence.value - log_z) / evidence.standard_error))
    found = torch.tensor(scores)
    assert float(found.abs().max()) < 4
    # χ² of 8 standard normals: far outside of [1, 27] the stated errors would be wrong by a factor, not by chance
    assert 1.0 < float(found.square().sum()) < 27.0


class Normal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()).to_event(1), obs=x)


def test_log_z_of_an_exact_program_is_zero() -> None:
    torch.manual_seed(1)
    normal = Normal()
    x = 3 + 2 * torch.randn(2000, 1)
    module: Any = NoiseContrastive(ratio=2)(pg.Exact(normal, 1))
    pg.fit(module, x, steps=600, batch_size=500, lr=0.02, schedule="cosine", seed=0, progress=False)
    evidence = module.log_normalizer(x)
    # the optimizer's last steps are of mini-batches: allowed is what 4 standard errors of 500 rows are
    assert abs(float(evidence.value)) < 4 * float(evidence.standard_error) * 2
