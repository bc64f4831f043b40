"""Samplers: each leaves its target invariant, seen by moments with a closed form or an enumeration; wrong rules do not.

`stationary` is the one judge: every mean over the draws must lie within 4 of its own Monte Carlo standard errors, sd
over the root of the effective sample size. The same judge has to refuse samplers that were broken on purpose.
"""

import itertools
import math
from dataclasses import FrozenInstanceError, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_gen import scopes
from pyro_gen.base import Bounded, Divergence, Implicit, Sampler, State, Unnormalized
from pyro_gen.handlers import Unobserve, energy
from pyro_gen.programs.ebm import EBM
from pyro_gen.samplers import HMC, MALA, Draws, Gibbs, Langevin
from pyro_gen.samplers import gibbs as gibbs_module
from pyro_gen.samplers import hmc as hmc_module
from pyro_gen.samplers import langevin as langevin_module
from pyro_gen.samplers.adaptation import Spread, nudge
from pyro_gen.samplers.gibbs import levels_of
from pyro_gen.statistics import chain_ess
from pyro_gen.targets import Target

F64 = torch.float64
TWO = torch.tensor(2.0, dtype=F64)


def target_of(log_density, *shape, support=None, dtype=F64):
    return Target(log_density, torch.Size(shape), torch.empty(0, dtype=dtype), support)


def stationary(statistics, truths, errors=4.0):
    """Assert that means of statistics, (chains, draws, ...) each, are the truths within so many standard errors."""
    for name, value in statistics.items():
        value = value.double()
        standard_error = value.flatten(0, 1).std(0) / chain_ess(value, "mean").sqrt()
        z = (value.flatten(0, 1).mean(0) - truths[name]).abs() / standard_error
        assert bool((z < errors).all()), f"{name} is off by {float(z.max()):.1f} standard errors"


# ------------------------------------------------------------------------------------------------ correlated Gaussian
MEAN = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5], dtype=F64)
_A = torch.randn(5, 5, generator=torch.Generator().manual_seed(5), dtype=F64)
COVARIANCE = torch.diag(torch.tensor([1.0, 0.3, 2.0, 1.0, 0.5], dtype=F64)) + 0.3 * _A @ _A.T
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian(x):
    d = x - MEAN
    return -0.5 * ((d @ PRECISION) * d).sum(1)


def check_gaussian(draws, temperature=1.0):
    d = draws.x - MEAN
    rows, columns = torch.tril_indices(5, 5)
    truths = {"mean": torch.zeros(5, dtype=F64), "products": temperature * COVARIANCE[rows, columns]}
    stationary({"mean": d, "products": d[..., rows] * d[..., columns]}, truths)


SAMPLERS = [MALA(200), HMC(200, leapfrog=5), HMC(200, leapfrog=5, jitter=0.0, acceptance_aim=0.651)]


def run_gaussian(sampler, draws=300, **options):
    return sampler.run(target_of(gaussian, 5), start=MEAN + 1, draws=draws, warmup=300, seed=0, **options)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_the_moments_of_a_correlated_gaussian(sampler):
    draws = run_gaussian(sampler)
    check_gaussian(draws)
    assert float(draws.r_hat.max()) < 1.05
    assert not bool(draws.diverging.any())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_acceptance_is_at_its_aim(sampler):
    """Averaged step sizes leave the mean acceptance within .05 of the aim; unadapted ones are far from it."""
    draws = run_gaussian(sampler)
    assert abs(float(draws.acceptance.mean()) - sampler.acceptance_aim) < 0.05
    assert abs(float(run_gaussian(replace(sampler, step_size=0.05)).acceptance.mean()) - sampler.acceptance_aim) > 0.1


def without_proposal_ratio(monkeypatch):
    monkeypatch.setattr(langevin_module, "rows", lambda terms: torch.zeros(len(terms), dtype=F64))
    return MALA(200)


def without_kinetic_energy(monkeypatch):
    monkeypatch.setattr(hmc_module, "rows", lambda terms: torch.zeros(len(terms), dtype=F64))
    return HMC(200, leapfrog=5)


def with_the_wrong_sign(monkeypatch):
    monkeypatch.setattr(hmc_module, "rows", lambda terms: -terms.flatten(1).sum(1))
    return HMC(200, leapfrog=5)


def accepting_all(monkeypatch):
    monkeypatch.setattr(langevin_module, "metropolis", lambda ratio: hmc_module.metropolis(0 * ratio))
    return MALA(200, step_size=0.8)


@pytest.mark.parametrize("broken", [without_proposal_ratio, without_kinetic_energy, with_the_wrong_sign, accepting_all])
def test_a_wrong_acceptance_rule_is_rejected_by_the_same_test(broken, monkeypatch):
    sampler = broken(monkeypatch)
    if sampler.step_size is None:  # adapted to the right rule's acceptance, the error would hide in a small step
        sampler = replace(sampler, step_size=0.9 if isinstance(sampler, MALA) else 0.6)
    with pytest.raises(AssertionError, match="standard errors"):
        check_gaussian(run_gaussian(sampler))
    monkeypatch.undo()
    check_gaussian(run_gaussian(sampler))  # the right rule at the same step size


@pytest.mark.parametrize("temperature", [1.0, 0.25, 4.0])
def test_langevin_has_the_variance_of_its_closed_form(temperature):
    """On N(0, σ²) the stationary variance is Tσ² / (1 − ε²/4σ²); another temperature is rejected."""
    sd = torch.tensor([1.0, 0.5], dtype=F64)
    sampler = Langevin(500, step_size=0.4, temperature=temperature)
    target = target_of(lambda x: -0.5 * (x / sd).square().sum(1), 2)
    draws = sampler.run(target, start=torch.zeros(2), draws=500, warmup=200, seed=1)
    variance = temperature * sd**2 / (1 - 0.4**2 / (4 * sd**2))
    square = {"square": draws.x.square()}
    stationary(square, {"square": variance})
    with pytest.raises(AssertionError):
        stationary(square, {"square": variance * 1.1})
    assert bool((draws.acceptance == 1).all())


def test_langevin_anneals_through_sequences_and_draws_at_their_last_values():
    """From far away a warm start crosses; the draws are those of the last temperature and step size."""
    sampler = Langevin(400, step_size=(1.0, 0.5, 0.3), temperature=(10.0, 3.0, 1.0))
    target = target_of(lambda x: -0.5 * x.square().sum(1), 1)
    assert [(s.temperature, e) for s, e in sampler.schedule(6)][::2] == [(10.0, 1.0), (3.0, 0.5), (1.0, 0.3)]
    draws = sampler.run(target, start=torch.full((1,), 3.0), draws=400, warmup=90, seed=2)
    assert draws.step_size == pytest.approx(0.3)
    stationary({"square": draws.x.square()}, {"square": 1 / (1 - 0.3**2 / 4)})


# ------------------------------------------------------------------------------------------------------- harder shapes
def funnel(x):
    v, rest = x[:, 0], x[:, 1:]
    return -(v**2) / 18 - 0.5 * rest.square().sum(1) * torch.exp(-v) - 0.5 * rest.shape[1] * v


def check_funnel(draws):
    v = draws.x[..., 0]
    stationary({"v": v, "square": v.square()}, {"v": 0.0, "square": 9.0})


def funnel_start(chains, size):
    return torch.randn(chains, size, generator=torch.Generator().manual_seed(0), dtype=F64)


def test_the_funnel_of_two_coordinates():
    """Scales differ by e⁹ over ±3 sd of v: trajectories of very different step sizes are mixed, by the jitter."""
    sampler = HMC(500, step_size=0.2, leapfrog=30, jitter=0.95)
    check_funnel(sampler.run(target_of(funnel, 2), start=funnel_start(500, 2), draws=200, warmup=100, seed=1))


def test_mala_fails_on_the_funnel_and_its_r_hat_says_so():
    """One step size cannot serve the neck, where it must be below e^(v/2), and the mouth, where it then diffuses."""
    draws = MALA(500).run(target_of(funnel, 2), start=funnel_start(500, 2), draws=1000, warmup=300, seed=1)
    assert float(draws.r_hat[0]) > 1.1
    with pytest.raises(AssertionError, match="standard errors"):
        check_funnel(draws)


@pytest.mark.slow
def test_neals_funnel_of_ten_coordinates():
    sampler = HMC(300, step_size=0.15, leapfrog=50, jitter=0.98)
    check_funnel(sampler.run(target_of(funnel, 10), start=funnel_start(300, 10), draws=300, warmup=300, seed=1))


@pytest.mark.parametrize("sampler", [MALA(300), HMC(300, leapfrog=8)], ids=repr)
def test_a_mixture_of_overlapping_modes(sampler):
    """.3 N(−1.5, 1) + .7 N(1.5, 1): mean .6, second moment 3.25, mass right of 0 from the error function."""

    def log_density(x):
        return torch.logaddexp(
            math.log(0.3) - 0.5 * (x[:, 0] + 1.5) ** 2,
            math.log(0.7) - 0.5 * (x[:, 0] - 1.5) ** 2,
        )

    draws = sampler.run(target_of(log_density, 1), start=torch.zeros(1), draws=400, warmup=300, seed=3)
    x, right = draws.x[..., 0], 0.5 * (1 + math.erf(1.5 / math.sqrt(2)))
    truths = {"x": 0.6, "square": 3.25, "right": 0.7 * right + 0.3 * (1 - right)}
    stationary({"x": x, "square": x.square(), "right": (x > 0).double()}, truths)


@pytest.mark.parametrize("sampler", [MALA(200), HMC(200, leapfrog=4), Langevin(200, step_size=0.1)], ids=repr)
@pytest.mark.parametrize(
    ("fn", "support"),
    [(dist.Gamma(TWO + 1, TWO), constraints.positive), (dist.Beta(TWO, TWO + 1), constraints.interval(0.0, 1.0))],
    ids=["gamma", "beta"],
)
def test_bounded_supports_are_sampled_through_their_unconstrained_space(sampler, fn, support):
    target = target_of(lambda x: fn.log_prob(x).sum(1), 2, support=constraints.independent(support, 1))
    start = fn.mean.expand(2)
    draws = sampler.run(target, start=start, draws=300, warmup=200, seed=4)
    assert bool(support.check(draws.x).all())
    truths = {"x": fn.mean, "square": fn.variance + fn.mean**2}
    errors = 8.0 if isinstance(sampler, Langevin) else 4.0  # ε²/4 of bias is half a percent, a few errors
    stationary({"x": draws.x, "square": draws.x.square()}, truths, errors)
    values = fn.log_prob(draws.x).sum(-1)
    torch.testing.assert_close(draws.log_density, values, rtol=0, atol=1e-9)  # log f of x, without the Jacobian


def test_a_simplex_has_one_coordinate_less():
    fn = dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0], dtype=F64))
    target = target_of(fn.log_prob, 3, support=constraints.simplex)
    draws = MALA(200).run(target, start=torch.full((3,), 1 / 3, dtype=F64), draws=200, warmup=200, seed=0)
    assert draws.state.position.shape == (200, 2)
    stationary({"x": draws.x}, {"x": fn.mean})
    torch.testing.assert_close(draws.log_density, fn.log_prob(draws.x), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ discrete
BONDS = [(4 * i + j, 4 * i + (j + 1) % 4) for i in range(4) for j in range(4)]
BONDS += [(4 * i + j, 4 * ((i + 1) % 4) + j) for i in range(4) for j in range(4)]
COUPLING, FIELD = 0.3, 0.1
BINARY = constraints.independent(constraints.boolean, 1)


def spins(x):
    return 2 * x - 1


def bonds(s):
    first, second = zip(*BONDS, strict=True)
    return (s[..., list(first)] * s[..., list(second)]).sum(-1)


def ising(x):
    s = spins(x)
    return COUPLING * bonds(s) + FIELD * s.sum(-1)


def enumerated(log_density, size, levels=2):
    states = torch.tensor(list(itertools.product(range(levels), repeat=size)), dtype=F64)
    return states, torch.softmax(log_density(states), 0)


def check_ising(draws):
    states, p = enumerated(ising, 16)

    def statistics(x):
        s = spins(x)
        return {
            "bonds": bonds(s),
            "magnetisation": s.mean(-1),
            "square": s.mean(-1).square(),
            "across": s[..., 0] * s[..., 10],
            "spins": s,
        }

    truths = {name: (p.reshape(-1, *[1] * (v.dim() - 1)) * v).sum(0) for name, v in statistics(states).items()}
    stationary(statistics(draws.x), truths)


def run_ising(sampler):
    return sampler.run(target_of(ising, 16, support=BINARY), start=torch.zeros(16), draws=120, warmup=40, seed=5)


@pytest.mark.parametrize(
    "sampler", [Gibbs(100), Gibbs(100, scan="fixed"), Gibbs(200, sweeps=8, informed=True)], ids=repr
)
def test_ising_against_its_enumeration(sampler):
    draws = run_ising(sampler)
    check_ising(draws)
    torch.testing.assert_close(draws.log_density, ising(draws.x), rtol=0, atol=1e-12)
    assert bool(((draws.x == 0) | (draws.x == 1)).all())
    if not sampler.informed:
        assert bool((draws.acceptance == 1).all())


class Lukewarm(Gibbs):
    """A wrong conditional: that of f to the power .9."""

    def _redraw(self, target, shape, flat, value, *entry):
        cool = target_of(lambda x: 0.9 * target.log_density(x), 16, support=BINARY)
        flat, value = super()._redraw(cool, shape, flat, 0.9 * value, *entry)
        return flat, value / 0.9


@pytest.mark.slow
def test_a_wrong_conditional_is_rejected_by_the_same_test(monkeypatch):
    with pytest.raises(AssertionError, match="standard errors"):
        check_ising(run_ising(Lukewarm(100)))
    with monkeypatch.context() as patch:
        patch.setattr(gibbs_module, "metropolis", lambda ratio: hmc_module.metropolis(0 * ratio))
        with pytest.raises(AssertionError, match="standard errors"):
            check_ising(run_ising(Gibbs(200, sweeps=16, informed=True)))


@pytest.mark.parametrize("sampler", [Gibbs(100), Gibbs(100, sweeps=3, informed=True)], ids=repr)
def test_integer_levels_against_their_enumeration(sampler):
    """Three entries of levels 2..5 with a coupling and a curvature, which the informed proposals get wrong."""

    def log_density(x):
        return 0.5 * (x[..., 0] * x[..., 1] - x[..., 1] * x[..., 2]) / 3 - 0.2 * (x - 3).square().sum(-1)

    support = constraints.independent(constraints.integer_interval(2, 5), 1)
    states, p = enumerated(lambda x: log_density(x + 2), 3, 4)
    target = target_of(log_density, 3, support=support)
    draws = sampler.run(target, start=torch.full((3,), 2.0), draws=300, warmup=50, seed=6)
    states = states + 2
    truths = {"x": p @ states, "square": p @ states**2, "pair": p @ (states[:, 0] * states[:, 2])}
    x = draws.x
    stationary({"x": x, "square": x**2, "pair": x[..., 0] * x[..., 2]}, truths)


@pytest.mark.parametrize("sampler", [Gibbs(200), Gibbs(200, sweeps=5, informed=True)], ids=repr)
def test_a_boltzmann_machine_against_its_enumeration(sampler):
    torch.manual_seed(0)
    ebm = EBM(9, energy="rbm", base="bernoulli", hidden=(4,)).double()
    with torch.no_grad():
        ebm.model.net.weight.normal_()
        ebm.model.net.visible_bias.normal_()
    states, p = enumerated(ebm.log_density, 9)
    draws = sampler.run(ebm, draws=150, warmup=50, seed=7)
    pairs = torch.tensor(list(itertools.combinations(range(9), 2))).T
    truths = {"x": p @ states, "pairs": p @ (states[:, pairs[0]] * states[:, pairs[1]])}
    truths = {name: value.detach() for name, value in truths.items()}
    stationary({"x": draws.x, "pairs": draws.x[..., pairs[0]] * draws.x[..., pairs[1]]}, truths)
    torch.testing.assert_close(draws.log_density.flatten(), ebm.target().log_density(draws.flat).detach())


# ----------------------------------------------------------------------------------------------------- runs go on
def test_a_seed_repeats_a_run_and_leaves_the_global_generators():
    before = torch.get_rng_state()
    first, again = (run_gaussian(MALA(50), draws=20) for _ in range(2))
    assert torch.equal(first.x, again.x)
    assert torch.equal(torch.get_rng_state(), before)
    other = MALA(50).run(target_of(gaussian, 5), start=MEAN, draws=20, warmup=300, seed=1)
    assert not torch.equal(first.x, other.x)


def test_a_run_goes_on_from_its_state():
    """Fifty draws and fifty more from the state are the hundred draws of one run, number by number."""
    sampler, target = MALA(100), target_of(gaussian, 5)
    torch.manual_seed(0)
    whole = sampler.run(target, start=MEAN, draws=100, warmup=100)
    torch.manual_seed(0)
    first = sampler.run(target, start=MEAN, draws=50, warmup=100)
    second = sampler.run(target, start=first, draws=50)
    torch.testing.assert_close(torch.cat([first.x, second.x], 1), whole.x, rtol=0, atol=1e-10)
    assert second.step_size == first.step_size
    assert second.warmup == 0


def test_thinned_draws_are_those_between():
    sampler, target = HMC(20, step_size=0.3), target_of(gaussian, 5)
    torch.manual_seed(0)
    dense = sampler.run(target, start=MEAN, draws=12, warmup=0)
    torch.manual_seed(0)
    thin = sampler.run(target, start=MEAN, draws=4, warmup=0, thin=3)
    assert torch.equal(thin.x, dense.x[:, 2::3])
    torch.testing.assert_close(thin.acceptance[:, 0], dense.acceptance[:, :3].mean(1))


@pytest.mark.parametrize("sampler", [MALA(7, 0.3), HMC(7, 0.3, leapfrog=3), Langevin(7, 0.3)], ids=repr)
def test_advance_ends_where_steps_end(sampler):
    target, x = target_of(gaussian, 5), MEAN.expand(7, 5)
    torch.manual_seed(3)
    state = sampler.init(target, x)
    for _ in range(4):
        state, _info = sampler.step(target, state)
    torch.manual_seed(3)
    torch.testing.assert_close(sampler.advance(target, x, 4), state.x, rtol=0, atol=1e-12)
    assert not sampler.advance(target, x, 1).requires_grad


def test_a_sampler_is_configuration_only_and_meets_the_protocol():
    for sampler in (MALA(), HMC(), Gibbs(), Langevin()):
        assert isinstance(sampler, Sampler)
        with pytest.raises(FrozenInstanceError):
            sampler.chains = 3
        assert replace(sampler, chains=3).chains == 3


def test_steps_are_pure():
    target = target_of(gaussian, 5)
    for sampler in (MALA(4), HMC(4, leapfrog=2), Langevin(4)):
        state = sampler.init(target, MEAN.expand(4, 5))
        kept = State(*(part.clone() for part in state))
        sampler.step(target, state)
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


@pytest.mark.parametrize("sampler", [MALA(6), HMC(6, leapfrog=2), Langevin(6)], ids=repr)
def test_steps_trace(sampler):
    """Traced by make_fx, a step draws the same numbers and gives the same state: nothing in it asks for a value."""
    ebm = EBM(2, energy=lambda x: (x**4).sum(-1) / 4)

    def step(x):
        with scopes.without_validation():  # which asks for values
            target = ebm.target()
            state, info = sampler.step(target, sampler.init(target, x))
        return state.x, state.log_density, info.acceptance

    x = torch.randn(6, 2)
    traced = make_fx(step)(x)
    torch.manual_seed(0)
    expected = step(x + 0.1)
    torch.manual_seed(0)
    for found, value in zip(traced(x + 0.1), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("sampler", [Gibbs(6), Gibbs(6, informed=True)], ids=repr)
@pytest.mark.parametrize("blocks", [True, False])
def test_discrete_steps_trace(sampler, blocks):
    ebm = EBM(5, "rbm" if blocks else lambda x: x.sum(-1).square(), "bernoulli", hidden=(3,))

    def step(x):
        with scopes.without_validation():
            target = ebm.target()
            state, _info = sampler.step(target, sampler.init(target, x))
        return state.x, state.log_density

    x = torch.bernoulli(torch.full((6, 5), 0.5))
    traced = make_fx(step)(x)
    torch.manual_seed(0)
    expected = step(1 - x)
    torch.manual_seed(0)
    for found, value in zip(traced(1 - x), expected, strict=True):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_dtype_of_the_program(dtype):
    ebm = EBM(2, hidden=(8,)).to(dtype)
    for sampler in (MALA(10), HMC(10), Langevin(10)):
        draws = sampler.run(ebm, draws=5, warmup=5, seed=0)
        state = draws.state
        assert {t.dtype for t in (draws.x, draws.log_density, state.gradient, state.step_size, state.scale)} == {dtype}
    assert all(p.grad is None for p in ebm.parameters())
    assert ebm.training


def test_conditional_chains_each_have_their_context():
    """p(x | c) = N(c, 1): chains at their own contexts, and all at one."""

    class Shift(torch.nn.Module):
        def forward(self, x, context):
            return 0.5 * (x - context).square().sum(-1)

    ebm = EBM(1, Shift(), base=None, context_shape=1).double()
    contexts = torch.linspace(-3, 3, 60, dtype=F64).unsqueeze(1)
    own = MALA(60).run(ebm, draws=400, warmup=200, context=contexts, start=torch.zeros(1), seed=0)
    stationary({"x": own.x - contexts.unsqueeze(1)}, {"x": 0.0})
    one = MALA(60).run(ebm, draws=400, warmup=200, context=contexts[0], start=torch.zeros(1), seed=0)
    stationary({"x": one.x}, {"x": -3.0})


def test_bernoulli_bases_with_own_contexts_under_gibbs():
    ebm = EBM(2, lambda x, c: -(x * c).sum(-1), "bernoulli", context_shape=2)
    contexts = torch.tensor([[-2.0, 1.0], [0.0, 2.0]]).repeat(100, 1)
    draws = Gibbs(200).run(ebm, draws=100, warmup=10, context=contexts, seed=0)
    stationary({"x": draws.x - torch.sigmoid(contexts).unsqueeze(1)}, {"x": 0.0})


def test_dropout_is_off_and_comes_back():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(self.training)
            return 0.5 * x.square().sum(-1)

    ebm = EBM(1, Net())
    MALA(5).run(ebm, draws=2, warmup=2, seed=0)
    assert not any(seen)
    assert ebm.model.net.training


# ---------------------------------------------------------------------------------------------------------- adaptation
def test_the_scale_of_each_coordinate_is_found():
    sd = torch.tensor([0.01, 1.0, 100.0], dtype=F64)
    target = target_of(lambda x: -0.5 * (x / sd).square().sum(1), 3)
    draws = HMC(100).run(target, start=torch.zeros(3), draws=200, warmup=500, seed=0)
    assert bool(((draws.state.scale / sd).log().abs() < 0.3).all())
    stationary({"square": draws.x.square()}, {"square": sd.square()})


def test_the_spread_of_a_stream_is_that_of_the_whole():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=F64) * torch.tensor([1.0, 5.0, 0.1, 0.0])
    spread = Spread(x[0])
    for part in x.split(7):
        spread.add(part)
    torch.testing.assert_close(spread.squares / 29, x.var(0))
    scale = spread.scale(torch.full((4,), 7.0, dtype=F64))
    assert float(scale[3]) == 7.0  # a coordinate that never moved keeps its scale
    assert bool((scale[:3] > 0).all())


def test_nudge_moves_towards_the_aim():
    size = torch.tensor(0.5)
    assert float(nudge(size, torch.ones(4), 0.6, 0.5)) == pytest.approx(0.5 * math.exp(0.2))
    assert float(nudge(size, torch.zeros(4), 0.6, 0.5)) == pytest.approx(0.5 * math.exp(-0.3))


def test_a_flat_density_is_adapted_to():
    flat = target_of(lambda x: 0.0 * x.sum(1), 1, support=constraints.independent(constraints.interval(-1.0, 1.0), 1))
    stationary({"x": MALA(50).run(flat, start=torch.zeros(1), draws=300, warmup=200, seed=0).x.square()}, {"x": 1 / 3})


@pytest.mark.slow
def test_one_chain_is_adapted_by_itself():
    single = MALA(1).run(target_of(gaussian, 5), start=MEAN, draws=4000, warmup=500, seed=0)
    check_gaussian(single)


# ----------------------------------------------------------------------------------------------------------- not finite
def test_proposals_that_are_not_finite_are_rejected_and_flagged():
    """log f is nan beyond 2: a half line cut off by hand, whose chains stay on this side."""

    def log_density(x):
        return torch.where(x[:, 0] < 2, -0.5 * x[:, 0].square(), math.nan)

    for sampler in (MALA(100, step_size=1.0), HMC(100, step_size=0.5)):
        draws = sampler.run(target_of(log_density, 1), start=torch.zeros(1), draws=100, warmup=0, seed=0)
        assert bool((draws.x < 2).all())
        assert bool(draws.diverging.any())
        assert bool((draws.acceptance[draws.diverging] == 0).all())


def test_langevin_chains_that_are_lost_raise_and_say_which():
    target = target_of(lambda x: -x.pow(4).sum(1), 1)
    start = torch.tensor([[0.0], [50.0]], dtype=F64)
    with pytest.raises(Divergence, match=r"not finite in 1 of 2 chains.*smaller step size") as caught:
        Langevin(2, step_size=0.5).run(target, start=start, draws=50, warmup=0, seed=0)
    assert caught.value.rows == [1]
    assert isinstance(caught.value.result, Draws)
    assert bool(torch.isfinite(caught.value.result.x[0]).all())


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MALA(0), "chains must be an int of at least 1, got 0"),
        (lambda: HMC(chains=2.5), "chains must be an int"),
        (lambda: MALA(step_size=0.0), "step_size must be a positive number, got 0.0"),
        (lambda: Langevin(step_size=-1.0), "step_size must be a positive number"),
        (lambda: Langevin(step_size=(0.1, 0.0)), "step_size must be a positive number"),
        (lambda: Langevin(step_size=()), "step_size is an empty sequence"),
        (lambda: Langevin(temperature=0.0), "temperature must be a positive number, got 0.0"),
        (lambda: Langevin(temperature=math.inf), "temperature must be a positive number"),
        (lambda: MALA(acceptance_aim=1.0), r"acceptance_aim must be a number in \(0, 1\), got 1.0"),
        (lambda: HMC(acceptance_aim=0), "acceptance_aim"),
        (lambda: HMC(leapfrog=0), "leapfrog must be an int of at least 1"),
        (lambda: HMC(jitter=1.0), r"jitter must be a number in \[0, 1\)"),
        (lambda: Gibbs(sweeps=0), "sweeps must be an int of at least 1"),
        (lambda: Gibbs(scan="up"), "scan must be 'random' or 'fixed', got 'up'"),
    ],
)
def test_bad_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be an int of at least 1"),
        ({"thin": 0}, "thin must be an int of at least 1"),
        ({"warmup": -1}, "warmup must be a number of steps"),
        ({"warmup": 0}, "warmup=0 leaves no steps to find the step size"),
        ({"start": torch.zeros(3)}, r"start must be a tensor of shape \(chains, 2\)"),
        ({"start": torch.zeros(9, 2)}, "start has 9 chains and the sampler 10: make the sampler with chains=9"),
        ({"start": torch.full((2,), math.nan)}, "start lies outside the support"),
        ({"start": torch.full((2,), 1e30)}, "log f of start is not finite in chain 0"),
        ({"context": torch.zeros(2)}, "context was given to a program without one"),
    ],
)
def test_bad_runs(options, message):
    with pytest.raises(ValueError, match=message):
        MALA(10).run(EBM(2, lambda x: (x**4).sum(-1)), **{"draws": 3, "warmup": 3, **options})


def test_starts_and_bases():
    positive = EBM(1, lambda x: x.sum(-1), base=None, support="positive")
    with pytest.raises(ValueError, match="give the chains a start"):
        MALA(10).run(positive, draws=3, warmup=3)
    with pytest.raises(ValueError, match="outside the support"):
        MALA(10).run(positive, draws=3, warmup=3, start=-torch.ones(1))
    draws = MALA(10).run(positive, draws=3, warmup=50, start=torch.ones(1), seed=0)
    with pytest.raises(TypeError, match=r"start is a run of MALA, and HMC cannot go on.*draws.x\[:, -1\]"):
        HMC(10).run(positive, draws=3, warmup=3, start=draws)
    with pytest.raises(ValueError, match="start has 10 chains and the sampler 5"):
        MALA(5).run(positive, draws=3, warmup=3, start=draws)
    HMC(10).run(positive, draws=3, warmup=50, start=draws.x[:, -1])


def test_wrong_kinds_say_what_to_do():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(1), 1.0).to_event(1), obs=x)

    with pytest.raises(TypeError, match=r"known only as a bound; program.sample\(n\) draws from it"):
        MALA().run(Bounded(model, lambda x: None, 1))
    with pytest.raises(TypeError, match="never written down"):
        MALA().run(Implicit(model))
    with pytest.raises(TypeError, match=r"pg.Unnormalized\(model, event_shape\)"):
        MALA().run(model)
    binary, real = EBM(3, "rbm", "bernoulli", hidden=(2,)), EBM(3)
    for sampler in (MALA(), HMC(), Langevin()):
        with pytest.raises(TypeError, match=r"the support is discrete .*use Gibbs\(\)"):
            sampler.run(binary)
    with pytest.raises(TypeError, match=r"Gibbs draws discrete data.*use HMC\(\), MALA\(\)"):
        Gibbs().run(real)
    with pytest.raises(TypeError, match="the same finite set of levels"):
        levels_of(constraints.nonnegative_integer)
    with pytest.raises(ValueError, match="which has its own"):
        MALA().run(real.target(), context=torch.zeros(2))


def test_a_density_that_jumps_where_the_chains_start_is_refused():
    spike = target_of(lambda x: torch.where(x[:, 0] == 0, x[:, 0], -torch.inf), 1)
    with pytest.raises(ValueError, match="no proposal is accepted"):
        MALA(5).run(spike, start=torch.zeros(1), draws=3, warmup=10, seed=0)


# ------------------------------------------------------------------------------------------------- Pyro's own programs
def quadratic(x):
    return x[:, 0].square() / (2 * 0.5) + (x[:, 1] - 1).square() / (2 * 2)


def plain_model(x):
    with pyro.plate("data", len(x)):
        x = pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1).mask(False), obs=x)
        energy("energy", quadratic, x)


def test_a_plain_pyro_program_is_sampled():
    draws = MALA(200).run(Unnormalized(plain_model, 2), draws=200, warmup=300, seed=0)
    truth = torch.tensor([0.0, 1.0])
    stationary({"x": draws.x, "square": (draws.x - truth).square()}, {"x": truth, "square": torch.tensor([0.5, 2.0])})


@pytest.mark.slow
def test_nuts_runs_through_the_program():
    """Pyro's NUTS takes the same program with x as its latent, and starts from its masked base."""

    def latent():
        Unobserve(["x"])(plain_model)(torch.zeros(1, 2))

    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(latent, jit_compile=False), num_samples=3000, warmup_steps=200, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples(group_by_chain=True)["x"].reshape(1, 3000, 2)
    truth = torch.tensor([0.0, 1.0])
    stationary({"x": x, "square": (x - truth).square()}, {"x": truth, "square": torch.tensor([0.5, 2.0])})
