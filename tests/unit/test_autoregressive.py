"""Autoregressive programs: normalised, ordered, and drawn as they are scored."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Predictive
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from scipy.stats import chi2
from torch import Tensor
from torch.func import functional_call, jacrev

import pyro_gen as pg
from pyro_gen import testing
from pyro_gen.programs.autoregressive import Autoregressive

N = 4  # rows of the small batches here
HIDDEN: dict[str, Any] = {"hidden": (12, 9)}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def moved(program: Autoregressive, size: float = 3.0) -> Autoregressive:
    """In float64, with weights far from those of the start, where conditionals hardly depend on anything."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in program.double().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(size * noise / math.sqrt(parameter.shape[-1]))
    return program


def grid(levels: int, features: int) -> Tensor:
    """All configurations, (levels ** features, features)."""
    return torch.tensor(list(itertools.product(range(levels), repeat=features)), dtype=torch.float64)


def real() -> Tensor:
    return torch.randn(N, 3, generator=torch.Generator().manual_seed(2)).double()


def whole(levels: int) -> Tensor:
    return torch.randint(levels, (N, 3), generator=torch.Generator().manual_seed(2)).double()


CASES: dict[str, tuple[Callable[[], Autoregressive], Callable[[], Tensor]]] = {
    "bernoulli": (lambda: Autoregressive(3, **HIDDEN), lambda: whole(2)),
    "categorical": (lambda: Autoregressive(3, "categorical", levels=4, **HIDDEN), lambda: whole(4)),
    "discretized": (lambda: Autoregressive(3, "discretized_logistic", levels=4, **HIDDEN), lambda: whole(4)),
    "discretized one hot": (
        lambda: Autoregressive(3, "discretized_logistic", levels=4, components=2, one_hot=True, **HIDDEN),
        lambda: whole(4),
    ),
    "mixture": (lambda: Autoregressive(3, "mixture_of_logistics", components=2, **HIDDEN), real),
    "normal": (lambda: Autoregressive(3, "normal", **HIDDEN), real),
    "linear": (lambda: Autoregressive(3, "normal", hidden=(), scale="feature"), real),
    "order": (lambda: Autoregressive(3, "normal", scale="feature", order=[2, 0, 1], **HIDDEN), real),
    "orders": (lambda: Autoregressive(3, orders=3, **HIDDEN), lambda: whole(2)),
}
every = pytest.mark.parametrize("name", CASES)


# ------------------------------------------------------------------------------------------------------- normalised
@pytest.mark.parametrize("options", [{}, {"order": [2, 0, 3, 1]}, {"orders": 3}], ids=["one", "given", "mixture"])
@pytest.mark.parametrize(
    ("likelihood", "levels"),
    [("bernoulli", None), ("categorical", 3), ("discretized_logistic", 3)],
)
@pytest.mark.parametrize("context", [False, True])
def test_probabilities_of_all_configurations_sum_to_one(
    likelihood: str, levels: int | None, options: dict[str, Any], context: bool
) -> None:
    program = moved(
        Autoregressive(4, likelihood, levels=levels, context_shape=2 if context else None, **HIDDEN, **options)
    )
    x = grid(levels or 2, 4)
    for c in torch.randn(3, 2).double() if context else [None]:
        rows = () if c is None else (c.expand(len(x), 2),)
        log_p = program.log_prob(x, *rows).detach()
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
        assert float(log_p.max() - log_p.min()) > 3  # and they differ


def test_a_mask_that_lets_a_value_see_itself_is_seen() -> None:
    program = moved(Autoregressive(4, **HIDDEN))
    program.model.conditionals.net.layers[-1].mask.fill_(1.0)
    assert abs(program.log_prob(grid(2, 4)).exp().sum().item() - 1) > 0.01


@pytest.mark.parametrize("likelihood", ["mixture_of_logistics", "normal"])
@pytest.mark.parametrize("orders", [1, 2])
def test_densities_integrate_to_one(likelihood: str, orders: int) -> None:
    # Smooth and wide against the step: the trapezoid rule is exact up to the tails, e^(-60 / 1) at the edge.
    for features, span, step in ((1, 60.0, 0.01), (2, 50.0, 0.2)):
        program = moved(Autoregressive(features, likelihood, orders=orders, hidden=(10,)), 0.7)
        program.initialise(torch.tensor([[-1.0], [2.0]]).double().expand(2, features))  # sd 1.5 and mean 0.5
        axis = torch.arange(-span, span, step, dtype=torch.float64)
        x = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
        with torch.no_grad():
            total = sum(float(program.log_prob(part).exp().sum()) for part in x.split(200_000)) * step**features
        assert total == pytest.approx(1, abs=1e-5)


def test_a_mixture_over_orders_is_the_mean_of_its_parts() -> None:
    mixture = moved(Autoregressive(4, orders=3, **HIDDEN))
    x, parts = grid(2, 4), []
    orders = mixture.model.conditionals.orders
    assert orders is not None
    assert orders[0] == (0, 1, 2, 3)
    assert len(set(orders)) == 3
    for order in orders:
        part = Autoregressive(4, order=order, **HIDDEN).double()
        part.load_state_dict(mixture.state_dict())
        parts.append(part.log_prob(x).exp())
    assert not torch.allclose(parts[0], parts[1], rtol=1e-2)
    torch.testing.assert_close(mixture.log_prob(x).exp(), torch.stack(parts).mean(0), rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------- structure
@pytest.mark.parametrize("name", ["mixture", "normal", "order"])
def test_conditionals_see_what_comes_before(name: str) -> None:
    program = moved(CASES[name][0](), 1.0)
    parts = program.model.conditionals
    order = torch.tensor(parts.orders[0] if parts.orders else (0, 1, 2))

    def numbers(u: Tensor) -> Tensor:
        return parts.net(parts.embed(u).flatten(-2), None, order)

    slopes = jacrev(numbers)(real()[0])  # (D, P, D)
    seen = (slopes != 0).any(1)[order][:, order]
    assert torch.equal(seen, torch.ones(3, 3).tril(-1).bool())
    backwards = (slopes != 0).any(1).flip(0).flip(1)[order][:, order]
    assert not torch.equal(backwards, torch.ones(3, 3).tril(-1).bool())


def test_images_come_row_by_row() -> None:
    flat = moved(Autoregressive(6, **HIDDEN))
    image = Autoregressive((1, 2, 3), **HIDDEN).double()
    image.load_state_dict(flat.state_dict())
    x = grid(2, 6)
    assert torch.equal(image.log_prob(x.reshape(-1, 1, 2, 3)), flat.log_prob(x))
    assert torch.equal(image.sample(5, seed=0).flatten(1), flat.sample(5, seed=0))
    assert image.distribution().event_shape == (1, 2, 3)


# -------------------------------------------------------------------------------------------------------------- draws
def misfit(counts: Tensor, p: Tensor) -> float:
    """The p-value of counts under probabilities, by Pearson's χ²."""
    expected = counts.sum() * p
    assert float(expected.min()) > 5
    return float(chi2.sf(float(((counts - expected).square() / expected).sum()), len(p) - 1))


@pytest.mark.parametrize("options", [{}, {"order": [2, 0, 1]}, {"orders": 3}], ids=["one", "given", "mixture"])
@pytest.mark.parametrize(("likelihood", "levels"), [("bernoulli", None), ("discretized_logistic", 3)])
def test_draws_have_the_probabilities(likelihood: str, levels: int | None, options: dict[str, Any]) -> None:
    program = moved(Autoregressive(3, likelihood, levels=levels, **HIDDEN, **options), 0.8)
    base = levels or 2
    x, n = program.sample(40_000, seed=0), 40_000
    code = (x @ torch.tensor([base**2, base, 1.0]).double()).long()
    counts, p = torch.bincount(code, minlength=base**3).double(), program.log_prob(grid(base, 3)).exp().detach()
    assert misfit(counts, p) > 1e-3
    assert bool(((counts - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt()).all())
    other = Autoregressive(3, likelihood, levels=levels, **HIDDEN, order=[1, 2, 0]).double()
    other.load_state_dict(program.state_dict())
    assert misfit(counts, other.log_prob(grid(base, 3)).exp().detach()) < 1e-6  # another order of the same weights


@every
def test_draws_are_those_of_one_pass_a_value(name: str) -> None:
    program = moved(CASES[name][0](), 1.0)
    parts = program.model.conditionals
    if program.config is not None and program.config["orders"] > 1:
        program = Autoregressive(3, order=[1, 2, 0], **HIDDEN).double()
        program.load_state_dict(moved(CASES[name][0](), 1.0).state_dict())
        parts = program.model.conditionals
    if parts.units is not None:
        program.initialise(3 * real() + 1)
    order = parts.orders[0] if parts.orders else (0, 1, 2)
    torch.manual_seed(5)
    u = torch.zeros(50, 3).double()
    with torch.no_grad():
        for i in order:
            numbers = parts.net(parts.embed(u).flatten(-2), None, torch.tensor(order))
            u[:, i] = parts.likelihood.each(numbers[:, i], i).sample()
        expected = u if parts.units is None else parts.units.inverse(u)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(program.distribution().sample((50,)), expected, rtol=1e-9, atol=1e-9)


def test_each_hidden_unit_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Autoregressive(7, hidden=(12, 9))
    seen: list[int] = []
    original = program.model.conditionals.net.activation

    def counting(h: Tensor) -> Tensor:
        seen.append(h.numel())
        return original(h)

    program.model.conditionals.net.activation = counting
    program.distribution().sample((10,))
    assert sum(seen) == 10 * (12 + 9)  # naive: seven times as many


# ------------------------------------------------------------------------------------------------------- as a program
@every
def test_promises_of_a_program(name: str) -> None:
    program, x = CASES[name][0](), CASES[name][1]().float()
    testing.check_shapes(program, x)
    testing.check_density(program, x)
    testing.check_state(program, x)
    testing.check_deepcopy(program, x)
    testing.check_seeds(program)
    testing.check_predictive(program, x)
    testing.check_predictive(program, x, parallel=True)
    testing.check_render(program, x)
    if not program.distribution().support.is_discrete:
        testing.check_score(program, x)


@pytest.mark.parametrize("shape", [2, (2, 1)])
def test_promises_of_a_conditional_program(shape: Any) -> None:
    program = Autoregressive((1, 3), orders=2, context_shape=shape, **HIDDEN)
    x, context = whole(2).float().unsqueeze(1), torch.randn(N, *program.context_shape)  # type: ignore[misc]
    testing.check_shapes(program, x, context)
    testing.check_density(program, x, context)
    testing.check_state(program, x, context)
    testing.check_seeds(program, context)
    testing.check_predictive(program, x, context, parallel=True)
    assert bool((program.log_prob(x, context) != program.log_prob(x, context + 1)).all())


@every
@pytest.mark.parametrize(
    "objective", [pg.MaximumLikelihood(), pg.ELBO(), pg.ELBO(3, vectorize_particles=True), pg.IWAE(3)], ids=repr
)
def test_every_objective_is_the_log_likelihood(name: str, objective: Any) -> None:
    program, x = CASES[name][0]().double(), CASES[name][1]()
    loss = objective(program)
    torch.testing.assert_close(loss(x), -program.log_prob(x).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss(x, total=100), -100 / N * program.log_prob(x).sum(), rtol=1e-12, atol=1e-12)
    module = objective(CASES[name][0]())
    testing.check_gradients(module, x.float())
    testing.check_one_device(module, x.float())
    testing.check_traced(module, x.float())


# --------------------------------------------------------------------------------------------------- as a distribution
def test_distribution_broadcasts_and_expands() -> None:
    program = moved(Autoregressive(3, context_shape=2, **HIDDEN))
    context, x = torch.randn(N, 2).double(), whole(2)
    d = program.distribution(context)
    assert (d.batch_shape, d.event_shape) == ((N,), (3,))
    log_p = program.log_prob(x, context)
    torch.testing.assert_close(d.log_prob(x), log_p)
    wide = d.expand((5, N))
    assert wide.sample((2,)).shape == (2, 5, N, 3)
    torch.testing.assert_close(wide.log_prob(x), log_p.expand(5, N))
    torch.testing.assert_close(d.log_prob(x[0])[0], log_p[0])
    many = program.distribution(torch.randn(6, N, 2).double())
    assert many.batch_shape == (6, N)
    assert many.log_prob(x).shape == (6, N)
    kept = torch.arange(N) < 2
    torch.testing.assert_close(d.mask(kept).log_prob(x), log_p * kept)
    assert d.to_event(1).event_shape == (N, 3)
    with pytest.raises(RuntimeError, match="expand"):
        d.expand((N + 1,))
    free = Autoregressive(3, **HIDDEN).double().distribution()
    assert free.batch_shape == ()
    assert free.log_prob(x[0]).shape == ()
    assert free.sample().shape == (3,)
    assert not free.has_rsample
    assert free.support.is_discrete
    assert free.support.event_dim == 1


def test_distribution_serves_any_program() -> None:
    program = moved(Autoregressive(3, "normal", **HIDDEN), 0.7)

    def model(y: Tensor | None = None) -> Tensor:
        with pyro.plate("rows", 5):
            z = pyro.sample("z", program.distribution())
            return pyro.sample("y", dist.Normal(z, 0.1).to_event(1), obs=y)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (5,)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], program.log_prob(trace.nodes["z"]["value"]))
    drawn = Predictive(model, num_samples=4, parallel=True)()
    assert drawn["z"].shape == (4, 5, 3)


def test_weights_are_those_of_the_moment() -> None:
    program, x = Autoregressive(3, **HIDDEN), whole(2).float()
    early = program.distribution()
    replaced = {n: p.detach() + 0.3 for n, p in program.model.named_parameters()}
    traces: list[Any] = []

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = program.model

        def forward(self, x: Tensor) -> None:
            traces.append(poutine.trace(self.inner).get_trace(x))

    functional_call(Traced(), {f"inner.{n}": p for n, p in replaced.items()}, (x,))
    plain = poutine.trace(program.model).get_trace(x).log_prob_sum()
    other = Autoregressive(3, **HIDDEN)
    other.model.load_state_dict(replaced, strict=False)
    used = traces[0].log_prob_sum().item()
    assert used == pytest.approx(other.log_prob(x).sum().item(), rel=1e-6)
    assert abs(used - plain.item()) > 1e-3
    torch.testing.assert_close(early.log_prob(x), program.log_prob(x))


def test_priors_on_weights() -> None:
    program, x = Autoregressive(3, **HIDDEN), whole(2).float()
    to_pyro_module_(program.model)
    for module in program.model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(dist.Normal(torch.zeros_like(value), 1.0).to_event(value.dim())))
    traces = [poutine.trace(program.model).get_trace(x) for _ in range(3)]  # scored when all have been drawn
    found = [float(trace.nodes["x"]["fn"].log_prob(x).sum()) for trace in traces]
    assert len(set(found)) == 3
    names = [n for n, s in traces[0].nodes.items() if s["type"] == "sample" and not s["is_observed"]]
    assert "conditionals.net.layers.0.weight" in names
    again = poutine.trace(poutine.condition(program.model, {n: traces[0].nodes[n]["value"] for n in names}))
    assert float(again.get_trace(x).nodes["x"]["fn"].log_prob(x).sum()) == pytest.approx(found[0], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- real data
@pytest.mark.parametrize("likelihood", ["normal", "mixture_of_logistics"])
def test_density_is_in_the_units_of_the_data(likelihood: str) -> None:
    x = real()
    for size, shift in ((1e6, 3e7), (1e-6, -2e-6)):
        one, two = (moved(Autoregressive(3, likelihood, **HIDDEN), 0.7) for _ in range(2))
        one.initialise(x)
        two.initialise(size * x + shift)
        # the mean of shifted data is exact to rounding of the shift, 30 sd: 1e-14 of it
        expected = one.log_prob(x) - 3 * math.log(size)
        torch.testing.assert_close(two.log_prob(size * x + shift), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(two.sample(5, seed=0), size * one.sample(5, seed=0) + shift, rtol=1e-9, atol=0)


def test_initialise_takes_the_first_data_only() -> None:
    program = Autoregressive(2, "normal", **HIDDEN)
    program.initialise(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    state = program.state_dict()
    assert state["model.conditionals.units.loc"].tolist() == [2.0, 5.0]
    assert state["model.conditionals.units.scale"].tolist() == [1.0, 1.0]  # a constant has no scale to divide by
    before = program.log_prob(torch.ones(1, 2))
    program.initialise(torch.randn(10, 2))
    assert torch.equal(before, program.log_prob(torch.ones(1, 2)))


# ----------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("options", [{}, {"orders": 2}], ids=["one", "mixture"])
def test_fit_reaches_the_entropy_of_the_data(options: dict[str, Any]) -> None:
    """A table of 8 probabilities is within the model: at its best the loss is the entropy of the frequencies."""
    torch.manual_seed(0)
    p = torch.tensor([0.3, 0.02, 0.05, 0.13, 0.01, 0.29, 0.15, 0.05])
    counts = (200 * p).round().long()
    x = grid(2, 3).float().repeat_interleave(counts, 0)
    program = Autoregressive(3, hidden=(64,), **options)
    pg.fit(
        pg.MaximumLikelihood()(program), x, steps=600, lr=0.02, schedule="cosine", seed=0, compile=False, progress=False
    )
    entropy = -float((p * p.log()).sum())
    with torch.no_grad():
        found = -float(program.log_prob(x).mean())
    assert entropy - 1e-5 <= found <= entropy + 1e-3


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"likelihood": "categorical"}, "levels="),
        ({"likelihood": "discretized_logistic"}, "levels="),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"likelihood": 3}, "likelihood must be a name"),
        ({"levels": 3}, "levels= belongs to"),
        ({"components": 3}, "components= belongs to"),
        ({"scale": "feature"}, "scale= belongs to"),
        ({"likelihood": "normal", "scale": "shared"}, "scale must be 'predicted' or 'feature'"),
        ({"likelihood": "normal", "scale": 1.0}, "scale must be 'predicted' or 'feature'"),
        ({"likelihood": "normal", "one_hot": True}, "one_hot=True belongs to data with levels"),
        ({"one_hot": "yes"}, "one_hot must be True, False or None"),
        ({"hidden": 128}, "hidden must be a sequence"),
        ({"hidden": (0,)}, "hidden must be an int of at least 1"),
        ({"order": [0, 1]}, r"order must be a permutation of 0 … 2, got \[0, 1\]"),
        ({"order": [0, 1, 1]}, "order must be a permutation"),
        ({"order": "natural"}, "order must be a permutation"),
        ({"orders": 0}, "orders must be an int of at least 1"),
        ({"event_shape": 0}, "event_shape must be"),
        ({"context_shape": (2, 0)}, "context_shape must be"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Autoregressive(**{"event_shape": 3, **arguments})


def test_data_are_checked() -> None:
    program = Autoregressive(3, "categorical", levels=4, **HIDDEN)
    x = torch.tensor([[0.0, 1.0, 3.0], [0.0, 4.0, 1.0]])
    with pytest.raises(ValueError, match=r"0 … 3\) in 1 of 2 rows, first x\[1, 1\] = 4.*levels="):
        program.log_prob(x)
    with pytest.raises(ValueError, match="outside the support"):
        pg.fit(pg.MaximumLikelihood()(program), x, steps=1, progress=False)
    with pytest.raises(ValueError, match="support"):
        program.distribution().log_prob(x)
    with pytest.raises(ValueError, match="without one"):
        program.distribution(torch.zeros(2, 1))
    given = Autoregressive(3, context_shape=2, **HIDDEN)
    with pytest.raises(ValueError, match="context is missing"):
        given.log_prob(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="context is missing"):
        given.distribution()
    with pytest.raises(ValueError, match="context must be a tensor of shape"):
        given.distribution(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="constant in column 0"):
        pg.fit(pg.MaximumLikelihood()(Autoregressive(2, "normal")), torch.ones(4, 2), steps=1, progress=False)


def test_config_is_plain() -> None:
    program = Autoregressive((1, 2), "normal", order=(1, 0), orders=2, context_shape=3)
    assert json.loads(json.dumps(program.config)) == program.config
