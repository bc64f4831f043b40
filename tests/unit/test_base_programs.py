"""The kinds, made of a user's own Pyro programs: what they draw and what they are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_gen as pg
from pyro_gen import testing


def observing(view: Callable[[Tensor], Tensor], sd: float = 1.0) -> Callable[[Tensor], None]:
    """z ~ N(0, 1), x | z ~ N(z, sd²), which observes a view of x."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            seen = view(x)
            loc = z.reshape(*z.shape, *[1] * (seen.dim() - 1))  # every event here is of one number
            pyro.sample("x", dist.Normal(loc, sd).to_event(seen.dim() - 1), obs=seen)

    return model


def posterior(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.reshape(-1) / 2, 0.5**0.5))


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.squeeze(-1), lambda x: x.unsqueeze(1)])
def test_draws_have_the_shape_of_data(view: Callable[[Tensor], Tensor]) -> None:
    program = pg.Bounded(observing(view), posterior, 1)
    assert program.sample(5, seed=0).shape == (5, 1)
    assert program.sample(1, seed=0).shape == (1, 1)
    x = program.sample(20000, seed=0)
    # x ~ N(0, 2), so the sample variance has standard error 2 sqrt(2 / n)
    assert abs(float(x.var()) - 2) < 4 * 2 * math.sqrt(2 / 20000)
    testing.check_shapes(program, x[:6])


def test_the_bound_at_the_posterior_is_the_evidence() -> None:
    program, x = pg.Bounded(observing(lambda x: x), posterior, 1), torch.randn(6, 1)
    wanted = dist.Normal(0.0, math.sqrt(2)).log_prob(x).squeeze(-1)
    torch.testing.assert_close(program.lower_bound(x, particles=3), wanted)


def test_a_site_that_is_not_x_is_named() -> None:
    def turned(x: Tensor) -> None:
        with pyro.plate("columns", x.shape[1], dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal(x.new_zeros(()), 1.0), obs=x.T)

    with pytest.raises(ValueError, match=r"site 'y' has shape \(2, 5\), x has \(5, 2\): observe x itself"):
        pg.Exact(turned, 2).sample(5)

    def two(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for i in range(2):
                pyro.sample(f"x{i}", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, i])

    with pytest.raises(ValueError, match=r"data site is not clear among \['x0', 'x1'\]"):
        pg.Exact(two, 2).sample(5)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3"])
def test_number_of_draws(n: Any) -> None:
    with pytest.raises(ValueError, match="n must be a positive int"):
        pg.Bounded(observing(lambda x: x), posterior, 1).sample(n)
