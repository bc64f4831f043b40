r"""Probabilistic PCA, the latent Gaussian model whose evidence, posterior and bounds are all known.

z ~ N(0, I_q), x | z ~ N(z W, σ² I), so x ~ N(0, WᵀW + σ² I) and z | x ~ N(x Wᵀ M⁻¹, σ² M⁻¹) with M = W Wᵀ + σ² I
(Tipping & Bishop 1999). Under a guide of the exact mean and c times the exact scale, with u standard normal,
log w = log p(x) + q log c - (c² - 1) |u|² / 2, so that E[w²] / p(x)² = (c² / sqrt(2 c² - 1))^q for c² > 1/2, and the
weights have a tail of index 1 - c² (with q = 2 they are Pareto distributed, as |u|² / 2 is exponential).
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn

from pyro_gen.base import Bounded
from pyro_gen.evidence import ImportanceSampling, log_evidence

EVIDENCE = -552.938244  # iris, standardised, q = 2, at maximum likelihood: total over 150 rows, in nats
MEAN_FIELD_ELBO = -576.906549  # the same, latents rotated by 45 degrees, best diagonal guide
Q = 2


class Model(nn.Module):
    def __init__(self, w, sigma):
        super().__init__()
        self.register_buffer("w", w)
        self.register_buffer("sigma", sigma)

    def forward(self, x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(self.w.new_zeros(Q), self.w.new_ones(Q)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w, self.sigma).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, to_mean, scale_tril):
        super().__init__()
        self.register_buffer("to_mean", to_mean)
        self.register_buffer("scale_tril", scale_tril)

    def forward(self, x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.MultivariateNormal(x @ self.to_mean, scale_tril=self.scale_tril))


class PPCA:
    """Fitted to iris in closed form; its latents rotated by an angle that the data do not see."""

    def __init__(self, degrees=0.0):
        x = torch.tensor(load_iris().data, dtype=torch.float64)
        self.x = (x - x.mean(0)) / x.std(0, unbiased=False)
        values, vectors = torch.linalg.eigh(self.x.T @ self.x / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        self.variance = values[Q:].mean()
        a = math.radians(degrees)
        turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
        self.w = turn @ ((values[:Q] - self.variance).sqrt() * vectors[:, :Q]).T
        inverse = torch.linalg.inv(self.w @ self.w.T + self.variance * torch.eye(Q, dtype=torch.float64))
        self.to_mean, self.covariance = self.w.T @ inverse, self.variance * inverse
        marginal = self.w.T @ self.w + self.variance * torch.eye(4, dtype=torch.float64)
        self.log_prob = dist.MultivariateNormal(torch.zeros(4, dtype=torch.float64), marginal).log_prob(self.x)

    def program(self, factor=1.0, diagonal=False):
        scale = torch.linalg.cholesky(self.covariance)
        if diagonal:
            scale = torch.diag(torch.linalg.inv(self.covariance).diagonal().rsqrt())
        return Bounded(Model(self.w, self.variance.sqrt()), Guide(self.to_mean, factor * scale), 4)


@pytest.fixture(scope="module")
def ppca():
    return PPCA()


def test_the_closed_form_is_the_published_number(ppca):
    assert float(ppca.log_prob.sum()) == pytest.approx(EVIDENCE, abs=5e-7)


def test_under_the_exact_guide_importance_sampling_has_no_variance(ppca):
    evidence = log_evidence(ppca.program(), ppca.x, method=ImportanceSampling(200, seed=0))
    torch.testing.assert_close(evidence.value, ppca.log_prob, rtol=0, atol=1e-11)  # 30 terms of size 10, each to 2e-16
    assert float(evidence.sum().value) == pytest.approx(EVIDENCE, abs=5e-7)
    assert float(evidence.standard_error.max()) < 1e-12
    torch.testing.assert_close(evidence.effective_sample_size, torch.full((150,), 200.0, dtype=torch.float64))
    assert evidence.kind == "estimate"
    assert (evidence.pareto_k == -math.inf).all()
    assert str(evidence.sum()).startswith("≈ -552.938244 ± ")


def test_in_float32_too_but_for_rounding(ppca):
    evidence = log_evidence(ppca.program().float(), ppca.x.float(), method=ImportanceSampling(200, seed=0))
    assert evidence.value.dtype == torch.float64
    torch.testing.assert_close(evidence.value, ppca.log_prob, rtol=0, atol=1e-4)  # as above, each to 1.2e-7, with room
    assert evidence.kind == "estimate"
    assert (evidence.pareto_k == -math.inf).all()


def test_under_a_wider_guide_the_estimate_is_right_within_its_error(ppca):
    c, count = 1.3, 2000
    evidence = log_evidence(ppca.program(c), ppca.x, method=ImportanceSampling(count, seed=1))
    total = evidence.sum()
    assert abs(float(total.value) - EVIDENCE) < 4 * float(total.standard_error)
    second = (c**2 / math.sqrt(2 * c**2 - 1)) ** Q
    expected = math.sqrt((second - 1) / count)
    # each row's squared error is a sample variance of `count` weights of kurtosis below 3: 4 sigma over 150 rows
    assert float(evidence.standard_error.square().mean()) == pytest.approx(
        expected**2, rel=4 * math.sqrt(2 / count / 150)
    )
    assert float(evidence.effective_sample_size.mean()) == pytest.approx(
        count / second, rel=4 / math.sqrt(count * 150) + 1 / count
    )
    assert evidence.kind == "estimate"
    assert float(evidence.pareto_k.max()) < 0.7


def test_the_standard_error_is_that_of_repeats(ppca):
    repeats = 800
    one_row = ppca.x[:1].expand(repeats, -1).contiguous()  # rows have draws of their own
    method = ImportanceSampling(300, seed=2)
    evidence = log_evidence(ppca.program(1.3), one_row, method=method)
    within = 4 / math.sqrt(2 * (repeats - 1))  # of a standard deviation from that many repeats
    spread = float(evidence.value.std())
    assert abs(spread / float(evidence.standard_error.mean()) - 1) < within
    log_weights = method.log_weights(ppca.program(1.3), one_row)
    torch.testing.assert_close(torch.logsumexp(log_weights, 0) - math.log(300), evidence.value)  # same seed, same draws
    wrong = float((log_weights.std(0) / math.sqrt(300)).mean())  # the error of the ELBO, not of the evidence
    assert abs(spread / wrong - 1) > within


def test_a_guide_too_narrow_is_found_out(ppca):
    evidence = log_evidence(ppca.program(0.25), ppca.x, method=ImportanceSampling(2000, seed=3))
    bad = evidence.pareto_k > 0.7
    k, tail = 1 - 0.25**2, math.ceil(3 * math.sqrt(2000))
    expected = (tail * k + 5) / (tail + 10)  # drawn to the prior
    error = (1 + k) / math.sqrt(tail * 150)
    assert float(evidence.pareto_k.mean()) == pytest.approx(expected, abs=4 * error + 2 / tail)
    assert float(bad.double().mean()) > 0.75  # one row: 0.91 ± 0.17
    assert evidence.kind == "lower bound"
    assert str(evidence.sum()).startswith("≥")
    assert f"k̂ > 0.7 in {int(bad.sum())}" in str(evidence)
    shortfall = ppca.log_prob - evidence.value
    assert float(shortfall.mean()) > 4 * float(shortfall.std()) / math.sqrt(150)  # a bound indeed
    assert float(shortfall.mean()) > 4 * float(evidence.mean().standard_error)  # and its error bar knows nothing of it


def test_mean_field_on_rotated_latents_loses_what_the_closed_form_says():
    ppca = PPCA(degrees=45)
    assert float(ppca.log_prob.sum()) == pytest.approx(EVIDENCE, abs=5e-7)
    program = ppca.program(diagonal=True)
    torch.manual_seed(4)
    with torch.no_grad():
        bounds = torch.stack([program.lower_bound(ppca.x, particles=50).sum() for _ in range(40)])
    error = float(bounds.std()) / math.sqrt(40)
    assert abs(float(bounds.mean()) - MEAN_FIELD_ELBO) < 4 * error
    assert error < 1  # so that the evidence, 24 nats away, would not pass
    total = log_evidence(program, ppca.x, method=ImportanceSampling(3000, seed=5)).sum()
    assert abs(float(total.value) - EVIDENCE) < 4 * float(total.standard_error)


def test_few_draws_are_a_lower_bound_that_rises_with_their_number(ppca):
    program = PPCA(degrees=45).program(diagonal=True)
    repeats = ppca.x.repeat(40, 1)
    means = []
    for count in (1, 5, 20):
        evidence = log_evidence(program, repeats, method=ImportanceSampling(count, seed=6))
        assert evidence.kind == "lower bound"
        totals = evidence.value.reshape(40, 150).sum(1)
        means.append((float(totals.mean()), float(totals.std()) / math.sqrt(40)))
    assert abs(means[0][0] - MEAN_FIELD_ELBO) < 4 * means[0][1]  # one draw: the ELBO
    for (low, e), (high, f) in zip(means, [*means[1:], (EVIDENCE, 0.0)], strict=True):
        assert high - low > 4 * math.hypot(e, f)
