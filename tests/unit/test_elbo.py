"""The evidence lower bound: Pyro's at equal seeds, enumeration and closed forms; right where Pyro's is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from estimators import assert_same, evaluate, repeat, worst
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

import pyro_gen as pg
from pyro_gen import handlers
from pyro_gen.base import ObjectiveModule

Pair = tuple[Callable[..., Any], Callable[..., Any]]
positive = dist.constraints.positive
ROWS, FULL = 6, 30


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Float64, so that equal is equal to rounding; an empty store, and the generators as they were."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        yield
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------------------ programs
def param(name: str, *shape: int, constraint: Any = dist.constraints.real) -> Tensor:
    start = torch.linspace(0.4, 1.1, max(1, math.prod(shape))).reshape(shape)
    return pyro.param(name, start, constraint=constraint)


def local() -> Pair:
    def model(x: Tensor) -> None:
        scale = param("scale", constraint=positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * param("w"), scale), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(param("slope") * x, param("spread", constraint=positive)))

    return model, guide


def globals_too() -> Pair:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc[..., :1].sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z + loc[..., 1], param("scale", constraint=positive)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(param("loc_q", 2), 0.3).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(param("slope") * x, param("spread", constraint=positive)))

    return model, guide


def subsampled() -> Pair:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, param("scale", constraint=positive)), obs=x[index])

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(param("w_q"), 0.5))
        with pyro.plate("data", len(x), subsample_size=3) as index:
            pyro.sample("z", dist.Normal(param("slope") * x[index], param("spread", constraint=positive)))

    return model, guide


def scaled() -> Pair:
    model, guide = local()
    return poutine.scale(model, 2.5), poutine.scale(guide, 0.5)


def masked() -> Pair:
    model, guide = local()
    seen = torch.arange(ROWS) % 3 != 0

    def hide(program: Callable[..., Any]) -> Callable[..., Any]:
        return poutine.mask(program, mask=seen)

    return hide(model), hide(guide)


def nested() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("columns", 2, dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(w, 1.0))
                pyro.factor("energy", -(z**2) * param("stiff", constraint=positive))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))

    def guide(x: Tensor) -> None:
        with pyro.plate("columns", 2, dim=-2):
            pyro.sample("w", dist.Normal(param("w_q", 2, 1), 0.5))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(param("slope") * x, param("spread", constraint=positive)))

    return model, guide


def poisson() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(k * param("w"), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Poisson(param("rate", ROWS, constraint=positive)))

    return model, guide


def bernoulli() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(k * param("w"), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=param("logits", ROWS)))

    return model, guide


def categorical() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
            pyro.sample("x", dist.Normal(param("locs", 3)[k], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=param("logits", ROWS, 3)))

    return model, guide


def mixed() -> Pair:
    """A global count, discrete and continuous latents of a row, the one given the other."""

    def model(x: Tensor) -> None:
        n = pyro.sample("n", dist.Poisson(torch.tensor(1.5)))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4)))
            z = pyro.sample("z", dist.Normal(k + 0.1 * n, 1.0))
            pyro.sample("x", dist.Normal(z, param("scale", constraint=positive)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("n", dist.Poisson(param("rate", constraint=positive)))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(logits=param("logits", ROWS)))
            pyro.sample("z", dist.Normal(param("slope") * x + k, 0.7))

    return model, guide


def constrained(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale[..., :1].sum(-1)), obs=x)


def auto(kind: Any) -> Callable[[], Pair]:
    return lambda: (constrained, kind(constrained))


PAIRS: dict[str, Callable[[], Pair]] = {
    "local": local,
    "globals": globals_too,
    "subsampled": subsampled,
    "scaled": scaled,
    "masked": masked,
    "nested": nested,
    "poisson": poisson,
    "bernoulli": bernoulli,
    "categorical": categorical,
    "mixed": mixed,
    "AutoNormal": auto(AutoNormal),
    "AutoMultivariateNormal": auto(AutoMultivariateNormal),
    "AutoDelta": auto(AutoDelta),
}
ROUGH = ("poisson", "bernoulli", "categorical")
PARTICLES = {"one": (1, False), "looped": (3, False), "at once": (3, True)}


def data() -> Tensor:
    return torch.linspace(-1.5, 2.0, ROWS)


def nesting(name: str) -> int:
    return 2 if name == "nested" else 1


# ---------------------------------------------------------------------------------------------- equal to Pyro's losses
@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_trace_elbo(name: str, particles: str) -> None:
    count, at_once = PARTICLES[particles]
    (model, guide), x = PAIRS[name](), data()
    loss = pg.ELBO(count, vectorize_particles=at_once)(model, guide)
    loss.prepare(x)
    theirs = Trace_ELBO(count, max_plate_nesting=nesting(name), vectorize_particles=at_once)
    wanted = evaluate(lambda: theirs.differentiable_loss(model, guide, x))
    assert_same(evaluate(lambda: loss(x)), wanted)
    assert any(bool(g.any()) for g in wanted[1].values())
    if name != "AutoDelta":  # whose loss is not random
        other = evaluate(lambda: loss(x), seed=4)
        assert other[0] != wanted[0]


MEAN_FIELD = ("local", "globals", "subsampled", "scaled", "masked", "nested")


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("name", MEAN_FIELD)
def test_analytic_kl_equals_trace_mean_field_elbo(name: str, particles: str) -> None:
    count, at_once = PARTICLES[particles]
    (model, guide), x = PAIRS[name](), data()
    if (
        name == "scaled"
    ):  # Pyro takes a site's KL under the guide's scale, where the model's is another there is no one KL
        model, guide = (poutine.scale(part, 2.5) for part in local())
    loss = pg.ELBO(count, analytic_kl=True, vectorize_particles=at_once)(model, guide)
    loss.prepare(x)
    theirs = TraceMeanField_ELBO(count, max_plate_nesting=nesting(name), vectorize_particles=at_once)
    wanted = evaluate(lambda: theirs.differentiable_loss(model, guide, x))
    assert_same(evaluate(lambda: loss(x)), wanted)
    sampled = evaluate(lambda: pg.ELBO(count, vectorize_particles=at_once)(model, guide)(x))
    assert abs(float(sampled[0] - wanted[0])) > 1e-3  # the closed form is another number than the draw


def test_under_two_scales_there_is_no_closed_form() -> None:
    (model, guide), x = scaled(), data()  # 2.5 log p - 0.5 log q, as it is written
    sampled, closed = (pg.ELBO(analytic_kl=analytic)(model, guide) for analytic in (False, True))
    closed.prepare(x)
    assert_same(evaluate(lambda: closed(x)), evaluate(lambda: sampled(x)))


def test_delta_sites_are_right_where_trace_mean_field_elbo_is_not() -> None:
    # KL(LogNormal(1, 0.2) || LogNormal(0, 1)) = log 5 + (0.04 + 1) / 2 - 1 / 2, of derivative 1 in the location.
    exact, slope = math.log(5) + 1.04 / 2 - 0.5, 1.0
    assert exact == pytest.approx(1.6294, abs=1e-4)

    def model() -> None:
        pyro.sample("x", dist.LogNormal(torch.tensor(0.0), 1.0))

    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"x": torch.tensor(math.e)}), init_scale=0.2)
    guide()
    found = {}
    for name, loss in {
        "ours": pg.ELBO(50, analytic_kl=True, vectorize_particles=True),
        "trace": Trace_ELBO(50, max_plate_nesting=0, vectorize_particles=True),
        "mean field": TraceMeanField_ELBO(50, max_plate_nesting=0, vectorize_particles=True),
    }.items():
        torch.manual_seed(0)
        found[name] = repeat(lambda f=loss: f.differentiable_loss(model, guide), 60)
    location = "AutoNormal.locs.x"
    for name, off in (("ours", False), ("trace", False), ("mean field", True)):
        value, error, means, errors = found[name]
        assert (abs(value - exact) > 4 * error) == off, name
        assert (abs(means[location] - slope) > 4 * errors[location]) == off, name
    torch.testing.assert_close(found["ours"][0], found["trace"][0])
    # what Pyro drops is -E log |dx/du| = -E u, whose value and derivative in the location are both -1
    off = found["mean field"]
    assert abs(off[0] - exact - 1) < 4 * off[1]
    assert abs(off[2][location] - slope - 1) < 4 * off[3][location]


def test_analytic_kl_is_less_noisy() -> None:
    (model, guide), x = local(), data()
    errors = []
    for analytic in (False, True):
        loss = pg.ELBO(analytic_kl=analytic)(model, guide)
        loss.prepare(x)
        value, error, *_ = repeat(lambda f=loss: f(x), 200)
        errors.append((value, error))
    (sampled, se), (closed, closed_se) = errors
    assert closed_se < se
    assert abs(sampled - closed) < 4 * torch.hypot(se, closed_se)


# ----------------------------------------------------------------------------------- guides that are not reparametrised
def exact_loss(name: str, x: Tensor) -> Tensor:
    """The negative bound by enumeration of the discrete sites and closed forms for the rest."""
    n01 = -0.5 * math.log(2 * math.pi)

    def expected(q: Any, log_p: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """E_q[log p - log q], the first dimension over the values of the site."""
        log_q = q.log_prob(values)
        return (log_q.exp() * (log_p(values) - log_q)).sum(0)

    if name == "mixed":
        log_scale, slope = param("scale", constraint=positive).log(), param("slope")
        n = torch.arange(40.0).reshape(-1, 1, 1)
        k = torch.arange(2.0).reshape(-1, 1)
        q_k = dist.Bernoulli(logits=param("logits", ROWS))
        loc = slope * x + k
        z = n01 - (0.49 + (loc - k - 0.1 * n) ** 2) / 2  # E log p(z | k, n), of shape (n, k, rows)
        z = z + n01 - log_scale - ((x - loc) ** 2 + 0.49) / (2 * (2 * log_scale).exp())
        z = z - (n01 - math.log(0.7) - 0.5)
        log_q = q_k.log_prob(k)
        rows = (log_q.exp() * (dist.Bernoulli(torch.tensor(0.4)).log_prob(k) - log_q + z)).sum(1)  # (n, rows)
        counts = n[:, 0, 0]
        q_n = dist.Poisson(param("rate", constraint=positive))
        return -expected(q_n, lambda v: dist.Poisson(torch.tensor(1.5)).log_prob(v) + rows.sum(1), counts)
    if name == "poisson":
        values, prior, q = torch.arange(80.0)[:, None], dist.Poisson(torch.tensor(2.0)), None
        q = dist.Poisson(param("rate", ROWS, constraint=positive))
        locs = values * param("w")
    elif name == "bernoulli":
        values, prior = torch.arange(2.0)[:, None], dist.Bernoulli(torch.tensor(0.3))
        q, locs = dist.Bernoulli(logits=param("logits", ROWS)), values * param("w")
    else:
        values, prior = torch.arange(3)[:, None], dist.Categorical(torch.tensor([0.2, 0.5, 0.3]))
        q, locs = dist.Categorical(logits=param("logits", ROWS, 3)), param("locs", 3)[:, None]
    return -expected(q, lambda v: prior.log_prob(v) + dist.Normal(locs, 1.0).log_prob(x), values).sum()


@pytest.mark.parametrize("name", [*ROUGH, "mixed"])
def test_score_function_gradient_is_unbiased(name: str) -> None:
    (model, guide), x = PAIRS[name](), data()
    many = pg.ELBO(100, vectorize_particles=True)(model, guide)
    many.prepare(x)
    value, gradient = evaluate(lambda: exact_loss(name, x))
    losses: dict[str, Callable[[], Tensor]] = {"forward": lambda: many(x)}
    if name != "mixed":  # which has a latent of all rows, so its rows have no losses of their own
        losses["pointwise"] = lambda: many.pointwise(x).sum()
        losses["no score term"] = lambda: -handlers.log_weight(model, guide, x, particles=100).mean(0).sum()
    else:
        losses["no score term"] = lambda: plain_weight(model, guide, x)
    for what, loss in losses.items():
        found, error, means, errors = repeat(loss, 60)
        assert abs(found - value) < 4 * error, what
        assert (worst(means, errors, gradient) < 4) == (what != "no score term"), what


def plain_weight(model: Any, guide: Any, x: Tensor) -> Tensor:
    guide_trace, model_trace = handlers.pair_traces(model, guide, x)
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


def test_auxiliary_sites_that_are_not_reparameterized() -> None:
    # q(u) q(z | u), u in the guide alone: E[log p(x, z) - log q(z | u) - log q(u)] has the entropy of u in it
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = param("logits", ROWS)
            u = pyro.sample("u", dist.Bernoulli(logits=logits), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 0.7))

    x = data()
    many = pg.ELBO(100, vectorize_particles=True)(model, guide)
    many.prepare(x)

    def exact() -> Tensor:
        u, q = torch.arange(2.0)[:, None], dist.Bernoulli(logits=param("logits", ROWS))
        log_q, n01 = q.log_prob(u), -0.5 * math.log(2 * math.pi)
        z = n01 - (0.49 + u**2) / 2 + n01 - (0.49 + (x - u) ** 2) / 2 - (n01 - math.log(0.7) - 0.5)
        return -(log_q.exp() * (z - log_q)).sum()

    value, gradient = evaluate(exact)
    for loss in (lambda: many(x), lambda: many.pointwise(x).sum()):
        found, error, means, errors = repeat(loss, 60)
        assert abs(found - value) < 4 * error
        assert worst(means, errors, gradient) < 4
    theirs = Trace_ELBO(100, max_plate_nesting=1, vectorize_particles=True)
    _, _, means, errors = repeat(lambda: theirs.differentiable_loss(model, guide, x), 60)
    assert worst(means, errors, gradient) > 4  # Pyro leaves the entropy of u out of the gradient


@pytest.mark.parametrize("name", [*ROUGH, "mixed"])
def test_score_function_terms_and_closed_kl_do_not_mix(name: str) -> None:
    # the KL has a closed form here too, and would leave E_q log p(x | k) without a gradient in q
    with pytest.raises(ValueError, match=r"analytic_kl=True differentiates through the draws.*use pg\.ELBO\(\)"):
        pg.ELBO(analytic_kl=True)(*PAIRS[name]())(data())


# --------------------------------------------------------------------------------------------------------- enumeration
def mixture(enumerate_in: str) -> Pair:
    mark = {"enumerate": "parallel"}

    def model(x: Tensor) -> None:
        weights = param("weights", 3, constraint=dist.constraints.simplex)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer=mark if enumerate_in == "model" else {})
            pyro.sample("x", dist.Normal(param("locs", 3)[k], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        if enumerate_in == "guide":
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Categorical(logits=param("logits", ROWS, 3)), infer=mark)

    return model, guide


def marginal(x: Tensor) -> Tensor:
    parts = dist.Normal(param("locs", 3), 1.0)
    weights = param("weights", 3, constraint=dist.constraints.simplex)
    return -torch.logsumexp(weights.log() + parts.log_prob(x[:, None]), 1).sum()


def guided(x: Tensor) -> Tensor:
    log_q = param("logits", ROWS, 3).log_softmax(-1)
    weights = param("weights", 3, constraint=dist.constraints.simplex)
    log_p = weights.log() + dist.Normal(param("locs", 3), 1.0).log_prob(x[:, None])
    return -(log_q.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize(("where", "exact"), [("model", marginal), ("guide", guided)], ids=["model", "guide"])
def test_enumerated_sites_are_summed_exactly(where: str, exact: Callable[[Tensor], Tensor]) -> None:
    (model, guide), x = mixture(where), data()
    loss = pg.ELBO()(model, guide)
    loss.prepare(x)
    assert_same(evaluate(lambda: loss(x)), evaluate(lambda: exact(x)))
    assert_same(evaluate(lambda: loss(x, total=5 * ROWS)), evaluate(lambda: 5 * exact(x)))
    assert evaluate(lambda: loss(x), seed=0)[0] == evaluate(lambda: loss(x), seed=1)[0]
    with torch.no_grad():  # as in SVI.evaluate_loss, and in a validation
        torch.testing.assert_close(loss(x, total=5 * ROWS), 5 * exact(x))


def test_enumeration_beside_latents_of_all_rows() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + 2 * k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(param("at"), 0.4))

    x = data()
    loss = pg.ELBO()(model, guide)
    loss.prepare(x)
    found = evaluate(lambda: loss(x, total=FULL))

    def by_hand() -> Tensor:
        q = dist.Normal(param("at"), 0.4)
        loc = q.rsample()
        log_x = torch.stack([dist.Normal(loc + 2 * k, 1.0).log_prob(x) + math.log(p) for k, p in ((0, 0.7), (1, 0.3))])
        rows = torch.logsumexp(log_x, 0).sum()
        return -(dist.Normal(0.0, 1.0).log_prob(loc) - q.log_prob(loc) + FULL / ROWS * rows)

    assert_same(found, evaluate(by_hand))


def test_what_enumeration_does_not_go_with_is_said() -> None:
    (model, guide), x = mixture("model"), data()
    with pytest.raises(ValueError, match="analytic_kl=True and enumerated"):
        pg.ELBO(analytic_kl=True)(model, guide)(x)
    with pytest.raises(ValueError, match="enumerated"):
        pg.ELBO()(model, guide).pointwise(x)


# ------------------------------------------------------------------------------------------------------------- scaling
def plated(full: int | None) -> Pair:
    """One program, its plate as long as the batch, or a plate of ``full`` rows of which the batch is a part."""

    def rows(x: Tensor) -> Any:
        return pyro.plate("data", full or len(x), subsample=torch.arange(len(x)))

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with rows(x):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, param("scale", constraint=positive)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(param("w_q"), 0.5))
        with rows(x):
            pyro.sample("z", dist.Normal(param("slope") * x, param("spread", constraint=positive)))

    return model, guide


def bound(objective: pg.ELBO, pair: Pair) -> ObjectiveModule:
    loss = objective(*pair)
    loss.prepare(data())
    return loss


@pytest.mark.parametrize("analytic", [False, True])
def test_total_is_what_a_subsampling_plate_does(analytic: bool) -> None:
    x, ours = data(), pg.ELBO(analytic_kl=analytic)
    theirs = (TraceMeanField_ELBO if analytic else Trace_ELBO)(max_plate_nesting=1)
    model, guide = plated(FULL)
    wanted = evaluate(lambda: theirs.differentiable_loss(model, guide, x))
    assert_same(evaluate(lambda: bound(ours, plated(None))(x, total=FULL)), wanted)
    own = bound(ours, (model, guide))
    assert_same(evaluate(lambda: own(x)), wanted)
    assert_same(evaluate(lambda: own(x, total=FULL)), wanted)  # already scaled, so not again
    whole = evaluate(lambda: poutine_scaled(x))  # scaling the whole program counts the global latent N / B times
    assert abs(float(whole[0] - wanted[0])) > 1e-3


def poutine_scaled(x: Tensor) -> Tensor:
    model, guide = (poutine.scale(part, FULL / ROWS) for part in plated(None))
    return Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)


def test_without_a_plate_over_rows() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0).expand([ROWS]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(param("w_q"), 0.5))

    x, loss = data(), pg.ELBO()(model, guide)
    wanted = evaluate(lambda: Trace_ELBO().differentiable_loss(model, guide, x))
    assert_same(evaluate(lambda: loss(x)), wanted)
    with pytest.raises(ValueError, match="total= needs one value a row, and this program has no plate over its 6 rows"):
        loss(x, total=FULL)


def test_scripts_that_pass_no_tensor() -> None:
    x = data()
    (model, guide) = globals_too()
    for call in ((lambda loss: loss()), (lambda loss: loss(rows=x))):
        loss = pg.ELBO()(lambda rows=x: model(rows), lambda rows=x: guide(rows))
        wanted = evaluate(lambda: Trace_ELBO().differentiable_loss(model, guide, x))
        assert_same(evaluate(lambda f=loss, c=call: c(f)), wanted)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3"])
def test_number_of_particles(count: Any) -> None:
    with pytest.raises(ValueError, match="num_particles must be an int of at least 1"):
        pg.ELBO(count)
