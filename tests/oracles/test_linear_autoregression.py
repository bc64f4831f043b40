r"""A linear autoregression is every Gaussian: trained, it has to reach the Gaussian of maximum likelihood.

x_i = b_i + Σ_{j<i} a_ij x_j + s_i ε_i has as its joint every N(μ, Σ), once: with L the Cholesky factor of Σ and
D = diag(L), the weights a are those of I − D L⁻¹, and s = D. At maximum likelihood μ and Σ are mean and covariance
(over n) of the data, and the log-likelihood per datum is −½ (d log 2π + log det Σ + d).
"""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from torch import Tensor

import pyro_gen as pg
from pyro_gen.programs.autoregressive import Autoregressive

REFERENCE = {"iris": -3.268401, "digits": -64.121902}  # nats per datum, standardised columns, maximum likelihood


def data(name: str) -> Tensor:
    """All rows and the columns that are not constant, with mean 0 and variance 1 (over n)."""
    x = torch.from_numpy({"iris": load_iris, "digits": load_digits}[name]().data)
    x = x[:, x.std(0) > 0]
    return (x - x.mean(0)) / x.std(0, correction=0)


def best(x: Tensor) -> float:
    """Log-likelihood per datum of the Gaussian of maximum likelihood."""
    d, centred = x.shape[1], x - x.mean(0)
    return -0.5 * float(d * math.log(2 * math.pi) + torch.logdet(centred.T @ centred / len(x)) + d)


def linear(features: int, order: list[int] | None = None) -> Autoregressive:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoregressive(features, "normal", hidden=(), scale="feature", order=order)


def optimised(program: Autoregressive, x: Tensor, iterations: int) -> float:
    """Log-likelihood per datum after L-BFGS in float64 on the loss itself."""
    program.double().initialise(x)
    loss = pg.MaximumLikelihood()(program)
    optimizer = torch.optim.LBFGS(
        loss.parameters(), max_iter=iterations, history_size=50, tolerance_grad=1e-9, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x) / len(x)
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return float(program.log_prob(x).mean())


@pytest.mark.parametrize("name", REFERENCE)
def test_closed_form_is_the_reference(name: str) -> None:
    assert best(data(name)) == pytest.approx(REFERENCE[name], abs=1e-6)


@pytest.mark.parametrize("order", [None, [3, 1, 0, 2]])
def test_fit_reaches_the_gaussian_of_maximum_likelihood(order: list[int] | None) -> None:
    x = data("iris").float()
    program = linear(4, order)
    pg.fit(
        pg.MaximumLikelihood()(program), x, steps=700, lr=0.05, schedule="cosine", seed=0, compile=False,
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        assert float(program.log_prob(x).mean()) == pytest.approx(REFERENCE["iris"], abs=1e-3)


@pytest.mark.parametrize("order", [None, [3, 1, 0, 2]])
def test_weights_at_the_optimum_are_the_regressions(order: list[int] | None) -> None:
    x = data("iris")
    program = linear(4, order)
    assert optimised(program, x, 500) == pytest.approx(best(x), abs=1e-9)
    at = order or [0, 1, 2, 3]
    y = x[:, at]
    lower = torch.linalg.cholesky(y.T @ y / len(y))
    scale = lower.diagonal()
    weights = torch.eye(4) - scale.unsqueeze(1) * torch.linalg.inv(lower)
    layer, likelihood = program.model.conditionals.net.layers[0], program.model.conditionals.likelihood
    found = layer.weight[at][:, at].tril(-1)
    # a loss at its least to 1e-9 leaves an error of its root in the weights
    torch.testing.assert_close(found.detach(), weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(likelihood.log_scale.exp()[at].detach(), scale, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_digits_too() -> None:
    x = data("digits")
    assert optimised(linear(61), x, 400) == pytest.approx(REFERENCE["digits"], abs=1e-3)


def test_a_value_that_sees_itself_is_seen() -> None:
    x = data("iris")
    program = linear(4)
    program.model.conditionals.net.layers[0].mask.fill_(1.0)
    assert optimised(program, x, 50) > REFERENCE["iris"] + 0.1  # no Gaussian has a likelihood above the best
