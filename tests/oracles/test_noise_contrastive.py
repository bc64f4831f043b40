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
from pyro_gen.objectives.noises import FittedNormal

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
    result: Tensor = information - (1 + 1 / ratio) * torch.outer(m, m)
    return result


def estimates(module: NoiseContrastiveModule, ratio: int) -> Tensor:
    """(λ, log Z) of all replicates, by Newton steps on our loss at fixed draws: ``(replicates, 2)``."""
    with pyro.validation_enabled(False):
        module.prepare(torch.randn(10, 1))

        def loss(at: Tensor, x: Tensor, noise: Tensor) -> Tensor:
            module._draw = lambda n, like: noise  # type: ignore[method-assign]  # Newton needs one draw for all steps
            found: Tensor = functional_call(module, {"model.precision": at[0], "log_z": at[1]}, (x,))
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


def settle(module: NoiseContrastiveModule, x: Tensor) -> None:
    """Minimise the loss at one draw of the noise, to rounding."""
    module.prepare(x)
    fixed = module._draw(module.objective.ratio * len(x), x)
    module._draw = lambda n, like: fixed  # type: ignore[method-assign]
    optimizer = torch.optim.LBFGS(
        module.trainable(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-14
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = module(x) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)


class Quartic(nn.Module):
    """f = exp(−θ x⁴ / 4), log Z = log(2 Γ(5/4)) + ¼ log(4 / θ)."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(False), obs=x)
            pyro.factor("energy", -self.precision * x.squeeze(-1) ** 4 / 4)

    @staticmethod
    def draw(*shape: int) -> Tensor:
        drawn: Tensor = (4 * dist.Gamma(0.25, 1.0).sample(shape)) ** 0.25 * torch.randn(shape).sign()
        return drawn

    @staticmethod
    def log_z(precision: Tensor) -> Tensor:
        return math.log(2) + math.lgamma(1.25) + 0.25 * (4 / precision).log()


class Parabola(Quadratic):
    @staticmethod
    def draw(*shape: int) -> Tensor:
        return math.sqrt(0.5) * torch.randn(shape)

    @staticmethod
    def log_z(precision: Tensor) -> Tensor:
        return 0.5 * (2 * math.pi / precision).log()


def errors_of(kind: Any, fitted: bool, rows: int, replicates: int) -> Tensor:
    """c − log Z(θ̂) over replicates, by Newton; noise N(0, s²) with s² of the same data, or of others without end."""
    module: Any = NoiseContrastive(dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))(kind())
    found = []
    with pyro.validation_enabled(False):
        module.prepare(torch.randn(10, 1))
        scale_name = next(name for name, _ in module.named_buffers() if name.endswith("scale"))
        wide = kind.draw(1_000_000).square().mean().sqrt()

        def loss(at: Tensor, x: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
            module._draw = lambda n, like: scale * noise
            state = {"model.precision": at[0], "log_z": at[1], scale_name: scale}
            found: Tensor = functional_call(module, state, (x,))
            return found

        def newton(at: Tensor, *draws: Tensor) -> Tensor:
            step: Tensor = torch.linalg.solve(hessian(loss)(at, *draws), torch.func.grad(loss)(at, *draws))
            return at - step

        for _ in range(replicates // CHUNK):
            x, noise = kind.draw(CHUNK, rows, 1), torch.randn(CHUNK, rows, 1)
            scale = x.square().mean(1).sqrt() if fitted else wide.expand(CHUNK, 1)
            start = module.model.precision.detach()
            at = torch.stack([start, kind.log_z(start)]).expand(CHUNK, 2)
            for _ in range(5):
                at = vmap(newton)(at, x, noise, scale)
            found.append(at.detach())
    every = torch.cat(found)
    return every[:, 1] - kind.log_z(every[:, 0])


def stated(kind: Any, fitted: bool, rows: int, replicates: int) -> Tensor:
    """The squares of the errors that are stated, over replicates of the same."""
    squares = []
    for seed in range(replicates):
        torch.manual_seed(seed)
        x = kind.draw(rows, 1)
        scale = (x if fitted else kind.draw(1_000_000, 1)).square().mean().sqrt()
        module: Any = NoiseContrastive(dist.Normal(torch.zeros(1), scale).to_event(1))(kind())
        if fitted:  # with mean 0, which is known here
            module.noise = FittedNormal(True)
            module.noise.fit(torch.stack([scale, -scale]).reshape(2, 1))
        settle(module, x)
        squares.append(float(module.log_normalizer(x).standard_error) ** 2)
    return torch.tensor(squares)


@pytest.mark.slow
@pytest.mark.parametrize("fitted", [True, False])
def test_log_z_where_the_noise_is_the_model(fitted: bool) -> None:
    """No error of first order; of second b · (a − b), with a = 0 where the noise was fitted: −χ²/N, ν = p = 1."""
    rows, count = 2000, 1000
    errors = rows * errors_of(Parabola, fitted, rows, count)
    # E χ⁴ = 3 and E a² b² = 1; χ² has variance 2, its square 105 − 9 = 96; the next order is smaller by 1/√N = .02
    square = 3.0 if fitted else 4.0
    assert abs(float(errors.mean()) + 1) < 4 * math.sqrt(square / count) + 0.1
    assert abs(float(errors.square().mean()) / square - 1) < 4 * math.sqrt(96 / count) / square + 0.15
    if fitted:
        assert float((errors < 0.1).double().mean()) > 0.99  # never above, but for the next order
    said = float(400**2 * stated(Parabola, fitted, 400, 8).mean())
    # 3, and the sandwich's own (θ̂ − θ)² / 2: χ² / 2 where the noise was fitted, χ² where not; χ² over 8 is 1 ± .5
    sandwich = said - 3
    assert abs(sandwich / (0.5 if fitted else 1.0) - 1) < 4 * 0.5
    assert sandwich < 0.7 * square  # which alone would state too little


@pytest.mark.slow
@pytest.mark.parametrize("fitted", [True, False])
def test_log_z_by_noise_of_another_shape(fitted: bool) -> None:
    """The first order, which the fit of the noise does not change."""
    rows, count = 1600, 1000
    errors = errors_of(Quartic, fitted, rows, count)
    said = stated(Quartic, fitted, rows, 4)
    # over 1000 replicates a variance is good to 4 √(2/1000) = .18; what is stated for the second order is .07 here
    assert abs(float(said.mean() / errors.square().mean()) - 1) < 0.25 + 4 * float(said.std() / said.mean()) / 4**0.5
    assert float(said.std() / said.mean()) < 0.3


class Normal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()).to_event(1), obs=x)


def test_log_z_of_an_exact_program_is_zero() -> None:
    torch.manual_seed(1)
    x = 3 + 2 * torch.randn(500, 1)
    module: Any = NoiseContrastive(ratio=2)(pg.Exact(Normal(), 1))
    settle(module, x)
    evidence = module.log_normalizer(x)
    assert abs(float(evidence.value)) < 4 * float(evidence.standard_error)
    assert float(evidence.standard_error) < 2 * math.sqrt(8) / 1000  # √(p (p + 2)) / νN, and little else


def test_weights_that_have_not_arrived_state_no_error() -> None:
    torch.manual_seed(1)
    x = 1 + 2 * torch.randn(200, 1)
    module: Any = NoiseContrastive()(pg.Exact(Normal(), 1))
    module.prepare(x)
    assert module.log_normalizer(x).standard_error is None
    pg.fit(module, x, steps=400, lr=0.05, schedule="cosine", seed=0, progress=False)
    error = module.log_normalizer(x).standard_error
    assert error is not None
    assert abs(float(module.log_z.detach())) < 4 * float(error)
