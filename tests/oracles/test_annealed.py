"""Annealed importance sampling against sums and integrals that are known: errors, calibration, direction."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gen.evidence import AnnealedImportanceSampling, Enumeration, Quadrature, annealed, log_normalizer
from pyro_gen.programs.ebm import EBM
from pyro_gen.samplers import HMC, MALA
from pyro_gen.targets import BoltzmannTarget


def machine(seed, scale, visible=50, hidden=15):
    """A Boltzmann machine with weights of a given scale, in float64."""
    torch.manual_seed(seed)
    ebm = EBM(visible, "rbm", "bernoulli", hidden=(hidden,)).double()
    net = ebm.model.net
    with torch.no_grad():
        net.weight.copy_(scale * torch.randn(visible, hidden, dtype=torch.float64))
        net.visible_bias.copy_(0.5 * torch.randn(visible, dtype=torch.float64))
        net.hidden_bias.copy_(0.5 * torch.randn(hidden, dtype=torch.float64))
    return ebm


def gaussian(d=10, base="normal"):
    """N(0, S) up to Z, S = A A^T / d + .3 I, and log Z with everything but x' S^-1 x / 2 left out."""
    torch.manual_seed(0)
    a = torch.randn(d, d, dtype=torch.float64)
    s = a @ a.T / d + 0.3 * torch.eye(d, dtype=torch.float64)
    precision = torch.linalg.inv(s).float()
    half_logs = 0.5 * d * math.log(2 * math.pi)

    def energy(x):  # less the normal base, which the program multiplies in
        return 0.5 * ((x @ precision) * x).sum(-1) - 0.5 * x.square().sum(-1) - half_logs

    return EBM(d, energy=energy, base=base), half_logs + 0.5 * float(torch.logdet(s))


def standardised(evidence, truth):
    return (float(evidence.value) - truth) / float(evidence.standard_error)


# ------------------------------------------------------------------------------------------------- Boltzmann machines
@pytest.mark.slow
def test_boltzmann_machine_of_small_weights_forward_and_reverse():
    for seed in range(20):
        ebm = machine(seed, 0.15)
        truth = float(log_normalizer(ebm, method=Enumeration()).value)
        forward = log_normalizer(ebm, method=AnnealedImportanceSampling(1000, 100, seed=seed))
        draws = Enumeration().draw(ebm, 100, seed=1000 + seed)
        method = AnnealedImportanceSampling(1000, 100, reverse=True, start=draws, exact=True, seed=seed)
        reverse = log_normalizer(ebm, method=method)
        assert forward.kind == "estimate"
        assert reverse.kind == "upper bound"
        assert abs(float(forward.value) - truth) < 0.02
        assert abs(float(reverse.value) - truth) < 0.02


@pytest.mark.slow
def test_boltzmann_machine_of_large_weights_knows_its_error():
    inside = 0
    for seed in range(50):
        ebm = machine(seed, 0.5)
        truth = float(log_normalizer(ebm, method=Enumeration()).value)
        found = log_normalizer(ebm, method=AnnealedImportanceSampling(1000, 100, seed=seed))
        z = standardised(found, truth)
        assert abs(z) < 4
        assert float(found.standard_error) <= 0.025
        inside += abs(z) < 1.645
    assert 0.78 <= inside / 50 <= 0.98


def test_enumeration_of_the_smaller_layer_is_the_sum_over_all_states():
    for visible, hidden in ((9, 4), (4, 9)):
        ebm = machine(3, 1.0, visible, hidden)
        states = ((torch.arange(2**visible).unsqueeze(1) >> torch.arange(visible)) & 1).double()
        truth = torch.logsumexp(ebm.log_density(states), 0)
        torch.testing.assert_close(log_normalizer(ebm, method=Enumeration()).value, truth.detach(), rtol=0, atol=1e-12)


def test_exact_draws_have_the_moments_of_the_machine():
    ebm = machine(4, 1.0, 6, 3)
    states = ((torch.arange(2**6).unsqueeze(1) >> torch.arange(6)) & 1).double()
    p = torch.softmax(ebm.log_density(states), 0).detach()
    draws = Enumeration().draw(ebm, 20000, seed=0)
    mean = p @ states
    assert bool(((draws.mean(0) - mean).abs() < 4 * (mean * (1 - mean) / 20000).sqrt()).all())
    pair = (p * states[:, 0] * states[:, 1]).sum()
    assert abs((draws[:, 0] * draws[:, 1]).mean() - pair) < 4 * (pair * (1 - pair) / 20000).sqrt()


# ------------------------------------------------------------------------------------------ a wrong one is told apart
def few_steps(seed=0):
    """Few temperatures: what is evaluated when matters, and the weights still have an error of a tenth."""
    ebm = machine(0, 0.5)
    truth = float(log_normalizer(ebm, method=Enumeration()).value)
    return standardised(log_normalizer(ebm, method=AnnealedImportanceSampling(30, 1000, seed=seed)), truth)


def test_few_temperatures_are_unbiased_too():
    assert abs(few_steps()) < 4


def test_weights_evaluated_after_the_move_are_rejected(monkeypatch):
    def wrong(ladder, x):
        weights = torch.zeros(len(x), dtype=torch.float64)
        for k in range(1, len(ladder) + 1):
            x = ladder.move(x, k)
            weights += ladder.increment(x, k - 1, k)
        return weights, x

    monkeypatch.setattr(annealed, "_up", wrong)
    assert abs(few_steps()) > 4


def test_a_forgotten_base_normalizer_is_rejected(monkeypatch):
    truth = float(log_normalizer(machine(0, 0.5), method=Enumeration()).value)
    monkeypatch.setattr(BoltzmannTarget, "log_base_normalizer", 0.0)
    found = log_normalizer(machine(0, 0.5), method=AnnealedImportanceSampling(40, 200, seed=0))
    assert abs(standardised(found, truth)) > 4


def test_bounds_hold_in_expectation_and_close_with_more_temperatures():
    ebm = machine(1, 0.5, 12, 6)
    truth = float(log_normalizer(ebm, method=Enumeration()).value)
    gaps = []
    for temperatures in (3, 30):
        errors = {False: [], True: []}
        for seed in range(40):
            start = Enumeration().draw(ebm, 2, seed=seed)
            for reverse in errors:
                method = AnnealedImportanceSampling(
                    temperatures,
                    2,
                    reverse=reverse,
                    start=start if reverse else None,
                    exact=reverse,
                    schedule="linear",
                    seed=seed,
                )
                errors[reverse].append(float(log_normalizer(ebm, method=method).value) - truth)
        low, high = torch.tensor(errors[False]), torch.tensor(errors[True])
        assert low.mean() < 4 * low.std() / 40**0.5  # E[log Z^] <= log Z, and the other way
        assert high.mean() > -4 * high.std() / 40**0.5
        gaps.append(float(high.mean() - low.mean()))
    assert gaps[0] > 4 * gaps[1]


# ---------------------------------------------------------------------------------------------------- continuous data
@pytest.mark.slow
def test_gaussian_in_ten_dimensions():
    ebm, truth = gaussian()
    found = [
        log_normalizer(ebm, method=AnnealedImportanceSampling(200, 2500, sampler=MALA(), seed=s)) for s in range(12)
    ]
    errors = torch.tensor([float(f.value) - truth for f in found])
    assert errors.square().mean().sqrt() <= 0.01
    assert all(abs(standardised(f, truth)) < 4 for f in found)


def modes(x):
    """Minus log of .2 N(4, 1) + .8 N(-4, 1) in each of two coordinates together, without 1 / 2 pi."""
    parts = [math.log(w) - 0.5 * (x - m).square().sum(-1) for w, m in ((0.2, 4.0), (0.8, -4.0))]
    return -torch.logaddexp(*parts)


def test_two_modes_from_a_broad_base():
    ebm = EBM(2, energy=modes, base=None)
    broad = dist.Normal(torch.zeros(2), 5.0).to_event(1)
    method = AnnealedImportanceSampling(300, 1000, base=broad, seed=0)
    found = log_normalizer(ebm, method=method)
    assert abs(float(found.value) - math.log(2 * math.pi)) < 0.1
    assert abs(standardised(found, math.log(2 * math.pi))) < 4


def test_a_base_on_one_mode_misses_the_other_and_the_gap_says_so():
    ebm = EBM(2, energy=modes, base=None)
    narrow = dist.Normal(torch.full((2,), 4.0), 1.0).to_event(1)
    torch.manual_seed(0)
    which = torch.where(torch.rand(200, 1) < 0.2, 4.0, -4.0)
    draws = which + torch.randn(200, 2)
    forward = log_normalizer(ebm, method=AnnealedImportanceSampling(100, 200, base=narrow, seed=0))
    reverse = log_normalizer(
        ebm, method=AnnealedImportanceSampling(100, 200, base=narrow, reverse=True, start=draws, exact=True, seed=0)
    )
    truth = math.log(2 * math.pi)
    assert float(forward.value) < truth - 1  # it sees one mode of weight .2: log .2 = -1.6
    gap = float(reverse.value - forward.value)
    assert gap > 4 * math.hypot(float(forward.standard_error), float(reverse.standard_error))


@pytest.mark.parametrize("name", ["rings", "banana", "waves"])
def test_toy_energies_agree_with_quadrature(name):
    energies = {
        "rings": lambda x: 8 * (x.square().sum(-1).sqrt() - 2).square(),
        "banana": lambda x: 0.5 * x[:, 0].square() / 4 + 2 * (x[:, 1] - 0.3 * x[:, 0].square()).square(),
        "waves": lambda x: 0.5 * x.square().sum(-1) / 9 + 2 * torch.sin(2 * x[:, 0]) * torch.cos(x[:, 1]),
    }
    ebm = EBM(2, energy=energies[name], base=None)
    truth = log_normalizer(ebm, method=Quadrature(tolerance=1e-4))
    base = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    found = log_normalizer(ebm, method=AnnealedImportanceSampling(150, 1000, base=base, seed=0))
    assert truth.kind == "exact"
    assert float(found.standard_error) < 0.05
    assert abs(standardised(found, float(truth.value))) < 4


@pytest.mark.parametrize("sampler", [None, HMC(leapfrog=5), MALA(), MALA(step_size=0.5)])
def test_samplers_on_positive_data(sampler):
    """x^2 e^-2x on the positive numbers, twice: Z = (Gamma(3) / 2^3)^2."""
    ebm = EBM(2, energy=lambda x: (2 * x - 2 * x.log()).sum(-1), base=None, support="positive")
    base = dist.Exponential(torch.ones(2)).to_event(1)
    found = log_normalizer(ebm, method=AnnealedImportanceSampling(60, 500, base=base, sampler=sampler, seed=1))
    assert abs(standardised(found, 2 * (math.log(2) - 3 * math.log(2)))) < 4


def test_reverse_from_annealed_chains_is_an_estimate():
    ebm, truth = gaussian(4)
    found = log_normalizer(ebm, method=AnnealedImportanceSampling(100, 500, reverse=True, seed=0))
    assert found.kind == "estimate"
    assert abs(standardised(found, truth)) < 4


# ------------------------------------------------------------------------------------------------------ discrete data
def ising(coupling=0.3, field=0.1, side=4):
    """The energy of spins 2x - 1 on a square with free edges."""

    def energy(x):
        s = (2 * x - 1).reshape(-1, side, side)
        bonds = (s[:, 1:] * s[:, :-1]).sum((1, 2)) + (s[:, :, 1:] * s[:, :, :-1]).sum((1, 2))
        return -coupling * bonds - field * s.sum((1, 2))

    return EBM(side * side, energy=energy, base="bernoulli")


@pytest.mark.slow
def test_ising_by_single_spin_gibbs():
    ebm = ising()
    truth = float(log_normalizer(ebm, method=Enumeration()).value)
    found = log_normalizer(ebm, method=AnnealedImportanceSampling(100, 4000, seed=0))
    assert abs(float(found.value) - truth) < 0.02
    assert abs(standardised(found, truth)) < 4


def test_ising_chain_has_the_sum_of_its_transfer_matrix():
    coupling = nn.Parameter(torch.tensor(0.7, dtype=torch.float64), requires_grad=False)

    def energy(x):
        s = 2 * x - 1
        return -coupling * (s * s.roll(1, -1)).sum(-1)

    ebm = EBM(10, energy=energy, base=None, support="binary").double()
    truth = math.log((2 * math.cosh(0.7)) ** 10 + (2 * math.sinh(0.7)) ** 10)
    assert abs(float(log_normalizer(ebm, method=Enumeration()).value) - truth) < 1e-12
