"""Score matching against closed forms: Gaussian estimates, signs, asymptotic variances, biases of a step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_gen.base import ObjectiveModule
from pyro_gen.fitting.sandwich import sandwich
from pyro_gen.objectives import FiniteDifferenceScoreMatching, ScoreMatching, SlicedScoreMatching

DOUBLE = torch.float64


class Natural(nn.Module):
    """log f = θᵀT(x), so that J is quadratic in θ and its minimum is one linear system."""

    def __init__(self, statistics: Callable[[Tensor], Tensor], count: int, base: object = None) -> None:
        super().__init__()
        self.statistics, self.base = statistics, base
        self.theta = nn.Parameter(torch.zeros(count, dtype=DOUBLE))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self.base is not None:
                pyro.sample("x", self.base.mask(False), obs=x)  # type: ignore[attr-defined]
            pyro.factor("log f", self.statistics(x) @ self.theta.to(x.dtype))


def solve(module: ObjectiveModule, x: Tensor) -> Tensor:
    """The minimum of a loss that is quadratic in θ, put into the program."""
    (theta,) = [p for p in module.parameters() if p.requires_grad]
    loss = module(x) / len(x)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient])
    with torch.no_grad():
        theta -= torch.linalg.solve(hessian, gradient)
    return theta.detach().clone()


# ------------------------------------------------------------------------------------------------------------ Gaussian
class Gaussian(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(features, dtype=DOUBLE))
        self.root = nn.Parameter(torch.eye(features, dtype=DOUBLE))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1).mask(False), obs=x)
            pyro.factor("energy", -((x - self.loc) @ self.root).square().sum(-1) / 2)


def test_gaussian_is_the_maximum_likelihood_estimate() -> None:
    torch.manual_seed(0)
    mix = torch.eye(4, dtype=DOUBLE) + 0.3 * torch.randn(4, 4, dtype=DOUBLE)
    x = torch.randn(500, 4, dtype=DOUBLE) @ mix + torch.arange(4.0, dtype=DOUBLE)
    model = Gaussian(4)
    module = ScoreMatching()(model)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(x) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    covariance = torch.cov(x.T, correction=0)
    precision = (model.root @ model.root.T).detach()
    assert float((model.loc.detach() - x.mean(0)).abs().max()) < 1e-6
    assert float((precision.inverse() - covariance).abs().max()) < 1e-6
    best = -0.5 * torch.trace(covariance.inverse())
    for method in ("forward", "reverse", "vmap"):
        loss = ScoreMatching(method)(model)(x).detach() / len(x)  # type: ignore[arg-type]
        assert float((loss - best).abs()) < 1e-9 * float(best.abs())


def test_sign_table() -> None:
    """J = −λ + λ²m₂/2 to rounding, least at the truth; what some sources print is −J, least at the wrong end."""
    torch.manual_seed(0)
    x = torch.randn(200_000, 1, dtype=DOUBLE) * 0.5**0.5
    model = Natural(lambda x: -x.square() / 2, 1)
    module = ScoreMatching()(model)
    moment = x.square().mean()
    rates = torch.tensor([0.5, 1.0, 2.0, 3.0, 5.0, 50.0], dtype=DOUBLE)
    found = []
    for rate in rates:
        model.theta.data.fill_(float(rate))
        found.append(module(x).detach() / len(x))
    loss = torch.stack(found)
    torch.testing.assert_close(loss, -rates + rates**2 * moment / 2, rtol=1e-10, atol=0)
    expected = -rates + rates**2 / 4  # at the population's m₂ = 1/2, whose standard error is √(2/N)/2
    assert bool(((loss - expected).abs() <= 4 * rates**2 / 2 * (2 / len(x)) ** 0.5 / 2).all())
    assert int(loss.argmin()) == 2
    assert int((-loss).argmin()) == 5  # the printed sign, minimised, runs to the steepest energy


# ------------------------------------------------------------------------------------------------ asymptotic variances
def coefficients(module: ObjectiveModule, theta: nn.Parameter, x: Tensor, replicates: int) -> tuple[Tensor, Tensor]:
    """a and b of J = a θ² + b θ in each replicate, from our loss at two θ under one seed."""
    found = []
    for value in (1.0, 2.0):
        theta.data.fill_(value)
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(module.pointwise(x).reshape(replicates, -1).mean(1).double())
    one, two = found
    a = (two - 2 * one) / 2
    return a, one - a


def variance_and_error(estimates: Tensor, rows: int) -> tuple[float, float]:
    """N · var over replicates, and its standard error."""
    centred = estimates - estimates.mean()
    variance = centred.square().mean()
    error = ((centred**4).mean() - variance**2).sqrt() / len(estimates) ** 0.5
    return rows * float(variance), rows * float(error)


def quartic_moment(k: int) -> float:
    """E xᵏ of p ∝ exp(−x⁴/4)."""
    return float(4 ** (k / 4) * math.gamma((k + 1) / 4) / math.gamma(0.25))


def quartic(count: int) -> Tensor:
    magnitude = (4 * torch._standard_gamma(torch.full((count, 1), 0.25))) ** 0.25
    return magnitude * (2 * torch.bernoulli(torch.full((count, 1), 0.5)) - 1)


REPLICATES, ROWS = 4000, 2000


@pytest.mark.slow
def test_asymptotic_variance_of_the_quartic() -> None:
    m2, m4, m6, m8, m12 = (quartic_moment(k) for k in (2, 4, 6, 8, 12))
    variance = (m12 - 6 * m8 + 9 * m4 - (m6 - 3 * m2) ** 2) / m6**2
    assert abs(variance - 5.8358) < 1e-4
    torch.manual_seed(0)
    model = Natural(lambda x: -(x**4) / 4, 1)
    module = ScoreMatching(method="forward")(model)
    module.prepare(quartic(8))
    estimates, likelihood, doubled = [], [], []
    for _ in range(10):
        x = quartic(REPLICATES // 10 * ROWS)
        a, b = coefficients(module, model.theta, x, REPLICATES // 10)
        estimates.append(-b / (2 * a))
        doubled.append(-b / (4 * a))  # wrong: |s|² in place of ½|s|²
        likelihood.append(1 / (x**4).reshape(REPLICATES // 10, -1).mean(1).double())
    found, error = variance_and_error(torch.cat(estimates), ROWS)
    assert abs(found - variance) < 4 * error
    of_likelihood, its_error = variance_and_error(torch.cat(likelihood), ROWS)
    assert abs(of_likelihood - 4.0) < 4 * its_error
    assert abs(of_likelihood - variance) > 4 * its_error  # another estimator is told apart
    mean, wrong = torch.cat(estimates).mean(), torch.cat(doubled).mean()
    bias = 4 * (variance / ROWS / REPLICATES) ** 0.5 + 10 / ROWS  # of a ratio of means, of order 1/N
    assert abs(float(mean) - 1) < bias
    assert abs(float(wrong) - 1) > bias


@pytest.mark.slow
@pytest.mark.parametrize("projections", [1, 5])
def test_asymptotic_variance_of_sliced_score_matching(projections: int) -> None:
    """N·var = (2λ²/d)(1 + (d − 1)/M) for λ of N(0, I/λ)."""
    features, rate, parts = 5, 2.0, 40
    expected = 2 * rate**2 / features * (1 + (features - 1) / projections)
    torch.manual_seed(0)
    model = Natural(lambda x: -x.square().sum(-1, keepdim=True) / 2, 1)
    module = SlicedScoreMatching(projections, variance_reduction=False)(model)
    module.prepare(torch.randn(8, features))
    estimates = []
    for part in range(parts):
        torch.manual_seed(100 + part)
        x = torch.randn(REPLICATES // parts * ROWS, features) / rate**0.5
        found = []
        for value in (1.0, 2.0):
            model.theta.data.fill_(value)
            torch.manual_seed(1000 + part)
            with torch.no_grad():
                found.append(module.pointwise(x).reshape(REPLICATES // parts, -1).mean(1).double())
        a = (found[1] - 2 * found[0]) / 2
        estimates.append(-(found[0] - a) / (2 * a))
    variance, error = variance_and_error(torch.cat(estimates), ROWS)
    assert abs(variance - expected) < 4 * error
    assert abs(variance - 2 * rate**2 / features) > 4 * error  # that of exact score matching is told apart


@pytest.mark.parametrize("noise", ["rademacher", "sphere", "normal"])
def test_directions_have_unit_covariance(noise: str) -> None:
    """Each noise gives the trace and |s|² in the mean; a direction of unit length would give them divided by d."""
    torch.manual_seed(0)
    features, rows = 4, 40_000
    matrix = torch.randn(features, features, dtype=DOUBLE)
    precision = matrix @ matrix.T
    x = torch.randn(1, features, dtype=DOUBLE).expand(rows, features).contiguous()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.factor("energy", -((x @ precision) * x).sum(-1) / 2)

    exact = float(ScoreMatching()(model).pointwise(x[:1]).detach())
    for variance_reduction in (True, False):
        rows_of = SlicedScoreMatching(noise=noise, variance_reduction=variance_reduction)(model)  # type: ignore[arg-type]
        values = rows_of.pointwise(x).detach()
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / rows**0.5
    shrunk = float(values.mean()) / features
    assert abs(shrunk - exact) > 4 * float(values.std()) / rows**0.5


def test_variance_reduction_is_exact_for_a_diagonal_hessian() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, dtype=DOUBLE)
    model = Natural(lambda x: torch.stack([-(x**4).sum(-1), -(x**2).sum(-1)], -1), 2)
    model.theta.data.copy_(torch.tensor([0.3, 0.7]))
    exact = ScoreMatching()(model).pointwise(x)
    torch.testing.assert_close(SlicedScoreMatching()(model).pointwise(x), exact, rtol=1e-12, atol=1e-12)
    plain = SlicedScoreMatching(variance_reduction=False)(model).pointwise(x)
    assert float((plain - exact).detach().abs().max()) > 1e-3


# -------------------------------------------------------------------------------------------------- finite differences
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_bias_of_a_step_and_its_removal(eps: float) -> None:
    """θ̂ = (3m₂ + ε²/2) / (m₆ + 2ε²m₄ + ε⁴m₂) for the quartic; Richardson gives 3m₂/m₆, score matching's own."""
    torch.manual_seed(0)
    x = quartic(2000).double()
    m2, m4, m6 = ((x**k).mean() for k in (2, 4, 6))
    model = Natural(lambda x: -(x**4) / 4, 1)
    exact = float(3 * m2 / m6)
    assert abs(float(solve(ScoreMatching()(model), x)) - exact) < 1e-10
    biased = float((3 * m2 + eps**2 / 2) / (m6 + 2 * eps**2 * m4 + eps**4 * m2))
    model.theta.data.zero_()
    found = float(solve(FiniteDifferenceScoreMatching(eps)(model), x))
    assert abs(found - biased) < 1e-10
    assert abs(found - exact) > 1e-3
    model.theta.data.zero_()
    assert abs(float(solve(FiniteDifferenceScoreMatching(eps, richardson=True)(model), x)) - exact) < 1e-10


def test_differences_see_kinks() -> None:
    """E[ΔE] of E = |x| is 2p(0), to the curvature of p over a step; autograd sees 0."""
    torch.manual_seed(0)
    x, eps = torch.randn(400_000, 1, dtype=DOUBLE), 0.2

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.factor("energy", -x.abs().squeeze(-1))

    second = torch.where(x.abs() < eps, 2 * (eps - x.abs()) / eps**2, 0.0).squeeze(-1)  # by hand
    first = torch.where(x.abs() < eps, x / eps, x.sign()).squeeze(-1)
    values = FiniteDifferenceScoreMatching(eps)(model).pointwise(x)
    torch.testing.assert_close(values, -second + 0.5 * first.square(), rtol=1e-8, atol=1e-8)
    error = 4 * float(second.std()) / len(x) ** 0.5 + 2 * 0.4 * eps**2 / 12
    assert abs(float(second.mean()) - 2 / (2 * math.pi) ** 0.5) < error


# ----------------------------------------------------------------------------------------------------- bounded support
def half_normal(count: int) -> Tensor:
    x = torch.randn(4 * count, dtype=DOUBLE) * 0.8 + 0.5
    return x[x > 0][:count, None]


def in_a_box(count: int) -> Tensor:
    x = torch.randn(4 * count, dtype=DOUBLE) * 0.8 + 0.5
    return x[(x > 0) & (x < 1.5)][:count, None]


def exponential(count: int) -> Tensor:
    return dist.Exponential(torch.tensor(2.0, dtype=DOUBLE)).sample((count, 1))


def gamma(shape: float) -> Callable[[int], Tensor]:
    return lambda count: dist.Gamma(torch.tensor(shape, dtype=DOUBLE), torch.tensor(3.0, dtype=DOUBLE)).sample(
        (count, 1)
    )


def normal_statistics(x: Tensor) -> Tensor:
    return torch.cat([x, -(x**2) / 2], -1)


def gamma_statistics(x: Tensor) -> Tensor:
    return torch.cat([x.log(), -x], -1)


ZERO = torch.zeros(1, dtype=DOUBLE)
POSITIVE = dist.Exponential(ZERO + 1).to_event(1)
BOX = dist.Uniform(ZERO, ZERO + 1.5).to_event(1)
EDGED = {
    "normal on a half-line": (half_normal, normal_statistics, POSITIVE, (0.5 / 0.64, 1 / 0.64)),
    "normal in a box": (in_a_box, normal_statistics, BOX, (0.5 / 0.64, 1 / 0.64)),
    "exponential": (exponential, lambda x: -x, POSITIVE, (2.0,)),
    "gamma, zero at the edge": (gamma(2.5), gamma_statistics, POSITIVE, (1.5, 3.0)),
    "gamma, infinite at the edge": (gamma(0.7), gamma_statistics, POSITIVE, (-0.3, 3.0)),
}


@pytest.mark.parametrize("name", EDGED)
def test_data_with_an_edge(name: str) -> None:
    sample, statistics, base, truth = EDGED[name]
    torch.manual_seed(0)
    x = sample(40_000)
    model = Natural(statistics, len(truth), base)
    module = ScoreMatching(weight="auto")(model)
    off = solve(module, x) - torch.tensor(truth, dtype=DOUBLE)
    errors = sandwich(module, x)["model.theta"]
    assert bool((off.abs() < 4 * errors).all()), (off / errors).tolist()
    assert bool((errors < 0.25).all())  # the bound above says something
    with pytest.raises(ValueError, match="weight='auto'"):
        ScoreMatching()(model)(x)


@pytest.mark.parametrize("name", ["normal on a half-line", "normal in a box"])
def test_without_weights_an_edge_biases(name: str) -> None:
    sample, statistics, base, truth = EDGED[name]
    torch.manual_seed(0)
    x = sample(40_000)
    model = Natural(statistics, len(truth), base)
    module = ScoreMatching(weight=torch.ones_like)(model)
    off = solve(module, x) - torch.tensor(truth, dtype=DOUBLE)
    assert bool((off.abs() > 4 * sandwich(module, x)["model.theta"]).any())


@pytest.mark.parametrize("weight", [lambda x: x, torch.log1p, lambda x: x**2])
def test_weighted_loss_term_by_term(weight: Callable[[Tensor], Tensor]) -> None:
    """½hs² + h∂s + h's by hand, for log f = 1.5 log x − 3x + cos(x₀x₁); leaving h's out is seen."""
    torch.manual_seed(0)
    x = torch.rand(32, 2, dtype=DOUBLE) + 0.1

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(x.new_ones(2)).to_event(1).mask(False), obs=x)
            pyro.factor("log f", (1.5 * x.log() - 3 * x).sum(-1) + (x[..., 0] * x[..., 1]).cos())

    other, product = x.flip(-1), x.prod(-1, keepdim=True)
    s = 1.5 / x - 3 - product.sin() * other
    second = -1.5 / x**2 - product.cos() * other**2
    h = weight(x)
    slope = torch.func.grad(lambda y: weight(y).sum())(x)
    expected = (0.5 * h * s**2 + h * second + slope * s).sum(-1)
    for method in ("forward", "reverse", "vmap"):
        found = ScoreMatching(method, weight=weight)(model).pointwise(x)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert float((found - (expected - (slope * s).sum(-1))).abs().max()) > 0.1
