r"""A linear VAE is probabilistic PCA: `fit` has to find an optimum that is known in closed form.

z ~ N(0, I_q), x | z ~ N(W z + b, σ² I), so x ~ N(b, W Wᵀ + σ² I) and z | x ~ N(M⁻¹ Wᵀ (x - b), σ² M⁻¹) with
M = WᵀW + σ² I. At maximum likelihood b is the mean, σ² the mean of the d - q smallest eigenvalues of the covariance,
and W = U (Λ - σ² I)^½ R for any rotation R (Tipping & Bishop 1999). A diagonal guide can be the posterior only where
the columns of W are orthogonal, and the ELBO prefers those (Lucas et al. 2019, arXiv:1911.02469).
"""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_gen as pg

Q = 10
REFERENCE = -74.26018  # nats per datum, digits, 61 columns, standardised, maximum likelihood


def digits() -> Tensor:
    """All 1797 rows; the 61 columns that are not constant, with mean 0 and variance 1 (over n)."""
    x = torch.from_numpy(load_digits().data)
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0, correction=0)


def best_evidence(x: Tensor) -> float:
    """Log-likelihood per datum of PPCA at its maximum, from the eigenvalues of the covariance."""
    values = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    d, noise = x.shape[1], values[Q:].mean()
    return -0.5 * float(d * math.log(2 * math.pi) + values[:Q].log().sum() + (d - Q) * noise.log() + d)


class Fitted:
    """A linear VAE after `fit`, and the closed forms at its own weights, in float64."""

    def __init__(self, x: Tensor, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            decoder, encoder = nn.Linear(Q, 61), nn.Linear(61, 2 * Q)
        self.vae = pg.VAE(61, latent_dim=Q, encoder=encoder, decoder=decoder, likelihood="normal", scale="shared")
        # A few rows stand 40 standard deviations out: unclipped, they throw the encoder's scales about.
        self.result = pg.fit(
            pg.ELBO(analytic_kl=True)(self.vae), x.float(), steps=3000, batch_size=599, lr=0.02, schedule="cosine",
            clip_norm=1.0, average="tail", seed=seed, compile=False, progress=False,
        )  # fmt: skip
        with torch.no_grad():
            w, b = decoder.weight.double(), decoder.bias.double()
            (log_scale,) = self.vae.model.likelihood.parameters()
            noise = (2 * log_scale.double()).exp()
            m = w.T @ w + noise * torch.eye(Q)
            marginal = torch.distributions.MultivariateNormal(b, w @ w.T + noise * torch.eye(61))
            self.evidence = marginal.log_prob(x)
            self.mean, self.covariance = (x - b) @ w @ torch.linalg.inv(m), noise * torch.linalg.inv(m)
            q = self.vae.encode(x.float())
            self.loc, self.scale = q.mean.double(), q.stddev.double()
            # KL of the guide, a diagonal normal, to the posterior, row by row
            precision, gap = m / noise, self.loc - self.mean
            self.kl = 0.5 * (
                (self.scale.square() * precision.diagonal()).sum(1) + ((gap @ precision) * gap).sum(1) - Q
                + torch.logdet(self.covariance) - 2 * self.scale.log().sum(1)
            )  # fmt: skip


@pytest.fixture(scope="module")
def x() -> Tensor:
    return digits()


@pytest.fixture(scope="module", params=[0, 1])
def fitted(x: Tensor, request: pytest.FixtureRequest) -> Fitted:
    return Fitted(x, request.param)


def test_reference(x: Tensor) -> None:
    assert x.shape == (1797, 61)
    assert best_evidence(x) == pytest.approx(REFERENCE, abs=1e-4)


@pytest.mark.slow
def test_evidence_is_that_of_ppca(x: Tensor, fitted: Fitted) -> None:
    mean = float(fitted.evidence.mean())
    assert abs(mean - REFERENCE) < 0.05
    assert mean <= best_evidence(x) + 1e-9  # no weights do better


@pytest.mark.slow
def test_guide_is_the_posterior(fitted: Fitted) -> None:
    assert bool((fitted.kl > -1e-9).all())
    assert float(fitted.kl.mean()) < 0.05  # the tolerance of the evidence; a bound is tight where the KL is zero
    # KL >= half the squared distance of the means in standard deviations, summed over the latents
    distance = ((fitted.loc - fitted.mean) / fitted.covariance.diagonal().sqrt()).square().sum(1)
    assert float(distance.mean()) < 2 * 0.05
    ratio = fitted.scale.median(0).values / fitted.covariance.diagonal().sqrt()
    # KL of two normals of one mean, scales 1 : r, is above 0.05 for r outside [0.75, 1.24]
    assert bool(((ratio > 0.75) & (ratio < 1.24)).all())
    correlation = fitted.covariance / torch.outer(*[fitted.covariance.diagonal().sqrt()] * 2)
    # with correlations R the best diagonal guide has KL -log det R / 2, no more than what was found
    assert -0.5 * float(torch.logdet(correlation)) <= float(fitted.kl.mean()) + 1e-9


@pytest.mark.slow
def test_elbo_is_the_evidence_less_the_kl(x: Tensor, fitted: Fitted) -> None:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([fitted.vae.lower_bound(x.float()) for _ in range(50)]).double()  # (draws, rows)
    elbo, error = draws.mean(), draws.mean(1).std() / math.sqrt(50)
    expected = fitted.evidence.mean() - fitted.kl.mean()
    assert abs(float(elbo - expected)) < 4 * float(error)
    assert float(elbo) <= float(fitted.evidence.mean()) + 4 * float(error)
    assert float(fitted.evidence.mean() - expected) > 0


@pytest.mark.slow
def test_importance_sampling_finds_the_evidence(x: Tensor, fitted: Fitted) -> None:
    few = slice(0, 300)
    found = pg.log_evidence(fitted.vae, x[few].float(), method=pg.ImportanceSampling(300, seed=0)).mean()
    assert found.standard_error is not None
    # the log of a mean is too low by half its squared error, to first order; float32 rounds sums of 61 terms
    bias = 0.5 * float(found.standard_error) ** 2 * 300
    assert abs(float(found.value - fitted.evidence[few].mean())) < 4 * float(found.standard_error) + bias + 1e-4
