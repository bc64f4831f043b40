"""Restricted Boltzmann machines small enough to enumerate: free energy, block Gibbs, the gradient of the likelihood."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import pyro_gen as pg
from pyro_gen.datasets import bars_and_stripes
from pyro_gen.nn import RBM

VISIBLE, HIDDEN = 4, 3


def states(size: int) -> Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=size)), dtype=torch.float64)


def machine(seed: int = 0, scale: float = 0.8) -> pg.EBM:
    """With weights and biases large enough that no unit is independent of the others."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ebm = pg.EBM(VISIBLE, energy="rbm", base="bernoulli", hidden=(HIDDEN,)).double()
        for parameter in ebm.parameters():
            parameter.data.normal_(0, scale)
    return ebm


def probabilities(ebm: pg.EBM) -> Tensor:
    return torch.softmax(ebm.log_density(states(VISIBLE)), 0)


def likelihood_gradients(ebm: pg.EBM, x: Tensor) -> dict[str, Tensor]:
    """Of −Σ log p(x), Z a sum over all states."""
    loss = -(ebm.log_density(x) - torch.logsumexp(ebm.log_density(states(VISIBLE)), 0)).sum()
    named = dict(ebm.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def statistics(net: RBM, v: Tensor) -> dict[str, Tensor]:
    """∂ log f of each row, in closed form: h | v is independent with the sigmoids as its mean."""
    h = torch.sigmoid(net.hidden_bias + v @ net.weight)
    return {
        "model.net.weight": v.unsqueeze(2) * h.unsqueeze(1),
        "model.net.visible_bias": v,
        "model.net.hidden_bias": h,
    }


def errors(ebm: pg.EBM, found: dict[str, Tensor], x: Tensor, chains: int) -> float:
    """Largest distance of a gradient from the exact one, in standard errors of independent exact negatives."""
    p, v = probabilities(ebm).detach(), states(VISIBLE)
    net: RBM = ebm.model.net  # type: ignore[assignment]
    worst = 0.0
    for name, exact in likelihood_gradients(ebm, x).items():
        values = statistics(net, v)[name].detach()
        weights = p.reshape(-1, *[1] * (values.dim() - 1))
        variance = (weights * values.square()).sum(0) - (weights * values).sum(0).square()
        worst = max(worst, float(((found[name] - exact).abs() / (len(x) * (variance / chains).sqrt())).max()))
    return worst


def test_free_energy_is_the_sum_over_hidden_units() -> None:
    ebm, v, h = machine(), states(VISIBLE), states(HIDDEN)
    net: RBM = ebm.model.net  # type: ignore[assignment]
    biases, coupling = (v @ net.visible_bias).unsqueeze(1) + h @ net.hidden_bias, v @ net.weight @ h.T
    torch.testing.assert_close(-net(v), torch.logsumexp(biases + coupling, 1), rtol=1e-12, atol=1e-12)
    found = net.log_sum(v, 0.3)
    torch.testing.assert_close(found, torch.logsumexp(biases + 0.3 * coupling, 1), rtol=1e-12, atol=1e-12)


def test_a_sweep_leaves_the_distribution_as_it_is() -> None:
    # Frequencies of n exact draws after a sweep are multinomial with the same p: 4 standard errors hold for all of 16
    # states but in one run of a thousand.
    ebm, n = machine(), 200_000
    net: RBM = ebm.model.net  # type: ignore[assignment]
    p, bits = probabilities(ebm).detach(), 2.0 ** torch.arange(VISIBLE - 1, -1, -1, dtype=torch.float64)

    def worst(sweeper: RBM) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            swept = sweeper.sweep(states(VISIBLE)[torch.multinomial(p, n, replacement=True)])
        found = torch.bincount((swept @ bits).long(), minlength=2**VISIBLE) / n
        return float(((found - p).abs() / (p * (1 - p) / n).sqrt()).max())

    assert worst(net) < 4
    other = machine().model.net
    other.hidden_bias.data.mul_(0.9)  # type: ignore[operator]
    assert worst(other) > 4  # type: ignore[arg-type]


@pytest.mark.parametrize("persistent", [False, True])
def test_the_gradient_of_long_chains_is_that_of_the_likelihood(persistent: bool) -> None:
    # Chains are independent of each other, and after 100 sweeps draws of p (the slowest of 16 states mixes in about 5),
    # so each entry of the gradient has the variance of one exact draw, over chains.
    ebm, chains = machine(), 20_000
    x = states(VISIBLE)[[1, 2, 7, 7, 8, 15]]
    named = dict(ebm.named_parameters())

    def gradients(**options: object) -> dict[str, Tensor]:
        objective = pg.ContrastiveDivergence(pg.Gibbs(), chains=chains, **options)  # type: ignore[arg-type]
        with torch.random.fork_rng():
            torch.manual_seed(2)
            loss = objective(ebm)(x)
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    found = gradients(steps=100, persistent=persistent)
    assert errors(ebm, found, x, chains) < 4
    assert errors(ebm, gradients(steps=1), x, chains) > 4  # CD-1 starts at the data, and has not left them
    flipped = {name: -gradient for name, gradient in found.items()}
    assert errors(ebm, flipped, x, chains) > 4


def test_single_entry_draws_give_the_same_gradient_as_blocks() -> None:
    """The bare model, as SVI has it: no block sweeps, densities from a trace."""
    ebm, chains = machine(), 2000
    x = states(VISIBLE)[[1, 2, 7, 8]]
    named = dict(ebm.named_parameters())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = pg.ContrastiveDivergence(pg.Gibbs(), steps=30, chains=chains)(ebm.model)(x)
    found = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    assert errors(ebm, found, x, chains) < 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_persistent_chains_learn_bars_and_stripes(seed: int) -> None:
    toy = bars_and_stripes(3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ebm = pg.EBM(9, energy="rbm", base="bernoulli", hidden=(15,))
    loss = pg.ContrastiveDivergence(pg.Gibbs(), steps=5, persistent=True, chains=100)(ebm)
    pg.fit(loss, toy.patterns, steps=6000, lr=0.01, schedule="cosine", seed=seed, compile=False, progress=False)
    double = ebm.double()
    with torch.no_grad():
        log_z = torch.logsumexp(double.log_density(states(9)), 0)
        found = float((double.log_density(toy.patterns.double()) - log_z).mean())
    assert -math.log(14) - 0.15 < found <= -math.log(14)
