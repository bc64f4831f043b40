"""Pseudo-likelihood and ratio matching against conditionals by brute force, on states that can be enumerated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen.compiled import CompiledStep
from pyro_gen.nn import RBM
from pyro_gen.objectives.pseudo_likelihood import PseudoLikelihood, RatioMatching

STATES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
EDGES = [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]  # of a 2×3 lattice


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        yield
        torch.set_default_dtype(torch.float32)


class Factor(nn.Module):
    """exp(−net(x)) on discrete x."""

    def __init__(self, net: nn.Module, base: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.base = net, base

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", self.base(x).mask(False), obs=x)
            pyro.factor("energy", -self.net(x))


class Lattice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coupling, self.field = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor) -> Tensor:
        spins = 2 * x - 1
        pairs = torch.stack([spins[:, i] * spins[:, j] for i, j in EDGES], 1).sum(1)
        return -(self.coupling * pairs + self.field * spins.sum(1))


def coins(x: Tensor) -> Any:
    return dist.Bernoulli(torch.full_like(x[0], 0.5)).to_event(1)


def levels(x: Tensor) -> Any:
    return dist.Categorical(torch.ones(x.shape[1], 3)).to_event(1)


def conditionals(net: nn.Module, x: Tensor, values: int) -> Tensor:
    """log p(x_i | x_−i), one site and row at a time."""
    found = []
    for row in x:
        for i in range(len(row)):
            moved = row.repeat(values, 1)
            moved[:, i] = torch.arange(values)
            found.append(torch.log_softmax(-net(moved), 0)[int(row[i])])
    return torch.stack(found).reshape(x.shape)


@pytest.mark.parametrize("chunk_rows", [1, 100, 65536])
@pytest.mark.parametrize(("make", "values"), [(Lattice, 2), (lambda: RBM(6, 3, std=1.0), 2), (lambda: Levels(), 3)])
def test_equals_brute_force_with_gradient(make: Callable[[], nn.Module], values: int, chunk_rows: int) -> None:
    net = make()
    x = torch.randint(values, (9, 6)).double()
    model = Factor(net, coins if values == 2 else levels)
    expected = -conditionals(net, x, values).sum(1)
    module = PseudoLikelihood(chunk_rows=chunk_rows)(model)
    torch.testing.assert_close(module.pointwise(x), expected)
    wanted = torch.autograd.grad(expected.sum(), list(net.parameters()))
    found = torch.autograd.grad(module(x), list(net.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    if values == 2:
        ratio = (1 - conditionals(net, x, values).exp()).square().sum(1)
        torch.testing.assert_close(RatioMatching()(model).pointwise(x), ratio)


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.einsum("ni,ij,nj->n", x, self.weight, x)


def test_is_the_likelihood_where_sites_are_independent() -> None:
    program = pg.Exact(lambda x: pyro_rows(x), 6)
    x = torch.bernoulli(torch.full((5, 6), 0.5))
    torch.testing.assert_close(PseudoLikelihood()(program).pointwise(x), -program.log_prob(x))


def pyro_rows(x: Tensor) -> None:
    with pyro.plate("data", x.shape[0]):
        pyro.sample("x", dist.Bernoulli(torch.linspace(0.1, 0.8, 6)).to_event(1), obs=x)


@pytest.mark.parametrize("objective", [PseudoLikelihood(), RatioMatching()])
def test_estimate_is_consistent(objective: Any) -> None:
    """Over all 64 states: no slope at the truth, and an estimate from a sample within 4 sandwich errors."""
    net = Lattice()
    truth = torch.stack([p.detach().clone() for p in net.parameters()])
    module = objective(Factor(net, coins))
    probability = torch.softmax(-net(STATES), 0).detach()
    exact = torch.autograd.grad((probability * module.pointwise(STATES)).sum(), list(net.parameters()))
    assert float(torch.stack(exact).abs().max()) < 1e-12
    x = STATES[torch.multinomial(probability, 4000, replacement=True)]
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = module(x) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    at = torch.stack([p.detach() for p in net.parameters()])
    names = [f"net.{n}" for n, _ in net.named_parameters()]

    def rows(values: Tensor) -> Tensor:
        found: Any = torch.func.functional_call(_Rows(module), {f"module.model.{n}": v for n, v in zip(names, values, strict=True)}, (x,))  # fmt: skip # noqa: E501
        return found

    slopes = torch.func.jacfwd(rows)(at)
    curved = torch.func.hessian(lambda v: rows(v).mean())(at)
    bread = torch.linalg.inv(curved)
    errors = (bread @ torch.cov(slopes.T) @ bread / len(x)).diagonal().sqrt()
    assert float(((at - truth).abs() / errors).max()) < 4
    assert float(((at - 1.5 * truth).abs() / errors).max()) > 4


class _Rows(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.module.pointwise(x)
        return rows


def test_some_of_the_sites_are_unbiased() -> None:
    net, x = Lattice(), STATES[::5]
    whole = PseudoLikelihood()(Factor(net, coins)).pointwise(x).sum().detach()
    module = PseudoLikelihood(2)(Factor(net, coins))
    draws = torch.stack([module(x).detach() for _ in range(400)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(float(draws.mean() - whole)) < 4 * float(error)
    assert abs(float(draws.mean() / 3 - whole)) > 4 * float(error)  # without the factor 6 / 2
    assert not PseudoLikelihood(2).deterministic
    assert PseudoLikelihood().deterministic


def test_steps_of_svi_and_traced() -> None:
    x = STATES[::7]
    model = Factor(Lattice(), coins)
    module = PseudoLikelihood()(model)
    plain = module(x, total=40)
    torch.testing.assert_close(plain, module(x) * 40 / len(x))
    module.prepare(x)
    step = CompiledStep(module, inductor=False)
    torch.testing.assert_close(step((x,), len(x), len(x))[0], (module(x) / len(x)).detach())
    before = model.net.coupling.detach().clone()  # type: ignore[operator, union-attr]
    before_loss = module(x).detach()
    svi = pyro.infer.SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), loss=PseudoLikelihood())
    assert svi.step(x) == pytest.approx(float(before_loss), rel=1e-9)
    assert float(model.net.coupling.detach()) != float(before)  # type: ignore[operator, union-attr]


def plain(site: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", site, obs=x)

    return model


def no_site(x: Tensor) -> None:
    with pyro.plate("data", x.shape[0]):
        pyro.factor("energy", x.sum(-1))


ONES = torch.ones(2)
BAD = [
    (PseudoLikelihood(), plain(dist.Normal(ONES, 1.0).to_event(1)), "use pg.ScoreMatching"),
    (PseudoLikelihood(), plain(dist.Poisson(ONES).to_event(1)), "finitely many"),
    (PseudoLikelihood(), no_site, "no site observes x"),
    (PseudoLikelihood(3), plain(dist.Bernoulli(ONES / 2).to_event(1)), "more than the 2 entries"),
    (RatioMatching(), plain(dist.Categorical(torch.ones(2, 3)).to_event(1)), "for binary x"),
]


@pytest.mark.parametrize(("objective", "model", "said"), BAD)
def test_refused(objective: Any, model: Callable[[Tensor], None], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        objective(model)(torch.ones(4, 2))


@pytest.mark.parametrize("options", [{"sites": 0}, {"sites": 1.5}, {"chunk_rows": 0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PseudoLikelihood(**options)
