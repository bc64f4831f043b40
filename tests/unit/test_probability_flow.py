"""The probability flow: arguments, gradients, memory of draws, Pyro's side of its distribution."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import nn
from torch.distributions import biject_to

from pyro_gen import EBM, VAE
from pyro_gen.distributions.ode import Course, ODEDistribution
from pyro_gen.distributions.transport import Accuracy, Transport
from pyro_gen.programs.diffusion import Diffusion
from pyro_gen.samplers.probability_flow import ProbabilityFlow
from pyro_gen.transforms.odes import DOPRI5, HEUN, RK4, solve_fixed, stage_times

DOUBLE = torch.float64


class Net(nn.Module):
    """A small smooth network with weights, a context and dropout."""

    def __init__(self, size=2, context=0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(0.7 * torch.randn(size + 1 + context, 8, generator=g, dtype=DOUBLE))
        self.outer = nn.Parameter(0.4 * torch.randn(8, size, generator=g, dtype=DOUBLE))
        self.dropout = nn.Dropout(0.5)

    def forward(self, y, level, context=None):
        parts = [y.flatten(1), level[:, None]] + ([] if context is None else [context])
        return (self.dropout(torch.tanh(torch.cat(parts, 1) @ self.inner)) @ self.outer).reshape(y.shape)


def program(size=2, context=None, prediction="edm", event=None):
    net = Net(size, context or 0)
    found = Diffusion(
        event or size, network=net, timesteps=None, prediction=prediction, context_shape=context, standardise=False
    ).double()
    with torch.no_grad():
        found.model.location.fill_(0.5)
        found.model.scale.fill_(2.0)
    return found


def points(n, size=2, seed=3):
    return torch.randn(n, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk45"}, "solver must be one of"),
        ({"trace": "auto-exact"}, "trace must be one of"),
        ({"rtol": 0.0}, "rtol must be"),
        ({"atol": -1.0}, "atol must be"),
        ({"solver": "rk4"}, "say how many, steps=50"),
        ({"steps": 0, "solver": "heun"}, "steps must be an int"),
        ({"probes": 0}, "probes must be an int"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ProbabilityFlow(**options)


def test_other_kinds_are_refused_by_name():
    for other in (EBM(2), VAE(2)):
        with pytest.raises(TypeError, match="takes a program of kind Noised"):
            ProbabilityFlow().log_evidence(other, torch.zeros(1, 2))


def test_many_features_are_hutchinson_s_unless_forced():
    wide = program(size=51)
    x = points(2, 51)
    with pytest.raises(ValueError, match="force=True"):
        ProbabilityFlow(trace="exact").log_evidence(wide, x)
    with pytest.raises(ValueError, match="probes=1 says nothing of its error"):
        ProbabilityFlow(probes=1).log_evidence(wide, x)
    fast = {"rtol": 1e-2, "atol": 1e-2}
    assert ProbabilityFlow(**fast).log_evidence(wide, x).kind == "estimate"
    assert ProbabilityFlow(trace="exact", force=True, **fast).log_evidence(wide, x).kind == "exact"
    with pytest.raises(ValueError, match="noncentered"):
        ProbabilityFlow().distribution(wide).log_prob(x)


def test_a_single_probe_is_enough_for_a_map():
    flow = ProbabilityFlow(trace="hutchinson", probes=1, seed=0)
    z, ladj = flow.encode(program(), points(3))
    assert z.shape == (3, 2)
    assert ladj.shape == (3,)


def test_tolerances_out_of_reach_are_an_error():
    broken = program()
    with torch.no_grad():
        broken.model.net.outer.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="cannot keep"):
        ProbabilityFlow().encode(broken, points(2))
    with pytest.raises(ArithmeticError, match="left the finite numbers"):
        ProbabilityFlow("rk4", steps=5).encode(broken, points(2))


def test_a_miss_inside_a_distribution_is_an_error_and_no_minus_infinity():
    p = program()
    d = ProbabilityFlow().distribution(p)
    d.log_prob(points(2))
    with torch.no_grad():
        p.model.net.outer.mul_(math.nan)
    with pytest.raises(ArithmeticError):
        d.log_prob(points(2))


# --------------------------------------------------------------------------------------------------------------- solver
@pytest.mark.parametrize(("tableau", "order"), [(HEUN, 2), (RK4, 4), (DOPRI5, 5)])
def test_the_order_of_each_method(tableau, order):
    """y' = cos(t) y, y(0) = 1, so y(2) = exp(sin 2)."""

    def error(steps):
        grid = torch.linspace(0, 2, steps + 1, dtype=DOUBLE)
        times = stage_times(grid, tableau)
        end = solve_fixed(lambda i, y: times[i].cos() * y, torch.ones(1, 1, dtype=DOUBLE), grid, tableau)[0]
        return abs(float(end) - math.exp(math.sin(2.0)))

    assert abs(math.log2(error(16) / error(32)) - order) < 0.5


def test_the_jacobian_is_that_of_the_steps():
    p, z = program(), points(3)
    course = Course(Transport(p), Accuracy("dopri5", 1e-3, 1e-3, None), None, to_noise=False)
    found = course.go(z, jacobian=True)[2]

    def ends(v):
        return course.go(v, trace=False, graph=True)[0].sum(0)

    expected = torch.autograd.functional.jacobian(ends, z).transpose(0, 1)
    assert torch.allclose(found, expected, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ gradients
def test_gradients_of_encode_and_log_prob_are_those_of_finite_differences():
    p = program()
    flow, d = ProbabilityFlow(rtol=1e-9, atol=1e-9), ProbabilityFlow().distribution(p)
    x = points(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: flow.encode(p, v), x, eps=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(d.log_prob, x, eps=1e-5, atol=1e-7)  # steps are fixed: no tolerance enters


def test_gradients_reach_the_weights():
    p = program()
    d, x, weight = ProbabilityFlow().distribution(p), points(2), p.model.net.outer
    (found,) = torch.autograd.grad(d.log_prob(x).sum(), weight)
    step = 1e-6
    with torch.no_grad():
        values = []
        grid = d.transport.plan(d.density, None, watch=True)
        for sign in (1, -1):
            weight[0, 0] += sign * step
            d.transport.plan = lambda *_, **__: grid  # the same steps
            values.append(d.log_prob(x).sum())
            weight[0, 0] -= sign * step
    assert torch.allclose(found[0, 0], (values[0] - values[1]) / (2 * step), rtol=1e-5)
    (drawn,) = torch.autograd.grad(d.rsample((3,)).sum(), weight)
    assert drawn.abs().sum() > 0


def test_hutchinson_can_be_differentiated():
    p, x = program(), points(2).requires_grad_()
    flow = ProbabilityFlow(trace="hutchinson", probes=2, seed=0, rtol=1e-8, atol=1e-8)
    assert torch.autograd.gradcheck(lambda v: flow.encode(p, v)[1], x, eps=1e-5, atol=1e-4)


# -------------------------------------------------------------------------------------------- the distribution in Pyro
def potentials(p, y):
    def centred():
        x = pyro.sample("x", ProbabilityFlow().distribution(p))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.3), obs=y)

    d = ProbabilityFlow().distribution(p)

    def noncentered():
        z = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(d.push(z).sum(-1), 0.3), obs=y)

    return [initialize_model(model)[1] for model in (centred, noncentered)]


def test_the_potential_is_the_noncentered_one_and_needs_no_second_derivative(monkeypatch):
    p = program()
    centred, other = potentials(p, torch.tensor(1.0, dtype=DOUBLE))
    graphs = []
    go = Course.go
    monkeypatch.setattr(Course, "go", lambda self, w, **k: (graphs.append(k.get("graph", False)), go(self, w, **k))[1])
    for z in points(4):
        z = z.requires_grad_()
        value = centred({"x": z})
        (gradient,) = torch.autograd.grad(value, z)
        expected = other({"x": z})
        assert torch.allclose(value, expected, rtol=1e-12)
        graphs.clear()
        assert torch.allclose(gradient, torch.autograd.grad(expected, z)[0], rtol=1e-9, atol=1e-11)
    graphs.clear()
    torch.autograd.grad(centred({"x": z}), z)
    assert graphs == [False]  # one solve, no graph


def test_a_log_determinant_that_counts_is_differentiated():
    """Only where L's gradient cancels may its backward be left out."""
    p = program()
    d = ProbabilityFlow().distribution(p)
    transform = biject_to(d.support)
    z = points(3).requires_grad_()

    def density(v):  # of a draw, as a function of its noise
        return d.log_prob(transform(v))

    assert torch.autograd.gradcheck(density, z, eps=1e-5, atol=1e-7)
    (wrong,) = torch.autograd.grad((-z.square() / 2).sum(), z)
    (right,) = torch.autograd.grad(density(z).sum(), z)
    assert not torch.allclose(wrong, right, atol=1e-3)


def test_what_is_kept_with_a_draw_is_not_used_when_it_is_stale():
    p = program()
    d = ProbabilityFlow().distribution(p)
    transform = biject_to(d.support)
    z = points(2)
    x = transform(z)
    again = ProbabilityFlow().distribution(p)
    assert again.known(x) is not None  # of another distribution of the same weights
    before = d.log_prob(x)
    with torch.no_grad():
        p.model.net.outer.mul_(1.1)
    assert d.known(x) is None
    assert not torch.allclose(d.log_prob(x), before, atol=1e-4)
    x = transform(z)
    x += 0.1
    assert d.known(x) is None
    assert ProbabilityFlow().distribution(program()).known(transform(z)) is None  # other weights
    y = transform(z).requires_grad_()
    assert torch.autograd.grad(d.log_prob(y).sum(), y)[0].abs().sum() > 0


def test_shapes_expand_and_support():
    p = program(size=4, event=(2, 2))
    d = ProbabilityFlow().distribution(p)
    assert d.event_shape == (2, 2)
    assert d.batch_shape == ()
    x = d.expand((3,)).rsample((5,))
    assert x.shape == (5, 3, 2, 2)
    assert d.log_prob(x.detach()).shape == (5, 3)
    assert d.support.check(x).shape == (5, 3)
    z = torch.zeros(2, 2, dtype=DOUBLE)
    assert biject_to(d.support)(z).shape == (2, 2)
    with pyro.plate("rows", 3):
        assert pyro.sample("x", d).shape == (3, 2, 2)


def test_context_makes_a_batch():
    p = program(context=1)
    context = torch.linspace(-1, 1, 3, dtype=DOUBLE).reshape(3, 1).requires_grad_()
    d = ProbabilityFlow().distribution(p, context)
    assert isinstance(d, ODEDistribution)
    assert d.batch_shape == (3,)
    x = points(3)
    value = d.log_prob(x)
    assert value.shape == (3,)
    assert torch.autograd.grad(value.sum(), context)[0].abs().min() > 0
    single = ProbabilityFlow().distribution(p, context[1].detach())
    assert torch.allclose(single.log_prob(x[1]), value[1], atol=1e-3)  # by other steps
    drawn = ProbabilityFlow().sample(p, 3, context.detach(), seed=0)
    assert drawn.shape == (3, 2)


def test_draws_and_log_prob_are_of_one_density():
    p = program()
    d = ProbabilityFlow().distribution(p)
    transform = biject_to(d.support)
    z = points(20)
    x = transform(z)
    kept, fresh = d.log_prob(x), d.log_prob(x.clone())
    assert torch.allclose(kept, fresh, atol=0.1)  # by steps that keep 1e-3 of w, which the log-determinant magnifies
    exact = ProbabilityFlow(rtol=1e-8, atol=1e-8).log_evidence(p, x).value
    assert torch.allclose(fresh, exact, atol=1e-3)


def test_a_distribution_wants_steps_that_know_their_error():
    with pytest.raises(ValueError, match="needs solver='dopri5'"):
        ProbabilityFlow("rk4", steps=10).distribution(program())


def test_a_compiled_step_is_the_step(monkeypatch):
    monkeypatch.setattr("pyro_gen.distributions.transport.torch.compile", lambda graph: graph)  # trace it, compile not
    monkeypatch.setattr("pyro_gen.distributions.transport.PAYS", 3)
    p = program()
    d, z = ProbabilityFlow().distribution(p), points(1)
    values = []
    for _ in range(4):
        v = z.clone().requires_grad_()
        x, ladj = d.decode(v, weights=False)
        values.append((x.detach(), ladj.detach(), torch.autograd.grad(x.sum(), v)[0]))
    assert d.transport._steps
    assert all(step is not None for step in d.transport._steps.values())
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(values[0], values[-1], strict=True))
    with torch.no_grad():
        p.model.net.outer.mul_(1.01)  # a weight that changes in place is seen
    assert not torch.allclose(d.decode(z, weights=False)[0], values[0][0])


# ------------------------------------------------------------------------------------------------------------- sampling
def test_seeds_and_modes():
    p = program().train()
    flow = ProbabilityFlow(rtol=1e-3, atol=1e-3)
    state = torch.get_rng_state()
    a, b = flow.sample(p, 5, seed=1), flow.sample(p, 5, seed=1)
    assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert p.training
    assert p.model.net.dropout.training
    seeded = ProbabilityFlow(trace="hutchinson", seed=2, rtol=1e-3, atol=1e-3)
    x = points(2)
    assert torch.equal(seeded.log_evidence(p, x).value, seeded.log_evidence(p, x).value)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("flow", "states"), [(ProbabilityFlow("heun", steps=40), 41), (ProbabilityFlow(), 51)])
def test_trajectories_end_at_the_draw(flow, states):
    p = program()
    path, x = flow.sample(p, 3, seed=0, trajectory=True), flow.sample(p, 3, seed=0)
    assert path.shape == (states, 3, 2)
    assert torch.allclose(path[-1], x, atol=1e-3)


def test_fixed_steps_converge_to_the_adaptive_solve():
    p, x = program(), points(4)
    exact = ProbabilityFlow(rtol=1e-9, atol=1e-9).log_evidence(p, x).value
    few, many = (ProbabilityFlow("rk4", steps=n).log_evidence(p, x).value for n in (20, 80))
    assert (many - exact).abs().max() < 1e-3
    assert (many - exact).abs().max() < (few - exact).abs().max()
