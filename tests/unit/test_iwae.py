"""The importance-weighted bound against closed forms, where Pyro's ``RenyiELBO`` holds too and where it does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from estimators import assert_same, evaluate, repeat, worst
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyro_gen as pg
from pyro_gen import handlers

Pair = tuple[Callable[..., Any], Callable[..., Any]]
positive = dist.constraints.positive
WEIGHT = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.1]], dtype=torch.float64)
NOISE, ROWS, FULL = 0.6, 5, 20
EVERY = ("iwae", "dreg", "stl")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Float64, so that equal is equal to rounding; an empty store, and the generators as they were."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        yield
        torch.set_default_dtype(torch.float32)


# -------------------------------------------------------------------------------- z ~ N(0, I), x | z ~ N(z W, noise² I)
def data(rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(rows, 2, generator=generator)
    return z @ WEIGHT + NOISE * torch.randn(rows, 3, generator=generator)


def evidence(x: Tensor) -> Tensor:
    return dist.MultivariateNormal(torch.zeros(3), WEIGHT.T @ WEIGHT + NOISE**2 * torch.eye(3)).log_prob(x)


def linear(plate: Callable[[Tensor], Any] | None = None, spread: float = 0.45) -> Pair:
    """The program, with a guide that is off in its location and scale."""

    def rows(x: Tensor) -> Any:
        return pyro.plate("data", len(x)) if plate is None else plate(x)

    def part(x: Tensor, index: Any) -> Tensor:
        return x if index is None or len(index) == len(x) else x[index]

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", WEIGHT.clone())
        with rows(x) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, NOISE).to_event(1), obs=part(x, index))

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.full((3, 2), 0.3))
        scale = pyro.param("spread", torch.full((2,), spread), constraint=positive)
        with rows(x) as index:
            pyro.sample("z", dist.Normal(part(x, index) @ slope, scale).to_event(1))

    return model, guide


def at_posterior() -> Pair:
    """The same program, its guide the posterior."""
    precision = torch.eye(2) + WEIGHT @ WEIGHT.T / NOISE**2
    model, _ = linear()

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", WEIGHT.T @ precision.inverse() / NOISE**2)
        chol = pyro.param("chol", torch.linalg.cholesky(precision.inverse()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ slope, scale_tril=chol))

    return model, guide


def fixed_rows(x: Tensor) -> Any:
    return pyro.plate("data", FULL, subsample=torch.arange(ROWS))


def random_rows(x: Tensor) -> Any:
    return pyro.plate("data", FULL, subsample_size=ROWS)


def scale_by(factor: float) -> Callable[[], Pair]:
    def build() -> Pair:
        model, guide = linear()
        return poutine.scale(model, factor), poutine.scale(guide, factor)

    return build


SETTINGS: dict[str, tuple[Callable[[], Pair], int, float]] = {  # the pair, rows of x, the scale of a row
    "plain": (linear, ROWS, 1.0),
    "plate of which the batch is a part": (lambda: linear(fixed_rows), ROWS, FULL / ROWS),
    "plate that draws its rows": (lambda: linear(random_rows), FULL, 1.0),
    "poutine.scale": (scale_by(3.0), ROWS, 3.0),
}


def rises_to_the_evidence(loss_of: Callable[[int], Callable[[], Tensor]], exact: float) -> list[str]:
    """What is wrong with the means over 200 repeats at K = 1, 10, 100, 1000; nothing for a bound that tightens."""
    wrong, last = [], None
    with torch.no_grad():
        for k in (1, 10, 100, 1000):
            loss = loss_of(k)
            values = -torch.stack([torch.as_tensor(loss()) for _ in range(200)])
            mean, error = float(values.mean()), float(values.std()) / math.sqrt(200)
            if mean > exact + 4 * error:
                wrong.append(f"K={k}: {mean:.3f} ± {error:.3f} is above {exact:.3f}")
            if last is not None and mean < last[0] - 2 * math.hypot(error, last[1]):
                wrong.append(f"K={k}: {mean:.3f} ± {error:.3f} falls from {last[0]:.3f}")
            last = mean, error
    assert last is not None
    if abs(last[0] - exact) > 4 * last[1] + 0.01 * abs(exact):
        wrong.append(f"K=1000: {last[0]:.3f} ± {last[1]:.3f} is not {exact:.3f}")
    return wrong


@pytest.mark.parametrize("setting", SETTINGS)
def test_bound_rises_to_the_evidence(setting: str) -> None:
    build, rows, scale = SETTINGS[setting]
    (model, guide), x = build(), data(rows)
    exact = scale * float(evidence(x).sum())

    def ours(k: int) -> Callable[[], Tensor]:
        loss = pg.IWAE(k)(model, guide)
        return lambda: loss(x)

    def pyros(k: int) -> Callable[[], Any]:
        loss = RenyiELBO(0, num_particles=k, max_plate_nesting=1, vectorize_particles=k > 1)
        return lambda: loss.loss(model, guide, x)

    assert rises_to_the_evidence(ours, exact) == []
    # Pyro scales inside the logarithm: log mean w^s, which for s > 1 is above s log mean w
    assert bool(rises_to_the_evidence(pyros, exact)) == (setting != "plain")


def test_total_scales_outside_of_the_logarithm() -> None:
    (model, guide), x = linear(), data()
    for gradient in EVERY:
        loss = pg.IWAE(7, gradient=gradient)(model, guide)
        loss.prepare(x)
        value, grads = evaluate(lambda f=loss: f(x))
        assert_same(evaluate(lambda f=loss: f(x, total=FULL)), (4 * value, {n: 4 * g for n, g in grads.items()}))
        plate = pg.IWAE(7, gradient=gradient)(*linear(fixed_rows))
        assert_same(evaluate(lambda f=plate: f(x)), evaluate(lambda f=loss: f(x, total=FULL)))
        assert_same(evaluate(lambda f=plate: f(x, total=FULL)), evaluate(lambda f=plate: f(x)))


def test_by_hand() -> None:
    (model, guide), x = linear(), data()
    loss = pg.IWAE(7)(model, guide)
    loss.prepare(x)

    def by_hand() -> Tensor:
        slope, spread = pyro.param("slope"), pyro.param("spread")
        q = dist.Normal((x @ slope).expand(7, -1, -1), spread)
        z = q.rsample()
        log_w = dist.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)
        log_w = log_w.sum(-1) + dist.Normal(z @ pyro.param("weight"), NOISE).log_prob(x).sum(-1)
        return -(torch.logsumexp(log_w, 0) - math.log(7)).sum()

    assert_same(evaluate(lambda: loss(x)), evaluate(by_hand))
    assert_same(evaluate(lambda: loss.pointwise(x).sum()), evaluate(by_hand))
    assert loss.pointwise(x).shape == (ROWS,)


def test_one_particle_is_the_elbo() -> None:
    (model, guide), x = linear(), data()
    elbo = pg.ELBO()(model, guide)
    elbo.prepare(x)
    wanted = evaluate(lambda: elbo(x))
    for gradient, at_once in itertools.product(EVERY, (True, False)):
        loss = pg.IWAE(1, gradient=gradient, vectorize_particles=at_once)(model, guide)
        found = evaluate(lambda f=loss: f(x))
        if gradient == "iwae":
            assert_same(found, wanted)
        else:  # the score of q, of mean zero, is left out of the guide's gradient
            torch.testing.assert_close(found[0], wanted[0])
            torch.testing.assert_close(found[1]["weight"], wanted[1]["weight"])
            assert not torch.allclose(found[1]["spread"], wanted[1]["spread"])


@pytest.mark.parametrize("gradient", EVERY)
def test_looped_and_at_once_agree(gradient: Any) -> None:
    (model, guide), x = linear(), data()
    found = []
    for at_once in (True, False):
        loss = pg.IWAE(3, gradient=gradient, vectorize_particles=at_once)(model, guide)
        loss.prepare(x)
        found.append(repeat(lambda f=loss: f(x), 150))
    (one, se, means, errors), (two, other, again, its) = found
    assert abs(one - two) < 4 * math.hypot(se, other)
    assert worst(means, {n: torch.hypot(e, its[n]) for n, e in errors.items()}, again) < 4


# ------------------------------------------------------------------------------------------------------------ gradients
GUIDE = ("slope", "spread")


def gradients(
    gradient: Any, k: int, repeats: int, pair: Pair | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    (model, guide), x = pair or linear(), data()
    loss = pg.IWAE(k, gradient=gradient)(model, guide)
    loss.prepare(x)
    torch.manual_seed(EVERY.index(gradient))
    _, _, means, errors = repeat(lambda: loss(x), repeats)
    return means, errors


def test_dreg_is_unbiased_and_quieter_and_stl_is_biased() -> None:
    iwae, iwae_error = gradients("iwae", 8, 400)
    dreg, dreg_error = gradients("dreg", 8, 400)
    stl, stl_error = gradients("stl", 8, 400)

    def off(means: dict[str, Tensor], errors: dict[str, Tensor]) -> float:
        return worst(means, {n: torch.hypot(e, iwae_error[n]) for n, e in errors.items()}, iwae)

    assert off(dreg, dreg_error) < 4
    assert off({n: stl[n] for n in ("weight",)} | {n: iwae[n] for n in GUIDE}, stl_error) < 4  # the model's is plain
    assert off(stl, stl_error) > 4  # so the test could have failed

    def noise(errors: dict[str, Tensor]) -> float:
        return sum(float(errors[n].square().sum()) for n in GUIDE)

    assert noise(dreg_error) < 0.5 * noise(iwae_error)


def test_signal_of_the_guide_falls_with_k_but_for_dreg() -> None:
    # Rainforth et al. 2018: over K = 4 to 64 signal to noise falls by 4 for "iwae"; it rises by 4 for "dreg"
    precision = torch.eye(2) + WEIGHT @ WEIGHT.T / NOISE**2
    slope = pyro.param("slope", WEIGHT.T @ precision.inverse() / NOISE**2 + 0.3)  # not far from the posterior
    assert slope.shape == (3, 2)

    def signal(gradient: str, k: int) -> float:
        means, errors = gradients(gradient, k, 250, linear(spread=0.6))
        norm = math.sqrt(sum(float(means[n].square().sum()) for n in GUIDE))
        return norm / math.sqrt(250 * sum(float(errors[n].square().sum()) for n in GUIDE))

    assert signal("iwae", 64) < 0.5 * signal("iwae", 4)
    assert signal("dreg", 64) > 2 * signal("dreg", 4)


def test_at_the_posterior_the_guide_has_no_noise() -> None:
    (model, guide), x = at_posterior(), data()
    for gradient in EVERY:
        loss = pg.IWAE(5, gradient=gradient)(model, guide)
        loss.prepare(x)
        value, grads = evaluate(lambda f=loss: f(x))
        torch.testing.assert_close(value, -evidence(x).sum())
        still = all(float(grads[n].abs().max()) < 1e-9 for n in ("slope", "chol"))
        assert still == (gradient != "iwae")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Linear(3, 2, bias=False)
        nn.init.constant_(self.slope.weight, 0.3)
        self.log_spread = nn.Parameter(torch.full((2,), 0.45).log())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope(x), self.log_spread.exp()).to_event(1))


class PyroEncoder(PyroModule):  # type: ignore[misc, no-any-unimported, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.slope = PyroModule[nn.Linear](3, 2, bias=False)
        nn.init.constant_(self.slope.weight, 0.3)
        self.spread = PyroParam(torch.full((2,), 0.45), constraint=positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope(x), self.spread).to_event(1))


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("gradient", EVERY)
def test_gradients_do_not_depend_on_how_a_guide_is_written(gradient: Any, local: bool) -> None:
    x, (model, by_function) = data(), linear()
    found = []
    with pyro.settings.context(module_local_params=local):
        for guide in (by_function, Encoder(), PyroEncoder()):
            with pyro.get_param_store().scope():
                loss = pg.IWAE(4, gradient=gradient)(model, guide)
                loss.prepare(x)
                torch.manual_seed(1)
                loss(x).backward()
                grads = {tuple(t.shape): t.grad for t in loss.trainable()}
            if (3, 2) in grads:
                grads[2, 3] = torch.cat([grads.pop((3, 2)).T])
            found.append({shape: grads[shape] for shape in ((2,), (2, 3))})
    for other in found[1:]:
        torch.testing.assert_close(other[2,], found[0][2,])
    torch.testing.assert_close(found[1][2, 3], found[2][2, 3])


# ------------------------------------------------------------------------------------------ latents of all rows at once
def shared() -> Pair:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, pyro.param("noise", torch.tensor(0.9), constraint=positive)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.6))

    return model, guide


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("gradient", EVERY)
def test_latents_of_all_rows_share_one_weight(gradient: Any, at_once: bool) -> None:
    (model, guide), x = shared(), data()[:, 0]
    exact = float(
        dist.MultivariateNormal(torch.zeros(ROWS), torch.ones(ROWS, ROWS) + 0.81 * torch.eye(ROWS)).log_prob(x)
    )
    loss = pg.IWAE(100 if at_once else 5, gradient=gradient, vectorize_particles=at_once)(model, guide)
    loss.prepare(x)
    found, error, means, errors = repeat(lambda: loss(x), 60)
    assert -float(found) < exact + 4 * float(error)
    assert -float(found) > exact - 4 * float(error) - 0.1
    iwae = pg.IWAE(100 if at_once else 5, vectorize_particles=at_once)(model, guide)
    _, _, wanted, its = repeat(lambda: iwae(x), 200)
    if gradient != "stl":
        assert worst(means, {n: torch.hypot(e, its[n]) for n, e in errors.items()}, wanted) < 4


def test_latents_of_all_rows_under_an_autoguide() -> None:
    model, _ = shared()
    x, guide = data()[:, 0], AutoNormal(model, init_scale=0.6)
    results = {}
    for gradient in ("iwae", "dreg"):
        loss = pg.IWAE(20, gradient=gradient)(model, guide)
        loss.prepare(x)
        results[gradient] = repeat(lambda f=loss: f(x), 150)
    (_, _, wanted, its), (_, _, means, errors) = results.values()
    assert worst(means, {n: torch.hypot(e, its[n]) for n, e in errors.items()}, wanted) < 4


def test_latents_of_all_rows_need_all_rows() -> None:
    (model, guide), x = shared(), data()[:, 0]
    with pytest.raises(ValueError, match=r"site 'x' is scaled by 4\.0.*whole data set in every batch.*pg\.ELBO"):
        pg.IWAE(3)(model, guide)(x, total=FULL)
    assert torch.isfinite(pg.IWAE(3)(model, guide)(x, total=ROWS))
    with pytest.raises(ValueError, match="stands outside"):
        pg.IWAE(3)(model, guide).pointwise(x)


# ----------------------------------------------------------------------------------- guides that are not reparametrised
def coins() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(k * pyro.param("w", torch.tensor(1.2)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=pyro.param("logits", torch.linspace(-1, 1, ROWS))))

    return model, guide


def coins_exact(x: Tensor, k: int) -> Tensor:
    """Negative bound of K draws, by the sum over all that they can be."""
    q = dist.Bernoulli(logits=pyro.param("logits"))
    values = torch.arange(2.0)[:, None]
    log_q = q.log_prob(values)
    log_w = dist.Bernoulli(torch.tensor(0.3)).log_prob(values) - log_q
    log_w = log_w + dist.Normal(values * pyro.param("w"), 1.0).log_prob(x)
    total = torch.zeros(())
    for pick in itertools.product((0, 1), repeat=k):
        index = list(pick)
        bound = torch.logsumexp(log_w[index], 0) - math.log(k)
        total = total - (log_q[index].sum(0).exp() * bound).sum()
    return total


@pytest.mark.parametrize("at_once", [True, False])
def test_gradient_of_a_discrete_guide_is_unbiased(at_once: bool) -> None:
    (model, guide), x = coins(), data()[:, 0]
    loss = pg.IWAE(3, vectorize_particles=at_once)(model, guide)
    loss.prepare(x)
    value, exact = evaluate(lambda: coins_exact(x, 3))
    found, error, means, errors = repeat(lambda: loss(x), 400)
    assert abs(float(found - value)) < 4 * float(error)
    assert worst(means, errors, exact) < 4

    def without() -> Tensor:
        log_w = handlers.log_weight(model, guide, x, particles=3)
        return -(torch.logsumexp(log_w, 0) - math.log(3)).sum()

    _, _, means, errors = repeat(without, 300)
    assert worst(means, errors, exact) > 4


def test_gradient_of_a_discrete_guide_of_all_rows_is_unbiased() -> None:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.5), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(logits=pyro.param("logits", torch.tensor(0.4))))

    x = data()[:, 0]

    def exact() -> Tensor:
        q, values, total = dist.Bernoulli(logits=pyro.param("logits")), torch.arange(2.0), torch.zeros(())
        log_q = q.log_prob(values)
        log_w = dist.Bernoulli(torch.tensor(0.3)).log_prob(values) - log_q
        log_w = log_w + dist.Normal(values[:, None], 1.5).log_prob(x).sum(1)
        for pair in itertools.product((0, 1), repeat=2):
            both = list(pair)
            total = total - log_q[both].sum().exp() * (torch.logsumexp(log_w[both], 0) - math.log(2))
        return total

    for at_once in (True, False):
        loss = pg.IWAE(2, vectorize_particles=at_once)(model, guide)
        loss.prepare(x)
        value, gradient = evaluate(exact)
        found, error, means, errors = repeat(lambda f=loss: f(x), 500)
        assert abs(float(found - value)) < 4 * float(error)
        assert worst(means, errors, gradient) < 4


@pytest.mark.parametrize("gradient", ["dreg", "stl"])
def test_gradients_through_draws_need_draws_to_go_through(gradient: Any) -> None:
    with pytest.raises(ValueError, match=f"gradient='{gradient}' differentiates through the draws"):
        pg.IWAE(3, gradient=gradient)(*coins())(data()[:, 0])


# -------------------------------------------------------------------------------------------------- masks, flows, noise
def test_masked_rows_count_for_nothing() -> None:
    (model, guide), x = linear(), data()
    seen = torch.arange(ROWS) % 2 == 0
    hidden = [poutine.mask(part, mask=seen) for part in (model, guide)]
    loss, plain = pg.IWAE(4)(*hidden), pg.IWAE(4)(model, guide)
    loss.prepare(x)
    plain.prepare(x)
    torch.manual_seed(1)
    rows = loss.pointwise(x)
    torch.manual_seed(1)
    torch.testing.assert_close(rows, plain.pointwise(x) * seen)
    assert (rows == 0).tolist() == (~seen).tolist()


def test_flows_without_an_inverse_can_guide() -> None:
    flow = dist.transforms.Planar(2)

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(x @ pyro.param("slope", torch.full((3, 2), 0.3)), 0.6).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    (model, _), x = linear(), data()
    exact = float(evidence(x).sum())
    for at_once in (True, False):
        loss = pg.IWAE(5, vectorize_particles=at_once)(model, guide)
        loss.prepare(x)
        value, error, means, _ = repeat(lambda f=loss: f(x), 40)
        assert -float(value) < exact + 4 * float(error)
        assert all(m.any() for m in means.values())


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), torch.ones(2)).to_event(1))


def test_a_draw_is_weighed_under_the_dropout_it_came_from() -> None:
    (model, _), x, guide = linear(), data(), Dropping()
    for gradient in ("dreg", "stl"):
        with pytest.raises(ValueError, match="dropout would differ between the runs: use gradient='iwae'"):
            pg.IWAE(3, gradient=gradient)(model, guide)(x)  # type: ignore[arg-type]
    assert torch.isfinite(pg.IWAE(3)(model, guide)(x))
    guide.eval()
    assert torch.isfinite(pg.IWAE(3, gradient="dreg")(model, guide)(x))


class Holding(PyroModule):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """A PyroModule that holds a plain network, of which Pyro's store hears at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), torch.ones(2)).to_event(1))


def test_stopped_gradients_make_no_noise() -> None:
    (model, _), x, guide = linear(), data(), Holding()
    loss = pg.IWAE(3, gradient="dreg")(model, guide)
    loss(x).backward()  # a warning would be an error here
    assert guide.net.weight.grad is not None
    assert guide.net.weight.grad.any()
    assert all(p.requires_grad for p in guide.parameters())


# ------------------------------------------------------------------------------------------------------ what is refused
def test_arguments() -> None:
    for count in (0, -2, 1.5, True):
        with pytest.raises(ValueError, match="num_particles must be an int of at least 1"):
            pg.IWAE(count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient must be one of 'iwae', 'dreg', 'stl', got 'vimco'"):
        pg.IWAE(gradient="vimco")  # type: ignore[arg-type]


def test_rows_under_two_scales_have_no_bound() -> None:
    model, guide = linear()
    with pytest.raises(ValueError, match="carry different scales"):
        pg.IWAE(3)(poutine.scale(model, 2.0), guide)(data())


def test_enumerated_sites_are_sent_to_the_elbo() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"IWAE does not enumerate.*pg\.ELBO"):
        pg.IWAE(3)(model, lambda x: None)(data()[:, 0])
