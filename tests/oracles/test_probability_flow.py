"""The probability-flow ODE against mixtures of Gaussians, whose densities at every noise level are in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import nn

from pyro_gen.distributions import transport
from pyro_gen.distributions.noise import make_schedule
from pyro_gen.distributions.transport import Transport
from pyro_gen.programs.diffusion import Diffusion
from pyro_gen.samplers.probability_flow import ProbabilityFlow

DOUBLE = torch.float64


class Mixture(nn.Module):
    """A mixture of normals of mean 0 and covariance I over all, and its denoiser at every level."""

    def __init__(self, schedule, dims=2, components=3, prediction="x0", seed=0, tight=0.15):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        weights = torch.rand(components, generator=g, dtype=DOUBLE) + 0.3
        weights /= weights.sum()
        means = 2 * torch.randn(components, dims, generator=g, dtype=DOUBLE)
        factors = torch.randn(components, dims, dims, generator=g, dtype=DOUBLE) * math.sqrt(tight / dims)
        covs = factors @ factors.mT + tight * torch.eye(dims, dtype=DOUBLE)
        means = means - weights @ means
        total = (weights[:, None, None] * (covs + means[:, :, None] * means[:, None])).sum(0)
        root = torch.linalg.inv(torch.linalg.cholesky(total))  # so that N(0, I) at the far end is wrong in α³ only
        self.weights, self.means, self.covs = weights, means @ root.T, root @ covs @ root.T
        self.schedule, self.prediction = make_schedule(schedule), prediction

    def at(self, alpha, sigma):
        """The density of αu + σε."""
        covs = alpha**2 * self.covs + sigma**2 * torch.eye(self.means.shape[1], dtype=DOUBLE)
        parts = dist.MultivariateNormal(alpha * self.means, covs)
        return dist.MixtureSameFamily(dist.Categorical(self.weights), parts)

    def forward(self, y, t):
        alpha, sigma = self.schedule.alpha(t[0]), self.schedule.sigma(t[0])
        covs = alpha**2 * self.covs + sigma**2 * torch.eye(y.shape[1], dtype=DOUBLE)
        centred = y[:, None] - alpha * self.means
        solved = torch.linalg.solve(covs, centred.unsqueeze(-1)).squeeze(-1)
        log = self.weights.log() - (centred * solved).sum(-1) / 2 - torch.logdet(covs) / 2
        score = -(log.softmax(-1).unsqueeze(-1) * solved).sum(1)
        return -sigma * score if self.prediction == "epsilon" else (y + sigma**2 * score) / alpha


def mixture(schedule="cosine", **options):
    net = Mixture(schedule, **options)
    dims = net.means.shape[1]
    program = Diffusion(
        dims, network=net, schedule=schedule, timesteps=None, prediction=net.prediction, standardise=False
    ).double()
    near = math.exp(Transport(program).ends[0])
    return program, net.at(1.0, near)  # the data blurred by the least noise


def draws_of(density, n, seed=1):
    with pyro.poutine.block(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return density.sample((n,))


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "karras", "exploding", "rectified"])
def test_the_density_is_that_of_the_blurred_mixture(schedule, prediction):
    program, truth = mixture(schedule, prediction=prediction)
    x = draws_of(truth, 40)
    evidence = ProbabilityFlow().log_evidence(program, x)
    assert evidence.kind == "exact"
    error = (evidence.value - truth.log_prob(x)).abs()
    assert error.max() < 1e-4  # the aim at rtol 1e-5; the far end's bias is of size α³ < 1e-6


def test_a_lost_half_or_a_lost_scale_would_be_seen():
    program, truth = mixture()
    x = draws_of(truth, 20)
    z, ladj = ProbabilityFlow().encode(program, x)
    base = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    assert torch.allclose(base + ladj, truth.log_prob(x), atol=1e-4)
    assert not torch.allclose(base + ladj / 2, truth.log_prob(x), atol=1e-2)
    with torch.no_grad():
        program.model.location.copy_(torch.tensor([1.0, -2.0]))
        program.model.scale.copy_(torch.tensor([3.0, 0.5]))
    moved = program.location + program.scale * x
    value = ProbabilityFlow().log_evidence(program, moved).value
    assert torch.allclose(value, truth.log_prob(x) - math.log(1.5), atol=1e-4)
    assert not torch.allclose(value, truth.log_prob(x), atol=1e-1)


def test_hutchinson_has_the_exact_mean_and_its_own_error():
    program, truth = mixture(dims=3)
    x = draws_of(truth, 12)
    exact = ProbabilityFlow(trace="exact").log_evidence(program, x).value
    guess = ProbabilityFlow(trace="hutchinson", probes=100, seed=0).log_evidence(program, x)
    assert guess.kind == "estimate"
    z = (guess.value - exact) / guess.standard_error
    assert z.abs().max() < 4.5  # of 12 rows
    assert guess.standard_error.min() > 1e-4  # it is not exact by accident


def test_there_and_back():
    program, truth = mixture()
    x = draws_of(truth, 30)
    flow = ProbabilityFlow(rtol=1e-7, atol=1e-7)
    z, there = flow.encode(program, x)
    back, again = flow.decode(program, z)
    assert torch.allclose(back, x, atol=1e-5)
    assert torch.allclose(there, -again, atol=1e-4)


def test_gaussian_data_are_mapped_linearly():
    program, _ = mixture(components=1)
    net = program.model.net
    with torch.no_grad():
        net.covs = torch.tensor([[[2.0, 0.6], [0.6, 0.5]]], dtype=DOUBLE)
    z = torch.randn(10, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    x, ladj = ProbabilityFlow(rtol=1e-8, atol=1e-8).decode(program, z)
    near, far = (math.exp(end) for end in Transport(program).ends)
    values, q = torch.linalg.eigh(net.covs[0])
    # along an eigenvector w keeps its rank: w / sd(w) is constant, with var(w) = (l + r²) / (1 + r²) at σ/α = r
    stretch = ((values + near**2) / ((values + far**2) / (1 + far**2))).sqrt()
    assert torch.allclose(x, (z @ q * stretch) @ q.T, atol=1e-6)
    assert torch.allclose(ladj, stretch.log().sum().expand(10), atol=1e-6)


def test_a_row_does_not_depend_on_its_company():
    program, truth = mixture()
    x = draws_of(truth, 12)
    flow = ProbabilityFlow()
    together = flow.log_evidence(program, x).value
    alone = torch.cat([flow.log_evidence(program, row[None]).value for row in x])
    assert (together - alone).abs().max() < 1e-4


def test_the_numerical_error_reported_covers_the_error():
    program, truth = mixture()
    x = draws_of(truth, 100)
    for tolerance in (1e-3, 1e-4):
        evidence = ProbabilityFlow(rtol=tolerance, atol=tolerance).log_evidence(program, x)
        exact = ProbabilityFlow(rtol=1e-8, atol=1e-8).log_evidence(program, x).value
        covered = (evidence.value - exact).abs() <= evidence.standard_error
        assert covered.double().mean() >= 0.9
        assert evidence.standard_error.max() < 100 * tolerance


def test_samples_have_the_moments_of_the_mixture():
    program, truth = mixture()
    n = 4000
    x = ProbabilityFlow(rtol=1e-4, atol=1e-4).sample(program, n, seed=0)
    assert (x.mean(0) * math.sqrt(n)).abs().max() < 4  # mean 0, variances 1
    own = draws_of(truth, n)
    for f in (lambda v: v.prod(1), lambda v: v.pow(3).sum(1), lambda v: v[:, 0].square(), lambda v: v[:, 0].sin()):
        a, b = f(x), f(own)
        assert (a.mean() - b.mean()).abs() < 4 * math.sqrt((a.var() + b.var()) / n)
    uniform = torch.randn(n, 2, dtype=DOUBLE)
    a, b = uniform.pow(3).sum(1), own.pow(3).sum(1)
    assert (a.mean() - b.mean()).abs() > 4 * math.sqrt((a.var() + b.var()) / n)  # normal draws are told apart


def posterior(program, slope, y, noise, draws, warmup):
    def model():
        x = pyro.sample("x", ProbabilityFlow().distribution(program))
        pyro.sample("y", dist.Normal(x @ slope, noise), obs=y)

    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
        mcmc.run()
    return mcmc


def means_agree(mcmc, truth):
    """Means and second moments within four standard errors of the effective sample size."""
    x = mcmc.get_samples(group_by_chain=True)["x"]
    for f in (lambda v: v, lambda v: v.square(), lambda v: v.prod(-1, keepdim=True)):
        drawn, exact = f(x), f(truth)
        size = pyro.ops.stats.effective_sample_size(torch.cat([drawn, drawn]) if len(drawn) < 2 else drawn)
        size = size / 2 if len(x) < 2 else size
        error = (drawn.var((0, 1)) / size + exact.var(0) / len(exact)).sqrt()
        assert ((drawn.mean((0, 1)) - exact.mean(0)).abs() < 4 * error).all()


@pytest.mark.slow
def test_nuts_on_a_gaussian_prior_has_the_conjugate_posterior(monkeypatch):
    monkeypatch.setattr(transport, "PAYS", 10**9)  # compiling would not pay off here
    program, prior = mixture(components=1)
    slope, y, noise = torch.tensor([1.0, 0.5], dtype=DOUBLE), torch.tensor(1.5, dtype=DOUBLE), 0.5
    cov = prior.component_distribution.covariance_matrix[0]
    gain = cov @ slope / (slope @ cov @ slope + noise**2)
    mean, left = gain * y, cov - gain[:, None] * (slope @ cov)[None]
    mcmc = posterior(program, slope, y, noise, 120, 60)
    means_agree(mcmc, draws_of(dist.MultivariateNormal(mean, left), 20_000))


@pytest.mark.slow
def test_nuts_on_a_mixture_prior_has_its_posterior(monkeypatch):
    monkeypatch.setattr(transport, "PAYS", 10**9)
    program, prior = mixture(tight=0.6)
    slope, y, noise = torch.tensor([1.0, 0.5], dtype=DOUBLE), torch.tensor(0.6, dtype=DOUBLE), 0.5
    mcmc = posterior(program, slope, y, noise, 120, 60)
    x = draws_of(prior, 200_000)
    weight = dist.Normal(x @ slope, noise).log_prob(y).exp()
    keep = torch.multinomial(weight, 20_000, replacement=True)
    means_agree(mcmc, x[keep])
