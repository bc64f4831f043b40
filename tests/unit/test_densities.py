"""A whole exact program as one site of another, by `Exact.distribution`, where a family has no better one."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

import pyro_gen as pg

LOC, SCALE = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(LOC, SCALE).to_event(1), obs=x)


def conditional(x: Tensor, context: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(context.sum(-1, keepdim=True), 0.1).to_event(1), obs=x)


def test_density_and_draws_are_those_of_the_program() -> None:
    d = pg.Exact(model, 2).distribution()
    reference = dist.Normal(LOC, SCALE).to_event(1)
    x = torch.randn(3, 4, 2)
    assert torch.allclose(d.log_prob(x), reference.log_prob(x))
    assert (d.batch_shape, d.event_shape, d.has_rsample) == ((), (2,), False)
    assert d.support.event_dim == 1
    pyro.set_rng_seed(0)
    draws = d.sample((20_000,))
    assert bool(((draws.mean(0) - LOC).abs() < 4 * SCALE / math.sqrt(20_000)).all())
    assert not bool(((draws.mean(0) - LOC - 0.1).abs() < 4 * SCALE / math.sqrt(20_000)).all())


def test_batches_come_from_the_context_row_by_row() -> None:
    program = pg.Exact(conditional, 1, context_shape=2)
    context = torch.tensor([[0.0, 1.0], [5.0, 5.0], [-3.0, 0.0]])
    d = program.distribution(context)
    centres = context.sum(-1, keepdim=True)
    assert d.batch_shape == (3,)
    assert torch.allclose(d.log_prob(centres), torch.full((3,), -math.log(0.1 * math.sqrt(2 * math.pi))))
    assert d.log_prob(torch.zeros(7, 3, 1)).shape == (7, 3)
    wide = d.expand((4, 3))
    assert bool(((wide.sample((2,)) - centres).abs() < 1).all())
    assert wide.log_prob(centres).shape == (4, 3)


@pytest.mark.parametrize("parallel", [False, True])
def test_it_is_a_site_of_another_program(parallel: bool) -> None:
    d = pg.Exact(model, 2).distribution()

    def other() -> None:
        with pyro.plate("rows", 5), poutine.mask(mask=torch.arange(5) < 2):
            z = pyro.sample("z", d)
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0))

    trace = poutine.trace(other).get_trace()
    trace.compute_log_prob()
    z = trace.nodes["z"]
    assert torch.allclose(z["log_prob_sum"], dist.Normal(LOC, SCALE).to_event(1).log_prob(z["value"])[:2].sum())
    assert Predictive(other, num_samples=3, parallel=parallel)()["z"].shape == (3, 5, 2)


def test_support_is_that_of_the_data_site() -> None:
    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(torch.tensor([2.0])).to_event(1), obs=x)

    assert pg.Exact(counts, 1).distribution().support.is_discrete


def test_a_context_is_asked_for_or_refused() -> None:
    with pytest.raises(ValueError, match="context is missing"):
        pg.Exact(conditional, 1, context_shape=2).distribution()
    with pytest.raises(ValueError, match="context was given"):
        pg.Exact(model, 2).distribution(torch.zeros(3, 2))
