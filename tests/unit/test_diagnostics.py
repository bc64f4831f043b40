"""Latents and weights of pairs whose posteriors, KL divergences and tails are known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gen import VAE
from pyro_gen.base import Bounded, Exact
from pyro_gen.diagnostics import active_units, kl_per_dimension, pareto_k, posterior_means
from pyro_gen.evidence import ImportanceSampling, log_evidence

D = 3
LOC = torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64)  # of q given x: LOC * x, so its variance over x is LOC²
SCALE = torch.tensor([0.3, 0.9, 1.0], dtype=torch.float64)


class Model(nn.Module):
    def __init__(self, prior):
        super().__init__()
        self.register_buffer("one", torch.ones(D, dtype=torch.float64))
        self.prior = prior

    def forward(self, x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(z, self.one).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior

    def forward(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", self.posterior(x))


def normal(loc, scale):
    return dist.Normal(loc, scale).to_event(1)


STANDARD = normal(torch.zeros(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64))


def diagonal(x):
    return normal(LOC * x, SCALE.expand(x.shape))


def make(prior=STANDARD, posterior=diagonal):
    return Bounded(Model(prior), Guide(posterior), D)


@pytest.fixture
def x():
    return torch.randn(3000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def closed_form(mean_square, variance):
    return (mean_square + variance - 1 - variance.log()) / 2


# -------------------------------------------------------------------------------------------------------- active units
def test_active_units_are_those_whose_posterior_mean_moves(x):
    result = active_units(make(), x)
    torch.testing.assert_close(result.variance, (LOC * x).var(0))
    # in the limit LOC² = 1, 0.01, 0; a sample variance of 3000 normals is off by sqrt(2 / 2999)
    torch.testing.assert_close(result.variance, LOC**2, rtol=4 * math.sqrt(2 / 2999), atol=0)
    assert active_units(make(), x, threshold=0.005).count == 2
    assert active_units(make(), x, threshold=0.02).count == 1
    assert active_units(make(), x, threshold=0).count == 2  # a dimension that does not move at all is never active
    torch.testing.assert_close(posterior_means(make(), x), LOC * x)


def test_a_shift_of_the_posterior_is_not_activity(x):
    shifted = make(posterior=lambda x: normal(5 + 0 * x, SCALE.expand(x.shape)))
    assert active_units(shifted, x).count == 0


def test_active_units_of_a_vae_agree_with_its_encoder():
    torch.manual_seed(0)
    vae = VAE(6, latent_dim=4)
    data = torch.randn(50, 6)
    torch.testing.assert_close(active_units(vae, data).variance, vae.encode(data).mean.double().var(0).detach())
    assert str(active_units(vae, data, threshold=0)) == "4 of 4"


# ------------------------------------------------------------------------------------------------------------------ KL
def test_kl_of_a_diagonal_guide_is_the_closed_form(x):
    kl = kl_per_dimension(make(), x)
    expected = closed_form((LOC * x).square().mean(0), SCALE**2)
    torch.testing.assert_close(kl.value, expected)
    torch.testing.assert_close(kl.joint, expected.sum())
    assert kl.kind == "exact"
    assert not kl.standard_error.any()
    assert float(kl.value[2]) == 0  # the collapsed one
    wrong = closed_form((LOC * x).mean(0).square(), SCALE**2)  # KL of the mean posterior mean, not the mean KL
    assert float((kl.value - wrong).abs().max()) > 0.1


def test_kl_of_a_full_rank_guide_leaves_its_dependence_over(x):
    tril = torch.tensor([[0.5, 0, 0], [0.4, 0.3, 0], [0, 0, 1.0]], dtype=torch.float64)
    program = make(posterior=lambda x: dist.MultivariateNormal(LOC * x, scale_tril=tril))
    kl = kl_per_dimension(program, x)
    covariance = tril @ tril.T
    torch.testing.assert_close(kl.value, closed_form((LOC * x).square().mean(0), covariance.diagonal()))
    total_correlation = (covariance.diagonal().log().sum() - torch.logdet(covariance)) / 2
    torch.testing.assert_close(kl.joint - kl.value.sum(), total_correlation)
    assert float(total_correlation) > 0.3
    assert kl.kind == "exact"


def within_error(found, error, expected):
    return bool(((found - expected).abs() <= 4 * error + 1e-12).all())  # 1e-12: rounding, where the error is 0


def test_kl_without_a_closed_form_is_monte_carlo_with_its_error(x):
    # a mixture of two equal halves of the standard normal: no closed form is known to it, the answer is the old one
    logits = torch.zeros(2, dtype=torch.float64)
    halves = normal(torch.zeros(2, D, dtype=torch.float64), torch.ones(2, D, dtype=torch.float64))
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), halves)
    expected = kl_per_dimension(make(), x)
    kl = kl_per_dimension(make(prior=mixture), x, num_samples=200, seed=1)
    assert kl.kind == "estimate"
    assert kl.value.shape == kl.standard_error.shape == (D,)
    assert within_error(kl.value, kl.standard_error, expected.value)
    assert within_error(kl.joint, kl.joint_error, expected.joint)
    assert 0 < float(kl.joint_error) < 0.02
    again = kl_per_dimension(make(prior=mixture), x, num_samples=200, seed=1)
    assert torch.equal(again.value, kl.value)


def test_kl_to_a_mixture_uses_the_mixtures_own_marginals(x):
    loc = torch.tensor([[-2.0, 0, 1], [2.0, 0, 3]], dtype=torch.float64)
    scale = torch.tensor([[0.5, 1, 2], [1.0, 1, 0.7]], dtype=torch.float64)
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mixture = dist.MixtureSameFamily(dist.Categorical(probs=weight), normal(loc, scale))
    x = x[:5]
    kl = kl_per_dimension(make(prior=mixture), x, num_samples=20_000, seed=2)
    grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64).reshape(-1, 1, 1)
    q = dist.Normal(LOC * x, SCALE).log_prob(grid)
    p = (weight.log() + dist.Normal(loc.T, scale.T).log_prob(grid)).logsumexp(-1).reshape(-1, 1, D)
    expected = torch.trapezoid(q.exp() * (q - p), dx=0.001, dim=0).mean(0)
    assert within_error(kl.value, kl.standard_error, expected)
    assert float(kl.standard_error.max()) < 0.01


def test_standard_errors_of_kl_are_those_of_repeats(x):
    laplace = dist.Laplace(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)
    student = dist.StudentT(torch.full((D,), 4.0, dtype=torch.float64)).to_event(1)
    assert kl_per_dimension(make(prior=laplace), x[:10]).value.shape == (D,)
    repeats = [kl_per_dimension(make(prior=student), x[:10], num_samples=50, seed=s) for s in range(150)]
    spread = torch.stack([r.value for r in repeats]).std(0)
    stated = torch.stack([r.standard_error for r in repeats]).square().mean(0).sqrt()
    assert float((spread / stated - 1).abs().max()) < 4 * math.sqrt(1 / (2 * 149) + 1 / (2 * 49 * 150))


def test_kl_of_vaes_of_every_guide_and_prior():
    torch.manual_seed(1)
    data = torch.randn(40, 6)
    for guide in ("diagonal", "full_rank"):
        for prior in (None, "mixture"):
            kl = kl_per_dimension(VAE(6, latent_dim=3, guide=guide, prior=prior), data, seed=0)
            assert kl.value.shape == (3,)
            assert kl.kind == ("exact" if prior is None else "estimate")
            assert bool((kl.value > -4 * kl.standard_error).all())
            assert not kl.value.requires_grad
            assert f"{float(kl.joint):.2f} nats a row" in str(kl)
            if prior is None:
                assert float(kl.joint - kl.value.sum()) > -1e-6


# ---------------------------------------------------------------------------------------------------- k̂ and state
def test_pareto_k_of_weights_of_an_evidence_and_of_a_program(x):
    program = make()
    method = ImportanceSampling(200, seed=3)
    evidence = log_evidence(program, x[:8], method=method)
    assert torch.equal(pareto_k(evidence), evidence.pareto_k)
    assert torch.equal(pareto_k(program, x[:8], num_samples=200, seed=3), evidence.pareto_k)
    torch.testing.assert_close(pareto_k(method.log_weights(program, x[:8])), evidence.pareto_k)


def test_looking_leaves_no_trace(x):
    program = make()
    program.train()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    active_units(program, x[:10])
    kl_per_dimension(program, x[:10], seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert program.training
    assert program.guide.training


def test_several_latents_are_chosen_by_name(x):
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(torch.zeros(len(x), D), 1.0))
            b = pyro.sample("b", normal(a, 1.0))
            pyro.sample("x", normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(x.float(), 0.5))
            pyro.sample("b", normal(a, 1.0))

    program = Bounded(model, guide, D)
    x = x.float()
    torch.testing.assert_close(posterior_means(program, x, site="a"), x)
    assert kl_per_dimension(program, x, site="b").value.tolist() == [0, 0, 0]  # q(b | a) is p(b | a)
    with pytest.raises(ValueError, match=r"site must name one of the latents 'a', 'b'$"):
        active_units(program, x)
    with pytest.raises(ValueError, match="latents 'a', 'b', got 'c'"):
        active_units(program, x, site="c")


# ---------------------------------------------------------------------------------------------------------- bad input
def test_what_has_no_answer_is_refused(x):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", STANDARD, obs=x)

    exact = Exact(model, D).double()
    with pytest.raises(TypeError, match="Exact has no latent inside a plate over its rows"):
        active_units(exact, x)
    with pytest.raises(TypeError, match="no importance weights to judge: this evidence is of kind 'exact'"):
        pareto_k(exact, x)
    with pytest.raises(TypeError, match=r"needs the data whose weights it judges: pareto_k\(program, x\)"):
        pareto_k(make())
    with pytest.raises(TypeError, match="takes no x or context"):
        pareto_k(torch.zeros(5), x)
    with pytest.raises(TypeError, match="pareto_k takes log weights, an Evidence or a program, got"):
        pareto_k([0.0])
    with pytest.raises(ValueError, match="one row does not vary"):
        active_units(make(), x[:1])
    with pytest.raises(ValueError, match="threshold must be a number of at least 0, got -1"):
        active_units(make(), x, threshold=-1)
    with pytest.raises(ValueError, match="num_samples must be an int of at least 1"):
        kl_per_dimension(make(), x, num_samples=0)
    with pytest.raises(ValueError, match=r"x must have shape \(rows, 3\)"):
        active_units(make(), x[:, :2])

    def flow(x):
        return dist.TransformedDistribution(normal(x, 1.0), [dist.transforms.Planar(D).double()])

    with pytest.raises(TypeError, match="guide gives a TransformedDistribution, whose mean has no closed form"):
        active_units(make(posterior=flow), x[:5])
    with pytest.raises(TypeError, match="the guide is a TransformedDistribution, whose single dimensions"):
        kl_per_dimension(make(posterior=flow), x[:5])
