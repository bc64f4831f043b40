r"""What a flow guide leaves of the gap between bound and evidence, against evidences in closed form or by quadrature.

On a linear-Gaussian program the posterior is a normal, correlated, and the gap can vanish. With x ~ N(z², s²) the
posterior of a number has two modes, at ±√x; with x ~ N(z₂ + z₁²/2, s²) that of a pair is a banana. A diagonal guide has
to leave out a mode (log 2 nats at least, where they are apart) or most of the banana; a flow does not. Where latents
live on a half-line, the Jacobian of the map there is part of log q: left out, the "bound" is above the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.guides import AmortizedFlow, amortized_flow

LOADINGS = torch.tensor([[1.0, 0.5], [-0.3, 1.2], [0.8, -0.7]])
NOISE = 0.6


def linear(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T, NOISE * x.new_ones(3)).to_event(1), obs=x)


def two_modes(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.5 * x.new_ones(1)).to_event(1), obs=x)


def banana(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
        mean = z[..., 1:] + z[..., :1].square() / 2
        pyro.sample("x", dist.Normal(mean, 0.1 * x.new_ones(1)).to_event(1), obs=x)


def rates(x: Tensor) -> None:
    one = x.new_ones(())
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(3 * one, one))
        pyro.sample("x", dist.Poisson(rate.unsqueeze(-1)).to_event(1), obs=x)


class Diagonal(nn.Module):
    """The usual guide, with a network like the flow's."""

    def __init__(self, features: int, latent: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(features, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
        self.head = nn.Linear(32, 2 * latent)

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.head(self.network(x)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def gap(model: Any, guide: Any, x: Tensor, evidence: Tensor, **options: Any) -> tuple[float, float]:
    """Evidence less bound after a fit, nats a row, and its standard error over the draws."""
    module = pg.ELBO(4, vectorize_particles=True)(model, guide)
    options = {"steps": 500, "batch_size": 128, "lr": 5e-3, **options}
    pg.fit(module, x, schedule="cosine", clip_norm=10.0, seed=0, progress=False, **options)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        bound = torch.stack([-module.pointwise(x).double().mean() for _ in range(100)])
    return float(evidence.double().mean() - bound.mean()), float(bound.std()) / 10


def sums(log_joint: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """log ∫ p(x, z) dz on a line of z, the trapezoidal rule: spectrally exact for what is smooth and dies out."""
    line = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    step = math.log(float(line[1] - line[0]))
    return torch.stack([torch.logsumexp(log_joint(row, line), 0) + step for row in x.double()])


def log_normal(value: Any, mean: Any, scale: float) -> Tensor:
    return torch.distributions.Normal(mean, scale).log_prob(value)


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.slow
def test_no_gap_where_the_posterior_is_a_normal() -> None:
    covariance = LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(3)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(3), covariance)
    x = marginal.sample((512,))
    guide = AmortizedFlow(linear, "affine_autoregressive", hidden=(32, 32))
    left, error = gap(linear, guide, x, marginal.log_prob(x))
    assert -4 * error < left < 0.02
    fresh = AmortizedFlow(linear, "affine_autoregressive", hidden=(32, 32))
    with torch.no_grad():
        unfitted = -pg.ELBO()(linear, fresh).pointwise(x).mean()
    assert marginal.log_prob(x).mean() - unfitted > 0.5  # what the fit has closed


@pytest.mark.slow
def test_two_modes() -> None:
    x = torch.randn(256, 1).square() + 0.5 * torch.randn(256, 1)
    evidence = sums(lambda row, z: log_normal(row, z.square(), 0.5) + log_normal(z, 0.0, 1.0), x)
    plain, _ = gap(two_modes, Diagonal(1, 1), x, evidence)
    left, error = gap(two_modes, AmortizedFlow(two_modes, hidden=(32, 32)), x, evidence)
    assert -4 * error < left < plain / 3


@pytest.mark.slow
def test_a_banana() -> None:
    z = torch.randn(256, 2)
    x = z[:, 1:] + z[:, :1].square() / 2 + 0.1 * torch.randn(256, 1)
    spread = math.sqrt(1 + 0.1**2)  # z₂ in closed form: x | z₁ ~ N(z₁²/2, 1 + s²)
    evidence = sums(lambda row, z: log_normal(row, z.square() / 2, spread) + log_normal(z, 0.0, 1.0), x)
    plain, _ = gap(banana, Diagonal(1, 2), x, evidence)
    left, error = gap(banana, AmortizedFlow(banana, hidden=(32, 32)), x, evidence)
    assert -4 * error < left < plain / 10


def counted(x: Tensor) -> Tensor:
    """A Poisson of a Gamma(3, 1) rate is a negative binomial of 3 failures and p = 1/2."""
    law = torch.distributions.NegativeBinomial(3.0, probs=torch.tensor(0.5))
    return law.log_prob(x.squeeze(-1)).double()


@pytest.mark.parametrize("wrong", [None, "no Jacobian", "the other sign"])
def test_the_jacobian_of_the_support_counts(wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean weight of draws on the half-line is the evidence, whatever the guide; with a wrong Jacobian not."""
    if wrong is not None:
        honest = dist.Delta

        def delta(value: Tensor, log_density: Tensor, event_dim: int) -> Any:
            return honest(value, log_density=0 * log_density if wrong == "no Jacobian" else -log_density)

        monkeypatch.setattr(amortized_flow.dist, "Delta", delta)
    x = torch.arange(8.0).unsqueeze(-1)
    guide = AmortizedFlow(rates, hidden=(16,), init_scale=1.0)
    program = pg.Bounded(rates, guide, 1)
    found = pg.log_evidence(program, x, method=pg.ImportanceSampling(20_000, seed=0))
    assert found.standard_error is not None
    distance = ((found.value - counted(x)).abs() / found.standard_error).max()
    assert distance < 4 if wrong is None else distance > 20
