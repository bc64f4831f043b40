"""Sandwich standard errors against closed forms and against the spread over replicates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.fitting.sandwich import _invert, sandwich
from pyro_gen.objectives import ScoreMatching, SlicedScoreMatching


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        yield
        torch.set_default_dtype(torch.float32)


class Normal(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(x.mean(0))
        self.log_scale = nn.Parameter(x.std(0, unbiased=False).log())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()).to_event(1), obs=x)


@pytest.mark.parametrize("rows", [7, 1200])
def test_maximum_likelihood_of_a_normal(rows: int) -> None:
    """Var of the mean is m₂/N; of log σ̂ it is (m₄/m₂² − 1)/4N; their covariance m₃/2σN. Exact in the sample."""
    x = dist.Gamma(2.0, torch.ones(rows, 2)).sample()
    module = pg.MaximumLikelihood()(Normal(x))
    found = sandwich(module, x)
    centred = x - x.mean(0)
    m2, m3, m4 = ((centred**k).mean(0) for k in (2, 3, 4))
    torch.testing.assert_close(found["model.loc"], (m2 / rows).sqrt())
    torch.testing.assert_close(found["model.log_scale"], ((m4 / m2**2 - 1) / (4 * rows)).sqrt())
    torch.testing.assert_close(found.covariance[0, 2], (m3 / m2 / (2 * rows))[0])
    assert found.names == ("model.loc[0]", "model.loc[1]", "model.log_scale[0]", "model.log_scale[1]")
    inverse = torch.linalg.inv(found.bread) / rows  # right for normal data only
    assert float((inverse.diagonal() / found.covariance.diagonal() - 1).abs().max()) > 0.2
    low, high = found.interval("model.loc", 0.9)
    torch.testing.assert_close((high - low) / 2, 1.6448536269514722 * found["model.loc"])


def energy(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        pyro.factor("energy", -rate * x**4 / 4)


def quartic(*shape: int) -> Tensor:
    magnitude = (4 * torch._standard_gamma(torch.full(shape, 0.25))) ** 0.25
    return magnitude * (2 * torch.bernoulli(torch.full(shape, 0.5)) - 1)


@pytest.mark.slow
def test_score_matching_over_replicates() -> None:
    """500 replicates of N = 600: mean squared error stated, spread found; intervals cover; A⁻¹/N does neither."""
    replicates, rows = 500, 600
    x = quartic(replicates, rows)
    estimates = 3 * x.square().sum(1) / (x**6).sum(1)
    stated, naive, covered = [], [], []
    module = ScoreMatching("reverse")(energy)
    module.prepare(x[0])
    for row, estimate in zip(x, estimates, strict=True):
        pyro.param("rate").data.fill_(float(estimate))
        found = sandwich(module, row)
        low, high = found.interval("rate", 0.9)
        stated.append(found.covariance[0, 0])
        naive.append(1 / found.bread[0, 0] / rows)
        covered.append(bool(low <= 1 <= high))
    spread, means, wrong = estimates.var(), torch.stack(stated), torch.stack(naive)
    fourth = (estimates - estimates.mean()).pow(4).mean()
    error = float((fourth - spread**2).sqrt()) / replicates**0.5  # of a variance, from its own fourth moment
    assert abs(float(means.mean() - spread)) < 4 * (error + float(means.std()) / replicates**0.5)
    assert abs(float(wrong.mean() - spread)) > 4 * (error + float(wrong.std()) / replicates**0.5)
    assert abs(sum(covered) / replicates - 0.9) < 4 * (0.09 / replicates) ** 0.5
    assert abs(rows * float(spread) - 5.8358) < 4 * rows * error


def test_score_matching_in_closed_form() -> None:
    x = quartic(800)
    pyro.param("rate", 3 * x.square().sum() / (x**6).sum())
    rate = pyro.param("rate").detach()
    found = sandwich(ScoreMatching()(energy), x)
    gradient = rate * x**6 - 3 * x.square()
    expected = gradient.var(unbiased=False).sqrt() / (x**6).mean() / math.sqrt(800)
    torch.testing.assert_close(found["rate"], expected)
    torch.testing.assert_close(found.bread, (x**6).mean().reshape(1, 1))


def test_a_random_loss_takes_one_draw_for_both_matrices() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            pyro.factor("energy", -rate * x.square().sum(-1) / 2)

    features, rows, rate = 5, 8_000, 2.0
    x = torch.randn(rows, features) / rate**0.5
    before = torch.get_rng_state()
    module = SlicedScoreMatching(variance_reduction=False)(model)
    found = sandwich(module, x, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert float(sandwich(module, x, seed=1)["rate"]) == float(found["rate"])
    # 2λ²/d · (1 + (d − 1)/M) at M = 1. A row's gradient is λ(vᵀx)² − d, its Hessian (vᵀx)² = d/λ · χ²₁: relative
    # errors √(14/N) of B (of kurtosis 15) and √(2/N) of A, which enters squared
    error = (14**0.5 + 2 * 2**0.5) / rows**0.5
    assert abs(rows * float(found["rate"]) ** 2 / (2 * rate**2) - 1) < 4 * error
    assert abs(2 * rate**2 / features / (2 * rate**2) - 1) > 4 * error  # that of exact score matching is told apart


def test_constrained_parameters_are_unconstrained_and_names_choose() -> None:
    x = torch.randn(200, 1)

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", x.square().mean().sqrt(), constraint=constraints.positive)
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x.squeeze(-1))

    module = pg.MaximumLikelihood()(model)
    found = sandwich(module, x, parameters=["scale"])
    m2, m4 = (x**2).mean(), (x**4).mean()
    torch.testing.assert_close(found.covariance, ((m4 / m2**2 - 1) / 800).reshape(1, 1))
    assert "scale = " in repr(found)
    with pytest.raises(ValueError, match="scale, loc"):
        sandwich(module, x, parameters=["width"])
    with pytest.raises(ValueError, match="list of names"):
        sandwich(module, x, parameters="scale")


class Redundant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.one + self.two, 1.0), obs=x.squeeze(-1))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2001))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)


def test_what_has_no_standard_errors() -> None:
    x = torch.randn(20, 1)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: sandwich(Redundant(), x), TypeError, "objective"),  # type: ignore[arg-type]
        (
            lambda: sandwich(pg.MaximumLikelihood()(Redundant()), x),
            ValueError,
            "model.one, model.two|does not determine",
        ),
        (lambda: sandwich(pg.MaximumLikelihood()(Wide()), torch.zeros(3, 2001)), ValueError, "2001 parameters"),
        (lambda: sandwich(pg.MaximumLikelihood()(Redundant()), (x, x[:3])), ValueError, "20, 3 rows"),
        (lambda: sandwich(pg.MaximumLikelihood()(Redundant()), [1, 2]), TypeError, "tensor"),
        (lambda: sandwich(pg.MaximumLikelihood()(Redundant().requires_grad_(False)), x), ValueError, "trainable"),
    ]
    for call, error, said in cases:
        with pytest.raises(error, match=said):
            call()
    model = Normal(torch.randn(50, 1))
    model.log_scale.data.fill_(2.0)  # far out the likelihood is no longer convex in log σ … and no minimum
    model.loc.data.fill_(0.0)
    small = torch.randn(50, 1)
    flat = sandwich(pg.MaximumLikelihood()(model), small, parameters=["model.loc"])
    assert float(flat["model.loc"]) > 0  # one name, the other held fixed
    skew = torch.tensor([[1.0, 0.5], [-0.5, 1.0]])
    with pytest.raises(ValueError, match="not symmetric"):
        _invert(skew, torch.eye(2), ("a", "b"))
    with pytest.raises(ValueError, match=r"is no minimum.*along b"):
        _invert(torch.diag(torch.tensor([1.0, -0.5])), torch.eye(2), ("a", "b"))


class Precision(nn.Module):
    """log f = −λ|x|²/2 of two numbers; score matching gives λ̂ = 2 / mean |x|²."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.factor("energy", -self.rate * x.square().sum(-1) / 2)


def test_a_fit_has_standard_errors() -> None:
    x = torch.randn(400, 2)
    square = x.square().sum(1)
    fitted = pg.fit(
        ScoreMatching()(pg.Unnormalized(Precision(), 2)),
        x,
        steps=300,
        batch_size=len(x),
        lr=0.05,
        validation=False,
        progress=False,
        compile=False,
    )
    rate = fitted.program.model.rate.detach()
    found = fitted.standard_errors(x, parameters=["model.rate"])
    expected = (rate * square).var(unbiased=False).sqrt() / square.mean() / math.sqrt(len(x))  # λ|x|² − 2 a row
    torch.testing.assert_close(found["model.rate"], expected)
    torch.testing.assert_close(rate, 2 / square.mean(), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"model\.rate"):
        fitted.standard_errors(x, parameters=["scale"])


def test_rows_that_overflow_are_named() -> None:
    x = quartic(20)
    x[7] = 1e80
    with pytest.raises(ArithmeticError, match="row 7"):
        sandwich(ScoreMatching()(energy), x)
