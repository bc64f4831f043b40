r"""A linear flow is a full Gaussian: its maximum likelihood is known in closed form, −½ (d log 2π + log|S| + d)."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from torch import Tensor

import pyro_gen as pg


def rows(name: str) -> Tensor:
    """The columns that are not constant, with mean 0 and variance 1 (over n)."""
    x = torch.from_numpy((load_iris() if name == "iris" else load_digits()).data)
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0, correction=0)


def maximum(x: Tensor) -> float:
    return -0.5 * float(x.shape[1] * (math.log(2 * math.pi) + 1) + torch.logdet(torch.cov(x.T, correction=0)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reference"), [("iris", -3.268401), ("digits", -64.121902)])
def test_fit_reaches_the_gaussian_of_maximum_likelihood(name: str, reference: float) -> None:
    x = rows(name)
    assert maximum(x) == pytest.approx(reference, abs=1e-6)
    torch.manual_seed(0)
    flow = pg.Flow(x.shape[1], "linear").double()
    pg.fit(pg.MaximumLikelihood()(flow), x, steps=1500, lr=0.02, schedule="cosine", seed=0, progress=False)
    assert float(flow.log_prob(x).mean().detach()) == pytest.approx(reference, abs=1e-3)
    # half way it is not there: the test sees a flow that is not the maximum
    half = pg.Flow(x.shape[1], "linear").double()
    half.initialise(x)
    assert float(half.log_prob(x).mean().detach()) < reference - 1


def test_nats_are_those_of_the_data_as_given() -> None:
    """In other units the log-density changes by the log-Jacobian of the units, and standardisation carries it."""
    x, units = rows("iris"), torch.tensor([10.0, 0.1, 3.0, 2.0], dtype=torch.double)
    one, two = (pg.Flow(4, "linear").double() for _ in range(2))
    one.initialise(x)
    two.initialise(x * units + 7)
    assert torch.allclose(two.log_prob(x * units + 7), one.log_prob(x) - units.log().sum(), atol=1e-10)


def test_draws_have_the_fitted_mean_and_covariance() -> None:
    x = rows("iris")
    torch.manual_seed(0)
    flow = pg.Flow(4, "linear").double()
    flow.initialise(x)
    module = pg.MaximumLikelihood()(flow)
    optimizer = torch.optim.LBFGS(
        module.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=0.0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(x) / len(x)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    assert float(flow.log_prob(x).mean().detach()) == pytest.approx(-3.268401, abs=1e-5)
    draws = flow.sample(40_000, seed=0)
    n, S = len(draws), torch.cov(x.T, correction=0)
    assert bool((draws.mean(0).abs() < 4 * (S.diagonal() / n).sqrt() + 1e-3).all())
    # var of an entry of a Gaussian sample covariance: (S_ii S_jj + S_ij²)/n
    error = ((S.diagonal().outer(S.diagonal()) + S.square()) / n).sqrt()
    assert bool(((torch.cov(draws.T) - S).abs() < 4 * error + 1e-3).all())
    assert not bool(((torch.cov((1.1 * draws).T) - S).abs() < 4 * error + 1e-3).all())
