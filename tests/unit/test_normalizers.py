"""log Z: closed forms, kinds and errors, what is refused, and what is left as it was."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_gen.base import Evidence, EvidenceMethod, Exact, Implicit, NormalizerMethod, Unnormalized
from pyro_gen.evidence import (
    AnnealedImportanceSampling,
    Enumeration,
    Quadrature,
    log_evidence,
    log_normalizer,
    normalized,
)
from pyro_gen.evidence.paths import fixed_ladder, tuned_ladder
from pyro_gen.programs import VAE
from pyro_gen.programs.ebm import EBM
from pyro_gen.samplers import HMC, Gibbs, Langevin

QUICK = AnnealedImportanceSampling(8, 40, seed=0)
METHODS = [Quadrature(), Enumeration(), QUICK]


def quadratic(d=1, base=None, mean=0.0, dtype=torch.float64, **options):
    return EBM(d, energy=lambda x: 0.5 * (x - mean).square().sum(-1), base=base, **options).to(dtype)


def value(program, method, context=None):
    return float(log_normalizer(program, context, method=method).value)


# --------------------------------------------------------------------------------------------------------- quadrature
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_quadrature_of_a_gaussian(d, mean):
    found = log_normalizer(quadratic(d, mean=mean), method=Quadrature())
    assert found.kind == "exact"
    assert abs(float(found.value) - d / 2 * math.log(2 * math.pi)) < 1e-9
    assert float(found.standard_error) < 1e-6


@pytest.mark.parametrize(
    ("energy", "support", "truth"),
    [
        (lambda x: torch.log1p(x.square()).sum(-1), "real", math.log(math.pi)),  # heavy tails
        (lambda x: (x**4).sum(-1) / 4, "real", math.log(math.gamma(0.25) / math.sqrt(2))),
        (lambda x: (3 * x - 1.5 * x.log()).sum(-1), "positive", math.lgamma(2.5) - 2.5 * math.log(3)),
        (lambda x: 0.0 * x.sum(-1), (2, 5), math.log(3)),
        (lambda x: -(x.log() + 2 * torch.log1p(-x)).sum(-1), "unit", math.log(1 / 12)),  # B(2, 3)
        (lambda x: 5e5 * (x - 0.3).square().sum(-1), "real", 0.5 * math.log(2 * math.pi / 1e6)),  # narrow
    ],
)
def test_quadrature_in_closed_form(energy, support, truth):
    ebm = EBM(1, energy=energy, base=None, support=support).double()
    assert abs(value(ebm, Quadrature()) - truth) < 1e-7


def test_quadrature_of_a_kink_says_its_error():
    corner = 2**-0.5  # lies on no grid
    ebm = EBM(1, energy=lambda x: (x - corner).abs().sum(-1), base=None).double()
    found = log_normalizer(ebm, method=Quadrature(max_points=3000, tolerance=1e-12))
    assert found.kind == "estimate"
    assert 0 < abs(float(found.value) - math.log(2)) < 4 * float(found.standard_error)


def test_quadrature_in_float32_and_small_memory():
    one, two = quadratic(2, dtype=torch.float32), Quadrature(memory=2**14)
    assert abs(value(one, two) - math.log(2 * math.pi)) < 1e-5
    assert value(quadratic(2), two) == pytest.approx(value(quadratic(2), Quadrature()), abs=1e-12)


def test_an_exact_program_has_none_and_can_be_checked():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(1), 2.0).to_event(1), obs=x)

    program = Exact(model, 1)
    assert log_normalizer(program).kind == "exact"
    assert float(log_normalizer(program).value) == 0.0
    assert abs(value(program, Quadrature())) < 1e-6  # float32
    assert abs(value(program, QUICK)) < 1e-6
    x = torch.randn(5, 1)
    torch.testing.assert_close(log_evidence(program, x, method=QUICK).value, program.log_prob(x).double())


# -------------------------------------------------------------------------------------------------------- enumeration
def test_enumeration_of_integers():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(logits=x.new_zeros(2, 5)).to_event(1).mask(False), obs=x)
            pyro.factor("tilt", 0.3 * x.sum(-1))

    truth = 2 * math.log(sum(math.exp(0.3 * k) for k in range(5)))
    for method in (Enumeration(), Enumeration(memory=2**10)):
        assert abs(value(Unnormalized(model, 2), method) - truth) < 1e-5


def test_enumeration_states_its_rounding():
    ebm = EBM(4, energy=lambda x: -100 * x.sum(-1), base=None, support="binary")
    found = log_normalizer(ebm, method=Enumeration())
    truth = 4 * math.log1p(math.exp(100))
    assert abs(float(found.value) - truth) <= float(found.standard_error) < 1e-3


# ---------------------------------------------------------------------------------------------------------- log p(x)
def test_log_p_shares_the_error_of_log_z():
    ebm, x = quadratic(3, base="normal"), torch.randn(6, 3, dtype=torch.float64)
    method = AnnealedImportanceSampling(30, 100, seed=0)
    found, log_z = log_evidence(ebm, x, method=method), log_normalizer(ebm, method=method)
    torch.testing.assert_close(found.value, ebm.log_density(x) - log_z.value)
    assert found.shared_error == float(log_z.standard_error)
    assert float(found.mean().standard_error) == pytest.approx(float(log_z.standard_error))
    truth = dist.Normal(0.0, 0.5**0.5).log_prob(x).sum(-1)
    assert float((found.value - truth).abs().max()) < 4 * found.shared_error
    torch.testing.assert_close(normalized(ebm, x, log_z).value, found.value)


@pytest.mark.parametrize(
    ("kind", "turned"),
    [("lower bound", "upper bound"), ("upper bound", "lower bound"), ("estimate", "estimate"), ("exact", "exact")],
)
def test_bounds_turn_round(kind, turned):
    log_z = Evidence(torch.tensor(0.5, dtype=torch.float64), kind, torch.tensor(0.1))
    found = normalized(quadratic(2), torch.zeros(3, 2, dtype=torch.float64), log_z)
    assert found.kind == turned
    assert found[1].kind == turned


def conditional():
    """y | c ~ N(c, 1) up to a Z that depends on c."""

    def energy(y, c):
        return 0.5 * (y - c).square().sum(-1) + c.square().sum(-1)

    return EBM(1, energy=energy, base=None, context_shape=1).double()


def test_each_context_has_its_own_z():
    ebm = conditional()
    c = torch.tensor([[0.0], [1.0], [1.0], [3.0]], dtype=torch.float64)
    y = torch.zeros_like(c)
    found = log_evidence(ebm, y, c, method=Quadrature())
    torch.testing.assert_close(found.value, dist.Normal(c, 1.0).log_prob(y).squeeze(1), rtol=0, atol=1e-9)
    assert abs(value(ebm, Quadrature(), c[3]) - (0.5 * math.log(2 * math.pi) - 9)) < 1e-9
    with pytest.raises(ValueError, match="3 distinct rows"):
        log_evidence(ebm, y, c, method=Quadrature(max_contexts=2))
    with pytest.raises(ValueError, match="context must be one"):
        log_normalizer(ebm, c, method=Quadrature())
    with pytest.raises(ValueError, match="context is missing"):
        log_normalizer(ebm, method=Quadrature())


class Fixed(Quadrature):
    """Answers with an error that depends on the context."""

    def log_normalizer(self, program, context=None):
        return Evidence(torch.zeros((), dtype=torch.float64), "estimate", 0.1 * (1 + context.sum()))


def test_errors_of_contexts_add_as_they_are_shared():
    c = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0], [2.0]], dtype=torch.float64)
    found = log_evidence(conditional(), torch.zeros_like(c), c, method=Fixed())
    each = 0.1 * (1 + c.squeeze(1))
    torch.testing.assert_close((found.standard_error**2 + found.shared_error**2).sqrt(), each)
    truth = (3 * 0.1) ** 2 + (2 * 0.2) ** 2 + 0.3**2  # the variance of a sum over rows, context by context
    assert float(found.sum().standard_error) ** 2 == pytest.approx(truth)


# ------------------------------------------------------------------------------------------------------- finite Z
@pytest.mark.parametrize("method", [Quadrature(), QUICK])
@pytest.mark.parametrize(
    "energy",
    [
        lambda x: 0.0 * x.sum(-1),
        lambda x: torch.tanh(x).sum(-1),
        lambda x: x.sum(-1),
        lambda x: torch.log1p(x.square().sum(-1)),  # r^-2 in two dimensions: infinite by a logarithm
        lambda x: x[:, 0].square() - 0.1 * x[:, 1],  # falls in a narrow cone only
    ],
)
def test_an_energy_that_does_not_grow_is_refused(method, energy):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1).mask(False), obs=x)
            pyro.factor("energy", -energy(x))

    with pytest.raises(ValueError, match="does not fall fast enough"):
        log_normalizer(Unnormalized(model, 2), method=method)


def test_a_narrow_cone_in_many_dimensions_is_found():
    ebm = EBM(30, energy=lambda x: x.square().sum(-1) - 1.5 * x[:, 0].square(), base=None)
    base = dist.Normal(torch.zeros(30), 1.0).to_event(1)
    with pytest.raises(ValueError, match="does not fall fast enough"):
        log_normalizer(ebm, method=AnnealedImportanceSampling(8, 40, base=base))


@pytest.mark.parametrize(
    "program",
    [
        EBM(2, energy=lambda x: torch.tanh(x).sum(-1)),  # bounded, under a normal base
        EBM(2, energy=lambda x: 2 * torch.log1p(x.square()).sum(-1), base=None),
        EBM(2, energy=lambda x: x.sum(-1), base=None, support="positive"),
        EBM(2, energy=lambda x: -x.sum(-1), base=None, support=(0, 1)),
        EBM(2, energy=lambda x: (x[:, 1] - x[:, 0] ** 2).square() + x[:, 0].square(), base=None),  # a curved valley
    ],
)
def test_energies_of_finite_z_pass(program):
    assert math.isfinite(value(program, Quadrature(tolerance=1e-3)))


# -------------------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": 1}, "temperatures must be at least 2"),
        ({"temperatures": 0}, "temperatures must be an int"),
        ({"chains": 0}, "chains"),
        ({"schedule": "cosine"}, "schedule must be one of"),
        ({"schedule": [0.0, 0.6, 0.5, 1.0], "temperatures": 3}, "do not increase"),
        ({"schedule": [0.1, 0.5, 1.0], "temperatures": 2}, "from 0 to 1"),
        ({"schedule": [0.0, 0.5, 1.0]}, "give temperatures=2"),
        ({"schedule": 3}, "schedule must be a name"),
        ({"start": torch.zeros(100, 2)}, "belongs to reverse=True"),
        ({"start": torch.zeros(3, 2), "reverse": True}, "start has 3 rows"),
        ({"reverse": True, "exact": True}, "exact=True says what start= is"),
        ({"seed": 1.5}, "seed"),
        ({"memory": 0}, "memory"),
    ],
)
def test_arguments_of_annealing(options, message):
    with pytest.raises(ValueError, match=message):
        AnnealedImportanceSampling(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": HMC}, "make an instance"),
        ({"sampler": "hmc"}, "sampler must be a sampler"),
        ({"sampler": Langevin()}, "does not leave"),
        ({"base": 3.0}, "base must be a distribution"),
        ({"start": [1.0], "reverse": True}, "start must be a tensor"),
    ],
)
def test_types_of_annealing(options, message):
    with pytest.raises(TypeError, match=message):
        AnnealedImportanceSampling(**options)


def test_arguments_of_grids_and_sums():
    for options in ({"max_points": 0}, {"tolerance": 0.0}, {"tolerance": -1}, {"memory": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Quadrature(**options)
    with pytest.raises(ValueError, match="max_states"):
        Enumeration(max_states=0)
    with pytest.raises(ValueError, match="less than two grids"):
        log_normalizer(quadratic(2), method=Quadrature(max_points=10))


def test_data_that_do_not_suit_the_method():
    binary = EBM(30, energy=lambda x: x.sum(-1), base="bernoulli")
    with pytest.raises(ValueError, match="Enumeration"):
        log_normalizer(binary, method=Quadrature())
    with pytest.raises(ValueError, match=r"2\^30"):
        log_normalizer(binary, method=Enumeration())
    with pytest.raises(ValueError, match="support is"):
        log_normalizer(quadratic(2), method=Enumeration())
    with pytest.raises(ValueError, match="up to 3 dimensions, the data have 4"):
        log_normalizer(quadratic(4), method=Quadrature())
    with pytest.raises(TypeError, match="Gibbs draws discrete data"):
        log_normalizer(quadratic(2, "normal"), method=AnnealedImportanceSampling(8, 40, sampler=Gibbs()))


def test_bases_that_do_not_fit():
    flat = quadratic(2)
    with pytest.raises(ValueError, match="the program has none: give the method one"):
        log_normalizer(flat, method=QUICK)
    for base in (dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)):
        with pytest.raises(ValueError, match="base must have event shape"):
            log_normalizer(flat, method=AnnealedImportanceSampling(8, 40, base=base))
    positive = EBM(2, energy=lambda x: x.sum(-1), base=None, support="positive")
    wide = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(ValueError, match="a draw of the base lies outside the support"):
        log_normalizer(positive, method=AnnealedImportanceSampling(8, 40, base=wide, seed=0))
    misshapen = AnnealedImportanceSampling(8, 40, reverse=True, start=torch.zeros(40, 3))
    with pytest.raises(ValueError, match="start must be a tensor of shape"):
        log_normalizer(quadratic(2, "normal"), method=misshapen)


@pytest.mark.parametrize("method", METHODS)
def test_programs_without_a_density_are_refused(method):
    with pytest.raises(TypeError, match="ImportanceSampling"):
        log_normalizer(VAE(3, latent_dim=1), method=method)
    with pytest.raises(TypeError, match="never written down"):
        log_normalizer(Implicit(lambda x: None), method=method)
    with pytest.raises(TypeError, match="integral over latents"):
        log_evidence(VAE(3, latent_dim=1), torch.zeros(2, 3), method=method)
    with pytest.raises(TypeError, match="takes a program"):
        log_normalizer(lambda x: x, method=method)


def test_methods_that_are_none():
    for method in (None, Quadrature, "ais"):
        with pytest.raises(TypeError, match="method must be a method for log Z"):
            log_normalizer(quadratic(), method=method)


# ------------------------------------------------------------------------------------------- what is left as it was
def test_protocols_and_repr():
    for method in METHODS:
        assert isinstance(method, NormalizerMethod)
        assert isinstance(method, EvidenceMethod)
    assert repr(Quadrature()) == "Quadrature()"
    assert repr(Enumeration(memory=5)) == "Enumeration(memory=5)"
    shown = repr(AnnealedImportanceSampling(9, 2, reverse=True, start=torch.zeros(2, 3), sampler=HMC()))
    assert shown.startswith("AnnealedImportanceSampling(temperatures=9, chains=2, sampler=HMC(")
    assert shown.endswith("reverse=True, start=<tensor (2, 3)>)")


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.seen = nn.Dropout(0.5), []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.seen.append(self.training)
        return (self.weight * self.drop(x).square()).sum(-1)


def test_seeds_modes_and_gradients():
    net = Dropped()
    ebm = EBM(2, energy=net)
    ebm.train()
    before = torch.get_rng_state()
    one, two = log_normalizer(ebm, method=QUICK), log_normalizer(ebm, method=QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert float(one.value) == float(two.value)
    assert not any(net.seen)
    assert net.training
    assert net.drop.training
    assert net.weight.grad is None
    assert not one.value.requires_grad
    assert one.value.dtype == torch.float64
    assert value(ebm, AnnealedImportanceSampling(8, 40, seed=1)) != float(one.value)


def test_chains_in_parts_and_few_chains():
    ebm = quadratic(2, "normal")
    truth = math.log(0.5)  # the normal base times exp(-x^2 / 2) in two dimensions
    parts = AnnealedImportanceSampling(20, 300, memory=2**12, seed=0)
    found = log_normalizer(ebm, method=parts)
    assert abs(float(found.value) - truth) < 4 * float(found.standard_error)
    assert parts.log_weights(ebm).shape == (300,)
    assert log_normalizer(ebm, method=AnnealedImportanceSampling(20, 5, seed=0)).kind == "lower bound"


# ------------------------------------------------------------------------------------------------------------ ladders
@pytest.mark.parametrize("schedule", ["adaptive", "linear", "sigmoid"])
@pytest.mark.parametrize("adapt", [True, False])
def test_ladders_rise_from_0_to_1(schedule, adapt):
    torch.manual_seed(0)
    target = quadratic(2, "normal").target()
    ladder = tuned_ladder(HMC(), target, schedule, 50, adapt=adapt)
    assert len(ladder) == 50
    assert (ladder.betas[0], ladder.betas[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in zip(ladder.betas, ladder.betas[1:], strict=False))
    assert (ladder.step_sizes is not None) == adapt


def test_an_adaptive_ladder_is_dense_where_the_density_changes():
    """From N(0, 1) to a precision of 1 + t: I = t^2 / 2 (1 + beta t)^2, steps in proportion to 1 + beta t."""
    torch.manual_seed(0)
    t = 1000.0
    target = EBM(1, energy=lambda x: 0.5 * t * x.square().sum(-1)).double().target()
    betas = torch.tensor(tuned_ladder(HMC(), target, "adaptive", 200, adapt=True).betas)
    ideal = ((1 + t) ** torch.linspace(0, 1, 201) - 1) / t
    assert float(betas[100]) < 3 * float(ideal[100]) + 0.05
    assert float(fixed_ladder("linear", 200)[100]) > 10 * float(ideal[100])
